"""ops.greedy_match and ops.match_in_order against going through the sorted entries one by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import reference
from strategies import GRID, LAYOUTS, ODD, laid_out, tensors, thorough
from torchalignprune import ops

INF = float("inf")
NAN = float("nan")


def test_the_largest_entry_goes_first() -> None:
    similarity = torch.tensor([[0.9, 0.8, 0.1], [1.0, 0.2, 0.3], [0.7, 0.6, 0.5]])
    assert ops.greedy_match(similarity).tolist() == [1, 0, 2]


def test_among_equals_the_lowest_row_goes_first_then_the_lowest_column() -> None:
    assert ops.greedy_match(torch.ones(3, 3)).tolist() == [0, 1, 2]
    assert ops.greedy_match(torch.tensor([[0.0, -0.0], [-0.0, 0.0]])).tolist() == [0, 1]
    # The row decides before the column does.
    assert ops.greedy_match(torch.tensor([[0.0, 0.0, 1.0], [1.0, 0.0, 1.0]])).tolist() == [2, 0]


@pytest.mark.parametrize(
    ("shape", "expected"), [((2, 4), [0, 1]), ((4, 2), [0, 1, -1, -1]), ((1, 1), [0])]
)
def test_rectangular(shape: tuple[int, int], expected: list[int], device: str) -> None:
    assert ops.greedy_match(torch.zeros(shape, device=device)).tolist() == expected


def test_minus_infinity_forbids_and_infinity_comes_first(device: str) -> None:
    similarity = torch.tensor([[-INF, -INF], [INF, 3.0], [INF, -INF]], device=device)
    assert ops.greedy_match(similarity).tolist() == [-1, 0, -1]
    assert ops.greedy_match(torch.full((2, 2), -INF, device=device)).tolist() == [-1, -1]


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0), (2, 0, 3), (0, 2, 3), (2, 3, 0)])
def test_nothing_to_match(shape: tuple[int, ...], device: str) -> None:
    index = ops.greedy_match(torch.empty(shape, device=device))
    assert index.shape == shape[:-1]
    assert index.dtype == torch.int64
    assert bool((index == -1).all())


@st.composite
def similarities(draw: st.DrawFn) -> Tensor:
    sides = st.integers(1, 12)
    batch = draw(st.sampled_from([(), (), (3,), (2, 2)]))
    shape = (*batch, draw(sides), draw(sides))
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]))
    return draw(tensors(shape, dtype, values=draw(st.sampled_from([GRID, ODD, (0.0, 1.0), None]))))


@thorough
@given(similarity=similarities())
def test_equals_going_through_the_sorted_entries(similarity: Tensor, device: str) -> None:
    before = similarity.clone()
    index = ops.greedy_match(similarity.to(device))
    assert torch.equal(index.cpu(), reference.greedy_match(similarity))
    assert torch.equal(similarity, before)


def clustered(rows: int, columns: int) -> Tensor:
    """All rows prefer the same columns."""
    return torch.rand(rows, 1) * torch.rand(1, columns) + 0.01 * torch.rand(rows, columns)


def permuted(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns) + 20 * torch.eye(rows, columns)[torch.randperm(rows)]


def some_rows_zero(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns) * (torch.rand(rows, 1) < 0.5) * (torch.rand(columns) < 0.5)


KINDS: dict[str, Callable[[int, int], Tensor]] = {
    "normal": torch.randn,
    "few values": lambda *shape: torch.randn(shape).round(),
    "one high, the others equal": lambda *shape: torch.eye(*shape).roll(1) * (torch.rand(1) + 1),
    "equal": torch.zeros,
    "clustered": clustered,
    "rank one": lambda rows, columns: torch.rand(rows, 1) * torch.rand(columns),
    "permuted": permuted,
    "some rows zero": some_rows_zero,
    "most forbidden": lambda *shape: torch.randn(shape).where(torch.rand(shape) < 0.02, -INF),
    "some infinite": lambda *shape: torch.randn(shape).where(torch.rand(shape) < 0.9, INF),
    "neighbouring floats": lambda *shape: (
        torch.ones(shape).view(torch.int32) + torch.randint(0, 3000, shape, dtype=torch.int32)
    ).view(torch.float32),
}


@pytest.mark.parametrize("shape", [(400, 400), (90, 1500), (1500, 90), (3, 20_000)])
@pytest.mark.parametrize("kind", KINDS)
def test_big_equals_going_through_the_sorted_entries(
    kind: str, shape: tuple[int, int], device: str
) -> None:
    similarity = KINDS[kind](*shape)
    expected = reference.greedy_match(similarity)
    for threads in (1, 2, 3) if device == "cpu" else (1,):
        torch.set_num_threads(threads)
        index = ops.greedy_match(similarity.to(device))
        assert torch.equal(index.cpu(), expected), f"{threads} threads"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(layout: str, dtype: torch.dtype, device: str) -> None:
    similarity = laid_out(torch.randn(3, 2, 130, 150).to(dtype), layout)
    expected = reference.greedy_match(similarity)
    assert torch.equal(ops.greedy_match(similarity.to(device)).cpu(), expected)


def test_each_matrix_of_a_batch_by_itself(device: str) -> None:
    for shape in ((4, 300, 280), (50, 12, 12)):
        similarity = torch.randn(shape, device=device)
        each = torch.stack([ops.greedy_match(matrix) for matrix in similarity])
        assert torch.equal(ops.greedy_match(similarity), each)


def test_the_sum_is_at_least_half_of_the_optimum() -> None:
    optimize = pytest.importorskip("scipy.optimize")
    for _ in range(50):
        similarity = torch.rand(8, 8) ** 4
        index = ops.greedy_match(similarity)
        best = similarity.numpy()[optimize.linear_sum_assignment(similarity.numpy(), maximize=True)]
        assert float(similarity.gather(1, index[:, None]).sum()) >= 0.5 * best.sum()


def test_opcheck(device: str) -> None:
    operator = torch.ops.torchalignprune.greedy_match.default
    torch.library.opcheck(operator, (torch.randn(2, 4, 3, device=device).mT, "similarity"))
    torch.library.opcheck(operator, (torch.randn(3, 0, device=device), "similarity"))


def test_compiles_into_one_graph(device: str) -> None:
    similarity = torch.randn(4, 5, device=device)
    compiled = torch.compile(ops.greedy_match, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(similarity), ops.greedy_match(similarity))


def test_a_gradient_does_not_get_in_the_way() -> None:
    similarity = torch.randn(3, 3, requires_grad=True)
    assert not ops.greedy_match(similarity).requires_grad


@pytest.mark.parametrize("where", [0, 29_999])
@pytest.mark.parametrize("shape", [(1, 1, 30_000), (30_000, 1), (3, 100, 100)])
def test_nan_is_refused(where: int, shape: tuple[int, ...], device: str) -> None:
    similarity = torch.randn(shape, device=device)
    similarity.view(-1)[where] = NAN
    with pytest.raises(ValueError, match="layer 3 should be numbers, got NaN"):
        ops.greedy_match(similarity, name="layer 3")
    with pytest.raises(ValueError, match="similarity should be numbers, got NaN"):
        ops.greedy_match(-similarity)


@pytest.mark.parametrize(
    ("similarity", "error", "message"),
    [
        (torch.ones(3), ValueError, "similarity should have at least 2 dimensions, got 1d"),
        (torch.ones(()), ValueError, "similarity should have at least 2 dimensions, got 0d"),
        (torch.ones(2, 2).int(), TypeError, "similarity should be float32.*got Int"),
        (torch.ones(1, 1).expand(2**31, 1), ValueError, r"2147483648 rows, more than the 2\^31"),
        (torch.ones(1, 1).expand(1, 2**31), ValueError, r"2147483648 columns, more than the 2\^31"),
    ],
)
def test_bad_input_says_what_was_expected(
    similarity: Tensor, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        ops.greedy_match(similarity)


# match_in_order


def test_pairs_in_order() -> None:
    kept = ops.match_in_order(torch.tensor([0, 1, 1, 2]), torch.tensor([2, 2, 0, 0]), 3, 3)
    assert kept.tolist() == [True, False, True, False]


@given(pairs=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 4)), max_size=40))
def test_pairs_equal_looking_back_at_each(pairs: list[tuple[int, int]], device: str) -> None:
    rows, columns = [row for row, _ in pairs], [column for _, column in pairs]
    both = torch.tensor([rows, columns], dtype=torch.int64, device=device)
    kept = ops.match_in_order(*both, 6, 5)
    assert kept.tolist() == reference.match_in_order(rows, columns)
    assert kept.device == both.device


def test_sorted_entries_in_order_are_the_greedy_matching(device: str) -> None:
    similarity = torch.randn(60, 80).round(decimals=1)
    order = torch.sort(similarity.flatten(), descending=True, stable=True).indices
    rows, columns = order // 80, order % 80
    kept = ops.match_in_order(rows.to(device), columns.to(device), 60, 80).cpu()
    assert torch.equal(columns[kept][rows[kept].argsort()], ops.greedy_match(similarity))


def test_opcheck_of_pairs() -> None:
    operator = torch.ops.torchalignprune.match_in_order.default
    torch.library.opcheck(operator, (torch.tensor([0, 1]), torch.tensor([0, 0]), 2, 1))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"rows": torch.ones(2)}, TypeError, "rows should be int64, got Float"),
        ({"columns": torch.ones(2, 1).long()}, ValueError, "columns should be a 1d tensor, got 2d"),
        ({"rows": torch.tensor([0])}, ValueError, "of one length, got 1 and 2"),
        ({"rows": torch.tensor([0, 3])}, ValueError, r"rows should be in \[0, 3\), got 3"),
        ({"columns": torch.tensor([0, -1])}, ValueError, r"columns should be in \[0, 3\), got -1"),
        ({"row_count": -1}, ValueError, "should not be negative, got -1 and 3"),
    ],
)
def test_bad_pairs_say_what_was_expected(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    pair = torch.tensor([0, 1])
    given = {"rows": pair, "columns": pair, "row_count": 3, "column_count": 3, **changes}
    with pytest.raises(error, match=message):
        ops.match_in_order(**given)
