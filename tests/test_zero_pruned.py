"""``ops.zero_pruned_``: pruned entries become +0, in place."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import reference
from conftest import DTYPES
from models import assert_same_bits
from strategies import LAYOUTS, ODD, laid_out, masks, shapes, tensors
from torchalignprune import ops

NAN, INF = float("nan"), float("inf")
IN_PLACE = [layout for layout in LAYOUTS if layout != "expanded"]


def test_literal(device: str, dtype: torch.dtype) -> None:
    tensor = torch.tensor([[1.5, -2.0, NAN], [-0.0, INF, -3.0]], dtype=dtype, device=device)
    mask = torch.tensor([[True, False, False], [False, False, True]], device=device)
    ops.zero_pruned_([tensor], [mask])
    assert tensor.tolist() == [[1.5, 0.0, 0.0], [0.0, 0.0, -3.0]]
    assert not bool(tensor.signbit()[1, 0])


@given(data=st.data(), shape=shapes(), dtype=st.sampled_from(DTYPES))
def test_equals_the_plain_form(
    data: st.DataObject, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    tensor = data.draw(tensors(shape, dtype, values=ODD, layouts=IN_PLACE))
    mask = data.draw(masks(shape))
    expected = reference.apply_mask(tensor, mask)
    ops.zero_pruned_([tensor], [mask])
    assert_same_bits(tensor, expected)


# Whole blocks, tiles, what is left over, and more than one thread's share.
@pytest.mark.parametrize("size", [63, 64, 511, 512, 513, 1 << 12, 3 * (1 << 16) + 77])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 1.0])
def test_any_size(device: str, dtype: torch.dtype, size: int, share: float) -> None:
    torch.set_num_threads(2)
    whole = torch.randn(size + 5, device=device).to(dtype)
    tensor = whole[3 : 3 + size]
    mask = torch.rand(size, device=device) >= share
    expected, before = tensor.masked_fill(~mask, 0), whole.clone()
    for _ in range(2):
        ops.zero_pruned_([tensor], [mask])
        assert_same_bits(tensor, expected)
    assert_same_bits(whole[:3], before[:3])
    assert_same_bits(whole[3 + size :], before[3 + size :])


@pytest.mark.parametrize("layout", IN_PLACE)
@pytest.mark.parametrize("mask_layout", LAYOUTS)
def test_any_strides(device: str, dtype: torch.dtype, layout: str, mask_layout: str) -> None:
    for shape in ((37, 60), (3, 8, 5, 7), (2, 3, 2, 5, 2, 3, 2)):
        tensor = laid_out(torch.randn(shape, device=device).to(dtype), layout)
        mask = laid_out(torch.rand(shape, device=device) < 0.5, mask_layout)
        strides, expected = tensor.stride(), tensor.masked_fill(~mask, 0)
        ops.zero_pruned_([tensor], [mask])
        assert tensor.stride() == strides
        assert_same_bits(tensor, expected)


def test_many_tensors_at_once(device: str) -> None:
    sizes = [1 + 37 * i % 1000 for i in range(200)] + [0, 1 << 17]
    dtypes = [DTYPES[i % 4] for i in range(len(sizes))]
    tensors = [torch.randn(n, device=device).to(d) for n, d in zip(sizes, dtypes, strict=True)]
    masks = [torch.rand(n, device=device) < 0.5 for n in sizes]
    expected = [t.masked_fill(~m, 0) for t, m in zip(tensors, masks, strict=True)]
    ops.zero_pruned_(tensors, masks)
    for found, wanted in zip(tensors, expected, strict=True):
        assert_same_bits(found, wanted)


def test_what_lies_beside_a_strided_tensor_stays(device: str) -> None:
    whole = torch.ones(6, 8, device=device)
    ops.zero_pruned_([whole[::2, 1:7:3]], [torch.zeros(3, 2, dtype=torch.bool, device=device)])
    expected = torch.ones(6, 8, device=device)
    expected[::2, 1:7:3] = 0
    assert torch.equal(whole, expected)


def test_no_tensors() -> None:
    ops.zero_pruned_([], [])


def test_parameters_and_the_state_of_an_optimizer(device: str) -> None:
    layer = nn.Linear(8, 4, device=device)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.randn(2, 8, device=device)).sum().backward()
    optimizer.step()
    mask = torch.rand(4, 8, device=device) < 0.5
    state = optimizer.state[layer.weight]
    moments = [state["exp_avg"], state["exp_avg_sq"]]
    ops.zero_pruned_([layer.weight, *moments], [mask] * 3)
    for tensor in (layer.weight, *moments):
        assert int((tensor != 0).sum()) == int(mask.sum())
    assert layer.weight.is_leaf and layer.weight.requires_grad


def test_a_graph_that_kept_a_tensor_is_told(device: str) -> None:
    weight = torch.randn(4, device=device, requires_grad=True)
    value = (weight * weight).sum()
    version = weight._version
    ops.zero_pruned_([weight], [torch.rand(4, device=device) < 0.5])
    assert weight._version == version + 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


def test_in_inference_mode(device: str) -> None:
    with torch.inference_mode():
        tensor = torch.ones(3, device=device)
        ops.zero_pruned_([tensor], [torch.tensor([True, False, True], device=device)])
        assert tensor.tolist() == [1, 0, 1]


TRUE = torch.ones(2, 3, dtype=torch.bool)


@pytest.mark.parametrize(
    ("tensors", "masks", "error", "message"),
    [
        ([torch.ones(2, 3)], [TRUE.t()], ValueError, r"should have shape \[2, 3\], got \[3, 2\]"),
        ([torch.ones(2, 3)], [TRUE.float()], TypeError, "mask of b should be bool, got Float"),
        ([torch.ones(2, 3).int()], [TRUE], TypeError, "b should be float32, float64"),
        ([torch.ones(2, 3)], [], ValueError, "masks should have one entry for each of the 2"),
        ([], [TRUE], ValueError, "masks should have one entry for each of the 1"),
        ([torch.ones(1, 3).expand(2, 3)], [TRUE], ValueError, "b should have a place in memory"),
    ],
)
def test_bad_input_changes_nothing(
    tensors: list[Tensor], masks: list[Tensor], error: type[Exception], message: str
) -> None:
    good = torch.ones(2, 3)
    names = ["a", "b"][: 1 + len(tensors)]
    with pytest.raises(error, match=message):
        ops.zero_pruned_([good, *tensors], [~TRUE, *masks], names=names)
    assert bool((good == 1).all())


def test_opcheck(device: str) -> None:
    tensors = [torch.randn(4, 3, device=device), torch.randn(5, device=device)]
    masks = [torch.rand(4, 3, device=device) < 0.5, torch.rand(5, device=device) < 0.5]
    torch.library.opcheck(
        torch.ops.torchalignprune.zero_pruned_.default, (tensors, masks, ["a", "b"])
    )


def test_under_compile(device: str) -> None:
    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(tensor: Tensor, mask: Tensor) -> Tensor:
        ops.zero_pruned_([tensor], [mask])
        return tensor + 1

    tensor = torch.randn(4, 3, device=device)
    mask = torch.rand(4, 3, device=device) < 0.5
    expected = tensor.masked_fill(~mask, 0)
    assert torch.equal(step(tensor, mask), expected + 1)
    assert torch.equal(tensor, expected)


def test_where_there_is_no_kernel() -> None:
    """What devices without a kernel of their own are given, called for tensors of the CPU."""
    tensors = [torch.tensor([1.0, -2.0, NAN, -0.0]), torch.randn(3, 4).t()]
    masks = [torch.tensor([True, False, False, False]), torch.rand(4, 3) < 0.5]
    expected = [reference.apply_mask(t, m) for t, m in zip(tensors, masks, strict=True)]
    operator = torch.ops.torchalignprune.zero_pruned_.default
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.MPS)
    operator.redispatch(keys, tensors, masks, ["a", "b"])
    for tensor, wanted in zip(tensors, expected, strict=True):
        assert_same_bits(tensor, wanted)
    with pytest.raises(ValueError, match="masks should have one entry"):
        operator.redispatch(keys, tensors, masks[:1], ["a", "b"])
