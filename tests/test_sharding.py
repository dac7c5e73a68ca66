"""Sharded parameters, on several processes, against one process with the whole model.

What the processes do is in sharded.py. They run all cases one after the other, so that they have to
be started once.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from hypothesis import given
from hypothesis import strategies as st

import sharded
from torchalignprune.shards import Runs, Shard

TIMEOUT = 240


@pytest.fixture(scope="session")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], list[dict[str, str]]]:
    """For a number of processes what each case led to on each of them: an error, or nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["sharded"])
    known: dict[int, list[dict[str, str]]] = {}
    top = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        top = top.parent  # The workers share it, so that the processes run once for all of them.

    def run(world: int, folder: Path) -> None:
        with FileLock(f"{folder}.lock"):
            if folder.exists():
                return
            folder.mkdir()
            processes = [
                context.Process(target=sharded.run, args=(rank, world, str(folder)))
                for rank in range(world)
            ]
            for process in processes:
                process.start()
            deadline = time.monotonic() + TIMEOUT
            for process in processes:
                process.join(max(0, deadline - time.monotonic()))
                process.kill()

    def of(world: int) -> list[dict[str, str]]:
        if world not in known:
            folder = top / f"sharding-{world}"
            run(world, folder)
            files = [folder / f"rank{rank}.pt" for rank in range(world)]
            known[world] = [torch.load(file) if file.exists() else {} for file in files]
        return known[world]

    return of


@pytest.mark.parametrize(
    ("world", "case"), [(world, name) for world, cases in sharded.CASES.items() for name in cases]
)
def test_on_processes(
    world: int, case: str, outcomes: Callable[[int], list[dict[str, str]]]
) -> None:
    for rank, found in enumerate(outcomes(world)):
        assert case in found, f"rank {rank} did not get there"
        assert not found[case], f"rank {rank}: {found[case]}"


# Positions, without processes


@st.composite
def all_runs(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[Runs, ...]]:
    shape = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)))
    runs = []
    for size in shape:
        chosen = draw(st.lists(st.booleans(), min_size=size, max_size=size))
        runs.append(tuple((i, 1) for i in range(size) if chosen[i] or all(chosen)))
        if draw(st.booleans()):
            runs[-1] = ((0, size),)
    return shape, tuple(runs)


@given(case=all_runs())
def test_entries_before_a_position(case: tuple[tuple[int, ...], tuple[Runs, ...]]) -> None:
    shape, runs = case
    shard: Any = Shard.__new__(Shard)
    shard.shape, shard.runs = shape, runs
    flat = torch.arange(torch.Size(shape).numel()).reshape(shape)
    for dim, own in enumerate(runs):
        index = torch.tensor([i for first, n in own for i in range(first, first + n)]).long()
        flat = flat.index_select(dim, index)
    bounds = torch.arange(-2, torch.Size(shape).numel() + 3)
    expected = [int((flat < bound).sum()) for bound in bounds]
    assert shard.entries_before(bounds).tolist() == expected
