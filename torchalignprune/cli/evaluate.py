"""``torchalignprune evaluate``: score a checkpoint folder in many languages."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from torchalignprune.cli.loading import load_checkpoint, load_tokenizer
from torchalignprune.cli.options import (
    SUFFIXES,
    InputError,
    input_errors,
    positive,
    report_file,
    seed,
)
from torchalignprune.cli.output import (
    print_json,
    print_report,
    print_written,
    versions,
    writable_files,
    write_files,
)

if TYPE_CHECKING:
    from torchalignprune.crosslingual import ZeroShotReport

_TASKS = ("pos", "pud", "topics", "xnli", "pawsx", "ner")
# Options that change how sentences are read: evaluations that differ in one are not comparable.
_READ_BY = ("max_length", "bare_pieces")


def add_parser(commands: Any, **shared: Any) -> None:
    """Adds the command to those of the command line."""
    parser = commands.add_parser(
        "evaluate",
        help="score a fine-tuned checkpoint folder in many languages",
        description=(
            "Score a fine-tuned Transformers checkpoint folder in its training language and in\n"
            "others, with bootstrap intervals, and compare it with the dense model if asked to.\n"
            "Words are scored at their first subword with a character. Models fine-tuned by\n"
            "run_ner.py or XTREME's scripts have learned to label the bare space before a word:\n"
            "score them with --bare-pieces label.\n"
            'Needs pip install "torchalignprune[crosslingual]".'
        ),
        **shared,
    )
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", type=Path, help="the folder, with its tokenizer"
    )
    parser.add_argument(
        "--task",
        required=True,
        choices=_TASKS,
        help="pos, pud: parts of speech (Universal Dependencies); topics: SIB-200; ner: WikiANN; "
        "xnli, pawsx: sentence pairs",
    )
    parser.add_argument(
        "--languages",
        nargs="+",
        metavar="CODE",
        help="the languages to score; required without --data (default: all of the task's in it)",
    )
    parser.add_argument(
        "--supervised",
        default="en",
        metavar="CODE",
        help="the language that the model was fine-tuned on, or none (default: en)",
    )
    parser.add_argument(
        "--data", type=Path, metavar="DIR", help="read the data from this folder, not from the hub"
    )
    parser.add_argument(
        "--split",
        choices=["test", "validation", "train"],
        default="test",
        help="the split to score (default: test)",
    )
    parser.add_argument(
        "--compare",
        type=Path,
        metavar="DENSE",
        help="compare with the dense model: its folder, or the JSON file of its evaluation",
    )
    parser.add_argument(
        "--batch-size",
        type=positive,
        default=32,
        metavar="N",
        help="sentences per batch (default: 32)",
    )
    parser.add_argument(
        "--max-length",
        type=positive,
        metavar="N",
        help="cut sentences to N subwords, special tokens included (default: the model's limit)",
    )
    parser.add_argument(
        "--bare-pieces",
        choices=["skip", "label"],
        default="skip",
        help="skip a bare space before a word, or score the word there (default: skip)",
    )
    parser.add_argument(
        "--device", metavar="DEVICE", help="cpu, cuda, ... (default: cuda if available)"
    )
    parser.add_argument(
        "--seed", type=seed, default=0, help="the seed of the bootstrap intervals (default: 0)"
    )
    parser.add_argument(
        "--out",
        nargs="+",
        type=report_file,
        default=[],
        metavar="FILE",
        help="write the scores or the comparison to these files; the suffix sets the format: "
        + ", ".join(SUFFIXES),
    )
    parser.add_argument(
        "--cc100",
        action="store_true",
        help="with --compare, for XLM-R: also plot the drops against the amount of pretraining "
        "text in each language",
    )
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    from torchalignprune import checkpoints
    from torchalignprune.crosslingual import CC100_GIB, TASKS, available_languages, load_task
    from torchalignprune.crosslingual.evaluation import row_digests

    if options.cc100 and options.compare is None:
        raise InputError("--cc100 goes with --compare")
    started = time.perf_counter()
    task = TASKS[options.task]
    device = _device(options.device)
    with writable_files(options.out), _quiet_datasets(), checkpoints.quiet_transformers():
        with input_errors():
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
            for code, counted in earlier.languages.items() if earlier else ():
                if row_digests(data[code][options.split], task)[0] != counted.digest:
                    raise ValueError(
                        f"--compare {options.compare} should be an evaluation on the same "
                        f"sentences; those in {code} differ"
                    )
        reports = [
            _evaluation(folder, task, data, supervised, device, options) for folder in models
        ]
        report = reports[0]
        comparison = None
        written: dict[str, Any] = {"checkpoint": str(options.checkpoint)}
        written |= report.to_dict()
        written |= {key: getattr(options, key) for key in _READ_BY}
        if options.compare is not None:
            with input_errors():
                comparison = report.compare(earlier or reports[1])
            written |= {"compared_with": str(options.compare), "comparison": comparison.to_dict()}
        written |= {
            "seconds": round(time.perf_counter() - started, 3),
            "versions": versions(),
            "command": options.command_line,
        }

        def plot(file: Path) -> None:
            if comparison is not None:
                comparison.plot(file, shares=CC100_GIB if options.cc100 else None)
            else:
                report.plot(file)

        write_files(options.out, written, plot)
    if options.json:
        print_json(written)
        return
    print_report(comparison or report)
    print(_legend(report, comparison is not None))
    print_written(options.out)


def _check_model(folder: Path, task: Any) -> None:
    from torchalignprune import checkpoints

    kind = "TokenClassification" if task.kind == "words" else "SequenceClassification"
    name = type(checkpoints.empty_model(folder)).__name__
    if not name.endswith(kind):
        raise ValueError(
            f"{folder} should be a model for {kind}, for --task {task.name}, got {name}"
        )


def _evaluation(
    folder: Path,
    task: Any,
    data: Mapping[str, Any],
    supervised: str | None,
    device: torch.device,
    options: argparse.Namespace,
) -> ZeroShotReport:
    from torchalignprune.crosslingual import evaluate_zero_shot

    with input_errors():
        checkpoint = load_checkpoint(folder)
        if checkpoint.missing:
            raise ValueError(
                f"{folder} is not fine-tuned: it has no weights for {min(checkpoint.missing)}"
            )
        try:
            return evaluate_zero_shot(
                checkpoint.model.to(device),
                load_tokenizer(folder, "evaluate"),
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
        except TypeError as error:  # the tokenizer is not a fast one
            raise ValueError(str(error)) from error


def _earlier_report(
    options: argparse.Namespace, supervised: str | None, codes: Sequence[str]
) -> ZeroShotReport:
    """The evaluation in the file of ``--compare``.

    It is checked before the model is evaluated, which may take long.
    """
    from torchalignprune.crosslingual import ZeroShotReport

    try:
        text = options.compare.read_text(encoding="utf-8")
        earlier = ZeroShotReport.from_json(text)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--compare {options.compare} is not the JSON file of an evaluation: {error}"
        ) from error
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
    # Only the JSON of the command has these, not that of ZeroShotReport.to_json.
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
    drawn = "the same for all languages" if report.parallel else "separate for each language"
    lines = f"intervals: {report.level:.0%}, {report.resamples:,} resamples of sentences, {drawn}"
    if not compared:
        return lines
    return (
        "dense, pruned: scores in percent; drop: in points; relative: as a share of the dense "
        f"score\n{lines}; the same for both models"
    )


def _device(text: str | None) -> torch.device:
    if text is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=text).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise InputError(f"--device {text} cannot be used: {reason}") from error


@contextmanager
def _quiet_datasets() -> Iterator[None]:
    """Lets ``datasets`` show progress bars on a terminal only."""
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
