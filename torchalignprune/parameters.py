"""Which parameters of a model are to be pruned, and how their units lie in memory."""

from __future__ import annotations

import difflib
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized
from torch.utils.weak import WeakTensorKeyDictionary

from torchalignprune import fsdp
from torchalignprune.dtensors import is_dtensor, local

__all__ = [
    "DTYPES",
    "HEADS",
    "Parameters",
    "PrunableParameters",
    "bool_mask",
    "check_mask",
    "known_unit_dimension",
    "mask_of",
    "matches",
    "pairs_of",
    "parameter_names",
    "prunable_parameters",
    "same_mask",
    "some",
    "stored",
    "unit_dimension",
]

Parameters = Iterable[tuple[nn.Module, str]]
"""What ``torch.nn.utils.prune.global_unstructured`` takes: pairs of a module and a name in it."""

HEADS: tuple[str, ...] = (
    "classification_head",
    "classifier",
    "cls",
    "head",
    "heads",
    "lm_head",
    "pooler",
    "pre_classifier",
    "qa_outputs",
    "score",
    "vocab_projector",
    "vocab_transform",
)
"""Names of modules that make a model's predictions; their parameters are left out by default."""

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
"""The dtypes of weights that can be pruned."""

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
_IN_PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


_UNITS_ALONG_1: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


class PrunableParameters(list[tuple[nn.Module, str]]):
    """A list of ``(module, name)`` pairs that also knows the names of its parameters.

    ``torch.nn.utils.prune.global_unstructured`` and every function here takes it as ``parameters``.

    Attributes:
        left_out: the dotted names of all other parameters of the model, each with the reason.
    """

    left_out: dict[str, str]

    def __init__(
        self, pairs: Parameters, names: Iterable[str], left_out: Mapping[str, str]
    ) -> None:
        super().__init__(pairs)
        self._name_of = dict(zip(self, names, strict=True))
        self.left_out = dict(left_out)

    @property
    def names(self) -> list[str]:
        """The dotted name of each parameter, in the order of the list.

        Pairs that were added by hand are called by their module's type and their name.
        """
        return [
            self._name_of.get((module, name), f"{type(module).__name__}.{name}")
            for module, name in self
        ]

    def __repr__(self) -> str:
        rows = [
            (label, str(tuple(getattr(module, name).shape)))
            for label, (module, name) in zip(self.names, self, strict=True)
        ]
        if len(rows) > 8:
            rows[5:-2] = [(f"... {len(rows) - 7} more", "")]
        width = max((len(label) for label, shape in rows if shape), default=0)
        entries = {id(stored(*pair)): getattr(*pair).numel() for pair in self}
        lines = [f"PrunableParameters: {len(self)} with {sum(entries.values()):,} entries"]
        lines += [f"  {label:{width}}  {shape}".rstrip() for label, shape in rows]
        if self.left_out:
            lines.append(f"  left out: {_summary(self.left_out)}")
        return "\n".join(lines)


@dataclass(eq=False)
class _Place:
    """A parameter of one module: tied weights are one parameter with several places."""

    module: nn.Module
    attribute: str
    names: list[str]  # dotted; two if the module is registered twice
    parameter: Tensor | None
    barred: str | None = None  # why it can never be listed
    default: str | None = None  # why it is only listed when ``include`` asks for it
    excluded: str | None = None  # the pattern of ``exclude`` that leaves it out

    @property
    def name(self) -> str:
        return self.names[0]

    def matches(self, pattern: str) -> bool:
        return any(matches(name, pattern) for name in self.names)


def prunable_parameters(
    model: nn.Module,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
) -> PrunableParameters:
    """The weights of a model that are usually pruned, as ``(module, name)`` pairs.

    Listed are the weights of ``nn.Linear`` and its subclasses, of convolutions (also transposed
    ones), of transformers' ``Conv1D``, and the input projections of ``nn.MultiheadAttention``, in
    float32, float64, float16 or bfloat16. A parameter that is already pruned is listed under its
    plain name, so that it can be pruned again.

    Left out by default are embeddings, heads and the adapters of PEFT (LoRA and the like), which
    start at zero in part and would be pruned first; ``include`` brings them back. A head is a
    module with one of the names in :data:`HEADS`, and in a transformers ``PreTrainedModel``
    everything outside its ``base_model``.

    Always left out are biases, norms, modules of any other type, and weights that a pruning hook
    could not reach: ``out_proj`` of ``nn.MultiheadAttention`` (its weight is read without calling
    it), weights under ``torch.nn.utils.parametrize``, weights that are recomputed before every
    forward, and lazy or quantized weights.

    Tied weights (one parameter in several modules) are listed at all their places, one after the
    other, so that they stay tied; if one of the places is left out, all are.

    Args:
        model: any module.
        include: glob patterns (``fnmatch``, case-sensitive). If given, exactly the weights that
            match one of them are listed, and those tied to them. A pattern is compared with the
            dotted names of the parameter, its module and all modules around that, so
            ``"encoder.layer.0"`` stands for everything in that layer.
        exclude: glob patterns, likewise, of weights to leave out, whatever ``include`` says.

    Returns:
        A list in the model's order. Its ``names`` are the dotted names; ``left_out`` gives the
        reason for every other parameter, by dotted name.

    Raises:
        TypeError: ``model`` is not a module, or a pattern not a string.
        ValueError: a pattern matches nothing, or nothing is left to prune.

    Example:
        >>> from torch import nn
        >>> from torch.nn.utils import prune
        >>> model = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 6), nn.Linear(6, 2))
        >>> params = prunable_parameters(model, exclude="2")
        >>> params
        PrunableParameters: 1 with 24 entries
          1.weight  (6, 4)
          left out: 2 bias, 1 embedding, 1 excluded by '2'
        >>> params.left_out["0.weight"]
        'embedding'
        >>> prune.global_unstructured(params, pruning_method=prune.L1Unstructured, amount=0.5)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model should be an nn.Module, got {type(model).__name__}")
    included, excluded = _patterns(include, "include"), _patterns(exclude, "exclude") or []
    places = list(_places(model))
    for pattern in excluded:
        matched = [place for place in places if place.matches(pattern)]
        if not matched:
            raise ValueError(_no_match("exclude", pattern, places))
        for place in matched:
            place.excluded = place.excluded or pattern
    for pattern in included or []:
        matched = [place for place in places if place.matches(pattern)]
        if not matched:
            raise ValueError(_no_match("include", pattern, places))
        if all(place.barred for place in matched):
            raise ValueError(
                f"include pattern {pattern!r} only matches parameters that cannot be pruned: "
                f"{matched[0].name} ({matched[0].barred})"
                + (f" and {len(matched) - 1} more" if len(matched) > 1 else "")
            )

    unmentioned = "not matched by include"

    def reason(place: _Place) -> str | None:
        if place.barred:
            return place.barred
        if place.excluded:
            return f"excluded by {place.excluded!r}"
        if included is None:
            return place.default
        return None if any(map(place.matches, included)) else unmentioned

    tied: dict[int, list[_Place]] = {}
    for place in places:
        if place.parameter is not None:
            tied.setdefault(id(place.parameter), []).append(place)

    listed: dict[_Place, None] = {}
    left_out: dict[str, str] = {}
    for place in places:
        if place in listed:
            continue
        why = reason(place)
        if why is None:
            group = tied[id(place.parameter)]
            # A place that include merely does not mention comes along with the rest of its group.
            causes = {
                other: None if (why := reason(other)) == unmentioned else why for other in group
            }
            hindrance = next((other for other in group if causes[other]), None)
            if hindrance is None:
                listed |= dict.fromkeys(group)
                for other in group:
                    left_out.pop(other.name, None)
                continue
            why = f"tied to {hindrance.name}, which is left out: {causes[hindrance]}"
        left_out[place.name] = why
    if not listed:
        kept_out = _summary(left_out) or "it has no parameters"
        raise ValueError(
            f"nothing to prune in {type(model).__name__}; left out: {kept_out}. Embeddings, "
            "heads and adapters are listed when include= matches them"
        )
    for place in listed:
        assert place.parameter is not None
        # For torch's own functions, which do not take DTensors; and ``model.to`` could not replace
        # a DTensor that has a weak reference.
        units_along_1 = unit_dimension(place.module, place.attribute) == 1
        if units_along_1 and not is_dtensor(place.parameter):
            _UNITS_ALONG_1[place.parameter] = True
    return PrunableParameters(
        [(place.module, place.attribute) for place in listed],
        [place.name for place in listed],
        left_out,
    )


def unit_dimension(module: nn.Module, name: str) -> int:
    """The dimension of a weight along which its units, the module's outputs, are counted.

    1 for transformers' ``Conv1D`` (weight: inputs x outputs) and for transposed convolutions
    (inputs x outputs / groups x kernel), 0 for everything else (outputs x inputs x ...). The
    inputs are the other one of the first two dimensions. In a transposed convolution with groups, a
    unit joins the outputs at one position of all groups, which share that dimension of the weight.

    Args:
        module: the module that holds the weight.
        name: the name of the weight in it.

    Example:
        >>> from torch import nn
        >>> unit_dimension(nn.Linear(4, 2), "weight")
        0
        >>> unit_dimension(nn.ConvTranspose2d(4, 2, 3), "weight")
        1
    """
    return int(name == "weight" and isinstance(module, (*_TRANSPOSED, *transformers_conv1d())))


def known_unit_dimension(parameter: Tensor) -> int:
    """The dimension of the units of a parameter whose module is unknown.

    1 if :func:`prunable_parameters` has listed the parameter with that dimension, otherwise 0.
    """
    return int(parameter in _UNITS_ALONG_1)


def pairs_of(params: Parameters) -> list[tuple[nn.Module, str]]:
    """The pairs as a list; a list is returned as it is, because it may know their names.

    Raises:
        TypeError: a module, or anything that is not iterable.

    Example:
        >>> from torch import nn
        >>> pairs_of(iter([(nn.Linear(2, 2), "weight")]))
        [(Linear(in_features=2, out_features=2, bias=True), 'weight')]
    """
    if isinstance(params, list):
        return params
    if isinstance(params, nn.Module) or not isinstance(params, Iterable):
        raise TypeError(
            f"parameters should be (module, name) pairs, got {type(params).__name__}; "
            "prunable_parameters(model) lists those of a model"
        )
    return list(params)


def parameter_names(params: Parameters) -> list[str]:
    """What to call each parameter in an error or a report.

    The dotted names of :class:`PrunableParameters`; for other pairs, which do not know their model,
    the position, the module's type and the name.

    Example:
        >>> from torch import nn
        >>> parameter_names([(nn.Linear(2, 2), "weight")])
        ['parameters[0] (Linear.weight)']
    """
    if isinstance(params, PrunableParameters):
        return params.names
    return [
        f"parameters[{i}] ({type(module).__name__}.{name})"
        for i, (module, name) in enumerate(params)
    ]


def stored(module: nn.Module, name: str) -> Tensor:
    """The parameter behind a name, without the mask: ``name_orig`` if it is pruned.

    Under ``fully_shard`` it is the sharded parameter, even while the module shows the gathered one.

    Example:
        >>> from torch import nn
        >>> layer = nn.Linear(2, 2)
        >>> stored(layer, "weight") is layer.weight
        True
    """
    own = name if mask_of(module, name) is None else f"{name}_orig"
    found = getattr(module, own)
    assert isinstance(found, Tensor)
    return fsdp.sharded(module, own, found)


def matches(name: str, pattern: str) -> bool:
    """Whether a glob pattern matches the parameter, its module, or any module around that.

    Example:
        >>> matches("encoder.layer.0.dense.weight", "encoder.layer.*")
        True
    """
    while name:
        if fnmatchcase(name, pattern):
            return True
        name = name.rpartition(".")[0]
    return False


def mask_of(module: nn.Module, name: str) -> Tensor | None:
    """The mask of a parameter, in whatever dtype it has, or None if it is not pruned.

    Example:
        >>> from torch import nn
        >>> mask_of(nn.Linear(2, 2), "weight") is None
        True
    """
    return module._buffers.get(f"{name}_mask")


def bool_mask(mask: Tensor) -> Tensor:
    """A mask as the operators take it; those of torch's own pruning have the weight's dtype."""
    return mask if mask.dtype == torch.bool else mask != 0


def same_mask(mask: Tensor, other: Tensor) -> bool:
    """Whether two masks prune the same entries, of those on this rank.

    On the meta device, where masks have no values, they count as the same.
    """
    if mask is other or mask.is_meta or other.is_meta:
        return True
    own = bool_mask(local(mask))
    return torch.equal(own, bool_mask(local(other)).to(own.device))


def some(names: Sequence[str]) -> str:
    """The first few names, for an error or a warning."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def check_mask(mask: Tensor, name: str) -> None:
    """Refuses a mask that scales a weight instead of pruning it.

    Of a DTensor, only the part on this rank is checked.

    Args:
        mask: from a module or a checkpoint, of any dtype.
        name: what to call the parameter in an error.

    Raises:
        ValueError: numbers other than 0 and 1.
    """
    if mask.dtype == torch.bool or mask.is_meta:
        return
    part = local(mask)
    others = (part != 0) & (part != 1)
    if bool(others.any()):
        raise ValueError(
            f"the mask of {name} should have no numbers but 0 and 1, got {part[others][0].item()}"
        )


def _places(model: nn.Module) -> Iterator[_Place]:
    names: dict[nn.Module, list[str]] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(prefix)
    out_projections = {
        id(module.out_proj) for module in names if isinstance(module, nn.MultiheadAttention)
    }
    bases = _bases(names)
    adapters = _adapters(names)
    parametrized = tuple(
        f"{prefix}.parametrizations.".lstrip(".")
        for module in names
        if is_parametrized(module)
        for prefix in names[module]
    )

    def place(module: nn.Module, attribute: str, parameter: Tensor | None) -> _Place:
        dotted = [f"{prefix}.{attribute}".lstrip(".") for prefix in names[module]]
        new = _Place(module, attribute, dotted, parameter)
        new.barred = _barred(module, attribute, parameter, id(module) in out_projections)
        if new.barred is None:
            if module in adapters:
                new.default = "adapter (PEFT)"
            elif isinstance(module, _EMBEDDINGS):
                new.default = "embedding"
            else:
                new.default = _head(new.name, bases)
        return new

    for module, prefixes in names.items():
        if parametrized and f"{prefixes[0]}.".startswith(parametrized):
            continue  # reported below, under the parametrized module
        for attribute, parameter in module._parameters.items():
            if parameter is None:
                continue
            plain = attribute.removesuffix("_orig")
            pruned = plain != attribute and module._buffers.get(f"{plain}_mask") is not None
            yield place(module, plain if pruned else attribute, parameter)
        for attribute in _weights(module):
            if attribute in module.__dict__ and f"{attribute}_mask" not in module._buffers:
                yield place(module, attribute, None)
        if is_parametrized(module):
            for attribute, chain in module.parametrizations.items():  # type: ignore[union-attr,operator]
                assert isinstance(chain, ParametrizationList)
                yield place(module, attribute, getattr(chain, "original", None))


def _barred(
    module: nn.Module, attribute: str, parameter: Tensor | None, out_projection: bool
) -> str | None:
    if attribute not in _weights(module):
        if "bias" in attribute:
            return "bias"
        kind = type(module).__name__
        if "Norm" in kind:
            return "norm"
        return "not a weight" if _weights(module) else f"{kind} is not a supported module"
    if is_parametrized(module, attribute):
        return "parametrized by torch.nn.utils.parametrize"
    if parameter is None:
        return "not a parameter: it is recomputed before every forward"
    if is_lazy(parameter):
        return "not initialized yet"
    if parameter.dtype not in DTYPES:
        return f"{str(parameter.dtype).removeprefix('torch.')} is not a supported dtype"
    if attribute in module._parameters:
        for taken in (f"{attribute}_orig", f"{attribute}_mask"):
            if hasattr(module, taken):
                return f"{type(module).__name__} has an attribute {taken!r} of its own"
    if out_projection and attribute == "weight":
        return "MultiheadAttention.out_proj (it is not called, so its hooks would not run)"
    return None


def _weights(module: nn.Module) -> tuple[str, ...]:
    """The names that the weights of a supported module have."""
    if isinstance(module, nn.MultiheadAttention):
        return _IN_PROJECTIONS
    supported = (nn.Linear, *_CONVOLUTIONS, *_TRANSPOSED, *_EMBEDDINGS, *transformers_conv1d())
    return ("weight",) if isinstance(module, supported) else ()


def _bases(names: dict[nn.Module, list[str]]) -> list[tuple[str, str]]:
    """The name prefixes, with a dot, of each pretrained model and of its base model."""
    pretrained = _loaded("transformers.modeling_utils", "PreTrainedModel")
    pairs = []
    for module, prefixes in names.items() if pretrained else ():
        base = getattr(module, "base_model", module) if isinstance(module, pretrained) else module
        if base is not module and base in names:
            pairs.append((f"{prefixes[0]}.".lstrip("."), f"{names[base][0]}."))
    return pairs


def _adapters(modules: Iterable[nn.Module]) -> set[nn.Module]:
    """The modules that PEFT has added to layers, without the layers themselves."""
    tuner_layer = _loaded("peft.tuners.tuners_utils", "BaseTunerLayer")
    found: set[nn.Module] = set()
    for layer in modules if tuner_layer else ():
        if isinstance(layer, tuner_layer):
            for name in getattr(layer, "adapter_layer_names", ()):
                adapter = getattr(layer, name, None)
                if isinstance(adapter, nn.Module):
                    found.update(adapter.modules())
    return found


def _head(name: str, bases: list[tuple[str, str]]) -> str | None:
    for part in name.split(".")[:-1]:
        if part in HEADS:
            return f"head ({part})"
    for around, inside in bases:
        if name.startswith(around) and not name.startswith(inside):
            return f"head (outside the base model {inside[:-1]})"
    return None


def transformers_conv1d() -> tuple[type, ...]:
    """transformers' ``Conv1D``, a linear layer with a transposed weight, if it was imported."""
    return _loaded("transformers.pytorch_utils", "Conv1D")


def _loaded(module: str, name: str) -> tuple[type, ...]:
    """A class of a library, if it has been imported: otherwise no model can have it."""
    found = getattr(sys.modules.get(module), name, None)
    return (found,) if isinstance(found, type) else ()


def _patterns(patterns: str | Iterable[str] | None, argument: str) -> list[str] | None:
    if patterns is None:
        return None
    if isinstance(patterns, str) or not isinstance(patterns, Iterable):
        patterns = [patterns]
    listed = list(patterns)
    for pattern in listed:
        if not isinstance(pattern, str):
            raise TypeError(
                f"{argument} should be a glob pattern or several, got {type(pattern).__name__}"
            )
    return listed


def _no_match(argument: str, pattern: str, places: Sequence[_Place]) -> str:
    names = [name for place in places for name in place.names]
    modules = dict.fromkeys(name.rpartition(".")[0] for name in names)
    near = difflib.get_close_matches(pattern, [*filter(None, modules), *names], n=3, cutoff=0.3)
    hint = f"; near: {', '.join(near)}" if near else ""
    return f"{argument} pattern {pattern!r} matches no parameter or module{hint}"


def _summary(left_out: dict[str, str]) -> str:
    """'25 bias, 3 embedding': the reasons without the part in brackets, and how often."""
    counts = Counter(why.partition(" (")[0].partition(":")[0] for why in left_out.values())
    return ", ".join(f"{count} {why}" for why, count in counts.most_common())
