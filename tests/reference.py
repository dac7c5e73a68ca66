"""A slow plain twin of every operator, in a few lines of torch and Python."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def scores(
    weight: Tensor,
    score: str,
    reference: Tensor | None = None,
    row_scale: Tensor | None = None,
    column_scale: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    def scaled(tensor: Tensor) -> Tensor:
        values = tensor.to(dtype)
        if row_scale is not None:
            values = values * row_scale.reshape(-1, *[1] * (max(values.dim(), 1) - 1))
        if column_scale is not None:
            values = values * column_scale.reshape(-1, *[1] * max(values.dim() - 2, 0))
        return values.reshape(tensor.shape)

    w = scaled(weight)
    r = w if reference is None else scaled(reference)
    return {"value": w, "magnitude": w.abs(), "worth": w * (2 * r - w)}[score]


def select_global(
    weights: list[Tensor],
    count: int,
    *,
    score: str = "magnitude",
    masks: list[Tensor | None] | None = None,
    references: list[Tensor | None] | None = None,
    row_scales: list[Tensor | None] | None = None,
    column_scales: list[Tensor | None] | None = None,
) -> list[Tensor]:
    """Concatenate, sort, cut."""
    none = [None] * len(weights)
    dtype = torch.float64 if any(w.dtype == torch.float64 for w in weights) else torch.float32
    flat = torch.cat(
        [
            scores(w, score, r, row, column, dtype).reshape(-1)
            for w, r, row, column in zip(
                weights,
                references or none,
                row_scales or none,
                column_scales or none,
                strict=True,
            )
        ]
    )
    alive = torch.cat(
        [
            torch.ones(w.numel(), dtype=torch.bool, device=w.device) if m is None else m.reshape(-1)
            for w, m in zip(weights, masks or none, strict=True)
        ]
    )
    candidates = alive.nonzero().flatten()
    order = torch.sort(flat[candidates], stable=True).indices
    kept = alive.clone()
    kept[candidates[order[:count]]] = False
    pieces = kept.split([w.numel() for w in weights])
    return [piece.reshape(w.shape) for piece, w in zip(pieces, weights, strict=True)]


def select_rows(scores: Tensor, counts: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Every row by itself."""
    return torch.stack(
        [
            select_global(
                [row], int(count), score="value", masks=[None if mask is None else mask[i]]
            )[0]
            for i, (row, count) in enumerate(zip(scores, counts, strict=True))
        ]
    )


def alignment(p: Tensor, r: Tensor) -> float:
    """<p, r> / (|p| |r|), 0 if either is all zero."""
    norms = float(p.double().norm()) * float(r.double().norm())
    return float(p.double().flatten() @ r.double().flatten()) / norms if norms > 0 else 0.0


def cosine_gains(
    weight: Tensor,
    *,
    mask: Tensor | None = None,
    reference: Tensor | None = None,
    column_scale: Tensor | None = None,
) -> Tensor:
    """Add a unit's entries one by one and take the differences of its alignment."""
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    w = scores(weight, "value", dtype=wide)
    r = w if reference is None else reference.to(wide)
    if column_scale is not None:
        shaped = column_scale.reshape(-1, *[1] * max(w.dim() - 2, 0))
        w, r = (w * shaped).reshape(w.shape), (r * shaped).reshape(r.shape)
    shape = w.shape
    if w.numel() == 0:
        return w
    rows = 1 if w.dim() < 2 else w.size(0)
    w, r = w.double().reshape(rows, -1), r.double().reshape(rows, -1)
    alive = torch.ones_like(w, dtype=torch.bool) if mask is None else mask.reshape(rows, -1)
    out = torch.zeros_like(w)
    for i in range(rows):
        keep = alive[i].nonzero().flatten()
        if reference is None:
            order = keep[torch.sort(w[i, keep].abs(), stable=True).indices].flip(0)
        else:
            order = by_alignment(w[i], r[i], keep)
        norm = float(r[i].norm())
        gains, dot, square, before = [], 0.0, 0.0, 0.0
        for position in order.tolist():
            dot += float(w[i, position] * r[i, position])
            square += float(w[i, position]) ** 2
            now = dot / (math.sqrt(square) * norm) if square and norm else 0.0
            gains.append(now - before)
            before = now
        for position, gain in zip(order.tolist(), concave(gains), strict=True):
            out[i, position] = gain
    return out.reshape(shape).to(wide)


def by_alignment(w: Tensor, r: Tensor, candidates: Tensor) -> Tensor:
    """Next come those with which the chosen are aligned best, a quarter as many as are chosen."""
    rest, chosen = candidates, candidates[:0]
    while rest.numel():
        dot, square = (w[chosen] * r[chosen]).sum(), (w[chosen] ** 2).sum()
        size = (square + w[rest] ** 2).sqrt()
        alignment = torch.where(size > 0, (dot + w[rest] * r[rest]) / size, 0)
        order = torch.sort(alignment, stable=True).indices.flip(0)
        best = rest[order[: max(1, chosen.numel() // 4)]]
        chosen = torch.cat([chosen, best])
        rest = rest[~torch.isin(rest, best)]
    return chosen


def concave(gains: list[float]) -> list[float]:
    """The steps of the least concave majorant of the running sums of `gains`.

    Equal steps fall by a thousandth of what is between them and the next, in their order.
    """
    sums = [0.0]
    for gain in gains:
        sums.append(sums[-1] + gain)
    pools: list[tuple[float, int]] = []
    start = 0
    while start < len(gains):
        slopes = [(sums[j] - sums[start]) / (j - start) for j in range(start + 1, len(sums))]
        best = max(slopes)
        length = max(j for j, slope in enumerate(slopes, 1) if slope == best)
        pools.append((best, length))
        start += length
    steps: list[float] = []
    for (step, length), (after, _) in zip(
        pools, [*pools[1:], (pools[-1][0] - abs(pools[-1][0]), 1)] if pools else [], strict=True
    ):
        steps += [step - (step - after) / 1000 * j / length for j in range(length)]
    return steps


def realign(
    weight: Tensor,
    mask: Tensor,
    places: list[tuple[float, Tensor, Tensor, bool]],
    *,
    reference: Tensor | None = None,
    ridge: float = 0.0,
) -> tuple[Tensor, list[Tensor]]:
    """Solve for each unit, in float64.

    Args:
        weight: shape (units, inputs).
        mask: likewise.
        places: for each place of the weight its share, the mean and the covariance of its inputs,
            and whether it has a bias.

    Returns:
        The weights, 0 under the mask, and what to add to the bias of each place (0 without one).
    """
    p = weight.double() * mask
    w = weight.double() if reference is None else reference.double()
    products = torch.zeros(w.size(1), w.size(1), dtype=torch.float64)
    for share, mean, covariance, has_bias in places:
        m, c = mean.double(), covariance.double()
        products += share * (c if has_bias else c + m[:, None] * m)
    shift = ridge * products.diagonal().mean()
    v = torch.zeros_like(p)
    for i in range(len(p)):
        s = mask[i].nonzero().flatten()
        a = products[s][:, s] + shift * torch.eye(len(s), dtype=torch.float64)
        b = products[s] @ w[i] + shift * p[i, s]
        v[i, s] = torch.linalg.lstsq(a, b[:, None], driver="gelsd").solution[:, 0]
    return v, [(w - v) @ mean.double() * has_bias for _, mean, _, has_bias in places]


def output_error(
    change: Tensor, bias: Tensor, places: list[tuple[float, Tensor, Tensor, bool]]
) -> Tensor:
    """The mean square of the change of each unit's output, with ``bias`` added at all places."""
    change, total = change.double(), torch.zeros(len(change), dtype=torch.float64)
    for share, mean, covariance, _ in places:
        apart = change @ mean.double() + bias
        total += share * (((change @ covariance.double()) * change).sum(dim=1) + apart**2)
    return total
