"""A tensor as one bit for each entry and the values that remain, and back, bit for bit.

Entries are numbered in row-major order, whatever the strides are. Entry ``i`` has bit ``i % 8``,
counted from the lowest, of byte ``i // 8``; the bits past the last entry are 0.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from torchalignprune import ops

__all__ = ["Packed", "byte_count", "pack", "pack_bits", "unpack", "unpack_bits"]


class Packed(NamedTuple):
    """A tensor of n entries, of which ``count`` have a bit.

    Attributes:
        bits: uint8, shape ``(ceil(n / 8),)``; set where an entry has a value.
        values: shape ``(count,)``, in the dtype of the tensor: the entries that have a bit, in
            order.
        signs: uint8, shape ``(ceil((n - count) / 8),)``: of the entries without a bit, in order,
            set where one is -0.0; None if all of them are +0.0.
    """

    bits: Tensor
    values: Tensor
    signs: Tensor | None


def byte_count(bits: int) -> int:
    """How many bytes hold so many bits."""
    return -(-bits // 8)


def pack(tensor: Tensor, mask: Tensor | None = None) -> Packed | None:
    """The values of a tensor that are not zero, or those where a mask is true.

    Zeros of either sign come back with their sign: a product with a mask leaves -0.0 where a
    negative weight was.

    Args:
        tensor: float32, float64, float16 or bfloat16, of any shape and strides, on any device.
        mask: bool, shaped like the tensor. Default: where it is not zero.

    Returns:
        The parts, on the CPU; None if an entry where the mask is false is not zero.

    Example:
        >>> import torch
        >>> packed = pack(torch.tensor([[0.0, 3.0], [-2.0, 0.0]]))
        >>> packed.bits, packed.values, packed.signs
        (tensor([6], dtype=torch.uint8), tensor([ 3., -2.]), None)
        >>> unpack(packed, (2, 2))
        tensor([[ 0.,  3.],
                [-2.,  0.]])
    """
    own = None if mask is None else mask.detach().cpu()
    bits, values, signs, lost = ops.pack_entries(tensor.detach().cpu(), own)
    return None if lost else Packed(bits, values, signs if len(signs) else None)


def unpack(packed: Packed, shape: tuple[int, ...]) -> Tensor:
    """The tensor that :func:`pack` was given, contiguous.

    Raises:
        ValueError: the parts do not fit together: not as many values as bits, or bits past the
            last.
    """
    bits, values, signs = packed
    return ops.unpack_entries(bits, values, bits[:0] if signs is None else signs, shape)


def pack_bits(mask: Tensor) -> Tensor:
    """A bool tensor of any shape, strides and device as bits: uint8, shape ``(ceil(n / 8),)``.

    Example:
        >>> import torch
        >>> pack_bits(torch.tensor([False, True, True]))
        tensor([6], dtype=torch.uint8)
    """
    flat = mask.detach().cpu().contiguous().view(-1).numpy()
    return torch.from_numpy(np.packbits(flat, bitorder="little"))


def unpack_bits(bits: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The bool tensor that :func:`pack_bits` was given, contiguous.

    Raises:
        ValueError: too many or too few bits, or bits past the end.
    """
    n = math.prod(shape)
    ops.count_bits(bits, n)
    flat = np.unpackbits(bits.numpy(), count=n, bitorder="little").view(bool)
    return torch.from_numpy(flat).reshape(shape)
