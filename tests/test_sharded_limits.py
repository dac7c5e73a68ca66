"""Limits on what layers and units lose, on sharded parameters: the masks of one process.

What the processes do is in sharded_limits.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sharded_limits as cases
import torchalignprune as tap
from ranks import Ranks
from torchalignprune.limits import Limits

FOUR = ("both dimensions", "strided columns")


@pytest.mark.parametrize(
    ("world", "name"), [(2, "rows"), (2, "columns"), (2, "replicated"), *((4, n) for n in FOUR)]
)
def test_layouts(ranks: Ranks, world: int, name: str) -> None:
    ranks.run(world, cases.layout, name)


@pytest.mark.parametrize(
    "case", [cases.literal, cases.dtypes, cases.budget, cases.signed_scores, cases.errors]
)
def test_on_two_processes(ranks: Ranks, case: Any) -> None:
    ranks.run(2, case)


def test_what_fails_on_one_rank_fails_on_all(ranks: Ranks) -> None:
    ranks.run(2, cases.failing_in_a_unit_of_one_rank)


@st.composite
def models(draw: st.DrawFn) -> Any:
    shapes = draw(
        st.lists(
            st.lists(st.integers(1, 6), min_size=1, max_size=3).map(tuple), min_size=1, max_size=4
        )
    )
    values = []
    for shape in shapes:
        size = torch.Size(shape).numel()
        grid = st.sampled_from([0.0, -0.0, 0.5, -0.5, 1.0, 1.5, -2.0])
        own = draw(st.lists(grid, min_size=size, max_size=size))
        dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
        values.append(torch.tensor(own).to(dtype).reshape(shape))
    shares = st.sampled_from([0.0, 0.25, 0.4, 0.6])
    least = draw(st.one_of(shares, st.fixed_dictionaries({"*weight0*": shares, "*": shares})))
    limits = Limits(
        min_unit=draw(st.integers(0, 4)),
        max_layer_sparsity=draw(st.sampled_from([0.6, 0.8, 1.0])),
        min_layer_sparsity=least,
    )
    method, options = draw(
        st.sampled_from([(tap.Magnitude, {}), (tap.AlignedMagnitude, {"units": "in"})])
    )
    amounts = sorted(draw(st.lists(st.sampled_from([0.1, 0.3, 0.5, 0.7]), min_size=1, max_size=3)))
    kinds = draw(st.lists(st.integers(0, 10), min_size=len(shapes), max_size=len(shapes)))
    return values, kinds, limits, method, options, amounts


@pytest.mark.parametrize("world", [2, 4])
@settings(max_examples=settings().max_examples // 2)
@given(case=models())
def test_any_weights_layouts_and_limits(ranks: Ranks, world: int, case: Any) -> None:
    ranks.run(world, cases.drawn, case)


# Traffic


def test_layer_limits_send_little(ranks: Ranks) -> None:
    """Some hundred bytes for each of the parameters, however large they are."""
    limits = {"max_layer_sparsity": 0.55, "min_layer_sparsity": 0.45}
    for shape in ((16, 24), (256, 96)):
        for sent in ranks.run(2, cases.sent, limits, "columns", 24, shape):
            assert 0 < sent < 12 * 1024
    # Where no bound is met, hardly more than is sent without.
    for sent in ranks.run(2, cases.sent, {"max_layer_sparsity": 0.95}, "rows", 24, (64, 24)):
        assert 0 < sent < 4 * 1024


def test_unit_limits_send_two_numbers_for_each_entry_that_is_kept(ranks: Ranks) -> None:
    def sent(given: dict[str, int], name: str, world: int) -> int:
        (found,) = set(ranks.run(world, cases.sent, given, name, 3, (40, 64)))
        return int(found)

    for world in (2, 4):
        for kept in (1, 3):
            torn, whole = (sent({"min_unit": kept}, name, world) for name in ("columns", "rows"))
            # The candidates, and so what is sent beyond that, are the same.
            assert torn - whole == 2 * 8 * (3 * 40) * kept
