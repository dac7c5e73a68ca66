"""2:4 sparse layers against dense ones on a GPU, by the layer's shape and the tokens of a batch.

    python benchmarks/semi_structured.py [--out FOLDER]

The layers of BERT and XLM-R, base and large, in float16 and bfloat16, pruned by ``AlignedNM(2, 4)``
and converted by ``to_semi_structured``. Each is compared with the dense layer that has the same
zeros. Then the two are timed in turn, under inference_mode and without a CUDA graph, as in a model.
Prints a table and writes semi_structured.json. Needs a GPU with sparse tensor cores; without one it
only says so. gpu.py runs this too.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import torchalignprune as tap
from common import RESULTS, machine

# (outputs, inputs): attention, and the two layers of the feed-forward network.
LAYERS = {
    "base": [(768, 768), (3072, 768), (768, 3072)],
    "large": [(1024, 1024), (4096, 1024), (1024, 4096)],
}
# Tokens per batch: a short sentence, one of 128 tokens, then batches of these.
TOKENS = [16, 128, 1024, 4096, 16384, 65536]
DTYPES = [torch.float16, torch.bfloat16]
REPEATS = 15


def why_not() -> str | None:
    if not torch.cuda.is_available():
        return "there is no GPU here"
    capability = torch.cuda.get_device_capability()
    if capability < (8, 0):
        return f"compute capability {capability[0]}.{capability[1]} is below 8.0"
    return None


def milliseconds(run: Callable[[], Tensor], times: int) -> float:
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before.record()
    for _ in range(times):
        run()
    after.record()
    torch.cuda.synchronize()
    return before.elapsed_time(after) / times


def layers(shape: tuple[int, int], dtype: torch.dtype) -> tuple[nn.Linear, nn.Linear]:
    """The same 2:4 pruned layer twice: dense with zeros, and sparse."""
    torch.manual_seed(0)
    dense = nn.Linear(shape[1], shape[0], device="cuda", dtype=dtype)
    tap.aligned_nm(dense, "weight", n=2, m=4)
    sparse = copy.deepcopy(dense)
    nn.utils.prune.remove(dense, "weight")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The PyTorch API of SparseSemiStructuredTensor")
        tap.to_semi_structured([(sparse, "weight")])
    return dense, sparse


@torch.inference_mode()
def measure(shape: tuple[int, int], tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    dense, sparse = layers(shape, dtype)
    x = torch.randn(tokens, shape[1], device="cuda").to(dtype)
    expected, found = dense(x), sparse(x)
    # Both round sums of 2 of every 4 inputs once.
    exact = nn.functional.linear(x.double(), dense.weight.double(), dense.bias.double())
    bound = 4 * torch.finfo(dtype).eps * float(exact.abs().max())
    for result in (expected, found):
        torch.testing.assert_close(result.double(), exact, rtol=0, atol=bound)
    del expected, found, exact
    runs: dict[str, Callable[[], Tensor]] = {"dense": lambda: dense(x), "sparse": lambda: sparse(x)}
    for run in runs.values():
        milliseconds(run, 3)
    times = max(1, min(100, round(10 / max(milliseconds(runs["dense"], 3), 1e-3))))
    all_ms: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(REPEATS):
        for name, run in runs.items():
            all_ms[name].append(milliseconds(run, times))
    ms = {f"{name}_ms": statistics.median(found) for name, found in all_ms.items()}
    return {**ms, "faster": ms["dense_ms"] / ms["sparse_ms"], "all_ms": all_ms}


def measure_all() -> dict[str, Any]:
    """One entry for each dtype, layer and number of tokens."""
    found: dict[str, Any] = {}
    for dtype in DTYPES:
        for model, shapes in LAYERS.items():
            for shape in shapes:
                for tokens in TOKENS:
                    name = f"{str(dtype)[6:]} {model} {shape[0]} x {shape[1]}, {tokens} tokens"
                    found[name] = measure(shape, tokens, dtype)
    return found


def describe(found: dict[str, Any]) -> list[str]:
    return [
        f"  {name:44} dense {one['dense_ms']:8.4f} ms  2:4 {one['sparse_ms']:8.4f} ms"
        f"  {one['faster']:5.2f} x"
        for name, one in found.items()
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu")
    options = parser.parse_args()
    if (reason := why_not()) is not None:
        print(
            f"2:4 sparsity: nothing to measure, {reason}; elsewhere zeros save disk space, not time"
        )
        return 0
    found = measure_all()
    print("\n".join(describe(found)))
    library = "cuSPARSELt" if torch.backends.cusparselt.is_available() else "CUTLASS"
    result = {
        "command": " ".join(["python", *sys.argv]),
        "machine": {**machine(), "gpu": torch.cuda.get_device_name()},
        "library": library,
        "cases": found,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "semi_structured.json").write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
