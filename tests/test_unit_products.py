"""ops.unit_products and ops.unit_combination, which is its gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import forward_ad

import reference as plain
from conftest import DTYPES
from strategies import GRID, laid_out, masks, shapes, tensors
from torchalignprune import ops


def _index(order: list[int]) -> Tensor:
    return torch.tensor(order, dtype=torch.int64)


def call(draw: st.DrawFn, shape: tuple[int, ...]) -> dict[str, Any]:
    """One tensor and whatever may go with it."""
    values = draw(st.sampled_from([GRID, None]))
    weight = draw(tensors(shape, draw(st.sampled_from(DTYPES)), values=values))
    dim = draw(st.integers(0, 1)) if len(shape) > 1 else 0
    units = 1 if len(shape) < 2 else shape[dim]
    other = tensors(shape, draw(st.sampled_from(DTYPES)), values=values)
    return {
        "weight": weight,
        "mask": draw(st.none() | masks(shape)),
        "reference": draw(st.none() | other),
        "index": draw(st.none() | st.permutations(range(units)).map(_index)),
        "dim": dim,
    }


@st.composite
def calls(draw: st.DrawFn) -> list[dict[str, Any]]:
    return [call(draw, shape) for shape in draw(st.lists(shapes(), min_size=1, max_size=4))]


def lists(several: list[dict[str, Any]], device: str) -> dict[str, list[Any]]:
    def there(key: str) -> list[Any]:
        return [
            one[key].to(device) if isinstance(one[key], Tensor) else one[key] for one in several
        ]

    return {
        "masks": there("mask"),
        "references": there("reference"),
        "indices": there("index"),
        "dims": there("dim"),
    }


def test_products_of_two_units() -> None:
    weight = torch.tensor([[3.0, 4.0], [1.0, 2.0]])
    r = torch.tensor([[1.0, 1.0], [0.0, 3.0]])
    found = ops.unit_products([weight], masks=[weight > 1], references=[r])
    assert found.tolist() == [[25, 4], [7, 6], [2, 9]]
    found = ops.unit_products([weight], masks=[weight > 1], references=[r], dims=[1])
    assert found.tolist() == [[9, 20], [3, 10], [1, 10]]
    swapped = torch.tensor([1, 0])
    found = ops.unit_products([weight], references=[r], indices=[swapped])
    assert found[1].tolist() == [12, 3]
    assert found.dtype == torch.float64


def test_units_of_several_tensors_follow_one_another() -> None:
    found = ops.unit_products([torch.ones(2, 3), torch.tensor([2.0, 2.0]), torch.tensor(3.0)])
    assert found[0].tolist() == [3, 3, 8, 9]


def test_what_is_pruned_may_be_nan() -> None:
    weight = torch.tensor([[1.0, float("nan")]])
    found = ops.unit_products([weight], masks=[weight == 1], references=[torch.ones(1, 2)])
    assert found.flatten().tolist() == [1, 1, 2]


@given(several=calls())
def test_products_equal_the_plain_form(several: list[dict[str, Any]], device: str) -> None:
    weights = [one["weight"].to(device) for one in several]
    found = ops.unit_products(weights, **lists(several, device))
    expected = torch.cat([plain.unit_products(**one) for one in several], dim=1)
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-12, atol=1e-300)


@given(several=calls(), seed=st.integers(0, 1000))
def test_combination_equals_the_plain_form(
    several: list[dict[str, Any]], seed: int, device: str
) -> None:
    weights = [one["weight"].to(device) for one in several]
    units = [
        1 if w.dim() < 2 else w.size(one["dim"]) for w, one in zip(weights, several, strict=True)
    ]
    generator = torch.Generator().manual_seed(seed)
    coefficients = torch.randn(2, sum(units), dtype=torch.float64, generator=generator)
    found = ops.unit_combination(weights, coefficients.to(device), **lists(several, device))
    parts = coefficients.split(units, dim=1)
    for one, own, result in zip(several, parts, found, strict=True):
        assert result.dtype == one["weight"].dtype
        assert result.shape == one["weight"].shape
        expected = plain.unit_combination(one["weight"], own, *list(one.values())[1:])
        got = plain.units_first(result.cpu(), one["dim"])
        torch.testing.assert_close(got, expected.to(result.dtype), atol=1e-6, rtol=1.6e-2)
        if result.dtype == torch.float64:
            torch.testing.assert_close(got, expected, atol=1e-12, rtol=1e-12)


LONG = [(3, 70_000), (70_000, 3), (1, 100_000), (200, 300)]


@pytest.mark.parametrize(
    ("shape", "dim"), [((100_000,), 0), *((shape, dim) for shape in LONG for dim in (0, 1))]
)
def test_long_units_and_many_threads(shape: tuple[int, ...], dim: int, dtype: torch.dtype) -> None:
    weight, r = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    mask = torch.rand(shape) > 0.3
    arguments: dict[str, Any] = {"masks": [mask], "references": [r], "dims": [dim]}
    found = ops.unit_products([weight], **arguments)
    expected = plain.unit_products(weight, mask, r, dim=dim)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    for threads in (1, 3):
        torch.set_num_threads(threads)
        assert torch.equal(ops.unit_products([weight], **arguments), found)


def test_strides_of_the_weight_are_kept() -> None:
    for layout in ("transposed", "channels_last"):
        weight = laid_out(torch.randn(4, 3, 2, 5), layout)
        (found,) = ops.unit_combination([weight], torch.ones(2, 4, dtype=torch.float64))
        assert found.stride() == weight.stride()
        torch.testing.assert_close(found, 2 * weight)


def double(*shape: int, grad: bool = True) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=grad)


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("with_reference", [False, True])
def test_gradients_of_any_order(dim: int, with_reference: bool) -> None:
    w, v, r = double(3, 4, 2), double(5), double(3, 4, 2, grad=False)
    mask = torch.rand(3, 4, 2) > 0.3
    arguments: dict[str, Any] = {
        "masks": [mask, None],
        "references": [r if with_reference else w.detach().clone(), double(5, grad=False)],
        "indices": [torch.randperm(w.size(dim)), None],
        "dims": [dim, 0],
    }

    def products(w: Tensor, v: Tensor) -> Tensor:
        return ops.unit_products([w, v], **arguments)

    assert torch.autograd.gradcheck(products, (w, v))
    assert torch.autograd.gradgradcheck(products, (w, v))

    def combination(w: Tensor, v: Tensor, coefficients: Tensor) -> tuple[Tensor, ...]:
        return tuple(ops.unit_combination([w, v], coefficients, **arguments))

    coefficients = double(2, w.size(dim) + 1)
    assert torch.autograd.gradcheck(combination, (w, v, coefficients))
    assert torch.autograd.gradgradcheck(combination, (w, v, coefficients))


def test_second_derivatives_are_summed_in_float64() -> None:
    weight, given, passed = torch.randn(3, 4, 50).bfloat16().unbind()
    coefficients = double(2, 4)
    (combined,) = ops.unit_combination([weight], coefficients, references=[given])
    (found,) = torch.autograd.grad(combined, coefficients, passed)
    expected = torch.stack([given.double(), weight.double()]).mul(passed.double()).sum(dim=2)
    torch.testing.assert_close(found, expected)


def test_gradient_goes_to_those_that_ask_for_it() -> None:
    w, v = double(2, 3), double(2, 3, grad=False)
    ops.unit_products([w, v], references=[v, w]).sum().backward()
    assert w.grad is not None
    torch.testing.assert_close(w.grad, 2 * w.detach() + v)
    assert v.grad is None


# torch's own, in newer releases: opcheck asks every input for its gradient.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_operators_are_well_behaved() -> None:
    mask = torch.rand(3, 4) > 0.5
    index = torch.tensor([2, 0, 1])
    arguments = ([torch.randn(3, 4, requires_grad=True), torch.randn(2)], [mask, None])
    rest = ([torch.randn(3, 4), torch.randn(2)], [index, None])
    names = ["a", "b"]
    torch.library.opcheck(
        torch.ops.torchalignprune.unit_products.default, (*arguments, *rest, [0, 0], names)
    )
    coefficients = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    torch.library.opcheck(
        torch.ops.torchalignprune.unit_combination.default,
        (*arguments, *rest, coefficients, [0, 0], names),
    )


W = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"weights": []}, ValueError, "weights should have at least one tensor, got none"),
        ({"weights": [W.long()]}, TypeError, r"weights\[0\] should be float32, float64"),
        ({"masks": [W]}, TypeError, r"the mask of weights\[0\] should be bool, got Float"),
        ({"masks": [W[:1] > 0]}, ValueError, r"should have shape \[2, 3\], got \[1, 3\]"),
        ({"masks": []}, ValueError, "masks should have one entry for each of the 1 weights, got 0"),
        (
            {"references": [W[0]]},
            ValueError,
            r"the reference of weights\[0\] should have shape \[2, 3\], got \[3\]",
        ),
        ({"dims": [2]}, ValueError, r"the dim of weights\[0\] should be 0, or 1 for a tensor"),
        ({"weights": [W[0]], "dims": [1]}, ValueError, "got 1 for 1 dimensions"),
        ({"indices": [torch.arange(3)]}, ValueError, r"should have shape \[2\], one for each unit"),
        ({"indices": [torch.tensor([0, 2])]}, ValueError, r"should be in \[0, 2\), got 2"),
        ({"indices": [torch.tensor([-1, 0])]}, ValueError, r"should be in \[0, 2\), got -1"),
        ({"indices": [W[:, 0]]}, TypeError, "should be int64, got Float"),
    ],
)
def test_bad_input(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"weights": [W], **arguments}
    with pytest.raises(error, match=message):
        ops.unit_products(**arguments)
    with pytest.raises(error, match=message):
        ops.unit_combination(coefficients=torch.ones(2, 2, dtype=torch.float64), **arguments)


@pytest.mark.filterwarnings("ignore:.torch.jit.script")
def test_forward_mode_is_refused() -> None:
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(W, torch.ones_like(W))
        with pytest.raises(NotImplementedError, match="no forward-mode derivatives"):
            ops.unit_products([dual])
        with pytest.raises(NotImplementedError, match="no forward-mode derivatives"):
            ops.unit_combination([dual], torch.ones(2, 2, dtype=torch.float64))
        factors = torch.ones(2, 2, dtype=torch.float64)
        factors = forward_ad.make_dual(factors, factors.clone())
        with pytest.raises(NotImplementedError, match="no forward-mode derivatives"):
            ops.unit_combination([W], factors)
        assert torch.equal(ops.unit_products([W]), ops.unit_products([W.clone()]))


def test_the_operator_itself_refuses_an_empty_list() -> None:
    nothing: list[Any] = [[], [], [], []]
    coefficients = torch.zeros(2, 0, dtype=torch.float64)
    with pytest.raises(ValueError, match="at least one tensor"):
        torch.ops.torchalignprune.unit_combination(*nothing, coefficients, [], [])


@pytest.mark.parametrize(
    ("coefficients", "error", "message"),
    [
        (torch.ones(2, 3).double(), ValueError, r"should have shape \[2, 2\], got \[2, 3\]"),
        (torch.ones(2, 2), TypeError, "coefficients should be float64, got Float"),
    ],
)
def test_bad_coefficients(coefficients: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ops.unit_combination([W], coefficients)
