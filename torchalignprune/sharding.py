"""Exact pruning of parameters that are sharded over many processes as ``DTensor``.

Every process ranks the entries that it has. What they add up are histograms: how many entries have
scores in each of a few ranges, then in the parts of one of these, until the score of the last entry
that goes is known to the bit; where only some of the entries with that score go, likewise how many
of them lie in each part of the model, in the order of the parameters. The masks are those that one
process would make of the whole model, bit for bit, and are placed as the parameters are.

All processes that have a shard of one of the parameters call together, with the same parameters and
arguments. The group that adds up is the default group if the parameters are on all processes there
are, or else that of the mesh that has all of their processes; if there is none, that is an error.
Parameters that are no DTensors, and the copies that a
replicated dimension of a mesh makes, are counted once; that they are the same on all processes is
checked.

A pruning step with the global budget sends a few KB in messages of about 0.5 KB, whatever the size
of the model, for ``Magnitude`` and ``AlignedMagnitude``. What else is sent, and this is all:

- Units that are cut by the boundary of a shard. What an entry is worth depends on all entries of
  its unit, added up in one order. So the tensor is sent once, an equal share of whole units to each
  process, one tensor after the other, and what its entries are worth is sent back. The rows of a
  ``Linear`` sharded by ``Shard(0)``, which is what FSDP2 does, are whole. A parameter of one
  dimension is one unit, and goes to one process.
- ``units="both"``: a number for each row and each column; and the tensor, for the rows or the
  columns that are cut.
- ``alignment="frobenius"``: some 40 bytes for each tensor; the tensor where its rows are cut.
- Limits of a Pruner: see :mod:`torchalignprune.sharded_limits`.
- ``budget="layer"``: the messages once for each parameter. ``budget="unit"``: nothing where units
  are whole; scores, masks and what is left of them where they are cut.
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
_GROUP = 32  # bins are added up in groups first, so that two short messages do for one long one


def are_sharded(targets: Sequence[Target]) -> bool:
    """Whether one of the parameters is a DTensor."""
    return any(is_dtensor(target.weight) for target in targets)


def masks(
    method: PruningMethod,
    targets: Sequence[Target],
    scores: Sequence[Tensor | None] | None,
    signed: bool,
) -> list[Tensor]:
    """The masks of parameters of which some are DTensors, placed as they are.

    Raises:
        ValueError: what the method raises; placements or a method that are not supported; a
            parameter that is no DTensor and not the same on all processes. The same error on every
            process, whichever it was that came upon it.
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
    """Raises, on all processes, where they have collected input norms of their own."""
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
            f"the input_norms of {', '.join(wrong)} should be the same on all ranks: merge what "
            "each has collected (Calibration.merge), or load one file"
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
    """Which process counts where a mesh has not all of the processes: those of one mesh, that with
    the lowest rank."""
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
    """The masks of the shards, which prune the lowest scores of all.

    Args:
        targets: the shards.
        ranking: what their entries are worth.
        count_of: how many entries are to be pruned, of how many that are not pruned yet.
    """
    return _Selection(targets, ranking).run(count_of)


class _Selection:
    """The search for the last entry that goes, by all processes together."""

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
        """The key below which all entries go, and how many of those go that have it."""
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
                # The whole bin goes. No score has the highest key.
                return min(key + (1 << shift), (1 << self.bits) - 2), 0
            if shift == 0:
                return key, count - below
            shift = max(0, shift - 11)
            bins = self._attempt(partial(self._counts, key, shift))
            sums = self.ranks.sum(_grouped(bins))

    def _cut(self, key: int, rank: int) -> int:
        """The position up to which ``rank`` entries have the key, counted over the parameters."""
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
        """The bin with the rank-th entry, how many lie before it and how many in it."""
        group, below, _ = _find(sums, rank, below)
        part = self.ranks.sum(bins[group * _GROUP : (group + 1) * _GROUP])
        at, below, inside = _find(part, rank, below)
        return group * _GROUP + at, below, inside

    def _attempt(self, count: Callable[[], Tensor]) -> Tensor:
        return self.ranks.attempt(len(self.shards), count, self._no_counts)

    def _no_counts(self) -> Tensor:
        return torch.zeros(_BINS, dtype=torch.int64, device=self.device)

    def _call(self, operator: Callable[..., Any], chosen: Sequence[bool], *args: Any) -> Any:
        """An operator on some of the shards; the others are empty, so that numbers and the dtype of
        the scores stay those of all."""
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
        """The counts over all keys, and a number that is 0 in sum if all copies are the same.

        Each copy adds its counts, those of one copy less the number of the others.
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
    """A factor for each of some copies: what is the same on all of them sums up to 0."""
    if 0 in shard.local_shape:
        return 0
    return shard.copies - 1 if shard.first else -1


def salted(counts: Tensor) -> Tensor:
    """A number that says whether histograms are the same."""
    # Different for each bin, and small enough for the sums to stay in an int64.
    salt = (torch.arange(1, len(counts) + 1, device=counts.device) * 40503) % 65521
    return (counts * salt).sum()


def not_numbers(name: str) -> ValueError:
    return ValueError(f"the scores of {name} should be numbers, got NaN")


def copies_differ(names: Sequence[str]) -> ValueError:
    return ValueError(
        f"{', '.join(names)} should be the same on all ranks that have a copy, but is not. A "
        "parameter of which each rank has a part should be a DTensor"
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
    """The exactly rounded sums (``math.fsum``) of what each whole parameter's rows sum up to.

    Args:
        targets: the shards.
        row_sums: float64, one for each row of a target that is not sharded.
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
    low, high = (-int(ranks.most([-low])), int(ranks.most([high])))
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


# A sum of doubles that are not negative is an integer times 2^-_SCALE, written in digits of so many
# bits that those of thousands of processes can be added up.
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
    """The sums of squares of the rows and columns of whole parameters: those of each shard.

    Args:
        targets: the shards.
        sums_of: those of a target that is not sharded, and has so many columns or is a part of
            what has.
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
