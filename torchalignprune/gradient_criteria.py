"""Criteria that read the gradients of a training run, for a :class:`torchalignprune.Pruner`.

They watch the optimizers: right before each step they read the gradients that the step is about to
use, accumulated, unscaled and clipped. So they cost no extra backward. An optimizer that computes
its gradients within its step, from a closure, as LBFGS does, shows them none.

    >>> import torch, torchalignprune as tap
    >>> layer = torch.nn.Linear(4, 4)
    >>> params = [(layer, "weight")]
    >>> movement = tap.criteria.Movement(params)
    >>> schedule = tap.schedules.one_shot(0.5, at=2)
    >>> pruner = tap.Pruner(params, tap.Magnitude, schedule, criterion=movement)
    >>> optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    >>> for _ in range(2):
    ...     layer(torch.randn(8, 4)).square().mean().backward()
    ...     optimizer.step()
    ...     optimizer.zero_grad()
    ...     _ = pruner.step()
    >>> pruner.sparsity()
    0.5
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from torchalignprune.dtensors import is_dtensor, like, local, own_part
from torchalignprune.optimizers import (
    OptimizerWatch,
    gradient_scale,
    gradients,
    is_inner_step,
    overflowed,
)
from torchalignprune.parameters import Parameters, stored
from torchalignprune.targets import Pair, Target, targets_of

__all__ = ["GradientCriterion", "GradientMagnitude", "Movement", "Taylor"]


class GradientCriterion(ABC):
    """Sums up, step by step, what the gradients say about each entry.

    A subclass says what a step adds (:meth:`add`). The sums are float32 (float64 for float64
    parameters) and on the parameter's device; they take the memory of one more gradient in that
    dtype.

    Args:
        params: ``(module, name)`` pairs; tied weights count once.

    Attributes:
        targets: the parameters, in their order.
        steps: how many steps are in the sums.
    """

    signed = False
    """Whether scores are ranked by their value instead of their magnitude."""
    per_round = True
    """Whether a pruning step restarts the sums."""

    def __init__(self, params: Parameters) -> None:
        self.targets: list[Target] = [
            # Without the tensors, because calls such as ``model.to`` may replace them.
            replace(target, weight=target.weight.to("meta"), mask=None)
            for target in targets_of(params)
        ]
        self.steps = 0
        # Gives a weight the values that pruned entries had, where a Pruner lets them come back.
        self.restore: Callable[[int, Tensor], Tensor] = lambda number, weight: weight
        # None: no gradient yet.
        self._sums: list[Tensor | None] = [None] * len(self.targets)
        # The parameters whose gradients the current step has added. A step may call the step of
        # another optimizer, which may have only some of them; neither is to add a gradient twice.
        self._added: set[int] = set()
        # Parameters that have ever had a gradient, and those whose optimizer stepped without one.
        self._used: set[int] = set()
        self._passed_over: set[int] = set()
        self._watch = OptimizerWatch(self._before_step)

    @abstractmethod
    def add(self, total: Tensor, weight: Tensor, grad: Tensor, lr: float) -> None:
        """Add one step to the sum, in place.

        Args:
            total: the sum so far.
            weight: the weight that the gradient was taken at, in the dtype of the sum.
            grad: the gradient, likewise.
            lr: the learning rate of the parameter in this step.
        """

    def parameters(self) -> list[Tensor]:
        """The stored weights, without their masks."""
        return [stored(*target.places[0]) for target in self.targets]

    def _before_step(self, optimizer: Optimizer) -> None:
        if overflowed(optimizer):
            return
        parameters = self.parameters()
        if not is_inner_step():
            self._added.clear()
        grads = {
            number: grad
            for number, grad in enumerate(gradients(optimizer, parameters))
            if grad is not None and number not in self._added
        }
        if not grads:
            return
        self._added.update(grads)
        self._used.update(grads)
        scale = gradient_scale(optimizer)
        rates = {
            id(p): float(group.get("lr", 1.0))
            for group in optimizer.param_groups
            for p in group["params"]
        }
        self._passed_over.update(
            number for number, p in enumerate(parameters) if p.grad is None and id(p) in rates
        )
        for number, grad in grads.items():
            parameter = parameters[number]
            dtype = _sum_dtype(parameter)
            total = self._sums[number]
            if total is None or total.device != parameter.device:
                new = torch.zeros_like(parameter, dtype=dtype)
                total = self._sums[number] = new if total is None else new.copy_(total)
            weight = self.restore(number, parameter.detach())
            grad = grad.detach().to(dtype)
            if scale != 1:
                grad = grad / scale
            self.add(total, weight.to(dtype), grad, rates[id(parameter)])
        self.steps += 1

    def unseen(self) -> list[str]:
        """The names of the parameters whose sums have no gradient yet.

        Raises:
            RuntimeError: one of them requires no gradient, or has never had one although its
                optimizer stepped: waiting for it would be in vain.
        """
        names = []
        for number, (target, parameter) in enumerate(
            zip(self.targets, self.parameters(), strict=True)
        ):
            if self._sums[number] is not None:
                continue
            if number in self._passed_over - self._used:
                raise RuntimeError(
                    f"{type(self).__name__} has seen no gradient of {target.name} in any step of "
                    "its optimizer: leave out parameters that the forward does not use"
                )
            if not parameter.requires_grad:
                raise RuntimeError(
                    f"{type(self).__name__} has seen no gradient of {target.name}, which does not "
                    "require one: leave out frozen parameters"
                )
            names.append(target.name)
        return names

    def scores(self) -> dict[Pair, Tensor]:
        """The sums by ``(module, name)``, shaped like the parameters; tied weights share theirs.

        Raises:
            RuntimeError: a parameter has had no gradient yet, or none since the last pruning if
                that has restarted the sums.
        """
        result: dict[Pair, Tensor] = {}
        for target, total in zip(self.targets, self._sums, strict=True):
            if total is None:
                raise RuntimeError(
                    f"{type(self).__name__} has seen no gradient of {target.name} yet: it reads "
                    "them at each step of an optimizer that has the parameter"
                )
            result |= dict.fromkeys(target.places, total)
        return result

    def restart(self) -> None:
        """Start a new round: called by a Pruner after it has pruned."""
        if self.per_round:
            # Not zeros, which would rank a parameter that gets no gradient below all others.
            self._sums = [None] * len(self.targets)
            self.steps = 0

    def remove(self) -> None:
        """Stop watching."""
        self._watch.remove()

    def state_dict(self) -> dict[str, Any]:
        """The sums by parameter name, and how many steps are in them.

        A parameter that has had no gradient yet has zeros, because a distributed checkpoint loads
        only into tensors that the state already has.
        """
        found = list(zip(self.targets, self.parameters(), self._sums, strict=True))
        return {
            "criterion": type(self).__name__,
            "steps": self.steps,
            "without_gradient": [target.name for target, _, total in found if total is None],
            "sums": {
                target.name: torch.zeros_like(parameter.detach(), dtype=_sum_dtype(parameter))
                if total is None
                else total
                for target, parameter, total in found
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from a :meth:`state_dict`.

        Raises:
            ValueError: a state of another criterion; sums that are missing, of other parameters, or
                of other shapes.
        """
        sums = self.checked_sums(state)
        self._sums, self.steps = sums, int(state["steps"])
        # The state does not say which parameters had a gradient in earlier rounds.
        self._used = set(range(len(self.targets)))

    def checked_sums(self, state: Mapping[str, Any]) -> list[Tensor | None]:
        """Copies of the sums in a state, which is checked but not loaded.

        Raises:
            ValueError: as :meth:`load_state_dict`.
        """
        expected = {"criterion", "steps", "without_gradient", "sums"}
        if set(state) != expected:
            raise ValueError(
                f"the state of the criterion should have the keys {sorted(expected)}, got "
                f"{sorted(state)}"
            )
        if state["criterion"] != type(self).__name__:
            raise ValueError(
                f"the state should be of the criterion {type(self).__name__}, got "
                f"{state['criterion']}"
            )
        names = {target.name for target in self.targets}
        if unknown := sorted(set(state["sums"]) - names):
            raise ValueError(
                "the state of the criterion should have sums of its parameters only, got "
                f"{unknown[0]}"
            )
        if missing := sorted(names - set(state["sums"])):
            raise ValueError(
                f"the state of the criterion should have the sums of {missing[0]}, got none"
            )
        sums: list[Tensor | None] = []
        for target, parameter in zip(self.targets, self.parameters(), strict=True):
            total = state["sums"][target.name]
            if total.shape != parameter.shape:
                raise ValueError(
                    f"the sums of {target.name} should have shape {tuple(parameter.shape)}, got "
                    f"{tuple(total.shape)}"
                )
            own = own_part(total, parameter, f"the sums of {target.name}")
            own = own.to(local(parameter).device, copy=True)
            known = target.name not in state["without_gradient"]
            sums.append((like(parameter, own) if is_dtensor(parameter) else own) if known else None)
        return sums


def _sum_dtype(parameter: Tensor) -> torch.dtype:
    return torch.float64 if parameter.dtype == torch.float64 else torch.float32


class Taylor(GradientCriterion):
    r"""How much removing the entry changes the loss, to first order: :math:`\sum_t |g_t w_t|`.

    Molchanov et al. 2017, "Pruning convolutional neural networks for resource efficient
    inference", equation 7, for single weights. Summed over the steps since the last pruning.

    Args:
        params: ``(module, name)`` pairs; tied weights count once.

    Example:
        >>> import torch, torchalignprune as tap
        >>> layer = torch.nn.Linear(2, 1, bias=False)
        >>> _ = layer.weight.data.copy_(torch.tensor([[3.0, -4.0]]))
        >>> taylor = tap.criteria.Taylor([(layer, "weight")])
        >>> optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        >>> layer(torch.tensor([[1.0, 2.0]])).sum().backward()
        >>> optimizer.step()
        >>> taylor.scores()[layer, "weight"]
        tensor([[3., 8.]])
    """

    def add(self, total: Tensor, weight: Tensor, grad: Tensor, lr: float) -> None:
        total.add_((weight * grad).abs())


class GradientMagnitude(GradientCriterion):
    r"""How strongly the loss pulls at the entry: :math:`\sum_t |g_t|`.

    Summed over the steps since the last pruning.

    Args:
        params: ``(module, name)`` pairs; tied weights count once.

    Example:
        >>> import torch, torchalignprune as tap
        >>> layer = torch.nn.Linear(2, 1, bias=False)
        >>> pulled = tap.criteria.GradientMagnitude([(layer, "weight")])
        >>> optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        >>> layer(torch.tensor([[1.0, -2.0]])).sum().backward()
        >>> optimizer.step()
        >>> pulled.scores()[layer, "weight"]
        tensor([[1., 2.]])
    """

    def add(self, total: Tensor, weight: Tensor, grad: Tensor, lr: float) -> None:
        total.add_(grad.abs())


class Movement(GradientCriterion):
    r"""Whether training moves the entry away from zero: :math:`-\sum_t \alpha_t\, g_t w_t`.

    Sanh et al. 2020, "Movement pruning: adaptive sparsity by fine-tuning", equation 4;
    :math:`\alpha_t` is the learning rate of the step. The lowest values, not magnitudes, are pruned
    first, and the sums run over the whole training. In the paper pruned weights can come back; here
    they do with ``Pruner(..., regrow=True)``.

    Args:
        params: ``(module, name)`` pairs; tied weights count once.

    Example:
        >>> import torch, torchalignprune as tap
        >>> layer = torch.nn.Linear(2, 1, bias=False)
        >>> _ = layer.weight.data.copy_(torch.tensor([[3.0, -4.0]]))
        >>> movement = tap.criteria.Movement([(layer, "weight")])
        >>> optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
        >>> layer(torch.tensor([[1.0, 1.0]])).sum().backward()
        >>> optimizer.step()
        >>> movement.scores()[layer, "weight"]
        tensor([[-1.5000,  2.0000]])
    """

    signed = True
    per_round = False

    def add(self, total: Tensor, weight: Tensor, grad: Tensor, lr: float) -> None:
        total.addcmul_(weight, grad, value=-lr)
