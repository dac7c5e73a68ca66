"""Sharded tensors (``DTensor``): the part that this rank holds, and sums over all parts.

``torch.distributed.tensor`` is large and not imported here, unless there is a ``DTensor``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch import distributed as dist

from torchalignprune.placements import Runs, indices, local_runs, part_of

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor
    from typing_extensions import TypeIs

__all__ = [
    "add_up",
    "add_up_together",
    "check_layout",
    "converted",
    "differentiable_local",
    "is_dtensor",
    "like",
    "local",
    "own_indices",
    "own_part",
    "shard_dims",
]


def is_dtensor(tensor: object) -> TypeIs[DTensor]:
    """Whether a tensor is a ``torch.distributed.tensor.DTensor``."""
    kind = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)
    return kind is not None and isinstance(tensor, kind)


def local(tensor: Tensor) -> Tensor:
    """The local part of a DTensor, detached, in the same memory; any other tensor itself."""
    if not is_dtensor(tensor):
        return tensor
    with torch.no_grad():
        part: Tensor = tensor.to_local()
    return part


def like(tensor: DTensor, part: Tensor) -> DTensor:
    """A DTensor of the same layout with ``part`` as this rank's part.

    ``DTensor.from_local`` would move a part that is offloaded to the CPU back to the GPU.
    """
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

    meta = TensorMeta(tensor.shape, tensor.stride(), part.dtype)
    spec = DTensorSpec(tensor.device_mesh, tensor.placements, tensor_meta=meta)
    return DTensor(part, spec, requires_grad=False)


def converted(
    tensor: Tensor,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    copy: bool = False,
) -> Tensor:
    """``tensor.to(device, dtype, copy=copy)``, applied to the local part of a DTensor."""
    if not is_dtensor(tensor):
        return tensor.to(device, dtype, copy=copy)
    part = local(tensor)
    moved = part.to(device, dtype, copy=copy)
    return tensor if moved is part else like(tensor, moved)


def check_layout(tensor: DTensor, name: str) -> None:
    """Refuses a DTensor without values on each rank, such as a pending sum (``Partial``).

    Raises:
        TypeError: a placement is neither ``Shard`` nor ``Replicate``.
    """
    for placement in tensor.placements:
        if not (placement.is_replicate() or _dim(placement) is not None):
            raise TypeError(
                f"{name} should be a DTensor of Shard and Replicate placements, got {placement}"
            )


def _dim(placement: Any) -> int | None:
    """The dimension that a placement shards, or None."""
    from torch.distributed.tensor.placement_types import Shard, _StridedShard

    return placement.dim if isinstance(placement, Shard | _StridedShard) else None


def shard_dims(tensor: Tensor) -> list[tuple[int, int]]:
    """Pairs of a mesh dimension that shards the tensor and the tensor's dimension it shards."""
    if not is_dtensor(tensor):
        return []
    pairs = [(i, _dim(placement)) for i, placement in enumerate(tensor.placements)]
    sizes = tensor.device_mesh.shape
    return [(i, dim % tensor.dim()) for i, dim in pairs if dim is not None and sizes[i] > 1]


def own_indices(tensor: DTensor, dim: int) -> Tensor:
    """The indices along a dimension of the whole tensor that this rank's part holds, in its order.

    Returns:
        int64, shape ``(length of the part,)``.
    """
    return indices(_runs(tensor)[dim])


def _runs(tensor: DTensor) -> tuple[Runs, ...]:
    mesh = tensor.device_mesh
    coordinate = mesh.get_coordinate()
    assert coordinate is not None, "this rank is not in the mesh"
    return local_runs(tensor.shape, mesh.shape, coordinate, tensor.placements)


def own_part(whole: Tensor, tensor: Tensor, name: str) -> Tensor:
    """The part of ``whole`` that belongs to this rank's part of ``tensor``; a view if possible.

    Args:
        whole: shaped like ``tensor``; a plain tensor that is the same on all ranks (if it is mapped
            from a file, only the part is read), or a DTensor of the same layout.
        tensor: sharded or not.
        name: what to call ``whole`` in an error.

    Raises:
        ValueError: ``whole`` is a DTensor of another layout, or ``tensor`` is not a DTensor.
    """
    if is_dtensor(whole):
        if not is_dtensor(tensor):
            raise ValueError(f"{name} should be a plain tensor like the parameter, got a DTensor")
        if whole.device_mesh != tensor.device_mesh or whole.placements != tensor.placements:
            raise ValueError(
                f"{name} should be laid out as {tensor.placements} on {tensor.device_mesh}, got "
                f"{whole.placements} on {whole.device_mesh}"
            )
        return local(whole)
    if not is_dtensor(tensor):
        return whole
    return part_of(whole, _runs(tensor))


def add_up_together(
    values: Sequence[Tensor], owners: Sequence[Tensor], mesh_dims: Sequence[Sequence[int]]
) -> list[Tensor]:
    """:func:`add_up` for many tensors, with one message for those on the same mesh dimensions.

    Args:
        values: shape ``(rows, columns)`` each, with the same rows, on one device.
        owners: the tensor that each belongs to: a DTensor, whose mesh it is summed on, or a plain
            tensor.
        mesh_dims: the dimensions of each mesh to sum over; none for a plain tensor.
    """
    summed = list(values)
    ways: dict[tuple[DeviceMesh, tuple[int, ...]], list[int]] = {}
    for i, (owner, dims) in enumerate(zip(owners, mesh_dims, strict=True)):
        if dims:
            assert is_dtensor(owner)
            ways.setdefault((owner.device_mesh, tuple(dims)), []).append(i)
    for (mesh, dims), numbers in ways.items():
        sizes = [values[i].size(1) for i in numbers]
        parts = add_up(torch.cat([values[i] for i in numbers], dim=1), mesh, dims).split(sizes, 1)
        for i, part in zip(numbers, parts, strict=True):
            summed[i] = part
    return summed


def add_up(values: Tensor, mesh: DeviceMesh, mesh_dims: Sequence[int]) -> Tensor:
    """The sum over the ranks along some dimensions of a mesh, the same on all of them.

    Differentiable. All ranks should compute the same loss from the sum. The gradient of a rank's
    own values is then the gradient of the sum, so the backward sends nothing.
    """
    if not mesh_dims:
        return values
    summed: Tensor = _Sum.apply(values, mesh, tuple(mesh_dims))  # type: ignore[no-untyped-call]
    return summed


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, mesh: DeviceMesh, mesh_dims: tuple[int, ...]) -> Tensor:
        # Values that are offloaded to the CPU are sent from the mesh's device.
        total = values.to(mesh.device_type, copy=True)
        for dim in mesh_dims:
            dist.all_reduce(total, group=mesh.get_group(dim))
        return total.to(values.device)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad, None, None


def differentiable_local(tensor: Tensor, before: Callable[[], None] | None = None) -> Tensor:
    """:func:`local` with a gradient, which is a DTensor of the same layout.

    Args:
        tensor: a DTensor; any other tensor is returned as it is.
        before: called before the gradient is passed on.
    """
    if not is_dtensor(tensor):
        return tensor
    part: Tensor = _Local.apply(tensor, before)  # type: ignore[no-untyped-call]
    return part


class _Local(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: DTensor, before: Callable[[], None] | None) -> Tensor:
        ctx.tensor, ctx.before = tensor.detach(), before
        part = local(tensor)
        return part.view_as(part)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        if ctx.before is not None:
            ctx.before()
        return like(ctx.tensor, grad), None
