"""The files of a saved pruned model: shards, their index, and the checks when they are read.

``pruned.index.json`` describes the folder. It has the shape, dtype and kind of every tensor of the
model's state, and SHA-256 digests of all that is stored, of the other files written with it, and of
itself. The tensors are in safetensors files: ``pruned.safetensors`` or
``pruned-00001-of-00002.safetensors`` and so on in the layout ``"bitmask"``, or the files that
``from_pretrained`` expects in the layout ``"dense"``. A tensor is of one of these kinds:

- ``dense``: stored as it is, under its name.
- ``bits``: a bool tensor, stored as ``name.bits``, with one bit for each entry.
- ``bitmask``: stored as ``name.bits``, the remaining values ``name.values``, and ``name.signs`` if
  some of the zeros are negative. See :mod:`torchalignprune.bitmask`.
- ``mask_of``: a bool tensor that equals the bits of another tensor; nothing is stored for it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from torchalignprune import ops
from torchalignprune.bitmask import (
    Packed,
    byte_count,
    pack,
    pack_bits,
    unpack,
    unpack_bits,
)
from torchalignprune.parameters import DTYPES
from torchalignprune.weight_files import DTYPE_NAMES, StoredTensors, WeightFiles, write_tensors

__all__ = [
    "INDEX",
    "Contents",
    "PrunedFiles",
    "dense_contents",
    "open_weights",
    "own_files",
    "parse_size",
    "write_bitmask",
    "write_dense",
    "write_index",
]

INDEX = "pruned.index.json"
Layout = Literal["dense", "bitmask"]

_FORMAT, _VERSION = "torchalignprune.pruned", 1
_DTYPES = {kind: dtype for dtype, kind in DTYPE_NAMES.items()}
_ENTRY = 512  # about how many bytes a stored tensor takes in the header and in the index
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


class _Part(NamedTuple):
    """The dtype and shape of a tensor in a safetensors file."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class _Entry:
    """The entry of a tensor in the index.

    Attributes:
        kind: dense, bits, bitmask or mask_of.
        dtype: in the notation of safetensors.
        shape: the shape of the tensor.
        count: for bitmask, how many bits are set.
        signs: for bitmask, whether some zeros are negative.
        of: for mask_of, the tensor whose bits these are.
    """

    kind: str
    dtype: str
    shape: tuple[int, ...]
    count: int = 0
    signs: bool = False
    of: str = ""

    def parts(self, name: str) -> dict[str, _Part]:
        """The parts that are stored for the tensor, by name."""
        n = math.prod(self.shape)
        if self.kind == "dense":
            return {name: _Part(self.dtype, self.shape)}
        if self.kind == "bits":
            return {f"{name}.bits": _Part("U8", (byte_count(n),))}
        if self.kind == "bitmask":
            parts = {
                f"{name}.bits": _Part("U8", (byte_count(n),)),
                f"{name}.values": _Part(self.dtype, (self.count,)),
            }
            if self.signs:
                parts[f"{name}.signs"] = _Part("U8", (byte_count(n - self.count),))
            return parts
        if self.kind == "mask_of":
            return {}
        raise ValueError(f"unknown kind {self.kind!r}")


class Contents(NamedTuple):
    """The tensors of a state that were written, and the files of their parts.

    Attributes:
        tensors: the index entry of each tensor, by its name in the state.
        weight_map: the file of each stored part.
        digests: the SHA-256 of each stored part, in hexadecimal.
    """

    tensors: dict[str, _Entry]
    weight_map: dict[str, str]
    digests: dict[str, str]


class PrunedFiles(StoredTensors):
    """The tensors of a folder that :func:`torchalignprune.save_pruned` wrote, by name.

    The names are those in the model's state, with ``name_orig`` and ``name_mask`` if the model was
    still being pruned. The files are memory-mapped, as by
    :class:`torchalignprune.weight_files.WeightFiles`, and stay mapped. A tensor is unpacked on each
    access and not kept.

    Args:
        folder: with ``pruned.index.json``.
        verify: compare the digest of each part when it is first read, and raise ValueError if it
            differs. This costs one pass over the files, at 0.5 to 2 GB/s.

    Attributes:
        layout: ``"dense"`` or ``"bitmask"``.
        model: the class name of the saved model.
        pruned: the plain names of the parameters that have a mask.
        tied: the name that a tied tensor is stored under, by each of its other names.

    Raises:
        ValueError: ``save_pruned`` did not write the folder, or another version did; or the folder
            is damaged: the index was altered, a file is missing or cut off, or a part is missing,
            unexpected or of another shape or dtype.
        ImportError: safetensors is not installed.
    """

    def __init__(self, folder: str | os.PathLike[str], *, verify: bool = True) -> None:
        self.path = Path(folder)
        self._verify = verify
        index = _read_index(self.path)
        try:
            self.layout: Layout = index["metadata"]["layout"]
            self.model: str = index["metadata"]["model"]
            self.pruned: frozenset[str] = frozenset(index["pruned"])
            self.tied: dict[str, str] = dict(index["tied"])
            self._other_files: dict[str, str] = dict(index["files"])
            self._digests: dict[str, str] = dict(index["digests"])
            self._entries = {
                name: _Entry(**(entry | {"shape": tuple(entry["shape"])}))
                for name, entry in index["tensors"].items()
            }
            expected = [entry.parts(name) for name, entry in self._entries.items()]
            weight_map: dict[str, str] = index["weight_map"]
            files = set(weight_map.values())
            escaping = [file for file in (*files, *self._other_files) if Path(file).name != file]
            if escaping:
                raise ValueError(f"{escaping[0]!r} is not a file name")
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{self.path / INDEX} is damaged: {error!r}") from error
        self._files = WeightFiles(self.path / INDEX)
        self._check_parts(
            {name: part for parts in expected for name, part in parts.items()}, weight_map
        )
        self._seen: set[str] = set()
        self._held: dict[Path, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        name = self.tied.get(name, name)
        entry = self._entries[name]
        if entry.kind == "dense":
            return self._part(name)
        if entry.kind in ("bits", "mask_of"):
            bits = self._part(f"{entry.of or name}.bits")
            with self._damage(name):
                return unpack_bits(bits, entry.shape)
        signs = self._part(f"{name}.signs") if entry.signs else None
        packed = Packed(self._part(f"{name}.bits"), self._part(f"{name}.values"), signs)
        with self._damage(name):
            return unpack(packed, entry.shape)

    def __iter__(self) -> Iterator[str]:
        yield from self._entries
        yield from self.tied

    def __len__(self) -> int:
        return len(self._entries) + len(self.tied)

    def __contains__(self, name: object) -> bool:
        return name in self._entries or name in self.tied

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entries[self.tied.get(name, name)].shape

    def dtype(self, name: str) -> torch.dtype:
        return _DTYPES[self._entries[self.tied.get(name, name)].dtype]

    def check(self) -> None:
        """Checks everything that is stored, so that no later read can fail.

        With ``verify`` this reads all parts once. Without, it only reads the bits and compares
        their number with that of the values.

        Raises:
            ValueError: a part was altered.
        """
        if self._verify:
            with ThreadPoolExecutor(torch.get_num_threads()) as pool:
                for _ in pool.map(self._part, self._files):
                    pass
        for name, entry in self._entries.items():
            n = math.prod(entry.shape)
            with self._damage(name):
                if entry.kind in ("bits", "bitmask"):
                    count = ops.count_bits(self._part(f"{name}.bits"), n)
                if entry.kind == "bitmask" and count != entry.count:
                    raise ValueError(f"{entry.count} bits should be set, got {count}")
                if entry.signs:
                    ops.count_bits(self._part(f"{name}.signs"), n - count)

    def check_other_files(self) -> None:
        """Checks the other files that were written with the tensors, such as ``config.json``.

        Raises:
            ValueError: a file was altered or is missing.
        """
        if not self._verify:
            return
        for name, expected in self._other_files.items():
            file = self.path / name
            if not file.is_file():
                raise ValueError(f"{file} is missing")
            if hashlib.sha256(file.read_bytes()).hexdigest() != expected:
                raise ValueError(
                    f"{file} was altered after save_pruned wrote it; verify=False accepts it"
                )

    def _part(self, name: str) -> Tensor:
        part = self._files[name]
        if part.numel():  # keeps the file mapped, even if another one takes its place
            self._held.setdefault(self._files.file(name), part)
        if self._verify and name not in self._seen:
            if _digest(part) != self._digests[name]:
                raise ValueError(f"{self._where(name)} was altered: its SHA-256 digest differs")
            self._seen.add(name)
        return part

    @contextmanager
    def _damage(self, name: str) -> Iterator[None]:
        try:
            yield
        except ValueError as error:
            raise ValueError(f"{name} in {self.path} is damaged: {error}") from error

    def _check_parts(self, expected: Mapping[str, _Part], weight_map: Mapping[str, str]) -> None:
        for name, (kind, shape) in expected.items():
            if name not in self._files or name not in self._digests:
                raise ValueError(f"{name} is missing in the files of {self.path}")
            found = DTYPE_NAMES[self._files.dtype(name)], self._files.shape(name)
            if found != (kind, shape):
                raise ValueError(
                    f"{self._where(name)} should be {kind} of shape {shape}, as in {INDEX}, got "
                    f"{found[0]} of shape {found[1]}"
                )
            if self._files.file(name).name != weight_map.get(name):
                raise ValueError(f"{self._where(name)} is not in the file that {INDEX} names")
        extra = sorted(set(self._files) - set(expected))
        if extra:
            raise ValueError(f"{self._where(extra[0])} is not in {INDEX}")
        for name, entry in self._entries.items():
            if entry.of and self._entries[entry.of].kind != "bitmask":
                raise ValueError(f"{self.path / INDEX} is damaged: {name} has no bits")

    def _where(self, name: str) -> str:
        return f"{name} in {self._files.file(name)}"


def open_weights(path: str | os.PathLike[str]) -> StoredTensors:
    """The tensors of a checkpoint, whether it has plain weights or bitmasks.

    Args:
        path: a folder that :func:`torchalignprune.save_pruned` wrote, or anything that
            :class:`torchalignprune.weight_files.WeightFiles` accepts.

    Raises:
        ValueError: there is no such checkpoint, or it is damaged.
        ImportError: safetensors is not installed.
    """
    return PrunedFiles(path) if is_bitmask(path) else WeightFiles(path)


def is_bitmask(path: str | os.PathLike[str]) -> bool:
    """Whether :func:`torchalignprune.save_pruned` wrote a folder in the layout ``"bitmask"``.

    Raises:
        ValueError: the index of the folder is damaged.
    """
    folder = Path(path)
    there = (folder / INDEX).is_file()
    return there and _read_index(folder)["metadata"].get("layout") == "bitmask"


def write_bitmask(
    folder: Path,
    state: Mapping[str, Tensor],
    pruned: Mapping[str, str],
    max_shard_size: int,
) -> Contents:
    """Writes a state in the layout ``"bitmask"``, without its index.

    Args:
        folder: an existing folder to write to.
        state: tensors on any device, tied ones once. A floating-point tensor without a mask becomes
            a bitmask if that is smaller, one with a mask if it is zero under the mask.
        pruned: the name of the mask of each tensor that has one.
        max_shard_size: in bytes; a larger tensor gets a shard of its own.
    """
    entries: dict[str, _Entry] = {}
    masks = {pruned[name]: name for name in state if name in pruned}

    def groups() -> Iterator[dict[str, Tensor]]:
        for name in sorted(state, key=lambda key: key in masks):  # masks come last
            tensor = state[name]
            kind, shape = DTYPE_NAMES[tensor.dtype], tuple(tensor.shape)
            of = masks.get(name)
            if of is not None and entries[of].kind == "bitmask":
                entries[name] = _Entry("mask_of", "BOOL", shape, of=of)
                continue
            if tensor.dtype == torch.bool:
                entries[name] = _Entry("bits", kind, shape)
                yield {f"{name}.bits": pack_bits(tensor)}
                continue
            packed = None
            if tensor.dtype in DTYPES:
                masked = name in pruned
                packed = pack(tensor, state[pruned[name]] if masked else None)
                if not masked and packed is not None and not _pays(packed, tensor):
                    packed = None
            if packed is None:
                entries[name] = _Entry("dense", kind, shape)
                yield {name: tensor}
                continue
            bits, values, signs = packed
            entries[name] = _Entry("bitmask", kind, shape, len(values), signs is not None)
            parts = {f"{name}.bits": bits, f"{name}.values": values}
            yield parts | ({} if signs is None else {f"{name}.signs": signs})

    metadata = {"format": f"{_FORMAT}.bitmask", "version": str(_VERSION)}
    weight_map, digests = _write_shards(folder, "pruned", groups(), max_shard_size, metadata)
    return Contents(entries, weight_map, digests)


def write_dense(folder: Path, state: Mapping[str, Tensor], max_shard_size: int) -> None:
    """Writes a state like Hugging Face's libraries, to ``model.safetensors`` or shards of it.

    Args:
        folder: an existing folder to write to.
        state: tensors on any device, tied ones once.
        max_shard_size: in bytes; a larger tensor gets a shard of its own.
    """
    groups = ({name: tensor} for name, tensor in state.items())
    weight_map, _ = _write_shards(folder, "model", groups, max_shard_size, {"format": "pt"})
    if len(set(weight_map.values())) > 1:
        size = sum(tensor.nbytes for tensor in state.values())
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        _write_json(folder / "model.safetensors.index.json", index)


def dense_contents(folder: Path) -> Contents:
    """The contents of a folder in the layout ``"dense"`` whose weights have been written."""
    files = WeightFiles(folder)
    entries, weight_map, digests = {}, {}, {}
    for name in files:
        entries[name] = _Entry("dense", DTYPE_NAMES[files.dtype(name)], files.shape(name))
        weight_map[name] = files.file(name).name
        digests[name] = _digest(files[name])
    return Contents(entries, weight_map, digests)


def write_index(
    folder: Path,
    layout: Layout,
    model: str,
    contents: Contents,
    pruned: Iterable[str],
    tied: Mapping[str, str],
) -> None:
    """Writes ``pruned.index.json``, with the digests of all other files in the folder.

    Args:
        folder: with the weights and all other files.
        layout: the layout of the weights.
        model: the class name of the model.
        contents: the tensors that were written.
        pruned: the plain names of the parameters that have a mask.
        tied: the name that a tied tensor is stored under, by each of its other names.
    """
    weights = set(contents.weight_map.values())
    others = sorted(file for file in folder.iterdir() if file.name not in weights)
    index: dict[str, Any] = {
        "metadata": {
            "format": _FORMAT,
            "version": _VERSION,
            "layout": layout,
            "model": model,
            "total_size": sum((folder / file).stat().st_size for file in weights),
        },
        "tensors": {name: _slim(entry) for name, entry in contents.tensors.items()},
        "pruned": sorted(pruned),
        "tied": dict(tied),
        "weight_map": contents.weight_map,
        "digests": contents.digests,
        "files": {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in others},
    }
    _write_json(folder / INDEX, index | {"sha256": _index_digest(index)})


def own_files(folder: Path) -> set[str]:
    """The names of the files that :func:`torchalignprune.save_pruned` wrote to a folder.

    Raises:
        ValueError: it did not write the folder.
    """
    index = _read_index(folder)
    return {INDEX, *index["weight_map"].values(), *index["files"]}


def parse_size(size: int | str) -> int:
    """The number of bytes of an int or of a string such as ``"5GB"`` (5 * 10**9) or ``"200MiB"``.

    Raises:
        ValueError: the string cannot be parsed, or the number is not positive.

    Example:
        >>> parse_size("5GB"), parse_size("1 KiB"), parse_size(12)
        (5000000000, 1024, 12)
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(size))
    bytes_ = 0
    if found and found[2].upper() in _UNITS and not isinstance(size, bool):
        bytes_ = int(float(found[1]) * _UNITS[found[2].upper()])
    if bytes_ <= 0:
        raise ValueError(
            f'max_shard_size should be a positive number of bytes, or a string like "5GB", got '
            f"{size!r}"
        )
    return bytes_


def _write_shards(
    folder: Path,
    stem: str,
    groups: Iterable[Mapping[str, Tensor]],
    max_shard_size: int,
    metadata: Mapping[str, str],
) -> tuple[dict[str, str], dict[str, str]]:
    """Writes shards that keep each group together; returns each tensor's file and its digest."""
    digests: dict[str, str] = {}
    shards: list[list[str]] = []
    shard: dict[str, Tensor] = {}

    def flush() -> None:
        write_tensors(folder / f"{stem}-{len(shards)}", shard, metadata)
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            digests.update(zip(shard, pool.map(_digest, shard.values()), strict=True))
        shards.append(list(shard))
        shard.clear()

    size = 0
    for group in groups:
        own = sum(tensor.nbytes for tensor in group.values())
        if shard and size + own > max_shard_size:
            flush()
            size = 0
        for name, tensor in group.items():
            if name in digests or name in shard:
                raise ValueError(f"two tensors of the model would be stored as {name}")
            shard[name] = _alone(tensor)
        size += own
    if shard or not shards:
        flush()
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards):
        part = f"-{number + 1:05}-of-{len(shards):05}" if len(shards) > 1 else ""
        (folder / f"{stem}-{number}").rename(folder / f"{stem}{part}.safetensors")
        weight_map |= dict.fromkeys(names, f"{stem}{part}.safetensors")
    return weight_map, digests


def _pays(packed: Packed, tensor: Tensor) -> bool:
    """Whether packing makes a tensor smaller."""
    parts = [part for part in packed if part is not None]
    return sum(part.nbytes + _ENTRY for part in parts) < tensor.nbytes + _ENTRY


def _alone(tensor: Tensor) -> Tensor:
    """The tensor as safetensors needs it: contiguous, on the CPU, in a storage of its own size."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _digest(tensor: Tensor) -> str:
    # A contiguous tensor may have any stride in a dimension of size 1, and view() refuses some.
    flat = tensor.as_strided((tensor.numel(),), (1,))
    return hashlib.sha256(flat.view(torch.uint8).numpy().data).hexdigest()


def _slim(entry: _Entry) -> dict[str, Any]:
    """The entry without its default values, to keep the index small."""
    kept = {key: value for key, value in asdict(entry).items() if value}
    return kept | {"shape": list(entry.shape)}


def _read_index(folder: Path) -> dict[str, Any]:
    """The index of a folder, whose digest is checked."""
    file = folder / INDEX
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(
            f"{folder} was not written by save_pruned: it has no {INDEX}. Load ordinary "
            "checkpoints with transformers' from_pretrained, and one that a Trainer saved while "
            "pruning with torchalignprune.load_state_dict(model, safetensors.torch.load_file(...))"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    metadata = index.get("metadata") if isinstance(index, dict) else None
    if not isinstance(metadata, dict) or metadata.get("format") != _FORMAT:
        raise ValueError(f"{file} is not an index that save_pruned wrote")
    version = metadata.get("version")
    if version != _VERSION:
        raise ValueError(
            f"{file} should have format version {_VERSION}, got {version}: it needs another "
            "version of torchalignprune"
        )
    if index.pop("sha256", None) != _index_digest(index):
        raise ValueError(f"{file} was altered: its SHA-256 digest differs")
    return dict(index)


def _index_digest(index: Mapping[str, Any]) -> str:
    text = json.dumps(index, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
