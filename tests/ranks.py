"""A few processes that run functions as the ranks of a gloo group; started once for many tests."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

MOST = 4
# In seconds. The first covers starting and importing a test module on a busy machine. The last is
# longer than that of a collective, so that a rank that waits for others in vain can report where.
_START, _COLLECTIVE, _ANSWER = 300, 60, 90


class Ranks:
    """``run`` calls a function of a test module on some of the processes, as one group."""

    def __init__(self) -> None:
        self._processes: list[Any] = []
        self._pipes: list[Any] = []

    def run(self, world: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Returns what the function returned on each rank.

        If it raises on a rank, all processes end, because the others may wait for that one.
        """
        if not self._processes:
            self._start()
        with tempfile.TemporaryDirectory() as folder:
            store = str(Path(folder) / "store")
            for rank in range(world):
                self._pipes[rank].send((rank, world, store, function, arguments))
            answers = self._answers(world, _START)
            if all(ready for ready, _ in answers):
                for rank in range(world):
                    self._pipes[rank].send("go")
                answers = self._answers(world, _ANSWER)
        failed = [(rank, problem) for rank, (well, problem) in enumerate(answers) if not well]
        if failed:
            # This rank may only have waited in vain: collect the error that made it wait too.
            for rank in range(len(answers), world):
                if self._pipes[rank].poll(1):
                    well, problem = self._answer(rank, 0)
                    failed += [] if well else [(rank, problem)]
            self.stop()
            raise AssertionError("\n".join(f"rank {rank}: {problem}" for rank, problem in failed))
        return [answer for _, answer in answers]

    def _answers(self, world: int, seconds: int) -> list[tuple[bool, Any]]:
        """The answers of the ranks, up to the first that has failed."""
        answers = []
        for rank in range(world):
            answers.append(self._answer(rank, seconds))
            if not answers[-1][0]:
                break
        return answers

    def _answer(self, rank: int, seconds: int) -> tuple[bool, Any]:
        pipe = self._pipes[rank]
        try:
            return pipe.recv() if pipe.poll(seconds) else (False, f"no answer in {seconds} seconds")
        except (EOFError, ConnectionResetError):
            return False, "the process has ended"

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        for _ in range(MOST):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there,), daemon=True)
            process.start()
            there.close()
            self._processes.append(process)
            self._pipes.append(here)

    def stop(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes = [], []


def _serve(pipe: Any) -> None:
    torch.set_num_threads(1)
    while True:
        try:
            rank, world, store, function, arguments = pipe.recv()
            # Receiving the function has imported its module.
            pipe.send((True, "ready"))
            pipe.recv()
        except EOFError:
            return
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
        dist.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=_COLLECTIVE),
        )
        try:
            torch.manual_seed(0)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                # torch.compile's, of that one release.
                warnings.filterwarnings("ignore", message="Guards may run slower on Python 3.13.0")
                pipe.send((True, function(*arguments)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
            return
        finally:
            dist.destroy_process_group()
