"""``torchalignprune prune``: prune a checkpoint folder into another."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.utils.prune import remove

from torchalignprune.alignment_report import alignment_report
from torchalignprune.calibration import Calibration
from torchalignprune.cli.loading import load_checkpoint, load_tokenizer
from torchalignprune.cli.options import InputError, input_errors, seed, share
from torchalignprune.cli.output import (
    print_json,
    progress_bar,
    three_decimals,
    versions,
    writable,
    write_json,
)
from torchalignprune.cli.plan import Plan
from torchalignprune.parameters import PrunableParameters, prunable_parameters, stored
from torchalignprune.realign import Realigned, What, realign

_BATCH = 32


def add_parser(commands: Any, **shared: Any) -> None:
    """Adds the command to those of the command line."""
    parser = commands.add_parser(
        "prune",
        help="prune a Transformers checkpoint folder",
        description=(
            "Prune the weight matrices of a Transformers checkpoint folder (safetensors), except\n"
            "embeddings and heads, and write a folder that from_pretrained loads, with\n"
            "report.json and report.png. With --format bitmask the folder is smaller, and\n"
            "torchalignprune.load_pruned loads it."
        ),
        **shared,
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="the folder to prune")
    parser.add_argument(
        "--sparsity",
        type=share,
        metavar="S",
        help="the share of the weights to prune, from 0 to below 1; not for aligned-nm",
    )
    parser.add_argument(
        "--method",
        choices=["aligned-magnitude", "magnitude", "random", "aligned-nm"],
        help="the pruning method (default: aligned-magnitude, or magnitude with --criterion)",
    )
    parser.add_argument(
        "--alignment",
        choices=["cosine", "frobenius"],
        help="the alignment that aligned-magnitude preserves (default: cosine)",
    )
    parser.add_argument(
        "--units",
        choices=["out", "in", "both"],
        help="the units of aligned-magnitude: outputs, inputs or both (default: out)",
    )
    parser.add_argument(
        "--criterion",
        choices=["magnitude", "lamp", "lookahead", "wanda", "random"],
        help="rank the weights by these scores instead; wanda needs --calibration",
    )
    parser.add_argument(
        "--budget",
        choices=["global", "layer", "unit"],
        help="prune the share S of all weights together, of each layer or of each unit (default: "
        "global; unit with --criterion wanda, layer with lookahead)",
    )
    parser.add_argument(
        "--calibration",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="text files, one sentence per line: aligned-* and wanda weigh the weights by their "
        "inputs on this text",
    )
    parser.add_argument(
        "--realign",
        choices=["bias", "weights"],
        help="after pruning, move the biases, or the surviving weights too, so that the layers' "
        "outputs on the calibration text change least; goes with any method, needs --calibration",
    )
    parser.add_argument(
        "--include",
        action="append",
        metavar="PATTERN",
        help="prune exactly the weights that match this glob pattern; may be repeated",
    )
    parser.add_argument(
        "--exclude",
        action="append",
        metavar="PATTERN",
        help="do not prune the weights that match this glob pattern; may be repeated",
    )
    parser.add_argument(
        "--nm",
        type=_n_of_m,
        metavar="N:M",
        help="aligned-nm keeps N of every M neighbouring inputs of a unit (default: 2:4)",
    )
    parser.add_argument(
        "--seed",
        type=seed,
        default=0,
        help="the seed of --method random and --criterion random (default: 0)",
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="the folder to write"
    )
    parser.add_argument(
        "--format",
        choices=["dense", "bitmask"],
        default="dense",
        help="dense: zeros stored, for from_pretrained; bitmask: one bit per weight and the values "
        "that remain (default: dense)",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace DIR if it exists and is one checkpoint, with no others inside",
    )
    parser.add_argument(
        "--json", action="store_true", help="print the report as JSON and nothing else"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    from torchalignprune import checkpoints, saving
    from torchalignprune.figures import require_matplotlib

    plan = Plan(options)
    bitmask = options.format == "bitmask"
    sentences = _sentences(options.calibration) if options.calibration else []
    require_matplotlib()
    with input_errors():
        checkpoints.check_output(options.out, options.checkpoint, overwrite=options.overwrite)
        checkpoints.check_other_files(options.checkpoint)
    torch.manual_seed(options.seed)
    stages = _Stages(
        [
            "load",
            *["calibrate"] * bool(sentences),
            "prune",
            *["realign"] * bool(options.realign),
            *["report", "write", "verify"],
        ]
    )
    with writable([options.out.resolve().parent]), checkpoints.quiet_transformers(), stages:
        with stages("load"), input_errors():
            checkpoint = load_checkpoint(options.checkpoint)
            model = checkpoint.model
            params = prunable_parameters(model, options.include, options.exclude)
            absent = checkpoint.missing.intersection(params.names)
            if absent:
                raise ValueError(
                    f"{options.checkpoint} has no weights for {min(absent)}"
                    + (f" and {len(absent) - 1} more" if len(absent) > 1 else "")
                )
            if bitmask and checkpoint.missing:
                raise ValueError(
                    f"{options.checkpoint} has no weights for {min(checkpoint.missing)}, which "
                    "only --format dense can leave out"
                )
        calibration = None
        if sentences:
            with stages("calibrate"):
                calibration = _calibration(
                    options.checkpoint, model, params, sentences, options.realign, stages.visible
                )
        with stages("prune"), input_errors():
            plan.prune(params, calibration, options.seed)
        dense = {pair: stored(*pair).detach() for pair in params}
        realigned: list[Realigned] = []
        if options.realign:
            assert calibration is not None
            with stages("realign"), input_errors():
                # Realigning moves the surviving weights; the report compares with the dense ones.
                dense = {pair: weight.clone() for pair, weight in dense.items()}
                realigned = realign(params, calibration, options.realign)
        with stages("report"):
            report = alignment_report(params, dense, matching=False)
            for module, name in params:
                remove(module, name)
        with checkpoints.new_folder(options.out, overwrite=options.overwrite) as folder:
            with stages("write"):
                if bitmask:
                    saving.write_pruned(model, folder, "bitmask")
                else:
                    checkpoints.save_checkpoint(checkpoint, folder)
                checkpoints.copy_other_files(options.checkpoint, folder)
            with stages("verify"):
                if bitmask:
                    saving.verify_pruned(model, folder)
                else:
                    checkpoints.verify_checkpoint(checkpoint, folder)
            carried_over = frozenset() if bitmask else checkpoint.unused
            written = {
                "checkpoint": str(options.checkpoint),
                "out": str(options.out),
                "format": options.format,
                "architecture": type(model).__name__,
                "dtype": str(model.dtype).removeprefix("torch."),
                "method": plan.described | {"calibration_sentences": len(sentences)},
                "seed": options.seed,
                "totals": report.totals,
                "layers": list(report),
                "realigned": [asdict(entry) for entry in realigned],
                "left_out": params.left_out,
                "carried_over": sorted(carried_over),
                "not_carried_over": sorted(checkpoint.lost | checkpoint.unused - carried_over),
                "seconds": stages.seconds,
                "versions": versions(),
                "command": options.command_line,
            }
            write_json(folder / "report.json", written)
            title = _title(options.checkpoint, plan, report.totals)
            report.plot(folder / "report.png", title)
    if options.json:
        print_json(written)
    else:
        totals = report.totals
        print(
            f"{options.out}: {totals['zeros']:,} of {totals['entries']:,} weights in {len(params)} "
            f"matrices are zero ({totals['sparsity']:.1%}).\n"
            f"Mean unit alignment {three_decimals(totals['mean_alignment'])}, worst "
            f"{three_decimals(totals['worst_alignment'])}; dead units: {totals['dead_units_out']} "
            f"outputs, {totals['dead_units_in']} inputs. See report.json and report.png there."
        )


class _Stages:
    """Times the stages of a run, and shows them if standard error is a terminal."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names
        self.seconds: dict[str, float] = {}
        self.visible = sys.stderr.isatty()
        self._bar: Any = None

    def __enter__(self) -> _Stages:
        if self.visible:
            self._bar = progress_bar(
                total=len(self.names),
                bar_format="{desc:10} {bar} {n}/{total}",
                ncols=60,
                mininterval=0,
                leave=False,
            )
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        if self._bar is not None:
            self._bar.set_description_str(name)
        started = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - started, 3)
        if self._bar is not None:
            self._bar.update()


def _sentences(files: Sequence[Path]) -> list[str]:
    sentences = []
    for file in files:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--calibration {file} cannot be read: {error}") from error
        sentences += [line.strip() for line in lines if line.strip()]
    if not sentences:
        raise InputError(f"--calibration: no sentences in {', '.join(map(str, files))}")
    return sentences


def _calibration(
    folder: Path,
    model: nn.Module,
    params: PrunableParameters,
    sentences: list[str],
    realign: What | None,
    visible: bool,
) -> Calibration:
    tokenizer = load_tokenizer(folder, "--calibration")
    if tokenizer.pad_token is None:  # padding is masked out, so that any token will do
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token is None:
        raise InputError(
            f"--calibration needs a tokenizer that can pad, but the one of {folder} has no "
            "padding, end or unknown token"
        )
    # RoBERTa and its like start positions at 2. XLNet's config has -1, for no limit.
    positions = getattr(model.config, "max_position_embeddings", None) or 0
    longest = min(n for n in (tokenizer.model_max_length, positions - 2, 512) if n > 0)
    ordered = sorted(sentences, key=len)
    batches = [
        tokenizer(
            ordered[start : start + _BATCH],
            padding=True,
            truncation=True,
            max_length=longest,
            return_tensors="pt",
        )
        for start in range(0, len(ordered), _BATCH)
    ]
    try:
        return Calibration.collect(
            model,
            batches,
            params,
            statistics="covariance" if realign == "weights" else "norms",
            progress=visible,
        )
    except ValueError as error:
        # T5's message only says that an input is missing.
        decoder = getattr(model.config, "is_encoder_decoder", False)
        own = ", whose decoder may need text of its own" if decoder else ""
        raise InputError(f"--calibration, with {type(model).__name__}{own}: {error}") from error


def _title(checkpoint: Path, plan: Plan, totals: Mapping[str, Any]) -> str:
    return (
        f"{checkpoint.resolve().name}: {plan}\n{totals['sparsity']:.1%} sparse, "
        f"mean unit alignment {three_decimals(totals['mean_alignment'])}"
    )


def _n_of_m(text: str) -> tuple[int, int]:
    n, colon, m = text.partition(":")
    if not (colon and n.isdecimal() and m.isdecimal() and 0 < int(n) < int(m)):
        raise argparse.ArgumentTypeError(f"should be N:M with 0 < N < M, such as 2:4, got {text}")
    return int(n), int(m)
