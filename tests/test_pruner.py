"""Pruning while training: exact targets, pruned entries that stay put, states that come back."""

from __future__ import annotations

import copy
import functools
import gc
import math
import types
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils._python_dispatch import TorchDispatchMode

import torchalignprune as tap
from models import Record, Tied, mlp
from torchalignprune import optimizers, schedules
from torchalignprune import pruner as pruner_module


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    pruner: tap.Pruner,
    steps: int,
    *,
    seed: int = 0,
    device: str = "cpu",
) -> None:
    """Some steps on random data, from the pruner's own step on: the same whoever resumes."""
    dtype = next(model.parameters()).dtype
    for step in range(pruner.steps, pruner.steps + steps):
        generator = torch.Generator().manual_seed(seed + step)
        inputs = torch.randn(16, 12, generator=generator).to(device, dtype)
        wanted = torch.randn(16, 8, generator=generator).to(device, dtype)
        loss = (model(inputs) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        pruner.step()


def weights(params: Any) -> list[Tensor]:
    return [getattr(module, name).detach().clone() for module, name in params]


# float16 takes an eps of 1e-8 for 0.
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.5, amsgrad=True, eps=1e-4),
    "adam, foreach": lambda p: torch.optim.Adam(
        p, lr=0.01, weight_decay=0.5, foreach=True, eps=1e-4
    ),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True, eps=1e-4),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
}


@pytest.mark.parametrize("method", [tap.Magnitude, tap.AlignedMagnitude])
def test_targets_are_absolute_and_reached_exactly(
    method: type[tap.PruningMethod], device: str
) -> None:
    model = mlp().to(device)
    params = tap.prunable_parameters(model)
    size = 12 * 16 + 16 * 8
    schedule = schedules.linear(0.0, 0.7, begin=1, end=8)
    pruner = tap.Pruner(params, method, schedule)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    seen = []
    for step in range(1, 11):
        train(model, optimizer, pruner, 1, device=device)
        zeros = sum(int((w == 0).sum()) for w in weights(params))
        assert zeros == round(schedule(step) * size)
        assert pruner.sparsity() == zeros / size
        seen.append(zeros)
    assert seen == [0, 32, 64, 96, 128, 160, 192, 224, 224, 224]


def test_it_prunes_only_when_the_schedule_changes() -> None:
    params = tap.prunable_parameters(mlp())
    pruner = tap.Pruner(params, tap.Magnitude, schedules.steps({0: 0.0, 2: 0.3, 4: 0.5}))
    assert [pruner.step() for _ in range(6)] == [False, True, False, True, False, False]


def test_what_the_schedule_asks_for_at_0_is_pruned_at_once() -> None:
    pruner = tap.Pruner(tap.prunable_parameters(mlp()), tap.Magnitude, schedules.one_shot(0.25))
    assert pruner.sparsity() == 0.25
    assert pruner.step() is False


def test_a_schedule_that_falls_prunes_nothing_and_gives_nothing_back() -> None:
    params = tap.prunable_parameters(mlp())
    pruner = tap.Pruner(params, tap.Magnitude, schedules.steps({0: 0.5, 2: 0.25, 3: 0.75}))
    before = [module.weight_mask.clone() for module, _ in params]
    assert [pruner.step(), pruner.step()] == [False, False]
    assert pruner.log() == {"pruning/sparsity": 0.5, "pruning/target_sparsity": 0.25}
    assert all(torch.equal(m.weight_mask, b) for (m, _), b in zip(params, before, strict=True))
    assert pruner.step() and pruner.sparsity() == 0.75


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_neither_decay_nor_momentum_moves_what_is_pruned(kind: str, dtype: torch.dtype) -> None:
    if kind == "adafactor" and dtype == torch.float16:
        kind = "sgd"  # Adafactor's factors overflow float16
    model = mlp(dtype)
    params = tap.prunable_parameters(model)
    pruner = tap.Pruner(params, tap.AlignedMagnitude, schedules.linear(0, 0.8, begin=3, end=9))
    optimizer = OPTIMIZERS[kind](model.parameters())
    for _ in range(12):
        train(model, optimizer, pruner, 1)
        for module, _ in params:
            gone = ~module.weight_mask
            assert bool((module.weight_orig[gone] == 0).all())
            for value in optimizer.state[module.weight_orig].values():
                if isinstance(value, Tensor) and value.shape == gone.shape:
                    assert bool((value[gone] == 0).all())
    assert pruner.sparsity() == 0.8


def test_optimizers_that_mix_entries_are_undone() -> None:
    """Muon makes updates orthogonal, which fills in what has neither gradient nor momentum."""
    model = nn.Sequential(nn.Linear(12, 16, bias=False), nn.ReLU(), nn.Linear(16, 8, bias=False))
    params = tap.prunable_parameters(model)
    pruner = tap.Pruner(params, tap.Magnitude, schedules.steps({0: 0.3, 4: 0.6}))
    optimizer = torch.optim.Muon(model.parameters(), lr=0.05)
    for step in range(1, 8):
        train(model, optimizer, pruner, 1)
        for module, _ in params:
            assert bool((module.weight_orig[~module.weight_mask] == 0).all()), step
    assert pruner.sparsity() == 0.6


def test_steps_that_move_nothing_settle_nothing() -> None:
    """A warm-up begins with a learning rate of 0, and the fused optimizers of a GradScaler skip
    steps by themselves: what they do later is still undone."""

    def zeros_are_kept(params: Any) -> bool:
        return all(bool((m.weight_orig[~m.weight_mask] == 0).all()) for m, _ in params)

    model = mlp()
    params = tap.prunable_parameters(model)
    tap.Pruner(params, tap.Magnitude, schedules.constant(0.5)).finalize()
    pruner = tap.Pruner.freeze(params)
    matrices = [module.weight_orig for module, _ in params]
    optimizer = torch.optim.Muon(matrices, lr=0.05)
    warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 2))
    for _ in range(4):
        train(model, optimizer, pruner, 1)
        warmup.step()
        assert zeros_are_kept(params)

    model = mlp()
    adam = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    model(torch.randn(4, 12)).square().mean().backward()
    adam.step()  # momentum from before the pruner
    params = tap.prunable_parameters(model)
    pruner = tap.Pruner(params, tap.Magnitude, schedules.constant(0.5))
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    for overflows in (True, False):
        adam.zero_grad()
        scaler.scale(model(torch.randn(4, 12)).square().mean()).backward()
        if overflows:
            params[0][0].weight_orig.grad[0, 0] = math.inf
        scaler.step(adam)
        scaler.update()
        pruner.step()
    assert zeros_are_kept(params)


@pytest.mark.parametrize("call", ["load_state_dict", "look_again"])
def test_a_loaded_state_settles_no_optimizer(call: str) -> None:
    """Momentum that is loaded after the pruner's state moves nothing either."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.randn(4, 12)).square().mean().backward()
    optimizer.step()
    dense = copy.deepcopy(optimizer.state_dict())
    params = tap.prunable_parameters(model)
    pruner = tap.Pruner(params, tap.Magnitude, schedules.constant(0.5))
    train(model, optimizer, pruner, 2)
    with torch.no_grad():
        for module, _ in params:
            module.weight_orig[~module.weight_mask] = 1.0
    if call == "look_again":
        pruner.look_again()
    else:
        pruner.load_state_dict(pruner.state_dict())
    for module, _ in params:
        assert not bool(module.weight_orig[~module.weight_mask].any())
    optimizer.load_state_dict(dense)
    train(model, optimizer, pruner, 1)
    for module, _ in params:
        assert bool((module.weight_orig[~module.weight_mask] == 0).all())


def test_momentum_from_before_the_pruner_moves_nothing_either() -> None:
    model = mlp()
    params = tap.prunable_parameters(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(3):
        model(torch.randn(8, 12)).square().mean().backward()
        optimizer.step()
    optimizer.zero_grad()
    pruner = tap.Pruner(params, tap.Magnitude, schedules.constant(0.5))
    for _ in range(3):
        train(model, optimizer, pruner, 1)
        for module, _ in params:
            gone = ~module.weight_mask
            assert bool((module.weight_orig[gone] == 0).all())
            assert bool((optimizer.state[module.weight_orig]["momentum_buffer"][gone] == 0).all())


def test_one_hook_and_one_mask_after_500_steps() -> None:
    model = mlp()
    params = tap.prunable_parameters(model)
    reference = tap.Reference.capture(params)
    pruner = tap.Pruner(
        params,
        tap.AlignedMagnitude,
        schedules.linear(0.0, 0.9, end=400),
        reference=reference,
        penalty=tap.CosineAlignment(params, reference),
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def objects() -> int:
        gc.collect()
        return sum(issubclass(type(o), Tensor) for o in gc.get_objects())

    counts = []
    for _ in range(5):
        train(model, optimizer, pruner, 100)
        counts.append(objects())
    assert pruner.sparsity() == 0.9
    assert counts[-1] <= counts[0] + 4
    for module, _ in params:
        assert len(module._forward_pre_hooks) == 1
        assert sorted(module._buffers) == ["weight_mask"]
        assert sorted(module._parameters) == ["bias", "weight_orig"]


def test_state_dict_keys_never_change() -> None:
    model = mlp()
    params = tap.prunable_parameters(model)
    pruner = tap.Pruner(params, tap.Magnitude, schedules.one_shot(0.5, at=1))
    before = sorted(model.state_dict())
    pruner.step()
    assert sorted(model.state_dict()) == before


@pytest.mark.parametrize(
    ("method", "options"),
    [
        (tap.Magnitude, {}),
        (functools.partial(tap.AlignedMagnitude, units="both"), {"min_unit": 2}),
        (tap.AlignedMagnitude, {"reference": True, "budget": "layer"}),
        (functools.partial(tap.Random, generator=0), {}),
        (tap.Magnitude, {"criterion": "Movement"}),
        (tap.Magnitude, {"criterion": "Taylor", "budget": "unit"}),
        (tap.Magnitude, {"criterion": "GradientMagnitude", "regrow": True}),
        (tap.AlignedMagnitude, {"regrow": 3}),
        (tap.Magnitude, {"penalty": True}),
    ],
)
def test_resumed_runs_end_the_same_bit_for_bit(method: Any, options: dict[str, Any]) -> None:
    start = mlp()

    def fresh() -> tuple[nn.Module, torch.optim.Optimizer, tap.Pruner]:
        model = copy.deepcopy(start)
        params = tap.prunable_parameters(model)
        own, chosen = dict(options), method
        if "criterion" in own:
            own["criterion"] = getattr(tap.criteria, own["criterion"])(params)
        if own.get("reference"):
            own["reference"] = tap.Reference.capture(params)
        if own.get("penalty"):
            reference = tap.Reference.capture(params)
            own["penalty"] = tap.CosineAlignment(
                params, reference, matching="greedy", match_every=3
            )
        if isinstance(method, functools.partial) and "generator" in method.keywords:
            generator = torch.Generator().manual_seed(1)
            chosen = functools.partial(tap.Random, generator=generator)
        pruner = tap.Pruner(params, chosen, schedules.cubic(0, 0.7, end=9), **own)
        return model, torch.optim.AdamW(model.parameters(), lr=0.02), pruner

    def run(model: nn.Module, optimizer: Any, pruner: tap.Pruner, steps: int) -> None:
        for _ in range(steps):
            if pruner.penalty is not None:
                (pruner.penalty() * 0.1).backward()
            train(model, optimizer, pruner, 1)

    whole = fresh()
    run(*whole, 11)
    for killed_at in (0, 4, 7):
        first = fresh()
        run(*first, killed_at)
        saved = copy.deepcopy([part.state_dict() for part in first])
        second = fresh()
        for part, state in zip(second, saved, strict=True):
            part.load_state_dict(state)
        assert second[2].log() == first[2].log()
        run(*second, 11 - killed_at)
        ours, theirs = second[0].state_dict(), whole[0].state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), killed_at
        assert second[2].log() == whole[2].log()


def test_a_state_of_something_else_is_refused_and_changes_nothing() -> None:
    params = tap.prunable_parameters(mlp())
    pruner = tap.Pruner(params, tap.Magnitude, schedules.linear(0, 0.5, end=4))
    pruner.step()
    state = pruner.state_dict()
    other = tap.Pruner(
        tap.prunable_parameters(mlp()), tap.Magnitude, schedules.linear(0, 0.5, end=4)
    )
    with pytest.raises(
        ValueError, match=r"0\.weight should have 33 pruned entries, as in the state, got 0"
    ):
        other.load_state_dict(state)
    with pytest.raises(ValueError, match="version 1, got 7"):
        pruner.load_state_dict({**state, "version": 7})
    with pytest.raises(ValueError, match=r"not in both: \['0.weight', '5.weight'\]"):
        pruner.load_state_dict({**state, "pruned": {"2.weight": 3, "5.weight": 3}})
    with pytest.raises(ValueError, match="as this pruner's options ask for"):
        pruner.load_state_dict({**state, "criterion": {}})
    assert other.steps == 0 and pruner.steps == 1
    module, _ = params[0]
    module.weight_mask.copy_(module.weight_mask.flip(0))  # as many, but others
    with pytest.raises(
        ValueError, match="masks that the state was saved with, got masks that prune other"
    ):
        pruner.load_state_dict(state)


def test_a_state_that_does_not_fit_to_its_end_changes_nothing() -> None:
    params = tap.prunable_parameters(mlp())
    movement = tap.criteria.Movement(params)
    penalty = tap.CosineAlignment(params, tap.Reference.capture(params), matching="greedy")
    schedule = schedules.linear(0, 0.5, end=4)
    pruner = tap.Pruner(params, tap.Magnitude, schedule, criterion=movement, penalty=penalty)
    state = pruner.state_dict()
    # Named from the start, because a distributed checkpoint loads no other tensors.
    assert set(state["criterion"]["sums"]) == {"0.weight", "2.weight"}
    assert set(state["matching"]["indices"]) == {"0.weight", "2.weight"}
    criterion, matching = dict(state["criterion"], steps=7), state["matching"]
    sums, indices = criterion["sums"], matching["indices"]
    for part, message in (
        ({"criterion": {**criterion, "sums": {}}}, r"should have the sums of 0\.weight, got none"),
        (
            {"criterion": {**criterion, "sums": {**sums, "2.weight": torch.ones(2)}}},
            r"the sums of 2\.weight should have shape \(8, 16\), got \(2,\)",
        ),
        (
            {"criterion": {"steps": 7}},
            r"should have the keys \['criterion', 'steps', 'sums', 'without_gr",
        ),
        ({"criterion": {**criterion, "criterion": "Taylor"}}, "criterion Movement, got Taylor"),
        ({"matching": {"indices": indices}}, r"should have \['calls', 'indices'\], got"),
        ({"matching": {**matching, "indices": {}}}, r"not in both: \['0\.weight', '2\.weight'\]"),
        (
            {"matching": {**matching, "indices": {**indices, "0.weight": torch.arange(3)}}},
            r"the matching of 0\.weight should have shape \(16,\), got \(3,\)",
        ),
        (
            {"penalty": {"other": torch.ones(1)}},
            r"the penalty should have the keys \[\], got \['other'\]",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            pruner.load_state_dict({**state, "step": 9, "criterion": criterion, **part})
        assert pruner.steps == 0 and movement.steps == 0
    pruner.load_state_dict({**state, "step": 9, "criterion": criterion})
    assert pruner.steps == 9 and movement.steps == 7
    with pytest.raises(RuntimeError, match="has seen no gradient"):
        movement.scores()


def test_the_state_of_a_generator_may_lie_elsewhere() -> None:
    """As after ``torch.load(map_location="cuda")``."""
    method = functools.partial(tap.Random, generator=torch.Generator().manual_seed(1))
    pruner = tap.Pruner(tap.prunable_parameters(mlp()), method, schedules.constant(0.5))
    state = pruner.state_dict()
    there = state["generator"].clone()
    elsewhere = types.SimpleNamespace(shape=there.shape, cpu=lambda: there)
    torch.rand(3, generator=method.keywords["generator"])
    pruner.load_state_dict({**state, "generator": elsewhere})
    assert torch.equal(method.keywords["generator"].get_state(), there)
    with pytest.raises(ValueError, match=r"should have a tensor of shape \(\d+,\) as generator"):
        pruner.load_state_dict({**state, "step": 3, "generator": there[:8]})
    assert pruner.steps == 0


def test_finalize_leaves_an_ordinary_model() -> None:
    model = mlp()
    dense = copy.deepcopy(model)
    params = tap.prunable_parameters(model)
    pruner = tap.Pruner(params, tap.AlignedMagnitude, schedules.one_shot(0.5))
    inputs = torch.randn(3, 12)
    shown = model(inputs)
    pruner.finalize()
    pruner.finalize()
    assert model.state_dict().keys() == dense.state_dict().keys()
    assert not prune.is_pruned(model)
    assert torch.equal(model(inputs), shown)
    assert all(isinstance(module.weight, nn.Parameter) for module, _ in params)
    assert pruner.sparsity() == 0.5
    with pytest.raises(RuntimeError, match="finished"):
        pruner.step()


def test_freeze_keeps_the_zeros_of_a_sparse_model() -> None:
    model = mlp()
    params = tap.prunable_parameters(model)
    tap.global_unstructured(params, tap.Magnitude, amount=0.6)
    zeros = [w == 0 for w in weights(params)]
    for module, name in params:
        prune.remove(module, name)
    pruner = tap.Pruner.freeze(params)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)
    train(model, optimizer, pruner, 10)
    assert [torch.equal(w == 0, z) for w, z in zip(weights(params), zeros, strict=True)] == [
        True,
        True,
    ]
    pruned = sum(int(zero.sum()) for zero in zeros) / 320
    assert pruner.sparsity() == pruned == pytest.approx(0.6)
    pruner.finalize()
    assert pruner.sparsity() == pruned
    with pytest.raises(ValueError, match="without any: is this the sparse checkpoint"):
        tap.Pruner.freeze(tap.prunable_parameters(mlp()))


def test_tied_weights_are_pruned_once_and_stay_tied() -> None:
    model = Tied()
    params = [(model.a, "weight"), (model.b, "weight")]
    pruner = tap.Pruner(params, tap.Magnitude, schedules.one_shot(0.5, at=1))
    pruner.step()
    assert model.a.weight_orig is model.b.weight_orig
    assert model.a.weight_mask is model.b.weight_mask
    assert int(model.a.weight_mask.sum()) == 72
    pruner.finalize()
    assert model.a.weight is model.b.weight


def test_budgets() -> None:
    for budget in ("layer", "unit"):
        params = tap.prunable_parameters(mlp())
        schedule = schedules.steps({0: 0.0, 1: 0.25, 2: 0.5})
        pruner = tap.Pruner(params, tap.AlignedMagnitude, schedule, budget=budget)
        for share in (0.25, 0.5):
            pruner.step()
            for module, _ in params:
                kept = module.weight_mask
                if budget == "unit":
                    assert kept.sum(dim=1).tolist() == [round(kept.size(1) * (1 - share))] * len(
                        kept
                    )
                assert int(kept.sum()) == kept.numel() * (1 - share)


def test_log() -> None:
    model = mlp()
    params = tap.prunable_parameters(model)
    reference = tap.Reference.capture(params)
    penalty = tap.FrobeniusAlignment(params, reference)
    pruner = tap.Pruner(
        params,
        tap.AlignedMagnitude,
        schedules.one_shot(0.5, at=1),
        reference=reference,
        penalty=penalty,
    )
    assert pruner.log() == {
        "pruning/sparsity": 0.0,
        "pruning/target_sparsity": 0.0,
        "pruning/alignment": 1.0,
        "pruning/penalty": 0.0,
    }
    pruner.step()
    report = tap.alignment_report(params, reference)
    log = pruner.log()
    assert log["pruning/sparsity"] == log["pruning/target_sparsity"] == 0.5
    by_hand = sum(layer["mean_alignment"] for layer in report) / 2
    assert log["pruning/alignment"] == pytest.approx(by_hand, abs=1e-6)
    assert log["pruning/penalty"] == pytest.approx(penalty().item())


def test_a_penalty_with_a_state_of_its_own() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("scale", torch.ones(()))

        def forward(self) -> Tensor:
            return 2 * self.scale

    def made() -> tap.Pruner:
        params = tap.prunable_parameters(mlp())
        return tap.Pruner(params, tap.Magnitude, schedules.constant(0.5), penalty=Scaled())

    pruner, resumed = made(), made()
    pruner.penalty.scale.fill_(3.0)
    resumed.load_state_dict(pruner.state_dict())
    assert resumed.log()["pruning/penalty"] == 6.0


def test_parameters_without_entries() -> None:
    module = nn.Module()
    module.register_parameter("weight", nn.Parameter(torch.empty(0, 3)))
    pruner = tap.Pruner([(module, "weight")], tap.Magnitude, schedules.one_shot(0.5, at=1))
    assert pruner.step() and pruner.sparsity() == 0


def test_a_reference_for_the_log_alone() -> None:
    """A method that was given a reference of its own, or none, keeps to that."""
    masks, logs = [], []
    for method, with_reference in (
        (tap.AlignedMagnitude, False),
        (functools.partial(tap.AlignedMagnitude, reference=None), True),
        (tap.AlignedMagnitude, True),
    ):
        torch.manual_seed(0)
        model = mlp()
        params = tap.prunable_parameters(model)
        reference = tap.Reference.capture(params)
        with torch.no_grad():
            for module, _ in params:
                module.weight.add_(torch.randn_like(module.weight))
        pruner = tap.Pruner(
            params,
            method,
            schedules.constant(0.5),
            reference=reference if with_reference else None,
        )
        masks.append(torch.cat([module.weight_mask.flatten() for module, _ in params]))
        logs.append(pruner.log())
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])
    assert "pruning/alignment" not in logs[0] and 0 < logs[1]["pruning/alignment"] < 1


def test_bad_input() -> None:
    params = tap.prunable_parameters(mlp())
    half = schedules.constant(0.5)
    cases: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (TypeError, "method should be one of", {"method": prune.L1Unstructured}),
        (TypeError, "method should be one of", {"method": "magnitude"}),
        (
            TypeError,
            "take an amount, which follows the schedule, got AlignedNM",
            {"method": tap.AlignedNM},
        ),
        (
            ValueError,
            r"sparsity in \[0, 1\], got 1.5 at step 0",
            {"schedule": schedules.constant(1.5)},
        ),
        (ValueError, r"in \[0, 1\], got -0.5 at step 0", {"schedule": schedules.constant(-0.5)}),
        (
            ValueError,
            "schedule should begin with 0 .* got 0.5",
            {"criterion": tap.criteria.Movement(params)},
        ),
        (
            ValueError,
            "criterion should be None for Random, .* got Movement",
            {
                "method": tap.Random,
                "schedule": schedules.constant(0.0),
                "criterion": tap.criteria.Movement(params),
            },
        ),
        (TypeError, "a function from the step", {"schedule": 0.5}),
        (ValueError, "the same params", {"criterion": tap.criteria.Movement(params[:1])}),
        (ValueError, "the same params", {"criterion": tap.criteria.Movement(params[::-1])}),
        (TypeError, "criteria.Movement", {"criterion": tap.criteria.Movement}),
        (TypeError, "penalty should be", {"penalty": 0.1}),
        (TypeError, "min_unit should be an int", {"min_unit": 0.5}),
        (ValueError, "max_layer_sparsity", {"max_layer_sparsity": 1.5}),
        (TypeError, "max_layer_sparsity should be a number", {"max_layer_sparsity": None}),
        (TypeError, "should be a number.* got 'a'", {"min_layer_sparsity": {"0": "a"}}),
        (TypeError, "glob patterns .* got tuple", {"max_layer_sparsity": {params[0]: 0.5}}),
        (
            ValueError,
            "should have patterns that match parameters, got 'encoder'",
            {"max_layer_sparsity": {"encoder": 0.5}},
        ),
        (ValueError, "should not be above", {"min_layer_sparsity": 0.5, "max_layer_sparsity": 0.4}),
        (
            ValueError,
            "budget should be 'global' or 'layer' with min_unit, .* got 'unit'",
            {"min_unit": 1, "budget": "unit"},
        ),
        (ValueError, "budget should be one of", {"budget": "all"}),
        (ValueError, "regrow should be", {"regrow": -1}),
        (
            ValueError,
            "leave 160 entries of the 2 parameters to prune, got 161",
            {"schedule": schedules.constant(161 / 320), "max_layer_sparsity": 0.5},
        ),
    ]
    for error, message, options in cases:
        arguments = {"method": tap.Magnitude, "schedule": half, **options}
        with pytest.raises(error, match=message):
            tap.Pruner(params, arguments.pop("method"), arguments.pop("schedule"), **arguments)
        assert not prune.is_pruned(params[0][0])


def test_a_model_without_weights_or_masks_is_refused() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(
        ValueError, match=r"0\.weight should have values, got a tensor on the meta device"
    ):
        tap.Pruner(tap.prunable_parameters(model), tap.Magnitude, schedules.constant(0.0))
    params = tap.prunable_parameters(mlp())
    pruner = tap.Pruner(params, tap.Magnitude, schedules.constant(0.5))
    prune.remove(*params[0])
    with pytest.raises(RuntimeError, match=r"the mask of 0\.weight is gone"):
        pruner.step()


def test_a_failed_step_leaves_everything_as_it_was() -> None:
    model = mlp()
    params = tap.prunable_parameters(model)
    pruner = tap.Pruner(params, tap.Magnitude, schedules.linear(0, 0.5, end=2))
    pruner.step()
    with torch.no_grad():
        model[2].weight_orig[3, 4] = torch.nan
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"2\.weight should be numbers, got NaN"):
        pruner.step()
    after = model.state_dict()
    assert all(torch.equal(before[k].nan_to_num(), after[k].nan_to_num()) for k in before)
    assert pruner.steps == 1 and pruner.log()["pruning/target_sparsity"] == 0.25
    with torch.no_grad():
        model[2].weight_orig[3, 4] = 0.0
    assert pruner.step() and pruner.sparsity() == 0.5


def test_it_watches_no_optimizer_when_it_is_done() -> None:
    def watching() -> int:
        gc.collect()
        return sum(watch() is not None for watch in optimizers._WATCHES)

    before = watching()
    params = tap.prunable_parameters(mlp())
    movement = tap.criteria.Movement(params)
    pruner = tap.Pruner(params, tap.Magnitude, schedules.constant(0.0), criterion=movement)
    assert watching() == before + 2
    pruner.finalize()
    assert watching() == before
    tap.Pruner(tap.prunable_parameters(mlp()), tap.Magnitude, schedules.constant(0.0))
    assert watching() == before


def test_pruned_entries_come_back_with_their_values() -> None:
    layer = nn.Linear(4, 1, bias=False)
    layer.weight.data.copy_(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
    params = [(layer, "weight")]
    schedule = schedules.steps({0: 0.5, 1: 0.25, 2: 0.5})
    pruner = tap.Pruner(params, tap.Magnitude, schedule, regrow=True)
    assert layer.weight_orig.tolist() == [[0, 0, 3, 4]]
    assert pruner.step()
    assert layer.weight.tolist() == [[0, 2, 3, 4]]
    with torch.no_grad():
        layer.weight_orig[0, 3] = 0.5  # falls below the one that was pruned
    assert pruner.step()
    assert layer.weight.tolist() == [[0, 2, 3, 0]]
    assert layer.weight_orig.tolist() == [[0, 2, 3, 0]]


def test_entries_may_come_back_every_so_many_steps() -> None:
    for regrow, expected in ((True, [False] * 6), (3, [False, False, True] * 2)):
        layer = nn.Linear(4, 1, bias=False)
        layer.weight.data.copy_(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
        schedule = schedules.constant(0.5)
        pruner = tap.Pruner([(layer, "weight")], tap.Magnitude, schedule, regrow=regrow)
        with torch.no_grad():
            layer.weight_orig[0, 3] = 0.5
        assert [pruner.step() for _ in range(6)] == expected
        assert layer.weight.tolist() == [[0, 0, 3, 0.5] if regrow is True else [0, 2, 3, 0]]


def test_pruned_entries_come_back_in_the_dtype_of_now() -> None:
    layer = nn.Linear(4, 1, bias=False)
    layer.weight.data.copy_(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
    schedule = schedules.steps({0: 0.5, 1: 0.25})
    pruner = tap.Pruner([(layer, "weight")], tap.Magnitude, schedule, regrow=True)
    layer.bfloat16()
    pruner.step()
    assert layer.weight_orig.dtype == torch.bfloat16
    assert layer.weight_orig.tolist() == [[0, 2, 3, 4]]


def test_movement_lets_entries_regrow_by_their_gradients() -> None:
    layer = nn.Linear(3, 1, bias=False)
    layer.weight.data.copy_(torch.tensor([[1.0, 2.0, 3.0]]))
    params = [(layer, "weight")]
    movement = tap.criteria.Movement(params)
    schedule = schedules.steps({0: 0.0, 1: 1 / 3, 2: 0.334})
    pruner = tap.Pruner(params, tap.Magnitude, schedule, criterion=movement, regrow=True)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-3)

    def step(gradient: list[float]) -> None:
        optimizer.zero_grad()
        layer(torch.tensor([gradient])).sum().backward()
        optimizer.step()
        pruner.step()

    step([1.0, -1.0, -1.0])  # the first moves towards zero
    assert layer.weight_mask.tolist() == [[False, True, True]]
    step([-9.0, 1.0, 9.0])  # now it would move away, and the third towards zero
    assert layer.weight_mask.tolist() == [[True, True, False]]
    assert layer.weight_orig[0, 0].item() == pytest.approx(0.999)  # as it was when it was pruned
    step([-9.0, 1.0, 9.0])
    assert layer.weight_orig.grad.tolist() == [[-9.0, 1.0, 0.0]]
    expected = [[-1.0 + 9 * 0.999 + 9.0 * 0.999, 2.0 - 2.001 - 2.0, 3.0 - 27.009 - 27.0]]
    found = movement.scores()[layer, "weight"] * 1000
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-2, atol=0.05)


@pytest.mark.parametrize(
    ("kind", "since"),
    [(tap.criteria.Taylor, " since the last pruning"), (tap.criteria.Movement, "")],
)
def test_a_skipped_optimizer_step_postpones_the_pruning(kind: Any, since: str) -> None:
    model = mlp()
    params = tap.prunable_parameters(model)
    schedule = schedules.one_shot(0.5, at=2)
    pruner = tap.Pruner(params, tap.Magnitude, schedule, criterion=kind(params))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner.step()
    message = rf"step 2 is postponed: {kind.__name__} .* of 0\.weight, 2\.weight{since}\. It reads"
    with pytest.warns(UserWarning, match=message):
        assert not pruner.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, pruner, 1)
    assert pruner.sparsity() == 0.5


@pytest.mark.parametrize("name", ["Movement", "Taylor", "GradientMagnitude"])
def test_criteria_rank_by_what_they_say(name: str) -> None:
    model = mlp()
    params = tap.prunable_parameters(model)
    criterion = getattr(tap.criteria, name)(params)
    pruner = tap.Pruner(params, tap.Magnitude, schedules.one_shot(0.5, at=3), criterion=criterion)
    rates = [0.1, 0.3]
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": rates[1]}]
    optimizer = torch.optim.SGD(groups, lr=rates[0])
    expected = [torch.zeros_like(module.weight) for module, _ in params]
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        inputs = torch.randn(16, 12, generator=generator)
        optimizer.zero_grad()
        for half in inputs.split(8):  # accumulated
            (model(half).square().mean() / 2).backward()
        for total, (module, _), rate in zip(expected, params, rates, strict=True):
            g, w = module.weight_orig.grad, module.weight_orig.detach()
            total += {"Movement": -rate * g * w, "Taylor": (g * w).abs()}.get(name, g.abs())
        optimizer.step()
        pruner.step()
    flat = torch.cat([total.flatten() for total in expected])
    keep = torch.ones(320, dtype=torch.bool)
    keep[flat.argsort(stable=True)[:160]] = False
    masks = torch.cat([module.weight_mask.flatten() for module, _ in params])
    assert torch.equal(masks, keep)


@pytest.mark.parametrize("name", ["Movement", "Taylor", "GradientMagnitude"])
@pytest.mark.parametrize("clipped", [False, True])
def test_criteria_see_gradients_without_the_scale_and_no_overflow(name: str, clipped: bool) -> None:
    """A GradScaler calls a fused optimizer whatever it found, with gradients that are scaled."""

    def sums(fused: bool, overflows: int | None, scale: float) -> list[Tensor]:
        model = mlp()
        params = tap.prunable_parameters(model)
        criterion = getattr(tap.criteria, name)(params)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        for step in range(3):
            if step == 0 and overflows is None:
                continue  # which is what an overflow comes to
            inputs = torch.randn(16, 12, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            scaler.scale(model(inputs).square().mean()).backward()
            if step == overflows:
                params[0][0].weight.grad[0, 0] = math.inf
            if clipped:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            scaler.step(optimizer)
            scaler.update()
        assert criterion.steps == 2
        found = list(criterion.scores().values())
        criterion.remove()
        return found

    expected = sums(fused=False, overflows=None, scale=1.0)
    for found, total in zip(sums(fused=True, overflows=0, scale=2.0**10), expected, strict=True):
        torch.testing.assert_close(found, total)


def test_sums_that_are_loaded_are_apart_from_the_state() -> None:
    layer = nn.Linear(2, 1, bias=False)
    taylor, other = (tap.criteria.Taylor([(layer, "weight")]) for _ in range(2))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    other.remove()
    state = other.state_dict()
    (total,) = state["sums"].values()
    before = total.clone()
    taylor.load_state_dict(state)
    optimizer.step()
    assert taylor.steps == 2
    assert torch.equal(total, before)


def test_criteria_say_what_they_lack() -> None:
    layer = nn.Linear(2, 2)
    movement = tap.criteria.Movement([(layer, "weight")])
    with pytest.raises(RuntimeError, match="Movement has seen no gradient of"):
        movement.scores()
    movement.remove()


def test_a_copy_between_two_steps_is_independent() -> None:
    model = mlp()
    params = tap.prunable_parameters(model)
    pruner = tap.Pruner(params, tap.Magnitude, schedules.one_shot(0.5, at=1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train(model, optimizer, pruner, 1)
    twin = copy.deepcopy(model)
    shown, inputs = model[0].weight.clone(), torch.ones(2, 12)
    expected = model(inputs)
    with torch.no_grad():
        model[0].weight_orig.mul_(3)
    assert torch.equal(twin[0].weight, shown)
    assert torch.equal(twin(inputs), expected)


def test_what_is_shown_has_a_gradient_before_the_next_forward() -> None:
    """As after torch's own pruning: a penalty of one's own may read ``layer.weight`` first."""
    model = mlp()
    pruner = tap.Pruner(
        tap.prunable_parameters(model), tap.Magnitude, schedules.linear(0, 0.6, end=3)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    layer = model[0]
    for _ in range(4):
        shown = layer.weight
        (grad,) = torch.autograd.grad((shown**3).sum(), layer.weight_orig, create_graph=True)
        torch.testing.assert_close(grad, 3 * layer.weight_orig**2 * layer.weight_mask)
        (second,) = torch.autograd.grad(grad.sum(), layer.weight_orig)
        torch.testing.assert_close(second, 6 * layer.weight_orig * layer.weight_mask)
        copy.deepcopy(model)
        train(model, optimizer, pruner, 1)
        assert torch.equal(layer.weight, layer.weight_orig)
    with torch.no_grad():
        pruner = tap.Pruner.freeze(tap.prunable_parameters(model))
        assert not layer.weight.requires_grad


def test_what_is_shown_lets_the_gradients_of_entries_that_may_come_back_through() -> None:
    model = mlp()
    params = tap.prunable_parameters(model)
    movement = tap.criteria.Movement(params)
    schedule = schedules.one_shot(0.5, at=1)
    pruner = tap.Pruner(params, tap.Magnitude, schedule, criterion=movement, regrow=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train(model, optimizer, pruner, 1)
    layer = model[0]
    for _ in range(2):
        (grad,) = torch.autograd.grad(layer.weight.sum(), layer.weight_orig)
        assert bool((grad == 1).all()) and not bool(layer.weight_mask.all())
        model(torch.randn(2, 12))


@pytest.mark.parametrize("make", [tap.Pruner.freeze, None])
def test_masks_that_were_made_in_inference_mode(make: Any) -> None:
    model = mlp()
    params = tap.prunable_parameters(model)
    with torch.inference_mode():
        tap.global_unstructured(params, tap.Magnitude, amount=0.5)
    pruner = make(params) if make else tap.Pruner(params, tap.Magnitude, schedules.steps({2: 0.75}))
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), pruner, 3)
    assert pruner.sparsity() == (0.5 if make else 0.75)


def test_a_weight_that_is_read_but_never_called_still_learns() -> None:
    layer = nn.Linear(4, 4, bias=False)
    pruner = tap.Pruner([(layer, "weight")], tap.Magnitude, schedules.linear(0, 0.5, end=2))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    before = layer.weight.detach().clone()
    nn.functional.linear(torch.ones(2, 4), layer.weight).square().sum().backward()
    optimizer.step()
    pruner.step()
    assert bool((layer.weight != before)[layer.weight_mask].all())


def test_each_of_several_optimizers_leaves_the_gradients_of_the_others_whole() -> None:
    model = mlp()
    params = tap.prunable_parameters(model)
    taylor = tap.criteria.Taylor(params)
    pruner = tap.Pruner(
        params, tap.Magnitude, schedules.one_shot(0.5, at=1), criterion=taylor, regrow=True
    )
    both = [torch.optim.SGD(model[i].parameters(), lr=0.1, momentum=0.9) for i in (0, 2)]
    for _ in range(2):
        model(torch.randn(16, 12)).square().mean().backward()
        pulls = [module.weight_orig.grad.clone() for module, _ in params]
        for optimizer in both:
            optimizer.step()
            optimizer.zero_grad()
        if pruner.steps == 1:
            for pair, pull in zip(params, pulls, strict=True):
                pruned = ~pair[0].weight_mask
                assert bool((pull[pruned] != 0).any())
                assert bool((taylor.scores()[pair][pruned] != 0).any())
                assert not bool(pair[0].weight[pruned].any())
        pruner.step()


class Quantized(Tensor):
    """Looks like a float of the parameter's shape, as the states of 8-bit optimizers do."""

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError(f"{func} of a quantized tensor")


def test_an_optimizer_without_a_state_gets_none() -> None:
    layer = nn.Linear(4, 4, bias=False)
    pruner = tap.Pruner([(layer, "weight")], tap.Magnitude, schedules.one_shot(0.5, at=1))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    layer(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    assert pruner.step()
    assert len(optimizer.state) == 0


def test_states_that_are_no_plain_tensors_are_left_alone() -> None:
    layer = nn.Linear(4, 4, bias=False)
    pruner = tap.Pruner([(layer, "weight")], tap.Magnitude, schedules.one_shot(0.5, at=1))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    layer(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    state = torch.Tensor._make_wrapper_subclass(Quantized, (4, 4), dtype=torch.float32)
    optimizer.state[layer.weight_orig]["exp_avg"] = state
    assert pruner.step()
    assert int((layer.weight == 0).sum()) == 8
    momentum = optimizer.state[layer.weight_orig]["momentum_buffer"]
    assert not bool(momentum[~layer.weight_mask].any())


def test_a_pruning_that_fails_at_the_end_is_done_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mlp()
    params = tap.prunable_parameters(model)
    pruner = tap.Pruner(params, tap.Magnitude, schedules.one_shot(0.5, at=1))

    def fails(*_: Any) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(pruner, "_clear", fails)
        with pytest.raises(MemoryError):
            pruner.step()
    assert pruner.steps == 0
    assert pruner.step()
    assert sum(int((w == 0).sum()) for w in weights(params)) == 160


def test_tied_parameters_share_the_mask_that_a_state_belongs_to() -> None:
    """Moving a model makes two of their mask, and a file may have it under one name only."""
    schedule = schedules.one_shot(0.5, at=1)

    def made() -> tuple[nn.Module, tap.Pruner]:
        model = Tied()
        pruner = tap.Pruner([(model.a, "weight"), (model.b, "weight")], tap.Magnitude, schedule)
        return model, pruner

    model, pruner = made()
    pruner.step()
    saved, state = model.state_dict(), pruner.state_dict()
    for lost in "ab":
        other, resumed = made()
        other._apply(lambda tensor: tensor.clone())
        assert other.a.weight_mask is not other.b.weight_mask
        part = {key: value for key, value in saved.items() if key != f"{lost}.weight_mask"}
        other.load_state_dict(part, strict=False)
        resumed.load_state_dict(state)
        assert other.a.weight_mask is other.b.weight_mask
        assert torch.equal(other.a.weight_mask, model.a.weight_mask)
        assert resumed.sparsity() == pruner.sparsity()


def test_of_tied_masks_with_as_many_entries_the_right_one_is_taken() -> None:
    def made() -> tuple[nn.Module, tap.Pruner]:
        model = Tied()
        params = [(model.a, "weight"), (model.b, "weight")]
        return model, tap.Pruner(params, tap.Magnitude, schedules.constant(0.5), regrow=1)

    model, pruner = made()
    first = model.a.weight_mask
    with torch.no_grad():
        model.a.weight_orig.add_(torch.randn(12, 12))
    assert pruner.step() and not torch.equal(model.a.weight_mask, first)
    saved, state = model.state_dict(), pruner.state_dict()
    for lost in "ab":
        other, resumed = made()
        other._apply(lambda tensor: tensor.clone())
        part = {key: value for key, value in saved.items() if key != f"{lost}.weight_mask"}
        other.load_state_dict(part, strict=False)
        resumed.load_state_dict(state)
        assert torch.equal(other.a.weight_mask, model.a.weight_mask)
        assert other.a.weight_mask is other.b.weight_mask


def test_masks_that_were_loaded_on_the_way_are_pruned_to_the_target_again() -> None:
    model = mlp()
    params = tap.prunable_parameters(model)
    pruner = tap.Pruner(params, tap.Magnitude, schedules.steps({1: 0.3, 2: 0.6}))
    pruner.step()
    earlier = copy.deepcopy(model.state_dict())
    pruner.step()
    model.load_state_dict(earlier)
    pruner.look_again()
    assert pruner.log()["pruning/target_sparsity"] == pytest.approx(0.3)
    assert pruner.step()
    assert pruner.sparsity() == pytest.approx(0.6, abs=2e-3)
    pruner.finalize()
    with pytest.raises(RuntimeError, match="finished"):
        pruner.look_again()


def two_rounds(kind: Any) -> tuple[nn.Sequential, tap.Pruner]:
    model = mlp()
    params = tap.prunable_parameters(model)
    schedule = schedules.steps({0: 0.0, 1: 0.1, 2: 0.4})
    return model, tap.Pruner(params, tap.Magnitude, schedule, criterion=kind(params))


def test_a_layer_without_gradients_in_a_round_postpones_the_pruning() -> None:
    """As where a gradient scaler has skipped one of two optimizers: the layer would go first."""
    model, pruner = two_rounds(tap.criteria.Taylor)
    both = [torch.optim.SGD(model[i].parameters(), lr=0.1) for i in (0, 2)]

    def step(*steps: torch.optim.Optimizer) -> bool:
        model.zero_grad()
        model(torch.randn(16, 12)).square().mean().backward()
        for optimizer in steps:
            optimizer.step()
        return pruner.step()

    assert step(*both)
    masks = [module.weight_mask.clone() for module, _ in pruner.params]
    state = copy.deepcopy(pruner.state_dict())
    with pytest.warns(
        UserWarning, match=r"due at step 2 is postponed: .* no gradient of 2\.weight since"
    ):
        assert not step(both[0])
    found = [module.weight_mask for module, _ in pruner.params]
    assert all(map(torch.equal, found, masks))
    assert pruner.steps == 2 and pruner.log()["pruning/target_sparsity"] == 0.1
    # So it does where a run is resumed right after a pruning.
    assert state["criterion"]["without_gradient"] == ["0.weight", "2.weight"]
    pruner.load_state_dict(state)
    with pytest.warns(UserWarning, match=r"step 2 is postponed: .* no gradient of 0\.weight since"):
        assert not step(both[1])
    assert step(*both) and pruner.sparsity() == 0.4


def test_a_layer_that_is_frozen_between_two_rounds_is_not_waited_for() -> None:
    model, pruner = two_rounds(tap.criteria.Taylor)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train(model, optimizer, pruner, 1)
    model[2].requires_grad_(False)
    message = r"Taylor has seen no gradient of 2\.weight, which does not require one"
    with pytest.raises(RuntimeError, match=message):
        train(model, optimizer, pruner, 1)
    assert pruner.steps == 1 and pruner.sparsity() == 0.1


@pytest.mark.parametrize("kind", [tap.criteria.Taylor, tap.criteria.Movement])
def test_a_layer_that_the_forward_never_uses_is_not_waited_for(kind: Any) -> None:
    model = mlp()
    model.append(nn.Linear(4, 4))
    params = tap.prunable_parameters(model)
    pruner = tap.Pruner(
        params, tap.Magnitude, schedules.steps({0: 0.0, 1: 0.1}), criterion=kind(params)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model[:3](torch.randn(16, 12)).square().mean().backward()
    optimizer.step()
    message = rf"{kind.__name__} has seen no gradient of 3\.weight in any step of its optimizer"
    with pytest.raises(RuntimeError, match=message):
        pruner.step()
    assert pruner.steps == 0 and pruner.sparsity() == 0


def test_movement_needs_no_gradient_in_each_round() -> None:
    model, pruner = two_rounds(tap.criteria.Movement)
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), pruner, 1)
    assert pruner.step() and pruner.sparsity() == 0.4


class Outer(torch.optim.Optimizer):
    """Steps by another optimizer that has a part of its parameters, as ZeroRedundancyOptimizer
    does."""

    def __init__(self, params: list[Tensor], part: list[Tensor]) -> None:
        super().__init__(params, {})
        self.inner = torch.optim.SGD(part, lr=0.1)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        if closure is not None:
            with torch.enable_grad():
                closure()
        self.inner.step()


@pytest.mark.parametrize("regrow", [False, True])
def test_an_optimizer_within_an_optimizer_counts_once(regrow: bool) -> None:
    model = mlp()
    params = tap.prunable_parameters(model)
    pulled = tap.criteria.GradientMagnitude(params)
    schedule = schedules.one_shot(0.5, at=9)
    pruner = tap.Pruner(params, tap.Magnitude, schedule, criterion=pulled, regrow=regrow)
    assert pruner.sparsity() == 0
    if regrow:
        # So that the pruner changes the gradients once the criterion has seen them.
        model[0].weight_mask[0] = False
    matrices = [module.weight_orig for module, _ in params]
    outer = Outer(matrices, matrices[:1])
    expected = [torch.zeros_like(matrix) for matrix in matrices]

    def backward() -> None:
        model.zero_grad()
        model(torch.randn(16, 12)).square().mean().backward()
        for total, matrix in zip(expected, matrices, strict=True):
            total += matrix.grad.abs()

    for _ in range(2):
        backward()
        outer.step()
    assert pulled.steps == 2
    for pair, total in zip(params, expected, strict=True):
        assert torch.equal(pulled.scores()[pair], total)
    # What only the inner one sees is counted too, and a step that failed hides no later one.
    model.zero_grad()
    outer.step(backward)
    assert torch.equal(pulled.scores()[params[0]], expected[0])

    def fails() -> None:
        raise ValueError

    model.zero_grad()
    with pytest.raises(ValueError):
        outer.step(fails)
    backward()
    outer.inner.step()
    assert torch.equal(pulled.scores()[params[0]], expected[0])


def test_an_optimizer_for_each_parameter_that_steps_in_the_backward() -> None:
    model = nn.Sequential(*(nn.Linear(12, 12, bias=False) for _ in range(3)))
    optimizers_of = {p: torch.optim.SGD([p], lr=0.1, momentum=0.9) for p in model.parameters()}

    def step(parameter: Tensor) -> None:
        optimizers_of[parameter].step()  # type: ignore[index]
        parameter.grad = None

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(step)
    model(torch.randn(4, 12)).square().mean().backward()  # momentum, which moves what is pruned
    params = tap.prunable_parameters(model)
    pruner = tap.Pruner(params, tap.Magnitude, schedules.constant(0.5))
    for _ in range(3):
        model(torch.randn(4, 12)).square().mean().backward()
        pruner.step()
        for module, _ in params:
            assert bool((module.weight_orig[~module.weight_mask] == 0).all())


def test_a_state_is_looked_at_with_the_masks_that_are_still_to_come() -> None:
    def made() -> tap.Pruner:
        params = tap.prunable_parameters(mlp())
        return tap.Pruner(params, tap.Magnitude, schedules.one_shot(0.5, at=1), regrow=True)

    pruner, other = made(), made()
    pruner.step()
    state = pruner.state_dict()
    found = [module.weight_mask for module, _ in pruner.params]
    masks = dict(zip(["0.weight", "2.weight"], found, strict=True))
    other.check_state(state, masks)
    with pytest.raises(ValueError, match=r"0\.weight should have \d+ pruned entries, .* got 0"):
        other.check_state(state)
    flipped = {name: mask.flip(0) for name, mask in masks.items()}
    with pytest.raises(
        ValueError, match="masks that the state was saved with, got masks that prune other"
    ):
        other.check_state(state, flipped)
    with pytest.raises(ValueError, match=r"should have the values that 0\.weight may take back"):
        pruner.check_state({**state, "left": {}})
    assert other.steps == 0 and other.sparsity() == 0


def test_a_finished_pruner_has_no_state() -> None:
    """A fresh pruner would take it, and train the zeros away."""
    pruner = tap.Pruner(tap.prunable_parameters(mlp()), tap.Magnitude, schedules.constant(0.5))
    pruner.finalize()
    with pytest.raises(RuntimeError, match="the pruner is finished"):
        pruner.state_dict()


def test_a_pruning_that_fails_keeps_what_may_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mlp()
    params = tap.prunable_parameters(model)
    schedule = schedules.steps({0: 0.5, 1: 0.25})
    pruner = tap.Pruner(params, tap.Magnitude, schedule, regrow=True)
    before = copy.deepcopy(model.state_dict())
    kept = {name: left.clone() for name, left in pruner.state_dict()["left"].items()}

    def fails(*_: Any, **__: Any) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr("torchalignprune.pruner.put_masks", fails)
        with pytest.raises(MemoryError):
            pruner.step()
    assert pruner.steps == 0
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    left = pruner.state_dict()["left"]
    assert all(torch.equal(left[name], value) for name, value in kept.items())
    assert pruner.step() and pruner.sparsity() == 0.25
    dense = mlp()
    for i in (0, 2):
        assert torch.equal(model[i].weight_orig, dense[i].weight * model[i].weight_mask)


class OutOfMemory(TorchDispatchMode):
    """Lets the operators that make a new tensor fail, after the first ``good`` of them."""

    def __init__(self, good: int) -> None:
        super().__init__()
        self.left = good

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func._schema.returns
        if results and all(result.alias_info is None for result in results):
            self.left -= 1
            if self.left < 0:
                raise torch.OutOfMemoryError
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("regrow", "with_criterion"), [(False, False), (False, True), (True, False)]
)
def test_a_step_that_runs_out_of_memory_changes_nothing(regrow: bool, with_criterion: bool) -> None:
    def ready() -> tuple[nn.Module, tap.Pruner]:
        torch.manual_seed(0)
        model = mlp()
        params = tap.prunable_parameters(model)
        criterion = tap.criteria.Movement(params) if with_criterion else None
        schedule = schedules.linear(0.0, 0.8, end=4)
        pruner = tap.Pruner(
            params, tap.AlignedMagnitude, schedule, criterion=criterion, regrow=regrow
        )
        optimizer = torch.optim.Adam(model.parameters())
        train(model, optimizer, pruner, 2)
        model(torch.randn(4, 12)).sum().backward()
        optimizer.step()
        return model, pruner

    good = 0
    while True:
        model, pruner = ready()
        record = Record(model)
        try:
            with OutOfMemory(good):
                pruner.step()
            break
        except torch.OutOfMemoryError:
            assert pruner.steps == 2
            record.assert_untouched()
            good += 1
    assert good > 0
    assert pruner.sparsity() == round(0.6 * 320) / 320


def test_a_step_needs_no_memory_after_its_masks_are_in_place() -> None:
    """What is shown shares the memory of the weights, also where gradients pass everywhere."""
    model = mlp()
    params = tap.prunable_parameters(model)
    movement = tap.criteria.Movement(params)
    schedule = schedules.linear(0.0, 0.8, end=4)
    pruner = tap.Pruner(params, tap.Magnitude, schedule, criterion=movement, regrow=True)
    train(model, torch.optim.Adam(model.parameters()), pruner, 2)
    for module, _ in params:
        assert module.weight.data_ptr() == module.weight_orig.data_ptr()
        module.weight.sum().backward()
        assert bool((module.weight_orig.grad[~module.weight_mask] != 0).all())


def test_masks_of_which_no_values_are_kept() -> None:
    layer = nn.Linear(4, 1, bias=False)
    layer.weight.data.copy_(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
    schedule = schedules.steps({0: 0.5, 1: 0.25})
    pruner = tap.Pruner([(layer, "weight")], tap.Magnitude, schedule, regrow=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pruner.look_again()
    layer.weight_mask.copy_(torch.tensor([[False, True, True, False]]))
    message = r"pruned entries of parameters\[0\] .* no value to take back but 0: call "
    with pytest.warns(UserWarning, match=message):
        pruner.look_again()


def test_a_state_that_does_not_fit_costs_no_combinations(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.ModuleList(Tied() for _ in range(12))
    params = [(layer, "weight") for tied in model for layer in (tied.a, tied.b)]
    pruner = tap.Pruner(params, tap.Magnitude, schedules.constant(0.5))
    state = pruner.state_dict()
    model._apply(lambda tensor: tensor.clone())  # which makes two of each mask
    with torch.no_grad():
        for layer, _ in params[:2]:
            layer.weight_mask.copy_(layer.weight_mask.flip(0))
    digest, calls = pruner_module._mask_digest, []

    def counted(masks: Any) -> int | None:
        calls.append(masks)
        return digest(masks)

    monkeypatch.setattr(pruner_module, "_mask_digest", counted)
    with pytest.raises(ValueError, match="got masks that prune other entries"):
        pruner.load_state_dict(state)
    assert len(calls) < 5


def test_a_mask_that_is_gone_is_an_error() -> None:
    params = tap.prunable_parameters(mlp())
    pruner = tap.Pruner(params, tap.Magnitude, schedules.steps({0: 0.5, 2: 0.75}))
    prune.remove(*params[1])
    assert not pruner.step()
    for call in (pruner.step, pruner.sparsity, pruner.log):
        with pytest.raises(RuntimeError, match=r"the mask of 2\.weight is gone"):
            call()
    assert pruner.steps == 1
    pruner.finalize()


def test_masks_in_the_dtype_of_the_weight() -> None:
    """As torch's own pruning and ``model.type`` make them."""

    def made() -> tuple[nn.Module, tap.Pruner]:
        model = mlp()
        schedule = schedules.steps({0: 0.25, 2: 0.5})
        return model, tap.Pruner(tap.prunable_parameters(model), tap.Magnitude, schedule)

    model, pruner = made()
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    assert model[0].weight_mask.dtype == torch.float32
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    train(model, optimizer, pruner, 1)
    pruner.look_again()
    train(model, optimizer, pruner, 2)
    assert pruner.sparsity() == 0.5

    model, pruner = made()
    state = pruner.state_dict()
    model.type(torch.float64)
    assert model[0].weight_mask.dtype == torch.float64
    pruner.load_state_dict(state)
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), pruner, 3)
    assert pruner.sparsity() == 0.5 and model[0].weight_mask.dtype == torch.bool
