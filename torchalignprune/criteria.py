"""Scores for the ``importance_scores`` of ``global_unstructured``: the higher, the longer kept.

Each criterion takes ``(module, name)`` pairs and gives ``{(module, name): scores}``: non-negative,
in the shape of the parameter and on its device, float32 (float64 for a float64 parameter). For a
parameter that is pruned already they are the scores of what is left: pruned entries get 0.
:class:`Taylor`, :class:`Movement` and :class:`GradientMagnitude` watch a training run instead and
are for the ``criterion`` of a :class:`torchalignprune.Pruner`.

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
"""Modules of one transformer layer of which each feeds the next, by the ends of their names."""


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

    with the entries of one tensor in rising order of magnitude, among equals in order of position.
    The largest entry of every tensor scores 1, so that no tensor loses all of its entries. The
    sums are in float64; pruned entries are not among them.

    Args:
        params: ``(module, name)`` pairs.

    Raises:
        ValueError: NaN or infinity among the weights; a sharded parameter (``DTensor``), whose
            entries no rank has in one order. The error names the parameter.

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
                f"{name} is sharded (a DTensor), but lamp adds up all entries of a parameter in "
                "their order: score the model before it is sharded, and give the scores as "
                "importance_scores, of which each rank takes its part"
            )

    def score(pair: Pair, weight: Tensor) -> Tensor:
        magnitudes = weight.abs().flatten()
        order = magnitudes.argsort(stable=True)
        squares = magnitudes[order].double().square_()
        tails = squares.flip(0).cumsum(0).flip(0)
        # The tail of an entry that is not zero is not zero either, so 0 / 0 is all there can be.
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

    for the weight between input j and output k of the i-th layer of a chain: the norm of all that
    produces its input, and of all that consumes its output. Before the first and after the last
    layer of a chain the norm is 1, and so it is on both sides of a parameter in no chain. The norms
    make the scores of different layers incomparable: prune with ``budget="layer"``, as the paper
    does.

    Args:
        params: ``(module, name)`` pairs.
        chains: sequences of ``(module, name)`` pairs of which each feeds the next. Default: all of
            ``params`` as one chain. :func:`transformer_chains` finds those of an encoder.

    Raises:
        ValueError: the outputs of a layer in a chain are not as many as the inputs of the next; a
            parameter is in two chains; NaN or infinity among the weights. The error names the
            parameter.

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
                raise ValueError(f"{_called(pair, names)} should be in one chain, and once")
            seen.add(pair)
        for this, following in pairwise(pairs):
            outputs, inputs = _fan(this)[0], _fan(following)[1]
            if outputs != inputs:
                raise ValueError(
                    f"{_called(this, names)} with {outputs} outputs cannot feed "
                    f"{_called(following, names)} with {inputs} inputs"
                    + ("" if chains is not None else "; say with chains= what feeds what")
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
    matrix of the feed-forward network the second; between them lie residual connections. Known are
    the names in BERT, RoBERTa, XLM-R, ELECTRA, DeBERTa, MPNet and DistilBERT.

    Args:
        params: from :func:`torchalignprune.prunable_parameters`.

    Returns:
        Pairs of ``(module, name)`` pairs.

    Raises:
        TypeError: ``params`` has no names.
        ValueError: there is none in ``params``.

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
            "no layers with the names of a BERT-like encoder: lookahead needs chains= here"
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
            root mean square (or the norm) of each input feature, of a convolution each input
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
        generator: on the CPU; the same seed gives the same scores on every device. Default:
            torch's own.

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
    """Applies a criterion; tied weights are scored once and share their scores."""
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
    """What the module computes with: a copy, float32 or float64, zero where it is pruned."""
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
    """How many outputs and inputs a weight has, as far as its shape shows them."""
    shape = stored(*pair).shape
    if len(shape) < 2:
        raise ValueError(
            f"{type(pair[0]).__name__}.{pair[1]} should have outputs and inputs, got shape "
            f"{tuple(shape)}"
        )
    unit = unit_dimension(*pair)
    return shape[unit], shape[1 - unit]


def _groups(module: nn.Module) -> int:
    """Into how many parts the inputs fall, each a column of the weight's own for some outputs."""
    groups = getattr(module, "groups", 1)
    transposed = getattr(module, "transposed", False)
    return 1 if transposed or not isinstance(groups, int) else groups


def _norms(pair: Pair, names: Mapping[Pair, str], which: int) -> Tensor:
    """The norms over all that belongs to each output (0) or input (1) of a weight, in float64."""
    weight = _effective(pair, _called(pair, names))
    kept = unit_dimension(*pair) if which == 0 else 1 - unit_dimension(*pair)
    others = [dim for dim in range(weight.dim()) if dim != kept]
    norms: Tensor = torch.linalg.vector_norm(weight, dim=others, dtype=torch.float64)
    return norms


def _along(vector: Tensor, dim: int, weight: Tensor) -> Tensor:
    return vector.view([-1 if i == dim else 1 for i in range(weight.dim())])


def _called(pair: Pair, names: Mapping[Pair, str]) -> str:
    return names.get(pair, f"{type(pair[0]).__name__}.{pair[1]}")
