"""The tests of the CUDA operators that can do without a GPU, with the kernels run on the CPU."""

from __future__ import annotations

import os
import re
import shlex
import shutil
from collections.abc import Sequence
from itertools import cycle
from typing import Any

import pytest
import torch

import emulated_cuda
import test_cuda
from strategies import LAYOUTS
from torchalignprune import ops

DTYPES = test_cuda.DTYPES
COMPILER = shlex.split(os.environ.get("CXX", "c++"))

pytestmark = pytest.mark.skipif(
    shutil.which(COMPILER[0]) is None or not emulated_cuda.CSRC.exists(),
    reason="needs a C++ compiler and the sources",
)


def with_dtypes(cases: Sequence[Any]) -> list[tuple[Any, torch.dtype]]:
    return list(zip(cases, cycle(DTYPES), strict=False))


@pytest.fixture(scope="session")
def _built() -> None:
    emulated_cuda.build()


@pytest.fixture(autouse=True)
def _on_the_cpu(_built: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(test_cuda, "DEVICE", "cpu")
    monkeypatch.setattr(test_cuda, "on_gpu", emulated_cuda.on_gpu)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)


def test_the_kernels_are_those_of_the_cuda_sources() -> None:
    weight = torch.randn(50, 60)
    expected = ops.select_global([weight], 1000)[0]
    moved = emulated_cuda.on_gpu(weight)
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, acc_events=True) as profile:
        (found,) = ops.select_global([moved], 1000)
    own = f"{emulated_cuda.NAMESPACE}::select_global"
    assert own in {event.name for event in profile.events()}
    assert re.search(r"CPU: registered at .*/cuda/glue\.cpp", torch._C._dispatch_dump(own))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("seed", range(100))
def test_select_global(seed: int) -> None:
    test_cuda.test_select_global_equals_the_cpu_and_the_plain_form(seed)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["normal", "bfloat16", "sample too low", "sample too high"])
def test_select_global_with_a_sample(case: str) -> None:
    test_cuda.test_select_global_of_many_entries_equals_the_cpu(case)


@pytest.mark.parametrize("seed", range(60))
def test_shards(seed: int) -> None:
    test_cuda.test_shards_equal_the_cpu(seed)


def test_shards_of_many_entries() -> None:
    test_cuda.test_shards_of_many_entries_equal_the_cpu()
    test_cuda.test_nan_of_a_shard_is_found()


@pytest.mark.parametrize(("columns", "dtype"), with_dtypes(test_cuda.COLUMNS))
def test_select_rows(columns: int, dtype: torch.dtype) -> None:
    test_cuda.test_select_rows_equals_the_cpu(columns, dtype)


@pytest.mark.parametrize(("size", "dtype"), with_dtypes(test_cuda.UNITS))
def test_cosine_gains(size: int, dtype: torch.dtype) -> None:
    test_cuda.check_cosine_gains(size, dtype, with_reference=False, entries=3000)


# Without the longest ones, whose time grows with the square of the length.
@pytest.mark.parametrize(("size", "dtype"), with_dtypes(test_cuda.UNITS[:-1]))
def test_cosine_gains_with_a_reference(size: int, dtype: torch.dtype) -> None:
    test_cuda.check_cosine_gains(size, dtype, with_reference=True, entries=3000)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(), (5,), (3, 0), (7, 5, 3, 3), (2, 3, 2, 5, 2)])
def test_cosine_gains_of_any_shape(shape: tuple[int, ...], layout: str) -> None:
    test_cuda.test_cosine_gains_of_any_shape(shape, layout)


@pytest.mark.parametrize("seed", range(60))
def test_square_sums(seed: int) -> None:
    test_cuda.test_square_sums_equal_the_cpu(seed)


@pytest.mark.parametrize("seed", range(60))
def test_units(seed: int) -> None:
    test_cuda.test_unit_products_equal_the_cpu(seed)
    test_cuda.test_unit_combination_equals_the_cpu(seed)


@pytest.mark.parametrize("seed", range(30))
def test_masks(seed: int) -> None:
    test_cuda.test_zero_pruned_equals_the_cpu(seed)
    test_cuda.test_apply_mask_equals_the_cpu(seed, ops.apply_mask)


@pytest.mark.parametrize(("kind", "dtype"), with_dtypes(test_cuda.SIMILARITIES))
def test_greedy_match(kind: str, dtype: torch.dtype) -> None:
    test_cuda.test_greedy_match_equals_the_cpu_and_the_plain_form(kind, dtype)


def test_errors() -> None:
    test_cuda.test_indices_out_of_range_are_errors_like_those_of_the_cpu(wrong=-1, place=7)
    test_cuda.test_counts_out_of_range_are_errors_like_those_of_the_cpu(columns=100)
    test_cuda.test_nan_and_infinity_are_errors_like_those_of_the_cpu(place=5000)
