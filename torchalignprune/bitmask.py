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

__all__ = ["Packed", "byte_count", "pack", "pack_bits", "unpack", "unpack_bits"]

_CHUNK = 1 << 18  # entries that are worked on at a time, so that they stay in the cache
_WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_ONES = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(1, dtype=np.int64)


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
    words = _words(tensor.detach().cpu().contiguous())
    given = None if mask is None else mask.detach().cpu().contiguous().view(-1).numpy()
    n = len(words)
    bits = np.empty(byte_count(n), np.uint8)
    values, negative = [words[:0]], [np.empty(0, bool)]
    for start in range(0, n, _CHUNK):
        part = words[start : start + _CHUNK]
        kept = part << 1 != 0 if given is None else given[start : start + _CHUNK]
        bits[start // 8 : byte_count(start + len(part))] = np.packbits(kept, bitorder="little")
        values.append(part[kept])
        rest = part[~kept]
        if given is not None and (rest << 1).any():
            return None
        negative.append(rest != 0)
    signs = np.concatenate(negative)
    return Packed(
        torch.from_numpy(bits),
        torch.from_numpy(np.concatenate(values)).view(tensor.dtype),
        torch.from_numpy(np.packbits(signs, bitorder="little")) if signs.any() else None,
    )


def unpack(packed: Packed, shape: tuple[int, ...]) -> Tensor:
    """The tensor that :func:`pack` was given, contiguous.

    Raises:
        ValueError: the parts do not fit together: not as many values as bits, or bits past the
            end.
    """
    bits, values, signs = packed
    n = math.prod(shape)
    count = count_bits(bits, n)
    if count != len(values):
        raise ValueError(
            f"there should be as many values as bits are set, {count}, got {len(values)}"
        )
    words = _words(values)
    out = np.zeros(n, words.dtype)
    packed_bits = bits.numpy()
    taken = 0
    for start in range(0, n, _CHUNK):
        part = out[start : start + _CHUNK]
        kept = _unpacked(packed_bits[start // 8 : byte_count(start + len(part))], len(part))
        there = int(np.count_nonzero(kept))
        part[kept] = words[taken : taken + there]
        taken += there
    if signs is not None:
        count_bits(signs, n - count)
        zeros = np.flatnonzero(~_unpacked(packed_bits, n))
        out[zeros[_unpacked(signs.numpy(), n - count)]] = np.iinfo(words.dtype).min
    return torch.from_numpy(out).view(values.dtype).reshape(shape)


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
    count_bits(bits, n)
    return torch.from_numpy(_unpacked(bits.numpy(), n)).reshape(shape)


def count_bits(bits: Tensor, n: int) -> int:
    """How many of the first n bits are set.

    Raises:
        ValueError: ``bits`` is not as long as n bits are, or has bits past them.
    """
    if len(bits) != byte_count(n):
        raise ValueError(f"there should be {byte_count(n)} bytes of bits, got {len(bits)}")
    if n % 8 and int(bits[-1]) >> n % 8:
        raise ValueError(f"there are bits past the last of {n}")
    parts = (bits.numpy()[start : start + _CHUNK] for start in range(0, len(bits), _CHUNK))
    return sum(int(_ONES @ np.bincount(part, minlength=256)) for part in parts)


def _words(tensor: Tensor) -> np.ndarray:
    """The bits of the entries, as integers: no arithmetic touches a NaN or the sign of a zero."""
    return tensor.reshape(-1).view(_WORDS[tensor.element_size()]).numpy()


def _unpacked(bits: np.ndarray, n: int) -> np.ndarray:
    return np.unpackbits(bits, count=n, bitorder="little").view(bool)
