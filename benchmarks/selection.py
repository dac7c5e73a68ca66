"""Selecting half of XLM-R base's 276.9 M weights, against what a user would take instead.

    python benchmarks/selection.py

Prints a table and writes results/selection.json. The masks are checked for equality first.
"""

from __future__ import annotations

import json
import sys

import numpy
import torch

from common import Encoder, fresh_process, median, peak_memory, read_pass, save, seconds, size
from torchalignprune import ops

AMOUNT = 0.5


def memory() -> None:
    """What one selection needs beside the weights and the masks, as a share of the weights."""
    torch.manual_seed(0)
    weights = Encoder(embeddings=True).weights()
    # Loads what the first call loads, on a small part.
    ops.select_global(weights[1:5], 10)
    masks = [torch.ones(weight.shape, dtype=torch.bool) for weight in weights]
    del masks
    before = peak_memory()
    ops.select_global(weights, int(AMOUNT * size(weights)))
    extra = peak_memory() - before
    print(json.dumps({"extra": extra, "weights": 4 * size(weights)}))


def main() -> None:
    weights = Encoder(embeddings=True).weights()
    n = size(weights)
    count = int(AMOUNT * n)
    flat = torch.cat([weight.flatten() for weight in weights]).abs_()

    masks = ops.select_global(weights, count)
    threshold = torch.kthvalue(flat, count).values
    kept = torch.cat([mask.flatten() for mask in masks])
    assert int(kept.sum()) == n - count
    assert bool((flat[kept] >= threshold).all()) and bool((flat[~kept] <= threshold).all())
    del masks, kept

    floor = median(read_pass(weights))
    rows = {"select_global": seconds(lambda: ops.select_global(weights, count))}
    rows["torch.kthvalue"] = seconds(lambda: torch.kthvalue(flat, count), 3)
    array = flat.numpy()
    rows["numpy.partition"] = seconds(lambda: numpy.partition(array, count), 3)
    rows["torch.topk"] = seconds(lambda: torch.topk(flat, count, largest=False), 3)
    # Once more at the end, so that a slow spell of the machine shows.
    rows["select_global"] += seconds(lambda: ops.select_global(weights, count))
    floor_after = median(read_pass(weights))
    ours = median(rows["select_global"])

    print(f"{n / 1e6:.1f} M float32 weights, {torch.get_num_threads()} threads")
    print(f"one read pass: {floor:.4f} s, and {floor_after:.4f} s afterwards")
    for name, times in rows.items():
        print(f"{name:16} {median(times):9.4f} s  {median(times) / ours:8.1f} x")
    print(f"select_global takes {ours / floor:.1f} read passes")
    used = fresh_process("--memory")
    print(f"extra memory: {100 * used['extra'] / used['weights']:.2f}% of the weights")
    save(
        "selection",
        {
            "weights": n,
            "amount": AMOUNT,
            "read_pass_s": [floor, floor_after],
            "median_s": {name: median(times) for name, times in rows.items()},
            "all_s": rows,
            "read_passes": ours / floor,
            "ratio_to_select_global": {k: median(v) / ours for k, v in rows.items()},
            "extra_memory_share": used["extra"] / used["weights"],
        },
    )


if __name__ == "__main__":
    memory() if "--memory" in sys.argv else main()
