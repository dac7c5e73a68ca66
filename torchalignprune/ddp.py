"""``DistributedDataParallel``: it is told not to send the masks at every forward, and a Pruner asks
whether they are the same on all ranks."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import prune

from torchalignprune.dtensors import local
from torchalignprune.parameters import some

__all__ = ["check_same_masks", "digest", "ignore_masks", "keep_mask"]

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


def check_same_masks(
    places: Sequence[tuple[nn.Module, str]], names: Sequence[str], masks: Sequence[Tensor]
) -> None:
    """Whether all ranks of a ``DistributedDataParallel`` have made the same masks; all call it.

    Known is the wrapper in which a parameter that is pruned already, be it by a mask of ones, was
    in its last forward, or that :func:`ignore_masks` was called with. Sends 16 bytes for each
    wrapper. Within ``join()``, where ranks that have no more batches do not come here, it is left.

    Args:
        places: a ``(module, name)`` pair of each parameter.
        names: what to call them.
        masks: the new masks.

    Raises:
        RuntimeError: on all ranks, where they are not the same.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    numbers: dict[DistributedDataParallel, list[int]] = {}
    for number, (module, name) in enumerate(places):
        wrapper = _wrapper_of(module, name)
        if wrapper is not None and not wrapper._join_config.enable:
            numbers.setdefault(wrapper, []).append(number)
    for wrapper, own in numbers.items():
        digests = torch.stack([digest(local(masks[i])) for i in own])
        if _same(digest(digests)[None], wrapper).all():
            continue
        wrong = [names[own[i]] for i in (~_same(digests, wrapper)).nonzero().flatten().tolist()]
        shown = some(wrong)
        raise RuntimeError(
            f"the ranks of DistributedDataParallel chose different masks for {shown}: what ranks "
            "the entries should be the same on all of them, such as the seed of the generator of "
            "Random, input norms (Calibration.merge what each rank has collected) and the weights"
        )


def _wrapper_of(module: nn.Module, name: str) -> DistributedDataParallel | None:
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, prune.BasePruningMethod) and hook._tensor_name == name:
            known = _IGNORED.get(hook)
            wrapper = None if known is None else known()
            return wrapper if isinstance(wrapper, DistributedDataParallel) else None
    return None


def _same(digests: Tensor, wrapper: DistributedDataParallel) -> Tensor:
    """Of each digest whether all ranks have it."""
    message = torch.stack([digests, ~digests])
    dist.all_reduce(message, op=dist.ReduceOp.MAX, group=wrapper.process_group)
    most, least = message.unbind()
    return most == ~least


def digest(tensor: Tensor) -> Tensor:
    """A number, int64, that differs where bytes differ, but for one case in some 2**60.

    A sum of products with random numbers, of what 4096 words each come to, level by level. It is
    the same on every device.
    """
    factors = torch.randint(-(2**62), 2**62, (4096,), generator=torch.Generator().manual_seed(0))
    factors = factors.to(tensor.device)
    values = tensor.contiguous().flatten().view(torch.uint8)
    words = nn.functional.pad(values, (0, -len(values) % 8)).view(torch.int64)
    while True:
        words = nn.functional.pad(words, (0, -len(words) % len(factors))).view(-1, len(factors))
        words = (words * factors).sum(dim=1)
        if len(words) <= 1:
            return words.sum()
