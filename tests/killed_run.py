"""A training run that is killed (SIGKILL) at random moments and restarted until it is done.

    python killed_run.py FOLDER KIND SEED KILLS

Before that the same run is left alone, in FOLDER/whole. Each start is a fork of this process, which
has imported everything but holds no state of the run: a start knows of those before it only through
FOLDER/killed. Prints how many were really killed.
"""

from __future__ import annotations

import math
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_model
from torch import nn

import torchalignprune as tap
from torchalignprune import hf, schedules

STEPS, EVERY = 60, 3

may_save = math.inf  # how often this start may save: see has_saved


def run(folder: Path, kind: str) -> None:
    """Trains to the end, from the last checkpoint if there is one."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(24, 64),
        nn.Dropout(0.1),
        nn.ReLU(),
        nn.Linear(64, 64),
        nn.ReLU(),
        nn.Linear(64, 8),
    )
    params = tap.prunable_parameters(model)
    reference = tap.Reference.capture(params)
    penalty = tap.CosineAlignment(params, reference, matching="greedy", match_every=7)
    schedule = schedules.cubic(0.0, 0.8, begin=5, end=50, every=3)
    if kind == "aligned":
        pruner = tap.Pruner(
            params, tap.AlignedMagnitude, schedule, reference=reference, penalty=penalty, min_unit=2
        )
    else:
        movement = tap.criteria.Movement(params)
        pruner = tap.Pruner(
            params, tap.Magnitude, schedule, criterion=movement, penalty=penalty, regrow=True
        )
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    checkpoint = folder / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        pruner.load_state_dict(state["pruner"])
        torch.set_rng_state(state["rng"])
    while pruner.steps < STEPS:
        generator = torch.Generator().manual_seed(pruner.steps)
        inputs = torch.randn(32, 24, generator=generator)
        wanted = torch.randint(8, (32,), generator=generator)
        loss = nn.functional.cross_entropy(model(inputs), wanted) + 0.1 * penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        pruner.step()
        if pruner.steps % EVERY == 0:
            save(
                {
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "pruner": pruner.state_dict(),
                    "rng": torch.get_rng_state(),
                },
                checkpoint,
            )
            has_saved()
    pruner.finalize()
    save(model.state_dict(), folder / "final.pt")


class Saved(transformers.TrainerCallback):
    def on_save(self, *args: Any, **kwargs: Any) -> None:
        has_saved()


def run_trainer(folder: Path) -> None:
    """The same with the Trainer of Transformers."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        num_labels=3,
    )
    model = transformers.BertForSequenceClassification(config)
    params = tap.prunable_parameters(model)
    reference = tap.Reference.capture(params)
    penalty = tap.CosineAlignment(params, reference)
    schedule = schedules.cubic(0.0, 0.8, begin=2, end=20, every=3)
    pruner = tap.Pruner(
        params, tap.AlignedMagnitude, schedule, reference=reference, penalty=penalty
    )
    words = torch.randint(50, (64, 8), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": row, "labels": row.sum() % 3} for row in words]
    arguments = transformers.TrainingArguments(
        str(folder),
        max_steps=40,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        weight_decay=0.1,
        save_steps=2,
        save_total_limit=2,
        logging_steps=1000,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=0,
    )
    trainer = hf.AlignmentTrainer(
        model,
        arguments,
        train_dataset=rows,
        penalty=penalty,
        strength=0.1,
        callbacks=[hf.PruningCallback(pruner), Saved()],
    )
    checkpoint = hf.last_complete_checkpoint(folder)
    if checkpoint is not None and checkpoint.endswith("checkpoint-40"):
        # It was killed after its last step.
        load_model(model, Path(checkpoint) / "model.safetensors")
    else:
        trainer.train(resume_from_checkpoint=checkpoint)
    pruner.finalize()
    save(model.state_dict(), folder / "final.pt")


def save(state: object, path: Path) -> None:
    """Replaces the file in one step: there is either the old one or the whole new one."""
    beside = path.with_suffix(".partial")
    torch.save(state, beside)
    os.replace(beside, path)


def has_saved() -> None:
    """Called after each save. A start that is to be killed waits here after its second: a run saves
    20 times, and so takes at least ten starts, however fast the machine is."""
    global may_save
    may_save -= 1
    while may_save <= 0:
        time.sleep(1)


def start(folder: Path, kind: str, to_be_killed: bool) -> int:
    """Forks a process that continues the run."""
    global may_save
    child = os.fork()
    if child == 0:
        may_save = 2 if to_be_killed else math.inf
        run_trainer(folder) if kind == "trainer" else run(folder, kind)
        os._exit(0)
    return child


def was_killed(child: int) -> bool:
    """Waits for the end of a start, and exits if it failed by itself."""
    _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status) and os.waitstatus_to_exitcode(status) != 0:
        sys.exit("a start has failed by itself")
    return os.WIFSIGNALED(status)


def main(folder: Path, kind: str, seed: int, kills: int) -> None:
    whole, restarted = folder / "whole", folder / "killed"
    whole.mkdir()
    restarted.mkdir()
    begin = time.monotonic()
    was_killed(start(whole, kind, to_be_killed=False))
    duration = time.monotonic() - begin

    chance = random.Random(seed)
    killed = 0
    while not (restarted / "final.pt").exists():
        before = restarted.stat().st_mtime_ns
        child = start(restarted, kind, to_be_killed=killed < kills)
        if killed < kills:
            # Kill every other start by the time it first saves, the others soon after that.
            soon = killed % 2 == 0
            end = time.monotonic() + (chance.uniform(0.0, duration / 2) if soon else 60)
            while restarted.stat().st_mtime_ns == before and time.monotonic() < end:
                time.sleep(0.001)
            time.sleep(0 if soon else chance.uniform(0.0, duration / 20))
            os.kill(child, signal.SIGKILL)
        killed += was_killed(child)
    print(f"killed {killed}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
