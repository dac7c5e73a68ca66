"""What zero_shot_pos.py and zero_shot_topics.py share: options, resuming, tables and plots."""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from torchalignprune.crosslingual import (
    LanguageScore,
    ZeroShotReport,
    available_languages,
    plot_heat_map,
    plot_retention,
)
from torchalignprune.crosslingual.experiment import DENSE, ENGLISH, Experiment, Training
from torchalignprune.crosslingual.recipes import RECIPES, REGULARIZERS
from torchalignprune.crosslingual.run_log import RunLog
from torchalignprune.crosslingual.sweep import SPARSITIES, fast_dtype

MINIATURE = Path(__file__).parent / "mini_xlmr"

Sweep = dict[float, ZeroShotReport]


def main(
    description: str, task: str, evaluated: str, training: Training, arguments: Sequence[str] | None
) -> None:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default=str(MINIATURE), help="folder or hub name (default: the miniature)")
    add("--data", type=Path, help="folder with the data (default: the hub)")
    add("--out", type=Path, required=True, help="folder for the results")
    add("--method", nargs="+", choices=[DENSE, *RECIPES], default=["aligned"])
    add("--regularizer", nargs="+", choices=REGULARIZERS, default=["none"])
    add("--strength", type=float, default=10.0, help="of the regularizer (default: %(default)s)")
    add("--sparsities", nargs="+", type=float, default=list(SPARSITIES))
    add("--seeds", type=int, default=1, help="number of runs, with seeds 0, 1, ...")
    add(
        "--languages",
        nargs="+",
        metavar="CODE",
        help="besides English (default: all; for the miniature, those it was pretrained on)",
    )
    add("--sentences", type=int, help="evaluated on per language (default: all)")
    add("--epochs", type=float, default=training.epochs, help="dense (default: %(default)s)")
    add(
        "--retraining-epochs",
        type=float,
        default=training.retraining_epochs,
        help="after each pruning (default: %(default)s)",
    )
    add("--batch-size", type=int, default=training.batch_size)
    add(
        "--learning-rate",
        type=float,
        default=training.learning_rate,
        help="of the encoder (default: %(default)s)",
    )
    add(
        "--head-learning-rate",
        type=float,
        default=training.head_learning_rate,
        help="of the classifier (default: %(default)s)",
    )
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    if options.seeds < 1:
        parser.error(f"--seeds should be at least 1, got {options.seeds}")
    levels = [0.0, *options.sparsities]
    if any(not a < b < 1 for a, b in itertools.pairwise(levels)):
        parser.error(f"--sparsities should rise from above 0 to below 1, got {options.sparsities}")

    autocast = fast_dtype(options.device)
    training = Training(
        epochs=options.epochs,
        retraining_epochs=options.retraining_epochs,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        head_learning_rate=options.head_learning_rate,
        autocast=autocast,
    )
    looks = {RECIPES[method].calibration for method in options.method if method != DENSE}
    try:
        languages = options.languages
        if languages is None and Path(options.model).resolve() == MINIATURE.resolve():
            there = available_languages(evaluated, options.data)
            languages = [code for code in miniature_languages() if code in there]
        experiment = Experiment.load(
            options.model,
            task,
            evaluated,
            options.data,
            languages=languages,
            sentences=options.sentences,
            multilingual="multilingual" in looks,
        )
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if task != evaluated:
        print(f"trained on {task}, evaluated on {evaluated} in {len(experiment.test)} languages")
    settings = {
        "task": task,
        "evaluated": evaluated,
        "model": experiment.digest(),
        "languages": list(experiment.test),
        "autocast": str(autocast),
        **{
            name: getattr(options, name)
            for name in (
                "sparsities",
                "sentences",
                "epochs",
                "retraining_epochs",
                "batch_size",
                "learning_rate",
                "head_learning_rate",
            )
        },
    }
    log = RunLog(options.out / "runs.jsonl")
    # The settings limit the number of sentences, but do not identify them.
    digests = experiment.digests()
    for line in log.lines():
        if line.get("settings") != settings:
            continue
        found = line["reports"]["0.0"]["languages"]
        if others := [code for code in digests if found[code]["digest"] != digests[code]]:
            parser.error(
                f"the data should be that of the runs in {log.path}, got other sentences in "
                f"{', '.join(others)}; give another folder as --out"
            )
    try:
        log.prepare()
    except OSError as error:
        parser.error(f"--out: {error}")
    for seed in range(options.seeds):
        for regularizer in options.regularizer:
            for method in options.method:
                strength = 0.0 if regularizer == "none" else options.strength
                run = {"method": method, "regularizer": regularizer, "strength": strength}
                run |= {"seed": seed, "settings": settings}
                if any(run.items() <= line.items() for line in log.lines()):
                    print(f"{_label(run)}, seed {seed}: done already")
                    continue
                started = time.perf_counter()
                sweep = experiment.run(
                    method,
                    regularizer,
                    strength,
                    seed,
                    training,
                    sparsities=options.sparsities,
                    progress=True,
                    device=options.device,
                )
                run["seconds"] = round(time.perf_counter() - started, 1)
                reports = {str(sparsity): report.to_dict() for sparsity, report in sweep.items()}
                log.append(run | {"reports": reports})
                print(f"{_label(run)}, seed {seed}: {run['seconds']:.0f} s", flush=True)
    runs = [line for line in log.lines() if line.get("settings") == settings]
    show(runs, options.out)


def miniature_languages() -> list[str]:
    """The languages that the miniature was pretrained on: the columns of its sentences."""
    with (MINIATURE / "sentences.tsv").open(encoding="utf-8") as file:
        return next(file).rstrip("\n").split("\t")[2:]


def show(runs: Sequence[Mapping[str, Any]], out: Path) -> None:
    """Prints tables of all runs, and writes plots and JSON."""
    # By seed, because two processes in one folder may have made the same run.
    by_seed: dict[str, dict[int, Sweep]] = {}
    for run in runs:
        reports = {
            float(sparsity): ZeroShotReport.from_json(json.dumps(report))
            for sparsity, report in run["reports"].items()
        }
        by_seed.setdefault(_label(run), {}).setdefault(run["seed"], reports)
    sweeps = {label: list(found.values()) for label, found in by_seed.items()}
    pooled = {label: pool(found) for label, found in sweeps.items()}
    for label, found in sweeps.items():
        print(f"\n{label}, {len(found)} seed{'s' * (len(found) > 1)}: score (drop), in points\n")
        print(table(found))
        name = "".join(c if c.isalnum() else "-" for c in label)
        plot_heat_map(pooled[label], out / f"heat_map_{name}.png", title=label)
    plot_retention(pooled, out / "retention.png")
    summary = {
        label: {
            str(sparsity): report.to_dict() | {"drops": report.compare(sweep[0.0]).to_dict()}
            for sparsity, report in sweep.items()
        }
        for label, sweep in pooled.items()
    }
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    print(f"\nplots and summary.json are in {out}")


def pool(sweeps: Sequence[Sweep]) -> Sweep:
    """One sweep with the sentences of all seeds, for means over seeds; intervals over sentences."""
    pooled = {}
    for sparsity, first in sweeps[0].items():
        scores = [sweep[sparsity].languages for sweep in sweeps]
        languages = {
            code: LanguageScore(
                np.sum([score[code].hits for score in scores], axis=0),
                np.sum([score[code].out_of for score in scores], axis=0),
                one.cut_off,
                one.unmapped,
                one.digest,
                one.ids,
            )
            for code, one in first.languages.items()
        }
        pooled[sparsity] = ZeroShotReport(
            first.task,
            first.metric,
            first.split,
            languages,
            supervised=first.supervised,
            parallel=first.parallel,
        )
    return pooled


def table(sweeps: Sequence[Sweep]) -> str:
    """Means over seeds: a row for each language, and one for the zero-shot mean."""
    sparsities = list(sweeps[0])
    languages = list(sweeps[0][0.0].languages)

    def scores(name: str, sparsity: float) -> list[float]:
        reports = [sweep[sparsity] for sweep in sweeps]
        codes = [code for code in languages if code != ENGLISH] if name == "mean" else [name]
        return [100 * statistics.fmean(r.scores[code].value for code in codes) for r in reports]

    rows = [["language", *(f"{s:.0%}" if s else "dense" for s in sparsities)]]
    for name in [*languages, *["mean"] * (len(languages) > 1)]:
        dense = scores(name, 0.0)
        cells = []
        for sparsity in sparsities:
            found = scores(name, sparsity)
            drop = statistics.fmean(a - b for a, b in zip(dense, found, strict=True))
            cell = f"{statistics.fmean(found):.1f}"
            cells.append(f"{cell} ({drop:+.1f})" if sparsity else cell)
        label = {ENGLISH: f"{ENGLISH} (trained on)", "mean": "zero-shot mean"}.get(name, name)
        rows.append([label, *cells])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    )


def _label(run: Mapping[str, Any]) -> str:
    method = run["method"]
    label = DENSE if method == DENSE else RECIPES[method].label
    if run["regularizer"] == "none":
        return label
    return f"{label} + {run['regularizer']} ({run['strength']:g})"
