"""Hypothesis strategies for tensors: any shape, any layout, many ties, odd values."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

# For the properties that matter most: more examples, whatever the profile.
thorough = settings(max_examples=5 * settings().max_examples)

LAYOUTS = ("contiguous", "transposed", "strided", "offset", "channels_last", "expanded")

# All are exact in bfloat16, so that ties are the same in every dtype.
GRID = (0.0, -0.0, 0.25, -0.25, 0.5, -0.5, 1.0, -1.0, 1.5, -2.0, 3.0, -4.0)
ODD = (*GRID, 2.0**-126, -(2.0**-133), 2.0**100, -(2.0**100), float("inf"), float("-inf"))


# Of a dozen entries a few such shares in a row each prune some, but not all.
PARTIAL = st.integers(20, 60).map(lambda percent: percent / 100)
SHARES = PARTIAL | st.floats(0.125, 0.875, width=32) | st.floats(0, 1, width=32)


def amounts(others: Sequence[int | float] = ()) -> st.SearchStrategy[list[int | float]]:
    """Amounts for pruning once or several times; mostly several times partially."""
    anything = SHARES | st.sampled_from(others) if others else SHARES
    return st.lists(PARTIAL, min_size=2, max_size=4) | st.lists(anything, min_size=1, max_size=4)


def shapes(min_dims: int = 0, max_dims: int = 4, min_side: int = 0) -> st.SearchStrategy:
    return st.lists(st.integers(min_side, 5), min_size=min_dims, max_size=max_dims).map(tuple)


@st.composite
def tensors(
    draw: st.DrawFn,
    shape: Sequence[int],
    dtype: torch.dtype,
    *,
    values: Sequence[float] | None = GRID,
    layouts: Sequence[str] = LAYOUTS,
) -> Tensor:
    """Tensors of ``values``, or if None of normal numbers: no ties in float32 and float64."""
    size = int(torch.Size(shape).numel())
    if values is None:
        generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
        tensor = torch.randn(tuple(shape), generator=generator, dtype=torch.float64).to(dtype)
    else:
        chosen = draw(st.lists(st.sampled_from(values), min_size=size, max_size=size))
        tensor = torch.tensor(chosen, dtype=torch.float64).to(dtype).reshape(tuple(shape))
    return laid_out(tensor, draw(st.sampled_from(layouts)))


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """The same values in another layout; a layout that the shape cannot have leaves it as it is.

    ``"expanded"`` repeats the first row without memory of its own, so its values do change.
    """
    if layout == "transposed" and tensor.dim() >= 2:
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "strided" and tensor.dim() >= 1:
        wide = tensor.new_empty(*tensor.shape[:-1], 2 * tensor.size(-1))
        return wide[..., ::2].copy_(tensor)
    if layout == "offset":
        return tensor.new_empty(tensor.numel() + 1)[1:].view(tensor.shape).copy_(tensor)
    if layout == "channels_last" and tensor.dim() == 4:
        return tensor.contiguous(memory_format=torch.channels_last)
    if layout == "expanded" and tensor.dim() >= 1 and tensor.size(0) > 0:
        return tensor[:1].expand_as(tensor)
    return tensor.contiguous()


@st.composite
def masks(draw: st.DrawFn, shape: Sequence[int]) -> Tensor:
    size = int(torch.Size(shape).numel())
    chosen = draw(st.lists(st.booleans(), min_size=size, max_size=size))
    mask = torch.tensor(chosen, dtype=torch.bool).reshape(tuple(shape))
    return laid_out(mask, draw(st.sampled_from(LAYOUTS)))
