"""What the entries of the parameters are worth, in the form that the selection streams."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from torchalignprune import ops
from torchalignprune.targets import PerParameter, Target, targets_of

__all__ = [
    "Ranking",
    "frobenius",
    "input_norms_of",
    "references_of",
    "two_sided",
    "unit_gains",
    "within_unit",
]


@dataclass
class Ranking:
    """What `ops.select_global` ranks: one entry for each target."""

    weights: list[Tensor]
    score: ops.Score
    references: list[Tensor | None] = field(default_factory=list)
    row_scales: list[Tensor | None] = field(default_factory=list)
    column_scales: list[Tensor | None] = field(default_factory=list)

    def scores(self) -> list[Tensor]:
        """The same as tensors of their own."""
        none: list[Tensor | None] = [None] * len(self.weights)
        rows, columns = self.row_scales or none, self.column_scales or none
        scores = []
        for w, r, row, column in zip(
            self.weights, self.references or none, rows, columns, strict=True
        ):
            wide = w.to(torch.float64 if w.dtype == torch.float64 else torch.float32)
            score = wide
            if self.score == "magnitude":
                score = wide.abs()
            elif self.score == "worth":
                score = wide * (2 * (w if r is None else r).to(wide.dtype) - wide)
            if row is not None:
                score = score * along(row, 0, w)
            if column is not None:
                score = score * along(column, min(1, w.dim() - 1), w)
            scores.append(score)
        return scores


def for_targets(
    given: PerParameter | None, targets: Sequence[Target], what: str
) -> list[Tensor | None]:
    """The tensor that belongs to each target."""
    if given is None:
        return [None] * len(targets)
    if isinstance(given, Tensor):
        given = [given]
    if not isinstance(given, Mapping):
        if len(given) != len(targets):
            raise ValueError(
                f"{what} should have one tensor for each of the {len(targets)} parameters, got "
                f"{len(given)}"
            )
        return [tensor.detach() for tensor in given]
    found: list[Tensor | None] = []
    by_weight: dict[int, Tensor] = {}
    for target in targets:
        own = next((given[place] for place in target.places if place in given), None)
        if own is None and not target.places:
            # From torch's vector only the parameter itself is known.
            by_weight = by_weight or {t.weight.data_ptr(): given[p] for p in given for t in targets_of([p])}
            own = by_weight.get(target.weight.data_ptr())
        if own is None:
            raise ValueError(f"{what} has no entry for {target.name}")
        found.append(own.detach())
    return found


def references_of(given: PerParameter | None, targets: Sequence[Target]) -> list[Tensor | None]:
    references = for_targets(given, targets, "reference")
    for i, (reference, target) in enumerate(zip(references, targets, strict=True)):
        if reference is None:
            continue
        if reference.shape != target.weight.shape:
            raise ValueError(
                f"the reference of {target.name} should have shape {tuple(target.weight.shape)}, "
                f"got {tuple(reference.shape)}"
            )
        references[i] = reference.to(target.weight.device)
    return references


def input_norms_of(given: PerParameter | None, targets: Sequence[Target]) -> list[Tensor | None]:
    norms = for_targets(given, targets, "input_norms")
    for i, (norm, target) in enumerate(zip(norms, targets, strict=True)):
        if norm is None:
            continue
        if target.weight.dim() < 2:
            norms[i] = None
            continue
        length = target.weight.size(target.in_dim)
        if norm.shape != (length,):
            raise ValueError(
                f"the input_norms of {target.name} should have shape ({length},), one for each "
                f"input, got {tuple(norm.shape)}"
            )
        if not bool((norm.isfinite() & (norm >= 0)).all()):
            raise ValueError(
                f"the input_norms of {target.name} should be finite and not negative"
            )
        norms[i] = norm.to(target.weight.device)
    return norms


def unit_gains(
    target: Target, reference: Tensor | None, norms: Tensor | None, unit_dim: int
) -> Tensor:
    """The cosine gains, units along ``unit_dim``, in the layout of the weight."""
    w = target.weight
    dtype = torch.float64 if w.dtype == torch.float64 else torch.float32
    if w.dim() < 2:
        return ops.cosine_gains(w, mask=target.mask, reference=reference, name=target.name)
    along_units = unit_dim == target.out_dim
    gains = ops.cosine_gains(
        w.movedim(unit_dim, 0),
        mask=None if target.mask is None else target.mask.movedim(unit_dim, 0),
        reference=None if reference is None else reference.movedim(unit_dim, 0),
        column_scale=norms.to(dtype) if norms is not None and along_units else None,
        name=target.name,
    ).movedim(0, unit_dim)
    if norms is not None and not along_units:
        # A unit of one input is multiplied as a whole, which its alignment does not see, unless by 0.
        gains = gains * along(norms > 0, target.in_dim, w)
    return gains


def within_unit(target: Target, reference: Tensor | None, norms: Tensor | None) -> Tensor:
    """What decides among the entries of one output unit: |w|, or w (r - rho w / 2)."""
    w = target.weight.to(torch.float64 if target.weight.dtype == torch.float64 else torch.float32)
    scale = 1 if norms is None else along(norms.to(w.dtype), target.in_dim, w)
    w = w * scale
    if reference is None:
        return w.abs()
    r = reference.to(w.dtype) * scale
    alive = w if target.mask is None else w * target.mask
    others = [dim for dim in range(w.dim()) if dim != target.out_dim]
    square = (alive * alive).sum(dim=others, keepdim=True)
    rho = (alive * r).sum(dim=others, keepdim=True) / square.where(square > 0, 1)
    return w * (r - rho * w / 2)


def frobenius(
    targets: Sequence[Target],
    references: list[Tensor | None],
    norms: list[Tensor | None],
    dtype: torch.dtype,
) -> Ranking:
    own = all(reference is None for reference in references)
    result = Ranking([target.weight for target in targets], "magnitude" if own else "worth")
    result.references = [] if own else references
    for target, reference, norm in zip(targets, references, norms, strict=True):
        r = target.weight if reference is None else reference
        scaled = r.to(dtype)
        if norm is not None:
            scaled = scaled * along(norm.to(dtype), target.in_dim, r)
        size = torch.linalg.vector_norm(scaled)
        # For r = w the root of the worth ranks the same, and does not lose small weights.
        power = 1 if own else 2
        whole = inverse(size).pow(power).reshape(1)
        inputs = None if norm is None else norm.to(dtype).pow(power)
        rows, columns = (whole, inputs) if target.out_dim == 0 else (inputs, whole)
        if inputs is None:
            rows, columns = whole, None
        result.row_scales.append(rows)
        result.column_scales.append(columns)
    return result


def two_sided(
    targets: Sequence[Target],
    references: list[Tensor | None],
    norms: list[Tensor | None],
    dtype: torch.dtype,
) -> Ranking:
    own = all(reference is None for reference in references)
    result = Ranking([target.weight for target in targets], "magnitude" if own else "worth")
    result.references = [] if own else references
    for target, reference, norm in zip(targets, references, norms, strict=True):
        r = target.weight if reference is None else reference
        if r.dim() < 2:
            # One unit: |w| / |w|, and its square with a reference.
            size = torch.linalg.vector_norm(r, dtype=dtype)
            result.row_scales.append(inverse(size).pow(1 if own else 2).reshape(1))
            result.column_scales.append(None)
            continue
        inputs = None if norm is None else norm.to(dtype)
        scaled = r if inputs is None else r.to(dtype) * along(inputs, target.in_dim, r)
        by_dim = []
        for dim in (0, 1):
            others = [d for d in range(r.dim()) if d != dim]
            sizes = torch.linalg.vector_norm(scaled, dim=others, dtype=dtype)
            scale = inverse(sizes)
            scale = scale.sqrt() if own else scale
            if inputs is not None and dim == target.in_dim:
                scale = scale * inputs.pow(1 if own else 2)
            by_dim.append(scale)
        result.row_scales.append(by_dim[0])
        result.column_scales.append(by_dim[1])
    return result


def inverse(size: Tensor) -> Tensor:
    """1 / size, and 0 where the size is 0: a zero unit is worth nothing."""
    return torch.where(size > 0, 1 / size.where(size > 0, 1), 0)


def along(vector: Tensor, dim: int, tensor: Tensor) -> Tensor:
    """The vector shaped to broadcast along one dimension of the tensor."""
    shape = [1] * tensor.dim()
    if shape:
        shape[dim] = -1
    return vector.reshape(shape)


