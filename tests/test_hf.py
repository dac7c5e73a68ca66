"""The real Trainer on a tiny real model: pruning, regularizing, killed and resumed."""

from __future__ import annotations

import copy
import functools
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn.utils import prune
from transformers import Trainer, TrainerCallback, TrainingArguments

import torchalignprune as tap
from torchalignprune import hf, schedules


def rows(count: int = 24) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for number in range(count):
        length = 3 + number % 4
        ids = torch.zeros(6, dtype=torch.long)
        ids[:length] = torch.randint(4, 30, (length,), generator=generator)
        found.append(
            {
                "input_ids": ids,
                "attention_mask": (ids != 0).long(),
                "labels": torch.tensor(number % 2),
            }
        )
    return found


def bert(**changes: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=30,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=8,
        pad_token_id=0,
        **changes,
    )
    return transformers.BertForSequenceClassification(config)


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    options: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 8,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,  # which warns without a GPU
    }
    return TrainingArguments(**options | changes)


def cubic() -> schedules.Schedule:
    return schedules.cubic(0.0, 0.6, begin=1, end=6)


def pruner_of(model: nn.Module, method: Any = tap.AlignedMagnitude, **options: Any) -> tap.Pruner:
    return tap.Pruner(tap.prunable_parameters(model), method, cubic(), **options)


def plain_trainer(
    folder: Path, model: Any = None, pruner: tap.Pruner | None = None, **changes: Any
) -> tuple[Trainer, tap.Pruner]:
    """A Trainer that nothing is changed of, with the callback."""
    model = bert() if model is None else model
    pruner = pruner_of(model) if pruner is None else pruner
    callbacks = changes.pop("callbacks", [])
    trainer = Trainer(
        model,
        arguments(folder, **changes),
        train_dataset=rows(),
        eval_dataset=rows(8),
        callbacks=[*callbacks, hf.PruningCallback(pruner)],
    )
    return trainer, pruner


class Reporter(TrainerCallback):
    """Hears of logs before the callbacks of a user, as TensorBoard and the others do."""

    def __init__(self) -> None:
        self.logs: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.logs.append(dict(kwargs["logs"]))


def masked_zeros(pruner: tap.Pruner) -> None:
    """What is pruned is zero in the stored weights, and the share is exact."""
    size = zeros = 0
    for module, name in pruner.params:
        mask = getattr(module, f"{name}_mask")
        assert bool((getattr(module, f"{name}_orig")[~mask] == 0).all())
        size += mask.numel()
        zeros += int((~mask).sum())
    assert pruner.sparsity() == zeros / size


@pytest.fixture(autouse=True)
def _quiet(capsys: pytest.CaptureFixture[str]) -> None:
    transformers.logging.set_verbosity_error()


def test_an_unmodified_trainer_prunes_and_logs(tmp_path: Path) -> None:
    model = bert()
    params = tap.prunable_parameters(model)
    reference = tap.Reference.capture(params)
    penalty = tap.FrobeniusAlignment(params, reference)
    pruner = pruner_of(model, reference=reference, penalty=penalty)
    reporter = Reporter()
    trainer, _ = plain_trainer(
        tmp_path, model, pruner, callbacks=[reporter], eval_strategy="steps", eval_steps=4
    )
    trainer.train()

    assert pruner.steps == 8
    assert pruner.sparsity() == pytest.approx(0.6, abs=1e-3)
    masked_zeros(pruner)
    schedule = cubic()
    keys = {
        "pruning/sparsity",
        "pruning/target_sparsity",
        "pruning/alignment",
        "pruning/penalty",
    }
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    for logs in (history, [entry for entry in reporter.logs if "loss" in entry]):
        assert len(logs) == 8
        for step, entry in enumerate(logs, 1):
            assert keys <= entry.keys()
            assert entry["pruning/target_sparsity"] == schedule(step)
            assert entry["pruning/sparsity"] == pytest.approx(schedule(step), abs=1e-3)
    evaluated = [entry for entry in reporter.logs if "eval_loss" in entry]
    assert [entry["pruning/target_sparsity"] for entry in evaluated] == [schedule(4), schedule(8)]
    # After the training nothing is added to anybody's evaluation.
    assert "pruning/sparsity" not in trainer.evaluate()

    pruner.finalize()
    trainer.save_model()
    loaded = transformers.BertForSequenceClassification.from_pretrained(tmp_path)
    assert not prune.is_pruned(loaded)
    ours = model.state_dict()
    assert all(torch.equal(value, ours[key]) for key, value in loaded.state_dict().items())
    zeros = sum(
        int((loaded.get_submodule(name.removesuffix(".weight")).weight == 0).sum())
        for name in params.names
    )
    assert zeros == round(0.6 * sum(module.weight.numel() for module, _ in params))


def same(left: Any, right: Any) -> bool:
    """Whether nested states are equal, bit for bit."""
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(map(same, left, right))
    return torch.equal(left, right) if isinstance(left, Tensor) else left == right


OPTIONS: dict[str, tuple[Any, dict[str, Any]]] = {
    "plain": (tap.AlignedMagnitude, {}),
    "movement, regrow": (tap.Magnitude, {"criterion": "Movement", "regrow": True}),
    "matching": (tap.AlignedMagnitude, {"penalty": True}),
    "random": (tap.Random, {"generator": True}),
}


def made(kind: str, folder: Path, **changes: Any) -> tuple[Trainer, tap.Pruner]:
    method, options = OPTIONS[kind]
    options = dict(options)
    model = bert()
    params = tap.prunable_parameters(model)
    if "criterion" in options:
        options["criterion"] = tap.criteria.Movement(params)
    if options.pop("generator", False):
        generator = torch.Generator().manual_seed(3)
        method = functools.partial(tap.Random, generator=generator)
    if options.get("penalty"):
        reference = tap.Reference.capture(params)
        options["penalty"] = tap.CosineAlignment(
            params, reference, matching="greedy", match_every=3
        )
    pruner = tap.Pruner(params, method, cubic(), **options)
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3} | changes
    if "penalty" not in options:
        return plain_trainer(folder, model, pruner, **settings)
    trainer = hf.AlignmentTrainer(
        model,
        arguments(folder, **settings),
        train_dataset=rows(),
        penalty=options["penalty"],
        strength=schedules.linear(0.0, 0.5, end=5),
        callbacks=[hf.PruningCallback(pruner)],
    )
    return trainer, pruner


@pytest.mark.parametrize("kind", OPTIONS)
def test_resumed_equals_uninterrupted_bit_for_bit(kind: str, tmp_path: Path) -> None:
    # Dropout is on, two batches are accumulated, and an epoch has three steps.
    changes = {"gradient_accumulation_steps": 2}
    whole, wanted = made(kind, tmp_path / "whole", **changes)
    whole.train()
    masked_zeros(wanted)
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "again" / "checkpoint-3")
    (tmp_path / "whole" / "checkpoint-3").rename(tmp_path / "moved")
    ways: dict[str, Any] = {
        "whole": str(tmp_path / "whole" / "checkpoint-6"),
        "elsewhere": str(tmp_path / "moved"),
        "again": True,
    }
    for folder, way in ways.items():
        trainer, pruner = made(kind, tmp_path / folder, **changes)
        trainer.train(resume_from_checkpoint=way)
        assert trainer.state.global_step == pruner.steps == 8
        assert same(trainer.model.state_dict(), whole.model.state_dict()), way
        assert same(trainer.optimizer.state_dict(), whole.optimizer.state_dict())
        assert same(pruner.state_dict(), wanted.state_dict())
        last, expected = (one.state.log_history[-2] for one in (trainer, whole))
        assert last == expected and "pruning/sparsity" in last
