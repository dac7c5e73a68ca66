"""The Pruner under ``fully_shard``: the masks, weights and figures of one process."""

from __future__ import annotations

import copy
import itertools
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import torchalignprune as tap
from ranks import Ranks
from torchalignprune import criteria
from torchalignprune.parameters import mask_of, stored

SIZES = (12, 11, 9, 6)


def net() -> nn.Module:
    layers = [nn.Linear(i, o) for i, o in itertools.pairwise(SIZES)]
    return nn.Sequential(*(nn.Sequential(layer, nn.GELU()) for layer in layers)).double()


def shard(model: nn.Module, **options: Any) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model:
        fully_shard(block, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


class Run:
    """A model in training with its pruner."""

    def __init__(
        self,
        model: nn.Module,
        method: Any,
        criterion: Any = None,
        late: int = 0,
        own: dict[str, Any] | None = None,
    ) -> None:
        self.model = model
        self.params = tap.prunable_parameters(model)
        self.reference = tap.Reference.capture(self.params)
        self.penalty = tap.CosineAlignment(self.params, self.reference)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2, weight_decay=0.1)
        self.step = 0
        self.train(late, pruner=None)  # an optimizer that has momentum before the first pruning
        self.criterion = None if criterion is None else criterion(self.params)
        schedule = tap.schedules.linear(0.0, 0.6, begin=1, end=6)
        self.pruner = tap.Pruner(
            self.params,
            method,
            schedule,
            reference=self.reference,
            penalty=self.penalty,
            criterion=self.criterion,
            **own or {},
        )

    def train(self, steps: int, pruner: tap.Pruner | None) -> None:
        many, rank = dist.get_world_size(), dist.get_rank()
        sharded = isinstance(stored(*self.params[0]), DTensor)
        for _ in range(steps):
            generator = torch.Generator().manual_seed(self.step)
            batch = torch.randn(4 * many, SIZES[0], generator=generator).double()
            x = batch.chunk(many)[rank] if sharded else batch
            (self.model(x).square().mean() + 0.1 * self.penalty()).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.step += 1
            if pruner is not None:
                pruner.step()


def check_same(sharded: Run, plain: Run) -> None:
    for pair, twin in zip(sharded.params, plain.params, strict=True):
        mask, other = mask_of(*pair), mask_of(*twin)
        assert mask is not None and other is not None
        assert torch.equal(whole(mask), other)
        weight = whole(stored(*pair))
        assert not weight[~other].any()
        torch.testing.assert_close(weight, stored(*twin).detach())
    figures, others = sharded.pruner.log(), plain.pruner.log()
    assert figures == pytest.approx(others, rel=1e-9)
    assert sharded.pruner.sparsity() == plain.pruner.sparsity() == figures["pruning/sparsity"]
    assert sharded.pruner.state_dict()["pruned"] == plain.pruner.state_dict()["pruned"]


def trains(
    method: Any,
    criterion: Any,
    late: int,
    options: dict[str, Any],
    own: dict[str, Any] | None = None,
) -> None:
    torch.manual_seed(0)
    plain = net()
    runs = [
        Run(model, method, criterion, late, own)
        for model in (shard(copy.deepcopy(plain), **options), plain)
    ]
    for _ in range(4):
        for run in runs:
            run.train(2, run.pruner)
        check_same(*runs)
    entries = sum(stored(*p).numel() for p in runs[0].params)
    # Whole entries of each unit.
    in_units = isinstance(method, partial) and "budget" in method.keywords
    sparsity = pytest.approx(0.6, abs=0.02) if in_units else round(0.6 * entries) / entries
    assert runs[0].pruner.sparsity() == sparsity
    for run in runs:
        run.pruner.finalize()
    for (module, name), (twin, _) in zip(runs[0].params, runs[1].params, strict=True):
        torch.testing.assert_close(whole(getattr(module, name)), getattr(twin, name).detach())
    assert list(runs[0].model.state_dict()) == list(runs[1].model.state_dict())


@pytest.mark.parametrize(
    ("world", "method", "criterion", "late", "options"),
    [
        (2, tap.AlignedMagnitude, None, 0, {}),
        (4, tap.AlignedMagnitude, None, 2, {}),
        (2, tap.Magnitude, None, 2, {"reshard_after_forward": False}),
        (2, partial(tap.AlignedMagnitude, budget="unit"), None, 0, {}),
        (2, tap.Magnitude, criteria.Movement, 0, {}),
        (2, tap.Magnitude, criteria.Taylor, 1, {}),
        (2, tap.Magnitude, None, 1, {"offload_policy": CPUOffloadPolicy(pin_memory=False)}),
    ],
    ids=["aligned-2", "aligned-4", "kept", "unit", "movement", "taylor", "offloaded"],
)
def test_is_that_of_one_process(
    ranks: Ranks, world: int, method: Any, criterion: Any, late: int, options: Any
) -> None:
    ranks.run(world, trains, method, criterion, late, options)


@pytest.mark.parametrize(
    ("world", "method", "criterion", "own"),
    [
        (2, tap.AlignedMagnitude, None, {"regrow": 1}),
        (4, tap.Magnitude, criteria.Movement, {"regrow": True}),
        (2, partial(tap.AlignedMagnitude, units="in"), None, {"min_unit": 2, "regrow": 2}),
        (4, tap.AlignedMagnitude, None, {"max_layer_sparsity": 0.62, "min_layer_sparsity": 0.55}),
        (2, tap.Magnitude, criteria.Taylor, {"max_layer_sparsity": {"1.0": 0.3}, "min_unit": 1}),
    ],
    ids=["regrow", "movement", "units cut", "layers", "taylor"],
)
def test_limits_and_regrowth(
    ranks: Ranks, world: int, method: Any, criterion: Any, own: dict[str, Any]
) -> None:
    ranks.run(world, trains, method, criterion, 0, {}, own)


def resumed() -> None:
    torch.manual_seed(0)
    plain = net()
    twins = [shard(copy.deepcopy(plain)) for _ in range(2)]
    first, second = (Run(model, tap.AlignedMagnitude) for model in twins)
    first.train(4, first.pruner)
    state = copy.deepcopy(first.pruner.state_dict())
    with pytest.raises(ValueError, match="load the model's state_dict that was saved with it"):
        second.pruner.load_state_dict(state)
    second.model.load_state_dict({k: v.clone() for k, v in first.model.state_dict().items()})
    second.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))
    second.pruner.load_state_dict(state)
    second.step = first.step
    for run in (first, second):
        run.train(4, run.pruner)
    for p, q in zip(first.params, second.params, strict=True):
        assert torch.equal(whole(stored(*p)), whole(stored(*q)))
        assert torch.equal(whole(mask_of(*p)), whole(mask_of(*q)))


def test_resumed(ranks: Ranks) -> None:
    ranks.run(2, resumed)


def regrown() -> None:
    layer = nn.Linear(4, 2, bias=False)
    layer.weight.data.copy_(torch.tensor([[1.0, 2.0, 3.0, 4.0], [8.0, 7.0, 6.0, 5.0]]))
    params = [(shard(nn.Sequential(layer))[0], "weight")]
    schedule = tap.schedules.steps({0: 0.5, 1: 0.25, 2: 0.5})
    pruner = tap.Pruner(params, tap.Magnitude, schedule, regrow=True)
    assert whole(layer.weight_orig).tolist() == [[0, 0, 0, 0], [8, 7, 6, 5]]
    (values,) = pruner.state_dict()["left"].values()
    assert whole(values).tolist() == [[1, 2, 3, 4], [0, 0, 0, 0]]
    assert pruner.step()
    assert whole(layer.weight).tolist() == [[0, 0, 3, 4], [8, 7, 6, 5]]
    with torch.no_grad():
        layer.weight_orig.to_local()[:, 3] = 0.5  # below the two that were pruned
    assert pruner.step()
    assert whole(layer.weight).tolist() == [[0, 0, 3, 0], [8, 7, 6, 0]]
    assert whole(layer.weight_mask).tolist() == [[False, False, True, False], [True] * 3 + [False]]


def test_pruned_entries_come_back_with_their_values(ranks: Ranks) -> None:
    ranks.run(2, regrown)


def regrown_in_a_forward() -> None:
    model = shard(net())
    params = tap.prunable_parameters(model)
    schedule = tap.schedules.steps({0: 0.5, 1: 0.25})
    pruner = tap.Pruner(params, tap.Magnitude, schedule, regrow=True)
    before = [whole(stored(*pair)).clone() for pair in params]
    sparsity = pruner.sparsity()
    handle = params[0][0].register_forward_hook(lambda *_: pruner.step() and None)
    with pytest.raises(RuntimeError, match=r"prune between the steps"):
        model(torch.randn(2, SIZES[0], dtype=torch.float64))
    handle.remove()
    for pair, weight in zip(params, before, strict=True):
        assert torch.equal(whole(stored(*pair)), weight)
    assert pruner.steps == 0 and pruner.sparsity() == sparsity
    assert pruner.log()["pruning/target_sparsity"] == 0.5


def test_nothing_comes_back_in_the_middle_of_a_forward(ranks: Ranks) -> None:
    ranks.run(2, regrown_in_a_forward)


def regrown_in_parallel() -> None:
    """Under a tensor parallel plan the gradients of pruned entries reach the criterion as well."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 5)).double()
    parallel = copy.deepcopy(plain)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    parallelize_module(parallel, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    masks: list[list[Tensor]] = []
    for model in (plain, parallel):
        params = tap.prunable_parameters(model)
        movement = criteria.Movement(params)
        schedule = tap.schedules.linear(0.0, 0.5, begin=1, end=4)
        pruner = tap.Pruner(
            params, tap.Magnitude, schedule, criterion=movement, regrow=1, min_unit=1
        )
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        found = []
        for step in range(8):
            x = torch.randn(4, 6, generator=torch.Generator().manual_seed(step)).double()
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            pruner.step()
            found += [whole(mask_of(*pair)) for pair in params]
        masks.append(found)
    assert any(bool((new & ~old).any()) for old, new in zip(masks[0], masks[0][2:], strict=False))
    for own, other in zip(*masks, strict=True):
        assert torch.equal(own, other)


def test_regrowth_in_tensor_parallel_layers(ranks: Ranks) -> None:
    ranks.run(2, regrown_in_parallel)


def regrowing(folder: str, load: bool) -> list[Tensor]:
    """Trains, or goes on from what was saved; what may come back, and the masks in the end."""
    torch.manual_seed(0)
    run = Run(shard(net()), tap.Magnitude, criteria.Movement, own={"regrow": 1})
    run.train(0 if load else 4, run.pruner)

    def state() -> dict[str, Any]:
        model, optimizer = get_state_dict(run.model, run.optimizer)
        return {"model": model, "optimizer": optimizer, "pruner": run.pruner.state_dict()}

    own = state()
    if load:
        dcp.load(own, checkpoint_id=folder)
        set_state_dict(
            run.model,
            run.optimizer,
            model_state_dict=own["model"],
            optim_state_dict=own["optimizer"],
        )
        run.pruner.load_state_dict(own["pruner"])
        run.step = 4
    else:
        dcp.save(own, checkpoint_id=folder)
    left = [whole(values) for values in run.pruner.state_dict()["left"].values()]
    assert len(left) == 3 and all(bool(values.any()) for values in left)
    run.train(4, run.pruner)
    return [*left, *(whole(mask_of(*pair)) for pair in run.params)]


def test_what_may_come_back_goes_to_another_number_of_ranks(ranks: Ranks, tmp_path: Path) -> None:
    saved = ranks.run(2, regrowing, str(tmp_path), False)[0]
    for world in (2, 4):
        for loaded in ranks.run(world, regrowing, str(tmp_path), True):
            # Other ranks have other batches, and so other masks in the end.
            for own, other in zip(saved[: 6 if world == 2 else 3], loaded, strict=world == 2):
                assert torch.equal(own, other)


def lacking() -> None:
    params = tap.prunable_parameters(shard(net()))
    pruner = tap.Pruner(params, tap.Magnitude, tap.schedules.constant(0.5), regrow=True)
    state = pruner.state_dict()
    for left in ({}, {name: torch.zeros(3) for name in state["left"]}):
        with pytest.raises(
            ValueError, match=r"should have the values that 0\.0\.weight may take back"
        ):
            pruner.load_state_dict({**state, "left": left})


def test_a_state_that_lacks_values(ranks: Ranks) -> None:
    ranks.run(2, lacking)


def refused() -> None:
    """What needs whole tensors says so, and changes nothing."""
    torch.manual_seed(0)
    model = net()
    alone = tap.prunable_parameters(copy.deepcopy(model))
    calibration = tap.Calibration.collect(
        alone[0][0], [torch.randn(20, SIZES[0]).double()], alone[:1], statistics="covariance"
    )
    params = tap.prunable_parameters(shard(model))
    tap.global_unstructured(params, tap.Magnitude, amount=0.5)
    before = [whole(value) for value in model.state_dict().values()]
    with pytest.raises(
        ValueError, match=r"0\.0\.weight should not be sharded, got a DTensor: realign the"
    ):
        tap.realign(params, calibration)
    with pytest.raises(
        ValueError, match=r"0\.0\.weight should not be sharded, .* lamp .* got a DTensor: .* scores"
    ):
        criteria.lamp(params)
    for value, old in zip(model.state_dict().values(), before, strict=True):
        assert torch.equal(whole(value), old)
    # What the error of lamp advises.
    tap.global_unstructured(alone, tap.Magnitude, amount=0.5)
    scores = criteria.lamp(alone)
    given = {pair: scores[own] for pair, own in zip(params, alone, strict=True)}
    for pairs, own in ((alone, scores), (params, given)):
        tap.global_unstructured(pairs, tap.Magnitude, own, amount=0.5)
    for pair, own in zip(params, alone, strict=True):
        assert torch.equal(whole(mask_of(*pair)), mask_of(*own))


def test_refused(ranks: Ranks) -> None:
    ranks.run(2, refused)


def scored() -> None:
    """Criteria that know each entry from its unit's inputs score a shard as the whole."""
    torch.manual_seed(0)
    model = net()
    alone = tap.prunable_parameters(copy.deepcopy(model))
    norms = [torch.rand(module.weight.size(1)) for module, _ in alone]
    params = tap.prunable_parameters(shard(model))
    for _ in range(2):
        for score in (
            lambda own: criteria.wanda(own, dict(zip(own, norms, strict=True))),
            lambda own: criteria.random(own, torch.Generator().manual_seed(1)),
        ):
            for found, expected in zip(score(params).values(), score(alone).values(), strict=True):
                assert torch.equal(whole(found), expected)
        for pairs in (params, alone):
            tap.global_unstructured(pairs, tap.Magnitude, amount=0.4)


def test_scores_of_shards(ranks: Ranks) -> None:
    ranks.run(2, scored)


def pending_sums() -> None:
    """The gradient of a replicated parameter may come as a sum that is still pending."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    whole_weight = torch.tensor([[1.0, -2.0]])
    weight = distribute_tensor(whole_weight, mesh, [Replicate()])
    grad = DTensor.from_local(torch.tensor([[3.0, 4.0]]), mesh, [Partial()])
    params = [(nn.Linear(2, 1), "weight")]
    for criterion, expected in (
        (criteria.Taylor(params), [[6.0, 16.0]]),
        (criteria.GradientMagnitude(params), [[6.0, 8.0]]),
        (criteria.Movement(params), [[-6.0, 16.0]]),
    ):
        total = distribute_tensor(torch.zeros(1, 2), mesh, [Replicate()])
        criterion.add(total, weight, grad, 1.0)
        assert whole(total).tolist() == expected


def test_gradients_that_are_pending_sums(ranks: Ranks) -> None:
    ranks.run(2, pending_sums)


def frozen() -> None:
    torch.manual_seed(0)
    model = net()
    with pytest.raises(ValueError, match="should have zeros to keep"):
        tap.Pruner.freeze(tap.prunable_parameters(shard(copy.deepcopy(model))))
    with torch.no_grad():
        model[0][0].weight[0, :5] = 0.0  # on the first rank only
    sharded = shard(model)
    params = tap.prunable_parameters(sharded)
    pruner = tap.Pruner.freeze(params)
    optimizer = torch.optim.AdamW(sharded.parameters(), lr=1e-2)
    for _ in range(3):
        sharded(torch.randn(4, SIZES[0]).double()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        pruner.step()
    zeros = [int((whole(stored(*p)) == 0).sum()) for p in params]
    assert zeros == [5, 0, 0]


def test_frozen(ranks: Ranks) -> None:
    ranks.run(2, frozen)


class Traffic(TorchDispatchMode):
    """Adds up the bytes of all collectives: whoever calls them, they are operators in the end."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # DTensor calls operators on its local tensors, which come here
        result = func(*args, **kwargs or {})
        # Waiting for a result is counted like sending it: rather too much than too little.
        if func.namespace in ("c10d", "_c10d_functional", "_c10d_functional_autograd", "_dtensor"):
            values = [*args, *(kwargs or {}).values(), result]
            self.bytes += max(
                sum(leaf.nbytes for leaf in tree_leaves(value) if isinstance(leaf, Tensor))
                for value in values
            )
        return result


def sent() -> dict[str, int]:
    """The bytes of one pruning step, and of things that send much."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(256, 256) for _ in range(4)))
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    params = tap.prunable_parameters(model)
    pruner = tap.Pruner(params, tap.AlignedMagnitude, tap.schedules.one_shot(0.5, at=1))
    with Traffic() as step:
        pruner.step()
    assert pruner.sparsity() == 0.5
    with Traffic() as weight:
        stored(*params[0]).full_tensor()
    with Traffic() as objects:
        dist.all_gather_object([None] * dist.get_world_size(), bytes(100_000))
    with Traffic() as forward:
        model(torch.randn(2, 256))
    return {
        "step": step.bytes,
        "full_tensor": weight.bytes,
        "all_gather_object": objects.bytes,
        "forward": forward.bytes,
    }


def test_a_pruning_step_sends_little(ranks: Ranks) -> None:
    for found in ranks.run(2, sent):
        assert 0 < found["step"] < 64 * 1024
        # What would be too much is counted.
        assert found["full_tensor"] >= 4 * 256 * 256
        assert found["all_gather_object"] >= 2 * 100_000
        assert found["forward"] >= 4 * 4 * 256 * 256


def moved_by_the_optimizer() -> None:
    """Muon fills in what has neither gradient nor momentum, and forwards see the shard as it is."""
    torch.manual_seed(0)
    model = shard(nn.Sequential(nn.Sequential(nn.Linear(12, 8, bias=False))))
    params = tap.prunable_parameters(model)
    pruner = tap.Pruner(params, tap.Magnitude, tap.schedules.constant(0.5))
    optimizer = torch.optim.Muon(model.parameters(), lr=0.05)
    for _ in range(3):
        model(torch.randn(4, 12)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        pruner.step()
        weight, mask = stored(*params[0]), mask_of(*params[0])
        assert not weight.to_local()[~mask.to_local()].any()


def test_optimizers_that_mix_entries_are_undone(ranks: Ranks) -> None:
    ranks.run(2, moved_by_the_optimizer)


def norms_of_each_rank(same: bool) -> None:
    torch.manual_seed(0)
    model = net()
    twin = copy.deepcopy(model)
    shard(model)
    batch = torch.randn(
        8, SIZES[0], generator=torch.Generator().manual_seed(0 if same else dist.get_rank())
    )
    alone = tap.prunable_parameters(twin)
    calibration = tap.Calibration.collect(twin, [batch.double()], alone)
    params = tap.prunable_parameters(model)
    norms = [calibration.norms()[pair] for pair in alone]
    if same:
        tap.global_unstructured(params, tap.AlignedMagnitude, amount=0.5, input_norms=norms)
        tap.global_unstructured(alone, tap.AlignedMagnitude, amount=0.5, input_norms=norms)
        for pair, own in zip(params, alone, strict=True):
            mask, expected = mask_of(*pair), mask_of(*own)
            assert mask is not None and expected is not None
            assert torch.equal(whole(mask), expected)
        return
    with pytest.raises(ValueError, match=r"norms of 0\.0\.weight, .* the same on all ranks: merge"):
        tap.global_unstructured(params, tap.AlignedMagnitude, amount=0.5, input_norms=norms)


@pytest.mark.parametrize("same", [True, False])
def test_input_norms_are_those_of_all_ranks(ranks: Ranks, same: bool) -> None:
    ranks.run(2, norms_of_each_rank, same)
