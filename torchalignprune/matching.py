"""One-to-one matching of the units of two networks by similarity."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from torchalignprune import ops
from torchalignprune.parameters import DTYPES

__all__ = ["Matching", "match_units"]

Metric = Literal["cosine", "dot", "euclidean"]
Method = Literal["greedy", "hungarian"]

# Similarities are computed in tiles of this many rows and columns. Recomputing a tile gives the
# same bits, which a product of another shape would not guarantee.
TILE = 2048

# How many pairs a round over the tiles keeps for each unit. It leaves about one unit in this many
# free.
_PAIRS_EACH = 32


@dataclass(frozen=True, eq=False)
class Matching:
    """The units of ``a`` and the units of ``b`` that they are matched with.

    Attributes:
        index: int64, shape ``(U,)``: the row of ``b`` for each row of ``a``, -1 if unmatched.
        similarity: float32 or float64, shape ``(U,)``: the similarity of each row of ``a`` to its
            match, NaN if unmatched.
        total: the sum of the similarities of the matched rows.
        unmatched: int64: the unmatched rows of ``b``, ascending.
    """

    index: Tensor
    similarity: Tensor
    total: float
    unmatched: Tensor


@torch.no_grad()
def match_units(
    a: Tensor,
    b: Tensor,
    *,
    metric: Metric = "cosine",
    method: Method = "greedy",
    block: int | None = None,
) -> Matching:
    r"""Match units one to one by similarity.

    ``"greedy"`` repeatedly takes the most similar pair of units that are still free. Among equal
    pairs the lowest row of ``a`` goes first, then the lowest row of ``b``
    (:func:`torchalignprune.ops.greedy_match`). ``"hungarian"`` maximizes the total similarity with
    ``scipy.optimize.linear_sum_assignment``. Every unit of the shorter side is matched.

    Similarities are computed in float32, or in float64 if a tensor is float64, by matrix products
    in tiles of 2048 x 2048. With ``block=`` only a few tiles are in memory at a time, and all are
    computed several times: two or three times for random units, more often if all units are similar
    to the same few. The matching is the same as without ``block``, near ties included: on the same
    device with the same number of threads, recomputing a tile gives the same bits.

    Args:
        a: shape ``(U, *d)``, one unit per row; float32, float64, float16 or bfloat16.
        b: shape ``(V, *d)``, likewise, on the same device.
        metric: ``"cosine"``, which is 0 for a zero unit; ``"dot"``, the inner product; or
            ``"euclidean"``, the negative distance. It is computed as
            :math:`|x|^2 + |y|^2 - 2xy` after subtracting a common mean, so distances much smaller
            than the units' norms are inexact.
        method: ``"greedy"`` or ``"hungarian"``.
        block: for ``"greedy"``: how many units of each side to compare at a time, rounded up to a
            multiple of 2048. This takes ``O(U + V)`` memory, about 2 kB per unit, and a few times
            ``block * block`` similarities. Default: all at once, as a ``U x V`` matrix.

    Returns:
        The matching, on the device of the units.

    Raises:
        ValueError: shapes or devices differ; values are NaN, infinite or too large; the metric or
            method is unknown; or ``block`` is less than 1 or given with ``"hungarian"``.
        TypeError: ``a`` or ``b`` is not a tensor of a supported dtype, or ``block`` is not an int.
        ImportError: ``"hungarian"`` without scipy (``pip install "torchalignprune[matching]"``).

    Example:
        >>> import torch
        >>> a = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
        >>> matching = match_units(a, a.flip(0))
        >>> matching.index
        tensor([2, 1, 0])
        >>> matching.total
        3.0
    """
    _check(a, b, metric, method, block)
    units = _Similarity(_flat(a), _flat(b), metric)
    with torch.autocast(a.device.type, enabled=False):
        if method == "hungarian":
            index, similarity = _hungarian(units.whole())
        elif block is None or units.rows.numel() == 0 or units.columns.numel() == 0:
            whole = units.whole()
            index = ops.greedy_match(whole)
            similarity = _at(whole, index)
        else:
            index, similarity = _greedy_in_blocks(units, -(-block // TILE) * TILE)
    is_free = torch.ones(len(b), dtype=torch.bool, device=b.device)
    is_free[index[index >= 0]] = False
    total = float(similarity[index >= 0].sum(dtype=torch.float64))
    return Matching(index, similarity, total, is_free.nonzero().flatten())


def _check(a: Tensor, b: Tensor, metric: str, method: str, block: int | None) -> None:
    for units, name in ((a, "a"), (b, "b")):
        if not isinstance(units, Tensor):
            raise TypeError(f"{name} should be a tensor, got {type(units).__name__}")
        if units.dtype not in DTYPES:
            raise TypeError(
                f"{name} should be float32, float64, float16 or bfloat16, got {units.dtype}"
            )
        if units.dim() == 0:
            raise ValueError(f"{name} should have one unit per row, got a 0-dimensional tensor")
    if a.shape[1:] != b.shape[1:]:
        raise ValueError(
            "a and b should have units of the same shape, got "
            f"{tuple(a.shape[1:])} and {tuple(b.shape[1:])}"
        )
    if a.device != b.device:
        raise ValueError(f"a and b should be on the same device, got {a.device} and {b.device}")
    if metric not in get_args(Metric):
        raise ValueError(f"metric should be one of {get_args(Metric)}, got {metric!r}")
    if method not in get_args(Method):
        raise ValueError(f"method should be one of {get_args(Method)}, got {method!r}")
    if block is not None:
        if isinstance(block, bool) or not isinstance(block, int):
            raise TypeError(f"block should be an int, got {block!r}")
        if block < 1:
            raise ValueError(f"block should be at least 1, got {block}")
        if method != "greedy":
            raise ValueError(f"method should be 'greedy' with block, got {method!r}")
    largest = []
    for units, name in ((a, "a"), (b, "b")):
        ends = torch.aminmax(units.detach()) if units.numel() else ()
        size = max((abs(float(end)) for end in ends), default=0.0)
        if not math.isfinite(size):
            raise ValueError(f"{name} should be finite, got NaN or infinity")
        largest.append(size)
    length = math.prod(a.shape[1:])
    bound = {
        "cosine": max(largest) * math.sqrt(length),
        "dot": largest[0] * largest[1] * length,
        "euclidean": 4 * sum(largest) ** 2 * length,
    }[metric]
    if bound > torch.finfo(_dtype(a, b)).max:
        raise ValueError(
            f"a and b should have similarities that do not overflow {_dtype(a, b)}, got entries of "
            f"up to {largest[0]:g} and {largest[1]:g}"
        )


def _dtype(a: Tensor, b: Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in (a.dtype, b.dtype) else torch.float32


def _flat(units: Tensor) -> Tensor:
    return units.unsqueeze(1) if units.dim() == 1 else units.flatten(1)


def _at(similarity: Tensor, index: Tensor) -> Tensor:
    """The similarities of matched rows, NaN for the others."""
    found = torch.full(index.shape, math.nan, dtype=similarity.dtype, device=similarity.device)
    rows = (index >= 0).nonzero().flatten()
    found[rows] = similarity[rows, index[rows]]
    return found


def _hungarian(similarity: Tensor) -> tuple[Tensor, Tensor]:
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise ImportError(
            'method="hungarian" needs scipy: pip install "torchalignprune[matching]"'
        ) from error
    rows, columns = linear_sum_assignment(similarity.cpu().numpy(), maximize=True)
    index = torch.full((similarity.size(0),), -1, dtype=torch.int64)
    index[torch.from_numpy(rows)] = torch.from_numpy(columns)
    index = index.to(similarity.device)
    return index, _at(similarity, index)


class _Side:
    """The units of one side, prepared for the matrix product one tile at a time."""

    def __init__(self, units: Tensor, metric: Metric, dtype: torch.dtype, mean: Tensor | None):
        self.units = units
        self.metric = metric
        self.dtype = dtype
        self.mean = mean

    def __len__(self) -> int:
        return len(self.units)

    def tiles(self, start: int, stop: int) -> list[tuple[Tensor, Tensor | None]]:
        """The units of each tile in a range, with their squared norms if distances are wanted."""
        return [self._tile(first) for first in range(start, min(stop, len(self)), TILE)]

    def _tile(self, first: int) -> tuple[Tensor, Tensor | None]:
        units = self.units[first : first + TILE].to(self.dtype)
        if self.metric == "cosine":
            # The squares of small weights would underflow in float32.
            norms = torch.linalg.vector_norm(units, dim=1, keepdim=True, dtype=torch.float64)
            return units / norms.where(norms > 0, 1).to(self.dtype), None
        if self.mean is None:
            return units.contiguous(), None
        units = units - self.mean
        return units, units.square().sum(dim=1)


class _Similarity:
    """The similarities of two sides, recomputed whenever they are asked for."""

    def __init__(self, a: Tensor, b: Tensor, metric: Metric) -> None:
        dtype = _dtype(a, b)
        mean = None
        if metric == "euclidean":
            sums = [units.sum(dim=0, dtype=dtype) for units in (a, b)]
            mean = (sums[0] + sums[1]) / max(1, len(a) + len(b))
        self.a = _Side(a, metric, dtype, mean)
        self.b = _Side(b, metric, dtype, mean)
        self.dtype = dtype
        self.device = a.device
        self.rows = torch.arange(len(a), device=a.device)
        self.columns = torch.arange(len(b), device=b.device)
        self._buffer = torch.empty(0, dtype=dtype, device=a.device)

    def whole(self) -> Tensor:
        return self._product(self.a.tiles(0, len(self.a)), self.b.tiles(0, len(self.b)))

    def blocks(
        self, rows: Tensor, columns: Tensor, block: int
    ) -> Iterator[tuple[slice, slice, Tensor]]:
        """The similarities of some rows and columns, both ascending, one block at a time.

        Each block comes with the slices of ``rows`` and ``columns`` that it covers.
        """
        column_parts = _parts(columns, len(self.b), block)
        for start, row_part in _parts(rows, len(self.a), block):
            lefts = self.a.tiles(start, start + block)
            for first, column_part in column_parts:
                found = self._product(lefts, self.b.tiles(first, first + block))
                some_rows, some_columns = rows[row_part] - start, columns[column_part] - first
                if len(some_rows) < found.size(0):
                    found = found[some_rows]
                if len(some_columns) < found.size(1):
                    found = found[:, some_columns]
                yield row_part, column_part, found

    def _product(
        self,
        lefts: list[tuple[Tensor, Tensor | None]],
        rights: list[tuple[Tensor, Tensor | None]],
    ) -> Tensor:
        heights, widths = ([len(units) for units, _ in side] for side in (lefts, rights))
        out = torch.empty(sum(heights), sum(widths), dtype=self.dtype, device=self.device)
        for (x, x_squares), rows in zip(lefts, out.split(heights), strict=True):
            for (y, y_squares), place in zip(rights, rows.split(widths, dim=1), strict=True):
                tile = self._tile(len(x), len(y))
                torch.mm(x, y.t(), out=tile)
                if x_squares is not None and y_squares is not None:
                    tile.mul_(-2).add_(x_squares[:, None]).add_(y_squares)
                    tile.clamp_(min=0).sqrt_().neg_()
                place.copy_(tile)
        return out

    def _tile(self, rows: int, columns: int) -> Tensor:
        # Products go into a buffer: the layout of the output must not depend on the block size.
        if self._buffer.numel() < rows * columns:
            self._buffer = self._buffer.new_empty(rows * columns)
        return self._buffer[: rows * columns].view(rows, columns)


def _parts(units: Tensor, count: int, block: int) -> list[tuple[int, slice]]:
    """The start of each block that has any of the units, with the slice of the units in it."""
    starts = torch.arange(0, count + block, block, device=units.device)
    ends = torch.searchsorted(units, starts).tolist()
    return [
        (i * block, slice(ends[i], ends[i + 1]))
        for i in range(len(ends) - 1)
        if ends[i] < ends[i + 1]
    ]


class _Free:
    """The rows and columns that are still free, and the matches so far."""

    def __init__(self, similarity: _Similarity) -> None:
        self.rows, self.columns = similarity.rows, similarity.columns
        self.index = torch.full_like(self.rows, -1)
        self.similarity = torch.full(
            self.rows.shape, math.nan, dtype=similarity.dtype, device=similarity.device
        )

    def match(self, rows: Tensor, columns: Tensor, similarity: Tensor) -> None:
        self.index[rows] = columns
        self.similarity[rows] = similarity

    def drop_matched(self) -> None:
        self.rows = self.rows[self.index[self.rows] < 0]
        is_free = torch.ones_like(self.columns, dtype=torch.bool)
        matched = self.index[self.index >= 0]
        place = torch.searchsorted(self.columns, matched).clamp(max=len(self.columns) - 1)
        is_free[place[self.columns[place] == matched]] = False
        self.columns = self.columns[is_free]

    def __bool__(self) -> bool:
        return len(self.rows) > 0 and len(self.columns) > 0


def _greedy_in_blocks(similarity: _Similarity, block: int) -> tuple[Tensor, Tensor]:
    """The greedy matching, one band of similarities per round, from the most similar pairs down.

    A round goes over all blocks and keeps all pairs of free units above some bound. So matching
    these in order gives what the whole matrix would give. Once the free units fit into one matrix,
    they are matched at once.
    """
    free = _Free(similarity)
    while free:
        if len(free.rows) * len(free.columns) <= 4 * block * block:
            _match_rest(similarity, free, block)
            break
        room = _PAIRS_EACH * min(len(free.rows), len(free.columns))
        bound, found = _match_band(similarity, free, block, room)
        # Pairs exactly at the bound are so many that the band above it was nearly empty.
        if bound > -math.inf and found < room // 2:
            _match_equals(similarity, free, block, bound)
    return free.index, free.similarity


def _match_rest(similarity: _Similarity, free: _Free, block: int) -> None:
    shape = (len(free.rows), len(free.columns))
    rest = torch.empty(shape, dtype=similarity.dtype, device=similarity.device)
    for rows, columns, values in similarity.blocks(free.rows, free.columns, block):
        rest[rows, columns] = values
    index = ops.greedy_match(rest)
    is_matched = index >= 0
    free.match(free.rows[is_matched], free.columns[index[is_matched]], _at(rest, index)[is_matched])


def _match_band(similarity: _Similarity, free: _Free, block: int, room: int) -> tuple[float, int]:
    """Match along the pairs above a bound; returns the bound and the number of pairs."""
    pairs = _Pairs(room, similarity)
    for rows, columns, values in similarity.blocks(free.rows, free.columns, block):
        pairs.add(values, rows.start, columns.start)
    values, rows_of, columns_of = pairs.in_order(len(free.columns))
    is_match = ops.match_in_order(rows_of, columns_of, len(free.rows), len(free.columns))
    free.match(free.rows[rows_of[is_match]], free.columns[columns_of[is_match]], values[is_match])
    free.drop_matched()
    return pairs.bound, len(values)


class _Pairs:
    """All pairs above a bound, which rises whenever there are more than there is room for."""

    def __init__(self, room: int, similarity: _Similarity) -> None:
        self.room = room
        self.bound = -math.inf
        # Their similarities, and the positions of their rows and columns among the free ones.
        none = torch.empty(0, dtype=torch.int32, device=similarity.device)
        self._kept = [none.to(similarity.dtype), none, none]
        self._waiting: list[list[Tensor]] = []

    def add(self, values: Tensor, first_row: int, first_column: int) -> None:
        above = values[values > self.bound]
        if len(above) > self.room:
            self.bound = _upper_bound(above, self.room)
        del above
        rows, columns = (values > self.bound).nonzero(as_tuple=True)
        places = [(rows + first_row).int(), (columns + first_column).int()]
        self._waiting.append([values[rows, columns], *places])
        if sum(len(parts[0]) for parts in self._waiting) > self.room:
            self._merge()

    def _merge(self) -> None:
        together = zip(self._kept, *self._waiting, strict=True)
        self._kept = [torch.cat(parts) for parts in together]
        self._waiting = []
        if len(self._kept[0]) > self.room:
            self.bound = max(self.bound, _upper_bound(self._kept[0], self.room))
        is_above = self._kept[0] > self.bound
        self._kept = [part[is_above] for part in self._kept]

    def in_order(self, width: int) -> tuple[Tensor, Tensor, Tensor]:
        """The pairs by descending similarity, then by row, then by column out of ``width``."""
        self._merge()
        values, rows, columns = self._kept
        order = (rows.long() * width + columns).argsort()
        # Adding 0 turns -0 into 0, which a sort may tell apart.
        values = values[order] + 0.0
        values, by_value = torch.sort(values, descending=True, stable=True)
        order = order[by_value]
        return values, rows[order].long(), columns[order].long()


def _upper_bound(values: Tensor, room: int) -> float:
    """A value that at most ``room`` of the values exceed."""
    return float(torch.topk(values, room + 1, sorted=False).values.min())


def _match_equals(similarity: _Similarity, free: _Free, block: int, value: float) -> None:
    """Match along the pairs of exactly one similarity, after all pairs above it.

    They go by row, then by column. Blocks can be done in turn: a row takes its column in the first
    block that has one for it, and does not compete with later rows in the blocks before.
    """
    is_row, is_column = torch.ones_like(free.rows) > 0, torch.ones_like(free.columns) > 0
    for rows, columns, values in similarity.blocks(free.rows, free.columns, block):
        is_open = is_row[rows, None] & is_column[columns] & (values == value)
        index = ops.greedy_match(torch.where(is_open, 0.0, -math.inf))
        places = (index >= 0).nonzero().flatten()
        chosen = index[places]
        is_row[rows][places] = False
        is_column[columns][chosen] = False
        free.match(free.rows[rows][places], free.columns[columns][chosen], values[places, chosen])
    free.drop_matched()
