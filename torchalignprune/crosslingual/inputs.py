"""The inputs of a model for the rows of a task, and the labels that its outputs stand for."""

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
    """The most subwords that a model and its tokenizer take, special tokens included.

    The model's limit is the number of its position embeddings. RoBERTa and its like never use the
    first ones, up to the padding token's id.
    """
    limit = int(getattr(tokenizer, "model_max_length", 0) or 512)
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            unused = 0 if module.padding_idx is None else module.padding_idx + 1
            return min(limit, module.num_embeddings - unused)
    positions = getattr(getattr(model, "config", None), "max_position_embeddings", None) or 512
    return min(limit, int(positions))


def checked_length(model: nn.Module, tokenizer: Any, max_length: int | None) -> int:
    """``max_length``, or if it is None, the limit of the model and the tokenizer.

    Raises:
        ValueError: it is above that limit, or less than 1.
    """
    longest = longest_input(model, tokenizer)
    if max_length is not None and not 0 < max_length <= longest:
        raise ValueError(
            f"max_length should be from 1 to {longest}, the limit of the model and the tokenizer, "
            f"got {max_length}"
        )
    return max_length or longest


def checked_rows(rows: Any, task: Task, language: str, split: str) -> Any:
    """Checks that the rows have the columns and labels of the task; returns them as plain values.

    Args:
        rows: a ``datasets.Dataset``.
        task: their task.
        language: for errors.
        split: for errors.

    Raises:
        ValueError: a column is missing, there are no rows, or the labels are not the task's.
        TypeError: ``rows`` is not a ``datasets.Dataset``.
    """
    if not isinstance(rows, import_datasets().Dataset):
        raise TypeError(
            f"{task.name} in {language} should be a datasets.Dataset, as load_task returns for "
            f"each split, got {type(rows).__name__}"
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
            f"{task.name} in {language} should have the labels {', '.join(task.labels)}, got "
            f"{', '.join(names)}"
        )
    return rows


def label_places(model: nn.Module, task: Task) -> Tensor:
    """The index in ``task.labels`` of each of the model's outputs, -1 for a label not there.

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
    """The model's inputs for each row of texts or pairs, and how many rows were cut."""
    texts = [part["text"]] + ([part["text_pair"]] if task.kind == "pair" else [])
    whole = tokenizer(*texts, verbose=False)
    too_long = sum(len(ids) > max_length for ids in whole["input_ids"])
    if too_long:
        whole = tokenizer(*texts, truncation="longest_first", max_length=max_length, verbose=False)
    return [{key: whole[key][i] for key in whole} for i in range(len(texts[0]))], too_long


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; each module gets its own mode back afterwards."""
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
    """A batch, padded on the right, so that a subword has the same index in it as in its row.

    Args:
        rows: the inputs of each row.
        pad_token_id: of the tokenizer.
        fill: the padding of inputs other than ``input_ids``. Default: 0.
    """
    fill["input_ids"] = 0 if pad_token_id is None else pad_token_id
    batch = {}
    for key in rows[0]:
        length = max(1, *(len(row[key]) for row in rows))
        batch[key] = torch.tensor(
            [row[key] + [fill.get(key, 0)] * (length - len(row[key])) for row in rows]
        )
    return batch
