"""Pruning half of XLM-R base, whole calls: torch's global_unstructured against ours.

    python benchmarks/global_unstructured.py            # the encoder, 84.9 M weights
    python benchmarks/global_unstructured.py --all      # with the embeddings, 276.9 M

Each case runs --runs times, each time in a new process with a new model. Measured are the time of
the call and its peak memory on top of what was in use before. Prints a table and writes
results/global_unstructured[_all].json.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import torch
from torch.nn.utils import prune

import torchalignprune as tap
from common import Encoder, fresh_process, median, peak_memory, read_pass, save, size, start_memory

AMOUNT = 0.5
PEER = "torch: L1Unstructured"
CASES: dict[str, dict[str, Any]] = {
    PEER: {"by": prune.global_unstructured, "method": prune.L1Unstructured},
    "torch: Magnitude": {"by": prune.global_unstructured, "method": tap.Magnitude},
    "torch: AlignedMagnitude": {"by": prune.global_unstructured, "method": tap.AlignedMagnitude},
    "tap: Magnitude": {"by": tap.global_unstructured, "method": tap.Magnitude},
    "tap: AlignedMagnitude": {"by": tap.global_unstructured, "method": tap.AlignedMagnitude},
    "tap: AlignedMagnitude, both": {
        "by": tap.global_unstructured,
        "method": tap.AlignedMagnitude,
        "options": {"units": "both"},
    },
    "tap: AlignedMagnitude, frobenius": {
        "by": tap.global_unstructured,
        "method": tap.AlignedMagnitude,
        "options": {"alignment": "frobenius"},
    },
}


def run(name: str, embeddings: bool, repeated: int) -> None:
    case = CASES[name]
    # A small call first, for everything that is loaded once per process.
    small = [(torch.nn.Linear(64, 64), "weight")]
    case["by"](small, case["method"], amount=AMOUNT, **case.get("options", {}))
    model = Encoder(embeddings)
    parameters = model.parameters_to_prune()
    times, peaks = [], []
    for call in range(repeated):
        amount = AMOUNT if call == 0 else 0.05
        before = start_memory()
        start = time.perf_counter()
        case["by"](parameters, case["method"], amount=amount, **case.get("options", {}))
        times.append(time.perf_counter() - start)
        peaks.append(peak_memory() - before)
    kept = sum(int((module.weight_mask != 0).sum()) for module, _ in parameters)
    print(json.dumps({"s": times, "extra": peaks, "kept": kept}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--all", action="store_true", help="with the embeddings")
    parser.add_argument("--runs", type=int, default=3, help="of each case (default: %(default)s)")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--repeated", type=int, default=1, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        run(options.case, options.all, options.repeated)
        return

    flags = ["--all"] if options.all else []
    weights = Encoder(options.all).weights()
    n = size(weights)
    floor = median(read_pass(weights))
    del weights
    results: dict[str, Any] = {name: {"s": [], "extra": []} for name in CASES}
    for _ in range(options.runs):
        for name in CASES:
            one = fresh_process("--case", name, *flags)
            assert one["kept"] == n - round(AMOUNT * n), (name, one["kept"])
            results[name]["s"].append(one["s"][0])
            results[name]["extra"].append(one["extra"][0])
    peer = median(results[PEER]["s"])
    print(f"{n / 1e6:.1f} M float32 weights; one read pass: {floor:.4f} s")
    for name, result in results.items():
        result["median_s"] = median(result["s"])
        result["faster"] = peer / result["median_s"]
        result["extra_memory"] = max(result["extra"]) / (4 * n)
        print(
            f"{name:34} {result['median_s']:8.3f} s  {result['faster']:7.1f} x  "
            f"memory on top: {result['extra_memory']:5.2f} x the weights"
        )
    ten = fresh_process("--case", "tap: Magnitude", "--repeated", "10", *flags)
    print(
        f"tap: Magnitude, call 1 and 10: {ten['s'][0]:.3f} s and {ten['s'][9]:.3f} s, "
        f"{ten['extra'][0] / (4 * n):.2f} x and {ten['extra'][9] / (4 * n):.2f} x the weights"
    )
    save(
        "global_unstructured" + ("_all" if options.all else ""),
        {"weights": n, "amount": AMOUNT, "read_pass_s": floor, "cases": results, "ten_calls": ten},
    )


if __name__ == "__main__":
    main()
