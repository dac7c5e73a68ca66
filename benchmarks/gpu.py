"""The operators on a GPU, against what a user would call instead.

    python benchmarks/gpu.py [--out FOLDER] [--tests JUNIT_XML]

Every case is checked before it is timed. Prints a table and writes gpu.json after each case, to
results/gpu by default, with the outcome of the tests if --tests is given. gpu.sh builds, tests and
calls this. Times are medians, measured by CUDA events or, for whole calls, by the host's clock. The
floor is the time in which a copy moves the bytes that have to be moved.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
import traceback
import xml.etree.ElementTree
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import semi_structured
import torchalignprune as tap
from common import EMBEDDINGS, LAYER, RESULTS, machine, size
from torchalignprune import ops

AMOUNT = 0.5
REPEATS = 11

# XLM-R base, without and with its embeddings, and five layers of Llama 7B.
ENCODER = LAYER * 12
MODELS = {
    "85 M": ENCODER,
    "277 M": [EMBEDDINGS, *ENCODER],
    "1 G": [*[(4096, 4096)] * 4, *[(11008, 4096)] * 2, (4096, 11008)] * 5,
}

Run = Callable[[], Any]
Case = Callable[[], dict[str, Any]]


def weights_of(
    shapes: Sequence[tuple[int, int]], dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """Random weights. Every row has its own scale, as the rows of trained weights do."""
    generator = torch.Generator("cuda").manual_seed(0)
    weights = []
    for rows, columns in shapes:
        scale = torch.randn(rows, 1, device="cuda", generator=generator).mul_(0.5).exp_()
        weight = torch.randn(rows, columns, device="cuda", generator=generator)
        weights.append(weight.mul_(scale).mul_(0.02).to(dtype))
    return weights


def on_device(run: Run) -> float:
    """Milliseconds between two events around a run."""
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    before.record()
    result = run()
    after.record()
    torch.cuda.synchronize()
    del result
    return before.elapsed_time(after)


def times(run: Run, clock: Callable[[Run], float] = on_device) -> dict[str, Any]:
    """Times several runs after a first one; fewer if a run takes long."""
    first = clock(run)
    repeats = REPEATS if first < 500 else 3
    all_ms = [clock(run) for _ in range(repeats)]
    return {"ms": statistics.median(all_ms), "all_ms": all_ms}


def copy_bandwidth() -> float:
    """Bytes that a large copy reads and writes per millisecond."""
    source = torch.ones(1 << 30, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / times(lambda: target.copy_(source))["ms"]


def compared(ours: Run, peers: dict[str, Run], moved: int, bandwidth: float) -> dict[str, Any]:
    """Our times, how many times longer the peers take, and the floor."""
    own = times(ours)
    floor = moved / bandwidth
    found: dict[str, Any] = {**own, "floor_ms": floor, "to_floor": own["ms"] / floor, "peers": {}}
    for name, run in peers.items():
        gc.collect()
        torch.cuda.empty_cache()
        try:
            other = times(run)
        except RuntimeError as error:  # a peer that fails is no failure of ours
            found["peers"][name] = {"error": str(error)}
            continue
        found["peers"][name] = {**other, "ratio": other["ms"] / own["ms"]}
    return found


def select_global(model: str, dtype: torch.dtype, bandwidth: float) -> dict[str, Any]:
    weights = weights_of(MODELS[model], dtype)
    n = size(weights)
    count = int(AMOUNT * n)
    flat = torch.cat([weight.flatten() for weight in weights]).abs_()

    masks = ops.select_global(weights, count)
    kept = torch.cat([mask.flatten() for mask in masks])
    order = torch.sort(flat, stable=True).indices
    assert not bool(kept[order[:count]].any()), "an entry was kept that should go"
    assert bool(kept[order[count:]].all()), "an entry went that should be kept"
    del masks, kept, order

    peers: dict[str, Run] = {
        "torch.topk": lambda: torch.topk(flat, count, largest=False),
        "torch.sort": lambda: torch.sort(flat),
    }
    if model == "85 M":  # it runs in a single block: larger models would take seconds
        peers["torch.kthvalue"] = lambda: torch.kthvalue(flat, count)
    moved = n * (flat.element_size() + 1)
    return {
        "weights": n,
        **compared(lambda: ops.select_global(weights, count), peers, moved, bandwidth),
    }


def gains_by_torch(weight: Tensor) -> Tensor:
    """The gains for r = w, by torch's operators; of equals the lower position comes first."""
    ordered = torch.sort(weight.abs(), dim=1, descending=True, stable=True)
    squares = ordered.values.double().square_()
    roots = squares.cumsum(dim=1).sqrt_()
    sums = roots.clone()
    sums[:, 1:] += roots[:, :-1]
    gains = squares.div_(sums).div_(roots[:, -1:])
    return torch.empty_like(weight, dtype=torch.float32).scatter_(1, ordered.indices, gains.float())


def cosine_gains(dtype: torch.dtype, bandwidth: float) -> dict[str, Any]:
    weights = weights_of(ENCODER, dtype)
    for weight in weights[:6]:
        gains = ops.cosine_gains(weight)
        # Of equals the higher position comes first, and gains more.
        plain = gains_by_torch(weight.flip(1)).flip(1)
        torch.testing.assert_close(gains, plain, rtol=1e-5, atol=1e-9)
        assert torch.equal(gains.cpu(), ops.cosine_gains(weight.cpu())), "not as on the CPU"
    peers: dict[str, Run] = {
        "torch.sort and cumsum": lambda: [gains_by_torch(weight) for weight in weights]
    }
    moved = sum(weight.nbytes + 4 * weight.numel() for weight in weights)
    ours = compared(
        lambda: [ops.cosine_gains(weight) for weight in weights], peers, moved, bandwidth
    )
    references = [weight + 0.3 * weight.roll(1) for weight in weights]
    both = list(zip(weights, references, strict=True))
    weight, r = both[0]
    expected = ops.cosine_gains(weight.cpu(), reference=r.cpu())
    assert torch.equal(ops.cosine_gains(weight, reference=r).cpu(), expected), "not as on the CPU"
    with_reference = times(lambda: [ops.cosine_gains(w, reference=r) for w, r in both])
    return {"weights": size(weights), **ours, "with_reference": with_reference}


def shards(dtype: torch.dtype, bandwidth: float) -> dict[str, Any]:
    """What each of several processes does with its shards: one round of counting, and the masks."""
    weights = weights_of(MODELS["85 M"], dtype)
    counts = ops.shard_counts(weights, 0, 21, 2048)
    assert int(counts[:2048].sum()) == size(weights), "an entry was not counted"
    flat = torch.cat([weight.flatten() for weight in weights]).abs_().float()
    key = int(flat.median().view(torch.int32)) | 1 << 31
    places = [torch.tensor([0, weight.numel()]) for weight in weights]
    masks = ops.shard_masks(weights, key, [0] * len(weights))
    kept = torch.cat([mask.flatten() for mask in masks])
    assert torch.equal(kept, flat >= flat.median()), "another mask"
    del masks, kept
    moved = sum(weight.nbytes for weight in weights)
    return {
        "weights": size(weights),
        **compared(
            lambda: ops.shard_counts(weights, 0, 21, 2048),
            {"torch.histc": lambda: torch.histc(flat, 2048)},
            moved,
            bandwidth,
        ),
        "ties": times(lambda: ops.shard_ties(weights, key, places)),
        "masks": times(lambda: ops.shard_masks(weights, key, [0] * len(weights))),
    }


def select_rows(columns: int, dtype: torch.dtype, bandwidth: float) -> dict[str, Any]:
    rows = 84_934_656 // columns
    (scores,) = weights_of([(rows, columns)], dtype)
    half = columns // 2
    counts = torch.full((rows,), half, device="cuda")
    kept = ops.select_rows(scores, counts)
    order = torch.sort(scores, dim=1, stable=True).indices
    assert not bool(kept.gather(1, order[:, :half]).any()), "an entry was kept that should go"
    assert bool(kept.gather(1, order[:, half:]).all()), "an entry went that should be kept"
    del kept, order
    peers: dict[str, Run] = {"torch.topk": lambda: torch.topk(scores, half, dim=1, largest=False)}
    moved = scores.nbytes + scores.numel() + counts.nbytes
    return {
        "weights": scores.numel(),
        **compared(lambda: ops.select_rows(scores, counts), peers, moved, bandwidth),
    }


def square_sums(bandwidth: float) -> dict[str, Any]:
    weights = weights_of(ENCODER)
    for weight in weights[:6]:
        for sums, cpu in zip(ops.square_sums(weight), ops.square_sums(weight.cpu()), strict=True):
            assert torch.equal(sums.cpu(), cpu), "not as on the CPU"

    def by_torch() -> list[Tensor]:
        norms = torch.linalg.vector_norm
        return [norms(w, dim=dim, dtype=torch.float64) for w in weights for dim in (0, 1)]

    peers: dict[str, Run] = {"torch.linalg.vector_norm": by_torch}
    moved = sum(weight.nbytes for weight in weights)
    return {
        "weights": size(weights),
        **compared(lambda: [ops.square_sums(w) for w in weights], peers, moved, bandwidth),
    }


def masks_of(weights: Sequence[Tensor]) -> list[Tensor]:
    generator = torch.Generator("cuda").manual_seed(2)
    return [
        torch.rand(weight.shape, device="cuda", generator=generator) >= AMOUNT for weight in weights
    ]


def zero_pruned(dtype: torch.dtype, bandwidth: float) -> dict[str, Any]:
    """With pruned entries that are zero already, as in most pruning steps, and that are not."""
    weights = weights_of(ENCODER, dtype)
    masks = masks_of(weights)
    expected = [weight * mask for weight, mask in zip(weights, masks, strict=True)]
    fresh = [weight.clone() for weight in weights]
    ops.zero_pruned_(fresh, masks)
    for found, plain in zip(fresh, expected, strict=True):
        assert torch.equal(found, plain), "not the product with the mask"

    def by_torch() -> None:
        for weight, mask in zip(weights, masks, strict=True):
            weight.mul_(mask)

    gone = [~mask for mask in masks]

    def by_masked_fill() -> None:
        for weight, mask in zip(weights, gone, strict=True):
            weight.masked_fill_(mask, 0)

    def ours_again() -> None:
        torch._foreach_copy_(fresh, weights)
        ops.zero_pruned_(fresh, masks)

    copied = times(lambda: torch._foreach_copy_(fresh, weights))["ms"]
    first = times(ours_again)["ms"] - copied
    moved = sum(weight.nbytes + mask.nbytes for weight, mask in zip(weights, masks, strict=True))
    peers: dict[str, Run] = {"torch.mul_": by_torch, "torch.masked_fill_": by_masked_fill}
    ours = compared(lambda: ops.zero_pruned_(fresh, masks), peers, moved, bandwidth)
    return {"weights": size(weights), **ours, "first_ms": first}


def apply_mask(dtype: torch.dtype, bandwidth: float) -> dict[str, Any]:
    """Products and their gradients, from incoming gradients that are still in use elsewhere."""
    leaves = [weight.requires_grad_() for weight in weights_of(ENCODER, dtype)]
    masks = masks_of(leaves)
    own = [mask.to(dtype) for mask in masks]
    grads = weights_of(ENCODER, dtype)

    def ours() -> list[Tensor]:
        products = [ops.apply_mask(w, mask) for w, mask in zip(leaves, masks, strict=True)]
        return list(torch.autograd.grad(products, leaves, grads))

    def by_torch() -> list[Tensor]:
        products = [mask * w for w, mask in zip(leaves, own, strict=True)]
        return list(torch.autograd.grad(products, leaves, grads))

    for found, plain in zip(ours(), by_torch(), strict=True):
        assert torch.equal(found, plain), "another gradient than torch's"
    for leaf, mask in zip(leaves, masks, strict=True):
        assert torch.equal(ops.apply_mask(leaf, mask), leaf * mask), "another product than torch's"
    moved = sum(4 * leaf.nbytes + 2 * mask.nbytes for leaf, mask in zip(leaves, masks, strict=True))
    return {"weights": size(leaves), **compared(ours, {"torch.mul": by_torch}, moved, bandwidth)}


def semi_structured_layers() -> dict[str, Any]:
    return {"layers": semi_structured.measure_all()}


UNITS, LENGTH = 3072, 768


def units_of(kind: str, rows: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator("cuda").manual_seed(seed)
    a, b = (torch.randn(rows, LENGTH, device="cuda", generator=generator) for _ in range(2))
    if kind == "permuted":
        b.mul_(0.3).add_(a[torch.randperm(rows, device="cuda", generator=generator)])
    return a, b


def greedy_match(kind: str, batch: int, bandwidth: float) -> dict[str, Any]:
    similarity = torch.empty(batch, UNITS, UNITS, device="cuda")
    for seed, matrix in enumerate(similarity):
        a, b = (torch.nn.functional.normalize(side) for side in units_of(kind, UNITS, seed))
        torch.mm(a, b.t(), out=matrix)
    index = ops.greedy_match(similarity)
    assert torch.equal(index.cpu(), ops.greedy_match(similarity.cpu())), "not as on the CPU"
    peers: dict[str, Run] = {"ours, on the CPU": lambda: ops.greedy_match(similarity.cpu())}
    share = None
    if batch == 1:
        try:
            from scipy.optimize import linear_sum_assignment

            def by_scipy() -> Any:
                return linear_sum_assignment(similarity[0].cpu().numpy(), maximize=True)

            peers["scipy, on the CPU"] = by_scipy
            own = similarity[0].gather(1, index[0, :, None]).sum(dtype=torch.float64)
            share = float(own) / float(similarity[0].cpu().numpy()[by_scipy()].sum(dtype="f8"))
        except ImportError:
            print("scipy is not installed: left out")
        try:
            from torch_linear_assignment import batch_linear_assignment

            peers["torch-linear-assignment"] = lambda: batch_linear_assignment(-similarity)
        except ImportError:
            print("torch-linear-assignment is not installed: left out")
    moved = similarity.nbytes + index.nbytes
    ours = compared(lambda: ops.greedy_match(similarity), peers, moved, bandwidth)
    return {"weights": similarity.numel(), **ours, "share_of_optimum": share}


def match_units(kind: str, bandwidth: float) -> dict[str, Any]:
    a, b = units_of(kind, UNITS)
    found = tap.match_units(a, b)
    assert torch.equal(found.index, tap.match_units(a, b, block=1).index), "not as in blocks"
    peers: dict[str, Run] = {"the product alone": lambda: a @ b.t()}
    moved = 2 * a.nbytes + UNITS * UNITS * 4
    return {
        "weights": 2 * a.numel(),
        **compared(lambda: tap.match_units(a, b), peers, moved, bandwidth),
    }


def match_embeddings(kind: str) -> dict[str, Any]:
    """250,002 units in blocks: the time by the host's clock, and the memory beyond the units."""
    a, b = units_of(kind, EMBEDDINGS[0])
    tap.match_units(a[:5000], b[:5000], block=4096)
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    start = time.perf_counter()
    found = tap.match_units(a, b, block=4096)
    ms = 1e3 * (time.perf_counter() - start)
    extra = torch.cuda.max_memory_allocated() - before
    assert bool((found.index.sort().values == torch.arange(len(a), device="cuda")).all())
    return {
        "weights": 2 * a.numel(),
        "ms": ms,
        "memory_on_top_gib": extra / (1 << 30),
        "total": found.total,
    }


PEER = "torch: L1Unstructured"
CALLS: dict[str, dict[str, Any]] = {
    PEER: {"by": prune.global_unstructured, "method": prune.L1Unstructured},
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


def whole_calls(model: str, repeats: int = 5) -> dict[str, Any]:
    """torch's global_unstructured and ours, on a new model each time, by the host's clock."""
    weights = weights_of(MODELS[model])
    n = size(weights)

    def fresh() -> list[tuple[nn.Module, str]]:
        layers = []
        for weight in weights:
            layer = nn.Linear(1, 1, bias=False)
            layer.weight = nn.Parameter(weight.clone())
            layers.append((layer, "weight"))
        return layers

    def masks(layers: list[tuple[nn.Module, str]]) -> list[Tensor]:
        return [layer.weight_mask != 0 for layer, _ in layers]

    pruned = {}
    for name in (PEER, "tap: Magnitude"):
        pruned[name] = fresh()
        CALLS[name]["by"](pruned[name], CALLS[name]["method"], amount=AMOUNT)
    left = [torch.cat([m.flatten() for m in masks(layers)]) for layers in pruned.values()]
    flat = torch.cat([weight.flatten() for weight in weights]).abs_()
    assert int(left[0].sum()) == int(left[1].sum()) == n - round(AMOUNT * n)
    differ = flat[left[0] != left[1]]  # torch.topk may choose among equals as it likes
    assert differ.numel() == 0 or bool((differ == differ[0]).all()), "other entries than torch's"
    del pruned, left, flat, differ

    found: dict[str, Any] = {}
    for name, call in CALLS.items():
        all_ms, extra = [], []
        for _ in range(repeats + 1):
            layers = fresh()
            gc.collect()
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            start = time.perf_counter()
            call["by"](layers, call["method"], amount=AMOUNT, **call.get("options", {}))
            torch.cuda.synchronize()
            all_ms.append(1e3 * (time.perf_counter() - start))
            extra.append((torch.cuda.max_memory_allocated() - before) / (4 * n))
            assert sum(int(m.sum()) for m in masks(layers)) == n - round(AMOUNT * n)
            del layers
        # The first run loads what is loaded once per process.
        found[name] = {
            "ms": statistics.median(all_ms[1:]),
            "all_ms": all_ms,
            "memory_on_top": max(extra),
        }
    for result in found.values():
        result["ratio"] = found[PEER]["ms"] / result["ms"]
    return {"weights": n, "calls": found}


def pruned_encoder(dtype: torch.dtype) -> tuple[list[tuple[nn.Module, str]], list[Tensor]]:
    """The encoder's weights, half of them pruned and all then moved a little, and references."""
    references = weights_of(ENCODER, dtype)
    layers: list[tuple[nn.Module, str]] = []
    for weight in references:
        layer = nn.Linear(1, 1, bias=False)
        layer.weight = nn.Parameter(weight.clone())
        layers.append((layer, "weight"))
    tap.global_unstructured(layers, tap.Magnitude, amount=AMOUNT)
    generator = torch.Generator("cuda").manual_seed(1)
    with torch.no_grad():
        for layer, _ in layers:
            noise = torch.empty_like(layer.weight_orig).normal_(generator=generator)
            layer.weight_orig.add_(noise, alpha=0.002)
    return layers, references


def cosine_by_torch(layers: list[tuple[nn.Module, str]], references: list[Tensor]) -> Tensor:
    gaps = []
    for (layer, _), reference in zip(layers, references, strict=True):
        pruned = layer.weight_orig * layer.weight_mask
        gaps.append((1 - nn.functional.cosine_similarity(pruned, reference, dim=1)).mean())
    return torch.stack(gaps).mean()


def frobenius_by_torch(layers: list[tuple[nn.Module, str]], references: list[Tensor]) -> Tensor:
    gaps = []
    for (layer, _), reference in zip(layers, references, strict=True):
        pruned = layer.weight_orig * layer.weight_mask
        gaps.append((pruned - reference).square().sum() / reference.square().sum())
    return torch.stack(gaps).mean()


def regularizer(name: str, dtype: torch.dtype, bandwidth: float) -> dict[str, Any]:
    """Forward and backward of a penalty, with fresh gradients each time."""
    kind, by_torch = {
        "cosine": (tap.CosineAlignment, cosine_by_torch),
        "frobenius": (tap.FrobeniusAlignment, frobenius_by_torch),
    }[name]
    layers, references = pruned_encoder(dtype)
    leaves = [layer.weight_orig for layer, _ in layers]
    penalty = kind(layers, references)

    doubles: list[tuple[nn.Module, str]] = []
    for layer, _ in layers:
        other = nn.Module()
        other.weight_orig = nn.Parameter(layer.weight_orig.detach().double())
        other.weight_mask = layer.weight_mask.double()
        doubles.append((other, "weight"))
    plain = by_torch(doubles, [reference.double() for reference in references])
    value = penalty()
    torch.testing.assert_close(value.double(), plain, rtol=1e-6, atol=0)
    expected = torch.autograd.grad(plain, [other.weight_orig for other, _ in doubles])
    for found, gradient in zip(torch.autograd.grad(value, leaves), expected, strict=True):
        largest = gradient.abs().max().item()
        tolerance = torch.finfo(dtype).eps
        torch.testing.assert_close(
            found.double(), gradient, rtol=2 * tolerance, atol=1e-6 * largest
        )
    del doubles, expected, plain, value

    def step(run: Run) -> Run:
        def forward_and_backward() -> list[Tensor]:
            return list(torch.autograd.grad(run(), leaves))

        return forward_and_backward

    def peak(run: Run) -> float:
        """The peak of additional memory, in multiples of the weights."""
        run()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        extra = torch.cuda.max_memory_allocated() - before
        return extra / sum(leaf.nbytes for leaf in leaves)

    # Forward and backward each read the weights, the masks and the references; backward writes.
    masks = sum(layer.weight_mask.nbytes for layer, _ in layers)
    moved = 5 * sum(leaf.nbytes for leaf in leaves) + 2 * masks
    peers = {"plain torch": step(lambda: by_torch(layers, references))}
    found = compared(step(penalty), peers, moved, bandwidth)
    at_home = kind(layers, [reference.cpu().pin_memory() for reference in references])
    return {
        "weights": size(leaves),
        **found,
        "forward_ms": times(penalty)["ms"],
        "memory_on_top": peak(step(penalty)),
        "memory_on_top_by_torch": peak(step(lambda: by_torch(layers, references))),
        "references_on_the_cpu_ms": times(step(at_home))["ms"],
    }


def read_tests(junit: Path) -> dict[str, Any]:
    """How many tests passed, failed and were skipped, and the messages of those that failed."""
    if not junit.exists():
        return {"error": f"{junit.name} was not written"}
    found: dict[str, Any] = {"passed": 0, "failed": 0, "skipped": 0, "seconds": 0.0, "failures": {}}
    for case in xml.etree.ElementTree.parse(junit).iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        found["seconds"] += float(case.get("time", 0))
        wrong = [part for part in case if part.tag in ("failure", "error")]
        if wrong:
            found["failed"] += 1
            found["failures"][name] = (wrong[0].get("message") or "")[:500]
        else:
            found["passed" if case.find("skipped") is None else "skipped"] += 1
    found["seconds"] = round(found["seconds"], 1)
    return found


def describe(name: str, result: dict[str, Any]) -> Iterator[str]:
    if "error" in result:
        yield f"{name}: {result['error'].splitlines()[-1]}"
        return
    if "layers" in result:
        yield name
        yield from semi_structured.describe(result["layers"])
        return
    head = f"{name}, {result['weights'] / 1e6:.1f} M"
    if "calls" in result:
        yield head
        for call, one in result["calls"].items():
            yield (
                f"  {call:34} {one['ms']:9.2f} ms  {one['ratio']:7.1f} x  "
                f"memory on top: {one['memory_on_top']:5.2f} x the weights"
            )
        return
    if "memory_on_top_gib" in result:
        yield f"{head}: {result['ms']:.0f} ms, {result['memory_on_top_gib']:.2f} GiB on top"
        return
    yield f"{head}: {result['ms']:.3f} ms, {result['to_floor']:.2f} times the floor"
    for peer, one in result["peers"].items():
        if "error" in one:
            yield f"  {peer:34} {one['error'].splitlines()[0]}"
            continue
        yield f"  {peer:34} {one['ms']:9.2f} ms  {one['ratio']:7.1f} x"
    if result.get("share_of_optimum") is not None:
        yield f"  {'total':34} {result['share_of_optimum']:.4f} of the optimum"
    if "first_ms" in result:
        yield f"  {'ours, where half is not zero yet':34} {result['first_ms']:9.2f} ms"
    if "forward_ms" in result:
        yield f"  {'ours, forward alone':34} {result['forward_ms']:9.2f} ms"
        yield f"  {'ours, references on the CPU':34} {result['references_on_the_cpu_ms']:9.2f} ms"
        yield (
            f"  memory on top: {result['memory_on_top']:.2f} x the weights, "
            f"by torch {result['memory_on_top_by_torch']:.2f} x"
        )
    for what in ("ties", "masks") if "ties" in result else ():
        yield f"  {'ours, ' + what:34} {result[what]['ms']:9.2f} ms"
    if "with_reference" in result:
        yield f"  {'ours, with a reference':34} {result['with_reference']['ms']:9.2f} ms"


def gpu() -> dict[str, Any]:
    """The machine and the GPU that the numbers were measured on."""
    properties = torch.cuda.get_device_properties(0)
    return {
        **machine(),
        "gpu": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / (1 << 30), 1),
        "cuda": torch.version.cuda,
        "built_for": tap.build_info.info()["cuda_architectures"],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu")
    parser.add_argument("--tests", type=Path, help="file that pytest --junit-xml wrote")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU here: nothing to measure")
        return 0

    report: dict[str, Any] = {"command": " ".join(["python", *sys.argv]), "machine": gpu()}
    if options.tests is not None:
        report["tests"] = read_tests(options.tests)
    bandwidth = copy_bandwidth()
    report["copy_gb_per_s"] = bandwidth / 1e6
    report["amount"] = AMOUNT
    report["cases"] = {}
    cases: dict[str, Case] = {}
    for dtype in (torch.float32, torch.bfloat16):
        for model in MODELS:
            cases[f"select_global {str(dtype)[6:]} {model}"] = lambda m=model, d=dtype: (
                select_global(m, d, bandwidth)
            )
        cases[f"shards {str(dtype)[6:]}"] = lambda d=dtype: shards(d, bandwidth)
        cases[f"cosine_gains {str(dtype)[6:]}"] = lambda d=dtype: cosine_gains(d, bandwidth)
        for columns in (768, 4):
            cases[f"select_rows {str(dtype)[6:]} rows of {columns}"] = lambda c=columns, d=dtype: (
                select_rows(c, d, bandwidth)
            )
    cases["square_sums float32"] = lambda: square_sums(bandwidth)
    for kind in ("random", "permuted"):
        for batch in (1, 12):
            cases[f"greedy_match {kind}, {batch} x {UNITS} x {UNITS}"] = lambda k=kind, n=batch: (
                greedy_match(k, n, bandwidth)
            )
        cases[f"match_units {kind}"] = lambda k=kind: match_units(k, bandwidth)
        cases[f"match_units {kind}, embeddings in blocks"] = lambda k=kind: match_embeddings(k)
    for dtype in (torch.float32, torch.bfloat16):
        for name in ("cosine", "frobenius"):
            cases[f"regularizer {name} {str(dtype)[6:]}"] = lambda n=name, d=dtype: regularizer(
                n, d, bandwidth
            )
        cases[f"zero_pruned_ {str(dtype)[6:]}"] = lambda d=dtype: zero_pruned(d, bandwidth)
        cases[f"apply_mask {str(dtype)[6:]}"] = lambda d=dtype: apply_mask(d, bandwidth)
    cases["whole calls float32 85 M"] = lambda: whole_calls("85 M")
    if semi_structured.why_not() is None:
        cases["semi_structured"] = semi_structured_layers

    print(f"{report['machine']['gpu']}: copies {report['copy_gb_per_s']:.0f} GB/s")
    failed = False
    for name, case in cases.items():
        try:
            report["cases"][name] = case()
        except Exception:
            failed = True
            report["cases"][name] = {"error": traceback.format_exc()}
        gc.collect()
        torch.cuda.empty_cache()
        print("\n".join(describe(name, report["cases"][name])), flush=True)
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "gpu.json").write_text(json.dumps(report, indent=1) + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
