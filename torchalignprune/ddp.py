"""``DistributedDataParallel``: masks are not broadcast, but checked to be the same on all ranks."""

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

# For each pruning hook, the wrapper that was last told to ignore its mask.
_IGNORED: weakref.WeakKeyDictionary[object, weakref.ref[nn.Module]] = weakref.WeakKeyDictionary()


def ignore_masks(ddp: DistributedDataParallel) -> None:
    """Stops ``DistributedDataParallel`` from broadcasting the masks of pruned parameters.

    By default (``broadcast_buffers=True``) it broadcasts all buffers from rank 0 at every forward,
    and so one byte for each weight with a mask. This is not needed, because every rank chooses the
    same masks by the same rule from the same weights.

    In a model that is not compiled, the first forward with masks calls this, so they are sent once.
    Under ``torch.compile`` no hook runs outside of the compiled code: call it yourself once the
    model is wrapped and has its masks.

    Args:
        ddp: the wrapped model.

    Raises:
        TypeError: ``ddp`` is not a ``DistributedDataParallel``.

    Example::

        pruner = tap.Pruner(params, tap.AlignedMagnitude, schedule)
        ddp = DistributedDataParallel(model)
        tap.ddp.ignore_masks(ddp)
        step = torch.compile(ddp)
    """
    if not isinstance(ddp, DistributedDataParallel):
        raise TypeError(
            f"ddp should be a DistributedDataParallel, got {type(ddp).__name__}: call this after "
            "wrapping the model"
        )
    itself: weakref.ref[nn.Module] = weakref.ref(ddp)
    names = set()
    for prefix, module in ddp.module.named_modules(remove_duplicate=False):
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, prune.BasePruningMethod):
                names.add(f"{prefix}.{hook._tensor_name}_mask".lstrip("."))
                _IGNORED[hook] = itself
    # DDP reads this whenever it collects the buffers to broadcast.
    ddp.parameters_to_ignore |= names
    if all(name in ddp.parameters_to_ignore for name, _ in ddp.module.named_buffers()):
        # DDP cannot broadcast an empty list.
        ddp.broadcast_buffers = False


def keep_mask(hook: prune.BasePruningMethod) -> None:
    """Calls :func:`ignore_masks` if the hook of a pruned parameter runs in a new wrapper."""
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
    """Checks that all ranks of a ``DistributedDataParallel`` chose the same masks.

    All ranks should call it. It finds the wrapper of a parameter from its last forward with a mask,
    be it of ones, or from :func:`ignore_masks`, and sends 16 bytes for each wrapper. Wrappers in
    ``join()`` are skipped, because ranks without batches do not get here.

    Args:
        places: a ``(module, name)`` pair for each parameter.
        names: the names of the parameters.
        masks: the new masks.

    Raises:
        RuntimeError: the masks differ; on all ranks.
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
            f"the ranks of DistributedDataParallel chose different masks for {shown}: everything "
            "that ranks the entries should be the same on all of them, such as the weights, the "
            "seed of Random's generator and input norms (use Calibration.merge on all ranks)"
        )


def _wrapper_of(module: nn.Module, name: str) -> DistributedDataParallel | None:
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, prune.BasePruningMethod) and hook._tensor_name == name:
            known = _IGNORED.get(hook)
            wrapper = None if known is None else known()
            return wrapper if isinstance(wrapper, DistributedDataParallel) else None
    return None


def _same(digests: Tensor, wrapper: DistributedDataParallel) -> Tensor:
    """Which digests are the same on all ranks."""
    message = torch.stack([digests, ~digests])
    dist.all_reduce(message, op=dist.ReduceOp.MAX, group=wrapper.process_group)
    most, least = message.unbind()
    return most == ~least


def digest(tensor: Tensor) -> Tensor:
    """An int64 hash of the bytes of a tensor, the same on every device.

    Different bytes collide with a probability of about 2**-60. Each level of the hash replaces 4096
    words by the sum of their products with random numbers.
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
