"""What a pruning step costs when the weights are sharded: its parts, measured, and their sum.

    python benchmarks/distributed.py            # measure, then write the tables of docs/scaling.md
    python benchmarks/distributed.py --tables   # the tables only, from the JSON

On the CPU with gloo, one thread per process: the passes over the weights on one process; short
all-reduces among 2 and 4 processes; whole pruning steps of an encoder of XLM-R base's size (84.9 M
weights) under fully_shard on 1, 2 and 4 processes, with all messages counted; what the cosine
penalty sends. The table for GPUs is calculated, from the assumptions in ASSUMED. Writes
results/distributed.json.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import torchalignprune as tap
from common import LAYER, RESULTS, Encoder, median, save, seconds, write_tables
from torchalignprune import ops

DOCUMENT = Path(__file__).parents[1] / "docs" / "scaling.md"
METHODS = {"magnitude": tap.Magnitude, "cosine": tap.AlignedMagnitude}
MESSAGES = (512, 16 << 10)  # bytes
LONGEST = 66 * 8  # bytes: the sums of 64 groups of bins, and two more numbers
WORLDS = (1, 2, 4)
COLLECTIVES = (
    "all_reduce",
    "all_gather",
    "all_gather_into_tensor",
    "all_to_all_single",
    "broadcast",
)

# Not measured: from data sheets and common experience, for GPUs like the H100.
ASSUMED = {
    "memory_bytes_per_s": 1.7e12,  # half of the data sheet's 3.35 TB/s
    "sort_passes": 30,  # the cost of sorting the entries of each unit, in reads of the weights
    "per_message_s": 60e-6,  # launch, copy to the host, and what the host decides
    "hop_in_a_node_s": 5e-6,  # NVLink
    "hop_between_nodes_s": 10e-6,  # InfiniBand
    "gpus_in_a_node": 8,
}


def key_passes() -> dict[str, float]:
    """The passes over the weights on one process, in seconds for the whole encoder."""
    weights = Encoder().weights()
    masks = [torch.ones_like(weight, dtype=torch.bool) for weight in weights]
    one = 0x3C000000 | 1 << 31
    return {
        "read": median(seconds(lambda: [w.sum() for w in weights])),
        "counts": median(seconds(lambda: ops.shard_counts(weights, 0, 21, 2048, masks=masks))),
        "masks": median(
            seconds(lambda: ops.shard_masks(weights, one, [0] * len(weights), masks=masks))
        ),
        "gains": median(seconds(lambda: [ops.cosine_gains(w) for w in weights])),
    }


@contextmanager
def counted() -> Iterator[list[int]]:
    """Lists the sizes in bytes of the messages that this process sends."""
    sent: list[int] = []
    originals = {name: getattr(dist, name) for name in COLLECTIVES}

    def counting(call: Callable[..., Any]) -> Callable[..., Any]:
        def count(*args: Any, **kwargs: Any) -> Any:
            tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
            sent.append(max(t.numel() * t.element_size() for t in tensors))
            return call(*args, **kwargs)

        return count

    for name, call in originals.items():
        setattr(dist, name, counting(call))
    try:
        yield sent
    finally:
        for name, call in originals.items():
            setattr(dist, name, call)


def sharded_encoder() -> tuple[nn.Module, list[tuple[nn.Module, str]]]:
    model = Encoder()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh), model.parameters_to_prune()


def rank_main(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world
    )
    found: dict[str, Any] = {"messages": {}, "steps": {}}
    for length in MESSAGES:
        message = torch.zeros(length // 8, dtype=torch.int64)
        dist.barrier()
        found["messages"][length] = median(seconds(lambda m=message: dist.all_reduce(m), 200))
    for name, method in METHODS.items():
        _, params = sharded_encoder()
        tap.global_unstructured(params, method, amount=0.1)  # masks exist, as in training
        times = []
        for _ in range(3):
            dist.barrier()
            with counted() as sent:
                times += seconds(
                    lambda m=method, p=params: tap.global_unstructured(p, m, amount=0.1), 1
                )
        found["steps"][name] = {"s": times, "messages": len(sent), "bytes": sum(sent)}
    penalty = tap.CosineAlignment(params, tap.Reference.capture(params))
    with counted() as sent:
        penalty()
    found["penalty"] = {"messages": len(sent), "bytes": sum(sent)}
    if rank == 0:
        Path(folder, "found.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def measure() -> dict[str, Any]:
    torch.set_num_threads(1)
    result: dict[str, Any] = {"weights": 12 * sum(r * c for r, c in LAYER), "passes": key_passes()}
    for world in WORLDS:
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(rank_main, (world, folder), nprocs=world)
            result[str(world)] = json.loads(Path(folder, "found.json").read_text())
    return result


def most_messages(weights: float) -> tuple[int, int]:
    """The most messages of a step with the global budget, and its rounds for ties.

    There are two messages for each of the three rounds that find a 32-bit key, two for each round
    that narrows down the position of the last tie by a factor of 2,048, and two more.
    """
    rounds = math.ceil(math.log2(weights) / 11)
    return 8 + 2 * rounds, rounds


def on_paper(weights: float, gpus: int, method: str) -> dict[str, float]:
    """The seconds of a pruning step of float32 weights on so many GPUs, and the bytes sent."""
    messages, rounds = most_messages(weights)
    own = weights / gpus
    # Bytes per weight: reading it and its mask in each round, and writing the new mask.
    passes = (3 + rounds) * 5 + 6
    if method == "cosine":
        passes += 4 * ASSUMED["sort_passes"] + 4  # the gains are written once
    node = min(gpus, int(ASSUMED["gpus_in_a_node"]))
    hops = 2 * math.log2(node) * ASSUMED["hop_in_a_node_s"]
    hops += 2 * math.log2(gpus / node) * ASSUMED["hop_between_nodes_s"]
    return {
        "local_s": own * passes / ASSUMED["memory_bytes_per_s"],
        "messages_s": messages * (hops + ASSUMED["per_message_s"]),
        "bytes": messages * LONGEST,
    }


def tables(measured: dict[str, Any]) -> dict[str, str]:
    n, passes = measured["weights"], measured["passes"]
    rows = ["| pass, one thread | ms | G weights/s |", "| --- | ---: | ---: |"]
    names = {
        "read": "reading the weights (`sum`)",
        "counts": "one histogram (`ops.shard_counts`)",
        "masks": "writing the masks (`ops.shard_masks`)",
        "gains": "gains of `AlignedMagnitude` (`ops.cosine_gains`)",
    }
    for key, name in names.items():
        rows.append(f"| {name} | {1e3 * passes[key]:.0f} | {n / passes[key] / 1e9:.2f} |")
    found = {"passes": "\n".join(rows)}

    rows = ["| processes | all-reduce of 0.5 KB | of 16 KB |", "| ---: | ---: | ---: |"]
    for world in WORLDS[1:]:
        times = measured[str(world)]["messages"]
        cells = [f"{1e6 * times[str(length)]:.0f} µs" for length in MESSAGES]
        rows.append(f"| {world} | {' | '.join(cells)} |")
    found["messages"] = "\n".join(rows)

    rows = ["| method | processes | s | messages | bytes |", "| --- | ---: | ---: | ---: | ---: |"]
    for method in METHODS:
        for world in WORLDS:
            step = measured[str(world)]["steps"][method]
            assert step["messages"] <= most_messages(n)[0]
            assert step["bytes"] <= step["messages"] * LONGEST
            rows.append(
                f"| {method} | {world} | {median(step['s']):.2f} | {step['messages']} | "
                f"{step['bytes']:,} |"
            )
    found["steps"] = "\n".join(rows)

    rows = [
        "| weights | GPUs | sent by a rank, at most | magnitude | cosine | of it messages |",
        "| ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for weights, label in ((1e9, "1 G"), (1e10, "10 G"), (1e11, "100 G"), (1e12, "1 T")):
        for gpus in (8, 64, 512, 4096):
            if not 2e7 <= weights / gpus <= 1.3e10:
                continue
            plain, cosine = (on_paper(weights, gpus, m) for m in METHODS)
            cells = [
                f"{cosine['bytes'] / 1024:.1f} KB",
                *(f"{1e3 * (f['local_s'] + f['messages_s']):.1f} ms" for f in (plain, cosine)),
                f"{1e3 * cosine['messages_s']:.1f} ms",
            ]
            rows.append(f"| {label} | {gpus:,} | {' | '.join(cells)} |")
    found["paper"] = "\n".join(rows)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tables", action="store_true", help="only write the tables")
    if parser.parse_args().tables:
        measured = json.loads((RESULTS / "distributed.json").read_text())
    else:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        measured = json.loads(json.dumps(measure()))
        save("distributed", {**measured, "assumed": ASSUMED})
    for name, table in tables(measured).items():
        print(f"\n{name}\n{table}")
    write_tables(DOCUMENT, tables(measured))


if __name__ == "__main__":
    main()
