"""The two regularizers of the paper: penalties that keep pruned and unpruned units aligned.

Both return a differentiable scalar that any training loop can add to its loss::

    penalty = CosineAlignment(params, Reference.capture(params))
    loss = task_loss + strength * penalty()

From "Aligned Weight Regularizers for Pruning Pretrained Neural Networks" (O'Neill, Dutta and Assem,
Findings of ACL 2022).
"""

from __future__ import annotations

import copy
import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from torchalignprune import fsdp, ops
from torchalignprune.dtensors import (
    add_up_together,
    check_layout,
    differentiable_local,
    is_dtensor,
    local,
    own_part,
    shard_dims,
)
from torchalignprune.matching import match_units
from torchalignprune.parameters import Parameters, bool_mask, mask_of, pairs_of, stored
from torchalignprune.targets import Pair, PerParameter, Target, targets_of, with_references

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["CosineAlignment", "FrobeniusAlignment"]

_NO_MATCHING = (
    "{} is sharded, and matching would have to compare units on different ranks: match before the "
    "model is sharded, or leave matching out"
)

Weights = Mapping[Pair, float] | Sequence[float]


class _Penalty(nn.Module):
    """A weighted mean over parameters of the penalties that :meth:`_of` computes."""

    def __init__(
        self, params: Parameters, reference: PerParameter, weights: Weights | None
    ) -> None:
        super().__init__()
        if reference is None:
            raise TypeError(
                "reference should hold the unpruned weights, such as Reference.capture(params), "
                "got None"
            )
        targets = with_references(targets_of(params), reference)
        for target in targets:
            assert target.reference is not None
            if is_dtensor(target.weight):
                check_layout(target.weight, target.name)
                own_part(target.reference, target.weight, f"the reference of {target.name}")
            if target.weight.numel() and _address(target.reference) == _address(target.weight):
                raise ValueError(
                    f"the reference of {target.name} should be a copy, got the parameter itself, "
                    "which training changes: use Reference.capture(params)"
                )
        self._weights = _weights(targets, weights)
        # Keep no current weight or mask: ``model.to``, for example, may replace them.
        self._targets = [
            replace(
                t,
                weight=torch.empty(t.weight.shape, dtype=t.weight.dtype, device="meta"),
                mask=None,
            )
            for t in targets
        ]
        self._indices: list[Tensor | None] = [None] * len(self._targets)

    @abstractmethod
    def _sides(self, target: Target) -> tuple[int, ...]:
        """The dimensions along which units are counted; the penalty is the mean over them."""

    # Whether _sums_of needs the products of whole units, which several ranks may share.
    _takes_whole_units: bool

    @abstractmethod
    def _sums_of(self, products: Tensor, sizes: list[int]) -> Tensor:
        """The sums over units that :meth:`_of` needs: shape ``(sums, parameters)``, float64.

        Args:
            products: the products of the units (:func:`torchalignprune.ops.unit_products`).
            sizes: how many units each parameter has.
        """

    @abstractmethod
    def _of(self, sums: Tensor) -> tuple[Tensor, Tensor]:
        """The penalty of each parameter, and 1 if it counts in the mean or 0; both float64."""

    def forward(self) -> Tensor:
        """The penalty for the current weights and masks.

        Returns:
            A scalar, float32 (float64 if a parameter is), on the first parameter's device.
        """
        values, shares = self._contributions()
        # Rounding may make the mean slightly negative.
        mean = (values * shares).sum().clamp(min=0)
        weights = [stored(*target.places[0]) for target in self._targets]
        wide = any(weight.dtype == torch.float64 for weight in weights)
        return mean if wide else mean.float()

    def per_parameter(self) -> dict[str, float]:
        """What each parameter contributes to the penalty; the contributions add up to it.

        Returns:
            A dict by parameter name, in which tied weights have one entry, under their first name.
        """
        with torch.no_grad():
            values, shares = self._contributions()
        names = [target.name for target in self._targets]
        return dict(zip(names, (values * shares).tolist(), strict=True))

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        # References do not change, so the copy shares them.
        memo |= {id(t.reference): t.reference for t in self._targets}
        memo[id(self)] = twin = self.__class__.__new__(self.__class__)
        vars(twin).update(copy.deepcopy(vars(self), memo))
        return twin

    def suggest_strength(self, task_loss: Tensor, share: float = 0.1) -> float:
        """The factor that makes the penalty's gradient norm a given share of the task's.

        Both norms are over the parameters of the penalty. Their ``.grad`` is left as it is, and the
        graph of ``task_loss`` is kept for its own backward. Call this after some training steps:
        while the weights still equal the reference, the gradient of the penalty is zero whatever
        has been pruned.

        Args:
            task_loss: a scalar that depends on the parameters, before its backward.
            share: the penalty's gradient norm as a fraction of the task's.

        Returns:
            ``share * |task's gradient| / |penalty's gradient|``.

        Raises:
            ValueError: a gradient norm is zero, up to rounding, or not finite; or no parameter
                requires a gradient.
            TypeError: ``task_loss`` is not a scalar tensor.

        Example:
            >>> import torch, torchalignprune as tap
            >>> layer = torch.nn.Linear(8, 8)
            >>> params = [(layer, "weight")]
            >>> penalty = tap.CosineAlignment(params, tap.Reference.capture(params))
            >>> _ = tap.magnitude(layer, "weight", amount=0.5)
            >>> optimizer = torch.optim.AdamW(layer.parameters())
            >>> layer(torch.randn(4, 8)).square().mean().backward()
            >>> optimizer.step()
            >>> loss = layer(torch.randn(4, 8)).square().mean()
            >>> strength = penalty.suggest_strength(loss, share=0.1)
            >>> (loss + strength * penalty()).backward()
        """
        if not (math.isfinite(share) and share > 0):
            raise ValueError(f"share should be positive and finite, got {share}")
        if not isinstance(task_loss, Tensor) or task_loss.numel() != 1:
            raise TypeError(f"task_loss should be a scalar tensor, got {task_loss!r}")
        leaves = [stored(*target.places[0]) for target in self._targets]
        leaves = [leaf for leaf in leaves if leaf.requires_grad]
        if not leaves:
            raise ValueError("none of the parameters of the penalty requires a gradient")
        norms = {}
        for what, value, gradients in (
            ("task_loss", task_loss, _task_gradients),
            ("the penalty", self(), _gradients),
        ):
            if not value.requires_grad:
                raise ValueError(f"{what} should have a grad_fn, got a tensor without one")
            grads = gradients(value, leaves)
            norms[what] = _norm([grad for grad in grads if grad is not None])
        # Rounding alone, that of the reference included, gives gradients of this size.
        references = [t.reference for t in self._targets if t.reference is not None]
        noise = max([1e-6, *(torch.finfo(reference.dtype).eps / 2 for reference in references)])
        least = {"task_loss": 0.0, "the penalty": noise * self._size(_norm(leaves))}
        hints = {"task_loss": "", "the penalty": ": have the weights moved since the reference?"}
        for what, norm in norms.items():
            if not least[what] < norm < math.inf:
                raise ValueError(
                    f"the gradient of {what} with respect to the parameters should be finite and "
                    f"not zero, got the norm {norm:.1e}{hints[what]}"
                )
        return share * norms["task_loss"] / norms["the penalty"]

    def _size(self, norm: float) -> float:
        """The typical norm of the penalty's gradient for weights of this norm."""
        return 1 / norm if norm else 0.0

    def _contributions(self) -> tuple[Tensor, Tensor]:
        """The penalty of each parameter and its share of the mean."""
        places = [local(stored(*target.places[0])).device for target in self._targets]
        groups = [
            [i for i, place in enumerate(places) if place == device]
            for device in dict.fromkeys(places)
        ]
        parts = [self._together(numbers) for numbers in groups]
        values, counted = (
            torch.cat([part[which].to(places[0]) for part in parts]) for which in (0, 1)
        )
        if len(groups) > 1:  # back into the order of the parameters
            together = torch.tensor([number for numbers in groups for number in numbers])
            order = together.argsort().to(places[0])
            values, counted = values[order], counted[order]
        shares = counted
        if any(weight != 1 for weight in self._weights):
            shares = counted * counted.new_tensor(self._weights)  # a GPU waits for the copy
        whole = shares.sum()
        return values, shares / whole.where(whole > 0, 1)

    def _together(self, numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The penalty of each of some parameters on one device, and 1 if it counts or 0."""
        targets = [self._targets[number] for number in numbers]
        weights = [stored(*target.places[0]) for target in targets]
        masks = [mask_of(*target.places[0]) for target in targets]
        names = [target.name for target in targets]
        # Of a sharded parameter this rank uses its part, with the same part of mask and reference.
        parts = [
            differentiable_local(weight, _before_gradient(*target.places[0], weight))
            for target, weight in zip(targets, weights, strict=True)
        ]
        masks = [
            m if m is None else own_part(m, w, f"the mask of {name}")
            for m, w, name in zip(masks, weights, names, strict=True)
        ]
        # References on the CPU stay there: the operators fetch them one at a time.
        references = [
            r if r is None else own_part(r, w, f"the reference of {name}")
            for r, w, name in zip((t.reference for t in targets), weights, names, strict=True)
        ]
        device = parts[0].device
        sides = []
        for side in range(len(self._sides(targets[0]))):
            dims = [self._sides(target)[side] for target in targets]
            products = ops.unit_products(
                parts,
                masks=[None if m is None else bool_mask(m) for m in masks],
                references=[r if r is None or r.is_cpu else r.to(device) for r in references],
                indices=[self._indices[number] for number in numbers],
                dims=dims,
                names=names,
            )
            sizes = [
                1 if part.dim() < 2 else part.size(dim)
                for part, dim in zip(parts, dims, strict=True)
            ]
            sides.append(self._of(self._whole_sums(products, sizes, weights, dims)))
        return torch.stack([values for values, _ in sides]).mean(dim=0), sides[0][1]

    def _whole_sums(
        self, products: Tensor, sizes: list[int], weights: Sequence[Tensor], dims: Sequence[int]
    ) -> Tensor:
        """:meth:`_sums_of` for whole parameters, added up over the ranks that share them."""
        if not any(map(is_dtensor, weights)):
            return self._sums_of(products, sizes)
        across = [shard_dims(weight) for weight in weights]
        cut: list[list[int]] = [[] for _ in weights]
        if self._takes_whole_units:
            # Along these mesh dimensions the ranks share units: their products are added up first.
            cut = [
                [i for i, sharded in own if weight.dim() < 2 or sharded != dim]
                for own, weight, dim in zip(across, weights, dims, strict=True)
            ]
            products = torch.cat(add_up_together(products.split(sizes, 1), weights, cut), dim=1)
        sums = self._sums_of(products, sizes)
        rest = [[i for i, _ in own if i not in done] for own, done in zip(across, cut, strict=True)]
        return torch.cat(add_up_together(sums.split(1, 1), weights, rest), dim=1)


class CosineAlignment(_Penalty):
    r"""One minus the alignment of pruned and reference units, averaged.

    The penalty is the mean over parameters of the mean over units of :math:`1 - A`, with
    :math:`A = \langle p, r\rangle / (|p||r|)`. Here :math:`p = m w` are a unit's weights under the
    current mask, and ``r`` is its reference. ``A`` is 0 for a unit that is all zero; a unit whose
    reference is zero does not count. The gradient with respect to a unit is

    .. math:: -m \left(\frac{r}{|p||r|} - A \frac{p}{|p|^2}\right)

    (0 for a unit that is all zero). It goes to ``name_orig`` of a pruned parameter, or to the
    parameter itself before the first pruning. The penalty takes one forward and one backward pass
    over weights, masks and references, needs memory for the gradient only, and sums in float64.

    Args:
        params: ``(module, name)`` pairs, pruned or not; tied weights count once.
        reference: the unpruned weights, one tensor for each parameter: a
            :class:`torchalignprune.Reference`, a mapping by ``(module, name)``, or tensors in the
            order of the parameters. It may be on the CPU while the model is on a GPU: each tensor
            is fetched when it is used. It gets no gradient.
        units: a unit is an output (``"out"``) or an input (``"in"``); ``"both"`` is the mean of the
            two. A parameter of one dimension is one unit.
        weights: how much each parameter counts in the mean, not negative: by ``(module, name)``, or
            in the order of the parameters. Default: all the same.
        matching: ``"greedy"`` or ``"hungarian"``: compare each unit with the reference unit that
            :func:`torchalignprune.match_units` assigns to it, for units that may have changed
            places in training. Default: each with its own. Not with ``units="both"``.
        match_every: match anew after this many calls with gradients enabled.

    Raises:
        TypeError: ``reference`` is None or has no tensors; or ``params`` are not pairs.
        ValueError: a reference is missing or of another shape; an option is unknown; or ``weights``
            do not fit the parameters.

    Example:
        >>> import torch, torchalignprune as tap
        >>> layer = torch.nn.Linear(2, 1, bias=False)
        >>> _ = layer.weight.data.copy_(torch.tensor([[4.0, 3.0]]))
        >>> params = [(layer, "weight")]
        >>> penalty = tap.CosineAlignment(params, tap.Reference.capture(params))
        >>> _ = tap.magnitude(layer, "weight", amount=1)
        >>> loss = penalty()
        >>> round(loss.item(), 4)
        0.2
        >>> loss.backward()
        >>> layer.weight_orig.grad
        tensor([[0., 0.]])
    """

    def __init__(
        self,
        params: Parameters,
        reference: PerParameter,
        *,
        units: Literal["out", "in", "both"] = "out",
        weights: Weights | None = None,
        matching: Literal["greedy", "hungarian"] | None = None,
        match_every: int = 100,
    ) -> None:
        params = pairs_of(params)
        super().__init__(params, reference, weights)
        if units not in ("out", "in", "both"):
            raise ValueError(f"units should be one of ('out', 'in', 'both'), got {units!r}")
        if matching not in (None, "greedy", "hungarian"):
            raise ValueError(
                f"matching should be one of ('greedy', 'hungarian') or None, got {matching!r}"
            )
        for target in targets_of(params) if matching is not None else ():
            if is_dtensor(target.weight):
                raise ValueError(_NO_MATCHING.format(target.name))
        if matching is not None and units == "both":
            raise ValueError("units should be 'out' or 'in' with matching, got 'both'")
        if not isinstance(match_every, int) or match_every < 1:
            raise ValueError(
                f"match_every should be a number of calls of at least 1, got {match_every!r}"
            )
        self.units = units
        self.matching = matching
        self.match_every = match_every
        self._calls = 0
        self._count = self._counter()

    def _sides(self, target: Target) -> tuple[int, ...]:
        if target.weight.dim() < 2:
            return (0, 0) if self.units == "both" else (0,)
        out, into = target.out_dim, target.in_dim
        return {"out": (out,), "in": (into,), "both": (out, into)}[self.units]

    _takes_whole_units = True

    def _sums_of(self, products: Tensor, sizes: list[int]) -> Tensor:
        pp, pr, rr = products
        # sqrt has no finite gradient at 0, so units that are all zero do not enter it. Written like
        # this the cosine is exactly 1 if the unit is its reference.
        alive, counted = pp != 0, rr != 0
        pp = pp.where(alive, 1)
        cosines = pr / pp * (pp / rr.where(counted, 1)).sqrt()
        gaps = torch.where(counted, 1 - torch.where(alive, cosines, 0), 0)
        return _sums(torch.stack([gaps, counted.double()]), sizes)

    def _of(self, sums: Tensor) -> tuple[Tensor, Tensor]:
        gaps, units = sums
        return gaps / units.clamp(min=1), units.sign()

    def _contributions(self) -> tuple[Tensor, Tensor]:
        if self._count is not None:
            self._count(self)
        return super()._contributions()

    def _counter(self) -> Callable[[CosineAlignment], None] | None:
        # torch.compile would recompile whenever the count changes. disable() imports a lot, so it
        # is called only when it is needed.
        if self.matching is None:
            return None
        counter: Callable[[CosineAlignment], None]
        counter = torch.compiler.disable(CosineAlignment._count_call)
        return counter

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_count": None}  # what disable() returns cannot be pickled

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._count = self._counter()

    def _count_call(self) -> None:
        assert self.matching is not None
        if self._calls % self.match_every == 0:
            self._match(self.matching)
        self._calls += torch.is_grad_enabled()

    def matching_state(self) -> dict[str, Any]:
        """The current matching and the number of calls, which a resumed run needs.

        Before the first matching, the state pairs each unit with its own reference: a distributed
        checkpoint only loads entries that the state already has.
        """
        indices = {}
        for number, units in self._matched_units().items():
            target, index = self._targets[number], self._indices[number]
            device = stored(*target.places[0]).device
            indices[target.name] = torch.arange(units, device=device) if index is None else index
        return {"calls": self._calls, "indices": indices}

    def load_matching_state(self, state: Mapping[str, Any]) -> None:
        """Restores the state that :meth:`matching_state` returned.

        Raises:
            ValueError: indices are missing, of other parameters or of other shapes.
        """
        indices = self.checked_indices(state)
        self._indices, self._calls = indices, int(state["calls"])

    def checked_indices(self, state: Mapping[str, Any]) -> list[Tensor | None]:
        """Copies of the indices in a state, checked but not applied.

        Raises:
            ValueError: as :meth:`load_matching_state`.
        """
        if set(state) != {"calls", "indices"}:
            raise ValueError(
                f"the matching state should have ['calls', 'indices'], got {sorted(state)}"
            )
        matched = self._matched_units()
        names = {self._targets[number].name for number in matched}
        if set(state["indices"]) != names:
            other = sorted(set(state["indices"]) ^ names)
            raise ValueError(
                f"the matching state should be of the same parameters; not in both: {other}"
            )
        indices: list[Tensor | None] = [None] * len(self._targets)
        for number, units in matched.items():
            target = self._targets[number]
            index = state["indices"][target.name]
            if index.shape != (units,):
                raise ValueError(
                    f"the matching of {target.name} should have shape {(units,)}, got "
                    f"{tuple(index.shape)}"
                )
            indices[number] = index.to(stored(*target.places[0]).device, copy=True)
        return indices

    def _matched_units(self) -> dict[int, int]:
        """The number of units of each parameter whose units are matched, by its position."""
        if self.matching is None:
            return {}
        return {
            number: target.weight.shape[self._sides(target)[0]]
            for number, target in enumerate(self._targets)
            if target.weight.dim() >= 2
        }

    @torch.no_grad()
    def _match(self, method: Literal["greedy", "hungarian"]) -> None:
        for number in self._matched_units():
            target = self._targets[number]
            weight, mask = stored(*target.places[0]), mask_of(*target.places[0])
            (dim,) = self._sides(target)
            if is_dtensor(weight):
                raise ValueError(_NO_MATCHING.format(target.name))
            pruned = weight if mask is None else weight.masked_fill(mask == 0, 0)
            assert target.reference is not None
            reference = target.reference.to(weight.device, weight.dtype)
            self._indices[number] = match_units(
                pruned.movedim(dim, 0), reference.movedim(dim, 0), method=method
            ).index


class FrobeniusAlignment(_Penalty):
    r"""The squared distance of the pruned weights from the reference, relative to its norm.

    The penalty is the mean over parameters of the distortion :math:`D = |P - R|_F^2 / |R|_F^2`.
    Here :math:`P = M W` are the weights under the current mask, and ``R`` is the reference. A
    parameter whose reference is all zero only counts with ``normalize=False``. The gradient,
    :math:`2 m (p - r) / |R|_F^2`, goes to ``name_orig`` of a pruned parameter, or to the parameter
    itself before the first pruning. Passes and memory are as in :class:`CosineAlignment`.

    Args:
        params: as in :class:`CosineAlignment`.
        reference: as in :class:`CosineAlignment`.
        normalize: divide by :math:`|R|_F^2`, so that a parameter's scale does not matter.
        weights: as in :class:`CosineAlignment`.

    Raises:
        TypeError: as :class:`CosineAlignment`.
        ValueError: as :class:`CosineAlignment`.

    Example:
        >>> import torch, torchalignprune as tap
        >>> layer = torch.nn.Linear(2, 1, bias=False)
        >>> _ = layer.weight.data.copy_(torch.tensor([[4.0, 3.0]]))
        >>> params = [(layer, "weight")]
        >>> penalty = tap.FrobeniusAlignment(params, tap.Reference.capture(params))
        >>> _ = tap.magnitude(layer, "weight", amount=1)
        >>> round(penalty().item(), 4)
        0.36
    """

    def __init__(
        self,
        params: Parameters,
        reference: PerParameter,
        *,
        normalize: bool = True,
        weights: Weights | None = None,
    ) -> None:
        super().__init__(params, reference, weights)
        self.normalize = normalize

    def _sides(self, target: Target) -> tuple[int, ...]:
        return (0,)

    def _size(self, norm: float) -> float:
        return super()._size(norm) if self.normalize else norm

    _takes_whole_units = False

    def _sums_of(self, products: Tensor, sizes: list[int]) -> Tensor:
        return _sums(products, sizes)

    def _of(self, sums: Tensor) -> tuple[Tensor, Tensor]:
        pp, pr, rr = sums
        distance = pp - 2 * pr + rr
        if not self.normalize:
            return distance, torch.ones_like(rr)
        counted = rr != 0
        return distance / rr.where(counted, 1), counted.double()


def _sums(values: Tensor, sizes: list[int]) -> Tensor:
    """Sums over the units of each parameter, deterministic unlike index_add on a GPU."""
    return torch.stack([part.sum(dim=-1) for part in values.split(sizes, dim=-1)], dim=-1)


def _address(tensor: Tensor) -> int:
    return local(tensor).untyped_storage().data_ptr()


def _before_gradient(module: nn.Module, name: str, weight: Tensor) -> Callable[[], None] | None:
    """Makes a gradient that bypasses FSDP2's backward wait for FSDP2 on a GPU."""
    if not is_dtensor(weight) or not weight.is_cuda:
        return None
    entry = fsdp.managed(module, name if mask_of(module, name) is None else f"{name}_orig")
    return None if entry is None else entry.wait


def _norm(tensors: Sequence[Tensor]) -> float:
    """The norm over all entries, those on other ranks included."""
    norms = [torch.linalg.vector_norm(local(t.detach()).double()) for t in tensors]
    if any(map(is_dtensor, tensors)):
        squares = [norm.square().reshape(1, 1) for norm in norms]
        dims = [[i for i, _ in shard_dims(t)] for t in tensors]
        norms = [square.sqrt() for square in add_up_together(squares, tensors, dims)]
    return math.hypot(*map(float, norms))


def _gradients(value: Tensor, leaves: Sequence[Tensor]) -> list[Tensor | None]:
    return list(torch.autograd.grad(value, leaves, retain_graph=True, allow_unused=True))


def _task_gradients(task_loss: Tensor, leaves: Sequence[Tensor]) -> list[Tensor | None]:
    """The gradients of a loss, each in the layout of its leaf. The graph is kept."""
    groups = fsdp.groups_of(leaves)
    if not groups:
        grads = _gradients(task_loss, leaves)
        return [
            grad.redistribute(placements=leaf.placements)
            if is_dtensor(grad) and is_dtensor(leaf)
            else grad
            for grad, leaf in zip(grads, leaves, strict=True)
        ]
    # FSDP2 only averages and shards gradients in a backward, which accumulates them in .grad.
    # So every .grad that it touches is restored afterwards.
    if not all(group.reduce_grads for group in groups):
        raise ValueError(
            "the backward of task_loss should average gradients over the ranks, but "
            "set_requires_gradient_sync(False) has been called: measure in the last accumulation "
            "step"
        )
    touched = {
        id(leaf): leaf for leaf in (*leaves, *fsdp.parameters_of(groups), *leaves_of(task_loss))
    }
    before = [(leaf, leaf.grad) for leaf in touched.values()]
    try:
        for leaf, _ in before:
            leaf.grad = None
        task_loss.backward(retain_graph=True)
        return [leaf.grad for leaf in leaves]
    finally:
        for leaf, grad in before:
            leaf.grad = grad


def leaves_of(loss: Tensor) -> list[Tensor]:
    """The leaves in which a backward of the loss would accumulate gradients."""
    found: list[Tensor] = []
    seen: set[Any] = set()
    nodes: list[Any] = [loss.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if isinstance(variable, Tensor):
            found.append(variable)
        nodes += [function for function, _ in node.next_functions]
    return found


def _weights(targets: Sequence[Target], weights: Weights | None) -> list[float]:
    if weights is None:
        return [1.0] * len(targets)
    if isinstance(weights, Mapping):
        given = []
        for target in targets:
            own = [weights[place] for place in target.places if place in weights]
            if not own:
                raise ValueError(f"weights has no entry for {target.name}")
            given.append(own[0])
    elif not isinstance(weights, Iterable):
        raise TypeError(
            f"weights should be numbers, one for each parameter, got {type(weights).__name__}"
        )
    else:
        given = list(weights)
    if len(given) != len(targets):
        raise ValueError(
            f"weights should have one number for each of the {len(targets)} parameters, got "
            f"{len(given)}"
        )
    shares = [float(share) for share in given]
    for target, share in zip(targets, shares, strict=True):
        if not (math.isfinite(share) and share >= 0):
            raise ValueError(
                f"the weight of {target.name} should be finite and not negative, got {share}"
            )
    if not any(shares):
        raise ValueError("weights should not all be zero")
    return shares
