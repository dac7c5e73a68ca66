"""Writes small files like those of the hub's data sets, and random models of the hub's classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import torch
import transformers

from tiny_xlmr import SENTENCES, unigram, wordpiece
from torchalignprune.crosslingual import TASKS

TEXTS = [" ".join(words) for words in SENTENCES.values()]
# How the hub's copies of Universal Dependencies number the tags.
HUB_UPOS = TASKS["pos"].stored_labels
SPLITS = {"train": 48, "validation": 8, "test": 12}


def write_pairs(data: Path, task: str, languages: tuple[str, ...]) -> Path:
    """Writes files like those of XNLI or PAWS-X. The second text gives the label away."""
    first, second = TASKS[task].columns["text"][0], TASKS[task].columns["text_pair"][0]
    labels = list(TASKS[task].labels)
    string = datasets.Value("string")
    kinds = {first: string, second: string, "label": datasets.ClassLabel(names=labels)}
    if task == "pawsx":
        kinds["id"] = datasets.Value("int32")
    for language in languages:
        for split, count in SPLITS.items():
            rows: dict[str, Any] = {
                first: [TEXTS[(i + len(language)) % len(TEXTS)] for i in range(count)],
                second: [TEXTS[i % len(labels)] for i in range(count)],
                "label": [i % len(labels) for i in range(count)],
            }
            if task == "pawsx":
                rows["id"] = list(range(1, count + 1))
            file = data / str(TASKS[task].folder) / language / f"{split}-00000-of-00001.parquet"
            write(file, rows, kinds)
    return data


def write_tags(data: Path, languages: tuple[str, ...]) -> Path:
    """Writes files like those of Universal Dependencies; "_" tags a contraction."""
    strings = datasets.Sequence(datasets.Value("string"))
    tags = datasets.Sequence(datasets.ClassLabel(names=list(HUB_UPOS)))
    kinds = {
        **{"sent_id": datasets.Value("string"), "text": datasets.Value("string")},
        **{"tokens": strings, "lemmas": strings, "upos": tags},
    }
    for language in languages:
        words = SENTENCES[language]
        for split, count in SPLITS.items():
            tokens = [words[i % len(words) :] + words[: i % len(words)] for i in range(count)]
            rows = {
                "sent_id": [f"{split}-{i}" for i in range(count)],
                "text": [" ".join(row) for row in tokens],
                "tokens": [["du", *row] for row in tokens],
                "lemmas": [["du", *row] for row in tokens],
                "upos": [["_", *(HUB_UPOS[len(word) % 12] for word in row)] for row in tokens],
            }
            name = str(TASKS["pos"].configs[language])
            write(data / "udpos" / name / f"{split}-00000-of-00001.parquet", rows, kinds)
    return data


def write(file: Path, rows: dict[str, Any], kinds: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(rows, features=datasets.Features(kinds)).to_parquet(file)


def write_model(folder: Path, kind: str) -> Path:
    """Writes a masked language model with random weights, as the hub has it, and its tokenizer."""
    torch.manual_seed(0)
    tokenizer = unigram() if kind == "XLMRoberta" else wordpiece()
    # XLM-R's positions begin after the padding token's id.
    positions = 48 + (2 if kind == "XLMRoberta" else 0)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=positions,
        pad_token_id=tokenizer.pad_token_id,
    )
    getattr(transformers, f"{kind}ForMaskedLM")(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
