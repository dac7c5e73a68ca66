"""How much longer `import torchalignprune` takes than `import torch`.

    python benchmarks/import_time.py

Each import runs in its own process, in turns. Writes results/import_time.json.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time

from common import median, save

RUNS = 21


def once(statement: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", statement], check=True)
    return time.perf_counter() - start


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    times: dict[str, list[float]] = {"torch": [], "torchalignprune": []}
    for name in times:
        once(f"import {name}")
    for _ in range(RUNS):
        for name in times:
            times[name].append(once(f"import {name}"))
    ratio = median(times["torchalignprune"]) / median(times["torch"])
    for name, values in times.items():
        print(f"import {name:16} {median(values):.3f} s")
    print(f"ratio {ratio:.3f}")
    save("import_time", {"s": times, "ratio": ratio})


if __name__ == "__main__":
    main()
