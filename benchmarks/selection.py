"""Selecting half of XLM-R base's 276.9 M weights, against what a user would call instead.

    python benchmarks/selection.py

The peers are timed twice: the call alone, on magnitudes that are in one vector already, and the
whole way from the list of weights to the masks, as select_global goes it. The masks are compared
first; they may differ in ties at the threshold. Prints a table and writes results/selection.json.
"""

from __future__ import annotations

import argparse
import functools
import json
import time

import numpy
import torch
from torch import Tensor

from common import (
    Encoder,
    fresh_process,
    median,
    peak_memory,
    read_pass,
    save,
    seconds,
    size,
    start_memory,
)
from torchalignprune import ops

AMOUNT = 0.5


def memory() -> None:
    """Prints the bytes that a selection needs beyond the weights and the masks."""
    torch.manual_seed(0)
    weights = Encoder(embeddings=True).weights()
    # A small call first, for everything that is loaded once.
    ops.select_global(weights[1:5], 10)
    before = start_memory()
    masks = ops.select_global(weights, int(AMOUNT * size(weights)))
    extra = peak_memory() - before - size(masks)
    print(json.dumps({"extra": extra, "weights": 4 * size(weights)}))


def magnitudes(weights: list[Tensor]) -> Tensor:
    return torch.cat([weight.flatten() for weight in weights]).abs_()


def cut(flat: Tensor, threshold: float, weights: list[Tensor]) -> list[Tensor]:
    pieces = (flat > threshold).split([weight.numel() for weight in weights])
    return [piece.view_as(weight) for piece, weight in zip(pieces, weights, strict=True)]


def by_kthvalue(weights: list[Tensor], count: int) -> list[Tensor]:
    flat = magnitudes(weights)
    return cut(flat, torch.kthvalue(flat, count).values.item(), weights)


def by_partition(weights: list[Tensor], count: int) -> list[Tensor]:
    flat = magnitudes(weights)
    threshold = numpy.partition(flat.numpy(), count - 1)[count - 1]
    return cut(flat, float(threshold), weights)


def by_topk(weights: list[Tensor], count: int) -> list[Tensor]:
    flat = magnitudes(weights)
    mask = torch.ones(flat.numel(), dtype=torch.bool)
    mask[torch.topk(flat, count, largest=False).indices] = False
    pieces = mask.split([weight.numel() for weight in weights])
    return [piece.view_as(weight) for piece, weight in zip(pieces, weights, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--memory", action="store_true", help=argparse.SUPPRESS)
    if parser.parse_args().memory:
        memory()
        return
    weights = Encoder(embeddings=True).weights()
    n = size(weights)
    count = int(AMOUNT * n)
    peers = {
        "torch.kthvalue": (by_kthvalue, lambda flat: torch.kthvalue(flat, count)),
        "numpy.partition": (by_partition, lambda flat: numpy.partition(flat.numpy(), count - 1)),
        "torch.topk": (by_topk, lambda flat: torch.topk(flat, count, largest=False)),
    }

    ours = ops.select_global(weights, count)
    assert sum(int(mask.sum()) for mask in ours) == n - count
    whole = {}
    for name, (by, _) in peers.items():
        whole[name] = []
        for _ in range(3):
            start = time.perf_counter()
            theirs = by(weights, count)
            whole[name].append(time.perf_counter() - start)
        # A peer may treat entries that equal the threshold differently.
        differing = sum(
            int((mask != other).sum()) for mask, other in zip(ours, theirs, strict=True)
        )
        assert differing <= 16, (name, differing)
        del theirs
    del ours

    floor = median(read_pass(weights))
    ours_s = seconds(lambda: ops.select_global(weights, count), 15)
    flat: Tensor | None = magnitudes(weights)
    alone = {name: seconds(functools.partial(call, flat), 3) for name, (_, call) in peers.items()}
    flat = None
    # Once more at the end, so that a slow phase of the machine shows.
    ours_s += seconds(lambda: ops.select_global(weights, count), 15)
    floor_after = median(read_pass(weights))
    own = median(ours_s)

    print(f"{n / 1e6:.1f} M float32 weights, {torch.get_num_threads()} threads")
    print(f"one read pass: {floor:.4f} s, and {floor_after:.4f} s afterwards")
    passes = own / min(floor, floor_after)
    print(f"select_global    {own:9.4f} s   {passes:.1f} read passes")
    for name in peers:
        print(
            f"{name:16} {median(alone[name]):9.4f} s alone {median(alone[name]) / own:7.1f} x"
            f"   {median(whole[name]):9.4f} s whole {median(whole[name]) / own:7.1f} x"
        )
    used = fresh_process("--memory")
    print(f"extra memory: {100 * used['extra'] / used['weights']:.2f}% of the weights")
    save(
        "selection",
        {
            "weights": n,
            "amount": AMOUNT,
            "read_pass_s": [floor, floor_after],
            "select_global_s": {"median": own, "all": ours_s},
            "read_passes": passes,
            "peers": {
                name: {
                    "alone_s": alone[name],
                    "whole_s": whole[name],
                    "alone_ratio": median(alone[name]) / own,
                    "whole_ratio": median(whole[name]) / own,
                }
                for name in peers
            },
            "extra_memory_share": used["extra"] / used["weights"],
        },
    )


if __name__ == "__main__":
    main()
