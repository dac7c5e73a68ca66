"""A pruning step on a model that is sharded over several processes: its time, and what is sent.

    python benchmarks/sharding.py [--processes 2] [--layers 12]

The encoder of XLM-R base in float32, its rows sharded as by FSDP2, over processes of one thread
each that talk by gloo. The masks are compared with those of one process before anything is timed.
Writes results/sharding.json.
"""

from __future__ import annotations

import argparse
import tempfile
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import torchalignprune as tap
from common import Encoder, median, save, seconds
from torchalignprune import ops
from torchalignprune.targets import targets_of

AMOUNT = 0.5


def count_traffic(sent: dict[str, int]) -> None:
    reduce = dist.all_reduce

    def counted(message: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        sent["messages"] += 1
        sent["bytes"] += message.nbytes
        return reduce(message, *args, **kwargs)

    dist.all_reduce = counted


def prune(method: type[tap.PruningMethod], params: list[tuple[nn.Module, str]]) -> list[Tensor]:
    return method(amount=AMOUNT).masks(targets_of(params))


def process(rank: int, world: int, layers: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world
    )
    mesh = init_device_mesh("cpu", (world,))
    encoder = Encoder()
    layer_list = list(encoder.layers)[: 6 * layers]
    whole = [layer.weight.detach() for layer in layer_list]
    masks = {}
    for tied in (False, True):
        weights = [w.mul(256).round() / 256 for w in whole] if tied else whole
        masks[tied] = ops.select_global(weights, int(AMOUNT * sum(w.numel() for w in weights)))
        for layer, weight in zip(layer_list, weights, strict=True):
            layer.weight = nn.Parameter(
                distribute_tensor(weight, mesh, [Shard(0)], src_data_rank=None)
            )
        params = [(layer, "weight") for layer in layer_list]
        sent = {"messages": 0, "bytes": 0}
        results: dict[str, Any] = {}
        reduce = dist.all_reduce
        for method in (tap.Magnitude, tap.AlignedMagnitude):
            count_traffic(sent)
            found = prune(method, params)
            dist.all_reduce = reduce
            if method is tap.Magnitude:
                for mask, full in zip(found, masks[tied], strict=True):
                    expected = distribute_tensor(full, mesh, [Shard(0)], src_data_rank=None)
                    assert torch.equal(mask.to_local(), expected.to_local()), "another mask"
            results[method.__name__] = {
                "seconds": median(seconds(partial(prune, method, params), 5)),
                **sent,
            }
            sent.update(messages=0, bytes=0)
        local = [layer.weight.to_local() for layer in layer_list]
        count = int(AMOUNT * sum(w.numel() for w in local))
        results["select_global of one shard"] = {
            "seconds": median(seconds(partial(ops.select_global, local, count), 5))
        }
        if rank == 0:
            torch.save(results, f"{folder}/tied{tied}.pt")
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--layers", type=int, default=12, help="of the encoder's twelve")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(
            process,
            args=(options.processes, options.layers, folder),
            nprocs=options.processes,
        )
        results = {
            name: torch.load(f"{folder}/tied{tied}.pt")
            for name, tied in (("normal", False), ("quantised", True))
        }
    for weights, rows in results.items():
        for what, row in rows.items():
            print(f"{weights:10} {what:28} {1e3 * row['seconds']:8.1f} ms", end="")
            print(
                f"  {row['messages']:3} messages, {row['bytes']:6,} bytes" if "bytes" in row else ""
            )
    save("sharding", {"processes": options.processes, "layers": options.layers, **results})


if __name__ == "__main__":
    main()
