"""Criteria: the ``importance_scores`` of ``global_unstructured``, which prunes the lowest first.

Each criterion takes ``(module, name)`` pairs and returns ``{(module, name): scores}``. Scores are
non-negative, have the shape and device of the parameter, and are float32 (float64 for a float64
parameter). Entries that are already pruned score 0. :class:`Taylor`, :class:`Movement` and
:class:`GradientMagnitude` watch a training run instead and are for the ``criterion`` of a
:class:`torchalignprune.Pruner`.

    >>> from torch import nn
    >>> from torch.nn.utils import prune
    >>> from torchalignprune import criteria
    >>> params = [(nn.Linear(8, 8), "weight"), (nn.Linear(8, 2), "weight")]
    >>> prune.global_unstructured(
    ...     params, prune.L1Unstructured, importance_scores=criteria.lamp(params), amount=0.5
    ... )
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from torchalignprune.calibration import Calibration
from torchalignprune.dtensors import is_dtensor, like, local, own_part
from torchalignprune.gradient_criteria import GradientMagnitude, Movement, Taylor
from torchalignprune.parameters import (
    Parameters,
    PrunableParameters,
    mask_of,
    pairs_of,
    parameter_names,
    stored,
    unit_dimension,
)

__all__ = [
    "GradientMagnitude",
    "Movement",
    "Taylor",
    "lamp",
    "lookahead",
    "magnitude",
    "random",
    "transformer_chains",
    "wanda",
]

Pair = tuple[nn.Module, str]
Scores = dict[Pair, Tensor]

CHAINS: tuple[tuple[str, ...], ...] = (
    ("attention.self.value", "attention.output.dense"),  # BERT, RoBERTa, XLM-R, ELECTRA
    ("intermediate.dense", "output.dense"),
    ("attention.self.value_proj", "attention.output.dense"),  # DeBERTa
    ("attention.attn.v", "attention.attn.o"),  # MPNet
    ("attention.v_lin", "attention.out_lin"),  # DistilBERT
    ("ffn.lin1", "ffn.lin2"),
)
"""Modules of one transformer layer, each of which feeds the next, by the ends of their names."""


def magnitude(params: Parameters) -> Scores:
    r"""The absolute value: :math:`|w|` (Han et al. 2015, "Learning both weights and connections
    for efficient neural networks", section 3).

    Args:
        params: ``(module, name)`` pairs.

    Raises:
        ValueError: NaN or infinity among the weights; the error names the parameter.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> layer = nn.Linear(2, 1)
        >>> _ = layer.weight.data.copy_(torch.tensor([[3.0, -4.0]]))
        >>> magnitude([(layer, "weight")])[layer, "weight"]
        tensor([[3., 4.]])
    """
    return _score(params, lambda pair, weight: weight.abs())


def lamp(params: Parameters) -> Scores:
    r"""Layer-adaptive magnitude-based pruning (Lee et al. 2021, "Layer-adaptive sparsity for the
    magnitude-based pruning", equation 1).

    .. math:: \mathrm{score}(w_u) = \frac{w_u^2}{\sum_{v \ge u} w_v^2}

    with the entries of a tensor in ascending order of magnitude, equal ones in order of position.
    The largest entry of every tensor scores 1, so no tensor loses all of its entries. The sums are
    in float64, without pruned entries.

    Args:
        params: ``(module, name)`` pairs.

    Raises:
        ValueError: NaN or infinity among the weights; a sharded parameter (``DTensor``), of which
            no rank has all entries. The error names the parameter.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> layer = nn.Linear(3, 1)
        >>> _ = layer.weight.data.copy_(torch.tensor([[2.0, -1.0, 2.0]]))
        >>> lamp([(layer, "weight")])[layer, "weight"]
        tensor([[0.5000, 0.1111, 1.0000]])
    """
    params = pairs_of(params)
    for pair, name in zip(params, parameter_names(params), strict=True):
        if is_dtensor(stored(*pair)):
            raise ValueError(
                f"{name} should not be sharded, because lamp sums over all entries in order, got a "
                "DTensor: score the model before it is sharded, and pass the scores as "
                "importance_scores, of which each rank takes its part"
            )

    def score(pair: Pair, weight: Tensor) -> Tensor:
        magnitudes = weight.abs().flatten()
        order = magnitudes.argsort(stable=True)
        squares = magnitudes[order].double().square_()
        tails = squares.flip(0).cumsum(0).flip(0)
        # Each tail includes its own entry, so NaN comes only from 0 / 0.
        squares.div_(tails).nan_to_num_(nan=0.0)
        return (
            torch.empty_like(magnitudes)
            .scatter_(0, order, squares.to(weight.dtype))
            .view_as(weight)
        )

    return _score(params, score)


def lookahead(params: Parameters, chains: Iterable[Sequence[Pair]] | None = None) -> Scores:
    r"""Lookahead pruning (Park et al. 2020, "Lookahead: a far-sighted alternative of
    magnitude-based pruning", section 2).

    .. math:: \mathcal{L}_i(w) = |w| \cdot \|W_{i-1}[j, :]\|_F \cdot \|W_{i+1}[:, k]\|_F

    for the weight from input j to output k of the i-th layer of a chain. The norms are those of the
    weights that produce its input and of the weights that consume its output. They are 1 before the
    first and after the last layer, and on both sides of a parameter in no chain. The norms make the
    scores of different layers incomparable: prune with ``budget="layer"``, as the paper does.

    Args:
        params: ``(module, name)`` pairs.
        chains: sequences of ``(module, name)`` pairs, each of which feeds the next. Default: all of
            ``params`` as one chain. :func:`transformer_chains` finds those of an encoder.

    Raises:
        ValueError: a layer with another number of outputs than the next one in its chain has
            inputs; a parameter that is in the chains twice; NaN or infinity among the weights. The
            error names the parameter.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> first, second = nn.Linear(1, 2, bias=False), nn.Linear(2, 1, bias=False)
        >>> _ = first.weight.data.copy_(torch.tensor([[1.0], [2.0]]))
        >>> _ = second.weight.data.copy_(torch.tensor([[3.0, -4.0]]))
        >>> lookahead([(first, "weight"), (second, "weight")])[second, "weight"]
        tensor([[3., 8.]])
    """
    params = pairs_of(params)
    names = dict(zip(params, parameter_names(params), strict=True))
    before: dict[Pair, Pair] = {}
    after: dict[Pair, Pair] = {}
    seen: set[Pair] = set()
    for chain in [params] if chains is None else chains:
        pairs = list(chain)
        for pair in pairs:
            if pair in seen:
                raise ValueError(f"{_called(pair, names)} should be in the chains once, got twice")
            seen.add(pair)
        for this, following in pairwise(pairs):
            outputs, inputs = _fan(this)[0], _fan(following)[1]
            if outputs != inputs:
                raise ValueError(
                    f"{_called(this, names)} should have {inputs} outputs to feed "
                    f"{_called(following, names)}, got {outputs}"
                    + ("" if chains is not None else ": pass chains= to say what feeds what")
                )
            before[following], after[this] = this, following

    def score(pair: Pair, weight: Tensor) -> Tensor:
        scores = weight.abs()
        unit = unit_dimension(*pair)
        if pair in before:
            scores *= _along(_norms(before[pair], names, 0).to(scores), 1 - unit, scores)
        if pair in after:
            scores *= _along(_norms(after[pair], names, 1).to(scores), unit, scores)
        return scores

    return _score(params, score)


def transformer_chains(params: PrunableParameters) -> list[tuple[Pair, ...]]:
    """The chains for :func:`lookahead` in a BERT-like encoder, found by name.

    In every layer the value projection feeds the attention's output projection, and the first
    matrix of the feed-forward network feeds the second; residual connections separate these chains.
    The names are those of BERT, RoBERTa, XLM-R, ELECTRA, DeBERTa, MPNet and DistilBERT.

    Args:
        params: from :func:`torchalignprune.prunable_parameters`.

    Returns:
        The chains, of two ``(module, name)`` pairs each.

    Raises:
        TypeError: ``params`` are other pairs, which have no names.
        ValueError: ``params`` have no such chain.

    Example:
        >>> from torch import nn
        >>> from torchalignprune.parameters import prunable_parameters
        >>> layer = nn.ModuleDict({"lin1": nn.Linear(4, 16), "lin2": nn.Linear(16, 4)})
        >>> params = prunable_parameters(nn.ModuleDict({"ffn": layer}))
        >>> [len(chain) for chain in transformer_chains(params)]
        [2]
    """
    if not isinstance(params, PrunableParameters):
        raise TypeError(
            f"params should come from prunable_parameters(), got {type(params).__name__}"
        )
    pairs = {name.rpartition(".")[0]: pair for name, pair in zip(params.names, params, strict=True)}
    chains = []
    for module in pairs:
        for first, *rest in CHAINS:
            found = re.fullmatch(rf"(.*\.)?{re.escape(first)}", module)
            links = [module, *((found[1] or "") + link for link in rest)] if found else []
            if links and all(link in pairs for link in links):
                chains.append(tuple(pairs[link] for link in links))
    if not chains:
        raise ValueError(
            "params should have layers with the names of a BERT-like encoder, got none: pass "
            "chains= to lookahead"
        )
    return chains


def wanda(params: Parameters, input_norms: Mapping[Pair, Tensor] | Calibration) -> Scores:
    r"""Weights and activations (Sun et al. 2023, "A simple and effective pruning approach for
    large language models", equation 1).

    .. math:: S_{ij} = |W_{ij}| \cdot \|x_j\|_2

    The root mean square of a feature differs from its norm by a factor that all features share, so
    the order within a parameter is the same. The paper compares within each output: prune with
    ``budget="unit"``.

    Args:
        params: ``(module, name)`` pairs.
        input_norms: a :class:`torchalignprune.Calibration`, or for each pair a vector with the
            root mean square (or the norm) of each input feature or, for a convolution, each input
            channel.

    Raises:
        ValueError: a parameter without input norms; a vector of the wrong length; NaN, infinity or
            a negative norm. The error names the parameter.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> layer = nn.Linear(2, 1)
        >>> _ = layer.weight.data.copy_(torch.tensor([[3.0, -4.0]]))
        >>> wanda([(layer, "weight")], {(layer, "weight"): torch.tensor([2.0, 1.0])})
        {(Linear(in_features=2, out_features=1, bias=True), 'weight'): tensor([[6., 4.]])}
    """
    params = pairs_of(params)
    names = dict(zip(params, parameter_names(params), strict=True))
    by_pair = input_norms.norms() if isinstance(input_norms, Calibration) else input_norms
    for pair, name in names.items():
        norms = by_pair.get(pair)
        if norms is None:
            raise ValueError(f"input_norms has no entry for {name}")
        expected = _fan(pair)[1] * _groups(pair[0])
        if norms.shape != (expected,):
            raise ValueError(
                f"the input norms of {name} should have shape ({expected},), got "
                f"{tuple(norms.shape)}"
            )
        if not (norms.isfinite() & (norms >= 0)).all():
            raise ValueError(f"the input norms of {name} should be finite and not negative")

    def score(pair: Pair, weight: Tensor) -> Tensor:
        norms = by_pair[pair].detach().to(weight.device, weight.dtype)
        module, unit = pair[0], unit_dimension(*pair)
        groups = _groups(module)
        if groups == 1 or unit == 1:
            factors = _along(norms, 1 - unit, weight)
        else:
            # A filter of a grouped convolution only sees the input channels of its own group.
            seen = norms.view(groups, -1).repeat_interleave(weight.shape[0] // groups, dim=0)
            factors = seen.view(*weight.shape[:2], *[1] * (weight.dim() - 2))
        scores = weight.abs()
        local(scores).mul_(own_part(factors.expand(weight.shape), weight, "input_norms"))
        return scores

    return _score(params, score)


def random(params: Parameters, generator: torch.Generator | None = None) -> Scores:
    """Uniform scores in (0, 1]: the baseline that any criterion has to beat.

    Args:
        params: ``(module, name)`` pairs.
        generator: a generator of the CPU, so that a seed gives the same scores on every device.
            Default: torch's own.

    Raises:
        ValueError: the generator is not on the CPU.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> pair = (nn.Linear(4, 4), "weight")
        >>> first = random([pair], torch.Generator().manual_seed(0))[pair]
        >>> bool((first == random([pair], torch.Generator().manual_seed(0))[pair]).all())
        True
    """
    if generator is not None and generator.device.type != "cpu":
        raise ValueError(f"the generator should be on the CPU, got {generator.device}")

    def score(pair: Pair, weight: Tensor) -> Tensor:
        drawn = torch.rand(weight.shape, generator=generator, dtype=weight.dtype)
        scores = (1 - drawn).to(weight.device)
        if is_dtensor(weight):
            scores = like(weight, own_part(scores, weight, "the scores").contiguous())
        mask = mask_of(*pair)
        return scores if mask is None else scores.masked_fill_(mask == 0, 0)

    return _score(params, score)


def _score(params: Parameters, score: Callable[[Pair, Tensor], Tensor]) -> Scores:
    """Apply a criterion; tied weights are scored once and share their scores."""
    params = pairs_of(params)
    scores: Scores = {}
    done: dict[int, Tensor] = {}
    for pair, name in zip(params, parameter_names(params), strict=True):
        key = id(stored(*pair))
        if key not in done:
            done[key] = score(pair, _effective(pair, name))
        scores[pair] = done[key]
    return scores


def _effective(pair: Pair, name: str) -> Tensor:
    """The weight that the module computes with: a float32 or float64 copy, zero where pruned."""
    weight = stored(*pair).detach()
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    weight = weight.to(wide, memory_format=torch.contiguous_format, copy=True)
    mask = mask_of(*pair)
    if mask is not None:
        weight.masked_fill_(mask == 0, 0)
    if not weight.isfinite().all():
        found = "NaN" if weight.isnan().any() else "infinity"
        raise ValueError(f"the entries of {name} should be finite, got {found}")
    return weight


def _fan(pair: Pair) -> tuple[int, int]:
    """The numbers of outputs and inputs in the shape of a weight."""
    shape = stored(*pair).shape
    if len(shape) < 2:
        raise ValueError(
            f"{type(pair[0]).__name__}.{pair[1]} should have outputs and inputs, got shape "
            f"{tuple(shape)}"
        )
    unit = unit_dimension(*pair)
    return shape[unit], shape[1 - unit]


def _groups(module: nn.Module) -> int:
    """How many groups of inputs share the weight's columns: those of a convolution, otherwise 1."""
    groups = getattr(module, "groups", 1)
    transposed = getattr(module, "transposed", False)
    return 1 if transposed or not isinstance(groups, int) else groups


def _norms(pair: Pair, names: Mapping[Pair, str], which: int) -> Tensor:
    """The float64 norms of the outputs (``which=0``) or inputs (``which=1``) of a weight."""
    weight = _effective(pair, _called(pair, names))
    kept = unit_dimension(*pair) if which == 0 else 1 - unit_dimension(*pair)
    others = [dim for dim in range(weight.dim()) if dim != kept]
    norms: Tensor = torch.linalg.vector_norm(weight, dim=others, dtype=torch.float64)
    return norms


def _along(vector: Tensor, dim: int, weight: Tensor) -> Tensor:
    return vector.view([-1 if i == dim else 1 for i in range(weight.dim())])


def _called(pair: Pair, names: Mapping[Pair, str]) -> str:
    return names.get(pair, f"{type(pair[0]).__name__}.{pair[1]}")
