"""What a model is given for the rows of a task, and which of its outputs stands for which label."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from torchalignprune.crosslingual.columns import column_names, import_datasets
from torchalignprune.crosslingual.tasks import Task

__all__ = [
    "checked_length",
    "checked_rows",
    "encode_texts",
    "evaluating",
    "label_places",
    "longest_input",
    "padded",
]


def longest_input(model: nn.Module, tokenizer: Any) -> int:
    """How many subwords a model and its tokenizer take, special tokens included.

    The model's limit is that of its position embeddings; in RoBERTa and its kin the first ones, up
    to the padding token's id, are never used.
    """
    limit = int(getattr(tokenizer, "model_max_length", 0) or 512)
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            unused = 0 if module.padding_idx is None else module.padding_idx + 1
            return min(limit, module.num_embeddings - unused)
    positions = getattr(getattr(model, "config", None), "max_position_embeddings", None) or 512
    return min(limit, int(positions))


def checked_length(model: nn.Module, tokenizer: Any, max_length: int | None) -> int:
    """``max_length``, or what the model and the tokenizer allow.

    Raises:
        ValueError: it is more than that, or less than 1.
    """
    longest = longest_input(model, tokenizer)
    if max_length is not None and not 0 < max_length <= longest:
        raise ValueError(
            f"max_length should be from 1 to {longest}, which the model and the tokenizer allow, "
            f"got {max_length}"
        )
    return max_length or longest


def checked_rows(rows: Any, task: Task, language: str, split: str) -> Any:
    """The rows, which have the columns and labels of the task.

    Args:
        rows: a ``datasets.Dataset``.
        task: says which columns.
        language: for errors.
        split: for errors.

    Raises:
        ValueError: a column is missing, there are no rows, or the labels are others.
        TypeError: they are no ``datasets.Dataset``.
    """
    if not isinstance(rows, import_datasets().Dataset):
        raise TypeError(
            f"{task.name} in {language} should be a datasets.Dataset, as load_task has it for each "
            f"split, got {type(rows).__name__}"
        )
    rows = rows.with_format(None)
    missing = [name for name in column_names(task) if name not in rows.column_names]
    if missing:
        raise ValueError(
            f"{task.name} in {language} should have a column {missing[0]}, got "
            f"{', '.join(rows.column_names)}"
        )
    if not len(rows):
        raise ValueError(f"{task.name} in {language} has no sentences in {split!r}")
    feature = rows.features[column_names(task)[-1]]
    names = getattr(getattr(feature, "feature", feature), "names", None)
    if names is not None and tuple(names) != task.labels:
        raise ValueError(
            f"the labels of {task.name} are {', '.join(task.labels)}, those of {language} "
            f"{', '.join(names)}"
        )
    return rows


def label_places(model: nn.Module, task: Task) -> Tensor:
    """The place in ``task.labels`` of each of the model's outputs, -1 for a label it lacks.

    Raises:
        ValueError: the model lacks one of the task's labels.
    """
    names = getattr(getattr(model, "config", None), "id2label", None)
    if not names:
        return torch.arange(len(task.labels))
    own = [str(names[i]) for i in range(len(names))]
    if all(name == f"LABEL_{i}" for i, name in enumerate(own)):
        if len(own) != len(task.labels):
            raise ValueError(
                f"the model should have the {len(task.labels)} labels of {task.name}, got "
                f"{len(own)} without names"
            )
        return torch.arange(len(own))
    known = {label.casefold(): i for i, label in enumerate(task.labels)}
    missing = [label for label in task.labels if label.casefold() not in map(str.casefold, own)]
    if missing:
        raise ValueError(
            f"the model should have the labels of {task.name}, {', '.join(task.labels)}, got "
            f"{', '.join(own)}"
        )
    return torch.tensor([known.get(name.casefold(), -1) for name in own])


def encode_texts(
    tokenizer: Any, task: Task, part: Mapping[str, Any], max_length: int
) -> tuple[list[dict[str, list[int]]], int]:
    """What the model is given for each row of texts or pairs, and how many did not fit."""
    texts = [part["text"]] + ([part["text_pair"]] if task.kind == "pair" else [])
    whole = tokenizer(*texts, verbose=False)
    too_long = sum(len(ids) > max_length for ids in whole["input_ids"])
    if too_long:
        whole = tokenizer(*texts, truncation="longest_first", max_length=max_length, verbose=False)
    return [{key: whole[key][i] for key in whole} for i in range(len(texts[0]))], too_long


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients; each module has its own mode again afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module in training:
            module.training = True


def padded(
    rows: list[dict[str, list[int]]], pad_token_id: int | None, **fill: int
) -> dict[str, Tensor]:
    """A batch, padded on the right, so that a word's place in its row is its place in the batch.

    Args:
        rows: the inputs of each row.
        pad_token_id: of the tokenizer.
        fill: what other inputs than ``input_ids`` are padded with. Default: 0.
    """
    fill["input_ids"] = 0 if pad_token_id is None else pad_token_id
    batch = {}
    for key in rows[0]:
        length = max(1, *(len(row[key]) for row in rows))
        batch[key] = torch.tensor(
            [row[key] + [fill.get(key, 0)] * (length - len(row[key])) for row in rows]
        )
    return batch
