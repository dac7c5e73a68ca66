"""The devices and dtypes that tests run on, and how hypothesis searches."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

import torchalignprune  # noqa: F401  (registers the operators)
from ranks import Ranks

# The default is the same search every time. To look further: pytest --hypothesis-profile=search
settings.register_profile("repository", deadline=None, derandomize=True, max_examples=60)
settings.register_profile("search", deadline=None, max_examples=2000)
settings.load_profile("repository")

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def devices() -> list[object]:
    """The CPU, and a GPU if there is one that the extension was built for."""
    built = torch._C._dispatch_has_kernel_for_dispatch_key("torchalignprune::select_global", "CUDA")
    there = built and torch.cuda.is_available()
    return ["cpu", *([pytest.param("cuda", marks=pytest.mark.cuda)] if there else [])]


# Hypothesis refuses fixtures of function scope.
@pytest.fixture(scope="session", params=devices())
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="session", params=DTYPES, ids=lambda dtype: str(dtype)[6:])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    found = request.param
    assert isinstance(found, torch.dtype)
    return found


@pytest.fixture(autouse=True)
def _same_start() -> Iterator[None]:
    """Starts every test from the same seed, and restores the number of threads after it."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Processes for tests that need several."""
    started = Ranks()
    yield started
    started.stop()
