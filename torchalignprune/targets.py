"""What a pruning method looks at: one entry for each parameter, from whatever the caller gave.

A method's :meth:`apply` and :func:`torchalignprune.global_unstructured` know the modules. torch's
own ``global_unstructured`` hands a method one flat vector of the entries that are not pruned yet;
where they belong is read off the vector's autograd history.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torchalignprune.parameters import (
    Parameters,
    mask_of,
    parameter_names,
    stored,
    unit_dimension,
)

__all__ = ["PerParameter", "Target", "targets_from_history", "targets_of"]

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
        places: where it sits; several for tied weights, none where only the values are known.
    """

    weight: Tensor
    mask: Tensor | None
    name: str
    out_dim: int = 0
    places: tuple[Pair, ...] = ()

    @property
    def in_dim(self) -> int:
        return 1 - self.out_dim

    def remaining(self) -> int:
        """How many entries are not pruned yet."""
        return self.weight.numel() if self.mask is None else int(self.mask.sum())

    def entries(self) -> Tensor:
        """The entries that are not pruned yet, by flat index."""
        return self.weight.flatten() if self.mask is None else self.weight[self.mask]


def targets_of(parameters: Parameters) -> list[Target]:
    """One target for each distinct parameter; tied weights are one, with all their places.

    Raises:
        TypeError: not pairs of a module and a name; not a floating-point parameter.
        AttributeError: the module has nothing of that name.
        ValueError: tied weights whose masks differ.
    """
    pairs = list(parameters)
    for pair in pairs:
        if not (isinstance(pair, tuple | list) and len(pair) == 2):
            raise TypeError(f"parameters should be (module, name) pairs, got {pair!r}")
        if not (isinstance(pair[0], nn.Module) and isinstance(pair[1], str)):
            raise TypeError(
                "parameters should be pairs of a torch.nn.Module and a str, got "
                f"({type(pair[0]).__name__}, {type(pair[1]).__name__})"
            )
    found: dict[int, Target] = {}
    named = parameters if isinstance(parameters, list) else pairs
    for (module, name), label in zip(pairs, parameter_names(named), strict=True):
        if not hasattr(module, name):
            raise AttributeError(f"{label}: {type(module).__name__} has no attribute {name!r}")
        is_masked = mask_of(module, name) is not None and f"{name}_orig" in module._parameters
        if not is_masked and module._parameters.get(name) is None:
            raise TypeError(
                f"{label} should be a torch.nn.Parameter of its module, got "
                f"{type(getattr(module, name)).__name__}"
            )
        weight = stored(module, name)
        if not weight.is_floating_point():
            raise TypeError(f"{label} should have a floating-point dtype, got {weight.dtype}")
        mask = mask_of(module, name)
        mask = mask if mask is None or mask.dtype == torch.bool else mask != 0
        tied = found.get(id(weight))
        if tied is None:
            found[id(weight)] = Target(
                weight.detach(), mask, label, unit_dimension(module, name), ((module, name),)
            )
            continue
        if (tied.mask is None) != (mask is None) or (
            mask is not None and tied.mask is not None and not torch.equal(mask, tied.mask)
        ):
            raise ValueError(f"{label} is tied to {tied.name}, but their masks differ")
        if (module, name) not in tied.places:
            places = (*tied.places, (module, name))
            found[id(weight)] = Target(tied.weight, tied.mask, tied.name, tied.out_dim, places)
    return list(found.values())


def targets_from_history(vector: Tensor) -> list[Target] | None:
    """The parameters whose entries make up the vector that torch's pruning hands to a method.

    The history leads from the vector (``t[mask == 1]``) over the concatenation and the views to the
    parameters, or to their products with the masks. Returns None if there is no such history, or if
    it does not make up the vector's values (scores that were computed from parameters, for one).
    Which modules the parameters belong to is not part of it, so their units are along dimension 0.
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
    start = entries = 0
    for number, piece in enumerate(pieces):
        leaf = _leaf(piece)
        if leaf is None:
            return None
        weight = leaf.detach()
        mask = alive[start : start + weight.numel()]
        if mask.numel() != weight.numel():
            return None
        start += weight.numel()
        mask_or_none = None if bool(mask.all()) else mask.reshape(weight.shape)
        target = Target(weight, mask_or_none, f"parameters[{number}]")
        values = target.entries()
        if not torch.equal(values.to(vector.dtype), vector[entries : entries + values.numel()]):
            return None
        entries += values.numel()
        targets.append(target)
    return targets if entries == vector.numel() and start == alive.numel() else None


def _leaf(node: Any) -> Tensor | None:
    """The parameter at the end of a chain of views and of at most one product with a mask."""
    views = ("ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0", "AliasBackward0")
    while node is not None and (node.name() in views or node.name() == "MulBackward0"):
        inputs = [function for function, _ in node.next_functions if function is not None]
        if len(inputs) != 1:
            return None
        node = inputs[0]
    variable = getattr(node, "variable", None)
    return variable if isinstance(variable, Tensor) else None
