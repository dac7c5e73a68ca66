"""Exact pruning of parameters that are sharded over many processes as ``DTensor``.

Every process scores the entries that it holds. The processes add up histograms of these scores,
first over the whole range and then within one bin after another, until the score of the last entry
to prune is known to the bit. If only some of the entries with that score are pruned, histograms of
their positions, in the order of the parameters, find the last of them in the same way. The masks
are bit for bit those that one process would make for the whole model, and are placed like the
parameters.

All processes that hold a shard of one of the parameters should call together, with the same
parameters and arguments. They add up in the default group if they are all of its processes,
otherwise in the group of a mesh that has all of them; if there is none, that is an error.
Parameters that are not DTensors, and the copies along a replicated dimension of a mesh, count once,
and are checked to be the same on all processes.

For ``Magnitude`` and ``AlignedMagnitude``, a pruning step with the global budget sends a few KB in
messages of about 0.5 KB, whatever the size of the model. Besides that, only these are sent:

- Units that are divided between processes. The score of an entry depends on all entries of its
  unit, added up in a fixed order. So the tensor is sent once, an equal share of whole units to each
  process, and the scores are sent back, one tensor after the other. ``Shard(0)`` of a ``Linear``,
  as FSDP2 uses it, does not divide rows. A parameter of one dimension is one unit and is sent to
  one process.
- ``units="both"``: a number for each row and each column, and the tensor if rows or columns are
  divided.
- ``alignment="frobenius"``: some 40 bytes for each tensor, and the tensor if its rows are divided.
- Limits of a Pruner: see :mod:`torchalignprune.sharded_limits`.
- ``budget="layer"``: the messages once for each parameter. ``budget="unit"``: nothing if units are
  whole; scores, masks and the resulting masks if they are divided.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from torchalignprune import ops
from torchalignprune.dtensors import is_dtensor
from torchalignprune.placements import scatter
from torchalignprune.shards import Ranks, Shard, shard_of
from torchalignprune.targets import Target, with_input_norms

if TYPE_CHECKING:
    from torchalignprune.pruning import PruningMethod
    from torchalignprune.ranking import Ranking

__all__ = ["are_sharded", "masks", "select", "square_sums", "totals"]

_BINS = 2048
_GROUP = 32  # bins are first summed in groups, so that two short messages replace a long one


def are_sharded(targets: Sequence[Target]) -> bool:
    """Whether one of the parameters is a DTensor."""
    return any(is_dtensor(target.weight) for target in targets)


def masks(
    method: PruningMethod,
    targets: Sequence[Target],
    scores: Sequence[Tensor | None] | None,
    signed: bool,
) -> list[Tensor]:
    """The masks of parameters of which some are DTensors, placed like the parameters.

    Raises:
        ValueError: an error of the method; placements or a method that are not supported; or a
            parameter that is not a DTensor differs between processes. Every process raises the same
            error, wherever it occurred.
    """
    ranks = Ranks([target.weight for target in targets])
    _check_norms(ranks, targets, method)
    prepared: list[tuple[Target, Tensor | None]] = ranks.attempt(
        0, lambda: _localized(method, targets, scores, ranks), list
    )
    ranks.sum()
    _settle(ranks, [target for target, _ in prepared])
    local = [target for target, _ in prepared]
    given = method.completed(local, [score for _, score in prepared])
    found = method.new_masks(local, given, signed)
    wanted: list[Tensor] = ranks.attempt(
        len(local),
        lambda: [shard_of(t).spread(mask) for t, mask in zip(local, found, strict=True)],
        list,
    )
    ranks.sum()
    return wanted


def _check_norms(ranks: Ranks, targets: Sequence[Target], method: PruningMethod) -> None:
    """Raises an error on all processes if their input norms differ."""
    norms = getattr(method, "input_norms", None)
    if norms is None:
        return

    def digests() -> list[int]:
        found = []
        for target in with_input_norms(targets, norms):
            own = b"" if target.input_norms is None else target.input_norms.cpu().numpy().tobytes()
            found.append(int.from_bytes(hashlib.blake2b(own, digest_size=6).digest(), "big"))
        return found

    own = ranks.attempt(0, digests, lambda: [0] * len(targets))
    ranks.sum()
    high, low = ranks.most([*own, *(-n for n in own)]).view(2, -1).tolist()
    wrong = [t.name for t, most, least in zip(targets, high, low, strict=True) if most != -least]
    if wrong:
        raise ValueError(
            f"the input_norms of {', '.join(wrong)} should be the same on all ranks: merge the "
            "calibrations of all ranks (Calibration.merge), or load the same file"
        )


def _localized(
    method: PruningMethod,
    targets: Sequence[Target],
    scores: Sequence[Tensor | None] | None,
    ranks: Ranks,
) -> list[tuple[Target, Tensor | None]]:
    method.check_sharded()
    local = []
    for number, target in enumerate(method.prepare(targets)):
        shard = Shard(ranks, number, target)
        own: dict[str, Any] = {"weight": shard.local_weight(), "shard": shard}
        if own["weight"] is None:
            own["weight"] = target.weight
        for what in ("mask", "reference"):
            whole = getattr(target, what)
            own[what] = None if whole is None else shard.local(whole, what)
        if target.input_norms is not None:
            own["input_norms"] = shard.along(target.input_norms, target.in_dim)
        score = None if scores is None else scores[number]
        if score is not None:
            score = shard.local(score, "importance_scores")
        local.append((replace(target, **own), score))
    return local


def _settle(ranks: Ranks, targets: Sequence[Target]) -> None:
    """Decides which copy counts if several meshes hold copies of a parameter.

    It is that of the mesh with the lowest rank.
    """
    partly = [t for t in targets if 1 < len(shard_of(t).mesh_ranks) < len(ranks.members)]
    if not partly:
        return
    leaders = [min(shard_of(t).mesh_ranks) for t in partly]
    inside = [ranks.rank in shard_of(t).mesh_ranks for t in partly]
    chosen = ranks.most(
        [-rank if own else -(1 << 40) for rank, own in zip(leaders, inside, strict=True)]
    ).tolist()
    meshes = ranks.sum([int(rank == ranks.rank) for rank in leaders])
    for target, leader, best, copies in zip(partly, leaders, chosen, meshes, strict=True):
        shard = shard_of(target)
        shard.first = shard.first and leader == -best
        shard.copies *= copies


def select(
    targets: Sequence[Target], ranking: Ranking, count_of: Callable[[int], int]
) -> list[Tensor]:
    """The masks of the shards that prune the lowest scores over all processes.

    Args:
        targets: the shards.
        ranking: the scores of their entries.
        count_of: takes the number of entries that are not pruned yet and returns how many of them
            to prune.
    """
    return _Selection(targets, ranking).run(count_of)


class _Selection:
    """The search of all processes for the last entry to prune."""

    def __init__(self, targets: Sequence[Target], ranking: Ranking) -> None:
        self.ranking = ranking
        self.names = [target.name for target in targets]
        self.masks = [target.mask for target in targets]
        self.shards = [shard_of(target) for target in targets]
        self.ranks = self.shards[0].ranks
        self.device = ranking.weights[0].device
        wide = any(weight.dtype == torch.float64 for weight in ranking.weights)
        self.bits = 64 if wide else 32

    def run(self, count_of: Callable[[int], int]) -> list[Tensor]:
        key, pruned = self._threshold(count_of)
        cut = 0 if pruned == 0 else self._cut(key, pruned)
        bound = torch.tensor([cut])
        splits, first = [], 0
        for shard in self.shards:
            splits.append(int(shard.entries_before(bound - first)))
            first += shard.numel
        return self.ranks.attempt(
            len(self.shards),
            lambda: self._call(ops.shard_masks, [True] * len(self.shards), key, splits),
            lambda: [torch.empty_like(w, dtype=torch.bool) for w in self.ranking.weights],
        )

    def _threshold(self, count_of: Callable[[int], int]) -> tuple[int, int]:
        """The key below which all entries are pruned, and how many with that key are."""
        shift = self.bits - 11
        bins, apart = self._first_counts(shift)
        *sums, differ = self.ranks.sum(torch.cat([_grouped(bins), apart]))
        if differ:
            self._copies_differ(shift)
        count = count_of(sum(sums))
        if count == 0:
            return 0, 0
        key = below = 0
        while True:
            at, below, inside = self._pick(bins, sums, count, below)
            key += at << shift
            if below + inside == count:
                # The whole bin is pruned. No score has the highest key.
                return min(key + (1 << shift), (1 << self.bits) - 2), 0
            if shift == 0:
                return key, count - below
            shift = max(0, shift - 11)
            bins = self._attempt(partial(self._counts, key, shift))
            sums = self.ranks.sum(_grouped(bins))

    def _cut(self, key: int, rank: int) -> int:
        """The position, over all parameters, before which ``rank`` entries have the key."""
        total = sum(shard.numel for shard in self.shards)
        shift = max(0, (total - 1).bit_length() - 11)
        low = below = 0
        while True:
            bins = self._attempt(partial(self._ties, key, low, shift))
            sums = self.ranks.sum(_grouped(bins))
            at, below, inside = self._pick(bins, sums, rank, below)
            low += at << shift
            if below + inside == rank:
                return low + (1 << shift)
            shift = max(0, shift - 11)

    def _pick(
        self, bins: Tensor, sums: Sequence[int], rank: int, below: int
    ) -> tuple[int, int, int]:
        """The bin of the rank-th entry, and the numbers of entries before it and in it."""
        group, below, _ = _find(sums, rank, below)
        part = self.ranks.sum(bins[group * _GROUP : (group + 1) * _GROUP])
        at, below, inside = _find(part, rank, below)
        return group * _GROUP + at, below, inside

    def _attempt(self, count: Callable[[], Tensor]) -> Tensor:
        return self.ranks.attempt(len(self.shards), count, self._no_counts)

    def _no_counts(self) -> Tensor:
        return torch.zeros(_BINS, dtype=torch.int64, device=self.device)

    def _call(self, operator: Callable[..., Any], chosen: Sequence[bool], *args: Any) -> Any:
        """Calls an operator on the chosen shards.

        The others are passed as empty tensors, so that positions and the dtype of the scores are
        the same as for all shards.
        """
        none: list[Tensor | None] = [None] * len(self.shards)

        def listed(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
            return [t if own else None for t, own in zip(tensors or none, chosen, strict=True)]

        weights = zip(self.ranking.weights, chosen, strict=True)
        return operator(
            [weight if own else weight.new_empty(0) for weight, own in weights],
            *args,
            score=self.ranking.score,
            masks=listed(self.masks),
            references=listed(self.ranking.references),
            row_scales=listed(self.ranking.row_scales),
            column_scales=listed(self.ranking.column_scales),
            names=self.names,
        )

    def _counts(self, low: int, shift: int) -> Tensor:
        counted = [shard.first for shard in self.shards]
        counts: Tensor = self._call(ops.shard_counts, counted, low, shift, _BINS)
        return counts[:_BINS]

    def _first_counts(self, shift: int) -> tuple[Tensor, Tensor]:
        """The counts over all keys, and a number whose sum is 0 if all copies are the same.

        The first of n copies adds n - 1 times a hash of its counts, each other one subtracts its
        own.
        """
        bins, apart = self._no_counts(), self._no_counts()[:1]
        weights = [copy_weight(shard) for shard in self.shards]
        for weight in sorted(set(weights)):
            chosen = [own == weight for own in weights]
            own = self._attempt(partial(self._checked_counts, chosen, shift))
            bins += own if weight >= 0 else 0
            apart += weight * salted(own)
        return bins, apart

    def _checked_counts(self, chosen: Sequence[bool], shift: int) -> Tensor:
        counts: Tensor = self._call(ops.shard_counts, chosen, 0, shift, _BINS)
        nan = int(counts[-1]) - 1
        if nan >= 0:
            self.ranks.fail(nan, not_numbers(self.names[nan]))
        return counts[:_BINS]

    def _copies_differ(self, shift: int) -> None:
        sums = []
        for i, shard in enumerate(self.shards):
            chosen = [i == j for j in range(len(self.shards))]
            counts = self._attempt(partial(self._checked_counts, chosen, shift))
            sums.append(int(salted(counts)) * copy_weight(shard))
        totals = zip(self.names, self.ranks.sum(sums), strict=True)
        raise copies_differ([name for name, total in totals if total])

    def _ties(self, key: int, low: int, shift: int) -> Tensor:
        bounds = low + (torch.arange(_BINS + 1) << shift)
        chosen, edges, places = [], [], []
        first = 0
        for shard in self.shards:
            begin = max(0, (first - low) >> shift)
            end = min(_BINS, -((low - first - shard.numel) >> shift))
            chosen.append(shard.first and begin < end)
            if chosen[-1]:
                own = (bounds[begin : end + 1] - first).clamp(0, shard.numel)
                edges.append(shard.entries_before(own))
                places.append(torch.arange(begin, end))
            else:
                edges.append(torch.zeros(1, dtype=torch.int64))
            first += shard.numel
        bins = self._no_counts()
        if not any(chosen):
            return bins
        counts = self._call(ops.shard_ties, chosen, key, edges)
        return bins.index_add_(0, torch.cat(places).to(self.device), counts)


def copy_weight(shard: Shard) -> int:
    """A factor for each copy of a shard; over all copies the factors sum up to 0."""
    if 0 in shard.local_shape:
        return 0
    return shard.copies - 1 if shard.first else -1


def salted(counts: Tensor) -> Tensor:
    """A hash of a histogram."""
    # The factors differ between bins and are small enough for sums to fit into an int64.
    salt = (torch.arange(1, len(counts) + 1, device=counts.device) * 40503) % 65521
    return (counts * salt).sum()


def not_numbers(name: str) -> ValueError:
    return ValueError(f"the scores of {name} should be numbers, got NaN")


def copies_differ(names: Sequence[str]) -> ValueError:
    return ValueError(
        f"{', '.join(names)} should be the same on all ranks, got different copies: a parameter of "
        "which each rank has a part should be a DTensor"
    )


def _grouped(bins: Tensor) -> Tensor:
    return bins.view(-1, _GROUP).sum(dim=1)


def _find(counts: Sequence[int], rank: int, below: int) -> tuple[int, int, int]:
    for at, inside in enumerate(counts):
        if below + inside >= rank:
            return at, below, inside
        below += inside
    raise RuntimeError("the weights changed while they were pruned")


# Sums over whole parameters


def totals(targets: Sequence[Target], row_sums: Callable[[Target], Tensor]) -> list[float]:
    """The correctly rounded sum (as by ``math.fsum``) of the row sums of each whole parameter.

    Args:
        targets: the shards.
        row_sums: takes an unsharded target and returns the float64 sum of each row.
    """
    ranks = shard_of(targets[0]).ranks
    sums, odd = [], []
    for target in targets:
        shard = shard_of(target)
        units, _ = shard.whole_units(target, 0)
        rows = ranks.attempt(
            shard.number, partial(row_sums, units), lambda: torch.zeros(0, dtype=torch.float64)
        )
        values = rows.cpu().numpy() if shard.first else np.zeros(0)
        finite = np.isfinite(values)
        sums.append(_exact_sum(values[finite]))
        odd += [int(np.isnan(values).sum()), int(np.isinf(values).sum())]
    digits = [_digits(total) for total in sums]
    low = min((k for own in digits for k in own), default=_MOST_DIGITS)
    high = max((k for own in digits for k in own), default=-1)
    low, high = -int(ranks.most([-low])), int(ranks.most([high]))
    used = range(low, high + 1)
    added = ranks.sum([*odd, *(own.get(k, 0) for own in digits for k in used)])
    found = []
    for i in range(len(targets)):
        own = added[2 * len(targets) + i * len(used) :][: len(used)]
        total = sum(digit << (_DIGIT * k) for digit, k in zip(own, used, strict=True))
        nan, infinite = added[2 * i : 2 * i + 2]
        exact = total / (1 << _SCALE)  # Python rounds the quotient of two integers correctly
        found.append(math.nan if nan else math.inf if infinite else exact)
    return found


# A sum of doubles that are not negative is an integer times 2^-_SCALE. It is sent in digits of
# _DIGIT bits, which leaves room in an int64 to add up the digits of thousands of processes.
_SCALE = 1200
_DIGIT = 48
_MOST_DIGITS = 64


def _exact_sum(values: Any) -> int:
    mantissas, exponents = np.frexp(values)
    wholes = (mantissas * 2.0**53).astype(np.int64)
    total = 0
    for exponent in np.unique(exponents):
        own = wholes[exponents == exponent]
        exact = (int((own >> 26).sum()) << 26) + int((own & (2**26 - 1)).sum())
        total += exact << (int(exponent) - 53 + _SCALE)
    return total


def _digits(total: int) -> dict[int, int]:
    digits = {}
    for k in range(_MOST_DIGITS):
        digit = (total >> (_DIGIT * k)) & ((1 << _DIGIT) - 1)
        if digit:
            digits[k] = digit
    return digits


def square_sums(
    targets: Sequence[Target], sums_of: Callable[[Target, int | None], tuple[Tensor, Tensor]]
) -> list[tuple[Tensor, Tensor]]:
    """The sums of squares of whole rows and columns, for the rows and columns of each shard.

    Args:
        targets: the shards.
        sums_of: takes an unsharded target and, if it is a part, the number of columns of the whole
            parameter. Returns the sums of its rows and columns.
    """
    ranks = shard_of(targets[0]).ranks
    vectors = []
    for target in targets:
        shard = shard_of(target)
        for dim in range(min(2, max(1, len(shard.shape)))):
            units, runs = shard.whole_units(target, dim)
            columns = shard.shape[1] if dim == 1 else None
            length = shard.shape[dim] if len(shard.shape) > 1 else 1
            whole = torch.zeros(length, dtype=torch.float64, device=target.weight.device)
            made = ranks.attempt(
                shard.number, partial(_sums_along, sums_of, units, dim, columns), whole.clone
            )
            if shard.first:
                scatter(whole, (runs,), made[: sum(n for _, n in runs)])
            vectors.append(whole)
    added = iter(ranks.sum_floats(torch.cat(vectors)).split([v.numel() for v in vectors]))
    found = []
    for target in targets:
        shard = shard_of(target)
        if len(shard.shape) < 2:
            rows = next(added)
            found.append((rows, rows[:0]))
            continue
        rows, sums = next(added), next(added)
        found.append((shard.along(rows, 0), shard.along(sums, 1)))
    return found


def _sums_along(
    sums_of: Callable[[Target, int | None], tuple[Tensor, Tensor]],
    units: Target,
    dim: int,
    columns: int | None,
) -> Tensor:
    return sums_of(units, columns)[dim]
