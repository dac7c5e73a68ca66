"""The real Trainer on a tiny real model: pruning, regularizing, killed and resumed."""

from __future__ import annotations

import copy
import functools
import itertools
import shutil
import signal
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.utils import prune
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

import torchalignprune as tap
from torchalignprune import hf, schedules
from torchalignprune.state_files import load_state, save_state


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
    """An unmodified Trainer, with the callback."""
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
    """Gets the logs before the callbacks of the user, as those of TensorBoard and others do."""

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


def test_a_schedule_that_ends_after_the_training(tmp_path: Path) -> None:
    trainer, pruner = plain_trainer(tmp_path, max_steps=3)
    message = rf"ends at step 3 .* of {cubic()(3):.4g}, before the schedule does, at 0\.6: end"
    with pytest.warns(UserWarning, match=message):
        trainer.train()
    assert pruner.sparsity() == pytest.approx(cubic()(3), abs=1e-3)
    trainer.args.max_steps = 2  # the pruner's step 5
    with pytest.warns(UserWarning, match="ends at step 5 "):
        trainer.train()
    trainer.args.max_steps = 1
    trainer.train()
    assert pruner.sparsity() == pytest.approx(0.6, abs=1e-3)


def test_a_schedule_that_is_a_table_of_the_training(tmp_path: Path) -> None:
    model, table = bert(), [0.0, 0.1, 0.2]
    params = tap.prunable_parameters(model)
    pruner = tap.Pruner(params, tap.Magnitude, table.__getitem__)
    plain_trainer(tmp_path, model, pruner, max_steps=2)[0].train()
    assert pruner.sparsity() == pytest.approx(0.2, abs=1e-3)


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


def regularized(
    folder: Path,
    strength: Any,
    *,
    kind: Any = hf.AlignmentTrainer,
    **changes: Any,
) -> tuple[Any, tap.Pruner, nn.Module]:
    """A Trainer with plain SGD and a penalty towards weights other than the initial ones."""
    model = bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    params = tap.prunable_parameters(model)
    torch.manual_seed(7)
    reference = [module.weight + torch.randn_like(module.weight) / 10 for module, _ in params]
    penalty = tap.FrobeniusAlignment(params, [tensor.detach() for tensor in reference])
    pruner = tap.Pruner(params, tap.AlignedMagnitude, cubic())
    extra = {key: changes.pop(key) for key in ("compute_loss_func",) if key in changes}
    settings = {"optim": "sgd", "lr_scheduler_type": "constant", "weight_decay": 0.0} | changes
    trainer = kind(
        model,
        arguments(folder, **settings),
        train_dataset=rows(12),
        eval_dataset=rows(12),
        penalty=penalty,
        strength=strength,
        callbacks=[hf.PruningCallback(pruner)],
        **extra,
    )
    return trainer, pruner, penalty


class MeanLossTrainer(hf.AlignmentTrainer):
    """A trainer whose own loss is a mean, which the Trainer divides by the number of batches."""

    loss_is_scaled_for_ga = False

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        outputs = model(**inputs)
        return (outputs.loss, outputs) if return_outputs else outputs.loss


def summed_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    total = nn.functional.cross_entropy(outputs.logits, labels, reduction="sum")
    return total / num_items_in_batch


# Not the model's own loss over three batches: those of classification models ignore the number of
# items that Transformers 5 hands over, and are added up where they should be averaged.
@pytest.mark.parametrize(
    ("way", "batches"),
    [("plain", 1), ("own mean", 1), ("own mean", 3), ("loss func", 1), ("loss func", 3)],
)
def test_the_penalty_counts_once_a_step(way: str, batches: int, tmp_path: Path) -> None:
    strength = schedules.linear(0.5, 2.0, end=6)
    extra: dict[str, Any] = {"compute_loss_func": summed_loss} if way == "loss func" else {}
    trainer, _, penalty = regularized(
        tmp_path,
        strength,
        kind=MeanLossTrainer if way == "own mean" else hf.AlignmentTrainer,
        per_device_train_batch_size=12 // batches,
        gradient_accumulation_steps=batches,
        max_grad_norm=0.5,
        learning_rate=0.3,
        **extra,
    )
    model = copy.deepcopy(trainer.model)
    trainer.train()

    params = tap.prunable_parameters(model)
    penalty = copy.deepcopy(penalty)
    twin = tap.FrobeniusAlignment(params, [t.reference for t in penalty._targets])  # type: ignore[attr-defined]
    by_hand = tap.Pruner(params, tap.AlignedMagnitude, cubic())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    data = {key: torch.stack([row[key] for row in rows(12)]) for key in rows(1)[0]}
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    for step in range(8):
        task, added = model(**data).loss, strength(step) * twin()
        loss = task + added
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        by_hand.step()
        assert logged[step]["loss"] == pytest.approx(loss.item(), rel=1e-4)
        assert logged[step]["penalty_loss"] == pytest.approx(added.item(), rel=1e-4)
        assert logged[step]["penalty_share"] == pytest.approx(added.item() / loss.item(), rel=1e-4)
        assert logged[step]["penalty_strength"] == strength(step)
    for (name, ours), theirs in zip(
        trainer.model.named_parameters(), model.parameters(), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, msg=name)
    # The loss of an evaluation is that of the task.
    with torch.no_grad():
        task = model.eval()(**data).loss.item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(task, rel=1e-4)


def test_the_penalty_is_logged_as_a_mean_over_the_steps(tmp_path: Path) -> None:
    trainer, *_ = regularized(tmp_path / "a", 0.5)
    trainer.train()
    single = [entry["penalty_loss"] for entry in trainer.state.log_history if "loss" in entry]
    trainer, *_ = regularized(tmp_path / "b", 0.5, logging_steps=4)
    trainer.train()
    logged = [entry["penalty_loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == pytest.approx([sum(single[:4]) / 4, sum(single[4:]) / 4])


def test_steps_of_a_training_that_failed_are_not_in_the_log_of_the_next(tmp_path: Path) -> None:
    class Fails(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 6:
                raise OSError("the disk is gone")

    options: dict[str, Any] = {"logging_steps": 4, "save_strategy": "steps", "save_steps": 4}
    strength = schedules.linear(0.0, 1.0, end=8)
    whole, *_ = regularized(tmp_path / "a", strength, **options)
    whole.train()
    trainer, *_ = regularized(tmp_path / "b", strength, **options)
    fails = Fails()
    trainer.add_callback(fails)
    with pytest.raises(OSError, match="the disk is gone"):
        trainer.train()
    trainer.remove_callback(fails)
    trainer.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-4"))
    last, wanted = (
        [entry for entry in one.state.log_history if "loss" in entry][-1]
        for one in (trainer, whole)
    )
    assert last == wanted and wanted["penalty_strength"] == 5.5 / 8


def test_no_strength_no_penalty(tmp_path: Path) -> None:
    trainer, *_ = regularized(tmp_path, 0.0)
    trainer.train()
    plain, *_ = regularized(tmp_path, 0.0)
    plain.training_step = functools.partial(Trainer.training_step, plain)
    plain.train()
    assert same(trainer.model.state_dict(), plain.model.state_dict())
    assert [e["penalty_loss"] for e in trainer.state.log_history if "loss" in e] == [0.0] * 8


def test_bf16(tmp_path: Path) -> None:
    full, *_ = regularized(tmp_path / "a", 0.5)
    full.train()
    half, pruner, _ = regularized(tmp_path / "b", 0.5, bf16=True)
    half.train()
    masked_zeros(pruner)
    assert pruner.sparsity() == pytest.approx(0.6, abs=1e-3)
    pairs = zip(half.model.parameters(), full.model.parameters(), strict=True)
    assert all(a.dtype == torch.float32 and torch.allclose(a, b, atol=0.02) for a, b in pairs)
    assert not same(half.model.state_dict(), full.model.state_dict())


def test_a_gradient_scaler(tmp_path: Path) -> None:
    """What fp16 does to the gradients; accelerate refuses fp16 itself without a GPU."""
    plain, *_ = regularized(tmp_path / "a", 0.5, max_grad_norm=0.0)
    plain.train()
    scaled, pruner, _ = regularized(tmp_path / "b", 0.5, max_grad_norm=0.0)
    scaled.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    scaled.train()
    for a, b in zip(scaled.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(a, b)

    # A step that overflows is skipped. The pruner keeps the Trainer's time all the same.
    skipped, pruner, _ = regularized(tmp_path / "c", 0.5, max_grad_norm=0.0)
    skipped.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    seen: list[Tensor] = []

    class Overflow(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append(kwargs["model"].classifier.weight.detach().clone())
            if state.global_step == 3:
                kwargs["model"].classifier.bias.grad.fill_(torch.inf)

    skipped.add_callback(Overflow())
    skipped.train()
    assert [torch.equal(a, b) for a, b in itertools.pairwise(seen)] == [False] * 3 + [True] + [
        False
    ] * 3
    assert skipped.accelerator.scaler.get_scale() == 2.0**11
    assert pruner.steps == skipped.state.global_step == 8
    assert pruner.sparsity() == pytest.approx(0.6, abs=1e-3)
    masked_zeros(pruner)


def test_activation_checkpointing(tmp_path: Path) -> None:
    name = "activation_checkpointing"
    if not hasattr(TrainingArguments, name):  # before Transformers 5.21
        name = "gradient_checkpointing"
    found = []
    for number, changes in enumerate(({}, {name: True})):
        trainer, pruner = plain_trainer(tmp_path / str(number), **changes)
        trainer.train()
        masked_zeros(pruner)
        found.append(trainer.model.state_dict())
    assert same(*found)


@pytest.mark.slow
def test_torch_compile(tmp_path: Path) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    data = [row | {"attention_mask": torch.ones(6, dtype=torch.long)} for row in rows()]
    states = []
    for compiled in (False, True):
        model = bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        pruner = pruner_of(model)
        trainer = Trainer(
            model,
            arguments(tmp_path, torch_compile=compiled, torch_compile_backend="aot_eager")
            if compiled
            else arguments(tmp_path),
            train_dataset=data,
            callbacks=[hf.PruningCallback(pruner)],
        )
        trainer.train()
        masked_zeros(pruner)
        assert pruner.sparsity() == pytest.approx(0.6, abs=1e-3)
        states.append(model.state_dict())
    assert states[0].keys() == states[1].keys()
    for key, ours in states[1].items():
        if key.endswith("_mask"):
            assert (ours != states[0][key]).float().mean() < 0.02
        else:
            torch.testing.assert_close(ours, states[0][key], rtol=1e-2, atol=1e-2)
    # One graph serves all of the training, whatever the masks.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


class Metric:
    """Returns the given values, one for each evaluation."""

    def __init__(self, *values: float) -> None:
        self.values = list(values)

    def __call__(self, prediction: Any) -> dict[str, float]:
        return {"score": self.values.pop(0)}


BEST_OF_EVERY_SECOND = {
    "save_strategy": "steps",
    "save_steps": 2,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "load_best_model_at_end": True,
    "metric_for_best_model": "score",
}


def test_the_best_model_may_be_less_sparse(tmp_path: Path) -> None:
    options = {**BEST_OF_EVERY_SECOND, "save_total_limit": 2}
    trainer, pruner = plain_trainer(tmp_path / "a", **options)
    trainer.compute_metrics = Metric(0.1, 0.9, 0.2, 0.3)
    warning = r"checkpoint-4, which was saved at a sparsity of 0\.56.*eval_strategy=.epoch"
    with pytest.warns(UserWarning, match=warning):
        trainer.train()
    masked_zeros(pruner)
    assert pruner.sparsity() == pytest.approx(cubic()(4), abs=1e-3)
    trainer.args.load_best_model_at_end, trainer.args.metric_for_best_model = False, None
    trainer.compute_metrics = Metric(0.5, 0.5, 0.5, 0.5)
    trainer.train()  # goes on from there, to the target
    assert pruner.sparsity() == pytest.approx(0.6, abs=1e-3)
    pruner.finalize()
    assert not prune.is_pruned(trainer.model)

    trainer, pruner = plain_trainer(tmp_path / "b", **options, eval_delay=6)
    trainer.compute_metrics = Metric(0.9, 0.2)
    trainer.train()
    assert str(trainer.state.best_model_checkpoint).endswith("checkpoint-6")
    assert pruner.sparsity() == pytest.approx(0.6, abs=1e-3)


def test_the_best_model_is_as_sparse_as_the_training_ended(tmp_path: Path) -> None:
    """Counted in each unit, 0.65 of 16 is 10, which is less than the schedule says."""
    model = bert()
    schedule = schedules.one_shot(0.65, at=1)
    params = tap.prunable_parameters(model)
    pruner = tap.Pruner(params, tap.Magnitude, schedule, budget="unit")
    trainer, _ = plain_trainer(tmp_path, model, pruner, **BEST_OF_EVERY_SECOND)
    trainer.compute_metrics = Metric(0.1, 0.9, 0.2, 0.3)
    trainer.train()  # without a warning
    assert pruner.sparsity() < 0.65 - 1e-3


def test_the_best_model_may_lack_values_to_take_back(tmp_path: Path) -> None:
    model = bert()
    pruner = pruner_of(model, tap.Random, regrow=True)
    trainer, _ = plain_trainer(tmp_path, model, pruner, **BEST_OF_EVERY_SECOND)
    trainer.compute_metrics = Metric(0.1, 0.9, 0.2, 0.3)
    with (
        pytest.warns(UserWarning, match="checkpoint-4, which was saved at a sparsity"),
        pytest.warns(UserWarning, match="have no value to take back but 0"),
    ):
        trainer.train()
    masked_zeros(pruner)


def test_save_only_model_and_a_limit_of_one(tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 3, "save_total_limit": 1}
    trainer, _ = plain_trainer(tmp_path, **options, save_only_model=True)
    trainer.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-8"]
    assert hf.last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-8")
    trainer, again = plain_trainer(tmp_path, **options, max_steps=9)
    trainer.train(resume_from_checkpoint=True)
    assert again.steps == 9


def test_the_state_is_there_before_an_older_checkpoint_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed at any moment, a run with save_total_limit=1 has a complete checkpoint."""
    trainer, _ = plain_trainer(tmp_path, save_strategy="steps", save_steps=3, save_total_limit=1)
    found = []

    def rotate(*args: Any, **kwargs: Any) -> None:
        found.append(hf.last_complete_checkpoint(tmp_path))

    monkeypatch.setattr(transformers.trainer, "rotate_checkpoints", rotate)
    trainer.train()
    assert found == [str(tmp_path / f"checkpoint-{step}") for step in (3, 6, 8)]


def test_a_later_checkpoint_stays_as_it_is_when_a_failed_run_is_resumed(tmp_path: Path) -> None:
    class Fails(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 6:
                raise OSError("the disk is gone")

    fails = Fails()
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3, "callbacks": [fails]}
    trainer, pruner = plain_trainer(tmp_path, **options)
    with pytest.raises(OSError, match="the disk is gone"):
        trainer.train()
    later = tmp_path / "checkpoint-6" / "pruner.safetensors"
    before = later.read_bytes()
    seen = []

    class Looks(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append(later.read_bytes() == before)

    trainer.remove_callback(fails)
    trainer.add_callback(Looks)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert seen == [True] and pruner.steps == 8


def test_each_node_has_a_complete_checkpoint_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a disk that they share, with ``save_on_each_node``."""
    trainer, _ = plain_trainer(tmp_path, save_strategy="steps", save_steps=3)
    trainer.train()
    folder = tmp_path / "checkpoint-8"
    (folder / "rng_state.pth").rename(folder / "rng_state_1.pth")
    callback = trainer.callback_handler.callbacks[0]
    assert isinstance(callback, hf.PruningCallback)
    for each, found in ((False, "checkpoint-6"), (True, "checkpoint-8")):
        callback._args = types.SimpleNamespace(
            save_on_each_node=each, world_size=2, process_index=1, local_process_index=0
        )
        callback._state = trainer.state
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
        callback._save(folder)
        assert hf.last_complete_checkpoint(tmp_path) == str(tmp_path / found)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with checkpoints of steps 3, 6 and 8."""
    folder = tmp_path_factory.mktemp("saved")
    trainer, _ = plain_trainer(folder, save_strategy="steps", save_steps=3)
    trainer.train()
    return folder


def test_the_newest_checkpoint_is_that_of_the_largest_number(saved: Path, tmp_path: Path) -> None:
    for number in (9, 10):
        shutil.copytree(saved / "checkpoint-8", tmp_path / f"checkpoint-{number}")
    assert hf.last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")


def test_a_checkpoint_that_was_cut_short_is_passed_over(saved: Path, tmp_path: Path) -> None:
    assert hf.last_complete_checkpoint(saved) == str(saved / "checkpoint-8")
    assert hf.last_complete_checkpoint(tmp_path) is None
    assert hf.last_complete_checkpoint(tmp_path / "nowhere") is None
    names = sorted(path.name for path in (saved / "checkpoint-8").iterdir())
    assert {"model.safetensors", "optimizer.pt", "pruner.safetensors", "trainer_state.json"} < {
        *names
    }
    for name in names:
        for how in ("truncated", "missing"):
            folder = tmp_path / f"{name}-{how}"
            shutil.copytree(saved, folder)
            path = folder / "checkpoint-8" / name
            if how == "missing":
                path.unlink()
            else:
                path.write_bytes(path.read_bytes()[:-20])
            assert hf.last_complete_checkpoint(folder) == str(folder / "checkpoint-6"), name
            shutil.rmtree(folder)
    folder = tmp_path / "odd"
    shutil.copytree(saved, folder)
    for text in ("null", "[5]", "5", "{}"):
        (folder / "checkpoint-8" / "trainer_state.json").write_text(text)
        assert hf.last_complete_checkpoint(folder) == str(folder / "checkpoint-6"), text
    shutil.rmtree(folder / "checkpoint-8")
    shutil.copytree(saved / "checkpoint-8", folder / "checkpoint-8")
    state = load_state(folder / "checkpoint-8" / "pruner.safetensors")
    for other in ({"files": None}, {"ranks": None}):
        save_state(folder / "checkpoint-8" / "pruner.safetensors", {**state, **other})
        assert hf.last_complete_checkpoint(folder) == str(folder / "checkpoint-6"), other
    # The Trainer's own way would fail on such a folder, and this one goes on.
    folder = tmp_path / "partial"
    shutil.copytree(saved, folder)
    (folder / "checkpoint-8" / "trainer_state.json").unlink()
    trainer, _ = plain_trainer(folder)
    with pytest.raises(OSError):
        trainer.train(resume_from_checkpoint=True)
    trainer, pruner = plain_trainer(folder)
    trainer.train(resume_from_checkpoint=hf.last_complete_checkpoint(folder))
    assert pruner.steps == 8


def _without_the_file(folder: Path) -> None:
    (folder / "pruner.safetensors").unlink()


def _cut(folder: Path) -> None:
    path = folder / "pruner.safetensors"
    path.write_bytes(path.read_bytes()[:-9])


def _of_another_step(folder: Path) -> None:
    shutil.copy(folder.parent / "checkpoint-3" / "pruner.safetensors", folder)


def _of_other_masks(folder: Path) -> None:
    state = load_state(folder / "pruner.safetensors")
    state["pruner"]["pruned"]["bert.encoder.layer.0.attention.self.query.weight"] += 1
    save_state(folder / "pruner.safetensors", state)


def _of_another_version(folder: Path) -> None:
    save_state(folder / "pruner.safetensors", {"version": 9})


def _foreign(folder: Path) -> None:
    shutil.copy(folder / "model.safetensors", folder / "pruner.safetensors")


def _renamed(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    renamed = {name.replace(".query.", ".q."): weight for name, weight in weights.items()}
    save_file(renamed, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_renamed, r"not loaded all of .*checkpoint-6, which has no bert\..*query\.weight_mask"),
        (_without_the_file, r"checkpoint-6 has no pruner\.safetensors: it was saved without"),
        (_cut, r"pruner\.safetensors cannot be read"),
        (_of_another_step, r"should be of step 6, like .*trainer_state\.json, got step 3"),
        (
            _of_other_masks,
            r"does not fit the pruner: bert.*query\.weight should have \d+ pruned entries",
        ),
        (_of_another_version, "should be of version 1, got 9"),
        (_foreign, "should be a file that save_state wrote"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(
    change: Callable[[Path], None], message: str, saved: Path, tmp_path: Path
) -> None:
    shutil.copytree(saved, tmp_path / "run")
    change(tmp_path / "run" / "checkpoint-6")
    trainer, _ = plain_trainer(tmp_path / "run")
    with pytest.raises(ValueError, match=message):
        trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-6"))


def test_a_run_that_has_taken_its_last_step_is_not_resumed(saved: Path, tmp_path: Path) -> None:
    """The Trainer would take a ninth."""
    trainer, pruner = plain_trainer(tmp_path)
    with pytest.raises(
        ValueError, match=r"checkpoint-8 is of step 8 of 8, the last one: its model"
    ):
        trainer.train(resume_from_checkpoint=hf.last_complete_checkpoint(saved))
    assert pruner.steps == 0
    trainer, pruner = plain_trainer(tmp_path, max_steps=9)
    trainer.train(resume_from_checkpoint=hf.last_complete_checkpoint(saved))
    assert pruner.steps == 9


def test_tensor_parallel_models_are_refused(tmp_path: Path) -> None:
    """A checkpoint is saved on one rank, which would wait for the others."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/s", rank=0, world_size=1)
    try:
        model = bert()
        layer = model.bert.encoder.layer[0].intermediate
        parallelize_module(layer, init_device_mesh("cpu", (1,)), {"dense": ColwiseParallel()})
        pruner = tap.Pruner([(layer.dense, "weight")], tap.Magnitude, cubic())
        callback, args = hf.PruningCallback(pruner), types.SimpleNamespace(n_gpu=0)
        with pytest.raises(
            ValueError, match=r"intermediate\.dense\.weight should not be sharded, got a DTensor"
        ):
            callback.on_train_begin(args, TrainerState(), TrainerControl(), model=model)
    finally:
        dist.destroy_process_group()


def test_setups_that_cannot_work_are_refused(saved: Path, tmp_path: Path) -> None:
    model = bert()
    pruner = pruner_of(model)
    with pytest.raises(TypeError, match=r"pruner should be a torchalignprune\.Pruner, got 0.5"):
        hf.PruningCallback(0.5)  # type: ignore[arg-type]
    trainer, _ = plain_trainer(tmp_path, bert(), pruner)
    with pytest.raises(ValueError, match="should be those of the trained model"):
        trainer.train()
    trainer, _ = plain_trainer(tmp_path, model, pruner, callbacks=[hf.PruningCallback(pruner)])
    with pytest.raises(ValueError, match="one PruningCallback, got several"):
        trainer.train()
    trainer, _ = plain_trainer(saved, restore_callback_states_from_checkpoint=True)
    with pytest.raises(TypeError, match="without restore_callback_states_from_checkpoint"):
        trainer.train(resume_from_checkpoint=True)
    trainer, _ = plain_trainer(tmp_path, model, pruner)
    trainer.args._n_gpu = 2
    with pytest.raises(
        ValueError, match=r"torch\.nn\.DataParallel, which the Trainer would use for 2 GPUs"
    ):
        trainer.train()
    trainer, _ = plain_trainer(tmp_path, model, pruner)
    trainer.is_fsdp_enabled = True
    with pytest.raises(
        ValueError, match="fsdp is not supported, because it shards the parameters after"
    ):
        hf._check_setup(trainer.args, trainer)
    pruner.finalize()
    trainer, _ = plain_trainer(tmp_path, model, pruner)
    with pytest.raises(ValueError, match="the pruner is finished"):
        trainer.train()
    penalty = nn.Linear(2, 2)
    for error, message, options in [
        (TypeError, "penalty should be a regularizer", {"penalty": 0.5, "strength": 0.1}),
        (TypeError, "strength should be a number", {"penalty": penalty, "strength": "0.1"}),
        (ValueError, "finite and not negative, got -1", {"penalty": penalty, "strength": -1}),
    ]:
        with pytest.raises(error, match=message):
            hf.AlignmentTrainer(bert(), arguments(tmp_path), **options)
    trainer, *_ = regularized(tmp_path, lambda step: 1.0 - step)
    with pytest.raises(ValueError, match=r"not negative, got -1\.0 at step 2"):
        trainer.train()
    trainer, *_ = regularized(tmp_path, 1.0)
    for module, _ in tap.prunable_parameters(trainer.model):
        module.weight_orig.requires_grad_(False)
    with pytest.raises(ValueError, match="none of the parameters of the penalty requires"):
        trainer.train()
    trainer, *_ = regularized(tmp_path, 1.0)
    _, _, trainer.penalty = regularized(tmp_path, 1.0)
    with pytest.raises(
        ValueError, match="the penalty's parameters should be those of the trained model"
    ):
        trainer.train()


def test_train_twice(tmp_path: Path) -> None:
    """A second training goes on with the same pruner."""
    trainer, pruner = plain_trainer(tmp_path, max_steps=3)
    with pytest.warns(UserWarning, match="before the schedule does"):
        trainer.train()
    trainer.train()
    assert pruner.steps == 6 and pruner.sparsity() == pytest.approx(0.6, abs=1e-3)


def with_lora(schedule: schedules.Schedule | None) -> tuple[Any, tap.Pruner]:
    """LoRA on a base model that is pruned by the schedule, or that is sparse already."""
    from peft import LoraConfig, get_peft_model

    model = bert()
    params = tap.prunable_parameters(model.bert)  # not the classifier, which is trained whole
    if schedule is None:
        tap.global_unstructured(params, tap.AlignedMagnitude, amount=0.5)
        for module, name in params:
            prune.remove(module, name)
        pruner = tap.Pruner.freeze(params)
    else:
        pruner = tap.Pruner(params, tap.AlignedMagnitude, schedule)
    config = LoraConfig(r=2, target_modules=["query", "value"], modules_to_save=["classifier"])
    return get_peft_model(model, config), pruner


# peft 0.21 asks the model by the name that Transformers 5.21 has replaced.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("sparsity", [0.5, 0.6], ids=["sparse already", "pruned meanwhile"])
def test_lora_on_a_pruned_model(sparsity: float, tmp_path: Path) -> None:
    schedule = None if sparsity == 0.5 else cubic()
    options = {"save_strategy": "steps", "save_steps": 3}
    model, pruner = with_lora(schedule)
    start = {key: value.clone() for key, value in model.state_dict().items()}
    trainer, _ = plain_trainer(tmp_path, model, pruner, **options)
    trainer.train()
    masked_zeros(pruner)
    assert pruner.sparsity() == pytest.approx(sparsity, abs=1e-3)
    # The base is frozen: nothing of it has changed but what was pruned.
    for module, _ in pruner.params:
        (key,) = [
            key
            for key, value in model.state_dict(keep_vars=True).items()
            if value is module.weight_orig
        ]
        assert torch.equal(module.weight_orig, start[key] * module.weight_mask)

    again, resumed = with_lora(schedule)
    trainer, _ = plain_trainer(tmp_path, again, resumed, **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert same(again.state_dict(), model.state_dict()) and resumed.steps == 8

    data = {key: torch.stack([row[key] for row in rows(8)]) for key in rows(1)[0]}
    model.eval()
    wanted = model(**data).logits
    without = copy.deepcopy(model)
    # What a merge into masked weights does: the next forward puts the old ones back.
    assert not torch.equal(without.merge_and_unload()(**data).logits, wanted)
    masks = [module.weight_mask for module, _ in pruner.params]
    merged = hf.merge_lora(model, pruner)
    assert isinstance(merged, transformers.BertForSequenceClassification)
    assert not prune.is_pruned(merged)
    changed = 0
    for mask, (module, _) in zip(masks, pruner.params, strict=True):
        assert isinstance(module.weight, nn.Parameter)
        assert torch.equal(module.weight != 0, mask)
    before = with_lora(schedule)[0].get_base_model()
    for name, ours in merged.named_parameters():
        if name.endswith("query.weight"):
            base = before.get_parameter(
                name.replace("query.weight", "query.base_layer.weight_orig")
            )
            changed += int(((ours != base) & (ours != 0)).sum())
    assert changed > 0


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_the_best_adapters_may_be_of_other_masks(tmp_path: Path) -> None:
    """The checkpoints of PEFT have no masks that could be loaded with them."""
    trainer, _ = plain_trainer(tmp_path / "a", *with_lora(cubic()), **BEST_OF_EVERY_SECOND)
    trainer.compute_metrics = Metric(0.1, 0.9, 0.2, 0.3)
    with pytest.warns(
        UserWarning,
        match=r"adapters of .*checkpoint-4, which .* at a sparsity of 0\.56.* at 0\.6001\. ",
    ):
        trainer.train()
    trainer, _ = plain_trainer(tmp_path / "b", *with_lora(cubic()), **BEST_OF_EVERY_SECOND)
    trainer.compute_metrics = Metric(0.1, 0.2, 0.9, 0.3)  # step 6, since when nothing was pruned
    trainer.train()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_a_state_that_does_not_fit_leaves_a_model_with_lora_alone(tmp_path: Path) -> None:
    trainer, _ = plain_trainer(tmp_path, *with_lora(cubic()), save_strategy="steps", save_steps=2)
    trainer.train()
    path = tmp_path / "checkpoint-2" / "pruner.safetensors"
    state = load_state(path)
    save_state(path, {**state, "pruner": {**state["pruner"], "method": "Magnitude"}})
    model, pruner = with_lora(cubic())
    start = {name: w.clone() for name, w in model.state_dict().items() if "lora" not in name}
    trainer, _ = plain_trainer(tmp_path, model, pruner)
    with pytest.raises(ValueError, match="the state should be of AlignedMagnitude, got Magnitude"):
        trainer.train(resume_from_checkpoint=str(path.parent))
    masks = [name for name in start if name.endswith(("weight_mask", "weight_orig"))]
    assert all(torch.equal(model.state_dict()[name], start[name]) for name in masks)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_lora_is_merged_before_the_pruner_is_finished() -> None:
    model, pruner = with_lora(None)
    pruner.finalize()
    with pytest.raises(ValueError, match="pruner should not be finished"):
        hf.merge_lora(model, pruner)
    assert any("lora" in name for name, _ in model.named_parameters())


def test_what_has_no_adapters_is_not_merged() -> None:
    model = bert()
    pruner = pruner_of(model)
    with pytest.raises(TypeError, match=r"a peft\.PeftModel .* got BertForSequence"):
        hf.merge_lora(model, pruner)
    assert not pruner.finished and prune.is_pruned(model)


class Finishes(TrainerCallback):
    """Bakes the zeros in at the last step."""

    def __init__(self) -> None:
        self.pruner: Any = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == state.max_steps:
            self.pruner.finalize()


def test_a_pruner_that_is_finished_on_the_way_has_no_state_to_save(tmp_path: Path) -> None:
    """As by a callback at the last step: the Trainer saves the model, an ordinary one by then."""
    finishes = Finishes()
    options = {"callbacks": [finishes], "max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    trainer, finishes.pruner = plain_trainer(tmp_path, **options)
    trainer.train()
    assert (tmp_path / "checkpoint-3" / "pruner.safetensors").is_file()
    assert not (tmp_path / "checkpoint-6" / "pruner.safetensors").exists()
    assert not prune.is_pruned(trainer.model)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_the_best_adapters_where_the_masks_are_gone(tmp_path: Path) -> None:
    """There are none to compare with those of the best checkpoint."""
    finishes = Finishes()
    model, pruner = with_lora(None)
    finishes.pruner = pruner
    options = {**BEST_OF_EVERY_SECOND, "callbacks": [finishes], "max_steps": 4}
    trainer, _ = plain_trainer(tmp_path, model, pruner, **options)
    trainer.compute_metrics = Metric(0.9, 0.1)
    trainer.train()
    assert str(trainer.state.best_model_checkpoint).endswith("checkpoint-2")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_a_module_that_peft_has_copied_is_refused(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = bert()
    params = [*tap.prunable_parameters(model), (model.classifier, "weight")]
    pruner = tap.Pruner(params, tap.AlignedMagnitude, cubic())
    config = LoraConfig(r=2, target_modules=["query"], modules_to_save=["classifier"])
    trainer, _ = plain_trainer(tmp_path, get_peft_model(model, config), pruner)
    with pytest.raises(
        ValueError, match=r"original_module\.weight is not trained, because PEFT's modules"
    ):
        trainer.train()


def test_a_language_model_with_tied_weights(tmp_path: Path) -> None:
    """The decoder of a masked language model is its embedding; both are pruned, and saved."""
    data = [{key: row[key] for key in ("input_ids", "attention_mask")} for row in rows()]
    data = [row | {"labels": row["input_ids"]} for row in data]

    def made() -> tuple[Trainer, tap.Pruner, Any]:
        config = bert().config
        torch.manual_seed(0)
        model = transformers.BertForMaskedLM(config)
        tied = [(model.get_input_embeddings(), "weight"), (model.get_output_embeddings(), "weight")]
        pruner = tap.Pruner([*tap.prunable_parameters(model.bert), *tied], tap.Magnitude, cubic())
        trainer = Trainer(
            model,
            arguments(tmp_path, save_strategy="steps", save_steps=3),
            train_dataset=data,
            callbacks=[hf.PruningCallback(pruner)],
        )
        return trainer, pruner, model

    trainer, pruner, model = made()
    trainer.train()
    assert pruner.sparsity() == pytest.approx(0.6, abs=1e-3)
    again, resumed, other = made()
    other._apply(lambda tensor: tensor.clone())  # as moving it to a device does
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert same(other.state_dict(), model.state_dict()) and resumed.steps == 8

    pruner.finalize()
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    trainer.save_model()
    loaded = transformers.BertForMaskedLM.from_pretrained(tmp_path)
    assert same(loaded.state_dict(), model.state_dict())


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    """The same masks everywhere, the penalty once, and states saved by the main process."""
    options: dict[str, Any] = {"compute_loss_func": summed_loss, "max_grad_norm": 0.5}
    trainer, *_ = regularized(tmp_path / "one", 1.0, per_device_train_batch_size=12, **options)
    trainer.train()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(Path(__file__).with_name("trainer_processes.py")), str(tmp_path / "two")]
    process = subprocess.run(command, capture_output=True, text=True, check=False, timeout=400)
    assert process.returncode == 0, process.stderr
    found = load_file(tmp_path / "two" / "final.safetensors")
    wanted = trainer.model.state_dict()
    assert found.keys() == wanted.keys()
    for key, value in found.items():
        torch.testing.assert_close(value, wanted[key], rtol=1e-4, atol=1e-5, msg=key)
    assert hf.last_complete_checkpoint(tmp_path / "two") == str(tmp_path / "two" / "checkpoint-8")
    (tmp_path / "two" / "checkpoint-8" / "rng_state_1.pth").unlink()
    assert hf.last_complete_checkpoint(tmp_path / "two") == str(tmp_path / "two" / "checkpoint-6")


@pytest.mark.slow
def test_a_pretrained_encoder(tmp_path: Path) -> None:
    """One of real size, with everything on, and resumed."""
    from torchalignprune.demo import encoder_folder

    folder = encoder_folder()

    def made() -> tuple[Any, tap.Pruner]:
        torch.manual_seed(0)
        model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
        params = tap.prunable_parameters(model.base_model)
        reference = tap.Reference.from_checkpoint(folder, params)
        penalty = tap.CosineAlignment(params, reference)
        schedule = schedules.cubic(0.0, 0.5, end=3)
        pruner = tap.Pruner(
            params, tap.AlignedMagnitude, schedule, reference=reference, penalty=penalty
        )
        trainer = hf.AlignmentTrainer(
            model,
            arguments(
                tmp_path,
                max_steps=4,
                save_strategy="steps",
                save_steps=2,
                gradient_accumulation_steps=2,
                learning_rate=1e-4,
                bf16=True,
            ),
            train_dataset=rows(32),
            penalty=penalty,
            strength=0.1,
            callbacks=[hf.PruningCallback(pruner)],
        )
        return trainer, pruner

    trainer, pruner = made()
    trainer.train()
    assert pruner.sparsity() == pytest.approx(0.5, abs=1e-6)
    masked_zeros(pruner)
    again, resumed = made()
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert same(again.model.state_dict(), trainer.model.state_dict())
    assert same(again.optimizer.state_dict(), trainer.optimizer.state_dict())
    assert resumed.log() == pruner.log()


def test_a_checkpoint_that_a_signal_asks_for(tmp_path: Path) -> None:
    """With enable_jit_checkpoint the Trainer saves from within a callback, and stops."""
    handler = signal.getsignal(signal.SIGTERM)
    trainer, _ = plain_trainer(tmp_path / "run", enable_jit_checkpoint=True)

    class Signal(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 4:  # what SIGTERM does, after a few seconds
                (jit,) = [
                    callback
                    for callback in trainer.callback_handler.callbacks
                    if hasattr(callback, "jit_manager")
                ]
                jit.jit_manager.is_checkpoint_requested = True

    trainer.add_callback(Signal())
    try:
        trainer.train()
    finally:
        signal.signal(signal.SIGTERM, handler)
    checkpoint = hf.last_complete_checkpoint(tmp_path / "run")
    assert checkpoint is not None
    state = load_state(Path(checkpoint) / "pruner.safetensors")
    assert state["pruner"]["step"] == state["global_step"] == 4
