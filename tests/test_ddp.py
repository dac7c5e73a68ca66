"""Pruning under ``DistributedDataParallel``: the same masks on every rank, and what is sent."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

import torchalignprune as tap
from ranks import Ranks
from torchalignprune.parameters import mask_of, stored


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 10)
        self.last = nn.Linear(10, 6)
        # DDP looks for buffers at each forward only where a model has any when it is wrapped.
        self.register_buffer("positions", torch.arange(5))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).relu())


@contextmanager
def buffers_sent() -> Iterator[list[Tensor]]:
    """The tensors that DDP broadcasts."""
    sent: list[Tensor] = []
    broadcast = dist._broadcast_coalesced

    @torch.compiler.disable
    def count(group: Any, tensors: list[Tensor], *rest: Any) -> None:
        sent.extend(tensors)
        broadcast(group, tensors, *rest)

    dist._broadcast_coalesced = count
    try:
        yield sent
    finally:
        dist._broadcast_coalesced = broadcast


def train(ddp: nn.Module, optimizer: Any, pruner: tap.Pruner, steps: int) -> None:
    generator = torch.Generator().manual_seed(dist.get_rank())  # another batch on each rank
    for _ in range(steps):
        ddp(torch.randn(8, 12, generator=generator)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        pruner.step()


def pruned(before: bool) -> tuple[list[Any], list[int]]:
    """The masks and weights in the end, and how many masks each forward sent."""
    model = Net()
    params = tap.prunable_parameters(model)
    schedule = tap.schedules.linear(0.0, 0.6, begin=1, end=6)
    if before:
        pruner = tap.Pruner(params, tap.AlignedMagnitude, schedule)
    ddp = DistributedDataParallel(model)
    if not before:
        pruner = tap.Pruner(params, tap.AlignedMagnitude, schedule)
    optimizer = torch.optim.AdamW(ddp.parameters(), lr=1e-2)
    counts = []
    for _ in range(8):
        with buffers_sent() as sent:
            train(ddp, optimizer, pruner, 1)
        counts.append(sum(buffer.dtype == torch.bool for buffer in sent))
        assert len(sent) > counts[-1]  # the other buffer still is
    return [(mask_of(*p), stored(*p).detach()) for p in params], counts


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("before", [True, False], ids=["pruner first", "wrapped first"])
def test_masks_are_the_same_and_sent_once(ranks: Ranks, world: int, before: bool) -> None:
    results = ranks.run(world, pruned, before)
    first, counts = results[0]
    assert counts == [2, 0, 0, 0, 0, 0, 0, 0]
    entries = sum(mask.numel() for mask, _ in first)
    assert sum(int((~mask).sum()) for mask, _ in first) == round(0.6 * entries)
    for others, _ in results[1:]:
        for (mask, weight), (other_mask, other_weight) in zip(first, others, strict=True):
            assert torch.equal(mask, other_mask)
            assert torch.equal(weight, other_weight)


@contextmanager
def sums_sent() -> Iterator[list[int]]:
    """The bytes of the all-reduces that are called for."""
    sent: list[int] = []
    all_reduce = dist.all_reduce

    def count(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        sent.append(tensor.nbytes)
        return all_reduce(tensor, *args, **kwargs)

    dist.all_reduce = count
    try:
        yield sent
    finally:
        dist.all_reduce = all_reduce


def compared(kind: str) -> list[int]:
    """A run of which the ranks may come to different masks; the bytes that its steps send."""
    rank = dist.get_rank()
    model = Net()
    params = tap.prunable_parameters(model)
    if kind.startswith("random"):
        generator = torch.Generator().manual_seed(rank if kind == "random apart" else 0)
        method: Any = partial(tap.Random, generator=generator)
    else:
        text = torch.randn(20, 12, generator=torch.Generator().manual_seed(rank))
        own = tap.Calibration.collect(model, [text], params)
        method = partial(tap.AlignedMagnitude, input_norms=own)
    pruner = tap.Pruner(params, method, tap.schedules.linear(0.0, 0.6, end=3))
    ddp = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(ddp.parameters(), lr=1e-2)
    ddp(torch.randn(8, 12)).square().mean().backward()
    optimizer.step()
    if kind == "random":
        counts = []
        for _ in range(5):
            with sums_sent() as sent:
                pruner.step()
            counts.append(sum(sent))
        masks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(masks, [mask_of(*pair) for pair in params])
        for own_mask, other in zip(masks[0], masks[-1], strict=True):
            assert torch.equal(own_mask, other)
        return counts
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        RuntimeError, match=r"different masks for first\.weight, last\.weight: everything"
    ):
        pruner.step()
    assert pruner.steps == 0 and pruner.sparsity() == 0.0
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    with ddp.join():
        ddp(torch.randn(8, 12)).square().mean().backward()
        optimizer.step()
        with sums_sent() as sent:
            assert pruner.step()
    return sent


@pytest.mark.parametrize("world", [2, 4])
def test_masks_are_compared_before_they_are_put_in_place(ranks: Ranks, world: int) -> None:
    for sent in ranks.run(world, compared, "random"):
        assert sent == [16, 16, 16, 0, 0]
    for kind in ("random apart", "norms apart"):
        for sent in ranks.run(world, compared, kind):
            assert sent == []


def without_a_wrapper() -> int:
    """Ranks that have nothing to do with each other, such as those of a sweep."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    model = Net()
    params = tap.prunable_parameters(model)
    method = partial(tap.Random, generator=generator)
    pruner = tap.Pruner(params, method, tap.schedules.one_shot(0.5, at=1))
    model(torch.randn(8, 12))
    with sums_sent() as sent:
        assert pruner.step()
    return len(sent)


def test_models_without_a_wrapper_are_not_compared(ranks: Ranks) -> None:
    assert ranks.run(2, without_a_wrapper) == [0, 0]


@given(data=st.data())
def test_digests_tell_masks_apart(data: st.DataObject) -> None:
    shape = data.draw(st.sampled_from([(), (1,), (7, 3), (40, 1000), (3, 5, 2)]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    mask = torch.rand(shape, generator=generator) > 0.5
    digest = tap.ddp.digest(mask)
    assert tap.ddp.digest(mask.clone()) == digest
    if mask.dim() > 1:
        transposed = mask.transpose(0, 1).contiguous().transpose(0, 1)
        assert tap.ddp.digest(transposed) == digest
    entries = data.draw(st.sets(st.integers(0, mask.numel() - 1), min_size=1, max_size=4))
    other = mask.clone()
    for entry in entries:
        other.view(-1)[entry] ^= True
    assert tap.ddp.digest(other) != digest


def compiled() -> None:
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
    torch.manual_seed(0)
    model = Net()
    params = tap.prunable_parameters(model)
    pruner = tap.Pruner(params, tap.Magnitude, tap.schedules.linear(0.0, 0.6, end=3))
    ddp = DistributedDataParallel(model)
    tap.ddp.ignore_masks(ddp)
    step = torch.compile(ddp, backend="aot_eager")
    optimizer = torch.optim.AdamW(ddp.parameters(), lr=1e-2)
    with buffers_sent() as sent:
        train(step, optimizer, pruner, 4)
    assert not any(buffer.dtype == torch.bool for buffer in sent)
    assert pruner.sparsity() == pytest.approx(0.6, abs=0.01)


@pytest.mark.slow
def test_compiled(ranks: Ranks) -> None:
    ranks.run(2, compiled)


def wrapped_twice() -> None:
    """Another wrapper of the same model learns of the masks too."""
    model = Net()
    params = tap.prunable_parameters(model)
    tap.global_unstructured(params, tap.Magnitude, amount=0.5)
    x = torch.randn(2, 12)
    for wrapper in (DistributedDataParallel(model), DistributedDataParallel(model)):
        counts = []
        for _ in range(2):
            with buffers_sent() as sent:
                wrapper(x).sum().backward()
            counts.append(sum(buffer.dtype == torch.bool for buffer in sent))
        assert counts == [2, 0]
    copied = copy.deepcopy(model)
    assert torch.equal(copied(x), model(x))


def test_wrapped_twice(ranks: Ranks) -> None:
    ranks.run(2, wrapped_twice)


def penalty_of_ddp() -> tuple[float, list[Tensor]]:
    torch.manual_seed(0)
    model = Net().double()
    params = tap.prunable_parameters(model)
    reference = tap.Reference.capture(params)
    tap.global_unstructured(params, tap.Magnitude, amount=0.5)
    penalty = tap.CosineAlignment(params, reference)
    ddp = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
    batch = torch.randn(8, 12, generator=torch.Generator().manual_seed(1)).double()
    for _ in range(3):
        own = batch.chunk(dist.get_world_size())[dist.get_rank()]
        (ddp(own).square().mean() + 0.5 * penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return penalty().item(), [stored(*p).detach() for p in params]


def test_penalty_is_that_of_one_process(ranks: Ranks) -> None:
    ((alone, weights),) = ranks.run(1, penalty_of_ddp)
    for value, own in ranks.run(2, penalty_of_ddp):
        assert value == pytest.approx(alone, rel=1e-12)
        for weight, other in zip(weights, own, strict=True):
            torch.testing.assert_close(weight, other)


def test_not_ddp() -> None:
    with pytest.raises(TypeError, match="ddp should be a DistributedDataParallel, got Linear"):
        tap.ddp.ignore_masks(nn.Linear(2, 2))


def without_other_buffers() -> None:
    for before in (True, False):
        model = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 6))
        params = tap.prunable_parameters(model)
        schedule = tap.schedules.linear(0.0, 0.6, end=3)
        if before:
            pruner = tap.Pruner(params, tap.Magnitude, schedule)
        ddp = DistributedDataParallel(model)
        if not before:
            pruner = tap.Pruner(params, tap.Magnitude, schedule)
        train(ddp, torch.optim.SGD(ddp.parameters(), lr=0.1), pruner, 4)
        assert pruner.sparsity() == round(0.6 * 144) / 144


def test_a_model_without_other_buffers(ranks: Ranks) -> None:
    ranks.run(2, without_other_buffers)
