"""Restoring the outputs of pruned layers without training.

A layer computes :math:`W x + b`. Given its mask and statistics of its inputs
(:class:`torchalignprune.Calibration`), the surviving weights and the bias that change the outputs
least solve a least-squares problem.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from torchalignprune.calibration import CONVOLUTIONS, Calibration, InputStatistics
from torchalignprune.dtensors import is_dtensor
from torchalignprune.parameters import Parameters, mask_of, stored
from torchalignprune.targets import Pair, PerParameter, Target, targets_of, with_references

__all__ = ["Realigned", "realign"]

What = Literal["bias", "weights"]

# For each bias, what earlier calls added to it and the bias as they left it; and the weights that
# they moved.
_SHIFTS: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_MOVED: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

_STEPS = 20  # On a real encoder, more than ten hardly lower the error any further.


@dataclass(frozen=True)
class Realigned:
    """What :func:`realign` did to one parameter.

    Attributes:
        name: the name of the parameter.
        before: the mean square of the change of the outputs by pruning, divided by that of the
            outputs themselves (without bias), on the calibration data. None without covariances,
            or if the outputs are all zero.
        after: the same after realignment.
        bias: whether the layer has a bias.
    """

    name: str
    before: float | None
    after: float | None
    bias: bool


def realign(
    params: Parameters,
    calibration: Calibration,
    what: What = "weights",
    reference: PerParameter | None = None,
    *,
    ridge: float = 0.01,
) -> list[Realigned]:
    r"""Adjusts the biases, or the surviving weights and the biases, of pruned layers.

    With the reference :math:`W`, the pruned weights :math:`P`, and inputs of mean :math:`\mu` and
    covariance :math:`C`:

    - ``what="bias"`` adds :math:`(W - P) \mu` to the bias, which restores the mean output.
    - ``what="weights"`` solves for each output unit ``w`` with pruned weights ``p``, which survive
      at the entries ``S``,

      .. math:: \min_{v \text{ on } S} (v - w)^T C (v - w) + \lambda |v - p|^2

      and then sets the bias in the same way. Apart from the ridge, no other weights and bias change
      the outputs less. For a layer without a bias, :math:`H = E[x x^T] = C + \mu \mu^T` replaces
      ``C``.

    The masks do not change, nor do the values under them in ``name_orig``. On the calibration data,
    no unit's outputs end up further from the reference than before: a unit that rounding to the
    weight's dtype would make worse is left as it was. Tied weights are adjusted once, for the
    inputs of all their places.

    It may be called again after further pruning. What an earlier call added to a bias is removed
    first. Once weights have been moved, later calls need a reference from before that, as do
    reports: without one they compare with the moved weights. Both are remembered for the lifetime
    of the parameters, but not in state dicts, copies or pickles of the model. A bias that has
    changed since, by training or loading, is refused. Nothing is written before all parameters are
    solved, which takes as much memory as the parameters.

    Few tokens give poor statistics: the outputs on other text may become worse. With fewer tokens
    than a layer has inputs there is a warning.

    This is the least-squares problem of Frantar and Alistarh, "SparseGPT" (2023), equation 2, and
    of Boza, "Fast and effective weight update for pruned large language models" (2024), with the
    bias added. It is solved for all units of a layer at once by 20 steps of conjugate gradients,
    starting from the pruned weights. Units with at most 20 entries left are solved exactly; on the
    layers of a real encoder the error is within a fraction of a percent of the least one.

    Args:
        params: ``(module, name)`` pairs of pruned weights of linear layers: ``nn.Linear``,
            transformers' ``Conv1D`` and the input projections of ``nn.MultiheadAttention``.
        calibration: of at least these parameters; for ``"weights"`` one with
            ``statistics="covariance"``.
        what: ``"bias"`` or ``"weights"``. With ``"bias"``, layers without a bias are left as they
            are; the result says which these are.
        reference: the unpruned weights, one tensor for each parameter: by ``(module, name)``, or in
            the order of the parameters. Default: the weights under the masks, ``name_orig``, which
            is right as long as they have not been trained or moved since. A ``Pruner`` sets them to
            zero, so a reference is needed after one.
        ridge: :math:`\lambda`, as a fraction of the mean variance of the input features. It holds
            weights in place whose inputs hardly vary in the calibration data.

    Returns:
        One entry for each distinct parameter, with the error of its outputs before and after.

    Raises:
        ValueError: a parameter is not pruned, is sharded (``DTensor``) or belongs to a convolution;
            it has no entry in the calibration, or no covariance for ``"weights"``; no layer has a
            bias for ``"bias"``, or two layers share one; a reference has the wrong shape; weights
            have NaN or infinity; there is no reference, but the weights were moved before or are
            all zero under the masks; a bias was moved and has changed since; or the ridge is
            negative. The error names the parameter.
        TypeError: ``calibration`` is not a :class:`torchalignprune.Calibration`.

    Example:
        >>> import torch, torchalignprune as tap
        >>> layer = torch.nn.Linear(8, 4)
        >>> x = torch.randn(64, 8) @ torch.randn(8, 8)
        >>> params = tap.prunable_parameters(torch.nn.Sequential(layer))
        >>> calibration = tap.Calibration.collect(layer, [x], params, statistics="covariance")
        >>> tap.global_unstructured(params, tap.AlignedMagnitude, amount=0.5)
        >>> (result,) = tap.realign(params, calibration)
        >>> result.after < result.before
        True
    """
    if what not in get_args(What):
        raise ValueError(f"what should be one of {get_args(What)}, got {what!r}")
    if not isinstance(calibration, Calibration):
        raise TypeError(
            f"calibration should be a torchalignprune.Calibration, got {type(calibration).__name__}"
        )
    if not (math.isfinite(ridge) and ridge >= 0):
        raise ValueError(f"ridge should be finite and not negative, got {ridge}")
    targets = with_references(targets_of(params), reference)
    layers = [_Layer(target, calibration, what) for target in targets]
    _check_biases(layers, what)
    for target in targets:
        if target.reference is None and stored(*target.places[0]) in _MOVED:
            raise ValueError(
                f"{target.name} was realigned before, so it no longer has the unpruned weights: "
                "pass a reference from before that"
            )
    if reference is None:
        _check_weights_under_masks(targets)
    _warn_of_few_tokens(layers)
    with torch.no_grad():
        moves = [layer.solve(ridge) for layer in layers]
        for layer, (weight, biases, _) in zip(layers, moves, strict=True):
            layer.write(weight, biases)
    for layer in layers:
        layer.refresh()
    return [result for _, _, result in moves]


class _Bias:
    """The bias of a layer, or the part of it that belongs to one weight."""

    def __init__(self, module: nn.Module, name: str, part: slice) -> None:
        self.module = module
        self.name = name
        self.part = part

    @property
    def values(self) -> Tensor:
        return stored(self.module, self.name).detach()[self.part]

    @property
    def shift(self) -> Tensor:
        """What earlier calls added, which is unknown for a bias that has changed since."""
        values = self.values
        kept: Tensor | None = _SHIFTS.get(stored(self.module, self.name))
        if kept is None:
            return torch.zeros_like(values)
        shift, left = kept.to(values)[:, self.part].unbind()
        if bool((shift != 0).any()) and not torch.equal(values, left):
            raise ValueError(
                f"the {self.name} of {type(self.module).__name__} has changed since it was "
                "realigned, so what realign added cannot be removed: train after the last call, "
                "or load the weights into a fresh model"
            )
        return shift

    def write(self, new: Tensor) -> None:
        parameter = stored(self.module, self.name)
        whole = parameter.detach()
        shift = self.shift + (new - self.values)
        kept = _SHIFTS.get(parameter, torch.stack([torch.zeros_like(whole), whole])).to(whole)
        kept[0, self.part], kept[1, self.part] = shift, new
        _SHIFTS[parameter] = kept
        self.values.copy_(new)

    def moved(self, by: Tensor) -> Tensor:
        """The bias with ``by`` in place of earlier shifts; its pruned entries do not change."""
        new = (self.values.to(by.dtype) - self.shift.to(by.dtype) + by).to(self.values.dtype)
        mask = mask_of(self.module, self.name)
        return new if mask is None else torch.where(mask[self.part] != 0, new, self.values)


def _bias_of(module: nn.Module, name: str) -> _Bias | None:
    attribute, part = "bias", slice(None)
    if isinstance(module, nn.MultiheadAttention):
        attribute = "in_proj_bias"
        if name != "in_proj_weight":
            start = "qkv".index(name[0]) * module.embed_dim
            part = slice(start, start + module.embed_dim)
    elif name != "weight":
        return None
    there = {attribute, f"{attribute}_orig"} & {
        key for key, parameter in module._parameters.items() if parameter is not None
    }
    return _Bias(module, attribute, part) if there else None


def _check_whole(tensor: Tensor, name: str) -> None:
    if is_dtensor(tensor):
        raise ValueError(
            f"{name} should not be sharded, got a DTensor: realign the model before it is sharded, "
            "or an unsharded one with its full state (get_model_state_dict with "
            "full_state_dict=True)"
        )


def _check_weights_under_masks(targets: Sequence[Target]) -> None:
    masked = [(t.weight, t.mask) for t in targets if t.mask is not None and not bool(t.mask.all())]
    if masked and not any(bool(w.masked_fill(mask, 0).any()) for w, mask in masked):
        raise ValueError(
            f"{targets[0].name} and all other parameters are zero under their masks, as a Pruner "
            "leaves them, so there are no unpruned weights to restore: pass a reference"
        )


def _check_biases(layers: Sequence[_Layer], what: What) -> None:
    owners: dict[tuple[int, int | None], str] = {}
    for layer in layers:
        for bias in layer.biases:
            if bias is None:
                continue
            key = (id(stored(bias.module, bias.name)), bias.part.start)
            if key in owners:
                raise ValueError(
                    f"{layer.target.name} shares its bias with {owners[key]}, so the bias cannot "
                    "be adjusted for both: leave one of them out"
                )
            owners[key] = layer.target.name
    if what == "bias" and not owners:
        raise ValueError('what="bias" needs a layer with a bias, but none of these has one')


def _warn_of_few_tokens(layers: Sequence[_Layer]) -> None:
    for layer in layers:
        for found in layer.statistics:
            if found.count < len(found.mean):
                warnings.warn(
                    f"the calibration has only {found.count} tokens for the {len(found.mean)} "
                    f"inputs of {layer.target.name}: outputs on other text may become worse",
                    UserWarning,
                    stacklevel=3,
                )
                return


class _Layer:
    """A pruned parameter with the inputs and the biases of all its places."""

    def __init__(self, target: Target, calibration: Calibration, what: What) -> None:
        self.target = target
        self.what = what
        self.statistics: list[InputStatistics] = []
        self.biases: list[_Bias | None] = []
        weight = target.weight
        _check_whole(weight, target.name)
        if target.mask is None:
            raise ValueError(f"{target.name} should be pruned, got a parameter without a mask")
        for module, name in target.places:
            if isinstance(module, CONVOLUTIONS):
                raise ValueError(
                    f"{target.name} belongs to a convolution, which realign does not support: "
                    "leave it out"
                )
            found = calibration.get((module, name))
            if found is None:
                raise ValueError(f"the calibration has no entry for {target.name}")
            if weight.dim() != 2 or len(found.mean) != weight.size(target.in_dim):
                raise ValueError(
                    f"{target.name} should be a matrix with {len(found.mean)} inputs, as in the "
                    f"calibration, got shape {tuple(weight.shape)}"
                )
            if what == "weights" and found.covariance is None:
                raise ValueError(
                    f"the calibration has no covariance for {target.name}: collect it with "
                    'statistics="covariance"'
                )
            self.statistics.append(found)
            bias = _bias_of(module, name)
            if bias is not None:
                _check_whole(stored(module, bias.name), f"the bias of {target.name}")
            self.biases.append(bias)
        for tensor, which in ((weight, "weights"), (target.reference, "reference")):
            if tensor is not None and not bool(tensor.isfinite().all()):
                raise ValueError(
                    f"the {which} of {target.name} should be finite numbers, got NaN or infinity"
                )

    def solve(self, ridge: float) -> tuple[Tensor | None, list[Tensor | None], Realigned]:
        """The new weights (None if they stay), the new biases, and the result."""
        target = self.target
        assert target.mask is not None
        wide = target.dtype
        mask = self._rows(target.mask)
        reference = target.reference_here()
        w = self._rows(target.weight if reference is None else reference).to(wide)
        p = self._rows(target.weight).to(wide) * mask
        places = [
            _Place(statistics, bias, count / sum(self._counts()), w)
            for statistics, bias, count in zip(
                self.statistics, self.biases, self._counts(), strict=True
            )
        ]
        still = [None if bias is None else bias.values for bias in self.biases]
        before = _sum(place.error(p - w, None) for place in places)
        v = p
        if self.what == "weights":
            products = _sum(place.products() for place in places)
            v = p + least_squares_step(products, p - w, mask, ridge)
            v = v.to(target.weight.dtype).to(wide)
        moved = [
            None if place.bias is None else place.bias.moved((w - v) @ place.mean)
            for place in places
        ]
        after = _sum(place.error(v - w, new) for place, new in zip(places, moved, strict=True))
        better = after <= before
        v = torch.where(better[:, None], v, p)
        biases = [
            None if new is None or old is None else torch.where(better, new, old)
            for new, old in zip(moved, still, strict=True)
        ]
        size = float(_sum(place.error(w, None, bias_too=False) for place in places).sum())
        known = all(found.covariance is not None for found in self.statistics) and size > 0
        result = Realigned(
            target.name,
            float(before.sum()) / size if known else None,
            float(torch.minimum(before, after).sum()) / size if known else None,
            any(bias is not None for bias in self.biases),
        )
        new_weight = None
        if self.what == "weights":
            # The values under the mask stay.
            new_weight = self._rows(v).to(target.weight.dtype)
            new_weight = torch.where(target.mask, new_weight, target.weight)
        return new_weight, biases, result

    def write(self, weight: Tensor | None, biases: Sequence[Tensor | None]) -> None:
        if weight is not None:
            self.target.weight.copy_(weight)
            _MOVED[stored(*self.target.places[0])] = True
        for bias, new in zip(self.biases, biases, strict=True):
            if bias is not None and new is not None:
                bias.write(new)

    def refresh(self) -> None:
        """Recomputes the masked weights and biases that the layer reads."""
        pairs: list[Pair] = list(self.target.places)
        pairs += [(bias.module, bias.name) for bias in self.biases if bias is not None]
        for module, name in pairs:
            mask = mask_of(module, name)
            if mask is not None:
                setattr(module, name, stored(module, name) * mask)

    def _counts(self) -> list[int]:
        return [found.count for found in self.statistics]

    def _rows(self, tensor: Tensor) -> Tensor:
        """Moves the units into the rows, and back again."""
        return tensor.transpose(0, 1) if self.target.out_dim == 1 else tensor


class _Place:
    """The inputs of a weight at one of its places, on its device."""

    def __init__(
        self, statistics: InputStatistics, bias: _Bias | None, share: float, like: Tensor
    ) -> None:
        self.bias = bias
        self.share = share
        self.mean = statistics.mean.to(like)
        found = statistics.covariance
        self.covariance = None if found is None else found.to(like)

    def products(self) -> Tensor:
        """The matrix that measures the change of a unit, given that the bias is set after it."""
        assert self.covariance is not None
        if self.bias is not None:
            return self.share * self.covariance
        return self.share * torch.addr(self.covariance, self.mean, self.mean)

    def error(self, change: Tensor, bias: Tensor | None, *, bias_too: bool = True) -> Tensor:
        """The mean square of each unit's change of output; without covariance, of its mean.

        Args:
            change: of the weights, shape (units, inputs).
            bias: the new bias; None if it stays.
            bias_too: include what this and earlier calls added to the bias.
        """
        apart = change @ self.mean
        if self.bias is not None and bias_too:
            shift = self.bias.shift.to(apart)
            moved = 0 if bias is None else bias.to(apart) - self.bias.values.to(apart)
            apart = apart + shift + moved
        squares = apart.square()
        if self.covariance is not None:
            squares = squares + ((change @ self.covariance) * change).sum(dim=1)
        return self.share * squares


def _sum(tensors: Iterable[Tensor]) -> Tensor:
    return functools.reduce(torch.add, tensors)


def least_squares_step(products: Tensor, change: Tensor, mask: Tensor, ridge: float) -> Tensor:
    r"""The ``d`` on the mask of each unit that minimizes
    :math:`(c + d)^T A (c + d) + \lambda |d|^2`.

    Uses conjugate gradients for all units at once, with the features scaled to the same size. Every
    step takes one product with ``A`` and lowers the error of every unit.

    Args:
        products: ``A``, shape (inputs, inputs).
        change: ``c``, shape (units, inputs).
        mask: bool, shape (units, inputs).
        ridge: :math:`\lambda` as a fraction of the mean of the diagonal of ``A``.
    """
    shift = ridge * products.diagonal().mean()
    diagonal = products.diagonal() + shift
    scale = torch.where(diagonal > 0, diagonal, 1).rsqrt() * (diagonal > 0)
    ridges = shift * scale.square()
    products = products * scale * scale[:, None]
    residual = -(change / torch.where(scale > 0, scale, 1)) @ products * mask
    # Every unit starts with a residual of norm 1, and stops before rounding dominates it.
    start = residual.norm(dim=1, keepdim=True)
    residual = torch.where(start > 0, residual / start, 0)
    least = (8 * torch.finfo(residual.dtype).eps) ** 2
    size = residual.square().sum(dim=1, keepdim=True)
    step, direction = torch.zeros_like(residual), residual.clone()
    for _ in range(_STEPS):
        image = torch.addmm(ridges * direction, direction, products) * mask
        curvature = (direction * image).sum(dim=1, keepdim=True)
        length = torch.where(curvature > 0, size / curvature, 0)
        step.addcmul_(direction, length)
        residual.addcmul_(image, length, value=-1)
        new = residual.square().sum(dim=1, keepdim=True)
        going = new > least
        if not bool(going.any()):
            break
        direction = (residual + direction * (new / size.where(size > 0, 1))) * going
        size = new * going
    return step.mul_(start).mul_(scale)
