"""Matching the 3072 units of one layer with those of another, against optimal assignment.

    python benchmarks/matching.py

Once with units drawn independently, whose similarities are all about alike, and once with the same
units permuted and with noise added. The greedy matching is checked first, by going through all
similarities in descending order. Peers that are not installed are left out (pip install scipy lapx
torch-linear-assignment). Prints tables and writes results/matching.json.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
from collections.abc import Callable
from typing import Any

import numpy
import torch
from torch import Tensor

from common import median, save, seconds
from torchalignprune import match_units, ops

UNITS, LENGTH = 3072, 768
NOISE = 0.3
Solve = Callable[[Tensor], Tensor]


def pair(kind: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(UNITS, LENGTH, generator=generator) for _ in range(2))
    if kind == "permuted":
        b = a[torch.randperm(UNITS, generator=generator)] + NOISE * b
    return a, b


def similarities(a: Tensor, b: Tensor) -> Tensor:
    a, b = (torch.nn.functional.normalize(units, dim=1) for units in (a, b))
    return a @ b.t()


def check(similarity: Tensor, index: Tensor) -> None:
    """Go through all entries in descending order until every row has its column."""
    order = numpy.argsort(-similarity.numpy(), axis=None, kind="stable")
    found, taken = [-1] * UNITS, [False] * UNITS
    left = UNITS
    for place in order:
        row, column = divmod(int(place), UNITS)
        if found[row] < 0 and not taken[column]:
            found[row], taken[column] = column, True
            left -= 1
            if left == 0:
                break
    assert found == index.tolist(), "not the greedy matching"


def total(similarity: Tensor, index: Tensor) -> float:
    assert torch.equal(index.sort().values, torch.arange(UNITS)), "not one to one"
    return float(similarity.gather(1, index[:, None]).sum(dtype=torch.float64))


def peers() -> tuple[dict[str, Solve], dict[str, str], list[str]]:
    """The solvers, their versions, and what is missing."""
    solvers: dict[str, Solve] = {}
    missing = []
    try:
        from scipy.optimize import linear_sum_assignment

        def by_scipy(similarity: Tensor) -> Tensor:
            return torch.from_numpy(linear_sum_assignment(similarity.numpy(), maximize=True)[1])

        solvers["scipy linear_sum_assignment"] = by_scipy
    except ImportError:
        missing.append("scipy")
    try:
        import lap

        def by_lap(name: str, similarity: Tensor) -> Tensor:
            # These minimise. Their second to last result is the index.
            found = getattr(lap, name)(-similarity.numpy())
            return torch.from_numpy(numpy.asarray(found[-2])).long()

        solvers["lapx lapjv"] = functools.partial(by_lap, "lapjv")
        solvers["lapx lapjvc"] = lambda similarity: torch.from_numpy(
            numpy.asarray(lap.lapjvc(-similarity.numpy())[-1])
        ).long()
    except ImportError:
        missing.append("lapx")
    try:
        from torch_linear_assignment import batch_linear_assignment

        # On the CPU this converts the matrix and calls scipy.
        solvers["torch-linear-assignment"] = lambda similarity: batch_linear_assignment(
            -similarity[None]
        )[0]
    except ImportError:
        missing.append("torch-linear-assignment")
    versions = {
        name: importlib.metadata.version(name)
        for name in ("scipy", "lapx", "torch-linear-assignment")
        if name not in missing
    }
    return solvers, versions, missing


def similarity_given(solvers: dict[str, Solve], kind: str) -> dict[str, Any]:
    similarity = similarities(*pair(kind))
    index = ops.greedy_match(similarity)
    check(similarity, index)
    own_s = seconds(lambda: ops.greedy_match(similarity), 15)
    found: dict[str, Any] = {}
    for name, solve in solvers.items():
        reached = total(similarity, solve(similarity))
        found[name] = {"total": reached, "s": seconds(functools.partial(solve, similarity), 3)}
    own_s += seconds(lambda: ops.greedy_match(similarity), 15)
    own, own_total = median(own_s), total(similarity, index)
    best = max((peer["total"] for peer in found.values()), default=None)
    # All peers are optimal, up to rounding.
    assert best is None or all(best - peer["total"] < 1e-4 * best for peer in found.values())
    share = None if best is None else own_total / best
    print(f"{kind} units, similarity given")
    shown = "" if share is None else f"   total {share:.4f} of the optimum"
    print(f"  {'greedy_match':28} {own:8.4f} s{shown}")
    for name, peer in found.items():
        peer["ratio"] = median(peer["s"]) / own
        print(f"  {name:28} {median(peer['s']):8.4f} s   {peer['ratio']:6.1f} x")
    return {
        "greedy_match_s": {"median": own, "all": own_s},
        "share_of_optimum": share,
        "peers": found,
    }


def from_weights(kind: str) -> dict[str, Any]:
    a, b = pair(kind)
    product_s, matching_s = [], []
    for _ in range(15):  # in turn, so that a slow phase of the machine hits both
        product_s += seconds(lambda: a @ b.t(), 1)
        matching_s += seconds(lambda: match_units(a, b), 1)
    product, matching = median(product_s[1:]), median(matching_s[1:])
    print(f"{kind} units, from weights to matching")
    print(f"  {'matrix product':28} {product:8.4f} s")
    print(f"  {'match_units':28} {matching:8.4f} s   {matching / product:6.2f} x")
    return {"product_s": product_s, "match_units_s": matching_s, "ratio": matching / product}


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    solvers, versions, missing = peers()
    print(f"{UNITS} x {UNITS} units of {LENGTH}, float32, {torch.get_num_threads()} threads")
    for name in missing:
        print(f"{name} is not installed: left out")
    kinds = ("random", "permuted")
    given = {kind: similarity_given(solvers, kind) for kind in kinds}
    weights = {kind: from_weights(kind) for kind in kinds}
    save(
        "matching",
        {
            "units": UNITS,
            "length": LENGTH,
            "noise": NOISE,
            "versions": versions,
            "left_out": missing,
            "similarity_given": given,
            "from_weights": weights,
        },
    )


if __name__ == "__main__":
    main()
