"""Train an encoder that is sharded over several processes, and prune it on the way.

    pip install "torchalignprune[transformers]"
    torchrun --nproc-per-node 2 --max-restarts 3 examples/fsdp_pruning.py --out results

Runs on GPUs, one per process, or on the CPU if there are none. The model is a small BERT with
random weights, or the Transformers folder of any BERT-like encoder given by ``--model``. The task
is made up, so that nothing has to be downloaded: which of two words occurs more often?

- ``fully_shard`` shards the model layer by layer; every rank has a shard of every weight.
- The Pruner follows a cubic schedule. In a pruning step the ranks exchange histograms of a few KB.
  The masks are those that one process would choose.
- CosineAlignment keeps the units aligned with those of the model that training starts from.
- ``torch.distributed.checkpoint`` saves model, masks, optimizer and pruner every few steps, each
  rank its own shards. When a rank dies, torchrun restarts all of them, and they resume from the
  last complete checkpoint, even with another number of ranks.
- At the end OUT/model is a Transformers folder with an ordinary model that has zeros in it.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoConfig, AutoModelForSequenceClassification, BertConfig

import torchalignprune as tap

FIRST, SECOND = 10, 11  # the two words


def build(options: argparse.Namespace) -> nn.Module:
    """The model to train; the same on every rank."""
    torch.manual_seed(options.seed)
    if options.model is not None:
        model: nn.Module = AutoModelForSequenceClassification.from_pretrained(
            options.model, num_labels=2, dtype=torch.float32
        )
        return model
    config = BertConfig(
        vocab_size=200,
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=64,
        num_labels=2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    built: nn.Module = AutoModelForSequenceClassification.from_config(config)
    return built


def shard(model: nn.Module, device: str) -> None:
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    for layer in model.base_model.encoder.layer:  # type: ignore[union-attr]
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def make_batch(step: int, options: argparse.Namespace, device: str) -> tuple[Tensor, Tensor]:
    """This rank's share of the batch of a step, the same each time the step is run."""
    generator = torch.Generator().manual_seed(1_000_003 * options.seed + step)
    words = torch.randint(FIRST, FIRST + 8, (options.batch, 32), generator=generator)
    labels = ((words == FIRST).sum(1) > (words == SECOND).sum(1)).long()
    own = slice(dist.get_rank(), None, dist.get_world_size())
    return words[own].to(device), labels[own].to(device)


def latest(folder: Path) -> Path | None:
    """The last complete checkpoint: the metadata is written after all ranks have written."""
    complete = [path.parent for path in folder.glob("step-*/.metadata")]
    return max(complete, default=None)


def check_run(options: argparse.Namespace) -> None:
    """Refuses to resume a run that was started with other settings."""
    settings = {
        key: each for key, each in vars(options).items() if key not in ("out", "save_every")
    }
    path = options.out / "settings.json"
    if path.exists():
        former = json.loads(path.read_text(encoding="utf-8"))
        for key, own in settings.items():
            if former.get(key) != own:
                raise ValueError(
                    f"{key} should be {former.get(key)}, as in the run in --out {options.out}, got "
                    f"{own}; another folder starts a new run"
                )
    elif os.environ["RANK"] == "0":
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        partial.replace(path)


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer, pruner: tap.Pruner) -> Any:
    model_state, optimizer_state = get_state_dict(model, optimizer)
    return {"model": model_state, "optimizer": optimizer_state, "pruner": pruner.state_dict()}


def resume(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, pruner: tap.Pruner
) -> None:
    state = state_of(model, optimizer, pruner)
    checkpoint.load(state, checkpoint_id=path)
    set_state_dict(
        model,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
    )
    pruner.load_state_dict(state["pruner"])


def export(model: nn.Module, folder: Path, options: argparse.Namespace) -> None:
    """Writes a Transformers folder with the whole model, which only rank 0 holds."""
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(model, options=whole)
    if dist.get_rank() == 0:
        plain = AutoModelForSequenceClassification.from_config(model.config)
        plain.load_state_dict(state)
        plain.save_pretrained(folder)
        if options.model is not None:
            from transformers import AutoTokenizer

            AutoTokenizer.from_pretrained(options.model).save_pretrained(folder)
    dist.barrier()


def say(*words: object) -> None:
    if dist.get_rank() == 0:
        print(*words, flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints and model")
    parser.add_argument("--model", help="Transformers folder (default: a small random BERT)")
    parser.add_argument("--sparsity", type=float, default=0.7)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--every", type=int, default=10, help="steps from one pruning to the next")
    parser.add_argument("--save-every", type=int, default=20, help="steps between checkpoints")
    parser.add_argument("--batch", type=int, default=32, help="sentences per step, over all ranks")
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--strength", type=float, default=0.1, help="of the penalty")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if options.model is not None:
        AutoConfig.from_pretrained(options.model)  # fails before anything starts
    try:
        check_run(options)
    except ValueError as error:
        parser.error(str(error))

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # After a restart the store still has the addresses of the ranks that died, so each attempt gets
    # a prefix of its own.
    store, rank, world = next(dist.rendezvous("env://"))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    backend = "nccl" if device == "cuda" else "gloo"
    store = dist.PrefixStore(f"attempt {attempt}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world)

    model = build(options).to(device)
    shard(model, device)
    params = tap.prunable_parameters(model)
    # Each rank keeps its own shards of the weights that training starts from.
    reference = tap.Reference.capture(params)
    penalty = tap.CosineAlignment(params, reference)
    schedule = tap.schedules.cubic(
        0.0,
        options.sparsity,
        begin=options.steps // 10,
        end=7 * options.steps // 10,
        every=options.every,
    )
    pruner = tap.Pruner(
        params, tap.AlignedMagnitude, schedule, reference=reference, penalty=penalty
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate)

    checkpoints = options.out / "checkpoints"
    found = latest(checkpoints)
    if found is not None:
        resume(found, model, optimizer, pruner)
        say(f"resuming from {found.name} with sparsity {pruner.sparsity():.3f}")

    model.train()
    for step in range(pruner.steps, options.steps):
        words, labels = make_batch(step, options, device)
        loss = model(input_ids=words, labels=labels).loss
        # Every rank has the penalty of the whole model, and its gradient for the rank's own shards:
        # FSDP2 averages none of it.
        (loss + options.strength * penalty()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if pruner.step():
            figures = pruner.log()
            say(
                f"step {step + 1}  loss {loss.item():.3f}  "
                f"sparsity {figures['pruning/sparsity']:.3f}  "
                f"alignment {figures['pruning/alignment']:.3f}"
            )
        if (step + 1) % options.save_every == 0 or step + 1 == options.steps:
            state = state_of(model, optimizer, pruner)
            name = f"step-{step + 1:08}"
            checkpoint.save(state, checkpoint_id=checkpoints / name)
            print(f"rank {rank}: wrote {name}", flush=True)

    sparsity = pruner.sparsity()
    pruner.finalize()
    export(model, options.out / "model", options)
    say(f"wrote {options.out / 'model'} with sparsity {sparsity:.4f}")
    dist.destroy_process_group()
    print(f"rank {rank}: done", flush=True)


if __name__ == "__main__":
    main()
