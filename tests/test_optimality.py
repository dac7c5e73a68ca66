"""What the docstrings call optimal, held against every other choice.

Brute force does not go through all masks of a network at once, but through all masks of every unit;
the best of each size are then combined in every way (`best_total`), which comes to the same.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import torchalignprune as tap
from models import holder, mask_list, pairs


def alignment(p: Tensor, r: Tensor) -> Tensor:
    """Of every row of p with that of r, 0 where one is zero."""
    sizes = p.norm(dim=-1) * r.norm(dim=-1)
    return torch.where(sizes > 0, (p * r).sum(dim=-1) / sizes, 0)


def every_mask(n: int) -> Tensor:
    return torch.tensor(list(itertools.product((0.0, 1.0), repeat=n)), dtype=torch.float64)


def best_by_size(value: Callable[[Tensor], Tensor], n: int) -> list[float]:
    """The highest value among the masks of 0, 1, ..., n entries."""
    masks = every_mask(n)
    values, sizes = value(masks), masks.sum(dim=1)
    return [float(values[sizes == k].max()) for k in range(n + 1)]


def best_total(units: list[list[float]], kept: int) -> float:
    """The highest sum, one entry from each list, where the places add up to `kept`."""
    totals = {0: 0.0}
    for unit in units:
        combined: dict[int, float] = {}
        for size, total in totals.items():
            for k, value in enumerate(unit):
                if size + k <= kept:
                    combined[size + k] = max(combined.get(size + k, -float("inf")), total + value)
        totals = combined
    return totals[kept]


def problem(seed: int, biggest: int = 7) -> tuple[list[Tensor], int, torch.Generator]:
    """One to three weights of one to three units each, scales apart, and how many entries stay."""
    generator = torch.Generator().manual_seed(seed)

    def integer(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    weights = []
    for _ in range(integer(1, 3)):
        rows, columns = integer(1, 3), integer(1, biggest)
        weights.append(normal(rows, columns) * normal(rows, 1).exp() * normal(1).exp())
    size = sum(w.numel() for w in weights)
    return weights, integer(0, size), generator


def pruned(weights: list[Tensor], kept: int, **options: object) -> list[Tensor]:
    """The weights times the masks of AlignedMagnitude."""
    params = pairs(holder(*weights))
    size = sum(w.numel() for w in weights)
    tap.global_unstructured(params, tap.AlignedMagnitude, amount=size - kept, **options)
    masks = mask_list(params)
    assert sum(int(mask.sum()) for mask in masks) == kept
    return [w * mask for w, mask in zip(weights, masks, strict=True)]


def total_alignment(weights: list[Tensor], references: list[Tensor]) -> float:
    return sum(float(alignment(p, r).sum()) for p, r in zip(weights, references, strict=True))


# r = w, cosine


def test_cosine_masks_are_optimal_among_all_masks() -> None:
    for seed in range(300):
        weights, kept, _ = problem(seed)
        units = [
            best_by_size(lambda masks, unit=unit: alignment(masks * unit, unit), len(unit))
            for weight in weights
            for unit in weight
        ]
        reached = total_alignment(pruned(weights, kept), weights)
        assert reached == pytest.approx(best_total(units, kept), abs=1e-9), f"seed {seed}"


def test_cosine_masks_with_units_in_are_optimal_among_all_masks() -> None:
    for seed in range(100):
        weights, kept, _ = problem(seed, biggest=4)
        columns = [weight.t() for weight in weights]
        units = [
            best_by_size(lambda masks, unit=unit: alignment(masks * unit, unit), len(unit))
            for weight in columns
            for unit in weight
        ]
        left = [p.t() for p in pruned(weights, kept, units="in")]
        assert total_alignment(left, columns) == pytest.approx(best_total(units, kept), abs=1e-9)


def test_cosine_masks_with_input_norms_are_optimal_for_the_scaled_weights() -> None:
    for seed in range(100):
        weights, kept, generator = problem(seed)
        norms = [torch.rand(w.size(1), generator=generator).double() + 0.1 for w in weights]
        scaled = [w * n for w, n in zip(weights, norms, strict=True)]
        units = [
            best_by_size(lambda masks, unit=unit: alignment(masks * unit, unit), len(unit))
            for weight in scaled
            for unit in weight
        ]
        left = pruned(weights, kept, input_norms=norms)
        reached = total_alignment([p * n for p, n in zip(left, norms, strict=True)], scaled)
        assert reached == pytest.approx(best_total(units, kept), abs=1e-9)


def test_cosine_masks_on_top_of_earlier_ones_are_optimal_among_what_is_left() -> None:
    for seed in range(100):
        weights, _, generator = problem(seed)
        model = holder(*weights)
        params = pairs(model)
        for module, name in params:
            prune.random_unstructured(module, name, amount=0.3)
        before = mask_list(params)
        units = [
            best_by_size(
                lambda masks, unit=unit, alive=alive: alignment(masks * unit * alive, unit),
                len(unit),
            )
            for weight, mask in zip(weights, before, strict=True)
            for unit, alive in zip(weight, mask, strict=True)
        ]
        alive = sum(int(mask.sum()) for mask in before)
        kept = int(torch.randint(0, alive + 1, (), generator=generator))
        tap.global_unstructured(params, tap.AlignedMagnitude, amount=alive - kept)
        left = [w * mask for w, mask in zip(weights, mask_list(params), strict=True)]
        # Entries that are pruned already add nothing, so a larger mask is worth no less: what
        # `best_total` finds for `kept` entries is reached with entries that are still there.
        assert total_alignment(left, weights) == pytest.approx(best_total(units, kept), abs=1e-9)


def lamp(weight: Tensor) -> Tensor:
    """w^2 over the sum of the squares that are not smaller (Lee 2021), written anew."""
    squares = weight.flatten() ** 2
    not_smaller = (squares[None, :] >= squares[:, None]).to(squares.dtype)
    return squares / (not_smaller @ squares)


def highest(scores: Tensor, kept: int) -> Tensor:
    return torch.zeros_like(scores).scatter(0, scores.argsort(descending=True)[:kept], 1)


def test_cosine_masks_are_never_below_magnitude_lamp_or_an_exchange() -> None:
    torch.set_num_threads(1)  # nothing here is worth waking up others for
    shapes = ((12, 10), (6, 12), (4, 6))
    unit = torch.repeat_interleave(torch.arange(22), torch.tensor([10] * 12 + [12] * 6 + [6] * 4))
    of_unit = torch.nn.functional.one_hot(unit).double()
    above = {"magnitude": 0, "lamp": 0, "exchange": 0}
    for seed in range(1000):
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int, generator: torch.Generator = generator) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        weights = [normal(*shape) * normal(shape[0], 1).exp() for shape in shapes]
        w = torch.cat([weight.flatten() for weight in weights])
        kept = int(torch.randint(1, len(w), (), generator=generator))
        ours = torch.cat([p.flatten() != 0 for p in pruned(weights, kept)]).double()

        # 20 times another kept entry for another pruned one.
        stays, goes = ours.nonzero().flatten(), (ours == 0).nonzero().flatten()
        out = stays[torch.randint(len(stays), (20,), generator=generator)]
        back = goes[torch.randint(len(goes), (20,), generator=generator)]
        exchanged = ours.repeat(20, 1)
        exchanged[torch.arange(20), out] = 0
        exchanged[torch.arange(20), back] = 1

        by_lamp = highest(torch.cat([lamp(weight) for weight in weights]), kept)
        masks = torch.stack([ours, highest(w.abs(), kept), by_lamp, *exchanged])
        assert bool((masks.sum(dim=1) == kept).all())
        p = masks * w
        sizes = ((p * p) @ of_unit).sqrt() * ((w * w) @ of_unit).sqrt()
        dots = (p * w) @ of_unit
        total = torch.where(sizes > 0, dots / sizes.clamp(min=1e-300), 0).sum(dim=1)
        assert bool((total[0] >= total[1:] - 1e-9).all()), f"seed {seed}"
        better = total[0] > total[1:] + 1e-9
        above["magnitude"] += bool(better[0])
        above["lamp"] += bool(better[1])
        above["exchange"] += bool(better[2:].all())
    # If the others were the same masks, all this would say nothing.
    assert min(above.values()) > 900, above


def test_no_unit_dies_while_another_has_an_entry_worth_less_than_its_best() -> None:
    for seed in range(50):
        weights, kept, _ = problem(seed)
        left = pruned(weights, kept)
        gains = [tap.ops.cosine_gains(w) for w in weights]
        stays = torch.cat([g[p != 0] for g, p in zip(gains, left, strict=True)])
        dead = [g[p.abs().sum(dim=1) == 0] for g, p in zip(gains, left, strict=True)]
        best_of_dead = torch.cat([g.amax(dim=1) for g in dead])
        if len(stays) and len(best_of_dead):
            assert float(best_of_dead.max()) <= float(stays.min())


# Any r, frobenius


@pytest.mark.parametrize("departure", [0.0, 0.3, 1.0, 3.0])
def test_frobenius_masks_are_optimal_for_any_reference(departure: float) -> None:
    """The summed distortion, |P - R|^2 / |R|^2 of every weight."""
    for seed in range(100):
        weights, kept, generator = problem(seed, biggest=4)
        noise = [torch.randn(w.shape, generator=generator).double() for w in weights]
        references = [
            w + departure * e * w.abs().mean() for w, e in zip(weights, noise, strict=True)
        ]
        units = [
            best_by_size(
                lambda masks, w=w, r=r: (
                    -((masks * w.flatten() - r.flatten()) ** 2).sum(dim=1) / (r**2).sum()
                ),
                w.numel(),
            )
            for w, r in zip(weights, references, strict=True)
        ]
        options = {} if departure == 0 else {"reference": references}
        left = pruned(weights, kept, alignment="frobenius", **options)
        distortion = sum(
            float(((p - r) ** 2).sum() / (r**2).sum())
            for p, r in zip(left, references, strict=True)
        )
        assert -distortion == pytest.approx(best_total(units, kept), abs=1e-9), f"seed {seed}"


# Any r, cosine: not exact


@pytest.mark.parametrize("departure", [0.1, 0.3, 1.0, 3.0, None])
def test_cosine_with_a_reference_reaches_99_percent_of_the_optimum(
    departure: float | None,
) -> None:
    """r = w + departure * (normal noise as large as the unit); None: r has nothing to do with w.

    The ratio of the summed alignments over 200 problems.
    """
    ours = best = 0.0
    for seed in range(200):
        weights, kept, generator = problem(seed)
        noise = [
            torch.randn(w.shape, generator=generator).double()
            * w.norm(dim=1, keepdim=True)
            / w.size(1) ** 0.5
            for w in weights
        ]
        references = noise
        if departure is not None:
            references = [w + departure * e for w, e in zip(weights, noise, strict=True)]
        units = [
            best_by_size(lambda masks, w=w, r=r: alignment(masks * w, r), len(w))
            for weight, ref in zip(weights, references, strict=True)
            for w, r in zip(weight, ref, strict=True)
        ]
        ours += total_alignment(pruned(weights, kept, reference=references), references)
        best += best_total(units, kept)
    assert ours <= best + 1e-9
    assert ours >= 0.99 * best, f"{ours / best:.4f} of the optimum"


# n of m


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 4), (1, 2), (4, 4), (2, 5)])
def test_n_of_m_masks_are_optimal_for_the_weights_themselves(n: int, m: int) -> None:
    torch.manual_seed(0)
    of_group = [mask for mask in every_mask(m) if int(mask.sum()) == n]
    masks = torch.stack([torch.cat(two) for two in itertools.product(of_group, repeat=2)])
    layer = nn.Linear(2 * m, 20).double()
    weight = layer.weight.detach().clone()
    tap.AlignedNM.apply(layer, "weight", n=n, m=m)
    for p, w in zip(layer.weight.detach(), weight, strict=True):
        best = alignment(masks * w, w.expand(len(masks), -1)).max()
        torch.testing.assert_close(alignment(p, w), best)
