"""``torch.distributed.checkpoint``: saved by some ranks, loaded by others, masks included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import torchalignprune as tap
from ranks import Ranks
from torchalignprune.hooks import put_masks
from torchalignprune.parameters import stored


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 7), nn.GELU(), nn.Linear(7, 5), nn.GELU(), nn.Linear(5, 3))


def shard(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def with_masks(model: nn.Module, seed: int | None) -> nn.Module:
    """Masks of ones, as a Pruner puts them, or random ones."""
    generator = torch.Generator().manual_seed(seed or 0)
    masks = []
    for module, name in tap.prunable_parameters(model):
        mask = torch.rand(module.weight.shape, generator=generator) > 0.5
        masks.append((module, name, mask if seed else torch.ones_like(mask)))
    put_masks(masks)
    return model


def whole(model: nn.Module) -> dict[str, Tensor]:
    return {
        key: (value.full_tensor() if isinstance(value, DTensor) else value).clone()
        for key, value in model.state_dict().items()
    }


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """The same on every number of ranks, because each sees the whole batch."""
    batch = torch.randn(4, 8, generator=torch.Generator().manual_seed(5))
    model(batch).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def save(folder: str, asynchronous: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What was saved, and what one more step makes of it."""
    torch.manual_seed(0)
    model = with_masks(shard(net()), seed=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(2):
        step(model, optimizer)
    saved = whole(model)
    own, own_optimizer = get_state_dict(model, optimizer)
    assert any(key.endswith("weight_mask") for key in own)
    assert any("weight_orig" in key for key in own_optimizer["state"])
    state = {"model": own, "optimizer": own_optimizer}
    if asynchronous:
        dcp.async_save(state, checkpoint_id=folder).result()
    else:
        dcp.save(state, checkpoint_id=folder)
    step(model, optimizer)
    return saved, whole(model)


def load(folder: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The same after loading it into a model that was made anew, from other values."""
    torch.manual_seed(dist.get_world_size())
    model = with_masks(shard(net()), seed=None)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    own, own_optimizer = get_state_dict(model, optimizer)
    state = {"model": own, "optimizer": own_optimizer}
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(
        model,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
    )
    loaded = whole(model)
    for module, name in tap.prunable_parameters(model):
        assert isinstance(module.weight_mask, DTensor)
        assert module.weight is stored(module, name)
    step(model, optimizer)
    return loaded, whole(model)


@pytest.mark.parametrize(
    ("before", "after", "asynchronous"),
    [(2, 4, False), (4, 1, False), (2, 2, True)],
)
def test_another_number_of_ranks(
    ranks: Ranks, tmp_path: Path, before: int, after: int, asynchronous: bool
) -> None:
    saved, expected = ranks.run(before, save, str(tmp_path), asynchronous)[0]
    for loaded, stepped in ranks.run(after, load, str(tmp_path)):
        assert list(loaded) == list(saved)
        for key, value in saved.items():
            assert torch.equal(loaded[key], value), key
            torch.testing.assert_close(stepped[key], expected[key])
        for key, value in stepped.items():
            if key.endswith("_mask"):
                assert not stepped[key.removesuffix("_mask") + "_orig"][~value].any()


def one_file(folder: str) -> dict[str, Any]:
    """The whole state on rank 0, and from there to all again."""
    torch.manual_seed(0)
    model = with_masks(shard(net()), seed=1)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(model, options=options)
    expected = whole(model)
    if dist.get_rank() == 0:
        plain = net()
        tap.load_state_dict(plain, state)
        for key, value in expected.items():
            assert torch.equal(plain.state_dict()[key], value)
        # What an ordinary model has, too: fully_shard on top of it.
        torch.save(state, Path(folder) / "model.pt")
    fresh = with_masks(shard(net()), seed=None)
    spread = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(fresh, state if dist.get_rank() == 0 else {}, options=spread)
    for key, value in whole(fresh).items():
        assert torch.equal(value, expected[key])
    # A model without masks gets those of a sharded state.
    bare = shard(net())
    tap.load_state_dict(bare, model.state_dict())
    for key, value in whole(bare).items():
        assert torch.equal(value, expected[key])
    bare(torch.randn(2, 8)).sum().backward()


def test_whole_states(ranks: Ranks, tmp_path: Path) -> None:
    ranks.run(2, one_file, str(tmp_path))


@pytest.mark.parametrize("option", ["criterion", "regrow", "penalty"])
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_a_pruner_goes_on_in_an_ordinary_model(option: str, tmp_path: Path) -> None:
    """What it holds besides the masks comes back as well, though a checkpoint loads only tensors
    that the new pruner's state has, in their shapes."""

    class Run:
        def __init__(self) -> None:
            torch.manual_seed(0)
            self.model = net()
            params = tap.prunable_parameters(self.model)
            swapped = [module.weight.detach().flip(0) for module, _ in params]
            options: dict[str, Any] = {
                "criterion": lambda: tap.criteria.Movement(params),
                "regrow": lambda: True,
                "penalty": lambda: tap.CosineAlignment(params, swapped, matching="greedy"),
            }
            self.pruner = tap.Pruner(
                params,
                tap.Magnitude,
                tap.schedules.steps({0: 0, 1: 0.2, 3: 0.4, 6: 0.3, 7: 0.6}),
                **{option: options[option]()},
            )
            self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)

        def train(self, steps: int) -> None:
            for _ in range(steps):
                if self.pruner.penalty is not None:
                    self.pruner.penalty().backward()
                step(self.model, self.optimizer)
                self.pruner.step()

        def state(self) -> dict[str, Any]:
            # First, because get_state_dict takes a step with gradients of zero.
            pruner = self.pruner.state_dict()
            model, optimizer = get_state_dict(self.model, self.optimizer)
            return {"model": model, "optimizer": optimizer, "pruner": pruner}

    first, second = Run(), Run()
    first.train(5)
    dcp.save(first.state(), checkpoint_id=tmp_path)
    first.train(3)
    state = second.state()
    dcp.load(state, checkpoint_id=tmp_path)
    set_state_dict(
        second.model,
        second.optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
    )
    second.pruner.load_state_dict(state["pruner"])
    second.train(3)
    expected = whole(first.model)
    for key, value in whole(second.model).items():
        assert torch.equal(value, expected[key]), key
    assert second.pruner.log() == first.pruner.log()


def refused(folder: str) -> None:
    model = shard(net())
    with pytest.raises(ValueError, match=r"0\.weight: is a DTensor: load into the model before"):
        tap.load_pruned(model, folder)
    assert all(isinstance(value, DTensor) for value in model.parameters())
    assert list(model.state_dict()) == list(net().state_dict())


def test_files_do_not_go_into_a_sharded_model(ranks: Ranks, tmp_path: Path) -> None:
    tap.save_pruned(with_masks(net(), seed=1), tmp_path / "x", "bitmask")
    ranks.run(2, refused, str(tmp_path / "x"))
