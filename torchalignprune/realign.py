"""Moving what pruning left so that the outputs of the layers come back into line, without training.

A layer computes :math:`W x + b`. With its mask chosen and statistics of its inputs at hand
(:class:`torchalignprune.Calibration`), the weights that survive and the bias can be set in closed
form to what changes the outputs least.
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

# What earlier calls added to a bias, with the bias as they left it, and which weights they moved.
_SHIFTS: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_MOVED: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

_STEPS = 20  # From ten on, hardly anything is won on a real encoder.


@dataclass(frozen=True)
class Realigned:
    """What :func:`realign` did to one parameter.

    Attributes:
        name: the parameter.
        before: the mean square of the change that pruning makes to the outputs, over that of the
            outputs themselves (without bias), on the calibration text. None without covariances,
            and where the outputs are all zero.
        after: the same with the weights and the bias as they are now.
        bias: whether there was a bias to move.
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
    r"""Moves the biases, or the surviving weights and the biases, of pruned layers.

    With the reference :math:`W`, the pruned weights :math:`P`, and inputs of mean :math:`\mu` and
    covariance :math:`C`:

    - ``what="bias"`` adds :math:`(W - P) \mu` to the bias, so that the mean output is what it was.
    - ``what="weights"`` finds for each output unit ``w`` with the surviving entries ``S``

      .. math:: \min_{v \text{ on } S} (v - w)^T C (v - w) + \lambda |v - p|^2

      and then sets the bias in the same way. Weights and bias together are then the least change
      of the outputs there is, apart from the ridge. A layer without a bias has
      :math:`H = E[x x^T] = C + \mu \mu^T` in the place of ``C``.

    The masks stay as they are, and so does what lies under them in ``name_orig``. No unit's outputs
    are ever further from the reference on the calibration text than before; where rounding to the
    weight's dtype would see to that, the unit stays as it was. Tied weights are moved once, for the
    inputs of all their places.

    After further pruning it may be called again: what an earlier call added to a bias is taken off
    first, and once weights were moved, a reference from before has to be given. Both are remembered
    as long as the parameters live, not in their state dict, nor by copies and pickles of the model;
    a bias that changed in between, by training or loading, is refused. A report without a reference
    compares with the moved weights then. It takes as much memory as the parameters, so that nothing
    has changed where it fails before the last of them is solved.

    Statistics of few tokens say little: with fewer tokens than a layer has inputs there is a
    warning, because the outputs on other text may well become worse.

    This is the least squares problem of Frantar and Alistarh, "SparseGPT" (2023), equation 2, and
    of Boza, "Fast and effective weight update for pruned large language models" (2024), with the
    bias in it. It is solved for all units of a layer at once, by 20 steps of conjugate gradients
    from where the weights are: exactly where a unit has no more than 20 entries left, and to a
    fraction of a percent of the error on the layers of a real encoder.

    Args:
        params: ``(module, name)`` pairs of pruned weights of linear layers: ``nn.Linear``,
            transformers' ``Conv1D`` and the input projections of ``nn.MultiheadAttention``.
        calibration: of at least these parameters; for ``"weights"`` one with
            ``statistics="covariance"``.
        what: ``"bias"`` or ``"weights"``. Layers without a bias keep their mean error, and with
            ``"bias"`` are left alone; the result says which these are.
        reference: the weights to come back to, one tensor for each parameter: by
            ``(module, name)``, or in the order of the parameters. Default: the weights under the
            masks, ``name_orig``: right as long as nothing has trained or moved them since. A
            ``Pruner`` sets them to zero there, so after one a reference is needed.
        ridge: :math:`\lambda`, as a share of the mean variance of the inputs' features. It keeps
            weights whose inputs hardly vary in the calibration text where they are.

    Returns:
        One entry for each distinct parameter, with the error of its outputs before and after.

    Raises:
        ValueError: a parameter that is not pruned, or sharded (``DTensor``), or of a convolution;
            one without an entry in the calibration, or without a covariance for ``"weights"``;
            ``"bias"`` where no layer has one; two layers with one bias; a reference of the wrong
            shape; NaN or infinity in the weights; weights that were moved before, or that are all
            zero under the masks, without a reference; a bias that was moved and has changed since;
            a negative ridge. The error names the parameter.
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
                f"{target.name} was realigned before, so that its weights are not those to come "
                "back to: give a reference from before that"
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
        """What earlier calls added. Of a bias that changed since none can say."""
        values = self.values
        kept: Tensor | None = _SHIFTS.get(stored(self.module, self.name))
        if kept is None:
            return torch.zeros_like(values)
        shift, left = kept.to(values)[:, self.part].unbind()
        if bool((shift != 0).any()) and not torch.equal(values, left):
            raise ValueError(
                f"the {self.name} of {type(self.module).__name__} was realigned before and has "
                "changed since, so that what realign added cannot be taken off: train after the "
                "last call, or load the weights into a fresh model"
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
        """The bias with something added in the place of earlier shifts, where it is not pruned."""
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
            f"{name} is sharded (a DTensor), but realign solves for whole layers: realign the "
            "model before it is sharded, or an unsharded one with its full state "
            "(get_model_state_dict with full_state_dict=True)"
        )


def _check_weights_under_masks(targets: Sequence[Target]) -> None:
    masked = [(t.weight, t.mask) for t in targets if t.mask is not None and not bool(t.mask.all())]
    if masked and not any(bool(w.masked_fill(mask, 0).any()) for w, mask in masked):
        raise ValueError(
            f"the weights of {targets[0].name} and of all others are zero under the masks, as a "
            "Pruner leaves them, so that there is nothing to come back to: give a reference"
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
                    f"{layer.target.name} shares its bias with {owners[key]}, so that it cannot be "
                    "moved for one of them"
                )
            owners[key] = layer.target.name
    if what == "bias" and not owners:
        raise ValueError('what="bias" needs a layer with a bias, and none of these has one')


def _warn_of_few_tokens(layers: Sequence[_Layer]) -> None:
    for layer in layers:
        for found in layer.statistics:
            if found.count < len(found.mean):
                warnings.warn(
                    f"the calibration has {found.count} tokens for the {len(found.mean)} inputs of "
                    f"{layer.target.name}: on other text the outputs may become worse",
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
            raise ValueError(f"{target.name} is not pruned: realign moves what a mask leaves")
        for module, name in target.places:
            if isinstance(module, CONVOLUTIONS):
                raise ValueError(
                    f"{target.name} belongs to a convolution, which realign cannot move: leave it "
                    "out"
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
                raise ValueError(f"the {which} of {target.name} should be finite")

    def solve(self, ridge: float) -> tuple[Tensor | None, list[Tensor | None], Realigned]:
        """The new weights, None if they stay, the new biases, and what it comes to."""
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
            # What lies under the mask stays.
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
        """Puts the product with the mask where the layer reads its weight."""
        pairs: list[Pair] = list(self.target.places)
        pairs += [(bias.module, bias.name) for bias in self.biases if bias is not None]
        for module, name in pairs:
            mask = mask_of(module, name)
            if mask is not None:
                setattr(module, name, stored(module, name) * mask)

    def _counts(self) -> list[int]:
        return [found.count for found in self.statistics]

    def _rows(self, tensor: Tensor) -> Tensor:
        """Units first, and back again."""
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
        """What the change of a unit is measured with, when the bias follows it."""
        assert self.covariance is not None
        if self.bias is not None:
            return self.share * self.covariance
        return self.share * torch.addr(self.covariance, self.mean, self.mean)

    def error(self, change: Tensor, bias: Tensor | None, *, bias_too: bool = True) -> Tensor:
        """The mean square of the change of each unit's output; without covariance that of its mean.

        Args:
            change: of the weights, shape (units, inputs).
            bias: what the bias becomes; None if it stays.
            bias_too: the change of the bias by earlier calls counts.
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
    r"""What to add to each unit on its mask: the ``d`` with the least
    :math:`(c + d)^T A (c + d) + \lambda |d|^2`.

    By conjugate gradients for all units at once, in features scaled to the same size. Every step
    takes one product with ``A`` and lowers the error of every unit.

    Args:
        products: ``A``, shape (inputs, inputs).
        change: ``c``, shape (units, inputs).
        mask: bool, shape (units, inputs).
        ridge: :math:`\lambda` as a share of the mean of the diagonal of ``A``.
    """
    shift = ridge * products.diagonal().mean()
    diagonal = products.diagonal() + shift
    scale = torch.where(diagonal > 0, diagonal, 1).rsqrt() * (diagonal > 0)
    ridges = shift * scale.square()
    products = products * scale * scale[:, None]
    residual = -(change / torch.where(scale > 0, scale, 1)) @ products * mask
    # Every unit starts with a residual of length 1, and stops before it is lost in rounding.
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
