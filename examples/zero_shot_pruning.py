"""Pretrain a tiny XLM-R on made-up languages, fine-tune it on one, prune it, evaluate in all.

    pip install "torchalignprune[crosslingual]"
    python examples/zero_shot_pruning.py

Needs no data and no network, and takes a minute and a half on two cores. It repeats the life of a
cross-lingual encoder on a small scale:

- ``torchalignprune.crosslingual.generate_corpus`` makes up five languages with one grammar: the
  source, and ``near``, ``middle``, ``far`` and ``remote`` at growing distances from it, with more
  and more words and word orders of their own.
- A tokenizer and an XLM-R are pretrained on text in all of them, half of it parallel.
- The model is fine-tuned on labels in the source language alone (``--task topics``: a topic for
  each sentence; ``pos``: a tag for each word) and evaluated in all languages.
- Then it is pruned, trained on and evaluated, from sparsity to sparsity.

All variants start from the same model and see the same batches:

    dense                  not pruned, but trained as long as the others
    magnitude              pruned by Magnitude
    aligned                pruned by AlignedMagnitude
    magnitude + cosine     the same as magnitude, with CosineAlignment to the pretrained weights in
                           the loss from the beginning
    magnitude + frobenius  the same with FrobeniusAlignment

Drops are against the model before its first pruning. Intervals are over sentences, for these
models. Another ``--seed`` makes other languages, sentences and weights, and is the better test of a
small difference. The same seed gives the same figures on the same machine with the same number of
threads.

Writes the pretrained model, ``zero_shot.json``, ``retention.png`` and a heat map of every variant
to OUT. ``--quick`` uses a tiny corpus, little training and few sparsities, only to show that
everything runs; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

import torchalignprune as tap
from torchalignprune.crosslingual import (
    GENERATED_POS,
    GENERATED_TOPICS,
    GeneratedCorpus,
    Task,
    ZeroShotReport,
    evaluate_zero_shot,
    finetune_and_prune,
    generate_corpus,
    plot_heat_map,
    plot_retention,
)
from torchalignprune.crosslingual.pretraining import ParallelText, pretrain, train_tokenizer

SOURCE = "source"
TASKS = {"pos": GENERATED_POS, "topics": GENERATED_TOPICS}
# For each variant: the method and the regularizer.
WAYS: dict[str, tuple[Any, Any]] = {
    "dense": (None, None),
    "magnitude": (tap.Magnitude, None),
    "aligned": (tap.AlignedMagnitude, None),
    "magnitude + cosine": (tap.Magnitude, tap.CosineAlignment),
    "magnitude + frobenius": (tap.Magnitude, tap.FrobeniusAlignment),
}

Sweep = dict[float, ZeroShotReport]


@dataclass(frozen=True)
class Sizes:
    """Sizes of the corpus in sentences, and of the training in steps and epochs."""

    raw: int = 6000
    train: int = 2000
    test: int = 500
    vocabulary: int = 1000
    pretraining_steps: int = 2000
    epochs: float = 3
    retraining_epochs: float = 0.5
    sparsities: tuple[float, ...] = (0.5, 0.8, 0.9, 0.95)


QUICK = Sizes(
    raw=200,
    train=64,
    test=20,
    vocabulary=300,
    pretraining_steps=10,
    epochs=1,
    sparsities=(0.5, 0.9),
)


def pretrained(corpus: GeneratedCorpus, sizes: Sizes, seed: int, folder: Path) -> None:
    """Pretrains a tokenizer and an XLM-R on the corpus, and saves them to the folder."""
    tokenizer = train_tokenizer(itertools.chain(*corpus.raw.values()), sizes.vocabulary)
    config = transformers.XLMRobertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=192,
        # There is too little text for dropout to help.
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        max_position_embeddings=130,
        type_vocab_size=1,
    )
    torch.manual_seed(seed)
    model = transformers.XLMRobertaForMaskedLM(config)
    half = sizes.raw // 2
    pretrain(
        model,
        tokenizer,
        [ParallelText({code: dict(enumerate(own[:half])) for code, own in corpus.raw.items()})],
        {code: own[half:] for code, own in corpus.raw.items()},
        steps=sizes.pretraining_steps,
        pivot=SOURCE,
        tokens=1536,
        longest=60,
        learning_rate=2e-3,
        seed=seed,
        progress=sys.stderr.isatty(),
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def classifier(folder: Path, task: Task, seed: int) -> Any:
    """The pretrained encoder with a new classifier, initialized with the seed."""
    kind = "Token" if task.kind == "words" else "Sequence"
    torch.manual_seed(seed)
    return getattr(transformers, f"XLMRobertaFor{kind}Classification").from_pretrained(
        folder,
        id2label=dict(enumerate(task.labels)),
        label2id={label: i for i, label in enumerate(task.labels)},
    )


def prune(
    folder: Path,
    task: Task,
    corpus: GeneratedCorpus,
    way: str,
    sizes: Sizes,
    strength: float,
    seed: int,
) -> Sweep:
    """Fine-tunes and prunes a model; returns a report for each sparsity."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = classifier(folder, task, seed)
    data = corpus.pos if task.kind == "words" else corpus.topics
    # Only the encoder is pruned: the new classifier has no pretrained weights to align with.
    params = tap.prunable_parameters(model.base_model)
    method, regularizer = WAYS[way]
    penalty: nn.Module | None = None
    if regularizer is not None:
        penalty = regularizer(params, tap.Reference.capture(params))

    def evaluate() -> ZeroShotReport:
        with torch.no_grad(), tap.cached_weights():
            return evaluate_zero_shot(
                model, tokenizer, task, data, supervised=SOURCE, batch_size=100
            )

    return finetune_and_prune(
        model,
        tokenizer,
        task,
        data[SOURCE]["train"],
        evaluate,
        pruner=None if method is None else lambda schedule: tap.Pruner(params, method, schedule),
        sparsities=sizes.sparsities,
        epochs=sizes.epochs,
        retraining_epochs=sizes.retraining_epochs,
        # Low, so that training does not undo the pretraining, above all in the other languages.
        learning_rate=1e-4,
        head_learning_rate=1e-3,
        penalty=penalty,
        strength=0.0 if penalty is None else strength,
        seed=seed,
        progress=sys.stderr.isatty(),
    )


def drops_table(sweep: Sweep) -> str:
    """A row for each language and for their means, a column for each sparsity; in points."""
    dense = sweep[0.0]
    pruned = {level: report for level, report in sweep.items() if level}
    drops = {level: report.compare(dense) for level, report in pruned.items()}

    def row(name: str, before: Any, scores: Sequence[Any], lost: Sequence[Any]) -> list[str]:
        pairs = zip(scores, lost, strict=True)
        cells = [f"{100 * score.value:.1f} ({points(drop, -1)})" for score, drop in pairs]
        return [name, f"{100 * before.value:.1f}", *cells]

    rows = [["", "dense", *(f"{level:.0%}" for level in pruned)]]
    for code in dense.languages:
        name = f"{code} (trained on)" if code == dense.supervised else code
        scores = [report.scores[code] for report in pruned.values()]
        lost = [drop.drops[code] for drop in drops.values()]
        rows.append(row(name, dense.scores[code], scores, lost))
    means = [report.zero_shot_mean for report in pruned.values()]
    lost_mean = [drop.zero_shot_drop for drop in drops.values()]
    rows.append(row("zero-shot mean", dense.zero_shot_mean, means, lost_mean))
    excess = [drop.excess_drop for drop in drops.values()]
    rows.append(["  lost more than source", "", *(points(each, 1) for each in excess)])
    rows.append(["  95% interval", "", *(interval(each, 1) for each in excess)])
    return in_columns(rows)


def comparison_table(sweeps: Mapping[str, Sweep]) -> str:
    """How many points each variant is better than magnitude, at each sparsity."""
    base = {level: report for level, report in sweeps["magnitude"].items() if level}
    rows = [["", "", *(f"{level:.0%}" for level in base)]]
    for way, sweep in sweeps.items():
        if way == "magnitude":
            continue
        lost = [sweep[level].compare(report) for level, report in base.items()]
        for name, found in (
            (SOURCE, [each.supervised_drop for each in lost]),
            ("zero-shot mean", [each.zero_shot_drop for each in lost]),
        ):
            cells = [f"{points(each, -1)} ({interval(each, -1)})" for each in found]
            rows.append([way if name == SOURCE else "", name, *cells])
    return in_columns(rows)


def rounded(share: float) -> float:
    """In points, to one decimal; never -0.0."""
    return round(100 * share, 1) + 0.0


def points(estimate: Any, sign: int) -> str:
    return f"{rounded(sign * estimate.value):+.1f}"


def interval(estimate: Any, sign: int) -> str:
    low, high = sorted(rounded(sign * bound) for bound in (estimate.low, estimate.high))
    return f"{low:.1f} to {high:.1f}"


def in_columns(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
        for row in rows
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", choices=TASKS, default="topics")
    parser.add_argument("--sparsities", nargs="+", type=float, help="rising (default: 0.5 to 0.95)")
    parser.add_argument("--strength", type=float, default=10.0, help="of the regularizers")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--out", type=Path, default=Path("build/zero_shot_pruning"), help="default: %(default)s"
    )
    parser.add_argument("--quick", action="store_true", help="only show that everything runs")
    options = parser.parse_args(arguments)
    sizes = QUICK if options.quick else Sizes()
    if options.sparsities is not None:
        sizes = replace(sizes, sparsities=tuple(options.sparsities))
    if any(not a < b < 1 for a, b in itertools.pairwise([0.0, *sizes.sparsities])):
        parser.error(f"--sparsities should rise from above 0 to below 1, got {options.sparsities}")
    if not (math.isfinite(options.strength) and options.strength >= 0):
        parser.error(f"--strength should be finite and at least 0, got {options.strength:g}")
    if options.seed < 0:
        parser.error(f"--seed should be at least 0, got {options.seed}")
    if options.out.exists() and not options.out.is_dir():
        parser.error(f"--out should be a folder, got the file {options.out}")

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    task = TASKS[options.task]
    started = time.perf_counter()
    corpus = generate_corpus(
        train=sizes.train, validation=0, test=sizes.test, raw=sizes.raw, seed=options.seed
    )
    folder = options.out / "pretrained"
    folder.mkdir(parents=True, exist_ok=True)
    pretrained(corpus, sizes, options.seed, folder)
    done(started, f"pretrained on {sizes.raw:,} sentences of {len(corpus.languages)} languages")
    sweeps: dict[str, Sweep] = {}
    for way in WAYS:
        started = time.perf_counter()
        sweeps[way] = prune(folder, task, corpus, way, sizes, options.strength, options.seed)
        done(started, way)
    for way, sweep in sweeps.items():
        print(f"\n{way}: {task.metric} in % (change against the dense model, in points)\n")
        print(drops_table(sweep))
    print("\nbetter than magnitude by, in points (95% interval)\n")
    print(comparison_table(sweeps))

    pruned = {way: sweep for way, sweep in sweeps.items() if way != "dense"}
    plot_retention(pruned, options.out / "retention.png", task.name)
    for way, sweep in pruned.items():
        name = way.replace(" + ", "_")
        plot_heat_map(sweep, options.out / f"heat_map_{name}.png", f"{task.name}: {way}")
    found = {
        "task": options.task,
        "seed": options.seed,
        "strength": options.strength,
        "sizes": asdict(sizes),
        "sweeps": {
            way: {str(level): report.to_dict() for level, report in sweep.items()}
            for way, sweep in sweeps.items()
        },
    }
    (options.out / "zero_shot.json").write_text(json.dumps(found, indent=1) + "\n")
    print(f"\nwritten: {', '.join(sorted(path.name for path in options.out.iterdir()))}")
    print(f"in {options.out}")


def done(started: float, what: str) -> None:
    print(f"{time.perf_counter() - started:5.0f} s  {what}", flush=True)


if __name__ == "__main__":
    main()
