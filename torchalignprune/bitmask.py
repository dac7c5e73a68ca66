"""Packing a tensor into one bit for each entry and the remaining values, without any loss.

Entries are numbered in row-major order, whatever the strides are. Entry ``i`` has bit ``i % 8``,
counted from the lowest, of byte ``i // 8``. Bits past the last entry are 0.
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
    """A tensor of n entries, of which ``count`` are stored.

    Attributes:
        bits: uint8, shape ``(ceil(n / 8),)``: a set bit for each stored entry.
        values: shape ``(count,)``, in the dtype of the tensor: the stored entries, in order.
        signs: uint8, shape ``(ceil((n - count) / 8),)``: one bit for each of the other entries, in
            order, set if the entry is -0.0. None if all of them are +0.0.
    """

    bits: Tensor
    values: Tensor
    signs: Tensor | None


def byte_count(bits: int) -> int:
    """How many bytes a number of bits takes."""
    return -(-bits // 8)


def pack(tensor: Tensor, mask: Tensor | None = None) -> Packed | None:
    """Packs the nonzero entries of a tensor, or those under a mask of True.

    The sign of zeros is kept: the product of a negative weight and a mask is -0.0.

    Args:
        tensor: float32, float64, float16 or bfloat16, of any shape and strides, on any device.
        mask: bool, shaped like the tensor. Default: True where the tensor is not zero.

    Returns:
        The packed tensor, on the CPU; or None if an entry is not zero where the mask is False.

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
        ValueError: the numbers of bits and values differ, or bits past the last entry are set.
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
        ValueError: there are too many or too few bits, or bits past the last entry are set.
    """
    n = math.prod(shape)
    ops.count_bits(bits, n)
    flat = np.unpackbits(bits.numpy(), count=n, bitorder="little").view(bool)
    return torch.from_numpy(flat).reshape(shape)
