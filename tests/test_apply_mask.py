"""``ops.apply_mask``: a product with a bool mask."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torchalignprune import ops


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str
)
@pytest.mark.parametrize("shape", [(), (0,), (5,), (3, 0), (37, 41), (2, 3, 4, 5), (300, 700)])
def test_is_the_product(device: torch.device, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape, device=device).to(dtype)
    mask = torch.rand(shape, device=device) > 0.5
    product = ops.apply_mask(weight, mask)
    expected = weight * mask
    assert product.dtype == dtype
    assert torch.equal(product, expected)
    assert torch.equal(product.signbit(), expected.signbit())


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**32))
def test_any_strides(rows: int, columns: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    mask = torch.rand(columns, rows, generator=generator).t() > 0.5
    for one in (weight, weight.t().contiguous().t(), weight[:, :1].expand(rows, columns)):
        assert torch.equal(ops.apply_mask(one, mask), one * mask)


def test_a_mask_of_another_dtype_or_shape_is_refused() -> None:
    with pytest.raises(TypeError, match="mask of weight should be bool"):
        ops.apply_mask(torch.ones(2), torch.ones(2))
    with pytest.raises(ValueError, match="should have shape"):
        ops.apply_mask(torch.ones(2), torch.ones(3, dtype=torch.bool))


def test_opcheck() -> None:
    torch.library.opcheck(
        torch.ops.torchalignprune.apply_mask.default,
        (torch.randn(4, 3), torch.rand(4, 3) > 0.5),
    )
