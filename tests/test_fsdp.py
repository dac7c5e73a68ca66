"""Pruning under ``fully_shard`` on two and four processes, against one process."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

import torchalignprune as tap
from ranks import Ranks
from torchalignprune import dtensors, fsdp
from torchalignprune.hooks import put_masks
from torchalignprune.parameters import stored
from torchalignprune.sharded_hooks import FullyShardedMaskHook

SIZES = (8, 7, 5, 3)  # no two ranks have the same share of 7, and of 3 rows four have none


class Net(nn.Module):
    """Three layers; the middle one may be run under activation checkpointing."""

    def __init__(self, checkpointing: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(i, o), nn.GELU()) for i, o in itertools.pairwise(SIZES)
        )
        self.checkpointing = checkpointing

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.checkpointing else layer(x)
        return x


def shard(model: nn.Module, **options: Any) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)
    return model


def masks_of(model: nn.Module, seed: int = 1) -> list[Tensor]:
    """Whole masks, the same on every rank."""
    generator = torch.Generator().manual_seed(seed)
    params = tap.prunable_parameters(model)
    return [torch.rand(stored(*p).shape, generator=generator) > 0.5 for p in params]


def put(model: nn.Module, masks: list[Tensor]) -> None:
    params = tap.prunable_parameters(model)
    put_masks((m, n, mask) for (m, n), mask in zip(params, masks, strict=True))


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def pair(
    dtype: torch.dtype = torch.float64, checkpointing: bool = False, **options: Any
) -> tuple[nn.Module, nn.Module]:
    """A sharded model and the same one that is not; not pruned yet."""
    torch.manual_seed(0)
    plain = Net(checkpointing).to(dtype)
    return shard(copy.deepcopy(plain), **options), plain


def batches(steps: int, dtype: torch.dtype = torch.float64) -> Iterator[tuple[Tensor, Tensor]]:
    """What a rank sees of each batch, and the whole."""
    generator = torch.Generator().manual_seed(2)
    many = dist.get_world_size()
    for _ in range(steps):
        batch = torch.randn(4 * many, SIZES[0], dtype=dtype, generator=generator)
        yield batch.chunk(many)[dist.get_rank()], batch


def train(
    sharded: nn.Module,
    plain: nn.Module,
    make: Callable[[Any], torch.optim.Optimizer],
    clip: float | None = None,
    steps: int = 4,
) -> None:
    optimizers = [make(sharded.parameters()), make(plain.parameters())]
    for own, batch in batches(steps):
        for model, x, optimizer in zip((sharded, plain), (own, batch), optimizers, strict=True):
            model(x).square().mean().backward()
            if clip is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()


def check_same(sharded: nn.Module, plain: nn.Module, masks: list[Tensor], **close: Any) -> None:
    """The weights are those of one process, and pruned entries of the shards are zeros."""
    params = tap.prunable_parameters(sharded)
    twins = tap.prunable_parameters(plain)
    for (module, name), (twin, _), mask in zip(params, twins, masks, strict=True):
        weight = whole(stored(module, name))
        assert not weight[~mask].any()
        torch.testing.assert_close(weight, twin.weight_orig.detach() * mask, **close)
        torch.testing.assert_close(whole(module.bias), twin.bias.detach(), **close)
        assert torch.equal(whole(module.weight_mask), mask)


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=1e-1, momentum=0.9, weight_decay=0.1)


def trains(options: dict[str, Any], make: Any, clip: float | None, checkpointing: bool) -> None:
    sharded, plain = pair(checkpointing=checkpointing, **options)
    masks = masks_of(plain)
    for model in (sharded, plain):
        put(model, masks)
    train(sharded, plain, make, clip)
    check_same(sharded, plain, masks)


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize(
    ("options", "make", "clip", "checkpointing"),
    [
        ({}, adamw, None, False),
        ({"reshard_after_forward": False}, sgd, 0.1, False),
        ({"offload_policy": CPUOffloadPolicy(pin_memory=False)}, adamw, None, True),
    ],
    ids=["adamw", "sgd-clipped-kept", "offloaded-checkpointed"],
)
def test_trains_as_one_process(
    ranks: Ranks, world: int, options: Any, make: Any, clip: float | None, checkpointing: bool
) -> None:
    ranks.run(world, trains, options, make, clip, checkpointing)


def names_and_hooks() -> None:
    sharded, plain = pair()
    optimizer = adamw(sharded.parameters())
    masks = masks_of(plain)
    before = {id(p) for p in sharded.parameters()}
    for seed in (1, 2, 1):  # however often it is pruned
        put(sharded, masks_of(plain, seed))
    put(plain, masks)
    assert list(sharded.state_dict()) == list(plain.state_dict())
    names = [name for name, _ in sharded.named_parameters()]
    assert names == [name for name, _ in plain.named_parameters()]
    assert {id(p) for p in sharded.parameters()} == before
    for module, _ in tap.prunable_parameters(sharded):
        assert prune.is_pruned(module)
        (hook,) = module._forward_pre_hooks.values()
        assert type(hook) is FullyShardedMaskHook
        assert isinstance(module.weight_mask, DTensor)
        assert module.weight_mask.placements == module.weight_orig.placements
        assert module.weight is module.weight_orig
    with pytest.raises(RuntimeError, match="does not support deepcopy"):
        copy.deepcopy(sharded.layers[0][0])
    (own, _), *_ = batches(1)
    assert len(optimizer.param_groups[0]["params"]) == len(before)
    sharded(own).sum().backward()
    assert all(p.grad is not None for p in optimizer.param_groups[0]["params"])


def test_names_and_hooks(ranks: Ranks) -> None:
    ranks.run(2, names_and_hooks)


def weight_is_safe_to_touch(reshard: bool) -> None:
    sharded, plain = pair(reshard_after_forward=reshard)
    masks = masks_of(plain)
    put(sharded, masks)
    seen = []
    layer = sharded.layers[0][0]
    layer.register_forward_hook(lambda module, *_: seen.append(module.weight.detach().clone()))
    (own, _), *_ = batches(1)
    with torch.no_grad():
        sharded(own)
    # In the forward it is the gathered weight, without the pruned entries.
    assert torch.equal(seen[0], plain.layers[0][0].weight * masks[0])
    for module, _ in tap.prunable_parameters(sharded):
        assert module.weight is module.weight_orig
        assert bool(module.weight.sum().isfinite())
        assert isinstance(stored(module, "weight"), DTensor)
    # A new mask holds from the next forward on, also where the gathered weight was kept.
    new = [torch.zeros_like(mask) for mask in masks]
    put(sharded, new)
    with torch.no_grad():
        sharded(own)
    assert not seen[1].any()
    loss = sharded(own).sum()
    if reshard:
        put(sharded, new)
    loss.backward()


@pytest.mark.parametrize("reshard", [True, False])
def test_the_weight_is_safe_to_touch(ranks: Ranks, reshard: bool) -> None:
    ranks.run(2, weight_is_safe_to_touch, reshard)


def not_in_a_forward() -> None:
    sharded, plain = pair()
    masks = masks_of(plain)
    (own, _), *_ = batches(1)
    layer = sharded.layers[0][0]
    handle = layer.register_forward_hook(lambda *_: put(sharded, masks))
    with pytest.raises(RuntimeError, match=r"prune between the steps"):
        sharded(own)
    handle.remove()
    assert not prune.is_pruned(sharded)


def test_not_in_a_forward(ranks: Ranks) -> None:
    ranks.run(2, not_in_a_forward)


def mixed_precision() -> None:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    sharded, plain = pair(torch.float32, mp_policy=policy)
    masks = masks_of(plain)
    put(sharded, masks)
    optimizer = adamw(sharded.parameters())
    for own, _ in batches(3, torch.float32):
        sharded(own).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    for (module, _), mask in zip(tap.prunable_parameters(sharded), masks, strict=True):
        assert module.weight_orig.dtype == torch.float32
        weight = whole(module.weight)
        assert not weight[~mask].any()
        assert weight[mask].all()


def test_mixed_precision(ranks: Ranks) -> None:
    ranks.run(2, mixed_precision)


def accumulation() -> None:
    sharded, plain = pair()
    masks = masks_of(plain)
    for model in (sharded, plain):
        put(model, masks)
    optimizers = [sgd(sharded.parameters()), sgd(plain.parameters())]
    for i, (own, batch) in enumerate(batches(4)):
        last = i % 2 == 1
        sharded.set_requires_gradient_sync(last)
        sharded(own).square().mean().backward()
        plain(batch).square().mean().backward()
        if last:
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    check_same(sharded, plain, masks)


def test_gradient_accumulation(ranks: Ranks) -> None:
    ranks.run(2, accumulation)


def compiled() -> None:
    # Dynamo itself looks at the gradients of what the blocks before it made.
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
    torch.manual_seed(0)
    plain = Net().double()
    model = copy.deepcopy(plain)
    for layer in model.layers:
        layer.compile(backend="aot_eager")
    sharded = shard(model)
    masks = masks_of(plain)
    for model in (sharded, plain):
        put(model, masks)
    train(sharded, plain, adamw)
    new = [mask & other for mask, other in zip(masks, masks_of(plain, 3), strict=True)]
    for model in (sharded, plain):
        put(model, new)
    torch._dynamo.config.error_on_recompile = True
    try:
        train(sharded, plain, adamw)
    finally:
        torch._dynamo.config.error_on_recompile = False
    check_same(sharded, plain, new)


@pytest.mark.slow
def test_compiled_blocks(ranks: Ranks) -> None:
    ranks.run(2, compiled)


def pruned_before() -> None:
    torch.manual_seed(0)
    plain = Net().double()
    masks = masks_of(plain)
    put(plain, masks)
    sharded = shard(copy.deepcopy(plain))
    assert isinstance(sharded.layers[0][0].weight_orig, DTensor)
    train(sharded, plain, adamw)
    pairs = zip(sharded.layers, plain.layers, strict=True)
    for layer, twin in pairs:
        torch.testing.assert_close(whole(layer[0].weight_orig), twin[0].weight_orig.detach())
    # The masks that it came with become parts, and the values behind them zeros.
    put(sharded, [module.weight_mask for module, _ in tap.prunable_parameters(sharded)])
    assert isinstance(sharded.layers[0][0].weight_mask, DTensor)
    check_same(sharded, plain, masks)
    train(sharded, plain, adamw)
    check_same(sharded, plain, masks)


def test_pruned_before_it_is_sharded(ranks: Ranks) -> None:
    ranks.run(2, pruned_before)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.layers[1].weight = self.layers[0].weight

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def tied() -> None:
    plain = Tied().double()
    sharded = copy.deepcopy(plain)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(sharded, mesh=mesh)
    mask = torch.rand(4, 4) > 0.5
    for model in (sharded, plain):
        put(model, [mask, mask])
    first, second = sharded.layers
    assert first.weight_orig is second.weight_orig
    assert first.weight_mask is second.weight_mask
    optimizers = [adamw(sharded.parameters()), adamw(plain.parameters())]
    x = torch.randn(6, 4, dtype=torch.float64)
    for _ in range(3):
        for model, optimizer in zip((sharded, plain), optimizers, strict=True):
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    check_same(sharded, plain, [mask, mask])
    for module, name in tap.prunable_parameters(sharded):
        prune.remove(module, name)
    assert first.weight is second.weight
    assert torch.equal(sharded(x), sharded(x))
    assert not whole(first.weight)[~mask].any()


def test_tied_weights(ranks: Ranks) -> None:
    ranks.run(2, tied)


def finished() -> None:
    sharded, plain = pair(reshard_after_forward=False)
    keys = list(sharded.state_dict())
    masks = masks_of(plain)
    for model in (sharded, plain):
        put(model, masks)
    train(sharded, plain, adamw)
    (own, _), *_ = batches(1)
    with torch.no_grad():
        expected = sharded(own)
        for model in (sharded, plain):
            for module, name in tap.prunable_parameters(model):
                prune.remove(module, name)
        assert sorted(sharded.state_dict()) == sorted(keys)
        assert not any(module._forward_pre_hooks for module, _ in tap.prunable_parameters(sharded))
        torch.testing.assert_close(sharded(own), expected)
    sharded(own).sum().backward()
    for (module, _), mask in zip(tap.prunable_parameters(sharded), masks, strict=True):
        assert module.weight is module._parameters["weight"]
        assert "weight" not in vars(module)
        # An ordinary parameter, whose gradient is not masked any more.
        assert whole(module.weight.grad)[~mask].any()


def test_finished(ranks: Ranks) -> None:
    ranks.run(2, finished)


def converted() -> None:
    """The parameters are replaced under the masks: on the meta device first, then in float64."""
    torch.manual_seed(0)
    plain = Net()
    with torch.device("meta"):
        model = Net()
    sharded = shard(model)
    params = tap.prunable_parameters(sharded)
    put_masks((m, n, torch.ones_like(m.weight, dtype=torch.bool)) for m, n in params)
    sharded.to_empty(device="cpu")
    state = {}
    ones = [torch.ones_like(mask) for mask in masks_of(plain)]
    put(plain, ones)
    for key, value in plain.state_dict().items():
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        state[key] = distribute_tensor(value, mesh, [Shard(0)])
    sharded.load_state_dict(state, assign=True)
    for model in (sharded, plain):
        model.double()
    masks = masks_of(plain)
    for model in (sharded, plain):
        put(model, masks)
    train(sharded, plain, adamw)
    check_same(sharded, plain, masks)
    # What is loaded may have values behind the masks.
    (own, _), *_ = batches(1)
    state = {key: value.clone() for key, value in sharded.state_dict().items()}
    for value in state.values():
        if value.is_floating_point():
            value += 1
    sharded.load_state_dict(state)
    for (module, _), mask in zip(tap.prunable_parameters(sharded), masks, strict=True):
        assert torch.equal(whole(module.weight) != 0, mask)
    sharded(own).sum().backward()


def test_replaced_parameters(ranks: Ranks) -> None:
    ranks.run(2, converted)


def frozen_and_thawed() -> None:
    sharded, plain = pair()
    for model in (sharded, plain):
        model.layers[1].requires_grad_(False)
    masks = masks_of(plain)
    for _ in range(2):  # putting masks on again changes nothing
        for model in (sharded, plain):
            put(model, masks)
    train(sharded, plain, sgd, steps=2)
    check_same(sharded, plain, masks)
    layer = sharded.layers[1][0]
    (hook,) = layer._forward_pre_hooks.values()
    assert isinstance(hook, FullyShardedMaskHook)
    assert len(hook._handles) == 1  # what is loaded is masked, and there is no gradient to mask
    # The next forward notices that it is trained again, once.
    layer.weight_orig.requires_grad_(True)
    for _ in range(2):
        hook.watch(layer)
        assert len(hook._handles) == 2
        assert len(layer.weight_orig._post_accumulate_grad_hooks) == 1


def test_frozen_weights(ranks: Ranks) -> None:
    ranks.run(2, frozen_and_thawed)


def replicated_and_sharded() -> None:
    torch.manual_seed(0)
    plain = Net().double()
    sharded = copy.deepcopy(plain)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    for layer in sharded.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    masks = masks_of(plain)
    for model in (sharded, plain):
        put(model, masks)
    train(sharded, plain, adamw)
    check_same(sharded, plain, masks)


def test_hybrid_sharding(ranks: Ranks) -> None:
    ranks.run(4, replicated_and_sharded)


def tensor_parallel() -> None:
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 6)).double()
    parallel = copy.deepcopy(plain)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    parallelize_module(parallel, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    masks = masks_of(plain)
    for model in (parallel, plain):
        put(model, masks)
    assert parallel[2].weight_mask.placements == (Shard(1),)
    optimizers = [adamw(parallel.parameters()), adamw(plain.parameters())]
    x = torch.randn(6, 8, dtype=torch.float64)
    for _ in range(3):
        for model, optimizer in zip((parallel, plain), optimizers, strict=True):
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    for i, mask in zip((0, 2), masks, strict=True):
        torch.testing.assert_close(whole(parallel[i].weight_orig), plain[i].weight_orig.detach())
        assert torch.equal(whole(parallel[i].weight_mask), mask)
    for module, name in tap.prunable_parameters(parallel):
        prune.remove(module, name)
    for i, mask in zip((0, 2), masks, strict=True):
        assert not whole(parallel[i].weight)[~mask].any()
        assert isinstance(parallel[i].weight, nn.Parameter)
    torch.testing.assert_close(
        parallel(x).detach(), nn.functional.linear(*_last(plain, masks, x)).detach()
    )


def _last(plain: nn.Module, masks: list[Tensor], x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    first, last = plain[0], plain[2]
    hidden = nn.functional.gelu(nn.functional.linear(x, first.weight_orig * masks[0], first.bias))
    return hidden, last.weight_orig * masks[1], last.bias


def test_tensor_parallel(ranks: Ranks) -> None:
    ranks.run(2, tensor_parallel)


def bad_masks() -> None:
    sharded, _ = pair()
    module = sharded.layers[0][0]
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    before = sharded.state_dict()
    with pytest.raises(ValueError, match=r"weight of Linear should have shape \(7, 8\), got"):
        put_masks([(module, "weight", torch.ones(8, 7, dtype=torch.bool))])
    replicated = distribute_tensor(torch.ones(7, 8, dtype=torch.bool), mesh, [Replicate()])
    with pytest.raises(ValueError, match=r"should be laid out as .*Shard.*, got .*Replicate"):
        put_masks([(module, "weight", replicated)])
    assert list(before) == list(sharded.state_dict())


def test_bad_masks(ranks: Ranks) -> None:
    ranks.run(2, bad_masks)


def own_parts() -> None:
    """The part of a whole tensor is what torch itself gives this rank."""
    flat = init_device_mesh("cpu", (4,))
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    value = torch.arange(7 * 10).reshape(7, 10)
    layouts = [
        (flat, [Shard(0)]),
        (flat, [Shard(1)]),
        (grid, [Shard(0), Shard(1)]),
        (grid, [Shard(1), Replicate()]),
        (grid, [Shard(0), Shard(0)]),
    ]
    for mesh, placements in layouts:
        tensor = distribute_tensor(value, mesh, placements)
        assert torch.equal(dtensors.own_part(value, tensor, "it"), tensor.to_local())
    # Tensor parallel first and fully_shard on top: the rows of a rank lie apart.
    linear = nn.Linear(10, 8, bias=False)
    weight = linear.weight.detach().clone()
    linear.weight = nn.Parameter(distribute_tensor(weight, grid["tp"], [Shard(0)]))
    fully_shard(linear, mesh=grid["dp"])
    assert type(linear.weight.placements[0]).__name__ == "_StridedShard"
    assert torch.equal(dtensors.own_part(weight, linear.weight, "it"), linear.weight.to_local())


def test_own_parts(ranks: Ranks) -> None:
    ranks.run(4, own_parts)


def another_torch() -> None:
    """What is relied on inside FSDP2 is not there."""
    sharded, plain = pair()
    groups = list(fsdp._groups())
    for group in groups:
        del group.reduce_grads
    with pytest.raises(
        RuntimeError, match=r"the FSDP2 of torch .* has no FSDPParamGroup.reduce_gr"
    ):
        put(sharded, masks_of(plain))
    assert not prune.is_pruned(sharded)
    for group in groups:  # those of other tests too, if they have not been collected yet
        group.reduce_grads = True


def test_another_torch(ranks: Ranks) -> None:
    ranks.run(2, another_torch)
