"""Slow, plain counterparts of the operators and scores, in a few lines of torch and Python."""

from __future__ import annotations

import itertools
import math
import struct
from typing import Any

import numpy as np
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


def keys(scores: Tensor) -> list[int]:
    """The bits of each score as an integer that orders as the scores do."""
    letters = ("d", "Q", 64) if scores.dtype == torch.float64 else ("f", "I", 32)
    found = []
    for score in scores.flatten().tolist():
        (bits,) = struct.unpack(letters[1], struct.pack(letters[0], score + 0.0))
        sign = 1 << (letters[2] - 1)
        found.append(bits ^ (2 * sign - 1) if bits & sign else bits | sign)
    return found


def candidates(
    weights: list[Tensor],
    *,
    score: str = "magnitude",
    masks: list[Tensor | None] | None = None,
    references: list[Tensor | None] | None = None,
    row_scales: list[Tensor | None] | None = None,
    column_scales: list[Tensor | None] | None = None,
) -> list[dict[int, int]]:
    """The keys of each tensor's candidates by their flat index."""
    none = [None] * len(weights)
    dtype = torch.float64 if any(w.dtype == torch.float64 for w in weights) else torch.float32
    lists = (masks, references, row_scales, column_scales)
    found = []
    for w, m, r, row, column in zip(weights, *(own or none for own in lists), strict=True):
        alive = [True] * w.numel() if m is None else m.flatten().tolist()
        of_all = keys(scores(w, score, r, row, column, dtype))
        found.append({i: key for i, key in enumerate(of_all) if alive[i]})
    return found


def shard_counts(
    weights: list[Tensor], low: int, shift: int, bins: int, **options: Any
) -> list[int]:
    """Counts key by key; none of them is NaN's."""
    counts = [0] * (bins + 2)
    for key in (key for own in candidates(weights, **options) for key in own.values()):
        if key < low:
            counts[bins] += 1
        elif (key - low) >> shift < bins:
            counts[(key - low) >> shift] += 1
    return counts


def shard_ties(
    weights: list[Tensor], key: int, edges: list[list[int]], **options: Any
) -> list[int]:
    return [
        sum(start <= i < end and other == key for i, other in own.items())
        for own, at in zip(candidates(weights, **options), edges, strict=True)
        for start, end in itertools.pairwise(at)
    ]


def shard_masks(
    weights: list[Tensor], key: int, splits: list[int], **options: Any
) -> list[list[bool]]:
    return [
        [i in own and (own[i] > key or (own[i] == key and i >= split)) for i in range(w.numel())]
        for w, own, split in zip(weights, candidates(weights, **options), splits, strict=True)
    ]


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


def alignment_report(p: Tensor, r: Tensor) -> dict[str, float | int | None]:
    """The figures of a matrix outputs x inputs (x kernel), unit by unit."""
    p, r = p.double(), r.double()
    figures: dict[str, float | int | None] = {
        "entries": p.numel(),
        "zeros": int((p == 0).sum()),
        "sparsity": float((p == 0).double().mean()),
        "distortion": float(((p - r) ** 2).sum() / (r**2).sum()) if r.any() else None,
    }
    for suffix, dim in (("", 0), ("_in", 1)):
        units = [(p.select(dim, i), r.select(dim, i)) for i in range(p.shape[dim])]
        aligned = sorted(alignment(*unit) for unit in units if unit[1].any())
        spread: dict[str, float | None] = dict.fromkeys(("mean", "median", "p5", "worst"))
        if aligned:
            spread["mean"] = math.fsum(aligned) / len(aligned)
            spread["median"], spread["p5"] = (percentile(aligned, q) for q in (0.5, 0.05))
            spread["worst"] = aligned[0]
        figures |= {f"{what}_alignment{suffix}": value for what, value in spread.items()}
        dead = sum(bool(unit[1].any() and not unit[0].any()) for unit in units)
        figures[f"dead_units_{'in' if suffix else 'out'}"] = dead
    moved = []
    for own, itself in zip(p, r, strict=True):
        if own.any() and itself.any():
            best = max(alignment(own, other) for other in r if other.any())
            moved.append(best > alignment(own, itself) + 1e-9)
    figures["moved_share"] = sum(moved) / len(moved) if moved else None
    return figures


def percentile(ordered: list[float], share: float) -> float:
    """Interpolated linearly between the two nearest."""
    at = share * (len(ordered) - 1)
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


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
    """Adds, a quarter as many as are chosen at a time, those that keep the chosen aligned best."""
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

    Equal steps fall, in their order, by up to a thousandth of the distance to the next one.
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


def units_first(tensor: Tensor, dim: int) -> Tensor:
    """A row for each unit; a tensor of at most one dimension is one."""
    return tensor.reshape(1, -1) if tensor.dim() < 2 else tensor.movedim(dim, 0).flatten(1)


def unit_products(
    weight: Tensor,
    mask: Tensor | None = None,
    reference: Tensor | None = None,
    index: Tensor | None = None,
    dim: int = 0,
) -> Tensor:
    """<p, p>, <p, r> and <r, r> of one tensor's units, where p = mask * weight."""
    kept = weight if mask is None else torch.where(mask, weight, 0)
    p = units_first(kept.double(), dim)
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    r = weight.detach() if reference is None else reference.to(wide)
    r = units_first(r.double(), dim)
    r = r if index is None else r[index]
    return torch.stack([(p * p).sum(dim=1), (p * r).sum(dim=1), (r * r).sum(dim=1)])


def unit_combination(
    weight: Tensor,
    coefficients: Tensor,
    mask: Tensor | None = None,
    reference: Tensor | None = None,
    index: Tensor | None = None,
    dim: int = 0,
) -> Tensor:
    """mask * (a r + b w), units first, in float64."""
    w = units_first(weight.double(), dim)
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    r = units_first((weight if reference is None else reference.to(wide)).double(), dim)
    r = r if index is None else r[index]
    kept = torch.ones_like(w) if mask is None else units_first(mask, dim)
    return (coefficients[0].unsqueeze(1) * r + coefficients[1].unsqueeze(1) * w) * kept


def cosine_alignment(
    pairs: list[tuple[Tensor, Tensor]], weights: list[float] | None = None
) -> Tensor:
    """One minus the mean cosine of (pruned, reference) matrices with a row per unit, averaged."""
    total, whole = torch.zeros((), dtype=torch.float64), 0.0
    for (p, r), weight in zip(pairs, weights or [1.0] * len(pairs), strict=True):
        counted = r.double().norm(dim=1) > 0
        if counted.any():
            cosine = torch.nn.functional.cosine_similarity(p.double(), r.double(), dim=1, eps=0)
            cosine = torch.where(p.double().norm(dim=1) > 0, cosine, 0)
            total = total + weight * (1 - cosine[counted]).mean()
            whole += weight
    return total / whole if whole else total


def frobenius_alignment(
    pairs: list[tuple[Tensor, Tensor]], normalize: bool = True, weights: list[float] | None = None
) -> Tensor:
    """|P - R|^2 / |R|^2, averaged."""
    total, whole = torch.zeros((), dtype=torch.float64), 0.0
    for (p, r), weight in zip(pairs, weights or [1.0] * len(pairs), strict=True):
        size = float((r.double() ** 2).sum()) if normalize else 1.0
        if size > 0:
            total = total + weight * ((p.double() - r.double()) ** 2).sum() / size
            whole += weight
    return total / whole if whole else total


def greedy_match(similarity: Tensor) -> Tensor:
    """Sort the entries, and go through them one after the other."""
    rows, columns = similarity.shape[-2:]
    matrices = similarity.reshape(math.prod(similarity.shape[:-2]), rows * columns)
    found = []
    for matrix in matrices:
        # The sort is stable, so that equals stay in the order of rows, then columns.
        order = torch.sort(matrix, descending=True, stable=True).indices
        index, taken = [-1] * rows, set()
        for place in order[matrix[order] > -math.inf].tolist():
            row, column = divmod(place, columns)
            if index[row] < 0 and column not in taken:
                index[row] = column
                taken.add(column)
        found.append(index)
    return torch.tensor(found, dtype=torch.int64).reshape(similarity.shape[:-1])


def match_in_order(rows: list[int], columns: list[int]) -> list[bool]:
    kept: list[bool] = []
    for i, (row, column) in enumerate(zip(rows, columns, strict=True)):
        before = [j for j in range(i) if kept[j]]
        kept.append(all(rows[j] != row and columns[j] != column for j in before))
    return kept


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


def apply_mask(tensor: Tensor, mask: Tensor) -> Tensor:
    """Entry by entry."""
    kept = [value if keep else 0.0 for value, keep in zip(flat(tensor), flat(mask), strict=True)]
    return torch.tensor(kept, dtype=torch.float64).to(tensor.dtype).reshape(tensor.shape)


def flat(tensor: Tensor) -> list[float]:
    return list(tensor.double().reshape(-1).tolist())


def resampled_sums(rows: list[list[int]], drawn: list[list[int]]) -> list[list[int]]:
    """The column sums over the rows of each draw."""
    return [
        [sum(rows[i][column] for i in times) for column in range(len(rows[0]))] for times in drawn
    ]


def spans(labels: list[str]) -> set[tuple[str, int, int]]:
    """The strict IOB2 entities among all stretches of words of a sentence."""
    found = set()
    for start in range(len(labels)):
        for end in range(start + 1, len(labels) + 1):
            kind = labels[start][2:]
            inside = all(label == f"I-{kind}" for label in labels[start + 1 : end])
            ends = end == len(labels) or labels[end] != f"I-{kind}"
            if labels[start].startswith("B-") and inside and ends:
                found.add((kind, start, end))
    return found


def pack(weight: Tensor) -> list[list[int] | None]:
    """The bits, the values as integers, and the signs of the zeros, None if all are positive."""
    size = 8 * weight.element_size()
    kinds = {16: torch.int16, 32: torch.int32, 64: torch.int64}
    words = weight.reshape(-1).view(kinds[size]).tolist()
    zeros = (0, -(1 << size - 1))

    def packed(bits: list[bool]) -> list[int]:
        parts = [bits[start : start + 8] for start in range(0, len(bits), 8)]
        return [sum(bit << k for k, bit in enumerate(part)) for part in parts]

    signs = [word < 0 for word in words if word in zeros]
    return [
        packed([word not in zeros for word in words]),
        [word for word in words if word not in zeros],
        packed(signs) if any(signs) else None,
    ]


def retrieval_hits(a: Tensor, b: Tensor) -> list[bool]:
    """For each row of ``a``, whether no row of ``b`` is nearer than the one of the same index."""
    found = []
    for i in range(len(a)):
        nearest = max(range(len(b)), key=lambda j: float((a[i] * b[j]).sum()))
        found.append(nearest == i)
    return found


def translation_table(
    source: list[list[int]], target: list[list[int]], vocabulary: int, iterations: int
) -> Any:
    """IBM Model 1, link by link."""
    pairs = [
        (sorted({*a, vocabulary}), sorted(set(b))) for a, b in zip(source, target, strict=True)
    ]

    def spread(table: Any) -> Any:
        sums = table.sum(axis=1, keepdims=True)
        return np.divide(table, sums, out=np.zeros_like(table), where=sums > 0)

    table = np.zeros((vocabulary + 1, vocabulary))
    for f in range(vocabulary + 1):
        for e in range(vocabulary):
            both = sum(f in a and e in b for a, b in pairs)
            one = sum(f in a for a, _ in pairs) + sum(e in b for _, b in pairs)
            table[f, e] = 2 * both / one if both else 0
    for _ in range(iterations):
        table = spread(table)
        counts = np.zeros_like(table)
        for a, b in pairs:
            for e in b:
                total = sum(table[f, e] for f in a)
                for f in a:
                    counts[f, e] += table[f, e] / total
        table = counts
    return spread(table)[:vocabulary]
