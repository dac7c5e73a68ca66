"""2:4 sparse weights on the sparse tensor cores of a GPU."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from torchalignprune import ops
from torchalignprune.parameters import (
    Parameters,
    mask_of,
    pairs_of,
    parameter_names,
    stored,
    transformers_conv1d,
    unit_dimension,
)

__all__ = ["to_semi_structured"]

# By the library that torch multiplies with: outputs and inputs should be multiples of these.
_MULTIPLES = {"cuSPARSELt": (16, 16), "CUTLASS": (32, 64)}
_DTYPES = (torch.float16, torch.bfloat16)


def to_semi_structured(params: Parameters) -> None:
    """Convert 2:4 sparse weights so that a GPU multiplies by them on its sparse tensor cores.

    The weights of the layers become ``torch.sparse.SparseSemiStructuredTensor`` parameters that
    need no gradient, in the format of cuSPARSELt or, without it, CUTLASS; masks, hooks and
    ``name_orig`` are removed. They take 9/16 of the dense memory. All layers are converted or, on
    an error, none. A small product by each weight is tried before the model changes.

    This is for GPUs with sparse tensor cores, of compute capability 8.0 (A100) or higher. On other
    devices, and with any other pattern than 2:4, zeros in a weight make files smaller but no
    product faster.

    The converted model runs forward passes under ``torch.inference_mode()`` or
    ``torch.no_grad()``, for contiguous inputs in the dtype of the weights. It cannot be trained or
    pruned further, change its dtype, load a ``state_dict()``, or save one other than by pickle
    (``safetensors`` cannot). So save the pruned model first, and convert it again after loading.
    torch calls this tensor type a prototype, and warns about it once.

    Args:
        params: ``(module, name)`` pairs of weights of ``nn.Linear`` or transformers' ``Conv1D``, on
            one or more GPUs, float16 or bfloat16, in which at most 2 of every 4 neighbouring inputs
            of a unit are not zero: pruned by ``AlignedNM(2, 4)``, or with such zeros in a parameter
            that is not masked. Outputs and inputs are multiples of 16 (with CUTLASS of 32 and 64).
            Tied weights stay tied if all their places are given.

    Raises:
        RuntimeError: a weight is not on a GPU that has sparse tensor cores; the GPU's library
            refuses a product.
        TypeError: another kind of layer; another dtype, also of the bias.
        ValueError: no parameters; a shape that does not fit; more than 2 of 4.

    Example:
        >>> import torch, torchalignprune as tap
        >>> layer = torch.nn.Linear(128, 64).half()
        >>> _ = tap.aligned_nm(layer, "weight", n=2, m=4)
        >>> tap.to_semi_structured([(layer, "weight")])  # doctest: +IGNORE_EXCEPTION_DETAIL
        Traceback (most recent call last):
        RuntimeError: parameters[0] (Linear.weight) is on cpu: ...

    On a GPU::

        model = model.half().cuda().eval()
        params = tap.prunable_parameters(model)
        tap.global_unstructured(params, tap.AlignedNM, n=2, m=4)
        tap.to_semi_structured(params)
        with torch.inference_mode():
            model(**batch)
    """
    pairs = pairs_of(params)
    names = parameter_names(pairs)
    if not pairs:
        raise ValueError("params should have at least one (module, name) pair, got none")
    for name, (module, attribute) in zip(names, pairs, strict=True):
        _check_kind(name, module, attribute)
        _check_device(name, stored(module, attribute).device)
    backend = _backend()
    for name, (module, attribute) in zip(names, pairs, strict=True):
        _check_format(name, module, attribute, backend)

    made: list[tuple[Tensor, Tensor | None, nn.Parameter]] = []
    with torch.no_grad():
        for name, (module, attribute) in zip(names, pairs, strict=True):
            original, mask = stored(module, attribute), mask_of(module, attribute)
            tied = next((p for o, m, p in made if o is original and _are_equal(m, mask)), None)
            packed = _packed(name, module, attribute, backend) if tied is None else tied
            _try(name, module, packed)
            made.append((original, mask, packed))
    for (module, attribute), (_, _, packed) in zip(pairs, made, strict=True):
        _put(module, attribute, packed)


def _are_equal(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and torch.equal(a, b))


def _check_kind(name: str, module: nn.Module, attribute: str) -> None:
    kinds = (nn.Linear, *transformers_conv1d())
    if not isinstance(module, kinds) or attribute != "weight":
        raise TypeError(
            f"{name} should be the weight of an nn.Linear or of transformers' Conv1D, for which "
            f"there are 2:4 sparse products, got {attribute} of {type(module).__name__}"
        )


def _check_device(name: str, device: torch.device) -> None:
    needs = (
        "2:4 sparse products need a GPU with sparse tensor cores (compute capability 8.0 or "
        "higher); elsewhere zeros save disk space, not time"
    )
    if device.type != "cuda":
        raise RuntimeError(f"{name} is on {device}: {needs}")
    capability = torch.cuda.get_device_capability(device)
    if torch.version.hip is None and capability < (8, 0):
        raise RuntimeError(
            f"{name} is on {device} of compute capability {'.'.join(map(str, capability))}: {needs}"
        )


def _backend() -> str:
    return "cuSPARSELt" if torch.backends.cusparselt.is_available() else "CUTLASS"


def _check_format(name: str, module: nn.Module, attribute: str, backend: str) -> None:
    weight, bias = stored(module, attribute), getattr(module, "bias", None)
    if weight.dtype not in _DTYPES:
        raise TypeError(f"{name} should be float16 or bfloat16, got {weight.dtype}")
    if bias is not None and bias.dtype != weight.dtype:
        raise TypeError(f"the bias of {name} should be {weight.dtype}, got {bias.dtype}")
    out_dim = unit_dimension(module, attribute)
    sizes = weight.size(out_dim), weight.size(1 - out_dim)
    multiples = _MULTIPLES[backend]
    for size, multiple, what in zip(sizes, multiples, ("outputs", "inputs"), strict=True):
        if size == 0 or size % multiple:
            raise ValueError(
                f"{name} should have a multiple of {multiple} {what} for {backend}, got {size}"
            )


def _packed(name: str, module: nn.Module, attribute: str, backend: str) -> nn.Parameter:
    weight, mask = stored(module, attribute).detach(), mask_of(module, attribute)
    if mask is not None:
        weight = ops.apply_mask(weight, mask != 0)
    out_dim = unit_dimension(module, attribute)
    units = weight.movedim(out_dim, 0).contiguous()
    _check_groups(name, units)
    packed = _pack(units, backend)
    # Conv1D multiplies by inputs x outputs: transposed, so that the groups are of inputs here too.
    return nn.Parameter(packed.t() if out_dim == 1 else packed, requires_grad=False)


def _check_groups(name: str, units: Tensor) -> None:
    counts = (units.reshape(len(units), -1, 4) != 0).sum(dim=2)
    wrong = counts > 2
    if not bool(wrong.any()):
        return
    unit, group = (int(i) for i in wrong.nonzero()[0])
    raise ValueError(
        f"{name} should have at most 2 entries that are not zero of every 4 neighbouring inputs, "
        f"got {int(counts[unit, group])} in unit {unit}, inputs {4 * group} to {4 * group + 3}, "
        f"the first of {int(wrong.sum()):,} such groups: prune with AlignedNM(2, 4)"
    )


def _pack(units: Tensor, backend: str) -> Tensor:
    if backend == "cuSPARSELt":
        return torch.sparse.SparseSemiStructuredTensorCUSPARSELT.from_dense(units)
    return torch.sparse.SparseSemiStructuredTensorCUTLASS.from_dense(units)


def _try(name: str, module: nn.Module, weight: Tensor) -> None:
    bias = getattr(module, "bias", None)
    out_dim = unit_dimension(module, "weight")
    x = torch.zeros(16, weight.size(1 - out_dim), dtype=weight.dtype, device=weight.device)
    try:
        if out_dim == 0:
            nn.functional.linear(x, weight, bias)
        else:
            assert bias is not None
            torch.addmm(bias, x, weight)
    except RuntimeError as error:
        raise RuntimeError(f"{name}: no 2:4 sparse product on {weight.device}: {error}") from error


def _put(module: nn.Module, attribute: str, packed: nn.Parameter) -> None:
    for key, hook in list(module._forward_pre_hooks.items()):
        if isinstance(hook, prune.BasePruningMethod) and hook._tensor_name == attribute:
            del module._forward_pre_hooks[key]
    if mask_of(module, attribute) is not None:
        del module._parameters[f"{attribute}_orig"]
        del module._buffers[f"{attribute}_mask"]
        module.__dict__.pop(attribute, None)
    module.register_parameter(attribute, packed)
