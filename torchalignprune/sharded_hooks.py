"""Masks on parameters that are DTensors: each rank has the mask of its own part.

If the module computes with the DTensor itself (tensor parallel), the hook sets the attribute to the
product with the mask. Under ``fully_shard`` the module computes with the gathered parameter, but no
rank has the whole mask; so the sharded parameter itself has the zeros.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn

from torchalignprune import fsdp, ops
from torchalignprune.dtensors import check_layout, is_dtensor, like, local, own_part
from torchalignprune.hooks import MaskHook, masked_straight_through, put_mask
from torchalignprune.parameters import bool_mask, mask_of, stored

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

__all__ = ["FullyShardedMaskHook", "ShardedMaskHook", "prepare", "reshard"]


class ShardedMaskHook(MaskHook):
    """The one forward pre-hook of a pruned DTensor parameter: sets its product with the mask."""

    def apply_mask(self, module: nn.Module) -> Tensor:
        """``name_orig * name_mask``, a DTensor, with a gradient to ``name_orig``."""
        original: Tensor = getattr(module, self._tensor_name + "_orig")
        mask: Tensor = getattr(module, self._tensor_name + "_mask")
        differentiable = torch.is_grad_enabled() and original.requires_grad
        if self.straight_through and differentiable:
            product = masked_straight_through(original, mask)
        else:
            product = original * mask
        if is_dtensor(product) and _works_on_parts(module):
            part: Tensor = product.to_local()
            return part
        return product

    def remove(self, module: nn.Module) -> None:
        """Makes the parameter an ordinary one with zeros in it again; for ``prune.remove``."""
        name = self._tensor_name
        original = module._parameters[f"{name}_orig"]
        assert original is not None
        # Assigning to the ``data`` of a DTensor would not change its local part.
        _zero(original, getattr(module, f"{name}_mask"))
        vars(module).pop(name, None)
        del module._parameters[f"{name}_orig"]
        del module._buffers[f"{name}_mask"]
        module.register_parameter(name, original)


def _works_on_parts(module: nn.Module) -> bool:
    """Whether the forward that Transformers has put in computes with local parts, not DTensors.

    Its tensor parallel styles do so without gradients, and always for fused projections. They swap
    the module's parameters, but the pruned weight is not one of them.
    """
    forward = vars(module).get("forward")
    if getattr(forward, "__name__", None) != "tp_forward":
        return False
    cells = zip(forward.__code__.co_freevars, forward.__closure__, strict=True)  # type: ignore[union-attr]
    style = {name: cell.cell_contents for name, cell in cells}.get("self")
    return bool(style is not None and style.should_use_local_tensors(module))


class FullyShardedMaskHook(ShardedMaskHook):
    """The one forward pre-hook of a pruned parameter that ``fully_shard`` has sharded.

    Pruned entries are zero in the sharded parameter, and so in the gathered one. Their gradients
    are zeroed once the sharded gradient has arrived, after the reduce-scatter. So an optimizer
    without momentum from before the pruning leaves the entries at zero. FSDP2 itself keeps the
    attribute ``name`` up to date, and the forward multiplies nothing.
    """

    def __init__(self, module: nn.Module, name: str) -> None:
        super().__init__(module, name)
        self._handles: list[Any] = []

    def __call__(self, module: nn.Module, inputs: Any) -> None:
        # ``model.to`` and ``load_state_dict(assign=True)`` may have replaced the parameter.
        if not torch.compiler.is_compiling():
            self.watch(module)

    def apply_mask(self, module: nn.Module) -> Tensor:
        """The sharded parameter, which has the zeros."""
        return stored(module, self._tensor_name)

    def watch(self, module: nn.Module) -> None:
        """Masks the gradients of the parameter and the values that are loaded into it."""
        parameter = stored(module, self._tensor_name)
        # A weak reference would tell whether this is the same parameter as before, but torch
        # cannot swap tensors that have weak references.
        hooks = getattr(parameter, "_post_accumulate_grad_hooks", None) or {}
        if self._handles and (not parameter.requires_grad or self._handles[-1].id in hooks):
            return
        self._unwatch()
        owner = weakref.ref(module)

        def mask_gradient(parameter: Tensor) -> None:
            module = owner()
            mask = None if module is None else mask_of(module, self._tensor_name)
            if mask is not None and parameter.grad is not None and not self.straight_through:
                _zero(parameter.grad, mask)

        self._handles = [module.register_load_state_dict_post_hook(self._loaded)]
        # A frozen parameter takes no hook. If it is unfrozen, the next forward adds one.
        if parameter.requires_grad:
            self._handles.append(parameter.register_post_accumulate_grad_hook(mask_gradient))

    def _unwatch(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _loaded(self, module: nn.Module, _: Any) -> None:
        mask = mask_of(module, self._tensor_name)
        if mask is not None:
            vars(module)[self._tensor_name] = parameter = stored(module, self._tensor_name)
            _zero(parameter, mask)

    def remove(self, module: nn.Module) -> None:
        """Makes the parameter an ordinary one with zeros in it again; for ``prune.remove``."""
        name = self._tensor_name
        entry = _entry(module, name)
        assert entry is not None
        entry.reshard(f"{name} of {type(module).__name__}")
        self._unwatch()
        entry.hide(module, name)
        entry.rename(module, f"{name}_orig", name)
        super().remove(module)

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        raise RuntimeError("fully_shard does not support deepcopy: use state dicts")


def prepare(
    module: nn.Module,
    name: str,
    mask: Tensor,
    original: DTensor,
    parts: dict[tuple[int, int], Tensor],
) -> Callable[[], MaskHook]:
    """Prepares to put a mask on a DTensor parameter.

    Everything that can fail is done here, so that several masks are put all or none.

    Args:
        module: the module that holds the parameter.
        name: the name of the parameter in the module.
        mask: bool; a DTensor of the parameter's layout, or a whole mask, the same on all ranks.
        original: the parameter.
        parts: the parts of whole masks, by mask and parameter, which tied weights share.

    Returns:
        A function that puts the mask.

    Raises:
        ValueError: the mask has another shape or layout.
        TypeError: the parameter has ``Partial`` placements, so no rank has its values.
        RuntimeError: the parameter is gathered for a forward or backward that is still running.
    """
    where = f"{name} of {type(module).__name__}"
    check_layout(original, where)
    if mask.shape != original.shape:
        raise ValueError(
            f"the mask of {where} should have shape {tuple(original.shape)}, got "
            f"{tuple(mask.shape)}"
        )
    part = own_part(mask, original, f"the mask of {where}")
    if is_dtensor(mask):
        own: Tensor = mask
    else:
        key = id(mask), id(original)
        if key not in parts:
            here = part.to(local(original).device, copy=True).contiguous()
            parts[key] = like(original, here)
        own = parts[key]
    entry = _entry(module, name)
    if entry is None:
        pruned = original * own
        return functools.partial(
            put_mask, module, name, own, original, pruned, kind=ShardedMaskHook
        )
    entry.reshard(where)
    return functools.partial(_put_fully_sharded, module, name, own, original, entry)


def reshard(module: nn.Module, name: str) -> None:
    """Frees the gathered copy of a parameter under ``fully_shard``, if there is one.

    Raises:
        RuntimeError: as :func:`prepare`.
    """
    entry = _entry(module, name)
    if entry is not None:
        entry.reshard(f"{name} of {type(module).__name__}")


def _put_fully_sharded(
    module: nn.Module, name: str, mask: Tensor, original: Tensor, entry: fsdp.Managed
) -> MaskHook:
    if mask_of(module, name) is None:
        entry.rename(module, name, f"{name}_orig")
    hook = put_mask(module, name, mask, original, None, kind=FullyShardedMaskHook)
    assert isinstance(hook, FullyShardedMaskHook)
    _zero(original, mask)
    entry.show(module, name)
    hook.watch(module)
    return hook


def _entry(module: nn.Module, name: str) -> fsdp.Managed | None:
    return fsdp.managed(module, name if mask_of(module, name) is None else f"{name}_orig")


def _zero(tensor: Tensor, mask: Tensor) -> None:
    """Zeroes the local part of a tensor in place where the mask is False."""
    ops.zero_pruned_([local(tensor)], [bool_mask(local(mask))])
