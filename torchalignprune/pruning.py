"""How a method turns a ranking into masks, alone, for torch's pruning functions, or for many
parameters at once."""

from __future__ import annotations

import math
import numbers
import warnings
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from torchalignprune import ops
from torchalignprune.hooks import MaskHook, put_masks
from torchalignprune.parameters import Parameters
from torchalignprune.ranking import Ranking
from torchalignprune.targets import Pair, Target, targets_from_history, targets_of

__all__ = ["Budget", "PruningMethod", "global_unstructured"]

Budget = Literal["global", "layer", "unit"]


class PruningMethod(prune.BasePruningMethod):
    """What the methods here share: the amount, where it is counted, and torch's protocol.

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
            raise ValueError(f"amount={amount} should be a number")
        if budget not in get_args(Budget):
            raise ValueError(f"budget should be one of {get_args(Budget)}, got {budget!r}")
        self.amount = amount
        self.budget = budget
        self.structure = None if structure is None else list(structure)

    @abstractmethod
    def ranking(self, targets: Sequence[Target]) -> Ranking:
        """What the entries of the targets are worth."""

    def units(self, target: Target) -> int:
        """The dimension of the units that ``budget="unit"`` counts in."""
        return target.out_dim

    def masks(
        self, targets: Sequence[Target], scores: Sequence[Tensor | None] | None = None
    ) -> list[Tensor]:
        """The new masks of all the targets; entries that are already pruned stay pruned.

        Args:
            targets: the parameters.
            scores: ranked by their magnitude in the place of what the method would rank; where
                there are scores for some targets only, the others are ranked by their weights.

        Returns:
            bool masks, shaped like the weights.
        """
        if self.budget == "global":
            return self._prune_together(targets, scores)
        masks = []
        for i, target in enumerate(targets):
            own = None if scores is None else [scores[i]]
            layer = self.budget == "layer" or target.weight.dim() < 2
            one = self._prune_together if layer else self._prune_units
            masks += one([target], own)
        return masks

    def _ranking(
        self, targets: Sequence[Target], scores: Sequence[Tensor | None] | None
    ) -> Ranking:
        if scores is None:
            return self.ranking(targets)
        both = zip(scores, targets, strict=True)
        return Ranking([t.weight if s is None else s.detach() for s, t in both], "magnitude")

    def _prune_together(
        self, targets: Sequence[Target], scores: Sequence[Tensor | None] | None
    ) -> list[Tensor]:
        remaining = sum(target.remaining() for target in targets)
        count = int(prune._compute_nparams_toprune(self.amount, remaining))
        if count > remaining:
            where = targets[0].name if len(targets) == 1 else f"the {len(targets)} parameters"
            raise ValueError(
                f"amount={self.amount} should not be larger than the number of entries of {where} "
                f"that are not pruned yet, {remaining}"
            )
        ranking = self._ranking(targets, scores)
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

    def _prune_units(
        self, targets: Sequence[Target], scores: Sequence[Tensor | None] | None
    ) -> list[Tensor]:
        (target,) = targets
        (score,) = self._ranking(targets, scores).scores()
        unit_dim = self.units(target)
        rows = _rows(score, unit_dim)
        mask = None if target.mask is None else _rows(target.mask, unit_dim)
        if mask is None:
            remaining = torch.full((rows.size(0),), rows.size(1), device=rows.device)
        else:
            remaining = mask.sum(dim=1)
        if isinstance(self.amount, numbers.Integral):
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
        return [_from_rows(kept, target.weight, unit_dim)]

    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
        """The mask for torch's own pruning functions.

        Args:
            t: a tensor to prune, or the flat vector of unpruned entries that
                ``torch.nn.utils.prune.global_unstructured`` makes of many.
            default_mask: the mask so far, shaped like ``t``.

        Returns:
            The mask, with the shape and dtype of ``default_mask``.
        """
        targets, scores = self._read(t, default_mask)
        kept = self.masks(targets, scores)
        if targets[0].weight.data_ptr() == t.data_ptr():
            return kept[0].to(default_mask.dtype)
        # The vector has an entry for each one that was not pruned.
        parts = [
            new.flatten() if target.mask is None else new[target.mask]
            for new, target in zip(kept, targets, strict=True)
        ]
        return torch.cat(parts).to(default_mask.dtype)

    def _read(
        self, t: Tensor, default_mask: Tensor
    ) -> tuple[list[Target], list[Tensor | None] | None]:
        """The parameters that make up ``t``, or ``t`` itself as one, and scores if it holds any."""
        mask = None if bool((default_mask != 0).all()) else default_mask != 0
        itself = [Target(t.detach(), mask, "t")]
        if not self._needs_structure() or t.dim() != 1 or mask is not None:
            return itself, None
        if self.structure is not None:
            return self._read_structure(t, targets_of(self.structure))
        targets = targets_from_history(t)
        if targets is not None:
            return targets, None
        if not isinstance(t, nn.Parameter):
            warnings.warn(
                f"{type(self).__name__} cannot see which parameters these {t.numel()} entries "
                "belong to, because no autograd history leads to them (no_grad, frozen weights, "
                "or importance_scores), and ranks them by magnitude. Pass structure=parameters, "
                "or call torchalignprune.global_unstructured.",
                UserWarning,
                stacklevel=6,
            )
        return itself, [t.detach()]

    def _read_structure(
        self, t: Tensor, structure: list[Target]
    ) -> tuple[list[Target], list[Tensor | None] | None]:
        sizes = [target.remaining() for target in structure]
        if sum(sizes) != t.numel():
            raise ValueError(
                f"structure should be the parameters that are pruned: it has {sum(sizes)} entries "
                f"that are not pruned yet, but there are {t.numel()}"
            )
        values = t.detach().split(sizes)
        if all(
            torch.equal(own, target.entries().to(t.dtype))
            for own, target in zip(values, structure, strict=True)
        ):
            return structure, None
        # They are importance_scores.
        scores: list[Tensor | None] = []
        for target, own in zip(structure, values, strict=True):
            full = torch.zeros(target.weight.shape, dtype=t.dtype, device=t.device)
            everywhere = torch.ones_like(full, dtype=torch.bool)
            full.masked_scatter_(everywhere if target.mask is None else target.mask, own)
            scores.append(full)
        return structure, scores

    def _needs_structure(self) -> bool:
        return self.budget != "global"

    @classmethod
    def apply(
        cls,
        module: nn.Module,
        name: str,
        *args: Any,
        importance_scores: Tensor | None = None,
        **kwargs: Any,
    ) -> MaskHook:
        """Prune one parameter in place, on top of what is already pruned of it.

        Args:
            module: holds the parameter.
            name: the parameter's name in it.
            args: what the method takes.
            importance_scores: shaped like the parameter; ranked by magnitude in its place.
            kwargs: what the method takes.

        Returns:
            The parameter's one forward pre-hook.
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
    """Prune many parameters together, in place: the same result as torch's function, fast.

    Afterwards every parameter has one forward pre-hook and one bool mask, however often it is
    pruned. The masks are what ``torch.nn.utils.prune.global_unstructured`` would make with the same
    method; nothing is concatenated. Tied weights are counted and pruned once, and stay tied if all
    their places are among the parameters.

    Args:
        parameters: ``(module, name)`` pairs (:func:`torchalignprune.prunable_parameters`).
        pruning_method: one of the methods here.
        importance_scores: by ``(module, name)``, shaped like the parameters; ranked by their
            magnitude in the place of what the method would rank. Parameters without scores are
            ranked by their weights.
        kwargs: what the method takes, such as ``amount``.

    Raises:
        TypeError: an argument of the wrong type; a method that is not one of this package.
        AttributeError: a module has nothing of the given name.
        AssertionError: scores of another shape than their parameter (as torch does).
        ValueError: an amount out of range; NaN among the scores, or whatever the method refuses.

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
            f"AlignedMagnitude, AlignedNM, Random), got {pruning_method!r}; for others there is "
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
    scores: list[Tensor | None] = []
    for target in targets:
        given = [importance_scores[p] for p in target.places if p in importance_scores]
        if given and given[0].shape != target.weight.shape:
            # The type that torch raises here.
            raise AssertionError(
                f"importance_scores should have the same shape as parameter {target.name}, got "
                f"{tuple(given[0].shape)} vs {tuple(target.weight.shape)}"
            )
        scores.append(given[0] if given else None)
    return scores


def _rows(tensor: Tensor, unit_dim: int) -> Tensor:
    return tensor.movedim(unit_dim, 0).flatten(1)


def _from_rows(rows: Tensor, like: Tensor, unit_dim: int) -> Tensor:
    shape = like.movedim(unit_dim, 0).shape
    return rows.reshape(shape).movedim(0, unit_dim).contiguous()
