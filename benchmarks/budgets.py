"""The budget for pruning when the layers' inputs are known: global, per layer or per unit.

    python benchmarks/budgets.py

AlignedMagnitude with input norms on all-MiniLM-L6-v2, pruned once, with and without realigned
weights. The figure is the mean cosine between the pruned and the dense encoder's sentence
embeddings. Budgets with a different share for every layer come from curves measured on the
calibration sentences. One half of the evaluation sentences chooses among the budgets, the other
half gives the figure of the one chosen. Prints tables and writes results/budgets.json.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy
import torch
from torch import nn

import torchalignprune as tap
from common import save
from sentences import Encoder, cosine, embed
from torchalignprune.demo import bootstrap_interval, prose_sentences

SPARSITIES = (0.5, 0.6, 0.7, 0.8)
POINTS = (0.3, 0.5, 0.7, 0.9, 1.0)
GRID = numpy.linspace(0, 1, 101)
Params = tap.PrunableParameters
Shares = list[float]
Masks = Callable[[Params, tap.Calibration], None]


def aligned(
    params: Params, known: tap.Calibration, sparsity: float, budget: str, **options: Any
) -> None:
    tap.global_unstructured(
        params, tap.AlignedMagnitude, amount=sparsity, input_norms=known, budget=budget, **options
    )


def by_share(params: Params, known: tap.Calibration, shares: Shares) -> None:
    """Prunes every layer by its share, and every unit of a layer alike."""
    for pair, share in zip(params, shares, strict=True):
        aligned([pair], known, share, "unit")


def rooted(params: Params, known: tap.Calibration, sparsity: float) -> None:
    """A global budget that weights a unit's alignment by the root of its number of weights."""
    scores = {}
    for module, name in params:
        weight = getattr(module, name).detach()
        gains = tap.ops.cosine_gains(weight, column_scale=known[module, name].norms)
        scores[module, name] = gains * weight.size(1) ** 0.5
    tap.global_unstructured(params, tap.Magnitude, importance_scores=scores, amount=sparsity)


def shares_of(params: Params) -> Shares:
    return [1 - float((getattr(*pair) != 0).double().mean()) for pair in params]


def shares_by(encoder: Encoder, known: tap.Calibration, masks: Masks) -> Shares:
    """The shares of the layers that these masks prune."""
    _, params, own = encoder.copy(known)
    masks(params, own)
    return shares_of(params)


def allocate(curves: numpy.ndarray, sizes: Sequence[int], sparsity: float) -> Shares:
    """The shares with the smallest sum of losses, given each layer's loss at each of POINTS.

    Takes the cheapest steps first, along the lower convex hulls of the curves.
    """
    steps = []
    for layer, curve in enumerate(curves):
        hull = lower_hull(numpy.interp(GRID, (0, *POINTS), (0, *numpy.maximum.accumulate(curve))))
        for i in range(1, len(GRID)):
            steps.append(((hull[i] - hull[i - 1]) / sizes[layer], i, layer))
    shares = [0.0] * len(sizes)
    left = sparsity * sum(sizes)
    for _, i, layer in sorted(steps):
        step = min(left, (GRID[i] - GRID[i - 1]) * sizes[layer])
        shares[layer] += step / sizes[layer]
        left -= step
        if left <= 0:
            break
    return [min(share, 1.0) for share in shares]


def lower_hull(values: numpy.ndarray) -> numpy.ndarray:
    corners = [0]
    for i in range(1, len(values)):
        while len(corners) > 1:
            a, b = corners[-2:]
            if (values[b] - values[a]) * (i - a) <= (values[i] - values[a]) * (b - a):
                break
            corners.pop()
        corners.append(i)
    return numpy.interp(range(len(values)), corners, values[corners])


def change(dense: torch.Tensor, pruned: torch.Tensor, found: Any) -> torch.Tensor:
    """For each output, the mean square of its change by pruning, and of the output itself."""
    moments = found.second_moment
    apart = pruned - dense
    return torch.stack(
        [((apart @ moments) * apart).sum(dim=1), ((dense @ moments) * dense).sum(dim=1)]
    )


def measure(
    encoder: Encoder, known: tap.Calibration, sentences: Sequence[str]
) -> tuple[numpy.ndarray, numpy.ndarray]:
    """The loss of each layer at each of POINTS, when it alone is pruned.

    Returns:
        The relative error of its outputs, and 1 - the mean cosine of the embeddings, both of shape
        ``(layers, points)``.
    """
    batches = encoder.batches(sentences)
    embeddings = embed(encoder.model, batches)
    errors, losses = [], []
    for i in range(len(encoder.params)):
        for point in POINTS:
            model, params, own = encoder.copy(known)
            aligned(params[i : i + 1], own, point, "unit")
            pair = encoder.params[i]
            apart = change(getattr(*pair).detach(), getattr(*params[i]).detach(), known[pair])
            errors.append(float(apart[0].sum() / apart[1].sum()))
            losses.append(1 - float(cosine(model, batches, embeddings).mean()))
    shape = (len(encoder.params), len(POINTS))
    return numpy.array(errors).reshape(shape), numpy.array(losses).reshape(shape)


def kind_of(name: str) -> str:
    return name.split(".", 3)[-1].removesuffix(".weight")


def anatomy(encoder: Encoder, known: tap.Calibration, sparsity: float) -> list[dict[str, Any]]:
    """By kind of layer: what the global budget prunes of it, and the error of its outputs."""
    found: dict[str, dict[str, Any]] = {}
    for budget in ("global", "unit"):
        _, params, own = encoder.copy(known)
        aligned(params, own, sparsity, budget)
        for name, pair, pruned in zip(params.names, encoder.params, params, strict=True):
            p, w = getattr(*pruned).detach(), getattr(*pair).detach()
            apart = change(w, p, known[pair])
            row = found.setdefault(kind_of(name), {"kind": kind_of(name)})
            kept = (p != 0).double().mean(dim=1)
            squares = known[pair].norms.double().square()
            for key, value in {
                "sparsity": 1 - float(kept.mean()),
                "least_unit": 1 - float(kept.max()),
                "most_unit": 1 - float(kept.min()),
                "output_error": float(apart[0].sum() / apart[1].sum()),
                # The effective number of inputs (participation ratio), as a share of all.
                "features": float(squares.sum() ** 2 / squares.square().sum()) / len(squares),
            }.items():
                row.setdefault(f"{budget}_{key}", []).append(value)
    return [
        {key: v if isinstance(v, str) else sum(v) / len(v) for key, v in row.items()}
        for row in found.values()
    ]


def budgets_for(
    encoder: Encoder,
    known: tap.Calibration,
    errors: numpy.ndarray,
    losses: numpy.ndarray,
    sparsity: float,
) -> dict[str, Masks]:
    sizes = [getattr(*pair).numel() for pair in encoder.params]
    budgets: dict[str, Masks] = {
        budget: functools.partial(aligned, sparsity=sparsity, budget=budget)
        for budget in ("global", "layer", "unit")
    }
    budgets["global, frobenius"] = functools.partial(
        aligned, sparsity=sparsity, budget="global", alignment="frobenius"
    )
    budgets["global, by the root of the units' sizes"] = functools.partial(
        rooted, sparsity=sparsity
    )
    shares = {
        f"shares of: {label}": shares_by(encoder, known, masks)
        for label, masks in budgets.items()
        if label.startswith("global")
    }
    shares["shares by the outputs' errors"] = allocate(errors, sizes, sparsity)
    shares["shares by the embeddings' losses"] = allocate(losses, sizes, sparsity)
    for label in ("shares of: global", "shares by the embeddings' losses"):
        shares[f"half way to {label}"] = [(own + sparsity) / 2 for own in shares[label]]
    for label, each in shares.items():
        budgets[f"{label}, per unit"] = functools.partial(by_share, shares=each)
    return budgets


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sentences", type=int, default=256, help="to evaluate, and to calibrate")
    parser.add_argument("--sparsity", type=float, nargs="+", default=list(SPARSITIES))
    options = parser.parse_args()
    prose, n = prose_sentences(), options.sentences
    encoder = Encoder()
    halves = [encoder.batches(prose[: n // 2]), encoder.batches(prose[n // 2 : n])]
    dense = [embed(encoder.model, half) for half in halves]
    known = encoder.calibrate(prose[n : 2 * n])
    sizes = [getattr(*pair).numel() for pair in encoder.params]
    errors, losses = measure(encoder, known, prose[n : n + n // 4])

    tables = {}
    for sparsity in (0.5, 0.7):
        tables[f"{sparsity:.0%}"] = anatomy(encoder, known, sparsity)
        print(f"\n{sparsity:.0%}: what a global budget prunes, and the error of the outputs")
        for row in tables[f"{sparsity:.0%}"]:
            print(
                f"{row['kind']:28} sparsity {row['global_sparsity']:.2f} (units "
                f"{row['global_least_unit']:.2f} to {row['global_most_unit']:.2f})  error: global "
                f"{row['global_output_error']:.3f}, per unit {row['unit_output_error']:.3f}; "
                f"effective inputs {row['unit_features']:.2f} of all"
            )

    results = []
    for sparsity in options.sparsity:
        budgets = budgets_for(encoder, known, errors, losses, sparsity)
        for label, masks in budgets.items():
            model, params, own = encoder.copy(known)
            masks(params, own)
            zeros = sum(int((getattr(*pair) == 0).sum()) for pair in params)
            assert abs(zeros / sum(sizes) - sparsity) < 0.004, (label, zeros / sum(sizes))
            row: dict[str, Any] = {"budget": label, "sparsity": sparsity}
            row["shares"] = [round(share, 3) for share in shares_of(params)]
            for moved in ("plain", "realigned"):
                if moved == "realigned":
                    tap.realign(params, own)
                row[moved] = judge(model, halves, dense)
            results.append(row)
            print(
                f"{sparsity:.0%}  {label:52} "
                + "   ".join(
                    f"{moved} {row[moved]['choosing']:.3f} {row[moved]['judging']:.3f}"
                    for moved in ("plain", "realigned")
                ),
                flush=True,
            )
    chosen = []
    for sparsity in options.sparsity:
        for moved in ("plain", "realigned"):
            rows = [row for row in results if row["sparsity"] == sparsity]
            best = max(rows, key=lambda row: row[moved]["choosing"])
            per_unit = next(row for row in rows if row["budget"] == "unit")
            chosen.append(
                {
                    "sparsity": sparsity,
                    "weights": moved,
                    "budget": best["budget"],
                    "judging": best[moved]["judging"],
                    "per_unit": per_unit[moved]["judging"],
                    "interval": best[moved]["interval"],
                }
            )
            print(chosen[-1])
    save(
        "budgets",
        {
            "sentences": {"judged": n, "calibration": n, "for the losses": n // 4},
            "layers": encoder.params.names,
            "points": POINTS,
            "output_errors": errors.round(5).tolist(),
            "embedding_losses": losses.round(6).tolist(),
            "anatomy": tables,
            "results": results,
            "chosen": chosen,
        },
    )


def judge(model: nn.Module, halves: Sequence[Any], dense: Sequence[torch.Tensor]) -> dict[str, Any]:
    choosing, judging = (
        cosine(model, half, embeddings) for half, embeddings in zip(halves, dense, strict=True)
    )
    return {
        "choosing": float(choosing.mean()),
        "judging": float(judging.mean()),
        "interval": bootstrap_interval(judging),
    }


if __name__ == "__main__":
    main()
