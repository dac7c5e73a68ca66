"""What masks add to a training step: ours, torch's own, and none.

    python benchmarks/training_step.py

Timed are forward and backward, and an evaluation under no_grad, of two encoders with half of each
matrix pruned: a pretrained MiniLM (10.6 M weights with masks) and BERT base with random weights
(84.9 M). Then the masks alone: w * mask * c, summed over the 84.9 M weights, forward and backward,
against w * c. The variants are

- dense: no masks;
- torch: torch.nn.utils.prune's hooks, with masks in the dtype of the weights;
- ours: the same masks under our hooks, the stored weights left as they were;
- ours, zeros stored: stored weights that are zero where pruned, as the Pruner leaves them;
- ours, cached: the same as "ours", within tap.cached_weights(); evaluations only.

Outputs and gradients are compared before anything is timed. The variants take turns in one process,
and each round begins with another one. What masks add is the median, over the rounds, of the
difference to the dense step of the same round. Each case runs twice: "kept", with glibc told to
keep freed memory (as in a large model's step, where activations need far more than the products),
and "fresh", with glibc's defaults. The floor is the time to read every masked weight once. Prints a
table and writes results/training_step.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from transformers import AutoConfig, AutoModel, BertConfig, BertModel
from transformers.utils import logging

import torchalignprune as tap
from common import Encoder, fresh_process, median, read_pass, save, size
from torchalignprune import ops
from torchalignprune.demo import encoder_folder

KEEP = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(1 << 35)}
MEMORY: dict[str, dict[str, str]] = {"kept": KEEP, "fresh": {}}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
Pairs = list[tuple[nn.Module, str]]
Variants = dict[str, nn.Module]


class Weight(nn.Module):
    """A layer that multiplies its weight by a constant."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.constant = torch.rand_like(weight)

    def forward(self) -> Tensor:
        return (self.weight * self.constant).sum()


class Weights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Weight(weight) for weight in Encoder().weights()])

    def forward(self) -> Tensor:
        return torch.stack([layer() for layer in self.layers])


def minilm() -> nn.Module:
    folder = encoder_folder()
    config = AutoConfig.from_pretrained(folder, **NO_DROPOUT)
    return AutoModel.from_pretrained(folder, config=config, add_pooling_layer=False)


def bert_base() -> nn.Module:
    return BertModel(BertConfig(vocab_size=1000, **NO_DROPOUT), add_pooling_layer=False)


# The model, the shape of a batch (sentences, tokens), and the number of rounds.
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, int] | None, int]] = {
    "MiniLM, 8 x 32 tokens": (minilm, (8, 32), 15),
    "BERT base, 4 x 32 tokens": (bert_base, (4, 32), 7),
    "the masks alone": (Weights, None, 15),
}


def params_of(model: nn.Module) -> Pairs:
    if isinstance(model, Weights):
        return [(layer, "weight") for layer in model.layers]
    return tap.prunable_parameters(model)


def variants_of(build: Callable[[], nn.Module]) -> Variants:
    torch.manual_seed(0)
    dense = build().train()
    by_torch, ours = copy.deepcopy(dense), copy.deepcopy(dense)
    for layer, name in params_of(by_torch):
        prune.l1_unstructured(layer, name, 0.5)
    tap.load_state_dict(ours, by_torch.state_dict())
    zeros = copy.deepcopy(ours)
    layers = [layer for layer, _ in params_of(zeros)]
    ops.zero_pruned_([m.weight_orig for m in layers], [m.weight_mask for m in layers])
    return {"dense": dense, "torch": by_torch, "ours": ours, "ours, zeros stored": zeros}


def forward(model: nn.Module, tokens: Tensor | None) -> Tensor:
    return model() if tokens is None else model(tokens).last_hidden_state


def step(model: nn.Module, tokens: Tensor | None) -> None:
    model.zero_grad()
    forward(model, tokens).square().mean().backward()


@torch.no_grad()
def evaluate(model: nn.Module, tokens: Tensor | None) -> None:
    forward(model, tokens)


def check(variants: Variants, tokens: Tensor | None) -> None:
    """Asserts that our variants have the outputs and gradients of torch's."""
    outputs = {name: forward(model, tokens).detach() for name, model in variants.items()}
    for model in variants.values():
        step(model, tokens)
    wanted = dict(variants["torch"].named_parameters())
    for name in variants:
        if name in ("dense", "torch"):
            continue
        torch.testing.assert_close(outputs[name], outputs["torch"], rtol=1e-5, atol=1e-6)
        for key, parameter in variants[name].named_parameters():
            expected = wanted[key].grad
            largest = float(expected.abs().max())
            torch.testing.assert_close(parameter.grad, expected, rtol=1e-5, atol=1e-5 * largest)
    assert not torch.equal(outputs["dense"], outputs["torch"]), "nothing was pruned"


def timed(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def timed_cached(run: Callable[[], None]) -> float:
    with tap.cached_weights():
        run()
        return timed(run)


def in_turn(runs: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for turn in range(rounds + 1):
        for i in range(len(names)):
            name = names[(turn + i) % len(names)]
            seconds = runs[name]()
            if turn > 0:  # the first round is a warm-up
                found[name].append(seconds)
    return found


def compared(seconds: dict[str, list[float]]) -> dict[str, Any]:
    """What each variant adds to the dense time of its round, and that as a share of torch's."""
    added = {
        name: median([own - dense for own, dense in zip(times, seconds["dense"], strict=True)])
        for name, times in seconds.items()
    }
    return {
        name: {
            "s": median(times),
            "added_s": added[name],
            "of_torchs": added[name] / added["torch"],
            "all_s": times,
        }
        for name, times in seconds.items()
    }


def run(case: str) -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    build, shape, rounds = CASES[case]
    variants = variants_of(build)
    tokens = None if shape is None else torch.randint(1000, shape)
    check(variants, tokens)
    weights = [layer.weight_orig.detach() for layer, _ in params_of(variants["ours"])]
    result: dict[str, Any] = {"weights": size(weights), "floor_s": median(read_pass(weights))}
    steps = {
        name: lambda m=model: timed(lambda: step(m, tokens)) for name, model in variants.items()
    }
    result["step"] = compared(in_turn(steps, rounds))
    for model in variants.values():
        model.zero_grad()
    evaluations = {
        name: lambda m=model: timed(lambda: evaluate(m, tokens)) for name, model in variants.items()
    }
    evaluations["ours, cached"] = lambda: timed_cached(lambda: evaluate(variants["ours"], tokens))
    result["evaluation"] = compared(in_turn(evaluations, rounds))
    print(json.dumps(result))


def describe(case: str, memory: str, result: dict[str, Any]) -> Iterator[str]:
    yield (
        f"{case}, memory {memory}: {result['weights'] / 1e6:.1f} M masked weights, "
        f"read once in {1e3 * result['floor_s']:.1f} ms"
    )
    for what in ("step", "evaluation"):
        for name, one in result[what].items():
            line = f"  {what:10}  {name:18}  {1e3 * one['s']:8.1f} ms"
            if name != "dense":
                line += (
                    f"  added: {1e3 * one['added_s']:7.1f} ms"
                    f" {one['added_s'] / result['floor_s']:6.2f} floors"
                )
            if name not in ("dense", "torch"):
                line += f"  {one['of_torchs']:5.2f} of torch's"
            yield line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        run(options.case)
        return
    results: dict[str, Any] = {}
    for case in CASES:
        results[case] = {}
        for memory, settings in MEMORY.items():
            result = fresh_process("--case", case, environment=settings)
            results[case][memory] = result
            print("\n".join(describe(case, memory, result)), flush=True)
    save("training_step", {"cases": results})


if __name__ == "__main__":
    main()
