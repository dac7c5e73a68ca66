"""Statistics of the inputs of a model's layers over calibration batches."""

from __future__ import annotations

import json
import math
import operator
import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from torchalignprune.parameters import (
    Parameters,
    PrunableParameters,
    pairs_of,
    parameter_names,
    some,
    stored,
    unit_dimension,
)
from torchalignprune.weight_files import write_tensors

__all__ = ["CONVOLUTIONS", "Calibration", "InputStatistics"]

Pair = tuple[nn.Module, str]
Statistics = Literal["norms", "covariance"]
Batches = Iterable[Mapping[str, Any] | Tensor]

CONVOLUTIONS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
"""Modules whose input features are their channels."""

_ROWS = 4096  # how many inputs are copied at a time


@dataclass(frozen=True, eq=False)
class InputStatistics:
    r"""The statistics of the inputs :math:`x` of one layer. Tensors are on the CPU.

    Attributes:
        count: the number of inputs (tokens).
        norms: :math:`\sqrt{E[x_j^2]}`, the root mean square of each feature; shape (features,).
        mean: :math:`\mu = E[x]`; shape (features,).
        covariance: :math:`E[(x - \mu)(x - \mu)^T]`; shape (features, features), or None if only
            norms were collected.
    """

    count: int
    norms: Tensor
    mean: Tensor
    covariance: Tensor | None = None

    @property
    def second_moment(self) -> Tensor | None:
        r""":math:`H = E[x x^T]`, which is :math:`\mu \mu^T` plus the covariance; or None."""
        if self.covariance is None:
            return None
        return torch.addr(self.covariance, self.mean, self.mean)


class Calibration(Mapping[Pair, InputStatistics]):
    """Statistics of the inputs of a model's layers, by ``(module, name)`` of their weights.

    ``calibration[module, name]`` is an :class:`InputStatistics`. Layers that always got the same
    tensor, such as query, key and value of a self-attention, share one. Pass a calibration to
    ``AlignedMagnitude(input_norms=calibration)``, :func:`torchalignprune.criteria.wanda` or
    :func:`torchalignprune.realign`.

    Args:
        inputs: the statistics of each parameter.
        names: the dotted names of the parameters, for :meth:`save`. :meth:`collect`, :meth:`load`
            and :meth:`merge` fill them in.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> layer = nn.Linear(2, 3)
        >>> batches = [torch.tensor([[3.0, 0.0], [4.0, 1.0]])]
        >>> calibration = Calibration.collect(layer, batches, [(layer, "weight")])
        >>> calibration[layer, "weight"].norms
        tensor([3.5355, 0.7071])
        >>> calibration[layer, "weight"].mean
        tensor([3.5000, 0.5000])
    """

    def __init__(
        self, inputs: Mapping[Pair, InputStatistics], names: Mapping[Pair, str] | None = None
    ) -> None:
        self._inputs = dict(inputs)
        self._names = dict(names or {})

    def __getitem__(self, pair: Pair) -> InputStatistics:
        return self._inputs[pair]

    def __iter__(self) -> Iterator[Pair]:
        return iter(self._inputs)

    def __len__(self) -> int:
        return len(self._inputs)

    def __repr__(self) -> str:
        distinct = {id(found): found for found in self.values()}.values()
        counts = [found.count for found in distinct] or [0]
        ends = dict.fromkeys([min(counts), max(counts)])
        tokens = " to ".join(f"{count:,}" for count in ends)
        return (
            f"Calibration: {self.statistics} of {len(self)} parameters, "
            f"{len(distinct)} different inputs, over {tokens} tokens"
        )

    @property
    def statistics(self) -> Statistics:
        """``"covariance"`` if every parameter has one, otherwise ``"norms"``."""
        has = all(found.covariance is not None for found in self.values())
        return "covariance" if has else "norms"

    def norms(self) -> dict[Pair, Tensor]:
        """The root mean square of every input feature, by ``(module, name)``."""
        return {pair: found.norms for pair, found in self.items()}

    @classmethod
    def collect(
        cls,
        model: nn.Module,
        batches: Batches,
        params: Parameters,
        *,
        statistics: Statistics = "norms",
        memory_limit: int | None = None,
        progress: bool = False,
    ) -> Calibration:
        """Runs the model on calibration batches and collects statistics of the layers' inputs.

        The model runs on one batch at a time, without gradients and in evaluation mode. Sums are
        kept in float64. If a batch has an ``attention_mask`` of shape ``(batch, tokens)``, tokens
        whose mask is 0 do not count in inputs of shape ``(batch, tokens, features)`` or
        ``(batch * tokens, features)``. A ``decoder_attention_mask`` is used in the same way if the
        decoder's inputs have another shape. Hooks and training flags are restored at the end, also
        after an error.

        Covariances are summed on the device of their parameter, with 8 bytes for every pair of
        features. The results on the CPU have half of that.

        Args:
            model: the model to run; may be pruned already.
            batches: mappings, for ``model(**batch)``, or tensors, for ``model(batch)``. Tensors
                are moved to the device of the model's first parameter.
            params: ``(module, name)`` pairs of modules in the model.
            statistics: ``"norms"`` collects norms and means, which is all that pruning and
                ``realign(what="bias")`` need; ``"covariance"`` collects covariances too.
            memory_limit: in bytes, for the sums of covariances. The model runs over all batches
                several times, each time for as many parameters as fit, counted as if no two of
                them shared their inputs. The result is not limited: for a smaller one, call this
                with some of the parameters.
            progress: show a progress bar on standard error (needs tqdm).

        Returns:
            Vectors and matrices on the CPU, in float32 (float64 for a float64 parameter), with one
            entry per input feature of a linear layer or per input channel of a convolution.

        Raises:
            TypeError: a batch is neither a mapping nor a tensor, or ``batches`` is a single one.
            ValueError: there are no batches, or no tokens in them; a module never ran; an input
                has NaN or infinity; a module has no input features (``nn.Embedding``), or its
                inputs at each step cannot be observed (``nn.LSTM`` and the like); the covariance
                of a convolution is wanted; an ``nn.MultiheadAttention`` with one matrix for query,
                key and value was called with different tensors; one parameter exceeds
                ``memory_limit``; or ``memory_limit`` takes several passes, but ``batches`` is an
                iterator. The error names the parameter.
            ImportError: ``progress`` without tqdm.
        """
        if statistics not in get_args(Statistics):
            raise ValueError(
                f"statistics should be one of {get_args(Statistics)}, got {statistics!r}"
            )
        if isinstance(batches, Tensor | Mapping):
            raise TypeError(
                f"batches should be an iterable of batches, got one {type(batches).__name__}: put "
                "it into a list"
            )
        pairs = pairs_of(params)
        if not pairs:
            raise ValueError("params should have at least one (module, name) pair, got none")
        names = parameter_names(pairs)
        with_covariance = statistics == "covariance"
        meters = [
            _Meter(*pair, name, with_covariance) for pair, name in zip(pairs, names, strict=True)
        ]
        passes = [meters]
        if with_covariance and memory_limit is not None:
            passes = _passes(meters, memory_limit)
            if len(passes) > 1 and isinstance(batches, Iterator):
                raise ValueError(
                    f"batches should be iterable more than once (a list, a DataLoader), because "
                    f"memory_limit={memory_limit} takes {len(passes)} passes, got "
                    f"{type(batches).__name__}"
                )
        shown = _Bar(batches, len(passes)) if progress else None
        inputs: dict[Pair, InputStatistics] = {}
        try:
            for part in passes:
                _run(model, batches, part, shown)
                inputs |= _finish(part)
        finally:
            if shown is not None:
                shown.close()
        dotted = isinstance(params, PrunableParameters)
        return cls(inputs, dict(zip(pairs, names, strict=True)) if dotted else None)

    @classmethod
    def merge(
        cls, calibrations: Iterable[Calibration], weights: Sequence[float] | None = None
    ) -> Calibration:
        """The statistics of a mixture of several calibrations, for example of several languages.

        In the mixture, an input comes from each calibration with a probability proportional to its
        weight.

        Args:
            calibrations: of the same parameters, with the same statistics.
            weights: the weight of each calibration, whatever its number of tokens: equal weights
                make languages count the same. They need not add up to 1. Default: the numbers of
                tokens, which gives what :meth:`collect` would give for all batches together.

        Raises:
            TypeError: these are not calibrations.
            ValueError: there are no calibrations; their parameters or statistics differ; or
                ``weights`` has not one number for each, or numbers that are negative, all zero or
                not finite, or a sum that is not finite.

        Example:
            >>> import torch
            >>> from torch import nn
            >>> layer = nn.Linear(1, 1)
            >>> one, other = (
            ...     Calibration.collect(layer, [torch.full((tokens, 1), x)], [(layer, "weight")])
            ...     for tokens, x in ((1, 0.0), (3, 4.0))
            ... )
            >>> Calibration.merge([one, other])[layer, "weight"].mean
            tensor([3.])
            >>> Calibration.merge([one, other], weights=[1, 1])[layer, "weight"].mean
            tensor([2.])
        """
        every = list(calibrations)
        if not every:
            raise ValueError("calibrations should have at least one Calibration, got none")
        for i, one in enumerate(every):
            if not isinstance(one, Calibration):
                raise TypeError(
                    f"calibrations[{i}] should be a Calibration, got {type(one).__name__}"
                )
        first = every[0]
        for i, other in enumerate(every[1:], 1):
            if other.keys() != first.keys():
                raise ValueError(
                    f"calibrations[{i}] should have the parameters of calibrations[0], got others"
                )
            if other.statistics != first.statistics:
                raise ValueError(
                    f"calibrations[{i}] should have the statistics of calibrations[0], "
                    f"{first.statistics}, got {other.statistics}"
                )
        if weights is not None:
            weights = [float(weight) for weight in weights]
            if len(weights) != len(every):
                raise ValueError(
                    f"weights should have one number for each of the {len(every)} calibrations, "
                    f"got {len(weights)}"
                )
            if not all(w >= 0 for w in weights) or not 0 < sum(weights) < math.inf:
                raise ValueError(
                    "weights should be finite, not negative and not all 0, with a finite sum, got "
                    f"{weights}"
                )
        merged: dict[tuple[int, ...], InputStatistics] = {}
        inputs = {}
        for pair in first:
            parts = [calibration[pair] for calibration in every]
            key = tuple(map(id, parts))
            if key not in merged:
                merged[key] = _mixture(parts, weights or [part.count for part in parts])
            inputs[pair] = merged[key]
        return cls(inputs, first._names)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file with ``NAME.norms``, ``NAME.mean`` and ``NAME.covariance``.

        Parameters that share their inputs have their tensors stored once, under the first name. The
        metadata has that name and the number of tokens for each parameter.

        Args:
            path: the file to write.

        Raises:
            ValueError: the parameters have no dotted names, because they did not come from
                :func:`torchalignprune.prunable_parameters`.
            OSError: the file cannot be written. An existing file is kept.
            ImportError: safetensors is not installed.
        """
        if self.keys() != self._names.keys():
            raise ValueError(
                "Calibration.save needs the dotted names of the parameters, which plain pairs do "
                "not have: collect it with params from prunable_parameters(model)"
            )
        tensors: dict[str, Tensor] = {}
        owners: dict[int, str] = {}
        entries = {}
        for pair, found in self.items():
            name = self._names[pair]
            owner = owners.setdefault(id(found), name)
            entries[name] = {"of": owner, "count": found.count}
            if owner == name:
                for key in ("norms", "mean", "covariance"):
                    tensor = getattr(found, key)
                    if tensor is not None:
                        tensors[f"{name}.{key}"] = tensor.contiguous()
        metadata = {"format": "pt", "calibration": json.dumps(entries)}
        write_tensors(path, tensors, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str], params: PrunableParameters) -> Calibration:
        """Reads a file that :meth:`save` wrote.

        Args:
            path: the file.
            params: from :func:`torchalignprune.prunable_parameters`; the file may hold others too.

        Raises:
            TypeError: ``params`` have no dotted names.
            ValueError: the file is not a calibration, lacks a parameter or has another number of
                features for it, or its statistics are not finite.
            OSError: the file cannot be read.
            ImportError: safetensors is not installed.
        """
        if not isinstance(params, PrunableParameters):
            raise TypeError(
                f"params should come from prunable_parameters(model), got {type(params).__name__}"
            )
        safetensors = _safetensors()
        with open(path, "rb"):  # for its clear error: safe_open does not report a folder as such
            pass
        inputs: dict[Pair, InputStatistics] = {}
        read: dict[str, InputStatistics] = {}
        try:
            with safetensors.safe_open(os.fspath(path), framework="pt") as file:
                there = set(file.keys())
                entries = json.loads((file.metadata() or {}).get("calibration", "null"))
                if entries is None:
                    raise ValueError(f"{path} should be a file that Calibration.save wrote")
                missing = [name for name in params.names if name not in entries]
                if missing:
                    raise ValueError(f"{path} has no statistics for {some(missing)}")
                for pair, name in zip(params, params.names, strict=True):
                    owner = entries[name]["of"]
                    if owner not in read:
                        found = {
                            key: file.get_tensor(f"{owner}.{key}")
                            for key in ("norms", "mean", "covariance")
                            if f"{owner}.{key}" in there
                        }
                        read[owner] = InputStatistics(entries[name]["count"], **found)
                        _check_statistics(read[owner], f"{owner} in {path}")
                    features, got = _features(*pair, name), len(read[owner].norms)
                    if got != features:
                        raise ValueError(
                            f"the inputs of {name} should have {features} features, got {got} in "
                            f"{path}"
                        )
                    inputs[pair] = read[owner]
        except (safetensors.SafetensorError, KeyError, TypeError) as error:
            raise ValueError(f"{path} cannot be read as a calibration: {error}") from error
        return cls(inputs, dict(zip(params, params.names, strict=True)))


def _check_statistics(found: InputStatistics, what: str) -> None:
    features = len(found.norms)
    for key, shape in (
        ("norms", (features,)),
        ("mean", (features,)),
        ("covariance", (features,) * 2),
    ):
        tensor = getattr(found, key)
        if tensor is None:  # the covariance was not collected
            continue
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"the {key} of {what} should have shape {shape}, got {tuple(tensor.shape)}"
            )
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"the {key} of {what} should be finite numbers, got NaN or infinity")


def _safetensors() -> Any:
    try:
        import safetensors
    except ImportError as error:
        raise ImportError(
            'calibrations are saved with safetensors: pip install "torchalignprune[transformers]"'
        ) from error
    return safetensors


def _mixture(parts: Sequence[InputStatistics], weights: Sequence[float]) -> InputStatistics:
    shares = [weight / sum(weights) for weight in weights]
    both = list(zip(shares, parts, strict=True))
    dtype = torch.float64 if any(p.mean.dtype == torch.float64 for p in parts) else torch.float32
    squares = sum((share * part.norms.double().square() for share, part in both), torch.zeros(()))
    mean = sum((share * part.mean.double() for share, part in both), torch.zeros(()))
    covariance: Tensor | None = None
    if all(part.covariance is not None for part in parts):
        covariance = torch.zeros(len(mean), len(mean), dtype=torch.float64)
        for share, part in both:
            assert part.covariance is not None
            covariance.add_(part.covariance, alpha=share)
            apart = part.mean - mean
            covariance.addr_(apart, apart, alpha=share)
        covariance = covariance.to(dtype)
    count = sum(part.count for part in parts)
    return InputStatistics(count, squares.sqrt().to(dtype), mean.to(dtype), covariance)


def _passes(meters: Sequence[_Meter], limit: int) -> list[list[_Meter]]:
    """The parameters in their order, with as many in each pass as fit."""
    passes: list[list[_Meter]] = [[]]
    taken = 0
    for meter in meters:
        need = 8 * meter.features**2
        if need > limit:
            raise ValueError(
                f"memory_limit should be at least the {need} bytes that the covariance of "
                f"{meter.name} takes, got {limit}"
            )
        if taken + need > limit:
            passes.append([])
            taken = 0
        passes[-1].append(meter)
        taken += need
    return passes


def _run(
    model: nn.Module, batches: Batches, meters: Sequence[_Meter], shown: _Bar | None = None
) -> None:
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    observer = _Observer()
    ran = False
    with _observed(model, meters, observer), torch.no_grad():
        for batch in batches:
            ran = True
            if isinstance(batch, Tensor):
                observer.masks = []
                model(batch.to(device))
            elif isinstance(batch, Mapping):
                there = {
                    key: value.to(device) if isinstance(value, Tensor) else value
                    for key, value in batch.items()
                }
                observer.masks = _token_masks(model, there)
                model(**there)
            else:
                raise TypeError(
                    f"a batch should be a mapping or a tensor, got {type(batch).__name__}"
                )
            observer.end_of_forward(meters)
            if shown is not None:
                shown.update()
    if not ran:
        raise ValueError("batches should have at least one batch, got none")
    idle = [meter.name for meter in meters if meter.group is None]
    if idle:
        raise ValueError(f"the calibration batches never reached {some(idle)}")


def _token_masks(model: nn.Module, batch: Mapping[str, Any]) -> list[Tensor]:
    """Masks of the tokens that count, for the inputs of the encoder and of a decoder."""
    found = {key: batch.get(key) for key in ("attention_mask", "decoder_attention_mask")}
    masks = [m for m in found.values() if isinstance(m, Tensor) and m.dim() == 2]
    decoder = batch.get("decoder_input_ids")
    if decoder is None and getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        decoder = batch.get("labels")
    if isinstance(decoder, Tensor) and found["decoder_attention_mask"] is None:
        masks.append(torch.ones_like(decoder))
    if len(masks) == 2 and masks[0].shape == masks[1].shape and not torch.equal(*masks):
        raise ValueError(
            "the inputs of the encoder and of the decoder should have different shapes if their "
            "masks differ, because only shapes tell them apart, got "
            f"{tuple(masks[0].shape)} for both: pad them to different lengths"
        )
    return masks


def _finish(meters: Sequence[_Meter]) -> dict[Pair, InputStatistics]:
    """The statistics of a pass. Sums are freed as soon as their statistics are computed."""
    inputs: dict[Pair, InputStatistics] = {}
    finished: dict[_Sums, InputStatistics] = {}
    for meter in meters:
        assert meter.group is not None
        sums = meter.group.sums
        if sums not in finished:
            finished[sums] = sums.finish(meter.name)
        inputs[meter.module, meter.attribute] = finished[sums]
        meter.group = None
    return inputs


@contextmanager
def _observed(model: nn.Module, meters: Sequence[_Meter], observer: _Observer) -> Iterator[None]:
    """Puts hooks on the modules and the model into evaluation mode, and restores both at the end.

    torch's fast path for attention is off meanwhile: for it, an ``nn.TransformerEncoder`` would
    pack padded batches into nested tensors.
    """

    def hook_of(meter: _Meter) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            observer.observe(meter, meter.input(args, kwargs))

        return hook

    training = {module: module.training for module in model.modules()}
    fast_path = torch.backends.mha.get_fastpath_enabled()
    handles = [
        meter.module.register_forward_pre_hook(hook_of(meter), with_kwargs=True) for meter in meters
    ]
    try:
        model.eval()
        torch.backends.mha.set_fastpath_enabled(False)
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for handle in handles:
            handle.remove()
        for module, flag in training.items():
            module.training = flag


@dataclass(frozen=True, eq=False)
class _Input:
    """A tensor that a module was called with, and the layout of its dimensions.

    Attributes:
        tensor: the tensor itself; layers that get the same one share their statistics.
        features: the dimension of the features.
        batch: the dimension of the batch, for the mask; None if there are no tokens to mask.
    """

    tensor: Tensor
    features: int = -1
    batch: int | None = 0

    @property
    def layout(self) -> tuple[int, int | None]:
        return self.features, self.batch

    @property
    def version(self) -> int | None:
        """How often the tensor was changed in place."""
        return None if self.tensor.is_inference() else self.tensor._version

    def rows(self, masks: Iterable[Tensor]) -> Tensor:
        """Shape (tokens that count, features), by the first mask that fits."""
        tensor = self.tensor.detach()
        if self.batch is None:
            return tensor.movedim(self.features, -1).reshape(-1, tensor.shape[self.features])
        if self.batch:
            tensor = tensor.transpose(0, self.batch)
        rows = tensor.reshape(-1, tensor.shape[-1])
        for mask in masks:
            if tensor.shape[:-1] in (mask.shape, (mask.numel(),)):
                # A model may be spread over devices; the mask is on that of its first layers.
                return rows[mask.to(rows.device).reshape(-1) != 0]
        return rows


class _Sums:
    """The running sums of an input's statistics, in float64."""

    def __init__(self, features: int, dtype: torch.dtype, covariance: bool) -> None:
        self.features = features
        self.dtype = dtype  # of the result
        self.covariance = covariance
        self.count = 0
        self.total: Tensor | None = None
        self.squares: Tensor | None = None
        # Products are of x - shift: a mean far from 0 would otherwise cause cancellation.
        self.shift: Tensor | None = None
        self.products: Tensor | None = None

    def clone(self) -> _Sums:
        other = _Sums(self.features, self.dtype, self.covariance)
        other.count = self.count
        for name in ("total", "squares", "shift", "products"):
            tensor = getattr(self, name)
            setattr(other, name, None if tensor is None else tensor.clone())
        return other

    def add(self, rows: Tensor) -> None:
        squares = torch.linalg.vector_norm(rows, dim=0, dtype=torch.float64).square_()
        total = rows.sum(dim=0, dtype=torch.float64)
        self.squares = squares if self.squares is None else self.squares.add_(squares)
        self.total = total if self.total is None else self.total.add_(total)
        self.count += rows.shape[0]
        if self.covariance and rows.shape[0]:
            self._add_products(rows)

    def _add_products(self, rows: Tensor) -> None:
        wide = torch.float64 if rows.dtype == torch.float64 else torch.float32
        if self.shift is None or self.products is None:
            self.shift = rows.mean(dim=0, dtype=torch.float64).to(wide)
            size = (self.features, self.features)
            self.products = torch.zeros(size, dtype=torch.float64, device=rows.device)
        # The model may run under autocast; these sums should not.
        with torch.autocast(rows.device.type, enabled=False):
            for part in rows.split(_ROWS):
                apart = part.to(wide) - self.shift
                self.products += apart.T @ apart

    def finish(self, name: str) -> InputStatistics:
        if self.count == 0 or self.squares is None or self.total is None:
            raise ValueError(f"the calibration batches hold no tokens for {name}")
        norms = (self.squares / self.count).sqrt_()
        mean = self.total / self.count
        covariance = None
        finite = norms.isfinite().all() & mean.isfinite().all()
        if self.covariance:
            assert self.products is not None and self.shift is not None
            apart = mean - self.shift
            products, self.products = self.products, None  # freed when this call returns
            covariance = products.div_(self.count).addr_(apart, apart, alpha=-1)
            finite &= covariance.isfinite().all()
        if not finite:
            raise ValueError(f"the inputs of {name} should be finite numbers, got NaN or infinity")
        return InputStatistics(
            self.count,
            norms.to("cpu", self.dtype),
            mean.to("cpu", self.dtype),
            None if covariance is None else covariance.to("cpu", self.dtype),
        )


class _Group:
    """Parameters that got the same inputs so far, and the sums over these inputs."""

    def __init__(self, member: _Meter, sums: _Sums) -> None:
        self.members = [member]
        self.sums = sums
        # The latest input, which is added once all members got it, and the members that did.
        self.pending: _Input | None = None
        self.version: int | None = None
        self.reached: list[_Meter] = []


class _Observer:
    """Adds up inputs, once for all parameters that get the same tensor.

    Parameters are grouped at their first call, if their tensor is the one that another parameter
    has just been called with. From the second call on an input is only added once all of the group
    got it. A member that gets another input can so leave the group with the sums so far.
    """

    def __init__(self) -> None:
        self.masks: list[Tensor] = []
        # The groups that got one input so far, with that input's tensor and state.
        self.begun: list[tuple[_Group, weakref.ref[Tensor], object]] = []

    def observe(self, meter: _Meter, given: _Input) -> None:
        group = meter.group
        if group is None:
            self._begin(meter, given)
        elif len(group.members) == 1:
            self._add(group, given)
        elif group.pending is None:
            group.pending, group.version, group.reached = given, given.version, [meter]
        elif (
            meter not in group.reached
            and given.tensor is group.pending.tensor
            and given.layout == group.pending.layout
            and given.version == group.version
        ):
            group.reached.append(meter)
            if len(group.reached) == len(group.members):
                self._settle(group)
        else:
            self._settle(group)
            self.observe(meter, given)

    def end_of_forward(self, meters: Iterable[_Meter]) -> None:
        for meter in meters:
            if meter.group is not None and meter.group.pending is not None:
                self._settle(meter.group)
        self.begun.clear()

    def _begin(self, meter: _Meter, given: _Input) -> None:
        state = (given.layout, given.version, meter.features)
        for group, tensor, known in self.begun:
            if group.pending is None and tensor() is given.tensor and known == state:
                meter.group = group
                group.members.append(meter)
                return
        meter.group = _Group(meter, meter.new_sums())
        self._add(meter.group, given)
        self.begun.append((meter.group, weakref.ref(given.tensor), state))

    def _add(self, group: _Group, given: _Input) -> None:
        self.begun = [entry for entry in self.begun if entry[0] is not group]
        rows = given.rows(self.masks)
        features, name = group.sums.features, group.members[0].name
        if rows.shape[1] != features:
            raise ValueError(
                f"the inputs of {name} should have {features} features, got {rows.shape[1]}"
            )
        group.sums.add(rows)

    def _settle(self, group: _Group) -> None:
        """Adds the pending input for the members that got it, and splits off the others."""
        assert group.pending is not None
        given = group.pending
        if given.version != group.version:
            raise ValueError(
                f"the input of {group.reached[0].name} should not change in place before the other "
                "layers that share it have run"
            )
        others = [member for member in group.members if member not in group.reached]
        if others:
            apart = _Group(others[0], group.sums.clone())
            apart.members = others
            for member in others:
                member.group = apart
        group.members, group.pending, group.reached = group.reached, None, []
        self._add(group, given)


class _Meter:
    """A parameter whose inputs are observed."""

    def __init__(self, module: nn.Module, attribute: str, name: str, covariance: bool) -> None:
        self.module = module
        self.attribute = attribute
        self.name = name
        self.features = _features(module, attribute, name)
        self.covariance = covariance
        self.group: _Group | None = None
        if covariance and isinstance(module, CONVOLUTIONS):
            raise ValueError(
                f"{name} belongs to a convolution, whose covariance is not supported: leave it "
                'out, or use statistics="norms"'
            )

    def new_sums(self) -> _Sums:
        weight = stored(self.module, self.attribute)
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        return _Sums(self.features, wide, self.covariance)

    def input(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Input:
        if isinstance(self.module, nn.MultiheadAttention):
            return self._projected(args, kwargs)
        found = args[0] if args else next(iter(kwargs.values()), None)
        if not isinstance(found, Tensor):
            raise ValueError(
                f"the first input of {self.name} should be a tensor, got {type(found).__name__}"
            )
        if isinstance(self.module, CONVOLUTIONS):
            # (batch, channels, *positions), or without a batch.
            channels = found.dim() - stored(self.module, self.attribute).dim() + 1
            return _Input(found, channels, None)
        return _Input(found)

    def _projected(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Input:
        assert isinstance(self.module, nn.MultiheadAttention)
        called = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
        query, key, value = called["query"], called["key"], called["value"]
        if self.attribute == "in_proj_weight":
            if not (query is key and key is value):
                raise ValueError(
                    f"{self.name} projects query, key and value by one matrix, so they should be "
                    "the same tensor, got different ones: leave it out"
                )
            found = query
        else:
            found = {"q": query, "k": key, "v": value}[self.attribute[0]]
        assert isinstance(found, Tensor)
        return _Input(found, batch=0 if self.module.batch_first or found.dim() != 3 else 1)


def _features(module: nn.Module, attribute: str, name: str) -> int:
    """The number of input features of a parameter."""
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        raise ValueError(f"{name} belongs to an embedding, which has no input features")
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        raise ValueError(
            f"{name} belongs to a recurrent module ({type(module).__name__}), whose inputs at each "
            "step cannot be observed: leave it out"
        )
    weight = stored(module, attribute)
    if weight.dim() < 2:
        raise ValueError(f"{name} should have outputs and inputs, got shape {tuple(weight.shape)}")
    # The weight of a grouped convolution only has the input channels of one group.
    channels = getattr(module, "in_channels", None)
    if isinstance(module, CONVOLUTIONS) and isinstance(channels, int):
        return channels
    return weight.shape[1 - unit_dimension(module, attribute)]


class _Bar:
    """A progress bar over all the batches of all the passes."""

    def __init__(self, batches: Batches, passes: int) -> None:
        try:
            from tqdm.auto import tqdm
        except ImportError as error:
            raise ImportError(
                'progress=True needs tqdm: pip install "torchalignprune[transformers]"'
            ) from error
        # None if unknown: the len of a DataLoader over an IterableDataset raises an error.
        total = passes * operator.length_hint(batches) or None
        self._bar = tqdm(total=total, desc="calibrating", unit="batch", leave=False)

    def update(self) -> None:
        self._bar.update()

    def close(self) -> None:
        self._bar.close()
