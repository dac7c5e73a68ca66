"""``ops.apply_mask`` and ``ops.masked_weight``: products with a bool mask, and their gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

import reference
from conftest import DTYPES
from models import assert_same_bits
from strategies import LAYOUTS, ODD, laid_out, masks, shapes, tensors
from torchalignprune import ops

NAN, INF = float("nan"), float("inf")
BOTH = pytest.mark.parametrize("operator", [ops.apply_mask, ops.masked_weight])
# Parts of torch warn of other parts of it when they are loaded.
TORCHS_OWN = pytest.mark.filterwarnings("ignore:.torch.jit.script")
Operator = Callable[[Tensor, Tensor], Tensor]


def half(*shape: int, device: str = "cpu") -> Tensor:
    return torch.rand(shape, device=device) < 0.5


@BOTH
def test_literal(operator: Operator, device: str, dtype: torch.dtype) -> None:
    weight = torch.tensor([[1.5, -2.0, NAN], [-0.0, INF, -3.0]], dtype=dtype, device=device)
    mask = torch.tensor([[True, False, False], [False, False, True]], device=device)
    product = operator(weight, mask)
    assert product.dtype == dtype
    assert product.tolist() == [[1.5, 0.0, 0.0], [0.0, 0.0, -3.0]]
    assert product.signbit().tolist() == [[False] * 3, [False, False, True]]


@BOTH
@given(data=st.data(), shape=shapes(), dtype=st.sampled_from(DTYPES))
def test_equals_the_plain_form(
    operator: Operator, data: st.DataObject, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    weight = data.draw(tensors(shape, dtype, values=ODD))
    mask = data.draw(masks(shape))
    given_weight, given_mask = weight.clone(), mask.clone()
    assert_same_bits(operator(weight, mask), reference.apply_mask(weight, mask))
    assert_same_bits(weight, given_weight)
    assert torch.equal(mask, given_mask)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mask_layout", LAYOUTS)
def test_any_strides(device: str, dtype: torch.dtype, layout: str, mask_layout: str) -> None:
    for shape in ((), (0, 3), (37, 60), (3, 8, 5, 7), (2, 3, 2, 5, 2, 3, 2)):
        weight = laid_out(torch.randn(shape, device=device).to(dtype), layout)
        mask = laid_out(half(*shape, device=device), mask_layout)
        product = ops.apply_mask(weight, mask)
        assert product.stride() == torch.empty_like(weight).stride()
        assert_same_bits(product, torch.where(mask, weight, 0))


@pytest.mark.parametrize("size", [1, 63, 4096, 4097, 3 * (1 << 16) + 77])
def test_any_size(device: str, dtype: torch.dtype, size: int) -> None:
    torch.set_num_threads(2)
    weight, mask = torch.randn(size + 3, device=device).to(dtype)[3:], half(size, device=device)
    assert_same_bits(ops.apply_mask(weight, mask), torch.where(mask, weight, 0))


@BOTH
def test_gradients(operator: Operator, device: str) -> None:
    weight = torch.randn(3, 4, dtype=torch.float64, device=device, requires_grad=True)
    mask = half(3, 4, device=device)
    for given_weight in (weight, weight.detach().mul(mask).requires_grad_()):
        torch.autograd.gradcheck(lambda w: operator(w, mask), (given_weight,))
        torch.autograd.gradgradcheck(lambda w: operator(w, mask) ** 3, (given_weight,))


def test_a_gradient_that_is_differentiated_is_masked_in_its_graph() -> None:
    weight, x = (torch.randn(3, 4, requires_grad=True) for _ in range(2))
    mask = half(3, 4)
    value = (ops.apply_mask(weight, mask) * x).sum()
    (grad,) = torch.autograd.grad(value, weight, create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), x)
    assert torch.equal(second, mask.float())


@BOTH
@TORCHS_OWN
def test_forward_mode(operator: Operator, device: str) -> None:
    weight, tangent, mask = torch.randn(3, device=device), torch.randn(3, device=device), half(3)
    mask = mask.to(device)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(weight, tangent)
        product, slope = forward_ad.unpack_dual(operator(dual, mask))
    assert torch.equal(product, torch.where(mask, weight, 0))
    assert slope is not None
    assert torch.equal(slope, torch.where(mask, tangent, 0))


@BOTH
@TORCHS_OWN
def test_transforms(operator: Operator, device: str) -> None:
    weight, mask = torch.randn(4, device=device), half(4, device=device)
    batch = torch.randn(3, 4, device=device)

    def loss(w: Tensor, x: Tensor) -> Tensor:
        return (operator(w, mask) ** 3 * x).sum()

    def plain(w: Tensor, x: Tensor) -> Tensor:
        return (torch.where(mask, w, 0) ** 3 * x).sum()

    transforms: list[Callable[[Any], Any]] = [
        lambda f: torch.func.grad(f)(weight, batch[0]),
        lambda f: torch.func.grad(f, argnums=1)(weight, batch[0]),
        lambda f: torch.func.vmap(f, (0, None))(batch, batch[0]),
        lambda f: torch.func.vmap(torch.func.grad(f), (None, 0))(weight, batch),
        lambda f: torch.func.jvp(f, (weight, batch[0]), (batch[1], batch[2]))[1],
        lambda f: torch.func.jacrev(f)(weight, batch[0]),
        lambda f: torch.func.hessian(f)(weight, batch[0]),
    ]
    for transform in transforms:
        torch.testing.assert_close(transform(loss), transform(plain))
    torch.testing.assert_close(
        torch.func.functionalize(loss)(weight, batch[0]), plain(weight, batch[0])
    )
    masks = torch.stack([mask, ~mask])
    assert torch.equal(
        torch.func.vmap(operator, (None, 0))(weight, masks), torch.where(masks, weight, 0)
    )


# The gradient in place


def weight_gradient(
    x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    (found,) = torch.autograd.grad(
        linear(x, ops.apply_mask(weight, mask), bias).square().sum(), weight
    )
    (plain,) = torch.autograd.grad(
        linear(x, torch.where(mask, weight, 0), bias).square().sum(), weight
    )
    return found, plain


def test_a_fresh_gradient_is_masked_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the size of the weight is made in the backward but the gradient itself."""
    weight = torch.randn(300, 500, requires_grad=True)
    x, mask = torch.randn(2, 7, 500), half(300, 500)
    for bias in (None, torch.randn(300)):
        with torch.profiler.profile(profile_memory=True, acc_events=True) as profile:
            linear(x, ops.apply_mask(weight, mask), bias).sum().backward()
        weight.grad = None
        events = [event.name for event in profile.events()]
        assert "torchalignprune::zero_pruned_" in events
        assert events.count("torchalignprune::apply_mask") == 1  # that of the forward


def test_gradients_that_others_have_stay_as_they_are() -> None:
    weight = torch.randn(3, 4, requires_grad=True)
    mask = half(3, 4)
    given_grad = torch.randn(3, 4)
    before = given_grad.clone()
    ops.apply_mask(weight, mask).backward(given_grad)
    assert torch.equal(given_grad, before)
    assert weight.grad is not None
    assert torch.equal(weight.grad, torch.where(mask, before, 0))

    product = ops.apply_mask(weight, mask)
    product.retain_grad()
    seen = []
    product.register_hook(lambda grad: seen.append(grad))
    weight.grad = None
    (product * before).sum().backward()
    assert product.grad is not None
    assert weight.grad is not None
    for kept in (product.grad, seen[0]):
        assert torch.equal(kept, before)
    assert torch.equal(weight.grad, torch.where(mask, before, 0))


def test_a_gradient_that_goes_two_ways_stays_as_it_is() -> None:
    """Addition hands the same tensor to both of its inputs."""
    weight, other = (torch.randn(3, 4, requires_grad=True) for _ in range(2))
    mask, factor = half(3, 4), torch.randn(3, 4)
    for first in (True, False):
        product = ops.apply_mask(weight, mask)
        total = product + other if first else other + product
        grads = torch.autograd.grad((total * factor).sum(), [weight, other])
        assert torch.equal(grads[0], torch.where(mask, factor, 0))
        assert torch.equal(grads[1], factor)
        weight.grad = other.grad = None
        total = ops.apply_mask(weight, mask) + other
        (total * factor).sum().backward()
        assert other.grad is not None
        assert torch.equal(other.grad, factor)


def test_a_gradient_with_a_view_of_it_elsewhere_stays_as_it_is() -> None:
    weight, mask, kept = torch.randn(4, 3, requires_grad=True), half(4, 3), []

    class Keeps(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, tensor: Tensor) -> Tensor:
            return tensor.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            made = torch.ones(3, 4)
            kept.append(made)
            return made.t()

    Keeps.apply(ops.apply_mask(weight, mask)).sum().backward()
    assert bool((kept[0] == 1).all())
    assert weight.grad is not None
    assert torch.equal(weight.grad, mask.float())
    turned, factor = ops.apply_mask(weight, mask).t(), torch.randn(3, 4)
    turned.register_hook(lambda grad: kept.append(grad))
    (turned * factor).sum().backward()
    assert torch.equal(kept[1], factor)


@TORCHS_OWN
def test_a_batch_of_gradients() -> None:
    weight, mask, x = torch.randn(3, 4, requires_grad=True), half(3, 4), torch.randn(5, 4)
    for operator in (ops.apply_mask, ops.masked_weight):
        found, plain = (
            torch.autograd.functional.jacobian(
                lambda w, f=f: linear(x, f(w, mask)).tanh(), weight, vectorize=True
            )
            for f in (operator, lambda w, m: torch.where(m, w, 0))
        )
        torch.testing.assert_close(found, plain)


def test_expanded_and_missing_gradients() -> None:
    weight, mask = torch.randn(3, 4, requires_grad=True), half(3, 4)
    ops.apply_mask(weight, mask).sum().backward()
    assert weight.grad is not None
    assert torch.equal(weight.grad, mask.float())
    a, b = torch.autograd.grad(
        ops.apply_mask(weight, mask).sum() * 0 + weight.sum(), [weight, weight]
    )
    assert bool((a == 1).all()) and bool((b == 1).all())


def test_a_graph_that_is_kept_gives_the_same_twice() -> None:
    x, weight, mask = torch.randn(5, 4), torch.randn(3, 4, requires_grad=True), half(3, 4)
    value = linear(x, ops.apply_mask(weight, mask)).square().sum()
    first = torch.autograd.grad(value, weight, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(value, weight, retain_graph=True)[0])
    value.backward()
    assert weight.grad is not None
    assert torch.equal(first, weight.grad)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(5, 6), (2, 5, 6)])
def test_gradients_through_layers(
    bias: bool, shape: tuple[int, ...], device: str, dtype: torch.dtype
) -> None:
    weight = torch.randn(4, 6, device=device).to(dtype).requires_grad_()
    x = torch.randn(shape, device=device).to(dtype)
    b = torch.randn(4, device=device).to(dtype) if bias else None
    found, plain = weight_gradient(x, weight, half(4, 6, device=device), b)
    assert torch.equal(found, plain)


def test_under_autocast(device: str) -> None:
    weight, x = (
        torch.randn(4, 6, device=device, requires_grad=True),
        torch.randn(5, 6, device=device),
    )
    with torch.autocast(device, torch.bfloat16):
        product = ops.apply_mask(weight, half(4, 6, device=device))
        assert product.dtype == torch.float32
        found, plain = weight_gradient(x, weight, half(4, 6, device=device))
    assert torch.equal(found, plain)


# masked_weight


def is_shared(product: Tensor, weight: Tensor) -> bool:
    return product.data_ptr() == weight.data_ptr()


@pytest.mark.parametrize("size", [1, 63, 4096, 4097, 3 * (1 << 16) + 77])
def test_shares_memory_exactly_where_there_is_nothing_to_mask(
    dtype: torch.dtype, size: int
) -> None:
    torch.set_num_threads(2)
    mask = half(size)
    mask[-1] = False
    weight = ops.apply_mask(torch.randn(size).to(dtype), mask)
    product = ops.masked_weight(weight, mask)
    assert is_shared(product, weight) and product is not weight
    assert_same_bits(product, weight)
    for place in {0, size // 2, size - 1} & set((~mask).nonzero().flatten().tolist()):
        for wrong in (1.0, -0.0, NAN):
            changed = weight.clone()
            changed[place] = wrong
            product = ops.masked_weight(changed, mask)
            assert not is_shared(product, changed)
            assert_same_bits(product, weight)


def test_a_shared_product_is_no_parameter_and_knows_of_changes() -> None:
    mask = half(3, 4)
    weight = nn.Parameter(ops.apply_mask(torch.randn(3, 4), mask))
    x = torch.randn(2, 4, requires_grad=True)
    for context in (torch.no_grad(), torch.inference_mode(), torch.enable_grad()):
        with context:
            product = ops.masked_weight(weight, mask)
            assert is_shared(product, weight)
            assert type(product) is Tensor
    value = linear(x, product).sum()
    with torch.no_grad():
        weight.mul_(2)
    assert product.grad_fn is not None  # a view would raise here
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


def test_the_shared_product_has_the_gradient_of_the_product() -> None:
    mask, x = half(3, 4), torch.randn(5, 4, requires_grad=True)
    weight = ops.apply_mask(torch.randn(3, 4), mask).requires_grad_()
    grads = [
        torch.autograd.grad(linear(x, product).square().sum(), [weight, x])
        for product in (ops.masked_weight(weight, mask), torch.where(mask, weight, 0))
    ]
    for found, plain in zip(*grads, strict=True):
        assert torch.equal(found, plain)


def test_the_shared_product_takes_no_memory() -> None:
    mask = half(256, 256)
    weight = ops.apply_mask(torch.randn(256, 256), mask).requires_grad_()
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.data_ptr())
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        linear(torch.randn(2, 256, requires_grad=True), ops.masked_weight(weight, mask))
    assert weight.data_ptr() in kept
    assert mask.data_ptr() in kept


@BOTH
@pytest.mark.parametrize("reentrant", [False, True])
def test_under_checkpointing(operator: Operator, reentrant: bool) -> None:
    weight, mask = torch.randn(4, 4, requires_grad=True), half(4, 4)
    x = torch.randn(2, 4, requires_grad=True)

    def layer(x: Tensor) -> Tensor:
        return linear(x, operator(weight, mask)).relu()

    plain = torch.autograd.grad(layer(layer(x)).sum(), [weight, x])
    value = checkpoint(
        layer, checkpoint(layer, x, use_reentrant=reentrant), use_reentrant=reentrant
    )
    value.sum().backward()
    for found, expected in zip((weight.grad, x.grad), plain, strict=True):
        torch.testing.assert_close(found, expected)


# Compilers


@BOTH
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_under_compile(operator: Operator, backend: str, device: str) -> None:
    torch.compiler.reset()
    weight = torch.randn(4, 6, device=device, requires_grad=True)
    mask, x = half(4, 6, device=device), torch.randn(5, 6, device=device)

    def loss(weight: Tensor, mask: Tensor) -> Tensor:
        return linear(x, operator(weight, mask)).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend=backend)
    for _ in range(2):
        expected = loss(weight, mask)
        found = compiled(weight, mask)
        torch.testing.assert_close(found, expected)
        grads = [torch.autograd.grad(value, weight)[0] for value in (found, expected)]
        torch.testing.assert_close(*grads)
        mask = ~mask


@pytest.mark.slow
@TORCHS_OWN
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_under_inductor_and_compiled_autograd() -> None:
    torch.compiler.reset()
    weight, mask, x = torch.randn(4, 6, requires_grad=True), half(4, 6), torch.randn(5, 6)

    def loss(operator: Operator) -> Tensor:
        return linear(x, operator(weight, mask)).square().sum()

    (plain,) = torch.autograd.grad(loss(ops.apply_mask), weight)
    for operator in (ops.apply_mask, ops.masked_weight):
        (found,) = torch.autograd.grad(torch.compile(loss, fullgraph=True)(operator), weight)
        torch.testing.assert_close(found, plain)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
        loss(ops.apply_mask).backward()
    torch.testing.assert_close(weight.grad, plain)


def test_export_and_trace_leave_operators_of_torch_alone() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 4))
            self.register_buffer("mask", half(3, 4))

        def forward(self, x: Tensor) -> Tensor:
            return linear(x, ops.masked_weight(self.weight, self.mask))

    layer, x = Layer(), torch.randn(2, 4)
    program = torch.export.export(layer, (x,))
    assert "torchalignprune" not in str(program.graph)
    torch.testing.assert_close(program.module()(x), layer(x))


# Bad input


@BOTH
def test_bad_input(operator: Operator) -> None:
    with pytest.raises(TypeError, match="mask of weight should be bool, got Float"):
        operator(torch.ones(2), torch.ones(2))
    with pytest.raises(ValueError, match=r"mask of weight should have shape \[2\], got \[3\]"):
        operator(torch.ones(2), torch.ones(3, dtype=torch.bool))
    with pytest.raises(TypeError, match="weight should be float32, float64"):
        operator(torch.ones(2, dtype=torch.int32), torch.ones(2, dtype=torch.bool))


# torch's own, in newer releases: opcheck asks every input for its gradient.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_opcheck(device: str) -> None:
    for weight in (torch.randn(4, 3, device=device), torch.randn(3, 4, device=device).t()):
        for leaf in (weight, weight.clone().requires_grad_()):
            torch.library.opcheck(
                torch.ops.torchalignprune.apply_mask.default, (leaf, half(4, 3, device=device))
            )


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
@BOTH
def test_sparse_gradients(operator: Operator, kind: Any) -> None:
    layer = kind(10, 4, sparse=True)
    mask = half(10, 4)
    rows = torch.tensor([[1, 2], [2, 7]])
    found = torch.func.functional_call(layer, {"weight": operator(layer.weight, mask)}, (rows,))
    (grad,) = torch.autograd.grad(found.sum(), layer.weight)
    plain = torch.func.functional_call(layer, {"weight": layer.weight * mask}, (rows,))
    (expected,) = torch.autograd.grad(plain.sum(), layer.weight)
    assert grad.is_sparse
    assert torch.equal(grad.to_dense(), expected.to_dense())


@pytest.mark.parametrize("name", ["apply_mask", "masked_weight", "zero_pruned_"])
def test_a_backward_finds_its_operators_on_any_device(name: str) -> None:
    """An extension that was built without CUDA meets models on a GPU all the same."""
    for key in ("CPU", "CUDA", "MPS", "XPU", "PrivateUse1"):
        has = torch._C._dispatch_has_computed_kernel_for_dispatch_key
        assert has(f"torchalignprune::{name}", key), key
