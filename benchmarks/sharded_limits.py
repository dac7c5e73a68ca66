"""What a rank sends in a pruning step of sharded weights whose layers have limits.

    python benchmarks/sharded_limits.py

Random float32 matrices whose scales differ by up to a factor of 2, sharded by fully_shard over two
processes with gloo, pruned to 50% by magnitude; all messages of one rank are counted. Writes
results/sharded_limits.json, and the table of docs/distributed.md from it.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import torchalignprune as tap
from common import save, write_tables
from distributed import counted

DOCUMENT = Path(__file__).parents[1] / "docs" / "distributed.md"
WORLD = 2
SIZES = (128, 512)
MATRICES = {24: "24", 72: "72 (XLM-R base)", 224: "224 (32 layers of 7)"}
LIMITS: dict[str, dict[str, float]] = {
    "no bound is met": {"max_layer_sparsity": 0.99},
    "`max_layer_sparsity=0.55`": {"max_layer_sparsity": 0.55},
    "and `min_layer_sparsity=0.45`": {"max_layer_sparsity": 0.55, "min_layer_sparsity": 0.45},
}


def sent_in_a_step(count: int, size: int, limits: dict[str, float]) -> tuple[int, int]:
    """The bytes and the messages of one pruning step of this process."""
    torch.manual_seed(0)
    layers = [nn.Linear(size, size, bias=False) for _ in range(count)]
    with torch.no_grad():
        for layer in layers:
            layer.weight.normal_().mul_(torch.rand(()) + 1)
    model = fully_shard(nn.Sequential(*layers), mesh=init_device_mesh("cpu", (WORLD,)))
    params = tap.prunable_parameters(model, exclude=())
    assert len(params) == count
    pruner = tap.Pruner(params, tap.Magnitude, tap.schedules.one_shot(0.5, at=1), **limits)
    with counted() as sent:
        assert pruner.step()
    assert abs(pruner.sparsity() - 0.5) < 1e-6
    return sum(sent), len(sent)


def rank_main(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD
    )
    found: list[dict[str, Any]] = []
    for size in SIZES:
        for count in MATRICES:
            for name, limits in LIMITS.items():
                sent, messages = sent_in_a_step(count, size, limits)
                found.append(
                    {"matrices": count, "size": size, "limits": name, "bytes": sent}
                    | {"messages": messages}
                )
    if rank == 0:
        Path(folder, "found.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def table(found: list[dict[str, Any]]) -> str:
    """Of the larger matrices."""
    sent = {(each["matrices"], each["limits"]): each["bytes"] for each in found}
    rows = [f"| matrices | {' | '.join(LIMITS)} |", f"| --- |{' --- |' * len(LIMITS)}"]
    for count, label in MATRICES.items():
        cells = [f"{sent[count, name] / 1024:.1f} KB" for name in LIMITS]
        rows.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(rows)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(rank_main, (folder,), nprocs=WORLD)
        found = json.loads(Path(folder, "found.json").read_text())
    save("sharded_limits", {"steps": found})
    for each in found:
        print(each)
    write_tables(DOCUMENT, {"limits": table(found)})


if __name__ == "__main__":
    main()
