"""Bounds on what sharded parameters and their units may lose.

Every parameter loses its lowest scores. So the processes only have to agree on the last score to
prune of each parameter, and on which entries with that score are pruned. All parameters share one
such score, except for those that reach one of their bounds. To find it, the processes add up how
many scores of each parameter lie below a value, and halve the range of the score each time, until
it is known to the bit. They do the same for each of the parameters that reach a bound. A message
has 8 bytes for each parameter that is not settled yet. If these are few, it has up to half a KB and
halves the range several times at once.

If ``min_unit`` is used and units are divided between processes, the processes find the best entries
of each unit one by one, from the best that each process has left, with 16 bytes for each entry.
Nothing else is sent of scores and weights, and nothing of masks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from torchalignprune import ops
from torchalignprune.limits import Limits, as_rows, best_of_rows, from_rows
from torchalignprune.placements import indices
from torchalignprune.sharding import copies_differ, copy_weight, not_numbers, salted
from torchalignprune.shards import Shard, shard_of
from torchalignprune.targets import Target, count_true

if TYPE_CHECKING:
    from torchalignprune.ranking import Ranking

__all__ = ["masks"]

_BITS = 11  # A pass over the scores counts them in 2**11 bins.
_SHORT = 64  # how many numbers a message has at most, unless it has one for each parameter
_INSIDE = -1
_NONE = torch.iinfo(torch.int64).min


def masks(
    limits: Limits,
    targets: Sequence[Target],
    ranking: Ranking,
    unit_dims: Sequence[int],
    count_of: Callable[[int], int],
) -> list[Tensor]:
    """:meth:`torchalignprune.limits.Limits.masks` for all processes together.

    Args:
        limits: the bounds.
        targets: the shards; entries that their masks prune already are no candidates.
        ranking: the scores of their entries.
        unit_dims: the dimension of the units of each target.
        count_of: takes the number of entries that are not pruned yet and returns how many of them
            to prune.

    Returns:
        bool masks, shaped like the shards.

    Raises:
        ValueError: the limits leave fewer entries to prune; scores are NaN; or copies of a
            parameter differ. The error is the same on all processes.
    """
    return _Bounded(limits, targets, ranking, unit_dims).run(count_of)


class _Last(NamedTuple):
    """The place, a key or a position, of the last entries of a parameter to prune."""

    place: int
    going: int  # how many of the entries at this place are pruned
    there: int  # how many entries are at this place


class _Bounded:
    """The search of all processes for the last entries to prune.

    It goes by the keys of the scores (:func:`torchalignprune.ops.shard_counts`).
    """

    def __init__(
        self,
        limits: Limits,
        targets: Sequence[Target],
        ranking: Ranking,
        unit_dims: Sequence[int],
    ) -> None:
        self.limits = limits
        self.names = [target.name for target in targets]
        self.unit_dims = unit_dims
        self.shards = [shard_of(target) for target in targets]
        self.ranks = self.shards[0].ranks
        self.scores: list[Tensor] = self.ranks.attempt(0, ranking.scores, list)
        self.ranks.sum()
        self.bits = 32
        if any(score.dtype == torch.float64 for score in self.scores):
            # The keys of all parameters must be of one kind to be compared.
            self.bits, self.scores = 64, [score.double() for score in self.scores]
        self.alive = [
            torch.ones_like(score, dtype=torch.bool) if target.mask is None else target.mask
            for target, score in zip(targets, self.scores, strict=True)
        ]
        self.free = self.alive

    def run(self, count_of: Callable[[int], int]) -> list[Tensor]:
        sizes = [shard.numel for shard in self.shards]
        alive = self._count()
        count = count_of(sum(alive))
        if self.limits.min_unit:
            self.free = self._without_the_best()
        free = self._totals([count_true(mask) for mask in self.free])
        least, most = self.limits.bounds(self.names, sizes, alive, free, count)
        last, bounded = self._common(free, least, most, count)
        sought = {i: _Last(0, n, free[i]) for i, n in bounded.items() if 0 < n < free[i]}
        last |= self._search(sought, self.bits, self._keys)
        for i in bounded.keys() - sought.keys():
            # All candidates or none are pruned. No score has the highest key.
            last[i] = _Last((1 << self.bits) - 2 if bounded[i] else 0, 0, 0)
        torn = {i: _Last(0, *own[1:]) for i, own in last.items() if 0 < own.going < own.there}
        places = self._search(
            torn, max(sizes).bit_length(), lambda i, *bins: self._places(i, last[i].place, *bins)
        )
        ends = [
            places[i].place + 1 if i in places else size if last[i].going else 0
            for i, size in enumerate(sizes)
        ]
        return self.ranks.attempt(
            len(sizes),
            lambda: [self._mask(i, last[i].place, end) for i, end in enumerate(ends)],
            lambda: self.alive,
        )

    # Counts

    def _count(self) -> list[int]:
        """How many entries of each parameter are not pruned yet.

        Raises:
            ValueError: scores are NaN, or copies differ.
        """
        counts, apart = [], []
        for i, shard in enumerate(self.shards):
            bins = self.ranks.attempt(i, partial(self._checked, i), self._no_counts)
            counts.append(int(bins.sum()) if shard.first else 0)
            apart.append(copy_weight(shard) * int(salted(bins)))
        found = self.ranks.sum([*counts, *apart])
        differ = found[len(counts) :]
        if any(differ):
            raise copies_differ([n for n, own in zip(self.names, differ, strict=True) if own])
        return found[: len(counts)]

    def _checked(self, i: int) -> Tensor:
        shift = self.bits - _BITS
        counts: Tensor = self._call(ops.shard_counts, i, self.alive[i], 0, shift, 1 << _BITS)
        if int(counts[-1]):
            raise not_numbers(self.names[i])
        return counts[:-2]

    def _no_counts(self) -> Tensor:
        return torch.zeros(1 << _BITS, dtype=torch.int64, device=self.scores[0].device)

    def _totals(self, counts: Sequence[int]) -> list[int]:
        own = zip(counts, self.shards, strict=True)
        return self.ranks.sum([count if shard.first else 0 for count, shard in own])

    def _call(self, operator: Callable[..., Any], i: int, mask: Tensor, *args: Any) -> Any:
        return operator([self.scores[i]], *args, score="value", masks=[mask], names=[self.names[i]])

    def _keys(self, i: int, low: int, shift: int) -> Tensor:
        """How many candidates are in each bin of ``2**shift`` keys from ``low`` on."""
        counts: Tensor = self._call(ops.shard_counts, i, self.free[i], low, shift, 1 << _BITS)
        return counts[:-2]

    def _places(self, i: int, key: int, low: int, shift: int) -> Tensor:
        """How many candidates with a key are in each bin of positions in the whole parameter."""
        bounds = low + (torch.arange((1 << _BITS) + 1) << shift)
        edges = self.shards[i].entries_before(bounds.clamp(max=self.shards[i].numel))
        counts: Tensor = self._call(ops.shard_ties, i, self.free[i], key, [edges])
        return counts

    def _before(
        self,
        lows: Mapping[int, int],
        shift: int,
        bins: Callable[[int, int, int], Tensor],
    ) -> dict[int, Any]:
        """How many entries of this process lie before each bin, for each of some parameters."""
        found = [
            self.ranks.attempt(i, partial(bins, i, low, shift), self._no_counts)
            if self.shards[i].first
            else self._no_counts()
            for i, low in lows.items()
        ]
        if not found:
            return {}
        before = torch.nn.functional.pad(torch.stack(found).cumsum(dim=1), (1, 0))
        return dict(zip(lows, before.cpu().numpy(), strict=True))

    # The search

    def _common(
        self, free: Sequence[int], least: Sequence[int], most: Sequence[int], count: int
    ) -> tuple[dict[int, _Last], dict[int, int]]:
        """Finds the last key to prune of all parameters that do not reach a bound.

        Args:
            free: how many candidates each parameter has.
            least: how many candidates each loses at least.
            most: how many candidates each loses at most.
            count: how many are pruned in total.

        Returns:
            What is pruned at that key in each of those parameters, and how many candidates each
            other parameter loses.
        """
        # How many candidates of each parameter lie below the key, and how many may still have it.
        # For the parameters inside of their bounds only the sums matter.
        below = dict.fromkeys([*range(len(free)), _INSIDE], 0)
        there = {**dict(enumerate(free)), _INSIDE: 0}
        inside: list[int] = []
        unsure = list(range(len(free)))
        bounded: dict[int, int] = {}

        def lost(i: int, n: int) -> int:
            return n if i == _INSIDE else min(max(n, least[i]), most[i])

        def settle() -> None:
            for i in unsure[:]:
                low, high = below[i], below[i] + there[i]
                if least[i] <= low and high <= most[i]:
                    inside.append(i)
                    below[_INSIDE] += low
                    there[_INSIDE] += there[i]
                elif lost(i, low) == lost(i, high):
                    bounded[i] = lost(i, low)
                else:
                    continue
                unsure.remove(i)

        settle()
        key = at = 0
        before: dict[int, Any] = {}
        for shift, left in _passes(self.bits):
            if not (inside or unsure):
                break
            before = self._before(dict.fromkeys([*inside, *unsure], key), shift, self._keys)
            at = 0
            while left:
                groups = {_INSIDE: inside} | {i: [i] for i in unsure}
                step = _step(len(groups), left)
                left -= step
                found = self._sections(before, groups, dict.fromkeys(groups, at), step, left, there)
                part = 0
                while count > sum(bounded.values()) + sum(
                    lost(i, below[i] + counts[part + 1]) for i, counts in found.items()
                ):
                    part += 1
                at += part << left
                for i, counts in found.items():
                    below[i] += counts[part]
                    there[i] = counts[part + 1] - counts[part]
                settle()
            key += at << shift
        rest = count - sum(bounded.values()) - sum(lost(i, below[i]) for i in [_INSIDE, *unsure])
        if rest and inside:
            own = self.ranks.sum([int(before[i][at + 1] - before[i][at]) for i in inside])
            there |= dict(zip(inside, own, strict=True))
        last = {}
        for i in sorted([*inside, *unsure]):  # equal scores of earlier parameters go first
            first, more = 0, there[i]
            if i in unsure:
                first = lost(i, below[i]) - below[i]
                more = lost(i, below[i] + there[i]) - below[i] - first
            more = min(rest, more)
            rest -= more
            last[i] = _Last(key, first + more, there[i])
        return last, bounded

    def _search(
        self, wanted: Mapping[int, _Last], bits: int, bins: Callable[[int, int, int], Tensor]
    ) -> dict[int, _Last]:
        """Finds the places below ``2**bits`` of the last entries to prune of some parameters.

        Args:
            wanted: for each parameter by its number, place 0, and the numbers of entries to prune
                and of all entries at all places.
            bits: the number of bits of a place.
            bins: takes a parameter, a place and ``shift``, and returns how many entries lie in each
                bin of ``2**shift`` places from that place on.
        """
        last = dict(wanted)
        for shift, left in _passes(bits):
            before = self._before({i: own.place for i, own in last.items()}, shift, bins)
            at = dict.fromkeys(last, 0)
            while left and last:
                step = _step(len(last), left)
                left -= step
                there = {i: own.there for i, own in last.items()}
                found = self._sections(before, {i: [i] for i in last}, at, step, left, there)
                for i, counts in found.items():
                    going = last[i].going
                    part = next(n for n, end in enumerate(counts[1:]) if end >= going)
                    at[i] += part << left
                    inside = counts[part + 1] - counts[part]
                    last[i] = _Last(last[i].place, going - counts[part], inside)
            last = {i: own._replace(place=own.place + (at[i] << shift)) for i, own in last.items()}
        return last

    def _sections(
        self,
        before: Mapping[int, Any],
        groups: Mapping[int, Sequence[int]],
        at: Mapping[int, int],
        step: int,
        left: int,
        there: Mapping[int, int],
    ) -> dict[int, list[int]]:
        """How many entries there are up to the end of each of ``2**step`` sections of the bins.

        Args:
            before: this process's counts from :meth:`_before`.
            groups: groups of parameters whose counts are added up.
            at: the bin at which the first section of each group begins.
            step: the base-2 logarithm of the number of sections.
            left: the base-2 logarithm of the number of bins in a section.
            there: how many entries each group has in all sections.

        Returns:
            For each group, 0 and the number of entries up to the end of each section.
        """
        ends = [section << left for section in range(1, 1 << step)]
        own = [
            sum(int(before[i][at[group] + end] - before[i][at[group]]) for i in members)
            for group, members in groups.items()
            for end in ends
        ]
        found = iter(self.ranks.sum(own))
        return {group: [0, *(next(found) for _ in ends), there[group]] for group in groups}

    def _mask(self, i: int, key: int, end: int) -> Tensor:
        """The mask that prunes candidates with a lower key, or with the key and before the end."""
        split = int(self.shards[i].entries_before(torch.tensor([end])))
        stay: Tensor = self._call(ops.shard_masks, i, self.free[i], key, [split])[0]
        return self.alive[i] & ~(self.free[i] & ~stay)

    # Units

    def _without_the_best(self) -> list[Tensor]:
        """Masks of the entries that are not among the best ``min_unit`` of their unit."""
        free = list(self.alive)
        torn: list[_Units] = []
        count = 0
        for i, (shard, dim) in enumerate(zip(self.shards, self.unit_dims, strict=True)):
            dim = dim if len(shard.shape) > 1 else 0
            own = (self.scores[i], self.alive[i], dim, self.names[i])
            if not shard.cuts(dim):
                run = partial(self.limits.free, *own)
                free[i] = self.ranks.attempt(i, run, partial(free.__getitem__, i))
                continue
            make = partial(_Units, i, count, shard, self.limits.min_unit, *own)
            torn += self.ranks.attempt(i, lambda make=make: [make()], list)  # type: ignore[misc]
            count += shard.shape[dim] if len(shard.shape) > 1 else 1
        self.ranks.sum()
        if count:
            self._take_the_best(torn, count)
        for units in torn:
            free[units.parameter] = self.alive[units.parameter] & ~units.taken()
        return free

    def _take_the_best(self, torn: Sequence[_Units], count: int) -> None:
        """Takes the best entries of each unit on the processes that hold them."""

        def highest(values: Sequence[Tensor]) -> Tensor:
            message = torch.full((count,), _NONE, dtype=torch.int64, device=self.ranks.device)
            for units, own in zip(torn, values, strict=True):
                message[units.numbers] = own.to(message.device)
            return self.ranks.most(message)

        for _ in range(self.limits.min_unit):
            keys = [units.offered(units.keys) for units in torn]
            best = highest(keys)
            if bool((best == _NONE).all()):
                return
            # Among equal scores the one with the highest position is the best.
            places = [
                units.offered(units.places).where(own == best[units.numbers].to(own.device), _NONE)
                for units, own in zip(torn, keys, strict=True)
            ]
            last = highest(places)
            for units, own in zip(torn, places, strict=True):
                units.take((own != _NONE) & (own == last[units.numbers].to(own.device)))


class _Units:
    """This process's best entries of the units of a parameter that are divided.

    Attributes:
        parameter: the number of the parameter.
        numbers: the numbers of its units among all divided units.
        keys: integers in the order of the scores, the best of each unit first; shape
            (units, entries + 1), with _NONE in the last column.
        places: the flat indices of these entries in the whole unit, with _NONE likewise.
    """

    def __init__(
        self,
        parameter: int,
        first: int,
        shard: Shard,
        count: int,
        score: Tensor,
        mask: Tensor,
        dim: int,
        name: str,
    ) -> None:
        self.parameter = parameter
        self._dim, self._shape = dim, score.shape
        others = [i for i in range(len(shard.shape)) if len(shard.shape) < 2 or i != dim]
        index = torch.zeros(1, dtype=torch.int64)
        for i in others:
            index = (index[:, None] * shard.shape[i] + indices(shard.runs[i])).flatten()
        self.numbers = first + (
            indices(shard.runs[dim]) if others != [dim] else torch.zeros(1).long()
        )
        rows = as_rows(score, dim)
        self._rows = rows.shape
        best = best_of_rows(rows, as_rows(mask, dim), count, name)
        unit, column = best.nonzero(as_tuple=True)
        each = best.sum(dim=1)
        slot = torch.arange(len(unit), device=unit.device) - (each.cumsum(0) - each)[unit]
        shape = (len(each), min(count, rows.size(1)) + 1)
        keys = torch.full(shape, _NONE, dtype=torch.int64, device=rows.device)
        columns = torch.zeros_like(keys)
        keys[unit, slot] = _ordered(rows[unit, column])
        columns[unit, slot] = column
        keys, order = keys.flip(1).sort(dim=1, descending=True, stable=True)
        self.keys, self._columns = keys, columns.flip(1).gather(1, order)
        places = index.to(keys.device)[self._columns] if len(index) else self._columns
        self.places = torch.where(keys == _NONE, _NONE, places)
        self._next = torch.zeros_like(each)

    def offered(self, values: Tensor) -> Tensor:
        """The value of each unit's best entry that is not taken yet, or _NONE."""
        return values.gather(1, self._next[:, None])[:, 0]

    def take(self, chosen: Tensor) -> None:
        """Takes the offered entry of the chosen units."""
        self._next += chosen

    def taken(self) -> Tensor:
        """A mask of the taken entries, shaped like the shard."""
        rows = torch.zeros(self._rows, dtype=torch.bool, device=self.keys.device)
        slots = torch.arange(self.keys.size(1), device=self.keys.device)
        unit, slot = (slots < self._next[:, None]).nonzero(as_tuple=True)
        rows[unit, self._columns[unit, slot]] = True
        return from_rows(rows, self._shape, self._dim)


def _ordered(scores: Tensor) -> Tensor:
    """int64 numbers in the same order as the scores."""
    scores = scores + 0.0  # -0 is +0
    if scores.dtype == torch.float64:
        bits, most = scores.view(torch.int64), torch.iinfo(torch.int64).max
    else:
        bits, most = scores.float().view(torch.int32).long(), torch.iinfo(torch.int32).max
    return torch.where(bits < 0, bits ^ most, bits)


def _step(groups: int, bits: int) -> int:
    """How many bits to find at once: more than one if the message stays short."""
    step = 1
    while step < bits and ((2 << step) - 1) * groups <= _SHORT:
        step += 1
    return step


def _passes(bits: int) -> Iterator[tuple[int, int]]:
    """The passes over the bits of a number, from the highest on.

    Yields how many bits are below those of the pass, and how many bits the pass finds.
    """
    while bits:
        width = min(_BITS, bits)
        bits -= width
        yield bits, width
