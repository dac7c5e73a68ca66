"""Pruning during training: follows a sparsity schedule exactly, step by step."""

from __future__ import annotations

import functools
import inspect
import itertools
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.optim import Optimizer

from torchalignprune import ddp, ops, schedules, sharded_hooks
from torchalignprune.dtensors import is_dtensor, like, local, own_part
from torchalignprune.gradient_criteria import GradientCriterion
from torchalignprune.hooks import MaskHook, put_masks
from torchalignprune.limits import LayerShare, Limits
from torchalignprune.methods import Magnitude, Random
from torchalignprune.optimizers import OptimizerWatch, gradients, own_ids
from torchalignprune.parameters import (
    Parameters,
    bool_mask,
    mask_of,
    pairs_of,
    same_mask,
    some,
    stored,
)
from torchalignprune.pruning import Budget, PruningMethod
from torchalignprune.regularizers import CosineAlignment
from torchalignprune.schedules import Schedule
from torchalignprune.targets import Pair, PerParameter, Target, targets_of

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Pruner"]

_VERSION = 1


class Pruner:
    """Prunes parameters during training, to the sparsity that a schedule asks for.

    Call :meth:`step` after every step of the optimizer, and :meth:`finalize` at the end::

        optimizer.step()
        pruner.step()

    The sparsities of the schedule are absolute: the share of all entries that is pruned at that
    step. The pruner reaches it exactly, rounded to whole entries.

    The constructor gives every parameter its hook and its mask, so the keys of
    ``model.state_dict()`` stay the same from the first step to the last. To resume a run, save the
    states of the model, the optimizer and the pruner (:meth:`state_dict`); then make the three
    again and load them, the model first.

    Pruned entries are also set to zero in the stored weights and in the states of all optimizers
    that have stepped (the momentum of SGD, the moments of Adam). Their gradients are masked, so
    neither weight decay nor momentum moves them. Each pruning step therefore compares with the
    weights that earlier ones have left, unless there is a ``reference``, which never changes.

    Args:
        params: ``(module, name)`` pairs (:func:`torchalignprune.prunable_parameters`).
        method: a method of this package, such as ``AlignedMagnitude``; to set its options, a
            partial such as ``functools.partial(AlignedMagnitude, units="both")``.
        schedule: maps the number of calls of :meth:`step` to a sparsity in [0, 1]
            (:mod:`torchalignprune.schedules`). The constructor prunes to the sparsity at 0. When
            the schedule falls, the masks stay as they are unless ``regrow`` is set.
        reference: the unpruned weights. Passed to the method if that takes a reference and was not
            given its own; :meth:`log` reports the alignment with it.
        penalty: a regularizer; :meth:`log` reports it, and :meth:`state_dict` keeps its state.
        criterion: ranks the entries instead of the method: a criterion that watches the training,
            such as ``criteria.Movement(params)``, made with the same ``params``.
        budget: where the sparsity is counted: ``"global"``, ``"layer"`` or ``"unit"``. Default: the
            method's own.
        min_unit: the minimum number of entries that every unit keeps, so that none dies.
        max_layer_sparsity: the maximum share of each parameter that may be pruned; or a mapping
            from glob patterns (as in :func:`torchalignprune.prunable_parameters`) to shares, where
            the first pattern that matches counts.
        min_layer_sparsity: the minimum share of each parameter that is pruned, capped at the
            overall sparsity; or a mapping, likewise. The three limits need ``budget="global"`` or
            ``"layer"``.
        regrow: let pruned entries come back, with the values that they had when they were pruned
            (kept in as much memory as the parameters take). Each pruning step ranks all entries
            again, and a ``criterion`` also sees the gradients of pruned entries. ``True``: prune
            when the schedule's value changes; a number N: also every N steps.

    Raises:
        TypeError: an argument of the wrong type; a method that is not one of this package.
        ValueError: a sparsity of the schedule out of range; options that exclude each other.

    Example:
        >>> import torch, torchalignprune as tap
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 2))
        >>> params = tap.prunable_parameters(model)
        >>> schedule = tap.schedules.cubic(0.0, 0.5, end=4)
        >>> pruner = tap.Pruner(params, tap.AlignedMagnitude, schedule)
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> for _ in range(4):
        ...     model(torch.randn(4, 8)).square().mean().backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        ...     _ = pruner.step()
        >>> pruner.sparsity()
        0.5
        >>> pruner.finalize()
        >>> sorted(model.state_dict())
        ['0.bias', '0.weight', '1.bias', '1.weight']
    """

    def __init__(
        self,
        params: Parameters,
        method: Callable[..., PruningMethod],
        schedule: Schedule,
        *,
        reference: PerParameter | None = None,
        penalty: nn.Module | None = None,
        criterion: GradientCriterion | None = None,
        budget: Budget | None = None,
        min_unit: int = 0,
        max_layer_sparsity: LayerShare = 1.0,
        min_layer_sparsity: LayerShare = 0.0,
        regrow: bool | int = False,
    ) -> None:
        params = pairs_of(params)
        targets = targets_of(params)
        for target in targets:
            if target.weight.is_meta:
                raise ValueError(
                    f"{target.name} should have values, got a tensor on the meta device: call "
                    "model.to_empty(device=...) and load the weights first"
                )
        if not callable(schedule):
            raise TypeError(
                "schedule should be a function from the step to the sparsity, such as "
                f"schedules.constant(0.5), got {schedule!r}"
            )
        self.params = params
        self.schedule = schedule
        self.penalty = penalty
        self.criterion = criterion
        self._method = _make_method(method, reference, budget)
        limits = Limits(min_unit, max_layer_sparsity, min_layer_sparsity)
        if limits != Limits():
            limits.check([target.name for target in targets])
            if self._method.budget == "unit":
                raise ValueError(
                    "budget should be 'global' or 'layer' with min_unit, max_layer_sparsity or "
                    "min_layer_sparsity, got 'unit'"
                )
            self._method.limits = limits
        if penalty is not None and not isinstance(penalty, nn.Module):
            raise TypeError(
                f"penalty should be a regularizer such as CosineAlignment, got {penalty!r}"
            )
        if criterion is not None and not isinstance(criterion, GradientCriterion):
            raise TypeError(
                "criterion should be one that watches training, such as "
                f"criteria.Movement(params), got {criterion!r}"
            )
        if not isinstance(regrow, int) or regrow < 0:
            raise ValueError(f"regrow should be a bool or a number of steps, got {regrow!r}")
        if criterion is not None and isinstance(self._method, Random):
            raise ValueError(
                "criterion should be None for Random, which draws its own scores, got "
                f"{type(criterion).__name__}"
            )
        if criterion is not None:
            own = [target.places[0] for target in criterion.targets]
            if own != [target.places[0] for target in targets]:
                raise ValueError(
                    "criterion should be made with the same params as the pruner, got one made "
                    "with others"
                )
        self.regrow = bool(regrow)
        self._every = 0 if isinstance(regrow, bool) else regrow
        self._alignment = None if reference is None else CosineAlignment(params, reference)
        # Modules and names, because calls such as ``model.to`` may replace the tensors.
        self._places = [target.places for target in targets]
        self._names = [target.name for target in targets]
        self._step = 0
        self._target = self._sparsity_at(0)
        if criterion is not None and self._target > 0:
            raise ValueError(
                "schedule should begin with 0 when there is a criterion, which has seen no "
                f"gradient at first, got {self._target}"
            )
        # With ``regrow``, the values of pruned entries, and zeros elsewhere. The tensors have the
        # shapes and layouts of the parameters: a distributed checkpoint loads only into tensors of
        # the same shape, and then redistributes them when the number of ranks has changed.
        self._left: list[Tensor | None] = [None] * len(targets)
        self._finished = False
        self._final_sparsity = 0.0
        masks = self._new_masks(targets) if self._target > 0 else _own_masks(targets)
        self._watch = OptimizerWatch(
            self._mask_gradients if self.regrow and criterion is not None else None,
            self._keep_zeros,
        )
        self._put(targets, masks)
        if regrow and criterion is not None:
            criterion.restore = self._restored

    @classmethod
    def freeze(
        cls,
        params: Parameters,
        *,
        reference: PerParameter | None = None,
        penalty: nn.Module | None = None,
    ) -> Self:
        """A pruner that only keeps the zeros of an already sparse model through training.

        Entries that are exactly zero or already masked stay so. Its :meth:`step` prunes nothing.

        Args:
            params: ``(module, name)`` pairs.
            reference: as in :class:`Pruner`.
            penalty: as in :class:`Pruner`.

        Raises:
            ValueError: the parameters have no zeros.

        Example:
            >>> import torch, torchalignprune as tap
            >>> layer = torch.nn.Linear(2, 1)
            >>> _ = layer.weight.data.copy_(torch.tensor([[3.0, 0.0]]))
            >>> pruner = tap.Pruner.freeze([(layer, "weight")])
            >>> layer.weight_mask
            tensor([[ True, False]])
        """
        params = pairs_of(params)
        targets = targets_of(params)
        masks = [
            target.weight != 0 if target.mask is None else target.mask & (target.weight != 0)
            for target in targets
        ]
        kept = [replace(target, mask=mask) for target, mask in zip(targets, masks, strict=True)]
        if all(target.remaining() == target.weight.numel() for target in kept):
            raise ValueError(
                f"params should have zeros to keep, got {len(targets)} parameters without any: is "
                "this the sparse checkpoint?"
            )
        pruner = cls(
            params, Magnitude, schedules.constant(0.0), reference=reference, penalty=penalty
        )
        pruner._put(targets, masks)
        return pruner

    @property
    def steps(self) -> int:
        """The number of calls of :meth:`step` so far."""
        return self._step

    @property
    def finished(self) -> bool:
        """Whether :meth:`finalize` has been called."""
        return self._finished

    def step(self) -> bool:
        """Count one step of training, and prune if the schedule asks for it.

        Call it after ``optimizer.step()``. If a criterion lacks the gradient of a parameter, for
        example because a gradient scaler skipped its optimizer, pruning waits for the next step
        (periodic pruning by ``regrow=N`` for the next multiple of N), with a warning. Criteria that
        start anew after each pruning need a gradient since then; ``Movement``, which does not,
        needs one from any step.

        Returns:
            Whether new masks were chosen.

        Raises:
            RuntimeError: after :meth:`finalize`; a mask that is gone; a parameter of which the
                criterion will see no gradient because it is frozen or the forward does not use it;
                ranks of a ``DistributedDataParallel`` that choose different masks.
            ValueError: a sparsity that is out of range or that the limits do not allow; NaN among
                the weights. The masks and the number of steps are then unchanged.
        """
        step = self._step + 1
        sparsity = self.schedule(step)
        if not self._finished:
            # Only one here, because there may be many; all are checked before pruning.
            self._check_masks(1)
        due = sparsity != self._target or (self._every and step % self._every == 0)
        if not due and not self._finished:
            self._step = step
            return False
        return self._prune(step)

    def _prune(self, step: int) -> bool:
        self._check_unfinished()
        self._check_masks()
        sparsity = self._sparsity_at(step)
        if sparsity < self._target and not self.regrow:
            self._step, self._target = step, sparsity
            return False
        unseen = [] if self.criterion is None else self.criterion.unseen()
        if self.criterion is not None and unseen:
            since = " since the last pruning" if self.criterion.per_round else ""
            warnings.warn(
                f"the pruning due at step {step} is postponed: {type(self.criterion).__name__} has "
                f"seen no gradient of {some(unseen)}{since}. It reads the gradients at each step "
                "of an optimizer that has the parameter",
                UserWarning,
                stacklevel=3,
            )
            self._step = step
            return False
        self._target, before = sparsity, self._target
        try:
            with torch.no_grad():
                targets = self._targets()
                masks = self._new_masks(targets)
            self._put(targets, masks)
        except BaseException:
            self._target = before
            raise
        if self.criterion is not None:
            self.criterion.restart()
        self._step = step
        return True

    def sparsity(self) -> float:
        """The share of all entries that is pruned; after :meth:`finalize`, its final value.

        Raises:
            RuntimeError: a mask is gone.
        """
        if self._finished:
            return self._final_sparsity
        self._check_masks()
        return self._counted_sparsity()

    def _counted_sparsity(self) -> float:
        size, pruned = 0, 0
        for target in targets_of(self.params):
            size += target.weight.numel()
            pruned += target.weight.numel() - target.remaining()
        return pruned / max(size, 1)

    @torch.no_grad()
    def log(self) -> dict[str, float]:
        """Metrics for a training log.

        Returns:
            ``pruning/sparsity`` and ``pruning/target_sparsity``; with a reference
            ``pruning/alignment``, the mean cosine of the units with it; with a penalty
            ``pruning/penalty``, not multiplied by any strength.
        """
        found = {
            "pruning/sparsity": self.sparsity(),
            "pruning/target_sparsity": self._target,
        }
        if self._alignment is not None:
            found["pruning/alignment"] = 1.0 - float(self._alignment())
        if self.penalty is not None:
            found["pruning/penalty"] = float(self.penalty())
        return found

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs besides the states of the model and the optimizer.

        Returns:
            A nested dict of numbers, strings and tensors. The masks are not in it but in the
            model's state. To check them, it has the number of entries that they prune and, unless
            they are sharded, a digest of them.

        Raises:
            RuntimeError: after :meth:`finalize`.
        """
        self._check_unfinished()
        targets = targets_of(self.params)
        state: dict[str, Any] = {
            "version": _VERSION,
            "method": type(self._method).__name__,
            "step": self._step,
            "target_sparsity": self._target,
            "pruned": _counts(targets),
            "masks": _mask_digest([target.mask for target in targets]),
        }
        if self.criterion is not None:
            state["criterion"] = self.criterion.state_dict()
        if self.penalty is not None:
            state["penalty"] = self.penalty.state_dict()
            if isinstance(self.penalty, CosineAlignment):
                state["matching"] = self.penalty.matching_state()
        if self.regrow:
            left = zip(self._names, self._left, strict=True)
            state["left"] = {name: values for name, values in left if values is not None}
        generator = getattr(self._method, "generator", None)
        if generator is not None:
            state["generator"] = generator.get_state()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from a :meth:`state_dict`; load the model's own state first.

        Args:
            state: from a pruner of the same parameters, method and options.

        Raises:
            ValueError: a state of other parameters or options, or one that does not belong to the
                model's masks.
        """
        self.check_state(state)
        left = self._loaded_left(state)
        self._clear()
        if self.criterion is not None:
            self.criterion.load_state_dict(state["criterion"])
        if self.penalty is not None:
            self.penalty.load_state_dict(state["penalty"])
            if isinstance(self.penalty, CosineAlignment):
                self.penalty.load_matching_state(state["matching"])
        self._left = left
        if "generator" in state:
            self._method.generator.set_state(state["generator"].cpu())  # type: ignore[attr-defined]
        self._step = int(state["step"])
        self._target = float(state["target_sparsity"])
        self._watch.look_again()

    def check_state(
        self, state: Mapping[str, Any], masks: Mapping[str, Tensor] | None = None
    ) -> None:
        """Check that :meth:`load_state_dict` would accept a state, without loading it.

        If tied parameters no longer share their mask, they are given the one that belongs to the
        state.

        Args:
            state: as for :meth:`load_state_dict`.
            masks: the masks that the model is going to have, by parameter name. Default: its
                current masks.

        Raises:
            ValueError: as :meth:`load_state_dict`.
        """
        self._check_unfinished()
        self._tie_masks(state)
        expected = self.state_dict()
        if state.get("version") != _VERSION:
            raise ValueError(
                f"the state should be of version {_VERSION}, got {state.get('version')!r}"
            )
        if set(state) != set(expected):
            raise ValueError(
                f"the state should have the keys {sorted(expected)}, as this pruner's options ask "
                f"for, got {sorted(state)}"
            )
        if state["method"] != expected["method"]:
            raise ValueError(f"the state should be of {expected['method']}, got {state['method']}")
        if set(state["pruned"]) != set(self._names):
            other = sorted(set(state["pruned"]) ^ set(self._names))
            raise ValueError(
                f"the state should be of the pruner's parameters, got some not in both: {other}"
            )
        targets = targets_of(self.params)
        if masks is not None:
            targets = [replace(target, mask=masks[target.name]) for target in targets]
        for name, count in _counts(targets).items():
            if state["pruned"][name] != count:
                raise ValueError(
                    f"{name} should have {state['pruned'][name]} pruned entries, as in the state, "
                    f"got {count}: load the model's state_dict that was saved with it first"
                )
        digest = _mask_digest([target.mask for target in targets])
        if None not in (digest, state["masks"]) and digest != state["masks"]:
            raise ValueError(
                "the model should have the masks that the state was saved with, got masks that "
                "prune other entries: load the model's state_dict that was saved with it first"
            )
        self._loaded_left(state)
        if self.criterion is not None:
            self.criterion.checked_sums(state["criterion"])
        if self.penalty is not None:
            _check_tensors(state["penalty"], expected["penalty"], "the state of the penalty")
            if isinstance(self.penalty, CosineAlignment):
                self.penalty.checked_indices(state["matching"])
        if "generator" in state:
            found, own = ({"generator": each["generator"]} for each in (state, expected))
            _check_tensors(found, own, "the state")

    def look_again(self) -> None:
        """Adopt the model's masks after its state was loaded in the middle of a run.

        The next step prunes to the sparsity that the schedule asks for. To resume a run, or with
        ``regrow``, call :meth:`load_state_dict` instead: the values that pruned entries may take
        back are in the pruner's state, not in the model's. Without it, entries that this pruner has
        not pruned itself come back as zeros; a warning names their parameters.
        """
        self._check_unfinished()
        sparsity = self.sparsity()
        self._clear()
        self._watch.look_again()
        self._target = sparsity
        names = self._without_values()
        if names:
            warnings.warn(
                f"pruned entries of {some(names)} have no value to take back but 0: call "
                "load_state_dict with the pruner's state that was saved with the model's",
                UserWarning,
                stacklevel=2,
            )

    def finalize(self) -> None:
        """Remove the hooks and masks and keep the zeros: the model is an ordinary one again.

        A second call does nothing.
        """
        if self._finished:
            return
        self._final_sparsity = self._counted_sparsity()
        for places in self._places:
            for module, name in places:
                if mask_of(module, name) is not None:
                    prune.remove(module, name)
        self._watch.remove()
        if self.criterion is not None:
            self.criterion.remove()
        self._finished = True

    def __repr__(self) -> str:
        return (
            f"Pruner({len(self._names)} parameters, {type(self._method).__name__}, step "
            f"{self._step}, sparsity {self._target:.4g})"
        )

    def _sparsity_at(self, step: int) -> float:
        sparsity = float(self.schedule(step))
        if not 0 <= sparsity <= 1:
            raise ValueError(
                f"schedule should give a sparsity in [0, 1], got {sparsity} at step {step}"
            )
        return sparsity

    def _check_unfinished(self) -> None:
        if self._finished:
            raise RuntimeError("the pruner is finished: finalize() has removed its hooks")

    def _check_masks(self, first: int | None = None) -> None:
        """Raises unless the masks of all parameters, or of the first few, are still there."""
        for name, places in zip(self._names[:first], self._places[:first], strict=True):
            if any(mask_of(*place) is None for place in places):
                raise RuntimeError(
                    f"the mask of {name} is gone: something else, such as prune.remove or another "
                    "pruner's finalize(), has removed it"
                )

    def _targets(self) -> list[Target]:
        """The parameters as they are now; with ``regrow`` all their entries are candidates."""
        targets = targets_of(self.params)
        if not self.regrow:
            return targets
        return [
            replace(target, weight=self._restored(number, target.weight), mask=None)
            for number, target in enumerate(targets)
        ]

    def _new_masks(self, targets: Sequence[Target]) -> list[Tensor]:
        self._method.absolute, self._method.amount = True, self._target
        if self.criterion is None:
            masks = self._method.masks(targets)
        else:
            known = self.criterion.scores()
            scores = [known[target.places[0]] for target in targets]
            masks = self._method.masks(targets, scores, signed=self.criterion.signed)
        ddp.check_same_masks([places[0] for places in self._places], self._names, masks)
        return masks

    def _put(self, targets: Sequence[Target], masks: Sequence[Tensor]) -> None:
        """Put the masks in place, and zeros wherever they prune."""
        parameters = [stored(*places[0]) for places in self._places]
        for parameter, places in zip(parameters, self._places, strict=True):
            if is_dtensor(parameter):
                # First, because it raises in the middle of a forward.
                for module, name in places:
                    sharded_hooks.reshard(module, name)
        left: list[Tensor | None] = []
        if self.regrow:
            for target, mask in zip(targets, masks, strict=True):
                weight = target.weight
                gone = local(weight.detach()).masked_fill(local(mask), 0)
                left.append(like(weight, gone) if is_dtensor(weight) else gone)
        shown = [
            (module, name, mask)
            for places, mask in zip(self._places, masks, strict=True)
            for module, name in places
        ]
        try:
            if self.regrow:
                for parameter, target in zip(parameters, targets, strict=True):
                    local(parameter.detach()).copy_(local(target.weight))
            hooks = put_masks(shown, zeroed=True)
        except BaseException:
            # The old masks are still in place: zero again what has come back.
            kept = zip(self._places, self._left, strict=True)
            self._clear([own[0] for own, values in kept if values is not None])
            raise
        if self.regrow:
            self._left = left
        for hook in hooks:
            hook.straight_through = self.regrow and self.criterion is not None
        self._clear()
        self._watch.look_again()
        for hook, (module, name, _) in zip(hooks, shown, strict=True):
            # Otherwise gradients would reach pruned entries only from the next forward on. The
            # weights are zero there by now, so on the CPU the product shares their memory.
            if hook.straight_through and type(hook) is MaskHook:
                setattr(module, name, hook.apply_mask(module))

    def _keep_zeros(self, optimizer: Optimizer) -> bool:
        """Zero the pruned entries that a step of an optimizer has moved; returns whether it did.

        Few optimizers move any: one whose momentum is older than the pruner, and, at every step,
        those that mix the entries of a parameter (Muon).
        """
        # No other optimizer's: this one may have stepped in the middle of a backward.
        own = own_ids(optimizer)
        places = [places[0] for places in self._places if id(stored(*places[0])) in own]
        moved = False
        for place in places:
            weight, mask = local(stored(*place).detach()), mask_of(*place)
            if mask is not None:
                kept = ops.apply_mask(weight, bool_mask(local(mask)))
                moved = moved or not torch.equal(weight, kept)
        if moved:
            self._clear(places)
        return moved

    def _clear(self, places: Iterable[Pair] | None = None) -> None:
        """Zero the pruned entries in the stored weights and in the optimizers' states.

        Args:
            places: one place of each parameter to clear. Default: all parameters.
        """
        chosen = [own[0] for own in self._places] if places is None else list(places)
        parameters = [stored(*place) for place in chosen]
        masks = [mask_of(*place) for place in chosen]
        own = [None if mask is None else bool_mask(local(mask)) for mask in masks]
        tensors, covers = [], []
        for parameter, cover in zip(parameters, own, strict=True):
            if cover is not None:
                tensors.append(local(parameter.detach()))
                covers.append(cover)
        for number, state in self._watch.states(parameters):
            cover = own[number]
            if cover is not None:
                tensors.append(local(state))
                covers.append(cover)
        for device in {tensor.device for tensor in tensors}:
            here = [n for n, tensor in enumerate(tensors) if tensor.device == device]
            ops.zero_pruned_([tensors[n] for n in here], [covers[n] for n in here])

    def _tie_masks(self, state: Mapping[str, Any]) -> None:
        """Let tied parameters share the mask that belongs to the state.

        ``model.to`` copies a shared mask once for each module, and a checkpoint of Transformers
        stores it under only one of its names.
        """
        found = [
            [mask for place in places if (mask := mask_of(*place)) is not None]
            for places in self._places
        ]
        if all(mask is masks[0] for masks in found for mask in masks):
            return
        # Without duplicates, since all combinations are tried.
        for chosen in itertools.product(*map(_distinct, found)):
            digest = _mask_digest(chosen)
            if digest is not None and digest == state.get("masks"):
                for places, mask in zip(self._places, chosen, strict=True):
                    for module, attribute in places:
                        module.register_buffer(f"{attribute}_mask", mask)
                return

    def _restored(self, number: int, weight: Tensor) -> Tensor:
        """The weight, with pruned entries at the values that they had."""
        left = self._left[number]
        mask = mask_of(*self._places[number][0])
        if left is None or mask is None:
            return weight.clone()
        part = local(weight)
        # The model may have been moved or converted since.
        whole = torch.where(local(mask) == 0, local(left).to(part), part)
        return like(weight, whole) if is_dtensor(weight) else whole

    def _without_values(self) -> list[str]:
        """With ``regrow``, the parameters with pruned entries that could only come back as 0."""
        names = []
        for name, left, places in zip(self._names, self._left, self._places, strict=True):
            mask = mask_of(*places[0])
            if left is not None and mask is not None:
                pruned = local(mask) == 0
                if bool((pruned & (local(left).to(pruned.device) == 0)).any()):
                    names.append(name)
        return names

    def _loaded_left(self, state: Mapping[str, Any]) -> list[Tensor | None]:
        if not self.regrow:
            return [None] * len(self._names)
        left: list[Tensor | None] = []
        for name, places in zip(self._names, self._places, strict=True):
            weight = stored(*places[0])
            values = state["left"].get(name)
            if values is None or values.shape != weight.shape:
                raise ValueError(
                    f"the state should have the values that {name} may take back, of shape "
                    f"{tuple(weight.shape)}, got {None if values is None else tuple(values.shape)}"
                )
            part = own_part(values, weight, f"what {name} may take back")
            part = part.to(local(weight).device, copy=True)
            left.append(like(weight, part) if is_dtensor(weight) else part)
        return left

    def _mask_gradients(self, optimizer: Optimizer) -> None:
        """Zero the gradients of pruned entries, which the criterion has read, for the optimizer."""
        parameters = [stored(*places[0]) for places in self._places]
        for places, grad in zip(self._places, gradients(optimizer, parameters), strict=True):
            mask = mask_of(*places[0])
            if grad is not None and mask is not None:
                local(grad).masked_fill_(local(mask) == 0, 0)


def _make_method(
    method: Callable[..., PruningMethod], reference: PerParameter | None, budget: Budget | None
) -> PruningMethod:
    kind = method.func if isinstance(method, functools.partial) else method
    if not (isinstance(kind, type) and issubclass(kind, PruningMethod)):
        raise TypeError(
            "method should be one of torchalignprune's methods, such as AlignedMagnitude, or a "
            f"functools.partial of one, got {method!r}"
        )
    takes = inspect.signature(kind).parameters
    if "amount" not in takes:
        raise TypeError(
            f"method should take an amount, which follows the schedule, got {kind.__name__}: prune "
            "with it once, and keep its masks with Pruner.freeze(params)"
        )
    given = method.keywords if isinstance(method, functools.partial) else {}
    options: dict[str, Any] = {}
    if reference is not None and "reference" in takes and "reference" not in given:
        options["reference"] = reference
    if budget is not None:
        options["budget"] = budget
    return method(amount=0.0, **options)


def _own_masks(targets: Sequence[Target]) -> list[Tensor]:
    masks = []
    for target in targets:
        mask = target.mask
        if mask is None:
            mask = torch.ones_like(target.weight, dtype=torch.bool)
        # Autograd cannot save a mask that was made in inference mode.
        masks.append(mask.clone() if mask.is_inference() else mask)
    return masks


def _distinct(masks: Sequence[Tensor]) -> list[Tensor]:
    """The masks, without those that prune the same entries as an earlier one."""
    kept: list[Tensor] = []
    for mask in masks:
        if not any(same_mask(mask, other) for other in kept):
            kept.append(mask)
    return kept


def _counts(targets: Sequence[Target]) -> dict[str, int]:
    """How many entries of each parameter are pruned."""
    return {target.name: target.weight.numel() - target.remaining() for target in targets}


def _mask_digest(masks: Sequence[Tensor | None]) -> int | None:
    """A number that tells masks apart; None if they are sharded: each rank has other parts."""
    if any(mask is None or is_dtensor(mask) for mask in masks):
        return None
    digests = [ddp.digest(mask != 0).cpu() for mask in masks if mask is not None]
    return int(ddp.digest(torch.stack(digests))) if digests else None


def _check_tensors(found: Mapping[str, Any], expected: Mapping[str, Any], what: str) -> None:
    if set(found) != set(expected):
        raise ValueError(f"{what} should have the keys {sorted(expected)}, got {sorted(found)}")
    for name, own in expected.items():
        if isinstance(own, Tensor) and getattr(found[name], "shape", None) != own.shape:
            raise ValueError(
                f"{what} should have a tensor of shape {tuple(own.shape)} as {name}, got "
                f"{found[name]!r}"
            )
