"""Bounds on what a parameter and a unit may lose, whatever the ranking says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torchalignprune import ops
from torchalignprune.parameters import matches
from torchalignprune.targets import Target

__all__ = ["LayerShare", "Limits"]

LayerShare = float | Mapping[str, float]
"""A share for every parameter, or by glob patterns of parameters and modules; the first one that
matches counts."""


@dataclass(frozen=True)
class Limits:
    """How much of every parameter and unit is kept, or pruned, at least.

    Within the limits it is still the entries of the lowest scores that go: of all masks that keep
    to them, the chosen ones have the highest sum of scores.

    Attributes:
        min_unit: how many entries every unit keeps at least; a unit that has fewer keeps those.
        max_layer_sparsity: the share of a parameter that may be pruned at most; 1 where no pattern
            matches.
        min_layer_sparsity: the share of a parameter that is pruned at least, as far as there is
            anything to prune: never more than the overall sparsity asked for; 0 where no pattern
            matches.
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
            for value in given.values() if isinstance(given, Mapping) else [given]:
                if not 0 <= value <= 1:
                    raise ValueError(f"{which} should be in [0, 1], got {value}")

    def check(self, names: Sequence[str]) -> None:
        """Whether the limits make sense for the parameters of these names.

        Raises:
            ValueError: a pattern that matches none of them; a floor above its ceiling.
        """
        for which in ("max_layer_sparsity", "min_layer_sparsity"):
            given = getattr(self, which)
            for pattern in given if isinstance(given, Mapping) else ():
                if not any(matches(name, pattern) for name in names):
                    shown = ", ".join([*names[:3], *["..."] * (len(names) > 3)])
                    raise ValueError(
                        f"{which} has a pattern that matches no parameter: {pattern!r}; they are "
                        f"{shown}"
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
            targets: the parameters; what their masks prune already is no candidate.
            scores: one for each, shaped like it; the lowest go first.
            unit_dims: the dimension of the units of each.
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
        size = sum(mask.numel() for mask in kept)
        pruned = [mask.numel() - int(mask.sum()) for mask in kept]
        overall = (sum(pruned) + count) / max(size, 1)
        names = [target.name for target in targets]
        candidates = []
        for target, score, mask, gone, dim in zip(
            targets, scores, kept, pruned, unit_dims, strict=True
        ):
            free = self._spared(target, score, mask, dim)
            room = max(0, int(self._ceiling(target.name) * mask.numel() + _ROUNDING) - gone)
            if int(free.sum()) > room:
                (stay,) = ops.select_global([score], room, score="value", masks=[free])
                free &= ~stay
            candidates.append(free)
        available = sum(int(free.sum()) for free in candidates)
        if count > available:
            raise ValueError(
                f"min_unit={self.min_unit} and max_layer_sparsity={self.max_layer_sparsity} leave "
                f"{available} entries to prune, got {count}: a sparsity of "
                f"{(sum(pruned) + available) / max(size, 1):.4f} instead of {overall:.4f}"
            )
        first = []
        for name, score, free, gone in zip(names, scores, candidates, pruned, strict=True):
            floor = min(self._floor(name), overall)
            due = max(0, int(floor * free.numel() + _ROUNDING) - gone)
            due = min(due, int(free.sum()))
            (stay,) = ops.select_global([score], due, score="value", masks=[free])
            first.append(free & ~stay)
        done = sum(int(mask.sum()) for mask in first)
        if done > count:
            # Other parameters have lost more than their share already.
            left = ops.select_global(scores, count, score="value", masks=first, names=names)
            now = [mask & ~stay for mask, stay in zip(first, left, strict=True)]
        else:
            rest = [free & ~mask for free, mask in zip(candidates, first, strict=True)]
            left = ops.select_global(scores, count - done, score="value", masks=rest, names=names)
            now = [
                mask | (other & ~stay) for mask, other, stay in zip(first, rest, left, strict=True)
            ]
        return [mask & ~gone for mask, gone in zip(kept, now, strict=True)]

    def _spared(self, target: Target, score: Tensor, mask: Tensor, dim: int) -> Tensor:
        """The candidates that are not among the best ``min_unit`` of their unit."""
        if self.min_unit == 0:
            return mask.clone()
        units_first = score.movedim(dim, 0) if score.dim() > 1 else score.reshape(1, -1)
        rows = units_first.flatten(1)
        alive = (mask.movedim(dim, 0) if mask.dim() > 1 else mask.reshape(1, -1)).flatten(1)
        counts = (alive.sum(dim=1) - self.min_unit).clamp(min=0)
        best = ops.select_rows(rows, counts, mask=alive, name=target.name)
        best = best.reshape(units_first.shape)
        best = best.movedim(0, dim) if score.dim() > 1 else best.reshape(score.shape)
        return mask & ~best


def _share(given: LayerShare, name: str, default: float) -> float:
    if not isinstance(given, Mapping):
        return given
    return next((share for pattern, share in given.items() if matches(name, pattern)), default)


# Shares like 0.7 of 10 are a little below what they mean.
_ROUNDING = 1e-6
