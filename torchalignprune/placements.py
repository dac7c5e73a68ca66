"""Which entries of a ``DTensor`` a process holds.

The placements, one for each dimension of the mesh, divide the tensor. Whatever they are, one
process holds a few runs of consecutive indices along each dimension of the tensor.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "Runs",
    "count_below",
    "indices",
    "length_of",
    "local_runs",
    "part_of",
    "scatter",
    "take",
]

Runs = tuple[tuple[int, int], ...]
"""Ascending indices, as (first, length) of each run of consecutive ones."""


def length_of(runs: Runs) -> int:
    return sum(length for _, length in runs)


def indices(runs: Runs) -> Tensor:
    """The indices as a tensor: int64, shape ``(length_of(runs),)``."""
    return torch.cat([torch.arange(0), *(torch.arange(i, i + n) for i, n in runs)])


def take(runs: Runs, begin: int, end: int) -> Runs:
    """The slice ``[begin:end]`` of the indices."""
    taken: list[tuple[int, int]] = []
    at = 0
    for first, length in runs:
        low, high = max(begin - at, 0), min(end - at, length)
        if low < high:
            if taken and sum(taken[-1]) == first + low:
                taken[-1] = (taken[-1][0], taken[-1][1] + high - low)
            else:
                taken.append((first + low, high - low))
        at += length
    return tuple(taken)


def _chunk(runs: Runs, n: int, i: int) -> Runs:
    """The i-th of n chunks, as ``torch.chunk`` makes them."""
    size = -(-length_of(runs) // n)
    return take(runs, i * size, (i + 1) * size)


def count_below(runs: Runs, bound: int) -> int:
    return sum(min(max(bound - first, 0), length) for first, length in runs)


def _joined(parts: Iterable[Runs]) -> Runs:
    runs = tuple(itertools.chain.from_iterable(parts))
    return take(runs, 0, length_of(runs))


def local_runs(
    shape: Sequence[int],
    mesh_shape: Sequence[int],
    coordinate: Sequence[int],
    placements: Sequence[Any],
) -> tuple[Runs, ...]:
    """The indices along each dimension of a tensor that a process of the mesh holds.

    Args:
        shape: the shape of the whole tensor.
        mesh_shape: the number of processes along each dimension of the mesh.
        coordinate: the coordinate of the process in the mesh.
        placements: ``Shard``, ``_StridedShard`` or ``Replicate`` for each dimension of the mesh.

    Example:
        >>> from torch.distributed.tensor import Replicate, Shard
        >>> local_runs((7, 4), (3, 2), (1, 0), (Shard(0), Replicate()))
        (((3, 3),), ((0, 4),))
    """
    runs: list[Runs] = [((0, size),) if size else () for size in shape]
    for n, i, placement in zip(mesh_shape, coordinate, placements, strict=True):
        if placement.is_replicate():
            continue
        # A strided shard was applied after the shard to its right, so it cuts each of its pieces.
        pieces = int(getattr(placement, "split_factor", 1))
        own = runs[placement.dim]
        runs[placement.dim] = _joined(
            _chunk(_chunk(own, pieces, piece), n, i) for piece in range(pieces)
        )
    return tuple(runs)


def part_of(tensor: Tensor, runs: Sequence[Runs]) -> Tensor:
    """The entries of a whole tensor at the given indices of each dimension; a view if possible."""
    for dim, own in enumerate(runs):
        if len(own) == 1:
            tensor = tensor.narrow(dim, *own[0])
        else:
            pieces = [tensor.narrow(dim, *run) for run in own]
            tensor = torch.cat(pieces, dim) if pieces else tensor.narrow(dim, 0, 0)
    return tensor


def scatter(whole: Tensor, runs: Sequence[Runs], part: Tensor) -> None:
    """Writes ``part`` to the entries that :func:`part_of` reads."""
    ends = [itertools.accumulate(length for _, length in own) for own in runs]
    boxes = [list(zip(own, end, strict=True)) for own, end in zip(runs, ends, strict=True)]
    for box in itertools.product(*boxes):
        to, source = whole, part
        for dim, ((first, length), end) in enumerate(box):
            to = to.narrow(dim, first, length)
            source = source.narrow(dim, end - length, length)
        to.copy_(source)
