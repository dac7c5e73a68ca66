"""ops.square_sums: the squared norms of rows and columns."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import reference
from strategies import GRID, LAYOUTS, laid_out, shapes, tensors
from torchalignprune import ops


def test_rows_and_columns() -> None:
    rows, columns = ops.square_sums(torch.tensor([[1.0, 2.0], [-3.0, 0.0]]))
    assert rows.tolist() == [5, 9]
    assert columns.tolist() == [10, 4]
    assert rows.dtype == columns.dtype == torch.float64


def test_scales_multiply_first() -> None:
    rows, columns = ops.square_sums(
        torch.ones(2, 2), row_scale=torch.tensor([1.0, 2.0]), column_scale=torch.tensor([3.0, 1.0])
    )
    assert rows.tolist() == [10, 40]  # 9 1 / 36 4
    assert columns.tolist() == [45, 5]


@pytest.mark.parametrize("weight", [torch.tensor(-3.0), torch.tensor([2.0, -1.0, 2.0])])
def test_a_vector_or_a_number_is_a_row_without_columns(weight: torch.Tensor) -> None:
    rows, columns = ops.square_sums(weight)
    assert rows.tolist() == [9]
    assert columns.shape == (0,)


@given(data=st.data(), shape=shapes())
def test_equals_the_plain_form(data: st.DataObject, shape: tuple[int, ...], device: str) -> None:
    dtypes = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
    dtype = data.draw(st.sampled_from(dtypes))
    weight = data.draw(tensors(shape, dtype, values=data.draw(st.sampled_from([GRID, None]))))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    rows, columns = (1, weight.numel()) if len(shape) < 2 else shape[:2]
    scales = [
        data.draw(
            st.none()
            | st.sampled_from([1, n]).flatmap(
                lambda length: tensors((length,), wide, values=[0.0, 0.5, 3.0], layouts=["strided"])
            )
        )
        for n in (rows, columns)
    ]
    doubled = [None if scale is None else scale.double() for scale in scales]
    v = reference.scores(weight, "value", None, *doubled, dtype=torch.float64)
    squares = (v * v).reshape(rows, columns, -1) if v.numel() else v.new_zeros(rows, columns, 1)
    found = ops.square_sums(
        weight.to(device),
        row_scale=None if scales[0] is None else scales[0].to(device),
        column_scale=None if scales[1] is None else scales[1].to(device),
    )
    torch.testing.assert_close(found[0].cpu(), squares.sum(dim=(1, 2)))
    expected = squares.sum(dim=(0, 2)) if len(shape) > 1 else squares.new_empty(0)
    torch.testing.assert_close(found[1].cpu(), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(1, 300_000), (300_000,), (700, 500), (30, 70, 5, 9)])
def test_sums_do_not_depend_on_the_number_of_threads(shape: tuple[int, ...], layout: str) -> None:
    weight = laid_out(torch.randn(shape), layout)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(ops.square_sums(weight))
    for rows, columns in found[1:]:
        assert torch.equal(rows, found[0][0])
        assert torch.equal(columns, found[0][1])
    total = weight.double().square().sum()
    torch.testing.assert_close(found[0][0].sum(), total)
    if len(shape) > 1:
        torch.testing.assert_close(found[0][1].sum(), total)


@pytest.mark.parametrize("shape", [(100, 20_000), (3000, 700), (30, 70, 5, 9)])
def test_sums_of_some_columns_are_those_of_the_whole(shape: tuple[int, ...], device: str) -> None:
    weight = torch.randn(shape, device=device)
    columns = shape[1]
    _, whole = ops.square_sums(weight)
    for part in (slice(0, columns // 3), slice(columns // 3, columns)):
        _, some = ops.square_sums(weight[:, part], all_columns=columns)
        assert torch.equal(some, whole[part])
    rows, _ = ops.square_sums(weight[7:19])
    assert torch.equal(rows, ops.square_sums(weight)[0][7:19])


def test_all_columns_are_at_least_those_of_the_weight() -> None:
    for weight, columns in ((torch.ones(2, 3), 2), (torch.ones(3), 3)):
        with pytest.raises(ValueError, match=f"all_columns should be .* of here, got {columns}"):
            ops.square_sums(weight, all_columns=columns, name="here")


def test_squares_of_the_largest_and_smallest_floats_are_finite_and_not_zero() -> None:
    rows, _ = ops.square_sums(torch.tensor([[2.0**127], [2.0**-140]]))
    torch.testing.assert_close(rows, torch.tensor([2.0**254, 2.0**-280], dtype=torch.float64))


def test_opcheck(device: str) -> None:
    operator = torch.ops.torchalignprune.square_sums.default
    w = torch.randn(4, 3, device=device).t()
    torch.library.opcheck(operator, (w, None, None, "w"))
    torch.library.opcheck(operator, (w, torch.rand(3, device=device), None, "w"))
    torch.library.opcheck(operator, (w, None, None, "w", 9))


@pytest.mark.parametrize(
    ("weight", "row_scale", "error", "message"),
    [
        (torch.ones(2, 3).int(), None, TypeError, "here should be float32.*got Int"),
        (torch.ones(2, 3), torch.ones(3), ValueError, r"row scale of here .*\[2\] or \[1\], got"),
        (torch.ones(2, 3), torch.ones(2).double(), TypeError, "row scale of here .*got Double"),
    ],
)
def test_bad_input_says_what_was_expected(
    weight: torch.Tensor,
    row_scale: torch.Tensor | None,
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        ops.square_sums(weight, row_scale=row_scale, name="here")
