"""Regularizers, references and reports of sharded parameters, against those of one process."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from transformers.pytorch_utils import Conv1D

import torchalignprune as tap
from ranks import Ranks
from torchalignprune import dtensors
from torchalignprune.hooks import put_masks
from torchalignprune.parameters import stored


class Net(nn.Module):
    """Units along both dimensions, and a parameter that is one unit; ranks get unequal parts."""

    def __init__(self) -> None:
        super().__init__()
        layers = nn.Linear(8, 7), Conv1D(5, 7), nn.Linear(5, 3)
        # In blocks, because fully_shard minds the view that Conv1D returns.
        self.blocks = nn.ModuleList(nn.Sequential(layer, nn.Tanh()) for layer in layers)

    @property
    def first(self) -> nn.Module:
        return self.blocks[0][0]

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def layers(model: nn.Module) -> list[nn.Module]:
    return [block[0] for block in model.blocks]


def pairs(model: nn.Module) -> list[tuple[nn.Module, str]]:
    return [*tap.prunable_parameters(model), (model.first, "bias")]


def sharded_twin(plain: nn.Module, layout: str) -> nn.Module:
    many = dist.get_world_size()
    model = copy.deepcopy(plain)
    if layout == "fully_shard":
        mesh = init_device_mesh("cpu", (many,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        return fully_shard(model, mesh=mesh)
    if layout == "kept and offloaded":
        mesh = init_device_mesh("cpu", (many,))
        policy = CPUOffloadPolicy(pin_memory=False)
        return fully_shard(model, mesh=mesh, reshard_after_forward=False, offload_policy=policy)
    grid = init_device_mesh("cpu", (2, many // 2), mesh_dim_names=("dp", "tp"))
    if layout == "hybrid":
        return fully_shard(model, mesh=grid)
    # Tensor parallel, by hand, with fully_shard on top of it where there are two dimensions.
    places = [Shard(0), Shard(1), Shard(1)]
    for layer, place in zip(layers(model), places, strict=True):
        for name, parameter in list(layer.named_parameters(recurse=False)):
            own = place if parameter.dim() == 2 else Replicate()
            spread = distribute_tensor(parameter.detach(), grid["tp"], [own])
            setattr(layer, name, nn.Parameter(spread))
    return fully_shard(model, mesh=grid["dp"]) if layout == "tensor parallel" else model


def masks_of(model: nn.Module) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    masks = [torch.rand(stored(*p).shape, generator=generator) > 0.5 for p in pairs(model)]
    masks[0][2] = False  # a dead unit
    return masks


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def models(layout: str) -> tuple[nn.Module, nn.Module, Any, Any]:
    """A sharded and a plain model that have moved away from their references, and those."""
    torch.manual_seed(0)
    plain = Net().double()
    with torch.no_grad():
        plain.first.weight[4] = 0.0  # a unit that does not count
    sharded = sharded_twin(plain, layout)
    references = [tap.Reference.capture(pairs(model)) for model in (sharded, plain)]
    generator = torch.Generator().manual_seed(2)
    for (module, name), (twin, _) in zip(pairs(sharded), pairs(plain), strict=True):
        noise = 0.1 * torch.randn(getattr(twin, name).shape, generator=generator).double()
        with torch.no_grad():
            getattr(twin, name).add_(noise)
            weight = getattr(module, name)
            weight += distribute_tensor(
                noise, weight.device_mesh, weight.placements, src_data_rank=None
            )
    return sharded, plain, *references


PENALTIES = [
    (tap.CosineAlignment, {}),
    (tap.CosineAlignment, {"units": "in"}),
    (tap.CosineAlignment, {"units": "both", "weights": [1.0, 2.0, 0.5, 1.0]}),
    (tap.FrobeniusAlignment, {}),
    (tap.FrobeniusAlignment, {"normalize": False}),
]


def penalties(layout: str) -> None:
    sharded, plain, own_reference, reference = models(layout)
    for pruned in (False, True):
        if pruned:
            for model in (sharded, plain):
                put_masks((*p, mask) for p, mask in zip(pairs(model), masks_of(model), strict=True))
        for kind, options in PENALTIES:
            expected = kind(pairs(plain), reference, **options)
            # The reference may be sharded, or whole and the same everywhere.
            for given in (own_reference, [reference[p] for p in pairs(plain)]):
                penalty = kind(pairs(sharded), given, **options)
                value, other = penalty(), expected()
                assert value.item() == pytest.approx(other.item(), rel=1e-12, abs=1e-15)
                value.backward()
                other.backward()
                for p, twin in zip(pairs(sharded), pairs(plain), strict=True):
                    grad = stored(*p).grad
                    assert isinstance(grad, DTensor)
                    assert grad.placements == stored(*p).placements
                    torch.testing.assert_close(whole(grad), stored(*twin).grad)
                    stored(*p).grad = stored(*twin).grad = None
                assert list(penalty.per_parameter().values()) == pytest.approx(
                    list(expected.per_parameter().values()), rel=1e-12
                )


@pytest.mark.parametrize(
    ("world", "layout"),
    [
        (2, "fully_shard"),
        (4, "fully_shard"),
        (2, "kept and offloaded"),
        (4, "hybrid"),
        (4, "tensor parallel"),
        (4, "tensor parallel alone"),
    ],
)
def test_penalties(ranks: Ranks, world: int, layout: str) -> None:
    ranks.run(world, penalties, layout)


def train_with_penalty(layout: str) -> None:
    sharded, plain, *references = models(layout)
    pair = list(zip((sharded, plain), references, strict=True))
    for model, _ in pair:
        put_masks((*p, mask) for p, mask in zip(pairs(model), masks_of(model), strict=True))
    made = [tap.CosineAlignment(pairs(model), reference) for model, reference in pair]
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.5, momentum=0.9) for m, _ in pair]
    generator = torch.Generator().manual_seed(3)
    many = dist.get_world_size()
    for step in range(4):
        batch = torch.randn(2 * many, 8, generator=generator).double()
        strengths = []
        for (model, _), penalty, optimizer in zip(pair, made, optimizers, strict=True):
            x = batch.chunk(many)[dist.get_rank()] if model is sharded else batch
            # Before or after the forward, which gathers the weights.
            early = penalty() if step % 2 else None
            loss = model(x).square().mean()
            if step == 2:
                strengths.append(penalty.suggest_strength(loss, share=0.3))
                assert all(p.grad is None for p in model.parameters())
            (loss + 0.5 * (penalty() if early is None else early)).backward()
            optimizer.step()
            optimizer.zero_grad()
        if strengths:
            assert strengths[0] == pytest.approx(strengths[1], rel=1e-9)
    for p, twin in zip(pairs(sharded), pairs(plain), strict=True):
        mask = getattr(twin[0], f"{twin[1]}_mask")
        torch.testing.assert_close(whole(stored(*p)) * mask, stored(*twin).detach() * mask)


@pytest.mark.parametrize(
    ("world", "layout"),
    [(2, "fully_shard"), (2, "kept and offloaded"), (4, "fully_shard"), (4, "hybrid")],
)
def test_training_is_that_of_one_process(ranks: Ranks, world: int, layout: str) -> None:
    ranks.run(world, train_with_penalty, layout)


def strength_while_accumulating() -> None:
    sharded, _, reference, _ = models("fully_shard")
    penalty = tap.CosineAlignment(pairs(sharded), reference)
    sharded.set_requires_gradient_sync(False)
    loss = sharded(torch.randn(2, 8).double()).sum()
    with pytest.raises(ValueError, match="set_requires_gradient_sync"):
        penalty.suggest_strength(loss)


def test_strength_while_accumulating(ranks: Ranks) -> None:
    ranks.run(2, strength_while_accumulating)


def traffic() -> int:
    """How many bytes the penalty sends of a model whose units are whole on each rank."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)))
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    params = tap.prunable_parameters(model)
    penalty = tap.CosineAlignment(params, tap.Reference.capture(params))
    sent = []
    reduce = dist.all_reduce

    def count(tensor: Tensor, *rest: Any, **options: Any) -> Any:
        sent.append(tensor.numel() * tensor.element_size())
        return reduce(tensor, *rest, **options)

    dist.all_reduce = count
    try:
        penalty().backward()
    finally:
        dist.all_reduce = reduce
    return sum(sent)


def test_whole_units_cost_two_numbers_a_parameter(ranks: Ranks) -> None:
    assert ranks.run(2, traffic) == [2 * 4 * 8] * 2


def references(folder: str) -> None:
    sharded, plain, own, reference = models("fully_shard")
    for p, twin in zip(own, reference, strict=True):
        assert isinstance(own[p], DTensor)
        assert own[p].placements == p[0]._parameters[p[1]].placements
        assert torch.equal(whole(own[p]), reference[twin])
    # It shares no memory with the model, and can be had in another dtype.
    before = own[sharded.first, "weight"].to_local().clone()
    with torch.no_grad():
        sharded.first.weight += 1
    assert torch.equal(own[sharded.first, "weight"].to_local(), before)
    assert own.to(dtype=torch.bfloat16)[sharded.first, "weight"].dtype == torch.bfloat16
    half = tap.Reference.capture(pairs(sharded), dtype=torch.float16)
    assert half[sharded.first, "weight"].dtype == torch.float16
    with pytest.raises(TypeError, match="sharded"):
        tap.Reference.capture(tap.prunable_parameters(sharded)).save(Path(folder) / "no")
    # From a file, of which each rank reads its own part.
    params = tap.prunable_parameters(plain)
    if dist.get_rank() == 0:
        tap.Reference.capture(params).save(Path(folder) / "r.safetensors")
    dist.barrier()
    expected = tap.CosineAlignment(
        params, tap.Reference.load(Path(folder) / "r.safetensors", params)
    )
    own_params = tap.prunable_parameters(sharded)
    mapped = tap.Reference.load(Path(folder) / "r.safetensors", own_params)
    with torch.no_grad():
        plain.first.weight += 1
    penalty = tap.CosineAlignment(own_params, mapped)
    assert penalty().item() == pytest.approx(expected().item(), rel=1e-12)


def test_references(ranks: Ranks, tmp_path: Path) -> None:
    ranks.run(2, references, str(tmp_path))


def reports(layout: str) -> None:
    sharded, plain, own, reference = models(layout)
    for model in (sharded, plain):
        put_masks((*p, mask) for p, mask in zip(pairs(model), masks_of(model), strict=True))
    report = tap.alignment_report(pairs(sharded), own)
    expected = tap.alignment_report(pairs(plain), reference, matching=False)
    for layer, other in zip([*report, report.totals], [*expected, expected.totals], strict=True):
        assert layer["moved_share"] is None
        for key, value in other.items():
            if isinstance(value, float) and not math.isnan(value):
                assert layer[key] == pytest.approx(value, rel=1e-12), key
            else:
                assert layer[key] == value, key
    with torch.no_grad():
        weight = sharded.first.weight_orig
        weight.to_local()[dtensors.own_indices(weight, 0) == 0] = torch.nan
    # On every rank, whichever has it.
    with pytest.raises(ValueError, match="should be finite numbers, got NaN or infinity"):
        tap.alignment_report(pairs(sharded), own)


@pytest.mark.parametrize(
    ("world", "layout"),
    [
        (2, "fully_shard"),
        (4, "fully_shard"),
        (4, "hybrid"),
        (4, "tensor parallel"),
        (4, "tensor parallel alone"),
    ],
)
def test_reports(ranks: Ranks, world: int, layout: str) -> None:
    ranks.run(world, reports, layout)


def refused() -> None:
    sharded, _, reference, _ = models("fully_shard")
    with pytest.raises(ValueError, match="is sharded, and matching would have to compare units"):
        tap.CosineAlignment(pairs(sharded), reference, matching="greedy")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    other = [distribute_tensor(whole(reference[p]), mesh, [Replicate()]) for p in pairs(sharded)]
    with pytest.raises(ValueError, match=r"the reference of .* should be laid out as .*Shard"):
        tap.CosineAlignment(pairs(sharded), other)


def test_refused(ranks: Ranks) -> None:
    ranks.run(2, refused)
