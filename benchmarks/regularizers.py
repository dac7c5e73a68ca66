"""The two regularizers on the 84.9 M encoder weights of XLM-R base, half of them pruned.

    python benchmarks/regularizers.py

Forward and backward, fused against plain torch, after a check that values and gradients agree. Each
case runs in its own process, and frees the gradients before each step as ``zero_grad`` does. How
fast a new gradient can be written depends on whether its memory is at hand or has to come from the
system page by page. Both are measured: "kept", with glibc told to keep freed memory (as in the
middle of a training step, whose activations need far more), and "fresh", with glibc's defaults. The
floor is one pass that reads three tensors and writes one. Prints a table and writes
results/regularizers.json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

import torchalignprune as tap
from common import Encoder, fresh_process, median, peak_memory, save, seconds, size, start_memory

KEEP = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(1 << 35)}
Pairs = list[tuple[torch.nn.Module, str]]


def plain_cosine(params: Pairs, references: list[Tensor]) -> Tensor:
    gaps = []
    for (module, _), reference in zip(params, references, strict=True):
        pruned = module.weight_orig * module.weight_mask
        gaps.append((1 - cosine_similarity(pruned, reference, dim=1)).mean())
    return torch.stack(gaps).mean()


def plain_frobenius(params: Pairs, references: list[Tensor]) -> Tensor:
    gaps = []
    for (module, _), reference in zip(params, references, strict=True):
        pruned = module.weight_orig * module.weight_mask
        gaps.append((pruned - reference).square().sum() / reference.square().sum())
    return torch.stack(gaps).mean()


def floor(params: Pairs, references: list[Tensor]) -> Callable[[], None]:
    masks = [module.weight_mask.float() for module, _ in params]
    outputs = [torch.empty_like(reference) for reference in references]

    def run() -> None:
        for (module, _), mask, reference, out in zip(
            params, masks, references, outputs, strict=True
        ):
            torch.addcmul(reference, module.weight_orig.detach(), mask, out=out)

    return run


CASES: dict[str, Callable[[Pairs, list[Tensor]], Callable[[], Any]]] = {
    "floor": floor,
    "cosine": tap.CosineAlignment,
    "cosine, plain torch": lambda *a: lambda: plain_cosine(*a),
    "cosine, units in": lambda *a: tap.CosineAlignment(*a, units="in"),
    "frobenius": tap.FrobeniusAlignment,
    "frobenius, plain torch": lambda *a: lambda: plain_frobenius(*a),
}


def prepare() -> tuple[Pairs, list[Tensor]]:
    model = Encoder()
    params = model.parameters_to_prune()
    references = [module.weight.detach().clone() for module, _ in params]
    tap.global_unstructured(params, tap.Magnitude, amount=0.5)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        for module, _ in params:
            noise = torch.randn(module.weight_orig.shape, generator=generator)
            module.weight_orig.add_(noise, alpha=0.002)
    return params, references


def check() -> None:
    params, references = prepare()
    leaves = [module.weight_orig for module, _ in params]
    for name in ("cosine", "frobenius"):
        value = CASES[name](params, references)()
        plain = CASES[f"{name}, plain torch"](params, references)()
        torch.testing.assert_close(value, plain, rtol=1e-4, atol=0)
        for found, expected in zip(
            torch.autograd.grad(value, leaves), torch.autograd.grad(plain, leaves), strict=True
        ):
            torch.testing.assert_close(
                found, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item()
            )


def run(name: str) -> None:
    params, references = prepare()
    leaves = [module.weight_orig for module, _ in params]
    case = CASES[name](params, references)
    weights = 4 * size(references)

    def step() -> None:
        for leaf in leaves:
            leaf.grad = None
        value = case()
        if value is not None:
            value.backward()

    step()
    for leaf in leaves:
        leaf.grad = None
    before = start_memory()
    step()
    extra = (peak_memory() - before) / weights
    print(json.dumps({"s": seconds(step, 15), "extra": extra}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        run(options.case)
        return
    check()
    results: dict[str, Any] = {name: {"kept": [], "fresh": [], "extra": []} for name in CASES}
    for _ in range(options.runs):
        for name, result in results.items():
            for memory, settings in (("kept", KEEP), ("fresh", {})):
                one = fresh_process("--case", name, environment=settings)
                result[memory].append(median(one["s"]))
                if memory == "fresh":
                    result["extra"].append(one["extra"])
    for name, result in results.items():
        for memory in ("kept", "fresh"):
            result[f"{memory}_s"] = median(result[memory])
        result["extra_memory"] = max(result["extra"])
        line = f"{name:24}"
        for memory in ("kept", "fresh"):
            own = result[f"{memory}_s"]
            line += f"  {memory}: {own:.4f} s {own / results['floor']['kept_s']:5.2f} floors"
            peer = results.get(f"{name.split(',')[0]}, plain torch")
            if peer and peer is not result:
                result[f"{memory}_faster"] = median(peer[memory]) / own
                line += f" {result[f'{memory}_faster']:5.2f} x"
        print(f"{line}  memory on top: {result['extra_memory']:.2f} x the weights")
    save("regularizers", {"weights": 84_934_656, "cases": results})


if __name__ == "__main__":
    main()
