"""What `Pruner.step` costs when it prunes nothing, and when it prunes.

    python benchmarks/pruner.py

The second is compared with the selection alone (the same method on the same weights and masks, from
the weights to the masks) and with a whole call of `tap.global_unstructured`. The masks are compared
before anything is timed. Prints a table and writes results/pruner.json.
"""

from __future__ import annotations

import argparse
import time

import torch

import torchalignprune as tap
from common import Encoder, median, read_pass, save, seconds, size
from torchalignprune.targets import targets_of

METHODS = {
    "Magnitude": tap.Magnitude,
    "AlignedMagnitude": tap.AlignedMagnitude,
}


def idle_step() -> dict[str, float]:
    """Microseconds of a step that prunes nothing, over 72 parameters."""
    model = Encoder()
    params = model.parameters_to_prune()
    schedule = tap.schedules.cubic(0.0, 0.5, begin=10**8, end=2 * 10**8, every=100)
    pruner = tap.Pruner(params, tap.Magnitude, schedule)
    found = []
    for _ in range(7):
        start = time.perf_counter()
        for _ in range(1000):
            pruner.step()
        found.append((time.perf_counter() - start) * 1e3)
    # The pruner's two hooks are called in the steps of every optimizer.
    own = torch.nn.Parameter(torch.zeros(1))
    own.grad = torch.zeros(1)
    optimizer = torch.optim.SGD([own], lr=0.1)
    times = []
    for _ in range(7):
        start = time.perf_counter()
        for _ in range(1000):
            optimizer.step()
        times.append((time.perf_counter() - start) * 1e3)
    return {"step_us": median(found), "sgd_step_of_one_entry_us": median(times)}


def pruning_step(name: str, state: bool, repeats: int = 15) -> dict[str, float]:
    """Seconds of the step from 40 to 50%, with and without the moments of AdamW."""
    method = METHODS[name]
    model = Encoder()
    params = model.parameters_to_prune()
    floor = median(read_pass(model.weights()))
    pruner = tap.Pruner(params, method, tap.schedules.steps({0: 0.4, 1: 0.5}))
    start = [module.weight_mask.clone() for module, _ in params]
    weights = [module.weight_orig.detach().clone() for module, _ in params]
    if state:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
        for module, _ in params:
            module.weight_orig.grad = torch.zeros_like(module.weight_orig)
        optimizer.step()
        optimizer.zero_grad()

    def again() -> None:
        for (module, _), mask, weight in zip(params, start, weights, strict=True):
            module.weight_mask = mask.clone()
            module.weight_orig.data.copy_(weight)
        pruner._step, pruner._target = 0, 0.4

    def select() -> list[torch.Tensor]:
        chosen = method(amount=0.5)
        chosen.absolute = True
        return chosen.masks(targets_of(params))

    expected = select()
    pruner.step()
    assert all(
        torch.equal(module.weight_mask, mask)
        for (module, _), mask in zip(params, expected, strict=True)
    )
    assert pruner.sparsity() == round(0.5 * size(weights)) / size(weights)
    del expected
    found: dict[str, list[float]] = {"selection": [], "global_unstructured": [], "step": []}
    amount = sum(int(mask.sum()) for mask in start) - size(weights) // 2
    runs = {
        "selection": select,
        "step": pruner.step,
        "global_unstructured": lambda: tap.global_unstructured(params, method, amount=amount),
    }
    for _ in range(repeats):
        for key, run in runs.items():
            again()
            found[key] += seconds(run, 1)
    medians = {key: median(times) for key, times in found.items()}
    return {
        "method": name,
        "optimizer_state": "AdamW" if state else None,
        "read_pass": floor,
        **medians,
        "step_over_selection": medians["step"] / medians["selection"],
        "step_over_global_unstructured": medians["step"] / medians["global_unstructured"],
        "runs": found,
    }


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    idle = idle_step()
    print(f"a step that prunes nothing: {idle['step_us']:.2f} microseconds")
    rows = []
    for name in METHODS:
        for state in (False, True):
            row = pruning_step(name, state)
            rows.append(row)
            print(
                f"{name:17} {'AdamW' if state else 'no state':9} read {row['read_pass']:.4f} "
                f"selection {row['selection']:.4f} step {row['step']:.4f} "
                f"({row['step_over_selection']:.2f} x) global_unstructured "
                f"{row['global_unstructured']:.4f} ({row['step_over_global_unstructured']:.2f} x)"
            )
    save("pruner", {"idle": idle, "pruning": rows})


if __name__ == "__main__":
    main()
