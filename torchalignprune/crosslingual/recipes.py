"""The ways to prune, and the regularizers, that the zero-shot comparisons call by name."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from torchalignprune import criteria
from torchalignprune.calibration import Calibration
from torchalignprune.gradient_criteria import GradientCriterion, Movement, Taylor
from torchalignprune.methods import AlignedMagnitude, Magnitude
from torchalignprune.parameters import PrunableParameters
from torchalignprune.pruner import Pruner
from torchalignprune.pruning import Budget, PruningMethod
from torchalignprune.ranking import Ranking
from torchalignprune.reference import Reference
from torchalignprune.regularizers import CosineAlignment, FrobeniusAlignment
from torchalignprune.schedules import Schedule
from torchalignprune.targets import Target

__all__ = ["RECIPES", "REGULARIZERS", "Recipe", "SumOfPenalties", "make_penalty"]

Collect = Callable[[], Calibration]
Scores = Mapping[tuple[nn.Module, str], Tensor]
_Penalty = CosineAlignment | FrobeniusAlignment


class _Scored(Magnitude):
    """Ranks by scores that are made anew each time it prunes."""

    def __init__(
        self, amount: float, *, scores: Callable[[], Scores], budget: Budget = "global"
    ) -> None:
        super().__init__(amount, budget=budget)
        self._make = scores

    def prepare(self, targets: Sequence[Target]) -> list[Target]:
        self._scored = self._make()
        return super().prepare(targets)

    def ranking(self, targets: Sequence[Target]) -> Ranking:
        return Ranking([self._scored[target.places[0]] for target in targets], "magnitude")


class _Calibrated(AlignedMagnitude):
    """Collects the input norms anew each time it prunes: training moves them."""

    def __init__(self, amount: float, *, collect: Collect, **options: Any) -> None:
        super().__init__(amount, **options)
        self._collect = collect

    def prepare(self, targets: Sequence[Target]) -> list[Target]:
        self.input_norms = self._collect()
        return super().prepare(targets)


@dataclass(frozen=True)
class Recipe:
    """A way to prune.

    Attributes:
        label: what tables and pictures call it.
        options: of ``AlignedMagnitude`` or ``Magnitude``; the budget among them.
        aligned: it is ``AlignedMagnitude``, otherwise ``Magnitude``.
        pretrained: it aligns with the pretrained weights, not with those of the moment.
        scores: makes importance scores from the parameters and the calibration, if there is one.
        criterion: watches the gradients.
        calibration: the text whose inputs it looks at, if any.
    """

    label: str
    options: Mapping[str, Any] = field(default_factory=dict)
    aligned: bool = False
    pretrained: bool = False
    scores: Callable[[PrunableParameters, Collect | None], Scores] | None = None
    criterion: Callable[[PrunableParameters], GradientCriterion] | None = None
    calibration: Literal["english", "multilingual"] | None = None

    def pruner(
        self,
        params: PrunableParameters,
        schedule: Schedule,
        collect: Collect | None = None,
        reference: Reference | None = None,
        *,
        budget: Budget | None = None,
        penalty: nn.Module | None = None,
    ) -> Pruner:
        """A pruner of this kind.

        Args:
            params: what to prune.
            schedule: when, and how far.
            collect: collects the calibration of the moment, for those that look at inputs.
            reference: the pretrained weights, for those that align with them; the pruner's log
                reports the alignment with them, whatever the method.
            budget: where the sparsity is counted. Default: as this recipe has it.
            penalty: as in :class:`torchalignprune.Pruner`.

        Raises:
            ValueError: ``collect`` or ``reference`` is missing.
        """
        if self.calibration is not None and collect is None:
            raise ValueError(f"{self.label} needs calibration text: collect should not be None")
        if self.pretrained and reference is None:
            raise ValueError(f"{self.label} needs a reference: it should not be None")
        method: Callable[..., PruningMethod] = AlignedMagnitude if self.aligned else Magnitude
        options = dict(self.options)
        if self.scores is not None:
            method, options["scores"] = _Scored, functools.partial(self.scores, params, collect)
        elif self.calibration is not None:
            method, options["collect"] = _Calibrated, collect
        if self.aligned and not self.pretrained:
            options["reference"] = None
        return Pruner(
            params,
            functools.partial(method, **options),
            schedule,
            reference=reference,
            penalty=penalty,
            criterion=None if self.criterion is None else self.criterion(params),
            budget=budget,
        )


def _lamp(params: PrunableParameters, collect: Collect | None) -> Scores:
    return criteria.lamp(params)


def _lookahead(params: PrunableParameters, collect: Collect | None) -> Scores:
    return criteria.lookahead(params, criteria.transformer_chains(params))


def _wanda(params: PrunableParameters, collect: Collect | None) -> Scores:
    assert collect is not None
    return criteria.wanda(params, collect())


def _inputs(label: str, calibration: Literal["english", "multilingual"]) -> dict[str, Recipe]:
    known = f"{'English' if calibration == 'english' else calibration} inputs"
    return {
        f"wanda-{label}": Recipe(
            f"Wanda, {known}", {"budget": "unit"}, scores=_wanda, calibration=calibration
        ),
        f"aligned-inputs-{label}": Recipe(
            f"aligned, {known}", aligned=True, calibration=calibration
        ),
    }


RECIPES: Mapping[str, Recipe] = {
    "magnitude": Recipe("magnitude"),
    "magnitude-layer": Recipe("magnitude, per layer", {"budget": "layer"}),
    "lamp": Recipe("LAMP", scores=_lamp),
    "taylor": Recipe("Taylor", criterion=Taylor),
    # Sanh et al. let pruned weights come back; here, as with all others, they do not.
    "movement": Recipe("movement, without regrowth", criterion=Movement),
    # As in its paper: raw scores cannot be compared between layers.
    "lookahead": Recipe("lookahead, per layer", {"budget": "layer"}, scores=_lookahead),
    "aligned": Recipe("aligned", aligned=True),
    "aligned-both": Recipe("aligned, units=both", {"units": "both"}, aligned=True),
    "aligned-pretrained": Recipe("aligned with pretrained", aligned=True, pretrained=True),
    "aligned-frobenius": Recipe("aligned, frobenius", {"alignment": "frobenius"}, aligned=True),
    **_inputs("en", "english"),
    **_inputs("multi", "multilingual"),
}


class SumOfPenalties(nn.Module):
    """Several penalties as one: their sum.

    The two of the paper are of one size, so that they need no weights: where all units of a matrix
    have one norm and only their directions change, 1 - cosine is half the distortion.
    """

    def __init__(self, *penalties: _Penalty) -> None:
        super().__init__()
        self.penalties = nn.ModuleList(penalties)

    def forward(self) -> Tensor:
        return torch.stack([penalty() for penalty in self.penalties]).sum()

    def suggest_strength(self, task_loss: Tensor, share: float = 0.1) -> float:
        """As that of each penalty, for the sum: its gradient has at most that share of the task's.

        Exactly so where the gradients of the penalties have one direction, less where they have
        not.
        """
        strengths = [
            cast(_Penalty, penalty).suggest_strength(task_loss, share) for penalty in self.penalties
        ]
        return 1 / sum(1 / strength for strength in strengths)


REGULARIZERS = ("none", "cosine", "frobenius", "both")


def make_penalty(
    name: str, params: PrunableParameters, reference: Reference
) -> _Penalty | SumOfPenalties | None:
    """The regularizer of that name: ``none``, ``cosine``, ``frobenius``, or ``both``, their sum.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in REGULARIZERS:
        raise ValueError(f"name should be one of {', '.join(REGULARIZERS)}, got {name!r}")
    if name == "none":
        return None
    if name == "cosine":
        return CosineAlignment(params, reference)
    if name == "frobenius":
        return FrobeniusAlignment(params, reference)
    return SumOfPenalties(CosineAlignment(params, reference), FrobeniusAlignment(params, reference))
