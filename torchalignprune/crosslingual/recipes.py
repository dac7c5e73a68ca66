"""The pruning methods and regularizers of the zero-shot comparisons, by name."""

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
    """Ranks by scores that are computed again for each pruning."""

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
    """Collects the input norms again for each pruning, since training changes them."""

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
        label: its name in tables and figures.
        options: options of ``AlignedMagnitude`` or ``Magnitude``, including the budget.
        aligned: whether it uses ``AlignedMagnitude``; otherwise ``Magnitude``.
        pretrained: whether it aligns with the pretrained weights instead of the current ones.
        scores: makes importance scores from the parameters, and the calibration if there is one.
        criterion: makes a criterion that watches the gradients.
        calibration: which calibration text it needs, if any.
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
        """Makes a pruner by this recipe.

        Args:
            params: what to prune.
            schedule: the sparsity of each step.
            collect: collects a calibration of the current model; required with ``calibration``.
            reference: the pretrained weights; required with ``pretrained``. The pruner's log
                reports the alignment with them, whatever the method.
            budget: where the sparsity is counted. Default: the recipe's.
            penalty: as in :class:`torchalignprune.Pruner`.

        Raises:
            ValueError: ``collect`` or ``reference`` is missing.
        """
        if self.calibration is not None and collect is None:
            raise ValueError(
                f"collect should collect a calibration, which {self.label} needs, got None"
            )
        if self.pretrained and reference is None:
            raise ValueError(
                f"reference should be the pretrained weights, which {self.label} needs, got None"
            )
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
    # Sanh et al. let pruned weights come back; here they do not, as in the other recipes.
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
    """The sum of several penalties.

    The paper's two are of similar size, so that they need no weights: if all units of a matrix have
    the same norm and only their directions change, 1 - cosine is half the distortion.
    """

    def __init__(self, *penalties: _Penalty) -> None:
        super().__init__()
        self.penalties = nn.ModuleList(penalties)

    def forward(self) -> Tensor:
        return torch.stack([penalty() for penalty in self.penalties]).sum()

    def suggest_strength(self, task_loss: Tensor, share: float = 0.1) -> float:
        """A strength at which the gradient of the sum has at most ``share`` of the task's norm.

        It has exactly that share if the gradients of the penalties point in the same direction.
        """
        strengths = [
            cast(_Penalty, penalty).suggest_strength(task_loss, share) for penalty in self.penalties
        ]
        return 1 / sum(1 / strength for strength in strengths)


REGULARIZERS = ("none", "cosine", "frobenius", "both")


def make_penalty(
    name: str, params: PrunableParameters, reference: Reference
) -> _Penalty | SumOfPenalties | None:
    """Makes a regularizer: ``none``, ``cosine``, ``frobenius``, or ``both``, the sum of the two.

    Raises:
        ValueError: ``name`` is not one of these.
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
