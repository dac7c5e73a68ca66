"""ops.cosine_gains: what an entry adds to the alignment of its unit."""

from __future__ import annotations

import math
from decimal import Decimal, localcontext
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import reference
from strategies import GRID, LAYOUTS, laid_out, masks, shapes, tensors, thorough
from torchalignprune import ops

INF = float("inf")
NAN = float("nan")


def rows_of(tensor: Tensor) -> Tensor:
    return tensor.reshape(1, -1) if tensor.dim() < 2 else tensor.flatten(1)


# Literal examples


def test_three_and_four() -> None:
    # |w| = 5; alone the 4 has alignment 4/5, with the 3 it is 1.
    gains = ops.cosine_gains(torch.tensor([[3.0, -4.0]]))
    torch.testing.assert_close(gains, torch.tensor([[0.2, 0.8]]))


def test_each_row_is_a_unit_and_its_scale_does_not_matter() -> None:
    gains = ops.cosine_gains(torch.tensor([[3.0, 4.0], [300.0, -400.0], [0.0, 0.0], [0.0, 7.0]]))
    expected = torch.tensor([[0.2, 0.8], [0.2, 0.8], [0.0, 0.0], [0.0, 1.0]])
    torch.testing.assert_close(gains, expected)


def test_a_vector_and_a_number_are_one_unit_each() -> None:
    torch.testing.assert_close(ops.cosine_gains(torch.tensor([3.0, 4.0])), torch.tensor([0.2, 0.8]))
    torch.testing.assert_close(ops.cosine_gains(torch.tensor(-2.0)), torch.tensor(1.0))
    assert ops.cosine_gains(torch.tensor(0.0)).item() == 0


def test_a_kernel_belongs_to_one_unit() -> None:
    gains = ops.cosine_gains(torch.tensor([[[3.0], [4.0]], [[4.0], [3.0]]]))
    torch.testing.assert_close(gains, torch.tensor([[[0.2], [0.8]], [[0.8], [0.2]]]))


def test_among_equals_the_lower_position_is_worth_less() -> None:
    # sqrt(k / 4) - sqrt((k - 1) / 4), the largest for the last position
    gains = ops.cosine_gains(torch.tensor([[1.0, -1.0, 1.0, 1.0]]))
    expected = [math.sqrt(k / 4) - math.sqrt((k - 1) / 4) for k in (4, 3, 2, 1)]
    torch.testing.assert_close(gains, torch.tensor([expected]))
    w = torch.tensor([[1.0, -1.0, 1.0, 1.0], [2.0, 0.0, 2.0, 0.0]])
    for dtype in (torch.float32, torch.float64):
        order = ops.cosine_gains(w.to(dtype), reference=w).argsort(stable=True)
        assert order.tolist() == [[0, 1, 2, 3], [1, 3, 0, 2]]


def test_a_pruned_entry_is_worth_nothing_but_counts_in_the_norm() -> None:
    gains = ops.cosine_gains(torch.tensor([[3.0, 4.0]]), mask=torch.tensor([[True, False]]))
    torch.testing.assert_close(gains, torch.tensor([[0.6, 0.0]]))


def test_column_scales_multiply_first() -> None:
    gains = ops.cosine_gains(torch.tensor([[1.0, 1.0]]), column_scale=torch.tensor([3.0, 4.0]))
    torch.testing.assert_close(gains, torch.tensor([[0.2, 0.8]]))
    kernel = ops.cosine_gains(torch.ones(1, 2, 1), column_scale=torch.tensor([3.0, 4.0]))
    torch.testing.assert_close(kernel, torch.tensor([[[0.2], [0.8]]]))
    one = ops.cosine_gains(torch.tensor([[3.0, 4.0]]), column_scale=torch.tensor([7.0]))
    torch.testing.assert_close(one, torch.tensor([[0.2, 0.8]]))


def test_with_a_reference() -> None:
    # r = (0, 1): the second entry alone is perfectly aligned, the first takes 1 - 1/sqrt(2) away.
    gains = ops.cosine_gains(torch.tensor([[1.0, 1.0]]), reference=torch.tensor([[0.0, 1.0]]))
    torch.testing.assert_close(gains, torch.tensor([[1 / math.sqrt(2) - 1, 1.0]]))


def test_a_unit_whose_reference_is_zero_is_worth_nothing() -> None:
    w = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    r = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    gains = ops.cosine_gains(w, reference=r)
    torch.testing.assert_close(gains, torch.tensor([[0.0, 0.0], [0.2, 0.8]]), rtol=1e-3, atol=0)


def test_weights_of_zero_with_a_reference_are_worth_nothing() -> None:
    gains = ops.cosine_gains(torch.zeros(1, 3), reference=torch.ones(1, 3))
    assert gains.tolist() == [[0.0, 0.0, 0.0]]


def test_small_entries_do_not_cancel() -> None:
    """The difference of two square roots in float32, and even in float64, would be 0."""
    w = [1.0, 2.0**-30, 2.0**-40]
    with localcontext() as context:
        context.prec = 60
        squares = [Decimal(x) ** 2 for x in w]
        sums = [sum(squares[: k + 1]) for k in range(3)]
        roots = [Decimal(0)] + [s.sqrt() for s in sums]
        exact = [float((roots[k + 1] - roots[k]) / roots[3]) for k in range(3)]
    for dtype in (torch.float32, torch.float64):
        gains = ops.cosine_gains(torch.tensor([w], dtype=dtype))
        torch.testing.assert_close(gains, torch.tensor([exact], dtype=dtype), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("scale", "dtype"),
    [
        (2.0**-148, torch.float32),  # denormal
        (2.0**125, torch.float32),
        (2.0**-1072, torch.float64),
        (2.0**1020, torch.float64),
        (2.0**-24, torch.float16),
        (2.0**13, torch.float16),
        (2.0**-130, torch.bfloat16),
        (2.0**125, torch.bfloat16),
    ],
)
def test_the_smallest_and_the_largest_numbers(scale: float, dtype: torch.dtype) -> None:
    w = torch.tensor([[3.0, 4.0]], dtype=torch.float64).mul(scale).to(dtype)
    expected = torch.tensor([[0.2, 0.8]])
    torch.testing.assert_close(ops.cosine_gains(w).float(), expected)
    torch.testing.assert_close(ops.cosine_gains(w, reference=w).float(), expected)


def test_result_is_float32_and_float64_for_float64(dtype: torch.dtype, device: str) -> None:
    gains = ops.cosine_gains(torch.ones(2, 3, dtype=dtype, device=device))
    assert gains.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert gains.device.type == device


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (2, 0, 3)])
def test_nothing_in_it(shape: tuple[int, ...], device: str) -> None:
    w = torch.empty(shape, device=device)
    assert ops.cosine_gains(w).shape == shape
    assert ops.cosine_gains(w, reference=w, mask=w > 0).shape == shape


# Properties


@st.composite
def units(draw: st.DrawFn) -> tuple[Tensor, dict[str, Any]]:
    shape = draw(shapes())
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]))
    weight = draw(tensors(shape, dtype, values=draw(st.sampled_from([GRID, None]))))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    columns = weight.numel() if weight.dim() < 2 else weight.size(1)
    scale = None
    if draw(st.booleans()):
        length = draw(st.sampled_from([1, columns]))
        scale = draw(tensors((length,), wide, values=[0.0, 0.5, 1.0, 3.0], layouts=["strided"]))
    return weight, {"mask": draw(st.none() | masks(shape)), "column_scale": scale}


@thorough
@given(unit=units())
def test_equals_differences_of_the_alignment(
    unit: tuple[Tensor, dict[str, Any]], device: str
) -> None:
    weight, options = unit
    expected = reference.cosine_gains(weight, **options)
    on_device = {k: None if v is None else v.to(device) for k, v in options.items()}
    gains = ops.cosine_gains(weight.to(device), **on_device)
    torch.testing.assert_close(gains.cpu(), expected, rtol=1e-5, atol=1e-7)


@given(data=st.data(), shape=shapes(min_dims=2, max_dims=3, min_side=1))
def test_with_a_reference_equals_the_plain_form(
    data: st.DataObject, shape: tuple[int, ...], device: str
) -> None:
    """Normal numbers, whose order rounding does not decide."""
    weight = data.draw(tensors(shape, torch.float64, values=None))
    r = data.draw(tensors(shape, data.draw(st.sampled_from([torch.float32, torch.float64]))))
    r = (weight + data.draw(st.sampled_from([0.1, 1.0])) * r * weight.abs().mean()).to(r.dtype)
    mask = data.draw(st.none() | masks(shape))
    expected = reference.cosine_gains(weight, reference=r, mask=mask)
    gains = ops.cosine_gains(
        weight.to(device),
        reference=r.to(device),
        mask=None if mask is None else mask.to(device),
    )
    torch.testing.assert_close(gains.cpu(), expected, rtol=1e-4, atol=1e-4)


@thorough
@given(unit=units())
def test_gains_add_up_to_the_alignment_of_what_is_left(
    unit: tuple[Tensor, dict[str, Any]],
) -> None:
    weight, options = unit
    gains = ops.cosine_gains(weight, **options)
    mask, scale = options["mask"], options["column_scale"]
    scale = None if scale is None else scale.double()
    w = reference.scores(weight, "value", column_scale=scale, dtype=torch.float64)
    p = w if mask is None else w * mask
    whole, left = rows_of(w).norm(dim=1), rows_of(p).norm(dim=1)
    expected = torch.where(whole > 0, left / whole, 0)
    torch.testing.assert_close(rows_of(gains).double().sum(dim=1), expected, rtol=1e-5, atol=1e-6)


@thorough
@given(unit=units())
def test_within_a_unit_gains_fall_with_the_magnitude(unit: tuple[Tensor, dict[str, Any]]) -> None:
    weight, options = unit
    scale = options["column_scale"]
    gains = rows_of(ops.cosine_gains(weight, column_scale=scale))
    w = reference.scores(weight, "value", column_scale=scale, dtype=gains.dtype)
    for row, magnitudes in zip(gains, rows_of(w).abs(), strict=True):
        order = torch.sort(magnitudes, stable=True).indices
        assert bool((row[order].diff() >= 0).all())


@given(data=st.data(), shape=shapes(min_dims=2, min_side=1))
def test_the_weight_itself_as_reference_changes_nothing(
    data: st.DataObject, shape: tuple[int, ...]
) -> None:
    weight = data.draw(tensors(shape, torch.float64, values=None, layouts=LAYOUTS[:-1]))
    mask = data.draw(st.none() | masks(shape))
    own = ops.cosine_gains(weight, mask=mask)
    as_reference = ops.cosine_gains(weight, mask=mask, reference=weight)
    torch.testing.assert_close(as_reference, own, rtol=2e-3, atol=1e-9)


@given(data=st.data(), shape=shapes(min_side=1), layout=st.sampled_from(LAYOUTS[:-1]))
def test_gains_lie_in_memory_as_the_weights_do(
    data: st.DataObject, shape: tuple[int, ...], layout: str
) -> None:
    weight = data.draw(tensors(shape, torch.float32, layouts=[layout]))
    gains = ops.cosine_gains(weight)
    assert gains.stride() == torch.empty_like(weight).stride()


def by_formula(weight: Tensor, mask: Tensor) -> Tensor:
    """w_k^2 / ((sqrt(C_k) + sqrt(C_{k-1})) |w|), the candidates by falling |w|."""
    w = rows_of(weight.double())
    candidates = torch.where(rows_of(mask), w.abs(), -1)
    order = torch.sort(candidates, stable=True).indices.flip(1)
    squares = (w * rows_of(mask)).gather(1, order) ** 2
    roots = squares.cumsum(dim=1).sqrt()
    before = torch.cat([torch.zeros_like(roots[:, :1]), roots[:, :-1]], dim=1)
    gains = squares / (roots + before).clamp(min=1e-300) / w.norm(dim=1, keepdim=True)
    return torch.zeros_like(w).scatter(1, order, gains).reshape(weight.shape)


BIG = [(shape, layout) for shape in ((130, 70), (3, 5000), (16, 8, 9, 5)) for layout in LAYOUTS]


@pytest.mark.parametrize(("shape", "layout"), BIG)
def test_big_units_with_any_number_of_threads(
    shape: tuple[int, ...], layout: str, dtype: torch.dtype, device: str
) -> None:
    weight = laid_out(torch.randn(shape).to(dtype), layout).to(device)
    mask = laid_out(torch.rand(shape) < 0.8, layout).to(device)
    other = weight + 0.3 * weight.roll(1)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(ops.cosine_gains(weight, mask=mask))
        found.append(ops.cosine_gains(weight, mask=mask, reference=other))
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[0], found[4])
    assert torch.equal(found[1], found[3])
    assert torch.equal(found[1], found[5])
    expected = by_formula(weight, mask).to(found[0].dtype)
    torch.testing.assert_close(found[0], expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("peak", [1e3, 1e6, 1e12])
def test_one_entry_that_is_far_larger_than_the_others(peak: float) -> None:
    weight = torch.randn(3, 2000)
    weight[:, 700] = peak
    expected = by_formula(weight, weight != 0).float()
    torch.testing.assert_close(ops.cosine_gains(weight), expected, rtol=1e-5, atol=0)


def test_nothing_that_is_given_changes() -> None:
    w, r, scale = torch.randn(3, 4), torch.randn(3, 4), torch.rand(4)
    mask = torch.rand(3, 4) < 0.5
    before = [t.clone() for t in (w, r, scale, mask)]
    ops.cosine_gains(w, mask=mask, reference=r, column_scale=scale)
    for tensor, copy in zip((w, r, scale, mask), before, strict=True):
        assert torch.equal(tensor, copy)


# The operator in torch's machinery


def test_opcheck(device: str) -> None:
    operator = torch.ops.torchalignprune.cosine_gains.default
    w = torch.randn(4, 3, device=device).t()
    torch.library.opcheck(operator, (w, None, None, None, "w"))
    scale = torch.rand(4, device=device)
    torch.library.opcheck(operator, (w, w > -1, w * w, scale, "w"))
    torch.library.opcheck(operator, (w.bfloat16(), None, None, None, "w"))


def test_compiles_into_one_graph(device: str) -> None:
    w = torch.randn(3, 4, device=device)
    compiled = torch.compile(ops.cosine_gains, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(w), ops.cosine_gains(w))


# Bad input


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"weight": torch.ones(2, 3).int()}, TypeError, "here should be float32.*got Int"),
        ({"weight": torch.tensor([[1.0, NAN]])}, ValueError, "scores of here.*finite.*NaN"),
        ({"weight": torch.tensor([[1.0, INF]])}, ValueError, "scores of here.*finite.*infinity"),
        ({"reference": torch.tensor([[NAN] * 3] * 2)}, ValueError, "scores of here.*finite"),
        ({"reference": torch.ones(3, 2)}, ValueError, r"reference of here .*\[2, 3\], got \[3, 2"),
        ({"reference": torch.ones(2, 3).int()}, TypeError, "reference of here .*got Int"),
        ({"mask": torch.ones(6) > 0}, ValueError, r"mask of here .*\[2, 3\], got \[6\]"),
        ({"mask": torch.ones(2, 3)}, TypeError, "mask of here should be bool, got Float"),
        ({"column_scale": torch.ones(2)}, ValueError, r"column scale of here .*\[3\] or \[1\]"),
        ({"column_scale": torch.ones(3).double()}, TypeError, "column scale of here .*got Double"),
    ],
)
def test_bad_input_says_what_was_expected(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    given = {"weight": torch.ones(2, 3), **changes}
    with pytest.raises(error, match=message):
        ops.cosine_gains(given.pop("weight"), name="here", **given)
