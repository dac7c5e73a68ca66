"""The shard of a parameter that a process holds, and how processes exchange shards."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import torch
from torch import Tensor

from torchalignprune.dtensors import is_dtensor
from torchalignprune.placements import (
    Runs,
    count_below,
    indices,
    length_of,
    local_runs,
    part_of,
    scatter,
    take,
)

if TYPE_CHECKING:
    from torchalignprune.targets import Target

__all__ = ["Ranks", "Shard", "shard_of"]

Result = TypeVar("Result")


class Ranks:
    """The processes that prune together: all that hold a shard of one of the parameters.

    An error on one of them is kept until the next :meth:`sum`, and then raised on all of them, so
    that none waits for one that has failed.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        import torch.distributed as dist

        meshes = [tensor.device_mesh for tensor in tensors if is_dtensor(tensor)]
        members = sorted({rank for mesh in meshes for rank in mesh.mesh.flatten().tolist()})
        widest = max(meshes, key=lambda mesh: mesh.size())
        if members == list(range(dist.get_world_size())):
            self.group: Any = dist.group.WORLD
        elif len(members) > widest.size():
            raise ValueError(
                f"the ranks {members} of the parameters should be all ranks of one mesh or of the "
                "default group, got the meshes "
                f"{', '.join(sorted({str(mesh.mesh.tolist()) for mesh in meshes}))}"
            )
        else:
            self.group = (widest if widest.ndim == 1 else widest._flatten()).get_group()
        self.rank = dist.get_rank()
        self.members = members
        # In the order of the group.
        self.order = dist.get_process_group_ranks(self.group)
        self.place = {rank: i for i, rank in enumerate(self.order)}
        kind = meshes[0].device_type
        self.device = torch.device(kind)
        if kind != "cpu":
            self.device = torch.device(kind, torch.get_device_module(kind).current_device())
        self._failures: list[tuple[int, Exception]] = []

    def attempt(
        self, number: int, run: Callable[[], Result], default: Callable[[], Result]
    ) -> Result:
        """Returns ``run()``; if that fails, keeps the error and returns ``default()``.

        Args:
            number: the error with the lowest number is the one that is raised.
            run: must not communicate.
            default: must not communicate.
        """
        try:
            return run()
        except Exception as error:
            self._failures.append((number, error))
            return default()

    def fail(self, number: int, error: Exception) -> None:
        self._failures.append((number, error))

    def sum(self, values: Tensor | Sequence[int] = ()) -> list[int]:
        """The sum of the int64 values of all processes.

        Raises:
            Exception: the error of one process, on all processes.
        """
        import torch.distributed as dist

        own = torch.as_tensor(values, dtype=torch.int64, device=self.device)
        failed = own.new_tensor([len(self._failures)])
        message = torch.cat([own, failed])
        dist.all_reduce(message, group=self.group)
        *total, failures = message.tolist()
        if failures:
            self._raise()
        return total

    def sum_floats(self, values: Tensor) -> Tensor:
        """The sum of the float64 vectors of all processes; exact if all but one addend are 0."""
        import torch.distributed as dist

        message = values.to(self.device, copy=True)
        dist.all_reduce(message, group=self.group)
        return message.to(values.device)

    def most(self, values: Tensor | Sequence[int]) -> Tensor:
        """The elementwise maximum of the values of all processes; int64, on ``device``."""
        import torch.distributed as dist

        message = torch.as_tensor(values, dtype=torch.int64).to(self.device, copy=True)
        dist.all_reduce(message, op=dist.ReduceOp.MAX, group=self.group)
        return message

    def _raise(self) -> NoReturn:
        import torch.distributed as dist

        own = None
        if self._failures:
            number, error = min(self._failures, key=lambda failure: failure[0])
            own = (number, type(error), str(error))
        found: list[Any] = [None] * len(self.members)
        dist.all_gather_object(found, own, group=self.group)
        _, kind, message = min(filter(None, found), key=lambda failure: failure[0])
        cause = next((error for _, error in self._failures if str(error) == message), None)
        raise kind(message) from cause

    def swap(self, pieces: dict[int, Tensor], sizes: dict[int, int], like: Tensor) -> list[Tensor]:
        """Sends each process its piece and returns the received ones, indexed by ``place``.

        Args:
            pieces: flat tensors, by the rank to send them to.
            sizes: how many entries come from each rank.
            like: a tensor with the dtype of the pieces and the device for the result.
        """
        import torch.distributed as dist

        size = like.element_size()
        empty = like.new_empty(0)
        parcel = torch.cat([pieces.get(rank, empty) for rank in self.order])
        out = parcel.view(torch.uint8).to(self.device)
        to = [size * (pieces[rank].numel() if rank in pieces else 0) for rank in self.order]
        come = [size * sizes.get(rank, 0) for rank in self.order]
        received = out.new_empty(sum(come))
        dist.all_to_all_single(received, out, come, to, group=self.group)
        return list(received.to(like.device).view(like.dtype).split([n // size for n in come]))


class Shard:
    """The part of a parameter that this process holds.

    Attributes:
        ranks: the processes that prune together.
        number: the position of the parameter among those that are pruned together.
        shape: the shape of the whole parameter.
        runs: the indices that this process holds along each dimension.
        first: whether this process counts, among those that hold the same entries.
        copies: how many processes hold the same entries.
        input_norms: the norms of all inputs, if there are any.
    """

    def __init__(self, ranks: Ranks, number: int, target: Target) -> None:
        weight: Any = target.weight
        self.ranks = ranks
        self.number = number
        self.name = target.name
        self.shape = tuple(weight.shape)
        self.input_norms = target.input_norms
        self.runs: tuple[Runs, ...] = tuple(((0, size),) if size else () for size in self.shape)
        self.first = ranks.rank == ranks.members[0]
        self.copies = len(ranks.members)
        self._weight = None
        if not is_dtensor(weight):
            return
        self._weight = weight
        self._mesh, self._placements = weight.device_mesh, weight.placements
        _check_placements(weight, target.name)
        coordinate = self._mesh.get_coordinate()
        if coordinate is None:
            self.runs = ((),) * len(self.shape)
            self.first, self.copies = False, 1
            return
        self.runs = local_runs(self.shape, self._mesh.shape, coordinate, self._placements)
        local = tuple(weight.to_local().shape)
        if local != self.local_shape:
            raise ValueError(
                f"the shard of {target.name} should have shape {self.local_shape} on rank "
                f"{ranks.rank}, for placements {self._placements} of {self.shape}, got {local}"
            )
        replicated = [
            (size, at)
            for size, at, placement in zip(
                self._mesh.shape, coordinate, self._placements, strict=True
            )
            if placement.is_replicate()
        ]
        self.first = all(at == 0 for _, at in replicated)
        self.copies = math.prod(size for size, _ in replicated)

    @property
    def mesh_ranks(self) -> list[int]:
        """The processes of the parameter's mesh, or this one if it is not sharded."""
        if self._weight is None:
            return [self.ranks.rank]
        found: list[int] = self._mesh.mesh.flatten().tolist()
        return found

    @property
    def local_shape(self) -> tuple[int, ...]:
        return tuple(length_of(own) for own in self.runs)

    @property
    def numel(self) -> int:
        """The number of entries of the whole parameter."""
        return math.prod(self.shape)

    # Between the whole and the shard

    def local(self, tensor: Tensor, what: str) -> Tensor:
        """This process's part of a tensor that is shaped like the parameter.

        The tensor is a DTensor of the same placements, or a whole tensor that every process has.

        Raises:
            ValueError: it is a DTensor of other placements.
        """
        if not is_dtensor(tensor):
            return part_of(tensor, self.runs)
        spread: Any = tensor
        if self._weight is None:
            raise ValueError(
                f"the {what} of {self.name} should be a plain tensor like the parameter, got a "
                "DTensor"
            )
        if (spread.device_mesh, spread.placements) != (self._mesh, self._placements):
            raise ValueError(
                f"the {what} of {self.name} should be placed like the parameter, "
                f"{self._placements} on {self._mesh}, or be a whole tensor on every rank, got "
                f"{spread.placements} on {spread.device_mesh}"
            )
        return self._sized(spread.to_local())

    def along(self, vector: Tensor, dim: int) -> Tensor:
        """This process's part of a vector that has one entry for each index of a dimension."""
        return part_of(vector, (self.runs[dim],))

    def local_weight(self) -> Tensor | None:
        return None if self._weight is None else self._sized(self._weight.to_local())

    def _sized(self, local: Tensor) -> Tensor:
        # On a process outside of the mesh the local tensor always has one dimension.
        return local.reshape(self.local_shape)

    def spread(self, local: Tensor) -> Tensor:
        """A tensor placed like the parameter, from the local part of each process."""
        if self._weight is None:
            return local
        from torch.distributed.tensor import DTensor

        made: Tensor = DTensor.from_local(
            local.reshape(self._weight.to_local().shape),
            self._mesh,
            self._placements,
            run_check=False,
            shape=torch.Size(self.shape),
            stride=self._weight.stride(),
        )
        return made

    def entries_before(self, positions: Tensor) -> Tensor:
        """How many local entries come before each of some flat indices of the whole parameter."""
        begins, places = self._stretches
        if places.numel() == 0:
            return torch.zeros_like(positions)
        at = torch.searchsorted(places, positions, right=True) - 1
        own = at.clamp(min=0)
        inside = torch.minimum(positions - places[own], begins[own + 1] - begins[own])
        return torch.where(at < 0, 0, begins[own] + inside)

    @cached_property
    def _stretches(self) -> tuple[Tensor, Tensor]:
        """The stretches of local entries that are consecutive in the whole parameter.

        Returns the local index at which each begins, with the end added, and its flat index in the
        whole parameter.
        """
        if math.prod(self.local_shape) == 0:
            return torch.zeros(1, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
        cut = [d for d, size in enumerate(self.shape) if length_of(self.runs[d]) < size]
        last = cut[-1] if cut else -1
        step = math.prod(self.shape[last + 1 :])
        places = torch.tensor([first * step for first, _ in self.runs[last]] if cut else [0])
        lengths = torch.tensor([n * step for _, n in self.runs[last]] if cut else [step])
        for dim in range(last - 1, -1, -1):
            step *= self.shape[dim + 1]
            index = indices(self.runs[dim])
            places = (index[:, None] * step + places).flatten()
            lengths = lengths.repeat(index.numel())
        begins = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        return begins, places

    # Units

    def cuts(self, dim: int) -> bool:
        """Whether the units along a dimension are divided between processes."""
        if self._weight is None:
            return False
        cut = [
            placement.dim % max(1, len(self.shape))  # type: ignore[attr-defined]
            for size, placement in zip(self._mesh.shape, self._placements, strict=True)
            if size > 1 and not placement.is_replicate()
        ]
        return any(len(self.shape) < 2 or own != dim for own in cut)

    def in_whole_groups(self, dim: int, size: int) -> bool:
        """Whether every process holds whole groups of ``size`` indices along a dimension."""
        return self._weight is None or all(
            first % size == 0 and length % size == 0
            for _, runs in self._around([0] * self._mesh.ndim)
            for first, length in runs[dim]
        )

    def per_unit(
        self,
        target: Target,
        dim: int,
        compute: Callable[[Target], Tensor],
        dtype: torch.dtype,
    ) -> Tensor:
        """The result of ``compute`` for whole units, shaped like the shard.

        If units are divided, each process of the mesh gets its share of whole units and sends the
        results back. Weights are not sent for any other purpose.

        Args:
            target: the shard.
            dim: the dimension of the units.
            compute: takes a target of some whole units along ``dim`` and returns a tensor of its
                shape. The result for a unit must only depend on that unit.
            dtype: the dtype of the result.
        """
        dim = dim if len(self.shape) > 1 else 0
        whole, _ = self.whole_units(target, dim)
        made = self.ranks.attempt(
            self.number,
            lambda: compute(whole),
            lambda: torch.zeros_like(whole.weight, dtype=dtype),
        )
        return self._from_units(made, dim) if self.cuts(dim) else made

    def whole_units(self, target: Target, dim: int) -> tuple[Target, Runs]:
        """This process's share of whole units, as an unsharded target, and their indices.

        A tensor of at most one dimension is one unit, along dimension 0.
        """
        if not self.cuts(dim):
            runs = self.runs[dim] if len(self.shape) > 1 else ((0, 1),)
            return replace(target, shard=None), runs
        parts = [
            None if tensor is None else self._to_units(tensor, dim)
            for tensor in (target.weight, target.mask, target.reference)
        ]
        low, high = self._share(dim)
        norms = self.input_norms
        if norms is not None and target.in_dim == dim:
            norms = norms[low:high]
        weight, mask, reference = parts
        assert weight is not None
        units = replace(
            target, weight=weight, mask=mask, reference=reference, input_norms=norms, shard=None
        )
        return units, ((low, high - low),)

    @cached_property
    def _plane(self) -> list[tuple[int, tuple[Runs, ...]]]:
        """The processes that this one shares the parameter with, itself included, and their runs.

        Together they hold every entry of the parameter once.
        """
        own = None if self._weight is None else self._mesh.get_coordinate()
        return [] if own is None else self._around(own)

    def _around(self, coordinate: Sequence[int]) -> list[tuple[int, tuple[Runs, ...]]]:
        mesh, placements = self._mesh, self._placements
        axes = [
            [at] if placement.is_replicate() else range(size)
            for size, at, placement in zip(mesh.shape, coordinate, placements, strict=True)
        ]
        return [
            (int(mesh.mesh[tuple(at)]), local_runs(self.shape, mesh.shape, at, placements))
            for at in itertools.product(*axes)
        ]

    def _share(self, dim: int, place: int | None = None) -> tuple[int, int]:
        """The range of units that a process of the plane gets. All shares are of about one size."""
        ranks = [rank for rank, _ in self._plane]
        if not ranks:
            return 0, 0
        place = ranks.index(self.ranks.rank) if place is None else place
        units = self.shape[dim] if len(self.shape) > 1 else 1
        return units * place // len(ranks), units * (place + 1) // len(ranks)

    def _boxes(self, dim: int) -> Iterable[tuple[int, int, tuple[Runs, ...]]]:
        """The rank, place and runs of each process of the plane; a vector counts as one unit."""
        for place, (rank, runs) in enumerate(self._plane):
            yield rank, place, runs if len(self.shape) > 1 else (((0, 1),), *runs)

    def _to_units(self, local: Tensor, dim: int) -> Tensor:
        matrix = local if local.dim() > 1 else local.reshape(1, -1)
        low, high = self._share(dim)
        pieces, boxes = {}, []
        for rank, place, runs in self._boxes(dim):
            theirs = self._share(dim, place)
            own = self.runs[dim] if len(self.shape) > 1 else ((0, 1),)
            begin, end = (count_below(own, bound) for bound in theirs)
            pieces[rank] = matrix.narrow(dim, begin, end - begin).reshape(-1)
            begin, end = (count_below(runs[dim], bound) for bound in (low, high))
            mine = tuple((first - low, n) for first, n in take(runs[dim], begin, end))
            boxes.append((rank, (*runs[:dim], mine, *runs[dim + 1 :])))
        sizes = {rank: math.prod(map(length_of, box)) for rank, box in boxes}
        received = self.ranks.swap(pieces, sizes, matrix)
        shape = list(self.shape) if len(self.shape) > 1 else [1, *self.shape]
        shape[dim] = high - low
        units = matrix.new_empty(shape)
        for rank, box in boxes:
            flat = received[self.ranks.place[rank]]
            scatter(units, box, flat.reshape([length_of(own) for own in box]))
        return units if len(self.shape) > 1 else units.reshape(-1)

    def _from_units(self, units: Tensor, dim: int) -> Tensor:
        low, high = self._share(dim)
        if len(self.shape) < 2:
            units = units.reshape(high - low, *self.shape)
        pieces, sizes, spans = {}, {}, {}
        own = self.runs if len(self.shape) > 1 else (((0, 1),), *self.runs)
        for rank, place, runs in self._boxes(dim):
            begin, end = (count_below(runs[dim], bound) for bound in (low, high))
            theirs = tuple((first - low, n) for first, n in take(runs[dim], begin, end))
            pieces[rank] = part_of(units, (*runs[:dim], theirs, *runs[dim + 1 :])).reshape(-1)
            bounds = self._share(dim, place)
            spans[rank] = tuple(count_below(own[dim], bound) for bound in bounds)
            others = math.prod(length_of(r) for d, r in enumerate(own) if d != dim)
            sizes[rank] = (spans[rank][1] - spans[rank][0]) * others
        received = self.ranks.swap(pieces, sizes, units)
        local = units.new_empty([length_of(r) for r in own])
        for rank, (begin, end) in spans.items():
            part = local.narrow(dim, begin, end - begin)
            part.copy_(received[self.ranks.place[rank]].reshape(part.shape))
        return local if len(self.shape) > 1 else local.reshape(-1)


def shard_of(target: Target) -> Shard:
    """The shard of a sharded target."""
    assert target.shard is not None
    return target.shard


def _check_placements(weight: Any, name: str) -> None:
    for placement in weight.placements:
        if placement.is_replicate() or (
            not placement.is_partial() and isinstance(getattr(placement, "dim", None), int)
        ):
            continue
        raise ValueError(
            f"{name} should have Shard and Replicate placements only, got {weight.placements}"
        )
    spec = weight._spec
    order = getattr(spec, "shard_order", None)
    if order is not None and order != spec.compute_default_shard_order(weight.placements):
        raise ValueError(
            f"{name} should be sharded in the order of the mesh's dimensions, got the order {order}"
        )
