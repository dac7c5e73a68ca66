"""Finds the optimizers that move the weights, through hooks on their steps."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils.hooks import RemovableHandle

from torchalignprune.dtensors import local

__all__ = ["OptimizerWatch"]


class OptimizerWatch:
    """Knows every optimizer that has taken a step since it was made, and their states.

    No optimizer has to be passed in: torch calls its global hooks at the steps of all optimizers,
    so this works inside a Trainer too.

    Both functions are bound methods, of which only weak references are kept.

    Args:
        before_step: called with the optimizer before each of its steps, when the gradients are
            complete, unscaled and clipped.
        after_step: called with the optimizer after its first step, and after the first one since
            :meth:`look_again`; when it returns True, or the step could move nothing (a learning
            rate of 0, gradients that overflowed), after the next one too.
    """

    def __init__(
        self,
        before_step: Callable[[Optimizer], None] | None = None,
        after_step: Callable[[Optimizer], bool] | None = None,
    ) -> None:
        self._seen: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._before_step = None if before_step is None else weakref.WeakMethod(before_step)
        self._after_step = None if after_step is None else weakref.WeakMethod(after_step)
        self._settled: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        # Drop the watches that no longer exist.
        _WATCHES[:] = [watch for watch in _WATCHES if watch() is not None]
        _WATCHES.append(weakref.ref(self))
        if not _HANDLES:
            _HANDLES.append(register_optimizer_step_pre_hook(_before))
            _HANDLES.append(register_optimizer_step_post_hook(_after))

    def states(self, parameters: Iterable[Tensor]) -> list[tuple[int, Tensor]]:
        """The optimizers' states that have one number for each entry of a parameter.

        Returns:
            Pairs of the parameter's position and a floating-point tensor of its shape, such as the
            momentum of SGD and the two moments of Adam. Left out are states that belong to no
            single entry: those of another shape (Adafactor), of integers, or of quantized tensor
            types (8-bit optimizers).
        """
        found = []
        parameters = list(parameters)
        for optimizer in self._seen:
            for number, parameter in enumerate(parameters):
                # Not optimizer.state[parameter], which would add the missing key.
                for value in optimizer.state.get(parameter, {}).values():
                    if (
                        isinstance(value, Tensor)
                        and type(local(value)) is Tensor
                        and value.dim() > 0
                        and value.shape == parameter.shape
                        and value.is_floating_point()
                    ):
                        found.append((number, value))
        return found

    def before(self, optimizer: Optimizer) -> None:
        """An optimizer is about to take a step."""
        call = None if self._before_step is None else self._before_step()
        if call is not None:
            with torch.no_grad():
                call(optimizer)

    def after(self, optimizer: Optimizer) -> None:
        """An optimizer has taken a step."""
        if optimizer in self._settled:
            return
        self._seen.add(optimizer)
        call = None if self._after_step is None else self._after_step()
        if call is not None:
            with torch.no_grad():
                if call(optimizer) or overflowed(optimizer) or _rests(optimizer):
                    return
        self._settled.add(optimizer)

    def look_again(self) -> None:
        """Call ``after_step`` again after the next step of each optimizer."""
        self._settled.clear()

    def remove(self) -> None:
        """Stop watching."""
        _WATCHES[:] = [watch for watch in _WATCHES if watch() not in (None, self)]


# The two hooks are never removed: torch iterates over them while an optimizer steps, and just then
# the garbage collector may take a watch.
_WATCHES: list[weakref.ref[OptimizerWatch]] = []
_HANDLES: list[RemovableHandle] = []
# The wrapper that torch puts around the ``step`` of every optimizer; it calls the two hooks.
_STEP = Optimizer.profile_hook_step(lambda: None).__code__


def _before(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for watch in [reference() for reference in _WATCHES]:
        if watch is not None:
            watch.before(optimizer)


def _after(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for watch in [reference() for reference in _WATCHES]:
        if watch is not None:
            watch.after(optimizer)


def gradients(optimizer: Optimizer, parameters: Sequence[Tensor]) -> list[Tensor | None]:
    """The gradients that the optimizer is about to use, times its :func:`gradient_scale`.

    None for a parameter that it does not have or that has no gradient.
    """
    own = own_ids(optimizer)
    return [p.grad if id(p) in own else None for p in parameters]


def own_ids(optimizer: Optimizer) -> set[int]:
    """The ids of the parameters that an optimizer has."""
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


def is_inner_step() -> bool:
    """Whether the step that is about to run was called by another step.

    That is so within ``ZeroRedundancyOptimizer``, or if a subclass wraps ``step``: torch calls the
    hooks for both steps. The call stack tells, because a step that raises calls no hook at its end.
    False under ``torch.compile``.
    """
    if torch.compiler.is_compiling():
        return False
    steps = 0
    frame = sys._getframe(1).f_back
    while frame is not None and steps < 2:
        steps += frame.f_code is _STEP
        frame = frame.f_back
    return steps == 2


def gradient_scale(optimizer: Optimizer) -> float:
    """The scale that a GradScaler has left in the gradients for a fused optimizer to remove."""
    scale = getattr(optimizer, "grad_scale", None)
    return 1.0 if scale is None else float(scale)


def overflowed(optimizer: Optimizer) -> bool:
    """Whether a GradScaler has found gradients that are not finite.

    A fused optimizer is called all the same, and skips its step by itself.
    """
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)


def _rests(optimizer: Optimizer) -> bool:
    """Whether some parameters have a learning rate of 0, as at the beginning of a warm-up."""
    return any(float(group.get("lr", 1.0)) == 0 for group in optimizer.param_groups)
