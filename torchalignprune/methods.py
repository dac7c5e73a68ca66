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
    r"""Prune the entries of the smallest magnitude, as ``torch.nn.utils.prune.L1Unstructured``.

    Args:
        amount: a float in [0, 1] is the share of the entries that are not pruned yet, an int is
            their number.
        budget: where the amount is counted: ``"global"`` over all parameters together, ``"layer"``
            in every parameter, ``"unit"`` in every output unit.
        structure: for functions like torch's ``global_unstructured``, with another budget than
            ``"global"``: their ``parameters`` once more, where a warning asks for them (frozen
            weights, by another function than torch's).

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
        """As :meth:`PruningMethod.apply`, with the places that torch's methods have."""
        return super().apply(module, name, amount, importance_scores=importance_scores, **kwargs)

    def ranking(self, targets: Sequence[Target]) -> Ranking:
        return Ranking([target.weight for target in targets], "magnitude")


class AlignedMagnitude(PruningMethod):
    r"""Prune so that the units of the pruned network stay aligned with those of the unpruned one.

    A unit's alignment under a mask ``m`` is :math:`A(m) = \langle p, r\rangle / (|p||r|)`, where
    :math:`p = m w` are its pruned and ``r`` its reference weights (by default ``w`` itself).

    ``alignment="cosine"`` maximises the summed alignment of all units. For ``r = w`` that is exact:
    in each unit the k-th largest magnitude is worth :math:`\sqrt{C_k} - \sqrt{C_{k-1}}` over
    :math:`|w|`, with :math:`C_k` the sum of the k largest squares, and the most valuable entries of
    the whole network are kept. For another reference it is a close approximation (see
    :func:`torchalignprune.ops.cosine_gains`). With ``units="both"`` the score is
    :math:`|w| / \sqrt{|w_{row}||w_{column}|}`; with a reference it is
    :math:`w (2 r - w) / (|r_{row}||r_{column}|)`, which ranks the same for ``r = w``.

    ``alignment="frobenius"`` minimises the summed distortion
    :math:`|P - R|_F^2 / |R|_F^2` of the parameters, exactly, for any reference: an entry is worth
    :math:`w (2 r - w) / |R|_F^2`.

    From "Aligned Weight Regularizers for Pruning Pretrained Neural Networks" (O'Neill, Dutta and
    Assem, Findings of ACL 2022), whose regularizers keep the same two quantities small.

    Args:
        amount: a float in [0, 1] is the share of the entries that are not pruned yet, an int is
            their number.
        alignment: ``"cosine"`` or ``"frobenius"``.
        units: a unit is an output (``"out"``), an input (``"in"``), or both count (``"both"``).
            One-dimensional parameters are one unit. With ``"frobenius"``, which looks at whole
            parameters, it matters to ``budget="unit"`` only.
        reference: the weights to stay aligned with, one tensor for each parameter: by
            ``(module, name)``, or in the order of the parameters. Default: the current weights,
            without their masks.
        input_norms: a :class:`torchalignprune.Calibration`, or the root mean square of each input
            feature over some text, one vector for each parameter, likewise: every ``w`` and ``r``
            is multiplied by its input's norm first, so that the units' outputs are kept aligned
            instead of their weights. Parameters of one dimension have no inputs.
        matching: ``"greedy"`` or ``"hungarian"``: the units of the reference are not compared with
            those in the same place, but permuted first to match the current ones, without what is
            pruned of them (:func:`torchalignprune.match_units`): by cosine, or by Euclidean
            distance for ``"frobenius"``; outputs after they were multiplied by the input norms.
            Goes with a reference and with ``units="out"`` or ``"in"``: to permute the units of one
            side is to tear those of the other apart. Parameters of one dimension are one unit.
        structure: for functions like torch's ``global_unstructured``: their ``parameters`` once
            more, where a warning asks for them (frozen weights, by another function than torch's).
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
                    f"matching={matching!r} needs a reference, whose units it permutes"
                )
            if units == "both":
                raise ValueError(
                    f"matching={matching!r} goes with units='out' or units='in', got 'both'"
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
                f"matching={self.matching!r} compares all units of a parameter, which no rank has "
                "of a sharded one: permute the reference before the model is sharded (match_units)"
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

    Within a unit the entries rank by what they add to its alignment: by :math:`|w|` for ``r = w``,
    by :math:`w (r - \rho w / 2)` for another reference (see :class:`AlignedMagnitude`). For
    ``r = w`` no n:m mask has a higher alignment. Groups run along the inputs, for convolutions
    along the input channels at each place of the kernel. With a reference a GPU adds up
    :math:`\rho` in another order than the CPU, so that near equals may change places.

    Args:
        n: how many entries of a group are kept.
        m: the size of a group; divides the number of inputs.
        reference: as in :class:`AlignedMagnitude`.
        input_norms: as in :class:`AlignedMagnitude`.
        structure: as in :class:`AlignedMagnitude`.

    Raises:
        TypeError: n or m is not an int.
        ValueError: not 0 < n <= m; a parameter of one dimension, or whose inputs m does not divide.

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
        # Groups of a flat vector would be groups of nothing.
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
                    f"the inputs of {target.name} should be a multiple of m={self.m}, got a weight "
                    f"of shape {shape}"
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
    r"""Prune entries at random, each with the same chance.

    Args:
        amount: a float in [0, 1] is the share of the entries that are not pruned yet, an int is
            their number.
        generator: draws the scores. Default: torch's own, of the CPU, so that the masks do not
            depend on the device.
        budget: where the amount is counted: ``"global"`` over all parameters together, ``"layer"``
            in every parameter, ``"unit"`` in every output unit.
        structure: as in :class:`Magnitude`.

    Raises:
        TypeError: amount is not a number; another generator than torch's; importance_scores, since
            it draws its own.
        ValueError: amount is out of range; an unknown budget.

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
            raise TypeError("Random draws its scores: importance_scores are not for it")
        return super().masks(targets)

    def check_sharded(self) -> None:
        raise ValueError(
            "Random draws from one stream for all entries, of which each rank has only some of a "
            "sharded parameter: prune at random before the model is sharded"
        )

    def ranking(self, targets: Sequence[Target]) -> Ranking:
        device = "cpu" if self.generator is None else self.generator.device
        scores = []
        for target in targets:
            # Only the candidates draw, so that torch's vector of them and the tensors get the same.
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
    """Prune one parameter by :class:`Magnitude`; as ``torch.nn.utils.prune.l1_unstructured``.

    Args:
        module: holds the parameter; modified in place and returned.
        name: the parameter's name in it.
        amount: share (float) or number (int) of the entries that are not pruned yet.
        importance_scores: shaped like the parameter; ranked by magnitude in its place.
        kwargs: what else :class:`Magnitude` takes.

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
        amount: share (float) or number (int) of the entries that are not pruned yet.
        importance_scores: shaped like the parameter; ranked by magnitude in its place.
        kwargs: what else :class:`AlignedMagnitude` takes.

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
        n: how many entries of a group are kept.
        m: the size of a group.
        importance_scores: shaped like the parameter; ranked by magnitude in its place.
        kwargs: what else :class:`AlignedNM` takes.

    Example:
        >>> import torch, torchalignprune as tap
        >>> layer = tap.aligned_nm(torch.nn.Linear(8, 2), "weight", n=1, m=4)
        >>> int(layer.weight_mask.sum())
        4
    """
    AlignedNM.apply(module, name, n, m, importance_scores=importance_scores, **kwargs)
    return module


def random(module: nn.Module, name: str, amount: float, **kwargs: Any) -> nn.Module:
    """Prune one parameter by :class:`Random`; as ``torch.nn.utils.prune.random_unstructured``.

    Args:
        module: holds the parameter; modified in place and returned.
        name: the parameter's name in it.
        amount: share (float) or number (int) of the entries that are not pruned yet.
        kwargs: what else :class:`Random` takes.

    Example:
        >>> import torch, torchalignprune as tap
        >>> layer = tap.random(torch.nn.Linear(4, 4), "weight", amount=0.5)
        >>> int(layer.weight_mask.sum())
        8
    """
    Random.apply(module, name, amount, **kwargs)
    return module
