"""ops.select_rows against sort and cut, row by row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import reference
from strategies import GRID, LAYOUTS, ODD, laid_out, masks, tensors, thorough
from torchalignprune import ops

NAN = float("nan")


def test_lowest_of_each_row_go() -> None:
    scores = torch.tensor([[3.0, 1.0, 2.0], [-1.0, -3.0, -2.0], [5.0, 5.0, 5.0]])
    kept = ops.select_rows(scores, torch.tensor([1, 2, 0]))
    assert kept.tolist() == [[True, False, True], [True, False, False], [True, True, True]]


def test_among_equals_the_lower_column_goes_first() -> None:
    scores = torch.tensor([[1.0, 0.0, -0.0, 1.0], [2.0, 2.0, 2.0, 2.0]])
    kept = ops.select_rows(scores, torch.tensor([1, 3]))
    assert kept.tolist() == [[True, False, True, True], [False, False, False, True]]


def test_masked_entries_stay_pruned_and_do_not_count() -> None:
    scores = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    mask = torch.tensor([[False, True, True, True]])
    assert ops.select_rows(scores, torch.tensor([2]), mask=mask).tolist() == [[False] * 3 + [True]]


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0)])
def test_nothing_to_prune_of(shape: tuple[int, int], device: str) -> None:
    counts = torch.zeros(shape[0], dtype=torch.long, device=device)
    kept = ops.select_rows(torch.empty(shape, device=device), counts)
    assert kept.shape == shape
    assert kept.dtype == torch.bool


@st.composite
def row_selections(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor | None]:
    shape = (draw(st.integers(1, 5)), draw(st.integers(0, 8)))
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]))
    scores = draw(tensors(shape, dtype, values=draw(st.sampled_from([GRID, ODD, None]))))
    mask = draw(st.none() | masks(shape))
    alive = [shape[1]] * shape[0] if mask is None else mask.sum(dim=1).tolist()
    counts = torch.tensor([draw(st.integers(0, n)) for n in alive], dtype=torch.long)
    return scores, counts, mask


@thorough
@given(given_rows=row_selections())
def test_equals_sort_and_cut(given_rows: tuple[Tensor, Tensor, Tensor | None], device: str) -> None:
    scores, counts, mask = given_rows
    before = scores.clone(), counts.clone()
    on_device = None if mask is None else mask.to(device)
    kept = ops.select_rows(scores.to(device), counts.to(device), mask=on_device)
    assert torch.equal(kept.cpu(), reference.select_rows(scores, counts, mask=mask))
    assert kept.is_contiguous()
    assert torch.equal(scores, before[0])
    assert torch.equal(counts, before[1])


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "channels_last"])
@pytest.mark.parametrize("values", ["normal", "ties"])
@pytest.mark.parametrize("shape", [(300, 40), (7, 5000), (1, 150_000)])
def test_big_equals_sort_and_cut_with_any_number_of_threads(
    shape: tuple[int, int], values: str, layout: str, device: str
) -> None:
    scores = laid_out(torch.randn(shape), layout)
    if values == "ties":
        scores = laid_out((torch.randn(shape) * 2).round(), layout)
    mask = torch.rand(shape) < 0.8
    counts = (mask.sum(dim=1) * torch.rand(shape[0])).long()
    expected = reference.select_rows(scores, counts, mask=mask)
    for threads in (1, 2, 3) if device == "cpu" else (1,):
        torch.set_num_threads(threads)
        kept = ops.select_rows(scores.to(device), counts.to(device), mask=mask.to(device))
        assert torch.equal(kept.cpu(), expected), f"{threads} threads"


def test_opcheck(device: str) -> None:
    operator = torch.ops.torchalignprune.select_rows.default
    scores = torch.randn(4, 3, device=device).t()
    counts = torch.tensor([0, 1, 2], device=device)
    torch.library.opcheck(operator, (scores, None, counts, "scores"))
    torch.library.opcheck(operator, (scores, scores > -1, counts * 0, "scores"))


def test_compiles_into_one_graph(device: str) -> None:
    scores = torch.randn(3, 4, device=device)
    counts = torch.tensor([0, 1, 2], device=device)
    compiled = torch.compile(ops.select_rows, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(scores, counts), ops.select_rows(scores, counts))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"scores": torch.ones(2, 3).int()}, TypeError, "here should be float32.*got Int"),
        ({"scores": torch.ones(3)}, ValueError, "here should be a 2d tensor, got 1d"),
        ({"scores": torch.tensor([[1.0], [NAN]])}, ValueError, "scores of here.*got NaN"),
        ({"counts": torch.ones(2)}, TypeError, "counts should be int64, got Float"),
        ({"counts": torch.ones(3).long()}, ValueError, r"counts should have shape \[2\].*got \[3"),
        ({"counts": torch.ones(2, 1).long()}, ValueError, r"counts should have shape \[2\].*got"),
        ({"counts": torch.tensor([0, 4])}, ValueError, "row 1 of here has 3 .*got 4"),
        ({"counts": torch.tensor([-1, 0])}, ValueError, "row 0 of here has 3 .*got -1"),
        (
            {"counts": torch.tensor([0, 2]), "mask": torch.eye(2, 3) > 0},
            ValueError,
            "row 1 of here has 1 .*got 2",
        ),
        ({"mask": torch.ones(3, 2) > 0}, ValueError, r"mask of here .*\[2, 3\], got \[3, 2\]"),
        ({"mask": torch.ones(2, 3)}, TypeError, "mask of here should be bool, got Float"),
    ],
)
def test_bad_input_says_what_was_expected(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    rows = len(changes.get("scores", torch.ones(2, 3)))
    given = {"scores": torch.ones(2, 3), "counts": torch.zeros(rows).long(), **changes}
    with pytest.raises(error, match=message):
        ops.select_rows(given.pop("scores"), given.pop("counts"), name="here", **given)
