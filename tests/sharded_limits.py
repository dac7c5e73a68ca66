"""What test_sharded_limits.py runs on several processes: limits on sharded parameters, against one
process with the whole model."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch import distributed as dist

import torchalignprune as tap
from models import holder, pairs
from sharded import METHODS, Twins, assert_error, counted, layouts, local, spread, weights
from torchalignprune.hooks import put_masks
from torchalignprune.limits import Limits
from torchalignprune.targets import targets_of

LIMITS = (
    {"min_unit": 1},
    {"min_unit": 3, "max_layer_sparsity": 0.7},
    {"max_layer_sparsity": {"*weight[024]*": 0.3, "*": 0.8}, "min_layer_sparsity": 0.25},
    {"min_layer_sparsity": {"*weight5*": 0.5, "*weight1*": 0.9}},
)


def prune(model: Any, limits: Limits, amount: float, method: Any, **options: Any) -> None:
    """Prunes to a share of all entries, as a Pruner does."""
    made = method(amount, **options)
    made.limits, made.absolute = limits, True
    targets = targets_of(pairs(model))
    with torch.no_grad():
        masks = made.masks(targets)
    put_masks((*target.places[0], mask) for target, mask in zip(targets, masks, strict=True))


def prune_both(twins: Twins, limits: Limits, amount: float, method: Any, **options: Any) -> str:
    """Prunes the twins and compares them; returns the error, which has to be that of both."""
    errors = []
    for model in (twins.whole, twins.sharded):
        try:
            prune(model, limits, amount, method, **options)
            errors.append("")
        except ValueError as error:
            errors.append(str(error))
    assert errors[0] == errors[1], errors
    if not errors[0]:
        twins.assert_same()
    return errors[0]


def layout(name: str) -> None:
    """Weights with ties and without, all methods and limits, round after round."""
    for n, (method, options) in enumerate(METHODS.values()):
        for i in range(4 if n == 0 else 2):
            given = LIMITS[(n + i) % 4]
            twins = Twins(weights("tied" if i % 2 else "normal"), layouts()[name])
            for amount in (0.3, 0.55):
                assert not prune_both(twins, Limits(**given), amount, method, **options)


def dtypes() -> None:
    for dtypes in ([torch.bfloat16], [torch.float64], [torch.float32, torch.float64]):
        for name, given in itertools.product(("rows", "columns"), LIMITS[1:3]):
            tensors = [w.to(dtypes[i % len(dtypes)]) for i, w in enumerate(weights("tied"))]
            twins = Twins(tensors, layouts()[name])
            assert not prune_both(twins, Limits(**given), 0.5, tap.AlignedMagnitude)


def budget() -> None:
    for name in ("rows", "columns"):
        for given in LIMITS[:2]:
            twins = Twins(weights("tied")[:5], layouts()[name])
            for amount in (0.2, 0.4):
                limits = Limits(**given)
                assert not prune_both(twins, limits, amount, tap.Magnitude, budget="layer")


def literal() -> None:
    first = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    second = torch.tensor([[5.0, 6.0], [7.0, 7.0]])
    for given, amount, expected in (
        ({}, 0.5, [[[0, 0], [0, 0]], [[1, 1], [1, 1]]]),
        ({"min_unit": 1}, 0.375, [[[0, 1], [0, 1]], [[0, 1], [1, 1]]]),
        ({"max_layer_sparsity": 0.5}, 0.375, [[[0, 0], [1, 1]], [[0, 1], [1, 1]]]),
        ({"min_layer_sparsity": 0.25}, 0.375, [[[0, 0], [1, 1]], [[0, 1], [1, 1]]]),
        ({"min_unit": 1, "max_layer_sparsity": 0.5}, 0.5, [[[0, 1], [0, 1]], [[0, 1], [0, 1]]]),
    ):
        for name in ("rows", "columns"):
            model = holder(*(spread(tensor, layouts()[name]) for tensor in (first, second)))
            prune(model, Limits(**given), amount, tap.Magnitude)
            masks = [getattr(model, f"weight{i}_mask").full_tensor().int().tolist() for i in (0, 1)]
            assert masks == expected, (given, name, masks)


def signed_scores() -> None:
    """Signed scores, among which -0 and +0 are equal: the earlier entries are pruned."""
    generator = torch.Generator().manual_seed(2)
    scores = [torch.randint(-1, 2, w.shape, generator=generator) * 0.0 for w in weights()]
    scores[1] = scores[1] - (torch.rand(scores[1].shape, generator=generator) > 0.5).float()
    assert any(bool(torch.signbit(score).any()) for score in scores)
    for name, given in itertools.product(("rows", "columns"), ({"min_unit": 2}, LIMITS[1])):
        layout = layouts()[name]
        twins = Twins(weights(), layout)
        for model in (twins.whole, twins.sharded):
            method = tap.Magnitude(0.4)
            method.limits = Limits(**given)
            targets = targets_of(pairs(model))
            known = [s if model is twins.whole else spread(s, layout) for s in scores]
            with torch.no_grad():
                masks = method.masks(targets, known, signed=True)
            put_masks((*t.places[0], mask) for t, mask in zip(targets, masks, strict=True))
        twins.assert_same()


def drawn(case: Any) -> str:
    """One case of hypothesis, the same on all processes."""
    values, kinds, limits, method, options, amounts = case
    known = [None, *layouts().values()]
    chosen = [known[kind % len(known)] for kind in kinds]
    if all(one is None for one in chosen):
        chosen[0] = known[1]
    twins = Twins(values, chosen)
    for amount in amounts:
        error = prune_both(twins, limits, amount, method, **options)
    return error


# Traffic


@contextmanager
def only_sums() -> Iterator[list[int]]:
    """Counts the bytes that are sent, and allows only sums and maxima over all processes."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("something else than a sum or a maximum is sent")

    names = ("all_to_all_single", "all_gather", "all_gather_into_tensor", "broadcast", "scatter")
    known = {name: getattr(dist, name) for name in names}
    with counted() as sent:
        for name in known:
            setattr(dist, name, refuse)
        try:
            yield sent
        finally:
            for name, function in known.items():
                setattr(dist, name, function)


def sent(given: dict[str, Any], name: str, count: int, shape: tuple[int, int]) -> int:
    """The bytes that are sent to prune ``count`` weights once."""
    tensors = [torch.randn(shape) * (1 + i / count) for i in range(count)]
    twins = Twins(tensors, layouts()[name])
    with only_sums() as bytes_:
        prune(twins.sharded, Limits(**given), 0.5, tap.Magnitude)
    prune(twins.whole, Limits(**given), 0.5, tap.Magnitude)
    twins.assert_same()
    return bytes_[0]


# Errors


def errors() -> None:
    def run(model: Any, given: dict[str, Any], amount: float) -> Callable[[], None]:
        return lambda: prune(model, Limits(**given), amount, tap.Magnitude)

    for name in ("rows", "columns"):
        twins = Twins(weights(), layouts()[name])
        given = {"min_unit": 4, "max_layer_sparsity": 0.5}
        with pytest.raises(ValueError) as alone:
            prune(twins.whole, Limits(**given), 0.6, tap.Magnitude)
        assert_error(twins.sharded, run(twins.sharded, given, 0.6), str(alone.value), "leave")
        for given in LIMITS[1:3]:
            twins = Twins(weights(), layouts()[name])
            if dist.get_rank() == 1:
                local(twins.sharded.weight1.data)[0, 0] = float("nan")
            message = "ValueError: the scores of parameters[1] (Module.weight1) should be numbers"
            assert_error(twins.sharded, run(twins.sharded, given, 0.3), message)
    for copies in (None, layouts()["replicated"]):
        twins = Twins(weights(), [layouts()["rows"], copies, *[layouts()["rows"]] * 5])
        if dist.get_rank() == 1:
            local(twins.sharded.weight1.data)[0, 0] += 1
        message = "ValueError: parameters[1] (Module.weight1) should be the same on all ranks"
        assert_error(twins.sharded, run(twins.sharded, LIMITS[1], 0.3), message)


def failing_in_a_unit_of_one_rank() -> None:
    """Running out of memory on one rank alone is raised on all of them."""
    from torchalignprune import sharded_limits

    twins = Twins(weights(), layouts()["columns"])
    original = sharded_limits.best_of_rows

    def fail(*args: Any) -> Tensor:
        if dist.get_rank() == 1:
            raise MemoryError("no memory")
        return original(*args)

    sharded_limits.best_of_rows = fail
    try:
        run = lambda: prune(twins.sharded, Limits(min_unit=2), 0.3, tap.Magnitude)  # noqa: E731
        assert_error(twins.sharded, run, "MemoryError: no memory")
    finally:
        sharded_limits.best_of_rows = original
    assert not prune_both(twins, Limits(min_unit=2), 0.3, tap.Magnitude)
