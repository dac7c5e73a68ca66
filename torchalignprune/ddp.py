"""What ``DistributedDataParallel`` is told of the masks: not to send them at every forward."""

from __future__ import annotations

import weakref

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import prune

__all__ = ["ignore_masks", "keep_mask"]

# The model that the hook was last ignored in, by the hook.
_IGNORED: weakref.WeakKeyDictionary[object, weakref.ref[nn.Module]] = weakref.WeakKeyDictionary()


def ignore_masks(ddp: DistributedDataParallel) -> None:
    """Let ``DistributedDataParallel`` not broadcast the masks of pruned parameters any more.

    It broadcasts all buffers from rank 0 at every forward (``broadcast_buffers=True``, the
    default), and so a byte for each weight that has a mask. The masks are the same on every rank
    without that: they are chosen by the same rule from the same weights.

    In a model that is not compiled this happens by itself in the first forward with masks, so that
    they are sent once. Under ``torch.compile`` no hook runs outside of the compiled code: call it
    when the model is wrapped and has its masks.

    Args:
        ddp: the wrapped model.

    Raises:
        TypeError: not a ``DistributedDataParallel``.

    Example::

        pruner = tap.Pruner(params, tap.AlignedMagnitude, schedule)
        ddp = DistributedDataParallel(model)
        tap.ddp.ignore_masks(ddp)
        step = torch.compile(ddp)
    """
    if not isinstance(ddp, DistributedDataParallel):
        raise TypeError(
            f"ddp should be a DistributedDataParallel, got {type(ddp).__name__}: what is not one "
            "yet takes it by itself, or when it is wrapped"
        )
    itself: weakref.ref[nn.Module] = weakref.ref(ddp)
    names = set()
    for prefix, module in ddp.module.named_modules(remove_duplicate=False):
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, prune.BasePruningMethod):
                names.add(f"{prefix}.{hook._tensor_name}_mask".lstrip("."))
                _IGNORED[hook] = itself
    # DDP reads it whenever it looks for buffers to send.
    ddp.parameters_to_ignore |= names
    if all(name in ddp.parameters_to_ignore for name, _ in ddp.module.named_buffers()):
        # It does not broadcast a list of none.
        ddp.broadcast_buffers = False


def keep_mask(hook: prune.BasePruningMethod) -> None:
    """Called in every forward of a pruned parameter, with its hook."""
    if torch.compiler.is_compiling():
        return
    active = DistributedDataParallel._active_ddp_module
    if active is None:
        return
    known = _IGNORED.get(hook)
    if known is None or known() is not active:
        ignore_masks(active)
