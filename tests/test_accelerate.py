"""A training loop with Accelerate: prepared, accumulated, saved and loaded."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import torchalignprune as tap
from models import mlp
from torchalignprune import schedules


@pytest.fixture(autouse=True)
def _no_shared_state() -> Iterator[None]:
    """An Accelerator keeps the settings of the first one in the process."""
    for shared in (AcceleratorState, GradientState, PartialState):
        shared._reset_state()
    yield
    for shared in (AcceleratorState, GradientState, PartialState):
        shared._reset_state()


START = mlp()
OPTIONS = ["plain", "movement, regrow", "matching", "random"]


class Run:
    """A model with everything that its training needs, made as for the first start."""

    def __init__(self, kind: str, *, accumulate: int = 1, **settings: Any) -> None:
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate, **settings)
        torch.manual_seed(0)
        model = nn.Sequential(copy.deepcopy(START), nn.Dropout(0.1))
        params = tap.prunable_parameters(model)
        method: Any = tap.AlignedMagnitude
        options: dict[str, Any] = {}
        if kind == "movement, regrow":
            method, options = tap.Magnitude, {"criterion": tap.criteria.Movement(params)}
            options["regrow"] = True
        elif kind == "matching":
            reference = tap.Reference.capture(params)
            options["penalty"] = tap.CosineAlignment(
                params, reference, matching="greedy", match_every=2
            )
        elif kind == "random":
            generator = torch.Generator().manual_seed(1)
            method = functools.partial(tap.Random, generator=generator)
        self.pruner = tap.Pruner(params, method, schedules.cubic(0.0, 0.7, end=6), **options)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.2)
        generator = torch.Generator().manual_seed(2)
        inputs, wanted = (torch.randn(64, n, generator=generator) for n in (12, 8))
        loader = DataLoader(TensorDataset(inputs, wanted), batch_size=4, shuffle=True)
        self.model, self.optimizer, self.loader = self.accelerator.prepare(model, optimizer, loader)
        self.accelerator.register_for_checkpointing(self.pruner)

    def train(self, begin: int, end: int) -> None:
        """Trains on the batches from ``begin`` to below ``end`` of the only epoch."""
        loader = self.accelerator.skip_first_batches(self.loader, begin)
        for number, (inputs, wanted) in enumerate(loader, begin):
            if number == end:
                break
            with self.accelerator.accumulate(self.model):
                loss = (self.model(inputs) - wanted).square().mean()
                if self.pruner.penalty is not None:
                    loss = loss + 0.1 * self.pruner.penalty()
                self.accelerator.backward(loss)
                self.optimizer.step()
                self.optimizer.zero_grad()
                if self.accelerator.sync_gradients:
                    self.pruner.step()


def same(left: Any, right: Any) -> bool:
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(map(same, left, right))
    return torch.equal(left, right) if isinstance(left, Tensor) else bool(left == right)


@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_loaded_run_continues_bit_for_bit(kind: str, accumulate: int, tmp_path: Path) -> None:
    whole = Run(kind, accumulate=accumulate)
    whole.train(0, 6)
    whole.accelerator.save_state(str(tmp_path))
    whole.train(6, 16)
    assert whole.pruner.steps == 16 // accumulate
    assert whole.pruner.sparsity() == pytest.approx(0.7, abs=1e-2)

    again = Run(kind, accumulate=accumulate)
    again.accelerator.load_state(str(tmp_path))
    assert again.pruner.steps == 6 // accumulate
    again.train(6, 16)
    assert same(again.model.state_dict(), whole.model.state_dict())
    assert same(again.optimizer.state_dict(), whole.optimizer.state_dict())
    assert again.pruner.log() == whole.pruner.log()

    # The file that accelerate makes of the pruner's state needs no code to be loaded.
    (path,) = tmp_path.glob("custom_checkpoint_*")
    assert torch.load(path, weights_only=True)["step"] == 6 // accumulate


def test_the_masks_of_an_accumulated_run_follow_the_schedule(tmp_path: Path) -> None:
    run = Run("plain", accumulate=4)
    seen = []
    for number in range(0, 16, 2):
        run.train(number, number + 2)
        seen.append(run.pruner.sparsity())
    schedule = run.pruner.schedule
    wanted = [round(schedule(step) * 320) / 320 for step in (0, 1, 1, 2, 2, 3, 3, 4)]
    assert seen == wanted


def test_bf16(tmp_path: Path) -> None:
    run = Run("matching", mixed_precision="bf16")
    run.train(0, 8)
    assert run.pruner.sparsity() == 0.7
    for module, _ in run.pruner.params:
        assert module.weight_orig.dtype == torch.float32
        assert bool((module.weight_orig[~module.weight_mask] == 0).all())


def test_a_model_that_was_saved_at_another_time_is_refused(tmp_path: Path) -> None:
    run = Run("plain")
    run.train(0, 3)
    run.accelerator.save_state(str(tmp_path / "three"))
    run.train(3, 6)
    run.accelerator.save_state(str(tmp_path / "six"))
    (path,) = (tmp_path / "six").glob("model*.safetensors")
    path.unlink()
    path.write_bytes((tmp_path / "three" / path.name).read_bytes())
    again = Run("plain")
    with pytest.raises(
        ValueError, match=r"should have \d+ pruned entries, as in the state, got \d+"
    ):
        again.accelerator.load_state(str(tmp_path / "six"))
    assert again.pruner.steps == 0


def test_finalized_and_unwrapped(tmp_path: Path) -> None:
    run = Run("plain")
    run.train(0, 8)
    run.pruner.finalize()
    model = run.accelerator.unwrap_model(run.model)
    assert model.state_dict().keys() == nn.Sequential(mlp(), nn.Dropout()).state_dict().keys()
