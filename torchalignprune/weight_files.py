"""Weights in safetensors files: read without a copy, found by name, written atomically."""

from __future__ import annotations

import difflib
import json
import math
import mmap
import os
import platform
import secrets
import sys
import threading
import weakref
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor

__all__ = [
    "DTYPE_NAMES",
    "StoredTensors",
    "WeightFiles",
    "find_weights",
    "flush",
    "plain_names",
    "write_tensors",
]

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: kind for kind, dtype in _DTYPES.items()}
"""The names of dtypes in safetensors."""

_HINTS = 10  # for how many missing names an error suggests similar ones

# Without this, Linux would reserve memory for the whole file, since the mapping is writable.
_NORESERVE = (
    0x4000 if sys.platform == "linux" and platform.machine() in ("x86_64", "aarch64") else 0
)


class _Place(NamedTuple):
    """A tensor in a file; ``begin`` is in bytes from the start of the file."""

    file: Path
    kind: str
    shape: tuple[int, ...]
    begin: int


class StoredTensors(Mapping[str, Tensor]):
    """Tensors in files, by name. Each is read when it is accessed.

    Attributes:
        path: the file or folder.
    """

    path: Path

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, without reading it."""

    @abstractmethod
    def dtype(self, name: str) -> torch.dtype:
        """The dtype of a tensor, without reading it."""


class WeightFiles(StoredTensors):
    """The tensors of a safetensors file, or of a checkpoint folder with one or more of them.

    Only the headers are read at first. A tensor is a view of its memory-mapped file. It takes pages
    of the file cache, which the system may drop again, but no memory of the process, so files may
    be larger than the memory. A file stays mapped as long as one of its tensors is in use; it may
    be replaced meanwhile, but must not be written to. Writing to a tensor copies its pages and does
    not change the file.

    Args:
        path: a safetensors file, the index of a sharded checkpoint, or a folder with
            ``model.safetensors`` or ``model.safetensors.index.json``.

    Raises:
        ValueError: there is no such file, or it is damaged.
        ImportError: safetensors is not installed.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        try:
            import safetensors  # noqa: F401
        except ImportError as error:
            raise ImportError(
                'weights in files need safetensors: pip install "torchalignprune[transformers]"'
            ) from error
        self.path = Path(path)
        self.metadata: dict[str, str] = {}
        self._places: dict[str, _Place] = {}
        self._versions: dict[Path, _Version] = {}
        self._mapped: weakref.WeakValueDictionary[Path, mmap.mmap] = weakref.WeakValueDictionary()
        files, listed = _files(self.path)
        for file in files:
            places, metadata, self._versions[file] = _header(file)
            # If the index puts a tensor into another file, the one in this file is outdated.
            self._places |= {n: place for n, place in places.items() if listed.get(n, file) == file}
            self.metadata |= metadata
        if missing := sorted(set(listed) - set(self._places)):
            raise ValueError(
                f"{listed[missing[0]]} should have {missing[0]} according to the index of {path}, "
                "but does not"
            )

    def __getitem__(self, name: str) -> Tensor:
        place = self._places[name]
        dtype = self.dtype(name)
        count = math.prod(place.shape)
        if count == 0:
            return torch.empty(place.shape, dtype=dtype)
        tensor = torch.frombuffer(
            self._mapping(place.file), dtype=dtype, count=count, offset=place.begin
        )
        if tensor.data_ptr() % dtype.itemsize:  # unaligned, as in files of early versions
            tensor = tensor.clone()
        return tensor.reshape(place.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def file(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self._places[name].file

    def shape(self, name: str) -> tuple[int, ...]:
        return self._places[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """
        Raises:
            ValueError: torch has no such dtype.
        """
        place = self._places[name]
        if place.kind not in _DTYPES:
            raise ValueError(
                f"{name} in {place.file} should have a dtype of torch, got {place.kind}"
            )
        return _DTYPES[place.kind]

    def _mapping(self, file: Path) -> mmap.mmap:
        with _ONE_AT_A_TIME:
            mapped = self._mapped.get(file)
            if mapped is None:
                mapped = self._mapped[file] = _map(file, self._versions[file])
            return mapped


# Without the lock, two threads could map the same file twice.
_ONE_AT_A_TIME = threading.Lock()


def _map(file: Path, version: _Version) -> mmap.mmap:
    with file.open("rb") as opened:
        if _version(opened) != version:
            raise ValueError(f"{file} has been replaced or changed since it was opened")
        # The mapping is copy-on-write, because torch has no read-only tensors.
        if sys.platform == "win32":
            return mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
        return mmap.mmap(
            opened.fileno(),
            0,
            flags=mmap.MAP_PRIVATE | _NORESERVE,
            prot=mmap.PROT_READ | mmap.PROT_WRITE,
        )


def plain_names(files: StoredTensors) -> dict[str, str]:
    """The stored name of each weight, by the plain name.

    They differ in the checkpoint of a pruned model, which has ``name_orig`` and ``name_mask``.
    """
    names = {}
    for stored in files:
        plain = stored.removesuffix("_orig")
        pruned = plain != stored and f"{plain}_mask" in files
        names[plain if pruned else stored] = stored
    return names


def find_weights(
    files: StoredTensors,
    names: Sequence[Sequence[str]],
    shapes: Sequence[tuple[int, ...]],
    stored: Mapping[str, str],
) -> list[str]:
    """The name under which files hold each parameter of a model.

    The names in the model and the files may differ in one prefix that is the same for all, such as
    ``bert.`` or ``model.`` of a base model in a task model, or that of a wrapper. A prefix that is
    replaced by another must have no number in it, so that layers are not mixed up.

    Args:
        files: where to look.
        names: the dotted names of each parameter in the model; several if it is tied.
        shapes: the shape of each parameter.
        stored: the stored name of each weight in the files, by its plain name.

    Returns:
        The stored name of each parameter.

    Raises:
        ValueError: parameters are missing in the files, or have another shape or no floating-point
            dtype there (all are listed); or several prefixes fit.
    """
    changes = _changes(names, stored)
    off, on = changes[0] if changes else ("", "")
    if len(changes) > 1:
        found = ", ".join(f"{on}{names[0][0].removeprefix(off)}" for off, on in changes)
        raise ValueError(f"{names[0][0]} could be any of these in {files.path}: {found}")

    fits = [
        [f"{on}{name.removeprefix(off)}" for name in group if name.startswith(off)]
        for group in names
    ]
    keys = [next((stored[name] for name in own if name in stored), None) for own in fits]
    taken = set(keys)
    free = [name for name, key in stored.items() if key not in taken]
    results, problems = [], []
    missing = 0
    for group, own, shape, key in zip(names, fits, shapes, keys, strict=True):
        if key is None:
            missing += 1
            near = _near((own or group)[0], free) if missing <= _HINTS else []
            problems.append(f"{group[0]}: missing" + (f"; near: {', '.join(near)}" if near else ""))
        elif files.shape(key) != shape:
            problems.append(f"{group[0]}: should have shape {shape}, got {files.shape(key)}")
        elif not files.dtype(key).is_floating_point or files.dtype(key).itemsize < 2:
            kind = str(files.dtype(key)).removeprefix("torch.")
            problems.append(f"{group[0]}: should be floating-point weights, got {kind}")
        else:
            results.append(key)
    if problems:
        listed = "\n  ".join(problems)
        raise ValueError(
            f"{files.path} does not fit {len(problems)} of {len(names)} parameters:\n  {listed}"
        )
    return results


def write_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Writes a safetensors file atomically: under another name, which is then changed.

    Args:
        path: the file to write; an existing one is replaced.
        tensors: on any device; no two may share memory.
        metadata: for the header.

    Raises:
        OSError: the file cannot be written.
        ImportError: safetensors is not installed.
    """
    try:
        from safetensors import SafetensorError
        from safetensors.torch import save_file
    except ImportError as error:
        raise ImportError(
            'weights in files need safetensors: pip install "torchalignprune[transformers]"'
        ) from error
    path = Path(path).absolute()
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder")
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        partial.touch(exist_ok=False)
        mode = partial.stat().st_mode
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()},
            partial,
            metadata=dict(metadata),
        )
        # Some versions of safetensors make files that only the owner may read.
        partial.chmod(mode)
        flush(partial)
        partial.replace(path)
        flush(path.parent)
    except SafetensorError as error:  # as when the disk is full
        raise OSError(f"{path} cannot be written: {error}") from error
    finally:
        partial.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Makes sure that a file, or the entries of a folder, are on the disk."""
    if path.is_dir() and sys.platform == "win32":  # which cannot open folders
        return
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _files(path: Path) -> tuple[list[Path], dict[str, Path]]:
    """The files of a checkpoint, and the file of each tensor if there is an index."""
    if not path.exists():
        raise ValueError(f"{path} does not exist")
    if path.is_dir():
        if (path / _WEIGHTS).is_file():
            return [path / _WEIGHTS], {}
        if not (path / _INDEX).is_file():
            raise ValueError(f"{path} has neither {_WEIGHTS} nor {_INDEX}")
        path = path / _INDEX
    if not path.name.endswith(".index.json"):
        return [path], {}
    try:
        shards = dict(json.loads(path.read_text(encoding="utf-8"))["weight_map"])
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not the index of a checkpoint: {error!r}") from error
    for name, shard in shards.items():
        if not isinstance(shard, str) or Path(shard).is_absolute() or ".." in Path(shard).parts:
            raise ValueError(
                f"{path} is not the index of a checkpoint: the file of {name} should be in its "
                f"folder, got {shard!r}"
            )
    return (
        [path.parent / shard for shard in sorted(set(shards.values()))],
        {name: path.parent / shard for name, shard in shards.items()},
    )


_Version = tuple[int, ...]


def _version(opened: IO[bytes]) -> _Version:
    """A value that changes when a file is written to or replaced."""
    found = os.fstat(opened.fileno())
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _header(file: Path) -> tuple[dict[str, _Place], dict[str, str], _Version]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="np"):  # checks the whole header
            pass
        with file.open("rb") as opened:
            version = _version(opened)
            length = int.from_bytes(opened.read(8), "little")
            header: dict[str, Any] = json.loads(opened.read(length))
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    metadata = header.pop("__metadata__", {})
    places = {}
    for name, entry in header.items():
        begin = 8 + length + entry["data_offsets"][0]
        places[name] = _Place(file, entry["dtype"], tuple(entry["shape"]), begin)
    return places, metadata, version


def _changes(names: Sequence[Sequence[str]], stored: Mapping[str, str]) -> list[tuple[str, str]]:
    """Which prefix to remove from the names, and which to add, so that most are stored names.

    Several if each makes all names fit and none is simpler than the others.
    """
    votes = Counter[tuple[str, str]]()
    prefixes: dict[str, list[str]] = {}
    for name in stored:
        for at in (0, *_dots(name)):
            prefixes.setdefault(name[at:], []).append(name[:at])
    for group in names:
        fitting = set()
        for name in group:
            for at in (0, *_dots(name)):
                off, rest = name[:at], name[at:]
                fitting |= {(off, on) for on in prefixes.get(rest, ()) if _allowed(off, on, rest)}
        votes.update(fitting)
    if not votes:
        return []
    most = max(votes.values())
    best = [change for change, count in votes.items() if count == most]
    simplest = min(map(_size, best))
    best = sorted(change for change in best if _size(change) == simplest)
    return best if most == len(names) else best[:1]


def _size(change: tuple[str, str]) -> int:
    return sum(map(bool, change))


def _allowed(off: str, on: str, rest: str) -> bool:
    if not (off and on):
        return True
    shared = off.split(".")[-2] == on.split(".")[-2]  # a shorter change does the same
    numbers = [any(part.isdigit() for part in name.split(".")) for name in (off, on, rest)]
    return not shared and numbers == [False, False, True]


def _dots(name: str) -> list[int]:
    """The positions at which the parts of a dotted name begin, without the first."""
    return [at + 1 for at, character in enumerate(name) if character == "."]


def _near(name: str, free: Sequence[str]) -> list[str]:
    last = name.rpartition(".")[2]
    alike = [other for other in free if other.rpartition(".")[2] == last]
    return difflib.get_close_matches(name, alike, n=3, cutoff=0.6)
