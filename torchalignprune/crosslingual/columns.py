"""Converts the data of each task to the task's columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from torchalignprune.crosslingual.tasks import Task

if TYPE_CHECKING:
    import datasets
    import pyarrow

__all__ = ["as_dataset", "column_names", "import_datasets"]

_COLUMNS = {
    "words": ("tokens", "labels"),
    "text": ("text", "label"),
    "pair": ("text", "text_pair", "label"),
}


def import_datasets() -> Any:
    """The module ``datasets``.

    Raises:
        ImportError: it is not installed; the error says what to install.
    """
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            'cross-lingual data needs datasets: pip install "torchalignprune[crosslingual]"'
        ) from error
    return datasets


def column_names(task: Task) -> tuple[str, ...]:
    """The columns of a task's data, besides ``id``."""
    return _COLUMNS[task.kind]


def as_dataset(
    table: pyarrow.Table, features: Mapping[str, Any], task: Task, where: str
) -> datasets.Dataset:
    """Converts a table, as it is stored, to the columns of the task.

    Args:
        table: with a row for each sentence.
        features: the features of its columns in ``datasets``, which may name the labels.
        task: says which names the stored columns may have.
        where: what errors call the table.

    Raises:
        ValueError: a column is missing or has another type; a label is not the task's.
    """
    import pyarrow

    library = import_datasets()
    label = library.ClassLabel(names=list(task.labels))
    string = library.Value("string")
    columns: dict[str, Any] = {"id": _ids(table, task)}
    kinds: dict[str, Any] = {"id": string}
    for name in column_names(task):
        stored = _stored_name(table, task, name, where)
        column = _chunk(table[stored])
        if name == "tokens":
            tokens = column
        elif name == "labels":
            names = _class_names(features.get(stored))
            columns |= _words(tokens, column, names, task, f"{where}: {stored}")
            kinds |= {"tokens": library.Sequence(string), "labels": library.Sequence(label)}
        elif name == "label":
            ids = _label_ids(column, _class_names(features.get(stored)), task, f"{where}: {stored}")
            columns["label"], kinds["label"] = pyarrow.array(ids), label
        else:
            columns[name], kinds[name] = _strings(column, f"{where}: {stored}"), string
    made = library.Features(kinds)
    return library.Dataset(pyarrow.table(columns).cast(made.arrow_schema))


def _chunk(column: pyarrow.ChunkedArray) -> pyarrow.Array:
    import pyarrow

    chunks = column.chunks
    return pyarrow.concat_arrays(chunks) if chunks else pyarrow.array([], column.type)


def _stored_name(table: pyarrow.Table, task: Task, name: str, where: str) -> str:
    accepted = task.columns.get(name, (name,))
    for stored in accepted:
        if stored in table.column_names:
            return stored
    raise ValueError(
        f"{where} should have a column {' or '.join(accepted)}, got {', '.join(table.column_names)}"
    )


def _ids(table: pyarrow.Table, task: Task) -> pyarrow.Array:
    import pyarrow

    for stored in task.columns.get("id", ("id",)):
        if stored in table.column_names and table[stored].null_count == 0:
            return _chunk(table[stored].cast(pyarrow.string()))
    return pyarrow.array([str(row) for row in range(len(table))], pyarrow.string())


def _strings(column: pyarrow.Array, where: str) -> pyarrow.Array:
    import pyarrow

    if column.null_count:
        row = int(np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))[0])
        raise ValueError(f"{where}: the text of row {row} is missing")
    try:
        return column.cast(pyarrow.string())
    except pyarrow.ArrowException as error:
        raise ValueError(f"{where} should be text, got {column.type}") from error


def _class_names(feature: Any) -> list[str] | None:
    """The label names that a column's numbers stand for, if they are known."""
    feature = getattr(feature, "feature", feature)
    if isinstance(feature, list):
        (feature,) = feature
    names = getattr(feature, "names", None)
    return None if names is None else list(names)


def _words(
    tokens: pyarrow.Array, labels: pyarrow.Array, names: list[str] | None, task: Task, where: str
) -> dict[str, pyarrow.Array]:
    import pyarrow
    import pyarrow.compute as pc

    for column, what in ((tokens, "tokens"), (labels, "labels")):
        if not (pyarrow.types.is_list(column.type) or pyarrow.types.is_large_list(column.type)):
            raise ValueError(f"{where}: {what} should be lists, got {column.type}")
        if column.null_count:
            raise ValueError(f"{where}: the {what} of a sentence are missing")
    lengths = pc.list_value_length(tokens).to_numpy(zero_copy_only=False)
    differ = np.flatnonzero(lengths != pc.list_value_length(labels).to_numpy(zero_copy_only=False))
    if len(differ):
        row = int(differ[0])
        raise ValueError(
            f"{where}: row {row} has {lengths[row]} tokens and {len(labels[row])} labels"
        )
    flat = _strings(pc.list_flatten(tokens), where)
    ids = _label_ids(pc.list_flatten(labels), names, task, where)
    kept = ids >= 0
    if not kept.all():
        rows = np.repeat(np.arange(len(lengths)), lengths)
        lengths = np.bincount(rows[kept], minlength=len(lengths))
        flat, ids = flat.filter(pyarrow.array(kept)), ids[kept]
    offsets = pyarrow.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
    return {
        "tokens": pyarrow.ListArray.from_arrays(offsets, flat),
        "labels": pyarrow.ListArray.from_arrays(offsets, pyarrow.array(ids)),
    }


def _label_ids(
    stored: pyarrow.Array, names: Sequence[str] | None, task: Task, where: str
) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The labels as indices into ``task.labels``, -1 for the ignored one."""
    import pyarrow
    import pyarrow.compute as pc

    kind = stored.type
    if stored.null_count:
        raise ValueError(f"{where}: {stored.null_count} labels are missing")
    if not len(stored):
        return np.zeros(0, np.int64)
    if pyarrow.types.is_integer(kind):
        numbers = stored.to_numpy(zero_copy_only=False).astype(np.int64)
        order = list(names or task.stored_labels or task.labels)
        outside = np.flatnonzero((numbers < 0) | (numbers >= len(order)))
        if len(outside):
            raise ValueError(
                f"{where}: labels should be from 0 to {len(order) - 1}, got {numbers[outside[0]]}"
            )
        used = np.unique(numbers)
    elif pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind):
        encoded = pc.dictionary_encode(stored)
        numbers = encoded.indices.to_numpy(zero_copy_only=False).astype(np.int64)
        order = encoded.dictionary.to_pylist()
        used = np.arange(len(order))
    else:
        raise ValueError(f"{where} should be labels, as names or numbers, got {kind}")
    place = {label: i for i, label in enumerate(task.labels)}
    if task.ignored is not None:
        place[task.ignored] = -1
    unknown = sorted(order[i] for i in used if order[i] not in place)
    if unknown:
        raise ValueError(
            f"{where}: labels should be those of {task.name}, {', '.join(task.labels)}, got "
            f"{unknown[0]!r}"
        )
    found: np.ndarray[Any, np.dtype[np.int64]]
    found = np.array([place.get(label, -1) for label in order], np.int64)[numbers]
    return found
