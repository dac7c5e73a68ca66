"""What the benchmarks share: the weights, the clock, and where results go."""

from __future__ import annotations

import ctypes
import datetime
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn

import torchalignprune as tap

RESULTS = Path(__file__).parent / "results"

# The matrices of one layer of XLM-R base, and its word embeddings.
LAYER = [(768, 768)] * 4 + [(3072, 768), (768, 3072)]
EMBEDDINGS = (250002, 768)


class Encoder(nn.Module):
    """The 84.9 M encoder weights of XLM-R base (276.9 M with the embeddings), at random.

    Every row has its own scale, as the rows of trained weights do.
    """

    def __init__(self, embeddings: bool = False, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        shapes = [EMBEDDINGS] * embeddings + LAYER * 12
        generator = torch.Generator().manual_seed(0)
        self.layers = nn.ModuleList()
        for rows, columns in shapes:
            layer = nn.Linear(1, 1, bias=False)
            scale = 0.02 * torch.exp(0.5 * torch.randn(rows, 1, generator=generator))
            weight = torch.randn(rows, columns, generator=generator).mul_(scale)
            layer.weight = nn.Parameter(weight.to(dtype))
            self.layers.append(layer)

    def parameters_to_prune(self) -> list[tuple[nn.Module, str]]:
        return [(layer, "weight") for layer in self.layers]

    def weights(self) -> list[Tensor]:
        return [layer.weight.detach() for layer in self.layers]


def size(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


def seconds(run: Callable[[], Any], repeats: int = 7) -> list[float]:
    """The times of several runs; what a run returns is freed before the next."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = run()
        times.append(time.perf_counter() - start)
        del result
    return times


def median(times: Sequence[float]) -> float:
    return statistics.median(times)


def read_pass(tensors: Sequence[Tensor]) -> list[float]:
    """The physical floor: the times of reading every weight once."""
    return seconds(lambda: [tensor.sum() for tensor in tensors], 15)


def _status(field: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if field in x)
    return int(line.split()[1]) * 1024


def start_memory() -> int:
    """The memory of this process in bytes; its peak counts from here on (Linux, glibc)."""
    # Memory that was freed but not returned to the system would be reused without showing.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak_memory() -> int:
    """The highest memory of this process since `start_memory`, in bytes."""
    return _status("VmHWM")


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    model = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), model)
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "simd": tap.build_info.info()["simd"],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "torchalignprune": tap.__version__,
    }


def save(name: str, result: dict[str, Any]) -> None:
    """Write a result with the machine and the command that made it."""
    command = " ".join(["python", *sys.argv])
    result = {"command": command, "machine": machine(), **result}
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")


def write_tables(document: Path, tables: Mapping[str, str]) -> None:
    """Write the tables into the document, between their marks."""
    text = document.read_text(encoding="utf-8")
    for name, table in tables.items():
        marks = rf"(<!-- {name} -->\n).*?(\n<!-- end -->)"
        text, times = re.subn(marks, lambda m, t=table: m[1] + t + m[2], text, flags=re.DOTALL)
        assert times == 1, f"{document} has no place for {name}"
    document.write_text(text, encoding="utf-8")


def fresh_process(*arguments: str, environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Run this script again with other arguments; its last line of output is JSON."""
    run = subprocess.run(
        [sys.executable, sys.argv[0], *arguments],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env=os.environ | dict(environment or {}),
    )
    result = json.loads(run.stdout.splitlines()[-1])
    assert isinstance(result, dict)
    return result
