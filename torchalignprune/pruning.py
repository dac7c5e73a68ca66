"""From rankings to masks: for one parameter, in torch's own functions, or for many at once."""

from __future__ import annotations

import math
import numbers
import warnings
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from torchalignprune import ops, sharded_limits, sharding
from torchalignprune.dtensors import is_dtensor
from torchalignprune.hooks import MaskHook, put_masks
from torchalignprune.limits import Limits
from torchalignprune.parameters import DTYPES, Parameters, parameter_names
from torchalignprune.ranking import Ranking
from torchalignprune.targets import (
    Pair,
    Target,
    check_readable,
    parameters_of_caller,
    targets_from_history,
    targets_of,
)

__all__ = ["Budget", "PruningMethod", "global_unstructured"]

Budget = Literal["global", "layer", "unit"]


class PruningMethod(prune.BasePruningMethod):
    """Base class of the methods: the amount, where it is counted, and torch's protocol.

    A subclass says how entries are ranked (:meth:`ranking`).
    """

    PRUNING_TYPE = "unstructured"

    def __init__(
        self,
        amount: float,
        *,
        structure: Parameters | None = None,
        budget: Budget = "global",
    ) -> None:
        prune._validate_pruning_amount_init(amount)
        if math.isnan(amount):
            raise ValueError(f"amount should be a number, got {amount}")
        if budget not in get_args(Budget):
            raise ValueError(f"budget should be one of {get_args(Budget)}, got {budget!r}")
        self.amount = amount
        self.budget = budget
        self.magnitude_will_do = True
        self.structure = None if structure is None else list(structure)
        # A Pruner sets these: whether the amount is a share of all entries instead of those that
        # remain, and limits on what units and parameters may lose.
        self.absolute = False
        self.limits: Limits | None = None

    @abstractmethod
    def ranking(self, targets: Sequence[Target]) -> Ranking:
        """How much each entry of the targets is worth."""

    def prepare(self, targets: Sequence[Target]) -> list[Target]:
        """The targets, with what the method needs to know of each; raises if they do not fit."""
        return list(targets)

    def unit_dim(self, target: Target) -> int:
        """The dimension of the units in which ``budget="unit"`` counts."""
        return target.out_dim

    def masks(
        self,
        targets: Sequence[Target],
        scores: Sequence[Tensor | None] | None = None,
        *,
        signed: bool = False,
    ) -> list[Tensor]:
        """The new masks of all the targets; entries that are already pruned stay pruned.

        Args:
            targets: the parameters.
            scores: ranked by their magnitude instead of the method's own ranking. If only some
                targets have scores, the others are ranked by their weights.
            signed: rank the scores, one for each target, by their value instead.

        Returns:
            bool masks, shaped like the weights.
        """
        if sharding.are_sharded(targets):
            return sharding.masks(self, targets, scores, signed)
        targets = self.prepare(targets)
        given = self.completed(targets, scores)
        return self.new_masks(targets, given, signed)

    @staticmethod
    def completed(
        targets: Sequence[Target], scores: Sequence[Tensor | None] | None
    ) -> Sequence[Tensor | None]:
        """The scores of the targets, with weights for those that lack scores; or all None."""
        if scores is None or all(score is None for score in scores):
            return [None] * len(targets)
        return [t.weight if s is None else s for s, t in zip(scores, targets, strict=True)]

    def check_sharded(self) -> None:
        """Raises if the method cannot prune sharded parameters."""

    def new_masks(
        self,
        targets: Sequence[Target],
        scores: Sequence[Tensor | None],
        signed: bool = False,
    ) -> list[Tensor]:
        """The new masks of targets that :meth:`prepare` has returned."""
        if self.budget == "global":
            return self._prune_together(targets, scores, signed)
        masks = []
        for target, score in zip(targets, scores, strict=True):
            if self.budget == "layer" or target.weight.dim() < 2:
                masks += self._prune_together([target], [score], signed)
            else:
                masks.append(self._prune_units(target, score, signed))
        return masks

    def _prune_together(
        self,
        targets: Sequence[Target],
        scores: Sequence[Tensor | None],
        signed: bool = False,
    ) -> list[Tensor]:
        def count_of(remaining: int) -> int:
            if self.absolute:
                size = sum(t.weight.numel() if t.shard is None else t.shard.numel for t in targets)
                count = max(0, round(self.amount * size) - (size - remaining))
            else:
                count = int(prune._compute_nparams_toprune(self.amount, remaining))
            if count > remaining:
                where = targets[0].name if len(targets) == 1 else f"the {len(targets)} parameters"
                raise ValueError(
                    f"amount={self.amount} should not be larger than the number of entries of "
                    f"{where} that are not pruned yet, {remaining}"
                )
            return count

        dims = [self.unit_dim(target) for target in targets]
        if targets[0].shard is not None:
            ranking = self._ranking(targets, scores, signed)
            if self.limits is not None:
                return sharded_limits.masks(self.limits, targets, ranking, dims, count_of)
            return sharding.select(targets, ranking, count_of)
        count = count_of(sum(target.remaining() for target in targets))
        ranking = self._ranking(targets, scores, signed)
        if self.limits is not None:
            return self.limits.masks(targets, ranking.scores(), dims, count)
        return ops.select_global(
            ranking.weights,
            count,
            score=ranking.score,
            masks=[target.mask for target in targets],
            references=ranking.references or None,
            row_scales=ranking.row_scales or None,
            column_scales=ranking.column_scales or None,
            names=[target.name for target in targets],
        )

    def _ranking(
        self, targets: Sequence[Target], scores: Sequence[Tensor | None], signed: bool
    ) -> Ranking:
        given = [score for score in scores if score is not None]
        if not given:
            return self.ranking(targets)
        return Ranking(given, "value" if signed else "magnitude")

    def _scores(self, target: Target, score: Tensor | None, signed: bool) -> Tensor:
        if score is None:
            return self.ranking([target]).scores()[0]
        return score if signed else score.abs()

    def _prune_units(self, target: Target, score: Tensor | None, signed: bool = False) -> Tensor:
        scores = self._scores(target, score, signed)
        if target.shard is None:
            return self._select_units(target, scores)
        return target.shard.per_unit(
            replace(target, weight=scores, reference=None),
            self.unit_dim(target),
            lambda whole: self._select_units(whole, whole.weight),
            torch.bool,
        )

    def _select_units(self, target: Target, scores: Tensor) -> Tensor:
        unit_dim = self.unit_dim(target)
        units_first = scores.movedim(unit_dim, 0)
        rows = units_first.flatten(1)
        mask = None
        remaining = torch.full((rows.size(0),), rows.size(1), device=rows.device)
        if target.mask is not None:
            mask = target.mask.movedim(unit_dim, 0).flatten(1)
            remaining = mask.sum(dim=1)
        if self.absolute:
            pruned = rows.size(1) - remaining
            counts = (round(self.amount * rows.size(1)) - pruned).clamp(min=0)
        elif isinstance(self.amount, numbers.Integral):
            counts = torch.full_like(remaining, int(self.amount))
            if bool((counts > remaining).any()):
                raise ValueError(
                    f"amount={self.amount} should not be larger than the number of entries that "
                    f"are not pruned yet in each unit of {target.name}, at least "
                    f"{int(remaining.min())}"
                )
        else:
            counts = (remaining.double() * self.amount).round().long()
        kept = ops.select_rows(rows, counts, mask=mask, name=target.name)
        return kept.reshape(units_first.shape).movedim(0, unit_dim).contiguous()

    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
        """The mask for torch's own pruning functions.

        Args:
            t: a tensor to prune, or the flat vector of unpruned entries that
                ``torch.nn.utils.prune.global_unstructured`` makes of many.
            default_mask: the mask so far, shaped like ``t``.

        Returns:
            The mask, with the shape and dtype of ``default_mask``.
        """
        if is_dtensor(t):
            raise TypeError(
                f"{type(self).__name__} should prune DTensors by "
                "torchalignprune.global_unstructured, got one from a function of torch, which "
                "would gather it"
            )
        mask = None if bool((default_mask != 0).all()) else default_mask != 0
        itself = [Target(t.detach(), mask, "t")]
        if not self.needs_structure() or t.dim() != 1 or mask is not None:
            return self.masks(itself)[0].to(default_mask.dtype)
        if self.structure is not None:
            pruned, scored = parameters_of_caller() or (None, False)
            targets, scores = _read_structure(t, self.structure, scored)
            if pruned is not None:
                _check_structure(self.structure, pruned)
        else:
            read = _ask_caller(t)
            if read is None:
                found = targets_from_history(t)
                read = None if found is None else (found, None)
            if read is None:
                self._warn(t)
                return self._prune_together(itself, [t.detach()])[0].to(default_mask.dtype)
            targets, scores = read
        # The vector holds only the entries that were not pruned.
        parts = [
            new.flatten() if target.mask is None else new[target.mask]
            for new, target in zip(self.masks(targets, scores), targets, strict=True)
        ]
        return torch.cat(parts).to(default_mask.dtype)

    def prune(
        self,
        t: Tensor,
        default_mask: Tensor | None = None,
        importance_scores: Tensor | None = None,
    ) -> Tensor:
        """``t`` times its new mask; ``importance_scores`` are ranked by magnitude instead."""
        if importance_scores is None:
            mask = torch.ones_like(t) if default_mask is None else default_mask
            return t * self.compute_mask(t, mask)
        kept = None if default_mask is None else default_mask != 0
        target = Target(t.detach(), kept, "t")
        score = _checked_score(importance_scores, target)
        return t * self.masks([target], [score])[0].to(t.dtype)

    def needs_structure(self) -> bool:
        """Whether ranking needs more than the entries' values."""
        return self.budget != "global"

    def _warn(self, t: Tensor) -> None:
        if isinstance(t, nn.Parameter) and self.magnitude_will_do:
            return
        message = (
            f"{type(self).__name__} cannot see which parameters these {t.numel()} entries belong "
            "to, because they have no autograd history and the caller is not torch's "
            "global_unstructured{}: pass structure=parameters, or call "
            "torchalignprune.global_unstructured"
        )
        if not self.magnitude_will_do:
            raise ValueError(message.format(""))
        warnings.warn(message.format(", so it ranks by magnitude"), UserWarning, stacklevel=6)

    @classmethod
    def apply(
        cls,
        module: nn.Module,
        name: str,
        *args: Any,
        importance_scores: Tensor | None = None,
        **kwargs: Any,
    ) -> MaskHook:
        """Prune one parameter in place; what is already pruned of it stays pruned.

        Args:
            module: holds the parameter.
            name: the parameter's name in it.
            args: arguments of the method.
            importance_scores: shaped like the parameter; ranked by their magnitude instead.
            kwargs: arguments of the method.

        Returns:
            The parameter's only forward pre-hook.
        """
        method = cls(*args, **kwargs)
        scores = None if importance_scores is None else {(module, name): importance_scores}
        return _prune([(module, name)], method, scores)[0]


def global_unstructured(
    parameters: Parameters,
    pruning_method: type[PruningMethod],
    importance_scores: Mapping[Pair, Tensor] | None = None,
    **kwargs: Any,
) -> None:
    """Prune many parameters together, in place: the same result as torch's function, but fast.

    Afterwards every parameter has one forward pre-hook and one bool mask, however often it was
    pruned. The masks are those that ``torch.nn.utils.prune.global_unstructured`` would make with
    the same method, but nothing is concatenated. Tied weights are counted and pruned once, and stay
    tied if all their places are among the parameters.

    Parameters may be sharded (``DTensor``, as by FSDP2 and tensor parallelism); then all processes
    must call this function. The masks are placed like the parameters and equal, bit for bit, those
    of one process with the whole model (:mod:`torchalignprune.sharding`).

    Args:
        parameters: ``(module, name)`` pairs (:func:`torchalignprune.prunable_parameters`).
        pruning_method: one of the methods here.
        importance_scores: by ``(module, name)``, shaped like the parameters; ranked by their
            magnitude instead of the method's own ranking. Parameters without scores are ranked by
            their weights.
        kwargs: arguments of the method, such as ``amount``.

    Raises:
        TypeError: an argument of the wrong type; a method that is not one of this package.
        AttributeError: a module has no attribute of the given name.
        AssertionError: scores of another shape than their parameter (as in torch).
        ValueError: an amount out of range; NaN among the scores; anything that the method refuses.

    Example:
        >>> import torch, torchalignprune as tap
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 2))
        >>> params = tap.prunable_parameters(net)
        >>> tap.global_unstructured(params, tap.AlignedMagnitude, amount=0.5)
        >>> tap.global_unstructured(params, tap.AlignedMagnitude, amount=0.5)
        >>> sum(int((module.weight == 0).sum()) for module, _ in params)
        60
    """
    try:
        pairs = parameters if isinstance(parameters, list) else list(parameters)
    except TypeError:
        raise TypeError("global_unstructured(): parameters is not an Iterable") from None
    if importance_scores is not None and not isinstance(importance_scores, dict):
        raise TypeError("global_unstructured(): importance_scores must be of type dict")
    if not (isinstance(pruning_method, type) and issubclass(pruning_method, PruningMethod)):
        raise TypeError(
            "pruning_method should be one of torchalignprune's methods (Magnitude, "
            f"AlignedMagnitude, AlignedNM, Random), got {pruning_method!r}; for others use "
            "torch.nn.utils.prune.global_unstructured"
        )
    _prune(pairs, pruning_method(**kwargs), importance_scores)


def _prune(
    pairs: list[Pair], method: PruningMethod, importance_scores: Mapping[Pair, Tensor] | None
) -> list[MaskHook]:
    targets = targets_of(pairs)
    scores = None if not importance_scores else _scores(importance_scores, targets)
    with torch.no_grad():
        masks = method.masks(targets, scores)
    return put_masks(
        (module, name, mask)
        for target, mask in zip(targets, masks, strict=True)
        for module, name in target.places
    )


def _scores(
    importance_scores: Mapping[Pair, Tensor], targets: Sequence[Target]
) -> list[Tensor | None]:
    places = {place for target in targets for place in target.places}
    if places.isdisjoint(importance_scores):
        raise ValueError(
            "importance_scores should be keyed by the (module, name) pairs of the parameters, got "
            f"{len(importance_scores)} other keys"
        )
    scores: list[Tensor | None] = []
    for target in targets:
        given = [importance_scores[place] for place in target.places if place in importance_scores]
        scores.append(_checked_score(given[0], target) if given else None)
    return scores


def _checked_score(score: Any, target: Target) -> Tensor:
    if not isinstance(score, Tensor):
        raise TypeError(
            f"the importance_scores of {target.name} should be a tensor, got {type(score).__name__}"
        )
    if score.shape != target.weight.shape:
        # The type that torch raises here.
        raise AssertionError(
            f"importance_scores should have the same shape as parameter {target.name}, got "
            f"{tuple(score.shape)} vs {tuple(target.weight.shape)}"
        )
    if score.is_complex():
        raise TypeError(f"the importance_scores of {target.name} should be real, got {score.dtype}")
    check_readable(score, f"the importance_scores of {target.name}", target.weight)
    here: Tensor = score.detach().to(target.weight.device)
    return here if here.dtype in DTYPES else here.double()


def _ask_caller(t: Tensor) -> tuple[list[Target], list[Tensor | None] | None] | None:
    """What ``_read_structure`` returns for the parameters that torch is pruning; None if they are
    unknown or do not make up the vector."""
    asked = parameters_of_caller()
    if asked is None:
        return None
    try:
        return _read_structure(t, *asked)
    except (AttributeError, TypeError, ValueError):
        return None


def _check_structure(structure: Sequence[Pair], pruned: Sequence[Pair]) -> None:
    """Raises if torch prunes other parameters than the structure has.

    Lists of different lengths are not compared: tied weights that torch prunes at one of their
    places may be listed at all of them.
    """
    if len(pruned) != len(structure):
        return
    for i, (own, given) in enumerate(zip(structure, pruned, strict=True)):
        if own[0] is not given[0] or own[1] != given[1]:
            raise ValueError(
                "structure should be the parameters that are pruned, in their order, with "
                f"{type(given[0]).__name__}.{given[1]} at index {i}, got "
                f"{type(own[0]).__name__}.{own[1]}"
                + (" of another module" if type(own[0]) is type(given[0]) else "")
            )


def _read_structure(
    t: Tensor, structure: Sequence[Pair], scored: bool = False
) -> tuple[list[Target], list[Tensor | None] | None]:
    """The targets of the structure, and scores if that is what the vector holds."""
    targets = targets_of(structure)
    sizes = [target.remaining() for target in targets]
    if sum(sizes) != t.numel() and len(targets) < len(structure):
        # torch counts tied weights at each of their places.
        targets = [
            replace(target, name=name)
            for pair, name in zip(structure, parameter_names(structure), strict=True)
            for target in targets_of([pair])
        ]
        sizes = [target.remaining() for target in targets]
    if sum(sizes) != t.numel():
        raise ValueError(
            f"structure should be the parameters that are pruned, with {t.numel()} entries that "
            f"are not pruned yet, got {sum(sizes)}"
        )
    values = t.detach().split(sizes)
    if not scored and all(map(_holds, targets, values)):
        return targets, None
    scores: list[Tensor | None] = []
    for target, own in zip(targets, values, strict=True):
        full = torch.zeros(target.weight.shape, dtype=t.dtype, device=t.device)
        everywhere = torch.ones_like(full, dtype=torch.bool)
        full.masked_scatter_(everywhere if target.mask is None else target.mask, own)
        scores.append(full)
    return targets, scores


def _holds(target: Target, values: Tensor) -> bool:
    """Whether the values are the parameter's, as stored or as of the last forward."""
    module, name = target.places[0]
    shown = replace(target, weight=getattr(module, name).detach())
    return any(torch.equal(values, source.entries().to(values.dtype)) for source in (target, shown))
