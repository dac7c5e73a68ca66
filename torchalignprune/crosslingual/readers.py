"""Reads a task's data in one language: from the hub, or from a folder."""

from __future__ import annotations

import gzip
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchalignprune.crosslingual.columns import as_dataset, column_names, import_datasets
from torchalignprune.crosslingual.tasks import Task, get_task

if TYPE_CHECKING:
    import datasets
    import pyarrow

__all__ = ["available_languages", "load_task"]

_SPLITS = {"train": "train", "validation": "validation", "valid": "validation"}
_SPLITS |= {"val": "validation", "dev": "validation", "test": "test"}
_SMALL = re.compile(r"(?P<split>train|dev|test)\.(?P<language>[\w-]+)\.tsv(\.gz)?")
_SUFFIXES = (".parquet", ".jsonl", ".csv", ".tsv")
# test, test-00000-of-00002, test-00000-of-00002-0123456789abcdef
_PART = re.compile(r"(?P<name>.*?)(-?(?P<number>\d+)-of-(?P<count>\d+)(-[\da-f]{16})?)?")

# For each language and split its files.
_Files = dict[str, dict[str, list[Path]]]


def load_task(
    task: str | Task,
    language: str,
    data: str | Path | None = None,
    *,
    splits: Sequence[str] | None = None,
) -> datasets.DatasetDict:
    """Loads the splits of a task's data in one language.

    Without ``data`` they come from the hub, through ``datasets.load_dataset``: ``pos`` and ``pud``
    from ``universal-dependencies/universal_dependencies``, ``topics`` from ``Davlan/sib200``,
    ``xnli`` from ``facebook/xnli``, ``pawsx`` from ``google-research-datasets/paws-x`` and ``ner``
    from ``unimelb-nlp/wikiann``.

    With ``data`` nothing is downloaded. That folder, or the task's folder in it (``udpos``,
    ``pud``, ``sib200``, ``xnli``, ``paws-x``, ``wikiann``), holds either

    - copies of the files of those repositories: a folder for each configuration, with ``.parquet``,
      ``.jsonl``, ``.csv`` or ``.tsv`` files (the last two with a header). The split is in the name
      of the file or of its folder, such as ``de/test-00000-of-00001.parquet``,
      ``en_ewt/train/0000.parquet``, ``eng_Latn/dev.tsv``. In ``.tsv`` files quotes enclose texts,
      as in SIB-200, but in those of pairs they are characters, as in PAWS-X and XNLI; or
    - for ``pos``, ``pud`` and ``topics``, plain files ``SPLIT.LANGUAGE.tsv`` or ``.tsv.gz``, where
      the split is ``train``, ``dev`` or ``test``: ``TOKEN TAB TAG`` lines with an empty line after
      each sentence, or ``ID TAB LABEL TAB TEXT`` lines. Tokens may hold spaces.

    Each split should be there once: in one format, and complete if the files' names number them.

    Args:
        task: a task, or the name of one of :data:`torchalignprune.crosslingual.TASKS`.
        language: its code, such as ``"de"``, or the name of a configuration of the repository,
            such as ``"de_hdt"``.
        data: the folder.
        splits: which of ``"train"``, ``"validation"`` and ``"test"`` to read. Default: all that
            exist.

    Returns:
        Those of ``train``, ``validation`` and ``test`` that exist, or ``splits``, each with the
        columns ``id`` (the data's own, or else the row's number) and

        - for words: ``tokens`` and ``labels``, a ``ClassLabel`` for each token;
        - for a text: ``text`` and ``label``, a ``ClassLabel``;
        - for a pair: ``text``, ``text_pair`` and ``label``.

        The label ids are indices into ``task.labels``, whatever the order in the data.

    Raises:
        ValueError: the task is unknown; the language is not there (the error lists those that
            are); one of ``splits`` is missing; a split is there twice or in part; a column is
            missing; a label is not the task's.
        TypeError: ``splits`` is one string.
        OSError: the hub cannot be reached.
        ImportError: datasets is not installed (``pip install "torchalignprune[crosslingual]"``).

    Example:
        >>> import tempfile, pathlib
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = pathlib.Path(folder, "test.vi.tsv")
        ...     _ = file.write_text("Thanh\\tPROPN\\nquen quen\\tADJ\\n")
        ...     load_task("pos", "vi", folder)["test"][0]
        {'id': '0', 'tokens': ['Thanh', 'quen quen'], 'labels': [11, 0]}
    """
    task = get_task(task)
    if isinstance(splits, str):
        raise TypeError(f"splits should be a list of names, got {splits!r}")
    if data is None:
        return _from_hub(task, language, splits)
    root = _root(task, data)
    files = _find(task, root)
    own = files.get(language) or files.get(_languages_of(task).get(language, language))
    if own is None:
        raise ValueError(
            f"{root} has no {task.name} data in {language!r}, only in {', '.join(sorted(files))}"
        )
    wanted = _wanted(own, splits, f"{task.name} in {language}, in {root},")
    for split in wanted:
        _check_files(own[split])
    return import_datasets().DatasetDict({split: _read(own[split], task) for split in wanted})


def available_languages(
    task: str | Task, data: str | Path | None = None, *, others: bool = False
) -> list[str]:
    """The languages of a task, sorted: those in a folder, or those known to be on the hub.

    A folder may hold configurations that stand for no language of the task: further treebanks, such
    as ``de_hdt``, which :func:`load_task` reads by that name, or XNLI's ``all_languages``, which it
    refuses, because each row there is in all languages at once.

    Args:
        task: a task, or the name of one of :data:`torchalignprune.crosslingual.TASKS`.
        data: the folder.
        others: list those configurations too. If the folder has no language of the task, they are
            listed anyway.

    Raises:
        ValueError: as :func:`load_task`.

    Example:
        >>> available_languages("pawsx")
        ['de', 'en', 'es', 'fr', 'ja', 'ko', 'zh']
    """
    task = get_task(task)
    if data is None:
        return sorted(task.configs)
    files = _find(task, _root(task, data))
    known = {
        code
        for code, own in files.items()
        if code in task.configs
        or any(_is_small(path, task) for paths in own.values() for path in paths)
    }
    return sorted(files if others or not known else known)


def _wanted(there: Iterable[str], splits: Sequence[str] | None, what: str) -> list[str]:
    """The splits to read, in their usual order."""
    own = [split for split in ("train", "validation", "test") if split in there]
    if splits is None:
        return own
    for split in splits:
        if split not in own:
            raise ValueError(
                f"{what} has no split {split!r}, only {', '.join(own) or 'unknown ones'}"
            )
    return [split for split in own if split in splits]


def _languages_of(task: Task) -> dict[str, str]:
    return {config: language for language, config in task.configs.items()}


def _from_hub(task: Task, language: str, splits: Sequence[str] | None) -> datasets.DatasetDict:
    if task.repository is None:
        raise ValueError(f"{task.name} is not on the hub: data should be a folder with it")
    library = import_datasets()
    config = task.configs.get(language, language)
    try:
        found = library.load_dataset(task.repository, config)
    except ValueError as error:
        known = ", ".join(sorted(task.configs))
        raise ValueError(
            f"{task.repository} has no {task.name} data in {language!r}: {_line(error)}; known "
            f"languages: {known}"
        ) from error
    except (OSError, library.exceptions.DatasetsError) as error:
        raise OSError(
            f"{task.repository} cannot be read from the hub ({_line(error)}); data=, or --data, "
            "takes a folder with its files"
        ) from error
    names = {_SPLITS[name]: name for name in found if name in _SPLITS}
    read = {}
    for split in _wanted(names, splits, f"{task.repository}, {config},"):
        rows = found[names[split]]
        where = f"{task.repository}, {config}, {names[split]}"
        read[split] = as_dataset(rows.with_format("arrow")[:], rows.features, task, where)
    return library.DatasetDict(read)


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).partition("\n")[0][:200]


def _root(task: Task, data: str | Path) -> Path:
    folder = Path(data)
    if not folder.is_dir():
        raise ValueError(f"data should be a folder, got {folder}")
    own = folder / task.folder if task.folder else folder
    return own if own.is_dir() else folder


def _find(task: Task, root: Path) -> _Files:
    """The files of each language under ``root``."""
    languages = _languages_of(task)
    files: _Files = {}
    plain: _Files = {}
    for path in _walk(root):
        small = _SMALL.fullmatch(path.name) if task.kind != "pair" else None
        if small is not None:
            if path.parent == root:
                splits = plain.setdefault(small["language"], {})
                splits.setdefault(_SPLITS[small["split"]], []).append(path)
            continue
        if path.suffix not in _SUFFIXES:
            continue
        # en_ewt/train/0000.parquet or en_ewt/universal_dependencies-train.parquet
        folder, split = path.parent, _SPLITS.get(path.parent.name)
        if split is not None:
            folder = folder.parent
        else:
            split = _split_of(path.stem)
        if split is not None:
            language = languages.get(folder.name, folder.name)
            files.setdefault(language, {}).setdefault(split, []).append(path)
    for language, own in plain.items():
        for split, paths in own.items():
            files.setdefault(language, {}).setdefault(split, []).extend(paths)
    if not files:
        small_files = ", SPLIT.LANGUAGE.tsv.gz" if task.kind != "pair" else ""
        raise ValueError(
            f"{root} has no files of {task.name}: expected CONFIGURATION/SPLIT with "
            f"{', '.join(_SUFFIXES)}{small_files}"
        )
    return files


def _walk(root: Path) -> Iterator[Path]:
    for parent, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith("."):
                yield Path(parent) / name


def _is_small(path: Path, task: Task) -> bool:
    return task.kind != "pair" and _SMALL.fullmatch(path.name) is not None


def _split_of(stem: str) -> str | None:
    words = [word for word in re.split(r"[^A-Za-z]+", stem) if word in _SPLITS]
    return _SPLITS[words[-1]] if words else None


def _check_files(paths: Sequence[Path]) -> None:
    """Refuses a split that is there twice, in two formats or folders, or only in part."""
    names = ", ".join(map(str, paths))
    if len({path.suffix for path in paths}) > 1:
        raise ValueError(f"the files of a split should be of one format, got {names}")
    series, parts = set(), []
    for path in paths:
        numbered = path.stem.isdecimal()  # the name does not give the number of files
        found = _PART.fullmatch(path.stem)
        assert found is not None
        series.add((path.parent, None if numbered else found["name"]))
        count = len(paths) if numbered else int(found["count"] or 1)
        parts.append((int(path.stem) if numbered else int(found["number"] or 0), count))
    count = max(count for _, count in parts)
    if len(series) > 1 or sorted(parts) != [(number, count) for number in range(count)]:
        several = count > 1 and len(series) == 1
        whole = f", in {count} files numbered from 0" if several else ""
        raise ValueError(f"a split should be there once{whole}, got {names}")


def _read(paths: list[Path], task: Task) -> datasets.Dataset:
    import pyarrow

    parts = []
    for path in paths:
        features: Mapping[str, Any] = {}
        if _is_small(path, task):
            table = _read_small(path, task)
        else:
            try:
                table = _read_table(path, task)
            except (pyarrow.ArrowException, UnicodeDecodeError) as error:
                raise ValueError(f"{path} cannot be read: {_line(error)}") from error
            features = import_datasets().Features.from_arrow_schema(table.schema)
        parts.append(as_dataset(table, features, task, str(path)))
    if len(parts) == 1:
        return parts[0]
    return import_datasets().concatenate_datasets(parts)


def _read_table(path: Path, task: Task) -> pyarrow.Table:
    if path.suffix == ".parquet":
        import pyarrow.parquet

        return pyarrow.parquet.read_table(path)
    if path.suffix == ".jsonl":
        return _read_lines(path)
    import pyarrow.csv

    tabs = path.suffix == ".tsv"
    parse = pyarrow.csv.ParseOptions(
        delimiter="\t" if tabs else ",",
        # In the files of PAWS-X and XNLI quotes are characters of the sentences.
        quote_char=False if tabs and task.kind == "pair" else '"',
        newlines_in_values=True,
    )
    # Texts such as "NA" and "007" stay texts.
    texts = [name for kind in ("text", "text_pair") for name in task.columns.get(kind, (kind,))]
    convert = pyarrow.csv.ConvertOptions(
        column_types=dict.fromkeys(texts, pyarrow.string()), null_values=[]
    )
    table = pyarrow.csv.read_csv(path, parse_options=parse, convert_options=convert)
    if tabs:
        _check_lines(path, table)
    return table


def _read_lines(path: Path) -> pyarrow.Table:
    """Reads JSON lines. A column of texts that look like times stays as it is; Arrow parses it."""
    import pyarrow.json

    table = pyarrow.json.read_json(path)
    texts = [own for own in table.schema if _as_text(own.type) != own.type]
    if not texts:
        return table
    schema = pyarrow.schema([(own.name, _as_text(own.type)) for own in texts])
    options = pyarrow.json.ParseOptions(explicit_schema=schema)
    return pyarrow.json.read_json(path, parse_options=options)


def _as_text(kind: pyarrow.DataType) -> pyarrow.DataType:
    import pyarrow

    if pyarrow.types.is_list(kind):
        return pyarrow.list_(_as_text(kind.value_type))
    return pyarrow.string() if pyarrow.types.is_timestamp(kind) else kind


def _check_lines(path: Path, table: pyarrow.Table) -> None:
    """Refuses texts of several lines: an unclosed quote makes one text of many rows."""
    import pyarrow
    import pyarrow.compute as pc

    for name in table.column_names:
        if not pyarrow.types.is_string(table[name].type):
            continue
        broken = pc.match_substring_regex(table[name], "[\r\n]").to_numpy(zero_copy_only=False)
        if broken.any():
            raise ValueError(
                f"{path}: {name} of row {int(broken.argmax())} should be on one line, got several: "
                "a quote before it may be unclosed"
            )


def _read_small(path: Path, task: Task) -> pyarrow.Table:
    import pyarrow

    opened = gzip.open if path.suffix == ".gz" else open
    # A byte-order mark is not part of the first token.
    with opened(path, "rt", encoding="utf-8-sig", newline="\n") as lines:
        try:
            if task.kind == "words":
                columns = _read_tagged(path, lines)
            else:
                columns = _read_texts(path, lines)
        except (UnicodeDecodeError, EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{path} cannot be read: {_line(error)}") from error
    if not columns[column_names(task)[-1]]:
        raise ValueError(f"{path} should have at least one sentence, got an empty file")
    return pyarrow.table(columns)


def _read_tagged(path: Path, lines: Iterable[str]) -> dict[str, list[Any]]:
    tokens: list[list[str]] = []
    tags: list[list[str]] = []
    inside = False
    for number, line in enumerate(lines, 1):
        line = line.rstrip("\r\n")
        if not line:
            inside = False
            continue
        # Not at spaces, which tokens may hold, as in Vietnamese.
        fields = line.split("\t")
        if len(fields) != 2:
            raise ValueError(f"{path}:{number} should be TOKEN TAB TAG, got {line!r}")
        if not inside:
            tokens.append([])
            tags.append([])
            inside = True
        tokens[-1].append(fields[0])
        tags[-1].append(fields[1])
    return {"tokens": tokens, "labels": tags}


def _read_texts(path: Path, lines: Iterable[str]) -> dict[str, list[Any]]:
    rows = []
    for number, line in enumerate(lines, 1):
        fields = line.rstrip("\r\n").split("\t")
        if len(fields) != 3:
            raise ValueError(f"{path}:{number} should be ID TAB LABEL TAB TEXT, got {line!r}")
        rows.append(fields)
    ids, labels, texts = (list(column) for column in zip(*rows, strict=True)) if rows else [[]] * 3
    return {"id": ids, "label": labels, "text": texts}
