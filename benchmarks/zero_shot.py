"""What pruning while fine-tuning costs zero-shot languages: every method, with every regularizer.

    python benchmarks/zero_shot.py --data DIR              # run, or continue, the grid
    python benchmarks/zero_shot.py --data DIR --tasks topics --minutes 60
    python benchmarks/zero_shot.py --report                # page and plots, from the log alone

DIR holds ``udpos``, ``pud`` and ``sib200`` (``torchalignprune.crosslingual.load_task`` says how).
Each run fine-tunes the encoder on English and goes from sparsity to sparsity, with training after
each pruning, as in the paper's iterative pruning with retraining. After each stage it evaluates in
all languages. The tasks are ``pos``, trained on the English Web Treebank and evaluated on sentences
of PUD, and ``topics`` (SIB-200). All runs of one seed begin alike and see the same batches, so that
comparisons are paired. The method ``dense`` trains as long as the others and prunes nothing: drops
are against it, at the same stage.

The strength of a regularizer is chosen for each task on English validation data alone, with seeds
that the grid does not use: of several powers of ten, the one with the best mean accuracy over the
sparsities.

The grid can be stopped at any time; the same command continues it. ``results/zero_shot/runs.jsonl``
has a line for each run. The order of the runs allows comparisons early on: all methods without a
regularizer, then ``dense``, ``magnitude`` and ``aligned`` with the regularizers, then the rest;
each for all tasks. Several processes with different ``--tasks`` or ``--seeds`` may write to the
same file. Everything is computed in float32 on every processor, so that runs of several machines
can be combined.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import zero_shot_page
from common import RESULTS, machine
from torchalignprune.crosslingual import ZeroShotReport
from torchalignprune.crosslingual.experiment import DENSE, Experiment, Training
from torchalignprune.crosslingual.recipes import RECIPES, REGULARIZERS
from torchalignprune.crosslingual.run_log import RunLog
from torchalignprune.crosslingual.sweep import SPARSITIES
from zero_shot_statistics import Array, Key, distinct, pack

MINIATURE = Path(__file__).parents[1] / "examples" / "mini_xlmr"
STRENGTHS = (1.0, 10.0, 100.0, 1000.0, 10000.0)
TUNING_SEEDS = (1000, 1001)
TUNING_METHOD = "aligned"
# Gradient criteria come last: their runs cannot take over the dense training of the run before.
METHODS = [DENSE, *sorted(RECIPES, key=lambda name: RECIPES[name].criterion is not None)]
FIRST = (DENSE, "magnitude", "aligned")


@dataclass(frozen=True)
class Plan:
    """What a task is evaluated on (``sentences``: per language), and how it trains."""

    evaluated: str
    languages: tuple[str, ...]
    sentences: int | None
    training: Training


PLANS = {
    "pos": Plan(
        "pud",
        ("ar", "de", "es", "fi", "fr", "id", "it", "pl", "ru", "zh"),
        100,
        Training(epochs=0.6, retraining_epochs=0.1),
    ),
    "topics": Plan(
        "topics",
        ("ar", "de", "es", "fi", "fr", "id", "it", "nl", "pl", "ru", "zh"),
        None,
        Training(epochs=6, retraining_epochs=1),
    ),
}


def phases(
    methods: Sequence[str], regularizers: Sequence[str], seeds: Sequence[int]
) -> list[list[Key]]:
    """The runs in three parts, those that say most first."""
    rest = [name for name in regularizers if name != "none"]
    parts = [
        (methods, [name for name in regularizers if name == "none"]),
        ([name for name in methods if name in FIRST], rest),
        ([name for name in methods if name not in FIRST], rest),
    ]
    return [
        [(method, name, seed) for seed in seeds for name in names for method in own]
        for own, names in parts
    ]


class Grid:
    """The runs of one task, both those in the log and those to come."""

    def __init__(
        self, task: str, experiment: Experiment, training: Training, log: RunLog, deadline: float
    ) -> None:
        self.experiment = experiment
        self.training = training
        self.log = log
        self.deadline = deadline
        settings = {
            "task": task,
            "evaluated": experiment.evaluated.name,
            "languages": list(experiment.test),
            "sentences": {code: len(splits["test"]) for code, splits in experiment.test.items()},
            "sparsities": list(SPARSITIES),
            "model": experiment.digest(),
            "training": {key: own for key, own in asdict(training).items() if key != "autocast"},
        }
        self.id = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:12]
        self._settings = settings
        self._longest = 0.0
        # The id covers the number of sentences, not their text.
        digests = experiment.digests()
        for line in self.lines("settings"):
            if others := [code for code in digests if line["digests"][code] != digests[code]]:
                raise ValueError(
                    f"the data should be that of the runs of {task} in {log.path}, got other "
                    f"sentences in {', '.join(others)}; give another folder as --out"
                )

    def lines(self, kind: str) -> list[Mapping[str, Any]]:
        return distinct(
            [
                line
                for line in self.log.lines()
                if line.get("kind") == kind and line["settings_id"] == self.id
            ]
        )

    def complete(self, keys: Sequence[Key]) -> bool:
        """Runs what is not in the log yet; returns whether there was time for all of it."""
        for key in keys:
            there = {(r["method"], r["regularizer"], r["seed"]) for r in self.lines("run")}
            if key in there:
                continue
            method, regularizer, seed = key
            strength = 0.0
            if regularizer != "none":
                chosen = self._chosen(regularizer)
                if chosen is None:
                    return False
                strength = chosen
            found = self._timed(method, regularizer, strength, seed)
            if found is None:
                return False
            sweep, seconds = found
            if not self.lines("settings"):
                self._write_settings(sweep[0.0])
            self.log.append(
                {
                    "kind": "run",
                    "settings_id": self.id,
                    "method": method,
                    "regularizer": regularizer,
                    "seed": seed,
                    "strength": strength,
                    "scores": {
                        str(sparsity): {
                            code: round(score.value, 4) for code, score in report.scores.items()
                        }
                        for sparsity, report in sweep.items()
                    },
                    "misses": pack(_misses(sweep)),
                    "cpu": machine()["cpu"],
                    "seconds": seconds,
                }
            )
        return True

    def _timed(
        self, method: str, regularizer: str, strength: float, seed: int, validation: bool = False
    ) -> tuple[dict[float, ZeroShotReport], float] | None:
        """A run and its seconds; None if it might end after the deadline."""
        started = time.perf_counter()
        if started + self._longest > self.deadline:
            return None
        sweep = self.experiment.run(
            method, regularizer, strength, seed, self.training, validation=validation
        )
        seconds = round(time.perf_counter() - started, 1)
        self._longest = max(self._longest, seconds)
        last = sweep[SPARSITIES[-1]]
        what = f"{self._settings['task']}  {method} + {regularizer} ({strength:g}), seed {seed}"
        print(f"{what}: {seconds:.0f} s, dense {sweep[0.0]!r}, {SPARSITIES[-1]:.0%} {last!r}")
        return sweep, seconds

    def _chosen(self, regularizer: str) -> float | None:
        """The strength, chosen now unless the log has it; None if there was no time for that."""
        for line in self.lines("strength"):
            if line["regularizer"] == regularizer:
                return float(line["strength"])
        candidates = [("none", 0.0), *[(regularizer, strength) for strength in STRENGTHS]]
        for seed in TUNING_SEEDS:
            for name, strength in candidates:
                done = {
                    (line["regularizer"], line["strength"], line["seed"])
                    for line in self.lines("tuning")
                }
                if (name, strength, seed) in done:
                    continue
                found = self._timed(TUNING_METHOD, name, strength, seed, validation=True)
                if found is None:
                    return None
                sweep, seconds = found
                self.log.append(
                    {
                        "kind": "tuning",
                        "settings_id": self.id,
                        "method": TUNING_METHOD,
                        "regularizer": name,
                        "strength": strength,
                        "seed": seed,
                        "sentences": len(self.experiment.validation or ()),
                        "validation": {
                            str(sparsity): round(report.scores["en"].value, 5)
                            for sparsity, report in sweep.items()
                        },
                        "seconds": seconds,
                    }
                )
        means = tuning_means(self.lines("tuning"), regularizer)
        best = best_strength(means)
        self.log.append(
            {
                "kind": "strength",
                "settings_id": self.id,
                "regularizer": regularizer,
                "strength": best,
                "means": {str(strength): mean for strength, mean in means.items()},
            }
        )
        return best

    def _write_settings(self, report: ZeroShotReport) -> None:
        self.log.append(
            {
                "kind": "settings",
                "settings_id": self.id,
                "settings": self._settings,
                "machine": machine(),
                "chance": self.experiment.chance(),
                "digests": {code: score.digest for code, score in report.languages.items()},
                "out_of": {
                    code: " ".join(map(str, score.out_of.tolist()))
                    for code, score in report.languages.items()
                },
            }
        )


def tuning_means(lines: Sequence[Mapping[str, Any]], regularizer: str) -> dict[float, float]:
    """The mean over seeds and sparsities above 0 for each strength (0: no regularizer)."""
    found: dict[float, list[float]] = {}
    for line in lines:
        if line["regularizer"] in ("none", regularizer):
            pruned = [score for sparsity, score in line["validation"].items() if float(sparsity)]
            found.setdefault(line["strength"], []).append(float(np.mean(pruned)))
    return {strength: round(float(np.mean(found[strength])), 5) for strength in sorted(found)}


def best_strength(means: Mapping[float, float]) -> float:
    """The strength above 0 with the highest mean; of equals the lowest."""
    return max((strength for strength in sorted(means) if strength), key=lambda s: means[s])


def _misses(sweep: Mapping[float, ZeroShotReport]) -> Array:
    return np.array(
        [
            [score.out_of - score.hits for score in report.languages.values()]
            for report in sweep.values()
        ]
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, help="folder with udpos, pud and sib200")
    add("--model", type=Path, default=MINIATURE, help="encoder (default: the miniature)")
    add("--out", type=Path, default=RESULTS / "zero_shot", help="folder of runs.jsonl")
    add("--tasks", nargs="+", choices=PLANS, default=list(PLANS))
    add("--methods", nargs="+", choices=METHODS, default=METHODS)
    add("--regularizers", nargs="+", choices=REGULARIZERS, default=list(REGULARIZERS))
    add("--seeds", type=int, nargs="+", default=list(range(5)))
    add("--minutes", type=float, help="begin no run that might end later than this")
    add("--threads", type=int, help="number of torch's threads")
    add("--learning-rate", type=float, help="of the encoder (default: by task)")
    add("--epochs", type=float, help="of dense training (default: by task)")
    add("--retraining-epochs", type=float, help="after each pruning (default: by task)")
    add("--sentences", type=int, help="evaluated on per language (default: by task)")
    add("--languages", nargs="+", help="besides English (default: by task)")
    add("--report", action="store_true", help="write the page, and run nothing")
    options = parser.parse_args(arguments)
    log = RunLog(options.out / "runs.jsonl")
    if options.report:
        page = zero_shot_page.page(log.lines())
        (options.out / "README.md").write_text(page)
        for task, figure in zero_shot_page.figures(log.lines()).items():
            figure.savefig(options.out / f"{task}.png", dpi=120)
        print(page)
        return
    if options.data is None:
        parser.error("--data should be a folder with udpos, pud and sib200, got none")
    if reserved := set(options.seeds) & set(TUNING_SEEDS):
        parser.error(
            f"--seeds should not be those that strengths are chosen with, got {min(reserved)}"
        )
    if options.threads:
        torch.set_num_threads(options.threads)
    deadline = time.perf_counter() + (60 * options.minutes if options.minutes else float("inf"))
    works = []
    for task in options.tasks:
        plan = PLANS[task]
        training = replace(
            plan.training,
            learning_rate=options.learning_rate or plan.training.learning_rate,
            epochs=options.epochs or plan.training.epochs,
            retraining_epochs=options.retraining_epochs or plan.training.retraining_epochs,
        )
        try:
            experiment = Experiment.load(
                options.model,
                task,
                plan.evaluated,
                options.data,
                languages=options.languages or plan.languages,
                sentences=options.sentences or plan.sentences,
            )
            works.append(Grid(task, experiment, training, log, deadline))
        except (OSError, ValueError) as error:
            parser.error(str(error))
    try:
        log.prepare()
    except OSError as error:
        parser.error(f"--out: {error}")
    ordered = [name for name in METHODS if name in options.methods]
    for part in phases(ordered, options.regularizers, options.seeds):
        for work in works:
            if not work.complete(part):
                print("the time is up; the same command continues the grid")
                return


if __name__ == "__main__":
    main()
