"""Trains in two processes (torchrun), then again from a checkpoint in the middle."""

from __future__ import annotations

import copy
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from test_hf import regularized, same, summed_loss


def check_equal_everywhere(state: dict[str, Tensor]) -> None:
    for key, value in state.items():
        others = [torch.empty_like(value) for _ in range(dist.get_world_size())]
        dist.all_gather(others, value.contiguous())
        assert all(torch.equal(value, other) for other in others), key


def main(folder: Path) -> None:
    options = {
        "per_device_train_batch_size": 3,
        "gradient_accumulation_steps": 2,
        "compute_loss_func": summed_loss,
        "max_grad_norm": 0.5,
        "save_strategy": "steps",
        "save_steps": 3,
        "ddp_backend": "gloo",
    }
    trainer, pruner, _ = regularized(folder, 1.0, **options)
    trainer.train()
    assert dist.get_world_size() == 2 and pruner.steps == 8
    state = copy.deepcopy(trainer.model.state_dict())
    check_equal_everywhere(state)
    # The masks are not broadcast in each forward.
    buffers = [*trainer.model_wrapped.named_module_buffers]
    assert buffers and not any(name.endswith("_mask") for name in buffers), buffers

    again, resumed, _ = regularized(folder, 1.0, **options)
    again.train(resume_from_checkpoint=str(folder / "checkpoint-3"))
    assert same(again.model.state_dict(), state) and resumed.steps == 8
    if dist.get_rank() == 0:
        save_file(state, folder / "final.safetensors")
    dist.barrier()
    # The reducer of DistributedDataParallel would destroy gloo's process group while it holds the
    # GIL, which a thread of that group may be waiting for (seen with torch 2.13).
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
