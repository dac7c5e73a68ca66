"""What a pruning method works on: one target for each parameter, whatever the caller gave.

A method's :meth:`apply` and :func:`torchalignprune.global_unstructured` know the modules. torch's
own ``global_unstructured`` passes a method one flat vector of the entries that are not pruned yet;
which parameters they belong to is read off the calling frame or the vector's autograd history.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import prune

from torchalignprune.calibration import Calibration
from torchalignprune.dtensors import add_up, is_dtensor, like, local, own_part, shard_dims
from torchalignprune.parameters import (
    DTYPES,
    Parameters,
    bool_mask,
    check_mask,
    known_unit_dimension,
    mask_of,
    pairs_of,
    parameter_names,
    same_mask,
    stored,
    unit_dimension,
)

if TYPE_CHECKING:
    from torchalignprune.shards import Shard

__all__ = [
    "PerParameter",
    "Target",
    "check_readable",
    "count_true",
    "parameters_of_caller",
    "targets_from_history",
    "targets_of",
    "with_input_norms",
    "with_references",
]

Pair = tuple[nn.Module, str]
PerParameter = Mapping[Pair, Tensor] | Sequence[Tensor] | Tensor
"""One tensor for each parameter: by ``(module, name)``, or in the order of the parameters; for a
single parameter the tensor itself will do."""


@dataclass(frozen=True)
class Target:
    """A parameter that is to be pruned.

    Attributes:
        weight: the stored weights, without the mask; detached.
        mask: bool, shaped like the weight, or None if nothing is pruned yet.
        name: what to call it in an error.
        out_dim: the dimension of the units (outputs): 0, or 1 for transformers' Conv1D.
        places: the ``(module, name)`` pairs that hold it: several for tied weights, none if the
            modules are unknown.
        parameter: the parameter itself, if it is known but its modules are not.
        reference: the weights that its units are to stay aligned with, shaped like the weight,
            maybe on another device; None for the weight itself.
        input_norms: one for each input, or None.
        shard: where its entries lie in the whole parameter; None if this is the whole, or a DTensor
            whose part on this rank has not been taken yet.
    """

    weight: Tensor
    mask: Tensor | None
    name: str
    out_dim: int = 0
    places: tuple[Pair, ...] = ()
    parameter: Tensor | None = None
    reference: Tensor | None = None
    input_norms: Tensor | None = None
    shard: Shard | None = None

    @property
    def in_dim(self) -> int:
        return 1 - self.out_dim

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that scores are computed in."""
        return torch.float64 if self.weight.dtype == torch.float64 else torch.float32

    def reference_here(self) -> Tensor | None:
        """The reference on the weight's device."""
        return None if self.reference is None else self.reference.to(self.weight.device)

    def remaining(self) -> int:
        """How many entries are not pruned yet; of a DTensor on all ranks, which all must call."""
        if self.mask is None:
            return self.weight.numel()
        if not is_dtensor(self.mask):
            return count_true(self.mask)
        own = local(self.mask)
        count = torch.tensor(count_true(own), device=own.device)
        dims = [i for i, _ in shard_dims(self.mask)]
        return int(add_up(count, self.mask.device_mesh, dims))

    def entries(self) -> Tensor:
        """The entries that are not pruned yet, by flat index."""
        return self.weight.flatten() if self.mask is None else self.weight[self.mask]


def count_true(mask: Tensor) -> int:
    """How many entries of a bool mask are True."""
    if mask.device.type == "cpu" and type(mask) is Tensor:
        # torch would first make a copy of eight bytes per entry.
        return int(np.count_nonzero(mask.numpy()))
    return int(mask.sum())


def targets_of(parameters: Parameters) -> list[Target]:
    """One target for each distinct parameter; tied weights are one, with all their places.

    Raises:
        TypeError: not pairs of a module and a name; not a floating-point parameter.
        AttributeError: the module has no attribute of that name.
        ValueError: no pairs; tied weights whose masks differ; an attribute in the place of the mask
            or the original; a mask with other numbers than 0 and 1.
    """
    pairs = pairs_of(parameters)
    if not pairs:
        raise ValueError("parameters should have at least one (module, name) pair, got none")
    for pair in pairs:
        if not (isinstance(pair, tuple | list) and len(pair) == 2):
            got = (
                f"a {type(pair).__name__} of {len(pair)}"
                if isinstance(pair, tuple | list)
                else type(pair).__name__
            )
            raise TypeError(
                f"parameters should be (module, name) pairs, got {got}; prunable_parameters(model) "
                "lists those of a model"
            )
        if not (isinstance(pair[0], nn.Module) and isinstance(pair[1], str)):
            raise TypeError(
                "parameters should be pairs of a torch.nn.Module and a str, got "
                f"({type(pair[0]).__name__}, {type(pair[1]).__name__})"
            )
    found: dict[int, Target] = {}
    for (module, name), label in zip(pairs, parameter_names(pairs), strict=True):
        weight = _parameter(module, name, label)
        mask = mask_of(module, name)
        if mask is not None:
            check_mask(mask, label)
            mask = bool_mask(mask)
        if mask is not None and is_dtensor(weight) and not is_dtensor(mask):
            # It was sharded after it was pruned, so every rank has the whole mask.
            mask = like(weight, own_part(mask, weight, label).contiguous())
        tied = found.get(id(weight))
        if tied is None:
            found[id(weight)] = Target(
                weight.detach(), mask, label, unit_dimension(module, name), ((module, name),)
            )
            continue
        if (tied.mask is None) != (mask is None) or (
            mask is not None and tied.mask is not None and not same_mask(mask, tied.mask)
        ):
            raise ValueError(f"{label} is tied to {tied.name}, but their masks differ")
        if (module, name) not in tied.places:
            places = (*tied.places, (module, name))
            found[id(weight)] = replace(tied, places=places)
    return list(found.values())


def _parameter(module: nn.Module, name: str, label: str) -> Tensor:
    """The stored parameter, if it is one that can be pruned."""
    if isinstance(module, torch.jit.ScriptModule):
        raise TypeError(f"{label} should be in a module that takes pruning hooks, got ScriptModule")
    if not hasattr(module, name):
        raise AttributeError(f"{label}: {type(module).__name__} has no attribute {name!r}")
    masked = mask_of(module, name) is not None and f"{name}_orig" in module._parameters
    if not masked and module._parameters.get(name) is None:
        raise TypeError(
            f"{label} should be a torch.nn.Parameter of its module, got "
            f"{type(getattr(module, name)).__name__}"
        )
    for taken in (f"{name}_orig", f"{name}_mask"):
        if not masked and hasattr(module, taken):
            raise ValueError(f"{label}: {type(module).__name__} has an attribute {taken!r} already")
    weight = stored(module, name)
    if is_lazy(weight):
        raise TypeError(f"{label} is not initialized yet: run the model once before pruning it")
    if weight.dtype not in DTYPES:
        raise TypeError(f"{label} should be one of {_list(DTYPES)}, got {weight.dtype}")
    if weight.layout != torch.strided:
        raise TypeError(f"{label} should be a strided tensor, got {weight.layout}")
    return weight


def _list(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def with_references(targets: Sequence[Target], reference: PerParameter | None) -> list[Target]:
    """The targets, each with its reference, on whatever device that is.

    Raises:
        ValueError: too few or too many, none for a target, another shape than the weight's, or on
            the meta device.
        TypeError: not tensors, or sparse or not floating-point ones.
    """
    results = []
    for target, own in _per_target(targets, reference, "reference"):
        if own is not None and not own.is_floating_point():
            raise TypeError(
                f"the reference of {target.name} should have real numbers, got {own.dtype}"
            )
        if own is not None and own.shape != target.weight.shape:
            raise ValueError(
                f"the reference of {target.name} should have shape {tuple(target.weight.shape)}, "
                f"got {tuple(own.shape)}"
            )
        results.append(replace(target, reference=own))
    return results


def with_input_norms(
    targets: Sequence[Target], norms: PerParameter | Calibration | None
) -> list[Target]:
    """The targets, each with its input norms; one-dimensional parameters have none.

    Raises:
        ValueError: too few or too many, none for a target, another length than the weight has
            inputs, on the meta device, or negative, infinite or NaN.
        TypeError: not tensors, or sparse or not floating-point ones.
    """
    if isinstance(norms, Calibration):
        norms = norms.norms()
    results = []
    for target, own in _per_target(targets, norms, "input_norms"):
        if own is None or target.weight.dim() < 2:
            results.append(target)
            continue
        length = target.weight.size(target.in_dim)
        if own.shape != (length,):
            raise ValueError(
                f"the input_norms of {target.name} should have shape ({length},), one for each "
                f"input, got {tuple(own.shape)}{_grouped(target, own.numel())}"
            )
        if not own.is_floating_point():
            raise TypeError(
                f"the input_norms of {target.name} should be real numbers, got {own.dtype}"
            )
        if not bool((own.isfinite() & (own >= 0)).all()):
            raise ValueError(f"the input_norms of {target.name} should be finite and not negative")
        own = own.to(target.weight.device, target.dtype)
        results.append(replace(target, input_norms=own))
    return results


def _grouped(target: Target, inputs: int) -> str:
    groups = {getattr(module, "groups", 1) for module, _ in target.places}
    if groups == {1} or inputs not in (g * target.weight.size(target.in_dim) for g in groups):
        return ""
    return ": a grouped convolution has other inputs for each group, so leave it out"


def _per_target(
    targets: Sequence[Target], given: PerParameter | None, what: str
) -> list[tuple[Target, Tensor | None]]:
    if given is None:
        return [(target, None) for target in targets]
    found: list[Any] = []
    if isinstance(given, Tensor):
        found = [given]
    elif not isinstance(given, Mapping):
        if not isinstance(given, Iterable):
            raise TypeError(
                f"{what} should be tensors, one for each parameter, got {type(given).__name__}"
            )
        found = list(given)
    else:
        for key in given:
            if not (isinstance(key, tuple) and len(key) == 2 and isinstance(key[0], nn.Module)):
                raise TypeError(
                    f"{what} should be keyed by (module, name) pairs, got {type(key).__name__}"
                )
        by_weight = {id(stored(*pair)): value for pair, value in given.items()}
        for target in targets:
            own = [given[place] for place in target.places if place in given]
            if not own and target.parameter is not None and id(target.parameter) in by_weight:
                own = [by_weight[id(target.parameter)]]
            if not own:
                raise ValueError(f"{what} has no entry for {target.name}")
            found.append(own[0])
    if len(found) != len(targets):
        raise ValueError(
            f"{what} should have one tensor for each of the {len(targets)} parameters, got "
            f"{len(found)}"
        )
    for target, own in zip(targets, found, strict=True):
        if not isinstance(own, Tensor):
            raise TypeError(
                f"the {what} of {target.name} should be a tensor, got {type(own).__name__}"
            )
        check_readable(own, f"the {what} of {target.name}", target.weight)
    return [(target, own.detach()) for target, own in zip(targets, found, strict=True)]


def check_readable(given: Tensor, what: str, weight: Tensor) -> None:
    """Refuses a tensor without readable entries: a sparse one, or one on the meta device.

    If the weight is on the meta device, the tensor may be too.

    Raises:
        TypeError: it is sparse.
        ValueError: it is on the meta device.
    """
    if given.layout != torch.strided:
        raise TypeError(f"{what} should be a strided tensor, got {given.layout}")
    if given.is_meta and not weight.is_meta:
        raise ValueError(f"{what} should have values, got a tensor on the meta device")


def parameters_of_caller() -> tuple[list[Pair], bool] | None:
    """The parameters that torch's ``global_unstructured`` is pruning, and whether by scores.

    It passes a method only their entries, so they are read from its frame. None if it is not among
    the callers.
    """
    frame = sys._getframe(1).f_back
    while frame is not None:
        if frame.f_code is prune.global_unstructured.__code__:
            parameters = frame.f_locals.get("parameters")
            scored = bool(frame.f_locals.get("importance_scores"))
            return (list(parameters), scored) if isinstance(parameters, list | tuple) else None
        frame = frame.f_back
    return None


def targets_from_history(vector: Tensor) -> list[Target] | None:
    """The parameters whose entries make up the vector that torch's pruning hands to a method.

    The history leads from the vector (``t[mask == 1]``) over the concatenation and the views to the
    parameters, or to their products with the masks. Returns None if there is no such history. The
    modules are not part of it: units are along dimension 0 unless ``prunable_parameters`` has
    listed the parameter with units along dimension 1.
    """
    index = vector.grad_fn
    if index is None or index.name() != "IndexBackward0":
        return None
    chosen = [i for i in getattr(index, "_saved_indices", ()) if i is not None]
    if len(chosen) != 1 or chosen[0].dtype != torch.bool:
        return None
    alive = chosen[0].flatten()
    node: Any = index.next_functions[0][0]
    pieces = (
        [piece for piece, _ in node.next_functions]
        if node is not None and node.name() == "CatBackward0"
        else [node]
    )
    targets: list[Target] = []
    start = 0
    for number, piece in enumerate(pieces):
        parameter = _leaf(piece)
        if parameter is None:
            return None
        mask = alive[start : start + parameter.numel()]
        start += parameter.numel()
        if mask.numel() != parameter.numel():
            return None
        targets.append(
            Target(
                parameter.detach(),
                None if bool(mask.all()) else mask.reshape(parameter.shape),
                f"parameters[{number}]",
                known_unit_dimension(parameter),
                parameter=parameter,
            )
        )
    whole = sum(target.remaining() for target in targets)
    return targets if start == alive.numel() and whole == vector.numel() else None


def _leaf(node: Any) -> Tensor | None:
    """The parameter at the end of a chain of views, maybe multiplied by a mask."""
    views = ("ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0", "AliasBackward0")
    factor: Tensor | None = None
    masked = False
    while node is not None and (node.name() in views or _is_product(node)):
        inputs = [function for function, _ in node.next_functions if function is not None]
        if len(inputs) != 1:
            return None
        if _is_product(node):
            if masked:
                return None
            masked = True
            factor = _factor(node)
        node = inputs[0]
    variable = getattr(node, "variable", None)
    # A product that was unpickled is a leaf too, but no parameter.
    if not isinstance(variable, nn.Parameter):
        return None
    is_mask = factor is None or (
        factor.shape == variable.shape
        and (factor.dtype == torch.bool or bool(((factor == 0) | (factor == 1)).all()))
    )
    return variable if is_mask else None


def _is_product(node: Any) -> bool:
    return node.name() == "MulBackward0" or "MaskedWeight" in node.name()


def _factor(product: Any) -> Tensor | None:
    """What torch multiplied a parameter by; None for our operator, or if a backward freed it."""
    if product.name() != "MulBackward0":
        return None
    try:
        factors = (product._saved_self, product._saved_other)
    except RuntimeError:
        return None
    return next((factor for factor in factors if factor is not None), None)
