"""The time of a selection, by the number of weights and of threads.

    python benchmarks/scaling.py

From 1 M to 1 G weights in bfloat16. Writes results/scaling.json and results/scaling.png.
"""

from __future__ import annotations

import argparse
import os

import matplotlib.pyplot as plt
import torch

from common import RESULTS, median, read_pass, save, seconds
from torchalignprune import ops

COLUMNS = 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--largest", type=int, default=1 << 30, help="the most weights")
    options = parser.parse_args()
    sizes = [n for n in (1 << power for power in range(20, 31, 2)) if n <= options.largest]
    threads = sorted({1, *(2**k for k in range(10) if 2**k <= (os.cpu_count() or 1))})
    block = torch.randn(1 << 20).bfloat16()
    points = []
    for n in sizes:
        # One block, repeated: drawing 1 G numbers takes longer than selecting among them.
        weight = torch.empty(n // COLUMNS, COLUMNS, dtype=torch.bfloat16)
        for part in weight.view(-1).split(1 << 20):
            part.copy_(block[: part.numel()])
        for count in threads:
            torch.set_num_threads(count)
            repeats = 15 if n < 1 << 26 else 5
            ours = {}
            for name, run in {
                "select_global": lambda w=weight: ops.select_global([w], w.numel() // 2),
                "cosine_gains": lambda w=weight: ops.cosine_gains(w),
            }.items():
                ours[name] = median(seconds(run, repeats))
            floor = median(read_pass([weight]))
            points.append({"weights": n, "threads": count, "read_pass": floor, **ours})
            print(points[-1], flush=True)

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for name, colour in (("read_pass", "0.6"), ("select_global", "C0"), ("cosine_gains", "C1")):
        for count in threads:
            line = [p for p in points if p["threads"] == count]
            axes.plot(
                [p["weights"] for p in line],
                [p[name] for p in line],
                color=colour,
                linestyle="-" if count == threads[-1] else ":",
                marker="o",
                markersize=3,
                label=f"{name.replace('_', ' ')}, {count} thread{'s' * (count > 1)}",
            )
    axes.set(xscale="log", yscale="log", xlabel="bfloat16 weights", ylabel="seconds")
    axes.set_title("Selecting half of the weights")
    axes.grid(True, which="major", alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(RESULTS / "scaling.png", dpi=150)
    save("scaling", {"points": points})


if __name__ == "__main__":
    main()
