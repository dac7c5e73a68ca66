"""Limits on what a parameter and a unit may lose, whatever the ranking says."""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torchalignprune import ops
from torchalignprune.parameters import matches, some
from torchalignprune.targets import Target, count_true

__all__ = ["LayerShare", "Limits"]

LayerShare = float | Mapping[str, float]
"""One share for all parameters, or shares by glob patterns of parameters and modules, where the
first pattern that matches counts."""


@dataclass(frozen=True)
class Limits:
    """Limits on how much of every parameter and unit is pruned.

    Within the limits the entries with the lowest scores are pruned: of all masks that keep to the
    limits, the chosen ones have the highest sum of scores.

    Attributes:
        min_unit: the minimum number of entries that every unit keeps; a unit that has fewer keeps
            them all.
        max_layer_sparsity: the maximum share of a parameter that is pruned; 1 where no pattern
            matches.
        min_layer_sparsity: the minimum share of a parameter that is pruned, as far as the other
            limits allow and capped at the overall sparsity; 0 where no pattern matches.
    """

    min_unit: int = 0
    max_layer_sparsity: LayerShare = 1.0
    min_layer_sparsity: LayerShare = 0.0

    def __post_init__(self) -> None:
        if isinstance(self.min_unit, bool) or not isinstance(self.min_unit, int):
            raise TypeError(f"min_unit should be an int, got {self.min_unit!r}")
        if self.min_unit < 0:
            raise ValueError(f"min_unit should not be negative, got {self.min_unit}")
        for which in ("max_layer_sparsity", "min_layer_sparsity"):
            given = getattr(self, which)
            for pattern in given if isinstance(given, Mapping) else ():
                if not isinstance(pattern, str):
                    raise TypeError(
                        f"{which} should have glob patterns as its keys, got "
                        f"{type(pattern).__name__}"
                    )
            for value in given.values() if isinstance(given, Mapping) else [given]:
                if not isinstance(value, numbers.Real):
                    raise TypeError(
                        f"{which} should be a number, or numbers by glob pattern, got {value!r}"
                    )
                if not 0 <= float(value) <= 1:
                    raise ValueError(f"{which} should be in [0, 1], got {value}")

    def check(self, names: Sequence[str]) -> None:
        """Check that the limits make sense for the parameters of these names.

        Raises:
            ValueError: a pattern that matches none of them; a floor above its ceiling.
        """
        for which in ("max_layer_sparsity", "min_layer_sparsity"):
            given = getattr(self, which)
            for pattern in given if isinstance(given, Mapping) else ():
                if not any(matches(name, pattern) for name in names):
                    raise ValueError(
                        f"{which} should have patterns that match parameters, got {pattern!r}; the "
                        f"parameters are {some(names)}"
                    )
        for name in names:
            floor, ceiling = self._floor(name), self._ceiling(name)
            if floor > ceiling:
                raise ValueError(
                    f"min_layer_sparsity={floor} should not be above max_layer_sparsity={ceiling}, "
                    f"for {name}"
                )

    def _ceiling(self, name: str) -> float:
        return _share(self.max_layer_sparsity, name, 1.0)

    def _floor(self, name: str) -> float:
        return _share(self.min_layer_sparsity, name, 0.0)

    def masks(
        self,
        targets: Sequence[Target],
        scores: Sequence[Tensor],
        unit_dims: Sequence[int],
        count: int,
    ) -> list[Tensor]:
        """Masks that prune ``count`` more entries of the targets, within the limits.

        Args:
            targets: the parameters; entries that their masks already prune are no candidates.
            scores: one tensor for each target, shaped like it; the lowest are pruned first.
            unit_dims: the dimension of each target's units.
            count: how many entries to prune.

        Returns:
            bool masks, shaped like the targets.

        Raises:
            ValueError: the limits leave fewer entries than ``count``.
        """
        kept = [
            t.mask if t.mask is not None else torch.ones_like(s, dtype=torch.bool)
            for t, s in zip(targets, scores, strict=True)
        ]
        names = [target.name for target in targets]
        free = [
            self.free(score, mask, dim, name)
            for score, mask, dim, name in zip(scores, kept, unit_dims, names, strict=True)
        ]
        least, most = self.bounds(
            names,
            [mask.numel() for mask in kept],
            [count_true(mask) for mask in kept],
            [count_true(mask) for mask in free],
            count,
        )
        candidates = [
            mask if count_true(mask) == n else _lowest(score, mask, n, name)
            for score, mask, n, name in zip(scores, free, most, names, strict=True)
        ]
        first = [
            _lowest(score, mask, n, name)
            for score, mask, n, name in zip(scores, candidates, least, names, strict=True)
        ]
        rest = [mask & ~own for mask, own in zip(candidates, first, strict=True)]
        left = ops.select_global(scores, count - sum(least), score="value", masks=rest, names=names)
        return [
            mask & ~own & ~(other & ~stay)
            for mask, own, other, stay in zip(kept, first, rest, left, strict=True)
        ]

    def bounds(
        self,
        names: Sequence[str],
        sizes: Sequence[int],
        alive: Sequence[int],
        free: Sequence[int],
        count: int,
    ) -> tuple[list[int], list[int]]:
        """The minimum and the maximum number of entries that each parameter has yet to lose.

        Each parameter first loses its minimum, lowest scores first; the rest of ``count`` are the
        lowest scores of all parameters.

        Args:
            names: of the parameters.
            sizes: how many entries each has.
            alive: how many of these are not pruned yet.
            free: how many of these ``min_unit`` does not protect.
            count: how many entries of all parameters together to prune.

        Raises:
            ValueError: the limits leave fewer entries than ``count``.
        """
        size, gone = sum(sizes), [n - left for n, left in zip(sizes, alive, strict=True)]
        overall = (sum(gone) + count) / max(size, 1)
        rooms = [
            max(0, int(self._ceiling(name) * n + _ROUNDING) - already)
            for name, n, already in zip(names, sizes, gone, strict=True)
        ]
        most = [min(room, n) for room, n in zip(rooms, free, strict=True)]
        if count > sum(most):
            where = names[0] if len(names) == 1 else f"the {len(names)} parameters"
            raise ValueError(
                f"min_unit={self.min_unit} and max_layer_sparsity={self.max_layer_sparsity} leave "
                f"{sum(most)} entries of {where} to prune, got {count}: a sparsity of "
                f"{(sum(gone) + sum(most)) / max(size, 1):.4f} instead of {overall:.4f}"
            )
        due = [
            max(0, int(min(self._floor(name), overall) * n + _ROUNDING) - already)
            for name, n, already in zip(names, sizes, gone, strict=True)
        ]
        least = [min(n, room) for n, room in zip(due, most, strict=True)]
        if sum(least) > count:
            # Other parameters have already lost more than their share, so not all can get theirs.
            return [0] * len(least), least
        return least, most

    def free(self, score: Tensor, mask: Tensor, dim: int, name: str) -> Tensor:
        """The entries of a mask that are not among the best ``min_unit`` of their unit."""
        if self.min_unit == 0:
            return mask
        best = best_of_rows(as_rows(score, dim), as_rows(mask, dim), self.min_unit, name)
        return mask & ~from_rows(best, score.shape, dim)


def as_rows(tensor: Tensor, dim: int) -> Tensor:
    """A row for each unit along a dimension; a tensor of at most one dimension is one unit."""
    return tensor.movedim(dim, 0).flatten(1) if tensor.dim() > 1 else tensor.reshape(1, -1)


def from_rows(rows: Tensor, shape: Sequence[int], dim: int) -> Tensor:
    """The inverse of :func:`as_rows`."""
    if len(shape) < 2:
        return rows.reshape(list(shape))
    others = [size for i, size in enumerate(shape) if i != dim]
    return rows.reshape(shape[dim], *others).movedim(0, dim)


def best_of_rows(scores: Tensor, mask: Tensor, count: int, name: str) -> Tensor:
    """A mask of each row's best ``count`` entries among those of a mask, or of all if fewer."""
    counts = (mask.sum(dim=1) - count).clamp(min=0)
    return ops.select_rows(scores, counts, mask=mask, name=name)


def _lowest(score: Tensor, mask: Tensor, count: int, name: str) -> Tensor:
    """The ``count`` entries with the lowest scores among those of a mask."""
    (stay,) = ops.select_global([score], count, score="value", masks=[mask], names=[name])
    return mask & ~stay


def _share(given: LayerShare, name: str, default: float) -> float:
    if not isinstance(given, Mapping):
        return given
    return next((share for pattern, share in given.items() if matches(name, pattern)), default)


# Products like 0.29 * 100 are a little below the integer that is meant.
_ROUNDING = 1e-6
