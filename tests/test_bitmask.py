"""Tensors as bits and the values that remain: every bit comes back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import reference as twin
from strategies import LAYOUTS, laid_out, masks, shapes, tensors
from torchalignprune import ops
from torchalignprune.bitmask import Packed, pack, pack_bits, unpack, unpack_bits

WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits_of(tensor: Tensor) -> list[int]:
    words: list[int] = tensor.reshape(-1).view(WORDS[tensor.element_size()]).tolist()
    return words


def any_bits(data: st.DataObject, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor of any bits at all: zeros of both signs, NaN of every payload, denormals."""
    size = 8 * dtype.itemsize
    word = st.one_of(
        st.sampled_from([0, 0, -(1 << size - 1), 1, -1]),
        st.integers(-(1 << size - 1), (1 << size - 1) - 1),
    )
    n = int(torch.Size(shape).numel())
    words = data.draw(st.lists(word, min_size=n, max_size=n))
    made = torch.tensor(words, dtype=WORDS[dtype.itemsize]).view(dtype).reshape(shape)
    return laid_out(made, data.draw(st.sampled_from(LAYOUTS)))


def test_by_hand() -> None:
    packed = pack(torch.tensor([[0.0, 3.0, -0.0], [0.0, -2.0, 0.0], [0, 0, 1]]))
    assert packed is not None and packed.signs is not None
    assert packed.bits.tolist() == [0b00010010, 0b1] and packed.values.tolist() == [3, -2, 1]
    assert packed.signs.tolist() == [0b000010]
    masked = pack(torch.tensor([5.0, -0.0, 0.0]), torch.tensor([True, True, False]))
    assert masked is not None and masked.signs is None
    assert masked.bits.tolist() == [0b011] and bits_of(masked.values) == [0x40A00000, -(1 << 31)]
    assert pack(torch.tensor([5.0, 1.0, 0.0]), torch.tensor([True, False, False])) is None


@given(st.data())
def test_every_bit_comes_back(dtype: torch.dtype, data: st.DataObject) -> None:
    shape = data.draw(shapes())
    tensor = any_bits(data, shape, dtype)
    packed = pack(tensor)
    assert packed is not None
    expected = twin.pack(tensor)
    assert [packed.bits.tolist(), bits_of(packed.values)] == expected[:2]
    assert (None if packed.signs is None else packed.signs.tolist()) == expected[2]
    again = unpack(packed, shape)
    assert again.dtype == dtype and again.shape == shape and again.is_contiguous()
    assert bits_of(again) == bits_of(tensor)


@given(st.data())
def test_what_a_mask_keeps_comes_back(dtype: torch.dtype, data: st.DataObject) -> None:
    shape = data.draw(shapes())
    mask = data.draw(masks(shape))
    tensor = any_bits(data, shape, dtype)
    rest = any_bits(data, shape, dtype) * 0.0  # zeros, of either sign, and NaN
    tensor = torch.where(mask, tensor, rest)
    packed = pack(tensor, mask)
    assert (packed is None) == bool((rest.isnan() & ~mask).any())
    if packed is not None:
        assert torch.equal(unpack_bits(packed.bits, shape), mask)
        assert len(packed.values) == int(mask.sum())
        assert bits_of(unpack(packed, shape)) == bits_of(tensor)
    assert torch.equal(unpack_bits(pack_bits(mask), shape), mask)


@pytest.mark.parametrize("n", [2**18 - 1, 2**18, 2**18 + 1, 3 * 2**18 + 77])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_large_tensors(n: int, share: float, dtype: torch.dtype) -> None:
    tensor = torch.randn(n).to(dtype) * (torch.rand(n) < share)  # zeros of both signs
    packed = pack(tensor)
    assert packed is not None and len(packed.values) == int(tensor.count_nonzero())
    assert torch.equal(packed.values, tensor[tensor != 0])
    words = WORDS[dtype.itemsize]
    assert torch.equal(unpack(packed, (n,)).view(words), tensor.view(words))
    plain = pack(tensor.abs())
    assert plain is not None and plain.signs is None
    assert torch.equal(unpack(plain, (n,)), tensor.abs())


def test_denormals_are_no_zeros() -> None:
    before = torch.set_flush_denormal(True)
    try:
        packed = pack(torch.tensor([1, 0, -(1 << 31) + 1], dtype=torch.int32).view(torch.float32))
    finally:
        torch.set_flush_denormal(False)
    assert before and packed is not None and packed.bits.tolist() == [0b101]


@pytest.mark.parametrize(
    ("bits", "values", "signs", "message"),
    [
        ([0b11], 3, None, r"values should have shape \[2\], one for each bit, got \[3\]"),
        ([0b111], 2, None, r"values should have shape \[3\], one for each bit, got \[2\]"),
        ([3, 0], 2, None, r"bits should have shape \[1\], that of 5 bits, got \[2\]"),
        ([], 0, None, r"bits should have shape \[1\], that of 5 bits, got \[0\]"),
        ([0b100001], 2, None, "bits should be 0 past the last of 5"),
        ([0b11], 2, [0b1000], "signs should be 0 past the last of 3"),
        ([0b11], 2, [0, 0], r"signs should have shape \[1\], that of 3 bits, got \[2\]"),
    ],
)
def test_parts_that_do_not_fit(
    bits: list[int], values: int, signs: list[int] | None, message: str
) -> None:
    parts = [torch.tensor(part or [], dtype=torch.uint8) for part in (bits, signs)]
    packed = Packed(parts[0], torch.ones(values), None if signs is None else parts[1])
    with pytest.raises(ValueError, match=message):
        unpack(packed, (5,))


def test_what_operators_refuse() -> None:
    byte = torch.tensor([1], dtype=torch.uint8)
    with pytest.raises(TypeError, match="weight should be float32"):
        ops.pack_entries(torch.ones(2, dtype=torch.int32))
    with pytest.raises(TypeError, match="mask of weight should be bool"):
        ops.pack_entries(torch.ones(2), torch.ones(2))
    with pytest.raises(ValueError, match="mask of weight should have shape"):
        ops.pack_entries(torch.ones(2), torch.ones(3, dtype=torch.bool))
    with pytest.raises(TypeError, match="values should be float32"):
        ops.unpack_entries(byte, byte, byte[:0], (1,))
    with pytest.raises(TypeError, match="bits should be uint8"):
        ops.unpack_entries(byte.int(), torch.ones(1), byte[:0], (1,))
    with pytest.raises(TypeError, match="bits should be uint8"):
        ops.count_bits(byte.int(), 1)
    # Before there is memory for them.
    with pytest.raises(ValueError, match="bits should have shape"):
        ops.unpack_entries(byte, torch.ones(1), byte[:0], (1 << 50,))
    for shape in ((-3,), (1 << 40, 1 << 40)):
        with pytest.raises(ValueError, match="shape should have sizes of at least 0"):
            ops.unpack_entries(byte, torch.ones(1), byte[:0], shape)


def test_counting() -> None:
    assert ops.count_bits(torch.tensor([0xFF, 0x01], dtype=torch.uint8), 9) == 9
    assert ops.count_bits(torch.empty(0, dtype=torch.uint8), 0) == 0
    many = torch.randint(0, 256, (2**18 + 3,), dtype=torch.uint8)
    assert ops.count_bits(many, 8 * len(many)) == sum(map(int.bit_count, many.tolist()))
    with pytest.raises(ValueError, match="past the last of 9"):
        unpack_bits(torch.tensor([0, 2], dtype=torch.uint8), (9,))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_any_number_of_threads(threads: int) -> None:
    torch.set_num_threads(threads)
    tensor = torch.randn(700_001) * (torch.rand(700_001) < 0.5)
    packed = pack(tensor)
    assert packed is not None and packed.signs is not None
    assert torch.equal(packed.values, tensor[tensor != 0])
    assert torch.equal(unpack(packed, (700_001,)).view(torch.int32), tensor.view(torch.int32))


def test_opcheck() -> None:
    tensor = torch.randn(5, 7) * (torch.rand(5, 7) < 0.5)
    namespace = torch.ops.torchalignprune
    torch.library.opcheck(namespace.pack_entries.default, (tensor, None))
    torch.library.opcheck(namespace.pack_entries.default, (tensor, tensor != 0))
    bits, values, signs, _ = ops.pack_entries(tensor)
    torch.library.opcheck(namespace.unpack_entries.default, (bits, values, signs, [5, 7]))
    torch.library.opcheck(namespace.count_bits.default, (bits, 35))


@given(st.data())
def test_packing_does_not_change_the_tensor(data: st.DataObject) -> None:
    tensor = data.draw(tensors((3, 4, 2, 2), torch.float32))
    before = bits_of(tensor)
    pack(tensor)
    assert bits_of(tensor) == before
