"""How much the entries of parameters are worth, in the form that the selection streams."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from torchalignprune import ops, sharding
from torchalignprune.matching import Method, Metric, match_units
from torchalignprune.targets import Target

__all__ = [
    "Ranking",
    "along",
    "frobenius",
    "two_sided",
    "unit_gains",
    "with_matched_reference",
    "within_unit",
]

# Above this number of units, their similarities are not all in memory at once.
_MANY_UNITS = 1 << 15


@dataclass
class Ranking:
    """What `ops.select_global` ranks; the lists have one element for each target."""

    weights: list[Tensor]
    score: ops.Score
    references: list[Tensor | None] = field(default_factory=list)
    row_scales: list[Tensor | None] = field(default_factory=list)
    column_scales: list[Tensor | None] = field(default_factory=list)

    def scores(self) -> list[Tensor]:
        """The scores, computed as tensors."""
        none: list[Tensor | None] = [None] * len(self.weights)
        scores = []
        for weight, reference, row, column in zip(
            self.weights,
            self.references or none,
            self.row_scales or none,
            self.column_scales or none,
            strict=True,
        ):
            dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
            scaled = []
            for tensor in (weight, weight if reference is None else reference):
                value = tensor.to(dtype)
                if row is not None:
                    value = value * along(row, 0, weight)
                if column is not None:
                    value = value * along(column, min(1, weight.dim() - 1), weight)
                scaled.append(value)
            v, u = scaled
            scores.append({"value": v, "magnitude": v.abs(), "worth": v * (2 * u - v)}[self.score])
        return scores


def with_matched_reference(target: Target, unit_dim: int, metric: Metric, method: Method) -> Target:
    """The target with the units of its reference permuted to match its own.

    Raises:
        ValueError: NaN or infinity in the weight or the reference.
        ImportError: ``method="hungarian"`` without scipy.
    """
    w, reference = target.weight, target.reference_here()
    assert reference is not None
    if w.dim() < 2:
        return target
    current = w if target.mask is None else w.masked_fill(~target.mask, 0)
    both = []
    for tensor in (current, reference):
        # An input unit is multiplied as a whole, by the norm of the place that it is permuted to.
        if target.input_norms is not None and unit_dim == target.out_dim:
            tensor = tensor * along(target.input_norms, target.in_dim, tensor)
        both.append(tensor.movedim(unit_dim, 0))
    block = 4096 if method == "greedy" and w.size(unit_dim) > _MANY_UNITS else None
    try:
        index = match_units(both[0], both[1], metric=metric, method=method, block=block).index
    except ValueError as error:
        raise ValueError(
            f"{target.name} (a) cannot be matched with its reference (b): {error}"
        ) from error
    return replace(target, reference=reference.index_select(unit_dim, index))


def unit_gains(target: Target, unit_dim: int) -> Tensor:
    """The cosine gains, units along ``unit_dim``, in the layout of the weight."""
    if target.shard is not None:
        gains_of = partial(unit_gains, unit_dim=unit_dim)
        return target.shard.per_unit(target, unit_dim, gains_of, target.dtype)
    w, reference, norms = target.weight, target.reference_here(), target.input_norms
    if w.dim() < 2:
        return ops.cosine_gains(w, mask=target.mask, reference=reference, name=target.name)
    of_outputs = unit_dim == target.out_dim
    gains = ops.cosine_gains(
        w.movedim(unit_dim, 0),
        mask=None if target.mask is None else target.mask.movedim(unit_dim, 0),
        reference=None if reference is None else reference.movedim(unit_dim, 0),
        column_scale=norms if of_outputs else None,
        name=target.name,
    ).movedim(0, unit_dim)
    if norms is not None and not of_outputs:
        # An input unit is multiplied as a whole, which leaves its alignment as it is, unless by 0.
        gains = gains * along(norms > 0, target.in_dim, w)
    return gains


def within_unit(target: Target) -> Tensor:
    """The scores that rank the entries of an output unit: |w|, or w (r - rho w / 2)."""
    if target.shard is not None and target.reference is not None:
        return target.shard.per_unit(target, target.out_dim, within_unit, target.dtype)
    w = target.weight.to(target.dtype)
    scale = 1 if target.input_norms is None else along(target.input_norms, target.in_dim, w)
    w = w * scale
    reference = target.reference_here()
    if reference is None:
        return w.abs()
    r = reference.to(w.dtype) * scale
    alive = w if target.mask is None else w.masked_fill(~target.mask, 0)
    units = [tensor.movedim(target.out_dim, 0) for tensor in (alive, r)]
    square, dot, _ = ops.unit_products(units[:1], references=units[1:])
    rho = (dot / square.where(square > 0, 1)).to(w.dtype)
    return w * (r - along(rho, target.out_dim, w) * w / 2)


def frobenius(targets: Sequence[Target]) -> Ranking:
    """w (2 r - w) / |R|^2; for r = w its square root |w| / |R|, which ranks the same."""
    result = _ranking(targets)
    for target, total in zip(targets, _totals(targets), strict=True):
        whole = torch.tensor([total], dtype=torch.float64, device=target.weight.device)
        size = _inverse(whole.sqrt()).to(_dtype(targets))
        by_dim: list[Tensor | None] = [size, None]
        if target.input_norms is not None:
            by_dim[target.in_dim] = target.input_norms.to(size.dtype)
            by_dim[target.out_dim] = size
        result.row_scales.append(by_dim[0])
        result.column_scales.append(by_dim[1])
    return result


def two_sided(targets: Sequence[Target]) -> Ranking:
    """w (2 r - w) / (|r_row| |r_column|); for r = w its square root, which ranks the same."""
    result = _ranking(targets)
    if _are_shards(targets):
        sums = sharding.square_sums(targets, _square_sums)
    else:
        sums = [_square_sums(target) for target in targets]
    dtype = _dtype(targets)
    for target, (rows, columns) in zip(targets, sums, strict=True):
        if target.weight.dim() < 2:
            result.row_scales.append(_inverse(rows.sqrt()).to(dtype))
            result.column_scales.append(None)
            continue
        scales = [_inverse(squares.sqrt().sqrt()) for squares in (rows, columns)]
        if target.input_norms is not None:
            scales[target.in_dim] = scales[target.in_dim] * target.input_norms
        result.row_scales.append(scales[0].to(dtype))
        result.column_scales.append(scales[1].to(dtype))
    return result


def along(vector: Tensor, dim: int, tensor: Tensor) -> Tensor:
    """The vector shaped to broadcast along one dimension of the tensor."""
    shape = [1] * tensor.dim()
    if shape:
        shape[dim] = -1
    return vector.reshape(shape)


def _dtype(targets: Sequence[Target]) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in targets) else torch.float32


def _ranking(targets: Sequence[Target]) -> Ranking:
    weights = [target.weight for target in targets]
    if all(target.reference is None for target in targets):
        return Ranking(weights, "magnitude")
    return Ranking(weights, "worth", references=[target.reference_here() for target in targets])


def _are_shards(targets: Sequence[Target]) -> bool:
    return any(target.shard is not None for target in targets)


def _totals(targets: Sequence[Target]) -> list[float]:
    """The sum of squares of each reference, correctly rounded, so that the order is irrelevant."""
    if _are_shards(targets):
        return sharding.totals(targets, lambda target: _square_sums(target)[0])
    return [math.fsum(_square_sums(target)[0].tolist()) for target in targets]


def _square_sums(target: Target, all_columns: int | None = None) -> tuple[Tensor, Tensor]:
    """The sums of squares of the reference's rows and columns, scaled by the input norms.

    Raises:
        ValueError: NaN or infinity in the reference, also where the weight is pruned.
    """
    reference = target.reference_here()
    r = target.weight if reference is None else reference
    scales: list[Tensor | None] = [None, None]
    if target.input_norms is not None:
        wide = torch.float64 if r.dtype == torch.float64 else torch.float32
        scales[target.in_dim] = target.input_norms.to(wide)
    rows, columns = ops.square_sums(
        r,
        row_scale=scales[0],
        column_scale=scales[1],
        all_columns=all_columns,
        name=target.name,
    )
    if not bool(rows.isfinite().all()):
        raise ValueError(
            f"the scores of {target.name} should be finite numbers, got NaN or infinity"
            + (" in the norm of its reference" if reference is not None else "")
        )
    return rows, columns


def _inverse(size: Tensor) -> Tensor:
    """1 / size, and 0 where the size is 0: a zero unit is worth nothing."""
    return torch.where(size > 0, 1 / size.where(size > 0, 1), 0)
