"""What goes into the layers of a model: statistics over calibration batches, in one pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sized
from typing import Any

import torch
from torch import Tensor, nn

from torchalignprune.parameters import (
    Parameters,
    PrunableParameters,
    parameter_names,
    stored,
    unit_dimension,
)

__all__ = ["input_norms"]

_CONVOLUTIONS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)


def input_norms(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any] | Tensor],
    params: Parameters,
    *,
    progress: bool = False,
) -> dict[tuple[nn.Module, str], Tensor]:
    """The root mean square of every input feature of the layers, over calibration batches.

    The model runs on each batch without gradients and in evaluation mode; the batches are taken
    one at a time, and sums are kept in float64. Where a batch has an ``attention_mask`` of shape
    ``(batch, tokens)``, tokens whose mask is 0 do not count in inputs of shape ``(batch, tokens,
    features)`` or ``(batch * tokens, features)``. The model is left as it was: no hooks, the same
    training flags, also after an error.

    Args:
        model: the model to run; may be pruned already.
        batches: mappings, for ``model(**batch)``, or tensors, for ``model(batch)``. Tensors are
            moved to the device of the model's first parameter.
        params: ``(module, name)`` pairs of modules in the model.
        progress: show a progress bar on standard error (needs tqdm).

    Returns:
        For each pair a vector on the parameter's device, float32 (float64 for a float64
        parameter): of a linear layer one number per input feature, of a convolution one per input
        channel. It is what :func:`torchalignprune.criteria.wanda` and ``AlignedMagnitude`` take as
        ``input_norms``.

    Raises:
        TypeError: a batch is neither a mapping nor a tensor.
        ValueError: there are no batches, or no tokens in them; a module never ran; NaN or infinity
            in an input; a module without input features (``nn.Embedding``); an
            ``nn.MultiheadAttention`` with one matrix for query, key and value was called with
            different tensors as these. The error names the parameter.
        ImportError: ``progress`` without tqdm.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> layer = nn.Linear(2, 3)
        >>> batches = [torch.tensor([[3.0, 0.0], [4.0, 1.0]])]
        >>> input_norms(layer, batches, [(layer, "weight")])[layer, "weight"]
        tensor([3.5355, 0.7071])
    """
    pairs = list(params)
    names = parameter_names(params if isinstance(params, PrunableParameters) else pairs)
    meters = [_Meter(*pair, name) for pair, name in zip(pairs, names, strict=True)]
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    training = {module: module.training for module in model.modules()}
    mask: Tensor | None = None

    def observe(meter: _Meter) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            meter.add(args, kwargs, mask)

        return hook

    handles = [
        meter.module.register_forward_pre_hook(observe(meter), with_kwargs=True) for meter in meters
    ]
    try:
        model.eval()
        ran = False
        with torch.no_grad():
            for batch in _shown(batches) if progress else batches:
                ran = True
                if isinstance(batch, Tensor):
                    mask = None
                    model(batch.to(device))
                elif isinstance(batch, Mapping):
                    there = {
                        key: value.to(device) if isinstance(value, Tensor) else value
                        for key, value in batch.items()
                    }
                    found = there.get("attention_mask")
                    mask = found if isinstance(found, Tensor) and found.dim() == 2 else None
                    model(**there)
                else:
                    raise TypeError(
                        f"a batch should be a mapping or a tensor, got {type(batch).__name__}"
                    )
    finally:
        for handle in handles:
            handle.remove()
        for module, flag in training.items():
            module.training = flag
    if not ran:
        raise ValueError("there are no calibration batches")
    idle = [meter.name for meter in meters if meter.squares is None]
    if idle:
        more = f" and {len(idle) - 5} more" if len(idle) > 5 else ""
        raise ValueError(f"the calibration batches never reached {', '.join(idle[:5])}{more}")
    return {pair: meter.root_mean_square() for pair, meter in zip(pairs, meters, strict=True)}


class _Meter:
    """The running sum of squares of one parameter's inputs."""

    def __init__(self, module: nn.Module, name: str, label: str) -> None:
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            raise ValueError(f"{label} belongs to an embedding, which has no input features")
        weight = stored(module, name)
        if weight.dim() < 2:
            raise ValueError(
                f"{label} should have outputs and inputs, got shape {tuple(weight.shape)}"
            )
        self.module = module
        self.attribute = name
        self.name = label
        self.squares: Tensor | None = None
        self.count = 0
        # Of a grouped convolution the weight does not show all input channels.
        channels = getattr(module, "in_channels", None)
        fallback = weight.shape[1 - unit_dimension(module, name)]
        self.features = channels if isinstance(module, _CONVOLUTIONS) else fallback

    def add(self, args: tuple[Any, ...], kwargs: dict[str, Any], mask: Tensor | None) -> None:
        inputs = self._inputs(args, kwargs).detach()
        if isinstance(self.module, _CONVOLUTIONS):
            # (batch, channels, *positions), or without a batch.
            channels = inputs.dim() - self.module.weight.dim() + 1
            rows = inputs.movedim(channels, -1).reshape(-1, inputs.shape[channels])
        else:
            rows = inputs.reshape(-1, inputs.shape[-1])
            leading = inputs.shape[:-1]
            if mask is not None and leading in (mask.shape, (mask.numel(),)):
                rows = rows[mask.reshape(-1) != 0]
        if rows.shape[1] != self.features:
            raise ValueError(
                f"the inputs of {self.name} should have {self.features} features, got "
                f"{rows.shape[1]}"
            )
        norms = torch.linalg.vector_norm(rows, dim=0, dtype=torch.float64)
        squares = norms.square_()
        self.squares = squares if self.squares is None else self.squares + squares
        self.count += rows.shape[0]

    def root_mean_square(self) -> Tensor:
        assert self.squares is not None
        if self.count == 0:
            raise ValueError(f"the calibration batches hold no tokens for {self.name}")
        found = (self.squares / self.count).sqrt()
        if not found.isfinite().all():
            raise ValueError(f"NaN or infinity in the inputs of {self.name}")
        weight = stored(self.module, self.attribute)
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        return found.to(weight.device, wide)

    def _inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        if isinstance(self.module, nn.MultiheadAttention):
            return self._projected(args, kwargs)
        found = args[0] if args else next(iter(kwargs.values()), None)
        if not isinstance(found, Tensor):
            raise ValueError(
                f"the first input of {self.name} should be a tensor, got {type(found).__name__}"
            )
        return found

    def _projected(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        assert isinstance(self.module, nn.MultiheadAttention)
        called = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
        query, key, value = called["query"], called["key"], called["value"]
        if self.attribute == "in_proj_weight":
            if not (query is key and key is value):
                raise ValueError(
                    f"{self.name} projects query, key and value by one matrix, and was called with "
                    "different tensors: its inputs have no norms in common"
                )
            found = query
        else:
            found = {"q": query, "k": key, "v": value}[self.attribute[0]]
        assert isinstance(found, Tensor)
        batched = found.dim() == 3
        return found if self.module.batch_first or not batched else found.transpose(0, 1)


def _shown(batches: Iterable[Any]) -> Iterable[Any]:
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise ImportError(
            'progress=True needs tqdm: pip install "torchalignprune[transformers]"'
        ) from error
    total = len(batches) if isinstance(batches, Sized) else None
    shown: Iterable[Any] = tqdm(batches, total=total, desc="calibrating", unit="batch", leave=False)
    return shown
