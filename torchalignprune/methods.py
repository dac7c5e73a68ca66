"""Pruning methods: subclasses of torch's ``BasePruningMethod``, and their functional forms.

Each works through ``.apply``, through its functional form, through
:func:`torch.nn.utils.prune.global_unstructured` and through
:func:`torchalignprune.global_unstructured`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from torchalignprune import ops
from torchalignprune.calibration import Calibration
from torchalignprune.hooks import MaskHook
from torchalignprune.matching import Method, Metric
from torchalignprune.parameters import Parameters
from torchalignprune.pruning import Budget, PruningMethod
from torchalignprune.ranking import (
    Ranking,
    frobenius,
    two_sided,
    unit_gains,
    with_matched_reference,
    within_unit,
)
from torchalignprune.targets import PerParameter, Target, with_input_norms, with_references

__all__ = [
    "AlignedMagnitude",
    "AlignedNM",
    "Magnitude",
    "Random",
    "aligned_magnitude",
    "aligned_nm",
    "magnitude",
    "random",
]

Alignment = Literal["cosine", "frobenius"]
Units = Literal["out", "in", "both"]


class Magnitude(PruningMethod):
    r"""Prune the entries of smallest magnitude, like ``torch.nn.utils.prune.L1Unstructured``.

    Args:
        amount: share (float in [0, 1]) or number (int) of the unpruned entries to prune.
        budget: where the amount is counted: ``"global"`` over all parameters together, ``"layer"``
            in every parameter, ``"unit"`` in every output unit.
        structure: the ``parameters`` that are pruned, once more. Only needed with another budget
            than ``"global"``, when a function other than torch's ``global_unstructured`` passes
            the method one flat vector of frozen weights; a warning asks for it.

    Raises:
        TypeError: amount is not a number.
        ValueError: amount is out of range; an unknown budget.

    Example:
        >>> import torch, torchalignprune as tap
        >>> layer = torch.nn.Linear(4, 4)
        >>> _ = tap.Magnitude.apply(layer, "weight", 0.25)
        >>> int((layer.weight == 0).sum())
        4
    """

    @classmethod
    def apply(  # type: ignore[override]
        cls,
        module: nn.Module,
        name: str,
        amount: float,
        importance_scores: Tensor | None = None,
        **kwargs: Any,
    ) -> MaskHook:
        """As :meth:`PruningMethod.apply`, with the argument order of torch's methods."""
        return super().apply(module, name, amount, importance_scores=importance_scores, **kwargs)

    def ranking(self, targets: Sequence[Target]) -> Ranking:
        return Ranking([target.weight for target in targets], "magnitude")


class AlignedMagnitude(PruningMethod):
    r"""Prune so that the units of the pruned network stay aligned with those of the unpruned one.

    A unit's alignment under a mask ``m`` is :math:`A(m) = \langle p, r\rangle / (|p||r|)`, where
    :math:`p = m w` are its pruned and ``r`` its reference weights (by default ``w`` itself).

    ``alignment="cosine"`` maximises the summed alignment of all units, exactly for ``r = w``: the
    k-th largest magnitude of a unit is worth :math:`(\sqrt{C_k} - \sqrt{C_{k-1}}) / |w|`, where
    :math:`C_k` is the sum of the k largest squares, and the entries worth most in the whole network
    are kept. For another reference it is a close approximation (see
    :func:`torchalignprune.ops.cosine_gains`). With ``units="both"`` the score is
    :math:`|w| / \sqrt{|w_{row}||w_{column}|}`; with a reference it is
    :math:`w (2 r - w) / (|r_{row}||r_{column}|)`, which ranks the same for ``r = w``.

    ``alignment="frobenius"`` minimises the summed distortion :math:`|P - R|_F^2 / |R|_F^2` of the
    parameters, exactly for any reference: an entry is worth :math:`w (2 r - w) / |R|_F^2`.

    From "Aligned Weight Regularizers for Pruning Pretrained Neural Networks" (O'Neill, Dutta and
    Assem, Findings of ACL 2022), whose regularizers keep the same two quantities small.

    Args:
        amount: share (float in [0, 1]) or number (int) of the unpruned entries to prune.
        alignment: ``"cosine"`` or ``"frobenius"``.
        units: a unit is an output (``"out"``), an input (``"in"``), or both count (``"both"``).
            One-dimensional parameters are one unit. ``"frobenius"`` compares whole parameters;
            there only ``matching`` and ``budget="unit"`` use it.
        reference: the weights to stay aligned with, one tensor for each parameter: by
            ``(module, name)``, or in the order of the parameters. Default: the current weights,
            without their masks.
        input_norms: a :class:`torchalignprune.Calibration`, or one vector for each parameter,
            likewise, with the root mean square of each input feature over some text. Every ``w``
            and ``r`` is first multiplied by its input's norm, so that the outputs of the units
            stay aligned instead of their weights. One-dimensional parameters have no inputs.
        matching: ``"greedy"`` or ``"hungarian"``: permute the units of the reference first, so that
            they match the current units (:func:`torchalignprune.match_units`) by cosine, or for
            ``"frobenius"`` by Euclidean distance. Pruned entries count as zeros; output units are
            multiplied by the input norms before. Needs a reference, and ``units="out"`` or
            ``"in"``, because permuting the units of one side tears those of the other apart.
            Default: units are compared with those in the same place.
        structure: the ``parameters`` that are pruned, once more. Only needed when a function other
            than torch's ``global_unstructured`` passes the method one flat vector of frozen
            weights; a warning asks for it.
        budget: where the amount is counted: ``"global"`` over all parameters together, ``"layer"``
            in every parameter, ``"unit"`` in every unit (with ``units="both"``: every output).

    Raises:
        TypeError: amount is not a number.
        ValueError: amount is out of range; an unknown alignment, units, matching or budget;
            matching without a reference or with ``units="both"``.
        ImportError: ``matching="hungarian"`` without scipy.

    Example:
        >>> import torch, torchalignprune as tap
        >>> from torch.nn.utils import prune
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 2))
        >>> params = [(net[0], "weight"), (net[1], "weight")]
        >>> prune.global_unstructured(params, pruning_method=tap.AlignedMagnitude, amount=0.5)
        >>> sum(int((module.weight == 0).sum()) for module, _ in params)
        40
    """

    def __init__(
        self,
        amount: float,
        *,
        alignment: Alignment = "cosine",
        units: Units = "out",
        reference: PerParameter | None = None,
        input_norms: PerParameter | Calibration | None = None,
        matching: Method | None = None,
        structure: Parameters | None = None,
        budget: Budget = "global",
    ) -> None:
        super().__init__(amount, structure=structure, budget=budget)
        if alignment not in get_args(Alignment):
            raise ValueError(f"alignment should be one of {get_args(Alignment)}, got {alignment!r}")
        if units not in get_args(Units):
            raise ValueError(f"units should be one of {get_args(Units)}, got {units!r}")
        if matching is not None:
            if matching not in get_args(Method):
                raise ValueError(
                    f"matching should be one of {get_args(Method)} or None, got {matching!r}"
                )
            if reference is None:
                raise ValueError(
                    f"reference should be given with matching={matching!r}, which permutes its "
                    "units, got None"
                )
            if units == "both":
                raise ValueError(
                    f"units should be 'out' or 'in' with matching={matching!r}, got 'both'"
                )
        self.alignment = alignment
        self.units = units
        self.reference = reference
        self.input_norms = input_norms
        self.matching = matching

    def unit_dim(self, target: Target) -> int:
        return target.in_dim if self.units == "in" else target.out_dim

    def needs_structure(self) -> bool:
        return True

    def check_sharded(self) -> None:
        if self.matching is not None:
            raise ValueError(
                f"matching should be None for sharded parameters, got {self.matching!r}: no rank "
                "has all units to compare; permute the reference with match_units before the model "
                "is sharded"
            )

    def prepare(self, targets: Sequence[Target]) -> list[Target]:
        found = with_input_norms(with_references(targets, self.reference), self.input_norms)
        if self.matching is None:
            return found
        metric: Metric = "cosine" if self.alignment == "cosine" else "euclidean"
        return [
            with_matched_reference(target, self.unit_dim(target), metric, self.matching)
            for target in found
        ]

    def ranking(self, targets: Sequence[Target]) -> Ranking:
        if self.alignment == "frobenius":
            return frobenius(targets)
        if self.units == "both":
            return two_sided(targets)
        return Ranking([unit_gains(t, self.unit_dim(t)) for t in targets], "value")


class AlignedNM(PruningMethod):
    r"""Keep the best ``n`` of every ``m`` neighbouring inputs of a unit (2:4 sparsity).

    Entries rank by what they add to the alignment of their unit: by :math:`|w|` for ``r = w``, and
    by :math:`w (r - \rho w / 2)` for another reference, where :math:`\rho = \langle w, r\rangle /
    |w|^2` over the unpruned entries of the unit. For ``r = w`` no n:m mask has a higher alignment.
    Groups run along the inputs; in convolutions, along the input channels at each kernel position.
    With a reference, a GPU sums :math:`\rho` in another order than the CPU, so nearly equal entries
    may swap ranks.

    Args:
        n: how many entries of each group are kept.
        m: the group size, which divides the number of inputs.
        reference: as in :class:`AlignedMagnitude`.
        input_norms: as in :class:`AlignedMagnitude`.
        structure: as in :class:`AlignedMagnitude`, but an error asks for it.

    Raises:
        TypeError: n or m is not an int.
        ValueError: not 0 < n <= m; a one-dimensional parameter; a number of inputs that m does not
            divide.

    Example:
        >>> import torch, torchalignprune as tap
        >>> layer = torch.nn.Linear(8, 2)
        >>> _ = tap.AlignedNM.apply(layer, "weight", n=2, m=4)
        >>> (layer.weight.view(-1, 4) != 0).sum(dim=1)
        tensor([2, 2, 2, 2])
    """

    def __init__(
        self,
        n: int = 2,
        m: int = 4,
        *,
        reference: PerParameter | None = None,
        input_norms: PerParameter | Calibration | None = None,
        structure: Parameters | None = None,
    ) -> None:
        for value, which in ((n, "n"), (m, "m")):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{which} should be an int, got {value!r}")
        if not 0 < n <= m:
            raise ValueError(f"n and m should satisfy 0 < n <= m, got n={n}, m={m}")
        super().__init__(1 - n / m, structure=structure, budget="unit")
        # A flat vector does not show which entries are neighbouring inputs.
        self.magnitude_will_do = False
        self.n = n
        self.m = m
        self.reference = reference
        self.input_norms = input_norms

    def prepare(self, targets: Sequence[Target]) -> list[Target]:
        for target in targets:
            shape = tuple(target.weight.shape)
            if len(shape) < 2 or shape[target.in_dim] % self.m:
                raise ValueError(
                    f"the number of inputs of {target.name} should be a multiple of m={self.m}, "
                    f"got a weight of shape {shape}"
                )
        return with_input_norms(with_references(targets, self.reference), self.input_norms)

    def ranking(self, targets: Sequence[Target]) -> Ranking:
        return Ranking([within_unit(target) for target in targets], "value")

    def _prune_units(self, target: Target, score: Tensor | None, signed: bool = False) -> Tensor:
        shard = target.shard
        if shard is not None and shard.in_whole_groups(target.in_dim, self.m):
            scores = self._scores(target, score, signed)
            return shard.ranks.attempt(
                shard.number,
                lambda: self._select_units(target, scores),
                lambda: torch.zeros_like(scores, dtype=torch.bool),
            )
        return super()._prune_units(target, score, signed)

    def _select_units(self, target: Target, scores: Tensor) -> Tensor:
        ends = (target.out_dim, target.in_dim)
        inputs_last = scores.movedim(ends, (0, -1))
        groups = inputs_last.reshape(-1, self.m)
        mask = None
        alive = torch.full((groups.size(0),), self.m, device=groups.device)
        if target.mask is not None:
            mask = target.mask.movedim(ends, (0, -1)).reshape(-1, self.m)
            alive = mask.sum(dim=1)
        counts = (alive - self.n).clamp(min=0)
        kept = ops.select_rows(groups, counts, mask=mask, name=target.name)
        return kept.reshape(inputs_last.shape).movedim((0, -1), ends).contiguous()


class Random(PruningMethod):
    r"""Prune entries at random, each with the same probability.

    Args:
        amount: share (float in [0, 1]) or number (int) of the unpruned entries to prune.
        generator: draws the scores. Default: torch's generator of the CPU, so that the masks do not
            depend on the device.
        budget: where the amount is counted: ``"global"`` over all parameters together, ``"layer"``
            in every parameter, ``"unit"`` in every output unit.
        structure: as in :class:`Magnitude`.

    Raises:
        TypeError: amount is not a number; generator is no ``torch.Generator``; importance_scores.
        ValueError: amount is out of range; an unknown budget; a sharded parameter.

    Example:
        >>> import torch, torchalignprune as tap
        >>> layer = torch.nn.Linear(4, 4)
        >>> _ = tap.Random.apply(layer, "weight", 3, generator=torch.Generator().manual_seed(0))
        >>> int((layer.weight == 0).sum())
        3
    """

    def __init__(
        self,
        amount: float,
        *,
        generator: torch.Generator | None = None,
        structure: Parameters | None = None,
        budget: Budget = "global",
    ) -> None:
        super().__init__(amount, structure=structure, budget=budget)
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(
                f"generator should be a torch.Generator, got {type(generator).__name__}"
            )
        self.generator = generator

    def masks(
        self,
        targets: Sequence[Target],
        scores: Sequence[Tensor | None] | None = None,
        *,
        signed: bool = False,
    ) -> list[Tensor]:
        if scores is not None:
            raise TypeError("importance_scores should be left out: Random draws its own scores")
        return super().masks(targets)

    def check_sharded(self) -> None:
        raise ValueError(
            "Random should prune before the model is sharded, got a sharded parameter: it draws "
            "the scores of all entries from one stream, and each rank has only some entries"
        )

    def ranking(self, targets: Sequence[Target]) -> Ranking:
        device = "cpu" if self.generator is None else self.generator.device
        scores = []
        for target in targets:
            # Scores for the candidates alone, so that torch's flat vector of them gets the same.
            drawn = torch.rand(target.remaining(), generator=self.generator, device=device)
            drawn = drawn.to(target.weight.device)
            if target.mask is not None:
                full = torch.zeros(target.weight.shape, device=target.weight.device)
                drawn = full.masked_scatter_(target.mask, drawn)
            scores.append(drawn.reshape(target.weight.shape))
        return Ranking(scores, "value")


def magnitude(
    module: nn.Module,
    name: str,
    amount: float,
    importance_scores: Tensor | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Prune one parameter by :class:`Magnitude`, like ``torch.nn.utils.prune.l1_unstructured``.

    Args:
        module: holds the parameter; modified in place and returned.
        name: the parameter's name in it.
        amount: share (float) or number (int) of the unpruned entries to prune.
        importance_scores: shaped like the parameter; ranked by their magnitude instead.
        kwargs: further arguments of :class:`Magnitude`.

    Example:
        >>> import torch, torchalignprune as tap
        >>> layer = tap.magnitude(torch.nn.Linear(2, 3), "weight", amount=0.5)
        >>> sorted(layer.state_dict())
        ['bias', 'weight_mask', 'weight_orig']
    """
    Magnitude.apply(module, name, amount, importance_scores=importance_scores, **kwargs)
    return module


def aligned_magnitude(
    module: nn.Module,
    name: str,
    amount: float,
    importance_scores: Tensor | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Prune one parameter by :class:`AlignedMagnitude`.

    Args:
        module: holds the parameter; modified in place and returned.
        name: the parameter's name in it.
        amount: share (float) or number (int) of the unpruned entries to prune.
        importance_scores: shaped like the parameter; ranked by their magnitude instead.
        kwargs: further arguments of :class:`AlignedMagnitude`.

    Example:
        >>> import torch, torchalignprune as tap
        >>> layer = tap.aligned_magnitude(torch.nn.Linear(4, 4), "weight", 0.5, units="both")
        >>> int(layer.weight_mask.sum())
        8
    """
    AlignedMagnitude.apply(module, name, amount, importance_scores=importance_scores, **kwargs)
    return module


def aligned_nm(
    module: nn.Module,
    name: str,
    n: int = 2,
    m: int = 4,
    importance_scores: Tensor | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Prune one parameter by :class:`AlignedNM`.

    Args:
        module: holds the parameter; modified in place and returned.
        name: the parameter's name in it.
        n: how many entries of each group are kept.
        m: the group size.
        importance_scores: shaped like the parameter; ranked by their magnitude instead.
        kwargs: further arguments of :class:`AlignedNM`.

    Example:
        >>> import torch, torchalignprune as tap
        >>> layer = tap.aligned_nm(torch.nn.Linear(8, 2), "weight", n=1, m=4)
        >>> int(layer.weight_mask.sum())
        4
    """
    AlignedNM.apply(module, name, n, m, importance_scores=importance_scores, **kwargs)
    return module


def random(module: nn.Module, name: str, amount: float, **kwargs: Any) -> nn.Module:
    """Prune one parameter by :class:`Random`, like ``torch.nn.utils.prune.random_unstructured``.

    Args:
        module: holds the parameter; modified in place and returned.
        name: the parameter's name in it.
        amount: share (float) or number (int) of the unpruned entries to prune.
        kwargs: further arguments of :class:`Random`.

    Example:
        >>> import torch, torchalignprune as tap
        >>> layer = tap.random(torch.nn.Linear(4, 4), "weight", amount=0.5)
        >>> int(layer.weight_mask.sum())
        8
    """
    Random.apply(module, name, amount, **kwargs)
    return module
