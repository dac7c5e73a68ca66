"""ops.shard_counts, ops.shard_ties and ops.shard_masks against one key after the other."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import reference
from strategies import LAYOUTS, laid_out
from test_select_global import Selection, selections
from torchalignprune import ops

ONE = 0x3F800000 | 1 << 31  # the key of 1 in float32
NAN = float("nan")
INF = float("inf")


def to(device: str, options: dict[str, Any]) -> dict[str, Any]:
    return {
        name: [None if t is None else t.to(device) for t in value]
        if isinstance(value, list)
        else value
        for name, value in options.items()
    }


def test_keys_are_the_bits_in_the_order_of_the_scores() -> None:
    weight = torch.tensor([-INF, -1.0, -0.0, 0.0, 1.0, INF])
    for key, expected in [
        (0x007FFFFF, [1, 0, 0, 0, 0, 0]),
        (0x407FFFFF, [0, 1, 0, 0, 0, 0]),
        (0x80000000, [0, 0, 1, 1, 0, 0]),
        (ONE, [0, 0, 0, 0, 1, 0]),
        (0xFF800000, [0, 0, 0, 0, 0, 1]),
    ]:
        found = ops.shard_ties([weight], key, [torch.arange(7)], score="value")
        assert found.tolist() == expected
    assert reference.keys(weight)[1:5] == [0x407FFFFF, 0x80000000, 0x80000000, ONE]


def test_what_is_above_the_last_bin_is_counted_nowhere() -> None:
    weight = torch.tensor([0.5, 1.0, 1.25, 1.5, 4.0])
    assert ops.shard_counts([weight], ONE, 22, 1).tolist() == [2, 1, 0]


def test_the_first_tensor_with_nan_is_named() -> None:
    weights = [torch.ones(2), torch.empty(0), torch.tensor([1.0, NAN]), torch.tensor([NAN])]
    assert int(ops.shard_counts(weights, 0, 21, 2048)[-1]) == 3
    masks = [None, None, torch.tensor([True, False]), None]
    assert int(ops.shard_counts(weights, 0, 21, 2048, masks=masks)[-1]) == 4
    assert int(ops.shard_counts(weights[:2], 0, 21, 2048)[-1]) == 0


def test_entries_outside_of_the_edges_are_not_looked_at() -> None:
    weight = torch.ones(8)
    edges = [torch.tensor([2, 3, 3, 6])]
    assert ops.shard_ties([weight], ONE, edges).tolist() == [1, 0, 3]
    assert ops.shard_ties([weight, weight], ONE, [edges[0], torch.tensor([8])]).tolist() == [
        1,
        0,
        3,
    ]


@given(selection=selections(), data=st.data())
def test_counts_equal_the_plain_form(
    selection: Selection, data: st.DataObject, device: str
) -> None:
    weights, options = selection.weights, selection.options
    bits = 64 if any(weight.dtype == torch.float64 for weight in weights) else 32
    known = [key for own in reference.candidates(weights, **options) for key in own.values()]
    low = data.draw(st.sampled_from([0, (1 << bits) - 2, *known]))
    shift = data.draw(st.integers(0, bits - 1))
    bins = data.draw(st.integers(1, 2048))
    found = ops.shard_counts(
        [w.to(device) for w in weights], low, shift, bins, **to(device, options)
    )
    assert found.tolist() == reference.shard_counts(weights, low, shift, bins, **options)


@given(selection=selections(), data=st.data())
def test_ties_and_masks_equal_the_plain_form(
    selection: Selection, data: st.DataObject, device: str
) -> None:
    weights, options = selection.weights, selection.options
    known = [key for own in reference.candidates(weights, **options) for key in own.values()]
    key = data.draw(st.sampled_from([0, 1 << 31, *known]))
    places = [st.integers(0, weight.numel()) for weight in weights]
    edges = [sorted(data.draw(st.lists(own, min_size=1, max_size=4))) for own in places]
    splits = [data.draw(own) for own in places]
    here, given_here = [w.to(device) for w in weights], to(device, options)
    ties = ops.shard_ties(here, key, [torch.tensor(own) for own in edges], **given_here)
    assert ties.tolist() == reference.shard_ties(weights, key, edges, **options)
    masks = ops.shard_masks(here, key, splits, **given_here)
    expected = reference.shard_masks(weights, key, splits, **options)
    assert [mask.flatten().tolist() for mask in masks] == expected
    for mask, weight in zip(masks, here, strict=True):
        assert mask.stride() == torch.empty_like(weight, dtype=torch.bool).stride()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("threads", [1, 3])
def test_many_entries(layout: str, threads: int, device: str) -> None:
    torch.set_num_threads(threads)
    weights = [
        laid_out((torch.randn(700, 500) * 8).round() / 8, layout),
        laid_out((torch.randn(300_000) * 8).round() / 8, layout).bfloat16(),
        torch.randn(9, 1000),
    ]
    weights = [weight.to(device) for weight in weights]
    flat = [weight.flatten().float().abs() for weight in weights]
    counts = ops.shard_counts(weights, ONE, 16, 2048)
    keys = torch.cat(flat).contiguous().view(torch.int32).long() + (1 << 31)
    assert int(counts[2048]) == int((keys < ONE).sum())
    bins = ((keys - ONE) >> 16)[keys >= ONE].clamp(max=2048).bincount(minlength=2049)[:2048]
    assert torch.equal(counts[:2048], bins)
    edges = [torch.tensor([5, 70_001, 340_000]), torch.tensor([0, 299_999]), torch.tensor([3, 9])]
    ties = ops.shard_ties(weights, ONE, edges)
    expected = [
        int((own[start:end] == 1).sum())
        for own, at in zip(flat, edges, strict=True)
        for start, end in itertools.pairwise(at)
    ]
    assert ties.tolist() == expected
    splits = [123_456, 300_000, 0]
    for mask, own, split in zip(ops.shard_masks(weights, ONE, splits), flat, splits, strict=True):
        kept = own > 1
        kept[split:] |= own[split:] == 1
        assert torch.equal(mask.flatten(), kept)


def arguments(device: str) -> tuple[Any, ...]:
    weights = [torch.randn(3, 4, device=device), torch.randn(5, device=device).bfloat16()]
    mask, rows = torch.rand(3, 4, device=device) < 0.7, torch.rand(3, device=device)
    none = [None, None]
    return weights, [mask, None], none, [rows, None], none, ["a", "b"], "magnitude"


def test_opcheck(device: str) -> None:
    operators = torch.ops.torchalignprune
    edges = [torch.tensor([0, 3, 12]), torch.tensor([1, 5])]
    torch.library.opcheck(operators.shard_counts.default, (*arguments(device), 5, 21, 100))
    torch.library.opcheck(operators.shard_ties.default, (*arguments(device), ONE, edges))
    torch.library.opcheck(operators.shard_masks.default, (*arguments(device), ONE, [4, 5]))


def wrong(run: Any, message: str, error: type[Exception] = ValueError) -> None:
    with pytest.raises(error, match=message):
        run()


def test_bad_input_says_what_was_expected() -> None:
    w, names = [torch.ones(2, 3)], {"names": ["here"]}
    wrong(lambda: ops.shard_counts([], 0, 21, 8), "weights should have at least one tensor")
    wrong(lambda: ops.shard_ties([], 0, []), "weights should have at least one tensor")
    wrong(lambda: ops.shard_masks([], 0, []), "weights should have at least one tensor")
    wrong(lambda: ops.shard_counts(w, 0, 32, 8), r"shift should be in \[0, 32\), got 32")
    wrong(lambda: ops.shard_counts(w, 0, 21, 0), r"bins should be in \[1, 2048\], got 0")
    wrong(lambda: ops.shard_counts(w, 0, 21, 4096), r"bins should be in \[1, 2048\], got 4096")
    wrong(lambda: ops.shard_counts(w, 2**32 - 1, 0, 8), "key should be one of 32 bits")
    wrong(lambda: ops.shard_counts([w[0].double()], 2**64 - 1, 0, 8), "key should be one of 64")
    wrong(lambda: ops.shard_masks(w, -1, [0]), "key should be one of 32 bits")
    wrong(lambda: ops.shard_masks(w, 1 << 64, [0]), "key should have at most 64 bits")
    wrong(lambda: ops.shard_masks(w, 0, []), "splits should have one entry for each of the 1")
    wrong(lambda: ops.shard_masks(w, 0, [7], **names), r"split of here .* \[0, 6\], got 7")
    wrong(lambda: ops.shard_ties(w, 0, []), "edges should have one entry for each of the 1")
    edges: list[tuple[Tensor, str]] = [
        (torch.tensor([3, 2]), "edges of here should rise from at least 0 to at most 6"),
        (torch.tensor([0, 7]), "edges of here should rise from at least 0 to at most 6"),
        (torch.tensor([]).long(), "edges of here should be a 1d tensor"),
    ]
    for own, message in edges:
        wrong(lambda own=own: ops.shard_ties(w, 0, [own], **names), message)
    wrong(lambda: ops.shard_ties(w, 0, [torch.ones(2)], **names), "edges .* int64", TypeError)
    wrong(lambda: ops.shard_counts([w[0].int()], 0, 21, 8, **names), "here should be", TypeError)
