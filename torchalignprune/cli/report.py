"""``torchalignprune report``: compare a pruned checkpoint folder with the dense one."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from torchalignprune.alignment_report import AlignmentReport, checkpoint_report
from torchalignprune.cli.options import SUFFIXES, input_errors, report_file
from torchalignprune.cli.output import (
    print_json,
    print_report,
    print_written,
    three_decimals,
    versions,
    writable_files,
    write_files,
)


def add_parser(commands: Any, **shared: Any) -> None:
    """Adds the command to those of the command line."""
    parser = commands.add_parser(
        "report",
        help="compare a pruned Transformers checkpoint folder with the dense one",
        description=(
            "Compare the weight matrices of a pruned Transformers checkpoint folder with those of\n"
            "the dense one: sparsity, alignment of the units, distortion, dead units. The weights\n"
            "are read from the files one matrix at a time; the models are not loaded."
        ),
        **shared,
    )
    parser.add_argument("dense", metavar="DENSE", type=Path, help="the dense model's folder")
    parser.add_argument("pruned", metavar="PRUNED", type=Path, help="the pruned model's folder")
    parser.add_argument(
        "--include",
        action="append",
        metavar="PATTERN",
        help="compare exactly the weights that match this glob pattern; may be repeated",
    )
    parser.add_argument(
        "--exclude",
        action="append",
        metavar="PATTERN",
        help="leave out the weights that match this glob pattern; may be repeated",
    )
    parser.add_argument(
        "--no-matching",
        action="store_true",
        help="do not search for moved units, which takes most of the time",
    )
    parser.add_argument(
        "--out",
        nargs="+",
        type=report_file,
        default=[],
        metavar="FILE",
        help="write the report to these files; the suffix sets the format: " + ", ".join(SUFFIXES),
    )
    parser.add_argument(
        "--json", action="store_true", help="print the report as JSON and nothing else"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    from torchalignprune import checkpoints

    started = time.perf_counter()
    with writable_files(options.out):
        with checkpoints.quiet_transformers(), input_errors():
            report, params = checkpoint_report(
                options.dense,
                options.pruned,
                options.include,
                options.exclude,
                matching=not options.no_matching,
                progress=sys.stderr.isatty(),
            )
        written = {
            "dense": str(options.dense),
            "pruned": str(options.pruned),
            "totals": report.totals,
            "layers": list(report),
            "left_out": params.left_out,
            "seconds": round(time.perf_counter() - started, 3),
            "versions": versions(),
            "command": options.command_line,
        }
        write_files(
            options.out, written, lambda file: report.plot(file, _report_title(options, report))
        )
    if options.json:
        print_json(written)
        return
    print_report(report)
    print(
        "mean, median, p5 (5th percentile) and worst: of the cosines between an output unit's "
        "pruned and dense weights;\ndead: units that are all zero"
        + ("" if options.no_matching else "; moved: output units closer to another dense unit")
    )
    print_written(options.out)


def _report_title(options: argparse.Namespace, report: AlignmentReport) -> str:
    return (
        f"{options.pruned.resolve().name} against {options.dense.resolve().name}\n"
        f"{report.totals['sparsity']:.1%} sparse, mean unit alignment "
        f"{three_decimals(report.totals['mean_alignment'])}"
    )
