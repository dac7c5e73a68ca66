"""What pruning does to each language of the miniature XLM-R, without any fine-tuning.

    pip install "torchalignprune[crosslingual]"
    python examples/mini_xlmr_pruning.py --out OUT

The encoder in ``examples/mini_xlmr`` is pruned once by several methods and not retrained. It is
evaluated in each of its languages on the 84 sentences of ``examples/mini_xlmr/sentences.tsv``,
which are translations of each other:

- *retrieval*: does a sentence find its English translation among all 84, and the other way round?
- *topics*: which of seven topics is a sentence about? The answer is the topic whose English
  sentences have the nearest mean embedding. This is done in four folds: the means leave out the
  fold of the sentence, so that it is never compared with its own translation.

Intervals are 95% percentile bootstrap intervals over sentences, the same ones drawn for all
languages. Writes ``results.json`` and ``retention.png`` to ``OUT``.
"""

from __future__ import annotations

import argparse
import copy
import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import AutoModel, AutoTokenizer, logging

import torchalignprune as tap
from torchalignprune.crosslingual import retrieval_hits, sentence_embeddings

MINIATURE = Path(__file__).parent / "mini_xlmr"
METHODS: dict[str, tuple[type[tap.Magnitude], dict[str, str]]] = {
    "magnitude": (tap.Magnitude, {}),
    "magnitude, per layer": (tap.Magnitude, {"budget": "layer"}),
    "aligned": (tap.AlignedMagnitude, {}),
    "aligned, units=both": (tap.AlignedMagnitude, {"units": "both"}),
    "aligned, units=both, per unit": (tap.AlignedMagnitude, {"units": "both", "budget": "unit"}),
}
FOLDS = 4
RESAMPLES = 2000
QUESTIONS = ("retrieval", "topics")

# For each question, hits from 0 to 1 of shape (languages, sentences).
Hits = dict[str, np.ndarray[Any, Any]]


def read_sentences(path: Path) -> tuple[list[str], dict[str, list[str]]]:
    """The topics, and the sentences in each language."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    languages = [name for name in rows[0] if name not in ("number", "topic")]
    return (
        [row["topic"] for row in rows],
        {language: [row[language] for row in rows] for language in languages},
    )


def topic_hits(english: Tensor, own: Tensor, topics: Sequence[str]) -> Tensor:
    """1 for each sentence whose nearest mean of English sentences is that of its topic, else 0."""
    names = sorted(set(topics))
    labels = torch.tensor([names.index(topic) for topic in topics])
    folds = torch.arange(len(topics)) % FOLDS
    hits = torch.zeros(len(topics))
    for fold in range(FOLDS):
        means = torch.stack(
            [english[(labels == i) & (folds != fold)].mean(0) for i in range(len(names))]
        )
        # Subtract what all sentences share, so that directions tell topics apart.
        center = english[folds != fold].mean(0)
        found = (normalize(own - center, dim=1) @ normalize(means - center, dim=1).T).argmax(1)
        hits += ((found == labels) & (folds == fold)).float()
    return hits


def judge(
    model: nn.Module, tokenizer: Any, topics: list[str], sentences: dict[str, list[str]]
) -> Hits:
    embeddings = {
        language: sentence_embeddings(model, tokenizer, texts)
        for language, texts in sentences.items()
    }
    english = embeddings["en"]
    retrieval, topic = [], []
    for own in embeddings.values():
        both = retrieval_hits(english, own).float() + retrieval_hits(own, english).float()
        retrieval.append((both / 2).numpy())
        topic.append(topic_hits(english, own, topics).numpy())
    return {"retrieval": np.stack(retrieval), "topics": np.stack(topic)}


def interval(values: np.ndarray[Any, Any]) -> tuple[float, float]:
    """The interval of a mean over sentences."""
    drawn = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.quantile(values[drawn].mean(1), [0.025, 0.975])
    return float(low), float(high)


def table(results: list[dict[str, Any]], question: str, sparsity: float) -> Table:
    """Scores in percent by language, and the mean drop of the languages other than English."""
    shown = [r for r in results if r["sparsity"] in (0.0, sparsity)]
    languages = list(results[0][question])
    view = Table(title=f"{question} at {sparsity:.0%}, in percent")
    view.add_column("")
    for language in languages:
        view.add_column(language, justify="right")
    view.add_column("mean of others", justify="right")
    view.add_column("their drop", justify="right")
    for result in shown:
        cells = [f"{100 * result[question][language]:.0f}" for language in languages]
        drop = result[f"{question}_drop"]
        view.add_row(
            result["method"],
            *cells,
            f"{100 * result[f'{question}_others']:.1f}",
            "" if drop is None else "{:.1f} ({:.1f} to {:.1f})".format(*(100 * d for d in drop)),
        )
    return view


def picture(results: list[dict[str, Any]]) -> Figure:
    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots(1, 2)
    dense = results[0]
    for axis, question in zip(axes, QUESTIONS, strict=True):
        for method in METHODS:
            own = [dense, *(r for r in results if r["method"] == method)]
            axis.plot(
                [r["sparsity"] for r in own],
                [100 * r[f"{question}_others"] for r in own],
                marker="o",
                label=method,
            )
        axis.set_title(f"{question}: mean of the languages other than English")
        axis.set_xlabel("sparsity")
        axis.set_ylabel("percent")
        axis.set_ylim(0, 100)
    axes[0].legend(fontsize="small")
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for results and plot")
    parser.add_argument("--model", default=str(MINIATURE), help="encoder (default: the miniature)")
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.3, 0.5, 0.7, 0.8])
    options = parser.parse_args(arguments)
    for sparsity in options.sparsities:
        if not 0 < sparsity < 1:
            parser.error(f"--sparsities should be between 0 and 1, got {sparsity}")

    logging.set_verbosity_error()  # The head for masked tokens is left out on purpose.
    logging.disable_progress_bar()
    topics, sentences = read_sentences(MINIATURE / "sentences.tsv")
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    dense = AutoModel.from_pretrained(
        options.model, dtype=torch.float32, add_pooling_layer=False, attn_implementation="eager"
    )
    others = [i for i, language in enumerate(sentences) if language != "en"]
    results: list[dict[str, Any]] = []
    first: Hits = {}
    runs = [("dense", 0.0), *((name, s) for s in options.sparsities for name in METHODS)]
    for name, sparsity in runs:
        model = copy.deepcopy(dense)
        if sparsity:
            method, settings = METHODS[name]
            params = tap.prunable_parameters(model)
            tap.global_unstructured(params, method, amount=sparsity, **settings)
        hits = judge(model, tokenizer, topics, sentences)
        first = first or hits
        result: dict[str, Any] = {"method": name, "sparsity": sparsity}
        for question in QUESTIONS:
            scores = hits[question].mean(1)
            result[question] = dict(zip(sentences, map(float, scores), strict=True))
            result[f"{question}_others"] = float(scores[others].mean())
            lost = (first[question] - hits[question])[others].mean(0)
            result[f"{question}_drop"] = (float(lost.mean()), *interval(lost)) if sparsity else None
        results.append(result)

    console = Console(width=140)
    for question in QUESTIONS:
        for sparsity in options.sparsities:
            console.print(table(results, question, sparsity))
    console.print(
        f"Chance: retrieval {100 / len(topics):.1f}, topics {100 / len(set(topics)):.1f}."
    )
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    picture(results).savefig(options.out / "retention.png", dpi=150)
    console.print(f"Written: {options.out / 'results.json'}, {options.out / 'retention.png'}")


if __name__ == "__main__":
    main()
