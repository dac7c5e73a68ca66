"""Bounds on what units and parameters may lose, against trying all masks and plain loops."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import torchalignprune as tap
from models import mlp
from torchalignprune import schedules
from torchalignprune.limits import Limits
from torchalignprune.targets import Target


def chosen(
    limits: Limits, scores: list[Tensor], count: int, masks: list[Tensor | None] | None = None
) -> list[Tensor]:
    masks = masks or [None] * len(scores)
    targets = [
        Target(score, mask, f"t{i}")
        for i, (score, mask) in enumerate(zip(scores, masks, strict=True))
    ]
    return limits.masks(targets, scores, [0] * len(scores), count)


def test_examples() -> None:
    scores = [torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[5.0, 6.0]])]
    assert chosen(Limits(), scores, 3)[0].tolist() == [[False, False], [False, True]]
    assert chosen(Limits(min_unit=1), scores, 3)[0].tolist() == [[False, True], [False, True]]
    half = chosen(Limits(max_layer_sparsity=0.5), scores, 3)
    assert [m.tolist() for m in half] == [[[False, False], [True, True]], [[False, True]]]
    third = chosen(Limits(min_layer_sparsity=0.5), scores, 3)
    assert [m.tolist() for m in third] == [[[False, False], [True, True]], [[False, True]]]


def test_a_floor_is_not_above_what_is_asked_for_overall() -> None:
    scores = [torch.arange(1.0, 9.0).view(2, 4), torch.arange(9.0, 17.0).view(2, 4)]
    kept = chosen(Limits(min_layer_sparsity=0.75), scores, 4)
    assert [int(m.sum()) for m in kept] == [6, 6]


def test_unreachable() -> None:
    scores = [torch.arange(8.0).view(2, 4)]
    limits = Limits(max_layer_sparsity=0.5)
    message = r"leave 4 entries of t0 to prune, got 5: a sparsity of 0\.5000"
    with pytest.raises(ValueError, match=message):
        chosen(limits, scores, 5)
    with pytest.raises(ValueError, match="leave 8 entries of the 2 parameters to prune, got 9"):
        chosen(limits, scores * 2, 9)


def test_unreachable_in_one_layer() -> None:
    """With a budget for each layer the error says in which."""
    params = tap.prunable_parameters(mlp())
    with pytest.raises(ValueError, match=r"leave 16 entries of 2\.weight to prune, got 64"):
        tap.Pruner(
            params,
            tap.Magnitude,
            schedules.constant(0.5),
            budget="layer",
            max_layer_sparsity={"2": 0.125},
        )


def test_shares_that_rounding_puts_a_little_below_what_they_mean() -> None:
    assert int(0.29 * 100) == 28
    low, high = torch.arange(100.0).view(1, 100), torch.arange(100.0, 200.0).view(1, 100)
    assert int((~chosen(Limits(max_layer_sparsity=0.29), [low], 29)[0]).sum()) == 29
    kept = chosen(Limits(min_layer_sparsity=0.29), [low, high], 100)
    assert [int((~mask).sum()) for mask in kept] == [71, 29]


@given(st.data())
def test_no_other_masks_within_the_limits_keep_more(data: st.DataObject) -> None:
    shapes = data.draw(
        st.lists(st.sampled_from([(1, 2), (2, 2), (2, 3), (1, 4)]), min_size=1, max_size=2)
    )
    values = st.integers(0, 5)
    scores = [
        torch.tensor(
            data.draw(st.lists(values, min_size=r * c, max_size=r * c)), dtype=torch.float32
        ).view(r, c)
        for r, c in shapes
    ]
    limits = Limits(
        min_unit=data.draw(st.integers(0, 2)),
        max_layer_sparsity=data.draw(st.sampled_from([0.5, 0.75, 1.0])),
        min_layer_sparsity=data.draw(st.sampled_from([0.0, 0.25, 0.5])),
    )
    size = sum(score.numel() for score in scores)
    count = data.draw(st.integers(0, size))

    def allowed(masks: list[Tensor]) -> bool:
        for mask in masks:
            gone = mask.numel() - int(mask.sum())
            if gone > int(limits.max_layer_sparsity * mask.numel()):
                return False
            floor = min(limits.min_layer_sparsity, count / size)
            room = sum(max(0, row.numel() - limits.min_unit) for row in mask)
            if gone < min(int(floor * mask.numel() + 1e-6), room):
                return False
            if any(int(row.sum()) < min(limits.min_unit, row.numel()) for row in mask):
                return False
        return True

    best = None
    for flat in itertools.combinations(range(size), count):
        keep = torch.ones(size, dtype=torch.bool)
        keep[list(flat)] = False
        parts = keep.split([score.numel() for score in scores])
        masks = [part.view_as(score) for part, score in zip(parts, scores, strict=True)]
        if allowed(masks):
            value = sum(float(s[m].sum()) for s, m in zip(scores, masks, strict=True))
            best = value if best is None else max(best, value)
    if best is None:
        with pytest.raises(ValueError, match="to prune"):
            chosen(limits, scores, count)
        return
    masks = chosen(limits, scores, count)
    assert allowed(masks)
    assert sum(mask.numel() - int(mask.sum()) for mask in masks) == count
    assert sum(float(s[m].sum()) for s, m in zip(scores, masks, strict=True)) == best


def test_shares_by_pattern() -> None:
    scores = [torch.arange(4.0).view(2, 2), torch.arange(4.0).view(2, 2)]
    limits = Limits(max_layer_sparsity={"t0": 0.25, "*": 0.75})
    assert [int(mask.sum()) for mask in chosen(limits, scores, 4)] == [3, 1]
    params = tap.prunable_parameters(mlp())
    pruner = tap.Pruner(
        params,
        tap.Magnitude,
        schedules.constant(0.25),
        max_layer_sparsity={"0": 0.125},
    )
    assert [int((module.weight == 0).sum()) for module, _ in params] == [24, 56]
    assert pruner.sparsity() == 0.25


@pytest.mark.parametrize("method", [tap.Magnitude, tap.AlignedMagnitude])
def test_through_a_whole_schedule(method: type[tap.PruningMethod]) -> None:
    params = tap.prunable_parameters(mlp())
    pruner = tap.Pruner(
        params,
        method,
        schedules.linear(0, 0.8, end=8),
        min_unit=2,
        max_layer_sparsity=0.83,
        min_layer_sparsity=0.6,
    )
    before = [module.weight_mask for module, _ in params]
    for step in range(1, 9):
        pruner.step()
        assert pruner.sparsity() == round(step / 10 * 320) / 320
        for (module, _), old in zip(params, before, strict=True):
            mask = module.weight_mask
            assert not bool((mask & ~old).any())
            assert int(mask.sum(dim=1).min()) >= 2
            assert 1 - mask.float().mean() <= 0.83
            assert 1 - mask.float().mean() >= min(0.6, step / 10) - 1 / mask.numel()
        before = [module.weight_mask for module, _ in params]
