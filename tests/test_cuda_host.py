"""What the CUDA kernels compute with, run on the CPU: csrc/cuda/keys.cuh compiles without CUDA."""

from __future__ import annotations

import ctypes
import math
import os
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import reference
from strategies import GRID, ODD, masks, shapes, tensors

HERE = Path(__file__).parent
COMPILER = shlex.split(os.environ.get("CXX", "c++"))
ELEMENTS = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
SCORES = ("value", "magnitude", "worth")
NONE = 2**32 - 1

pytestmark = pytest.mark.skipif(
    shutil.which(COMPILER[0]) is None or not (HERE.parent / "csrc" / "cuda").exists(),
    reason="needs a C++ compiler and the sources",
)


@pytest.fixture(scope="session")
def host(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    library = tmp_path_factory.mktemp("cuda_host") / "cuda_host.so"
    flags = ["-std=c++17", "-O2", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror"]
    command = [*COMPILER, *flags, "-shared", "-fPIC", str(HERE / "cuda_host.cpp")]
    subprocess.run([*command, "-o", str(library)], check=True)
    loaded = ctypes.CDLL(str(library))
    for name in ("view_offset", "prune", "last_not_above"):
        getattr(loaded, name).restype = ctypes.c_int64
    loaded.tensor_keys.restype = ctypes.c_bool
    return loaded


def integers(values: Sequence[int]) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * max(1, len(values)))(*values)


def pointer(tensor: Tensor | None) -> ctypes.c_void_p | None:
    return None if tensor is None else ctypes.c_void_p(tensor.data_ptr())


def layout(tensor: Tensor | None) -> ctypes.Array[ctypes.c_int64] | None:
    return None if tensor is None else integers([*tensor.shape, *tensor.stride()])


def keys_of(
    host: ctypes.CDLL,
    weight: Tensor,
    score: str,
    mask: Tensor | None,
    r: Tensor | None,
    rows: Tensor | None,
    columns: Tensor | None,
) -> tuple[Tensor, bool]:
    wide = weight.dtype == torch.float64
    keys = torch.empty(weight.numel(), dtype=torch.int64 if wide else torch.int32)
    row_size = weight.numel() if weight.dim() < 2 else math.prod(weight.shape[1:])
    inner = 1 if weight.dim() < 2 else math.prod(weight.shape[2:])
    steps = [0 if s is None or s.numel() == 1 else 1 for s in (rows, columns)]
    nan = host.tensor_keys(
        pointer(weight),
        ELEMENTS[weight.dtype],
        weight.dim(),
        layout(weight),
        pointer(mask),
        layout(mask),
        pointer(r),
        0 if r is None else ELEMENTS[r.dtype],
        layout(r),
        pointer(rows),
        ctypes.c_int64(steps[0]),
        pointer(columns),
        ctypes.c_int64(steps[1]),
        ctypes.c_int64(weight.numel()),
        ctypes.c_int64(row_size),
        ctypes.c_int64(inner),
        SCORES.index(score),
        wide,
        pointer(keys),
    )
    if not wide:
        return keys.long() & NONE, nan
    return keys ^ -(2**63), nan  # signed numbers in the order of the unsigned ones


@settings(max_examples=300)
@given(data=st.data(), shape=shapes(min_side=1), score=st.sampled_from(SCORES))
def test_keys_order_as_the_scores(
    data: st.DataObject, shape: tuple[int, ...], score: str, host: ctypes.CDLL
) -> None:
    dtype = data.draw(st.sampled_from(list(ELEMENTS)))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    values = data.draw(st.sampled_from([GRID, ODD, None]))
    weight = data.draw(tensors(shape, dtype, values=values))
    mask = data.draw(st.none() | masks(shape))
    r = None
    if score == "worth" and data.draw(st.booleans()):
        r = data.draw(tensors(shape, data.draw(st.sampled_from(list(ELEMENTS))), values=values))
        r = r.float() if r.dtype == torch.float64 and dtype != torch.float64 else r
    rows, columns = (1, weight.numel()) if weight.dim() < 2 else weight.shape[:2]
    scales: list[Tensor | None] = [None, None]
    if score != "value":
        scales = [
            data.draw(
                st.none()
                | st.sampled_from([1, n]).flatmap(
                    lambda length: tensors(
                        (length,), wide, values=[0.0, 0.5, 1.0, 3.0], layouts=["contiguous"]
                    )
                )
            )
            for n in (rows, columns)
        ]
    keys, nan = keys_of(host, weight, score, mask, r, *scales)
    scores = reference.scores(weight, score, r, *scales, dtype=wide).reshape(-1)
    alive = torch.ones(weight.numel(), dtype=torch.bool) if mask is None else mask.reshape(-1)
    assert nan == bool(scores[alive].isnan().any())
    none = 2**63 - 1 if wide == torch.float64 else NONE
    assert bool((keys[~alive] == none).all())
    if nan:
        return
    keys, scores = keys[alive], scores[alive]
    assert bool((keys < none).all())
    assert torch.equal(keys[:, None] < keys, scores[:, None] < scores)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_half_widens_as_torch_does(dtype: torch.dtype, host: ctypes.CDLL) -> None:
    bits = torch.arange(-(2**15), 2**15).short()
    weight = bits.view(dtype)
    weight = weight[~weight.isnan()]
    keys, nan = keys_of(host, weight, "value", None, None, None, None)
    expected, _ = keys_of(host, weight.float(), "value", None, None, None, None)
    assert not nan
    assert torch.equal(keys, expected)


@given(data=st.data())
def test_offsets_follow_the_strides(data: st.DataObject, host: ctypes.CDLL) -> None:
    sizes = data.draw(st.lists(st.integers(1, 2**8), min_size=1, max_size=4))
    if data.draw(st.booleans()):
        sizes = [size + 2**33 if i == 0 else size for i, size in enumerate(sizes)]
    size = math.prod(sizes)
    strides = data.draw(st.lists(st.integers(0, 2**16), min_size=len(sizes), max_size=len(sizes)))
    index = data.draw(st.integers(0, size - 1))
    found = host.view_offset(len(sizes), integers([*sizes, *strides]), ctypes.c_int64(index))
    expected = 0
    for length, stride in zip(reversed(sizes), reversed(strides), strict=True):
        expected += index % length * stride
        index //= length
    assert found == expected


def pruned(
    host: ctypes.CDLL,
    keys: Tensor,
    count: int,
    *,
    fine_bins: int = 2**14,
    grain: int = 0,
    sample: Tensor | None = None,
    chunk: int = 64,
) -> tuple[Tensor, int]:
    mask = torch.full((keys.numel(),), 7, dtype=torch.uint8)
    own = keys.int() if keys.dtype == torch.int64 else keys
    drawn = None if sample is None else sample.sort().values.int()
    passes = host.prune(
        pointer(own),
        ctypes.c_int64(keys.numel()),
        ctypes.c_int64(count),
        ctypes.c_int64(fine_bins),
        grain,
        pointer(drawn),
        ctypes.c_int64(0 if drawn is None else drawn.numel()),
        ctypes.c_int64(chunk),
        pointer(mask),
    )
    assert passes >= 0, "the search did not end"
    return mask, passes


def expected_mask(keys: Tensor, count: int) -> Tensor:
    (kept,) = reference.select_global([keys.double()], count, score="value", masks=[keys != NONE])
    return kept.to(torch.uint8)


def normal_keys(n: int, spread: float = 1.0) -> Tensor:
    weight = torch.randn(n) * torch.exp(spread * torch.randn(n))
    return weight.abs().view(torch.int32).long() + 2**31


KEYS = st.sampled_from([2**31, 2**31 + 1, 2**31 + 2**20, 2**32 - 2**23, 1, 2**23, NONE])


@settings(max_examples=300)
@given(
    keys=st.lists(KEYS | st.integers(1, NONE), max_size=300),
    data=st.data(),
    fine_bins=st.sampled_from([2**11, 2**12, 2**19]),
    chunk=st.sampled_from([1, 7, 64, 1000]),
)
def test_prunes_exactly_the_lowest(
    keys: list[int], data: st.DataObject, fine_bins: int, chunk: int, host: ctypes.CDLL
) -> None:
    given_keys = torch.tensor(keys, dtype=torch.int64)
    alive = int((given_keys != NONE).sum())
    count = data.draw(st.integers(0, alive))
    sample = None
    if data.draw(st.booleans()):
        # Drawn from the keys, or from anywhere: a sample may mislead, but no more than that.
        pool = KEYS | st.sampled_from(keys) if keys else KEYS
        sample = torch.tensor(data.draw(st.lists(pool, min_size=64, max_size=64)))
    mask, _ = pruned(host, given_keys, count, fine_bins=fine_bins, sample=sample, chunk=chunk)
    assert torch.equal(mask, expected_mask(given_keys, count))


@pytest.mark.parametrize("share", [0.001, 0.3, 0.5, 0.9, 0.999])
def test_a_good_sample_needs_one_pass(share: float, host: ctypes.CDLL) -> None:
    keys = normal_keys(1_000_000, 0.1)
    sample = keys[torch.randint(keys.numel(), (2**16,))]
    count = int(share * keys.numel())
    mask, passes = pruned(host, keys, count, fine_bins=2**21, sample=sample)
    assert passes == 1
    assert torch.equal(mask, expected_mask(keys, count))


def test_without_a_sample_three_passes_do(host: ctypes.CDLL) -> None:
    keys = normal_keys(20_000)
    for count in (1, 7_000, 19_999, 20_000):
        mask, passes = pruned(host, keys, count, fine_bins=2**11)
        assert passes <= 3
        assert torch.equal(mask, expected_mask(keys, count))


def test_keys_of_bfloat16_need_one_pass_and_few_bins(host: ctypes.CDLL) -> None:
    keys = torch.randn(200_000).bfloat16().abs().float().view(torch.int32).long() + 2**31
    keys[::5] = NONE
    sample = keys[torch.randint(keys.numel(), (2**14,))]
    for count in (20_000, 80_000, 140_000):
        mask, passes = pruned(host, keys, count, fine_bins=2**11, grain=16, sample=sample)
        assert passes == 1
        assert torch.equal(mask, expected_mask(keys, count))


@pytest.mark.parametrize("sampled", [1e-30, 1e30, 0.5])
def test_a_sample_that_misleads_costs_passes_only(sampled: float, host: ctypes.CDLL) -> None:
    keys = normal_keys(50_000)
    one = int(torch.tensor(sampled).view(torch.int32)) + 2**31
    for count in (1, 25_000, 50_000):
        sample = torch.full((1024,), one)
        mask, passes = pruned(host, keys, count, sample=sample)
        assert passes <= 5
        assert torch.equal(mask, expected_mask(keys, count))


@given(n=st.integers(0, 60), seed=st.integers(0, 2**31), slope=st.sampled_from([0.0, 0.03, 1.0]))
def test_pooled_gains_are_those_of_the_majorant(
    n: int, seed: int, slope: float, host: ctypes.CDLL
) -> None:
    noise = torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    gains = noise - slope * torch.arange(n)
    expected = torch.tensor(reference.concave(gains.tolist()), dtype=torch.float64)
    found = torch.empty_like(gains)
    host.concave(pointer(gains), ctypes.c_int64(n), pointer(found))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_last_not_above(host: ctypes.CDLL) -> None:
    # The first and the third of these tensors are empty.
    firsts = integers([0, 0, 5, 5, 9])
    places = [host.last_not_above(firsts, ctypes.c_int64(5), ctypes.c_int64(x)) for x in range(11)]
    assert places == [1] * 5 + [3] * 4 + [4] * 2
