"""Masks on modules: one forward pre-hook and one bool mask, in the form of torch's own pruning.

A pruned parameter ``name`` becomes the parameter ``name_orig`` and the buffer ``name_mask``, and a
forward pre-hook puts their product where ``name`` was. ``torch.nn.utils.prune.is_pruned`` and
``torch.nn.utils.prune.remove`` work on it.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from torchalignprune import _C, ops
from torchalignprune.ddp import keep_mask
from torchalignprune.dtensors import is_dtensor
from torchalignprune.parameters import bool_mask, check_mask, mask_of, same_mask, stored

__all__ = ["MaskHook", "cached_weights", "load_state_dict", "put_masks"]


class MaskHook(prune.BasePruningMethod):
    """The only forward pre-hook of a pruned parameter, however often its mask has changed.

    It holds the parameter's name and a weak reference to the module, so the model does not keep
    pruning methods and their references alive.
    """

    PRUNING_TYPE = "unstructured"

    straight_through = False
    """Whether gradients also reach the pruned entries of ``name_orig``, for a criterion."""

    def __init__(self, module: nn.Module, name: str) -> None:
        self._tensor_name = name
        self._module = weakref.ref(module)

    def __call__(self, module: nn.Module, inputs: Any) -> None:
        """Put the product where the parameter was."""
        keep_mask(self)
        super().__call__(module, inputs)  # type: ignore[no-untyped-call]

    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
        """The present mask: a hook prunes nothing further."""
        return default_mask

    def apply_mask(self, module: nn.Module) -> Tensor:
        """``name_orig`` with zeros where ``name_mask`` is False, with a gradient to ``name_orig``.

        See :func:`torchalignprune.ops.masked_weight` and :func:`cached_weights`.
        """
        original: Tensor = getattr(module, self._tensor_name + "_orig")
        mask: Tensor = getattr(module, self._tensor_name + "_mask")
        differentiable = torch.is_grad_enabled() and original.requires_grad
        if self.straight_through and differentiable:
            return masked_straight_through(original, mask)
        cache = _cache  # Another thread may end the scope.
        if cache is None or differentiable or not _is_plain(original):
            return _next_product(module, self._tensor_name, original, mask)
        made = cache.get(self)
        if made is None or not made.is_of(original, mask):
            made = cache[self] = _Made(original, mask)
        return made.product

    def __deepcopy__(self, memo: dict[int, Any]) -> MaskHook:
        # After a forward the masked weight has an autograd history or is a wrapper left over from a
        # torch.func transform, and deepcopy refuses both. Hooks are copied after parameters and
        # buffers but before the masked weight, so the copy's weight can be made here and put where
        # deepcopy will look for it.
        module = self._module()
        copied = memo.get(id(module)) if module is not None else None
        twin = MaskHook(copied if isinstance(copied, nn.Module) else nn.Module(), self._tensor_name)
        twin.straight_through = self.straight_through
        memo[id(self)] = twin
        weight = vars(module).get(self._tensor_name) if module is not None else None
        if isinstance(weight, Tensor) and not (weight.is_leaf and _is_unwrapped(weight)):
            assert module is not None
            original = memo.get(id(stored(module, self._tensor_name)))
            mask = memo.get(id(mask_of(module, self._tensor_name)))
            if isinstance(original, Tensor) and isinstance(mask, Tensor):
                memo[id(weight)] = _product(original, mask)
            elif _is_unwrapped(weight):
                memo[id(weight)] = weight.detach().clone()
        return twin

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_module": self._module()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        module = state["_module"]
        vars(self).update(state)
        self._module = weakref.ref(module if module is not None else nn.Module())

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._tensor_name!r})"


class _Made:
    """A product, and what it was made of."""

    def __init__(self, original: Tensor, mask: Tensor) -> None:
        self.tensors = (original, mask)
        self.state = self._state()
        self.product = _product(original, mask)

    def is_of(self, original: Tensor, mask: Tensor) -> bool:
        same = self.tensors[0] is original and self.tensors[1] is mask
        return same and self.state == self._state()

    def _state(self) -> list[Any]:
        # A product that was made in inference mode is of no use outside of it.
        versions = [None if t.is_inference() else t._version for t in self.tensors]
        places = [t.data_ptr() for t in self.tensors]
        return [torch.is_inference_mode_enabled(), *versions, *places]


# Products by hook, while any thread is inside cached_weights().
_cache: dict[MaskHook, _Made] | None = None
_scopes = 0
_lock = threading.Lock()


def _is_plain(original: Tensor) -> bool:
    return _is_unwrapped(original) and not torch.compiler.is_compiling()


def _is_unwrapped(tensor: Tensor) -> bool:
    """Whether it belongs to no transform of ``torch.func``, not even to a finished one."""
    return not torch._C._functorch.is_functorch_wrapped_tensor(tensor)


@contextmanager
def cached_weights() -> Iterator[None]:
    """A context that applies the masks of weights that need no gradient only once.

    For evaluation under ``torch.no_grad()`` or ``torch.inference_mode()``: the first forward makes
    the masked weights and later ones reuse them, as with ``torch.nn.utils.parametrize.cached()``
    for parametrizations. Weights that need a gradient are not cached. Contexts can be nested, and
    threads share the cache; it is freed when the last context ends.

    Do not change weights inside it. The cache notices changes of weights and masks that torch
    counts (optimizers, ``load_state_dict``, in-place operators) and new tensors in their place, but
    torch does not count changes through ``.data`` and NumPy, nor those of ``fused=True``
    optimizers. Therefore nothing is cached outside of it.

    Example:
        >>> import torch, torchalignprune as tap
        >>> layer = torch.nn.Linear(4, 4)
        >>> _ = tap.magnitude(layer, "weight", 0.5)
        >>> with torch.no_grad(), tap.cached_weights():
        ...     first, second = layer(torch.ones(4)), layer(torch.ones(4))
        >>> torch.equal(first, second)
        True
    """
    global _cache, _scopes
    with _lock:
        _scopes += 1
        if _cache is None:
            _cache = {}
    try:
        yield
    finally:
        with _lock:
            _scopes -= 1
            if _scopes == 0:
                _cache = None


def put_masks(
    masks: Iterable[tuple[nn.Module, str, Tensor]], *, zeroed: bool = False
) -> list[MaskHook]:
    """Put masks on parameters, replacing their present masks: all of them or, on an error, none.

    Args:
        masks: ``(module, name, mask)``; a mask is bool and shaped like the parameter. Parameters
            that are given the same mask (tied weights) share it. The mask of a DTensor has its
            layout, or is whole and the same on all ranks.
        zeroed: the stored weights are or will at once be zero wherever the masks prune, so that
            until the next forward the modules can show them without computing a product.

    Returns:
        The hook of each parameter.
    """
    # Whatever needs memory comes first, so that running out of it changes nothing.
    ready: list[Callable[[], MaskHook]] = []
    parts: dict[tuple[int, int], Tensor] = {}
    for module, name, mask in masks:
        original = stored(module, name)
        if is_dtensor(original):
            from torchalignprune import sharded_hooks

            ready.append(sharded_hooks.prepare(module, name, mask, original, parts))
        elif zeroed:
            plain = type(original) in (Tensor, nn.Parameter)
            shown = _C.zeroed_weight(original, mask) if plain else _product(original, mask)
            ready.append(functools.partial(put_mask, module, name, mask, original, shown))
        elif _C.may_overwrite(vars(module), name, original, mask):
            ready.append(functools.partial(_put_over, module, name, mask, original))
        else:
            shown = _product(original, mask)
            ready.append(functools.partial(put_mask, module, name, mask, original, shown))
    return [put() for put in ready]


def _put_over(module: nn.Module, name: str, mask: Tensor, original: Tensor) -> MaskHook:
    shown = _next_product(module, name, original, mask)
    return put_mask(module, name, mask, original, shown)


def _next_product(module: nn.Module, name: str, original: Tensor, mask: Tensor) -> Tensor:
    """The product, in the memory of the module's previous one if nothing else uses that."""
    over = None
    if not torch.compiler.is_compiling() and torch._C._get_tracing_state() is None:
        over = _C.masked_weight_over(vars(module), name, original, mask)
    return _product(original, mask) if over is None else over


def _product(original: Tensor, mask: Tensor) -> Tensor:
    if is_dtensor(original):
        return original * mask
    # A checkpoint may have masks of torch's own pruning, in the dtype of the weight.
    return ops.masked_weight(original, bool_mask(mask))


def masked_straight_through(original: Tensor, mask: Tensor) -> Tensor:
    """The masked weight, whose gradient reaches pruned entries too."""
    pruned: Tensor = _StraightThrough.apply(original, mask)  # type: ignore[no-untyped-call]
    return pruned


class _StraightThrough(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(original: Tensor, mask: Tensor) -> Tensor:
        return _product(original, mask)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Nothing to save, but torch.func requires it."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def put_mask(
    module: nn.Module,
    name: str,
    mask: Tensor,
    original: Tensor,
    pruned: Tensor | None,
    kind: type[MaskHook] = MaskHook,
) -> MaskHook:
    """Put one mask on: the names, the shown weight (None: unchanged), and one hook of a kind."""
    hooks = [
        (key, hook)
        for key, hook in module._forward_pre_hooks.items()
        if isinstance(hook, prune.BasePruningMethod) and hook._tensor_name == name
    ]
    if mask_of(module, name) is None:
        del module._parameters[name]
        assert isinstance(original, nn.Parameter)
        module.register_parameter(f"{name}_orig", original)
    module.register_buffer(f"{name}_mask", mask)
    if pruned is not None:
        setattr(module, name, pruned)
    if len(hooks) == 1 and type(hooks[0][1]) is kind:
        return hooks[0][1]
    for key, _ in hooks:
        del module._forward_pre_hooks[key]
    hook = kind(module, name)
    module.register_forward_pre_hook(hook)
    return hook


def load_state_dict(
    model: nn.Module, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
) -> Any:
    """Load the state of a pruned model into a model that may not be pruned yet.

    Every parameter with ``name_orig`` and ``name_mask`` in ``state_dict`` gets its hook and mask;
    parameters that are pruned in the model and dense in ``state_dict`` become dense. Then
    ``model.load_state_dict`` does the rest. Each place of a tied weight gets the mask that
    ``state_dict`` has for it; equal masks become one shared tensor.

    Args:
        model: a model of the same architecture, pruned or not.
        state_dict: from ``state_dict()`` of a pruned model. Masks of torch's own methods, in the
            dtype of the weight, work too.
        strict: as in ``torch.nn.Module.load_state_dict``.
        assign: as in ``torch.nn.Module.load_state_dict``.

    Returns:
        What ``torch.nn.Module.load_state_dict`` returns.

    Raises:
        ValueError: a mask without its parameter in the model, or with other numbers than 0 and 1.
        RuntimeError: keys, shapes or layouts that do not fit, or tensors without values, as from
            ``torch.nn.Module.load_state_dict``, but before anything has changed. Keys are compared
            as they are, before a module's own hooks could rename them.

    Example:
        >>> import torch, torchalignprune as tap
        >>> from torch import nn
        >>> pruned, fresh = nn.Linear(4, 4), nn.Linear(4, 4)
        >>> _ = tap.aligned_magnitude(pruned, "weight", 0.5)
        >>> tap.load_state_dict(fresh, pruned.state_dict())
        <All keys matched successfully>
        >>> torch.equal(fresh.weight, pruned.weight)
        True
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    wanted: list[tuple[str, nn.Module, str]] = []
    state = OrderedDict(state_dict)
    if hasattr(state_dict, "_metadata"):
        state._metadata = state_dict._metadata  # type: ignore[attr-defined]
    for key in state_dict:
        path, _, name = key.removesuffix("_orig").rpartition(".")
        dense = key.removesuffix("_orig")
        if dense == key or f"{dense}_mask" not in state_dict:
            continue
        module = modules.get(path)
        if module is None or not _is_parameter(module, name):
            raise ValueError(
                f"state_dict should have masks of the model's parameters only, got one of {dense}"
            )
        wanted.append((dense, module, name))
        given = state_dict[f"{dense}_mask"]
        if isinstance(given, Tensor):
            check_mask(given, dense)
            state[f"{dense}_mask"] = given != 0
    dense_again = [
        (dense, module, name)
        for dense, module, name in _masked(modules)
        if dense in state_dict and f"{dense}_orig" not in state_dict
    ]
    _check_state(model, state, [w[0] for w in wanted], [d[0] for d in dense_again], strict, assign)
    for module, name in dict.fromkeys((module, name) for _, module, name in dense_again):
        prune.remove(module, name)
    # For each parameter, the masks of the state and the tensors that they will be loaded into.
    made: dict[int, list[tuple[Tensor, Tensor]]] = {}
    masks: list[tuple[nn.Module, str, Tensor]] = []
    for dense, module, name in wanted:
        original, given = stored(module, name), state[f"{dense}_mask"]
        shared = made.setdefault(id(original), [])
        mask = next((mask for other, mask in shared if same_mask(given, other)), None)
        if mask is None:
            mask = torch.ones_like(original, dtype=torch.bool)
            shared.append((given, mask))
        masks.append((module, name, mask))
    put_masks(masks)
    result = model.load_state_dict(state, strict=strict, assign=assign)
    put_masks((module, name, getattr(module, f"{name}_mask")) for _, module, name in wanted)
    return result


def _is_parameter(module: nn.Module, name: str) -> bool:
    found = module._parameters.get(name)
    return (module._parameters.get(f"{name}_orig") if found is None else found) is not None


def _masked(modules: Mapping[str, nn.Module]) -> Iterable[tuple[str, nn.Module, str]]:
    for path, module in modules.items():
        for buffer in list(module._buffers):
            name = buffer.removesuffix("_mask")
            if name != buffer and f"{name}_orig" in module._parameters:
                yield (f"{path}.{name}" if path else name), module, name


def _check_state(
    model: nn.Module,
    state: Mapping[str, Any],
    pruned: Iterable[str],
    dense: Iterable[str],
    strict: bool,
    assign: bool,
) -> None:
    """Raises what load_state_dict would raise, before anything has changed."""
    own = dict(model.state_dict())
    for name in dense:
        own[name] = own.pop(f"{name}_orig")
        del own[f"{name}_mask"]
    for name in pruned:
        if f"{name}_orig" not in own:
            own[f"{name}_orig"] = own[f"{name}_mask"] = own.pop(name)
    problems = []
    for key, value in own.items():
        if not isinstance(value, Tensor) or key not in state:
            continue
        given = state[key]
        if not isinstance(given, Tensor):
            problems.append(f"{key}: expected a tensor, got {type(given).__name__}")
        elif given.shape != value.shape:
            problems.append(
                f"size mismatch for {key}: expected {tuple(value.shape)}, got {tuple(given.shape)}"
            )
        elif not assign and given.layout != value.layout:
            problems.append(f"{key}: expected {value.layout}, got {given.layout}")
        elif not assign and given.is_meta and not value.is_meta:
            problems.append(f"{key}: expected values, got a tensor on the meta device")
    if strict:
        missing = [key for key in own if key not in state]
        unexpected = [key for key in state if key not in own]
        problems += [f"missing keys: {', '.join(missing)}"] if missing else []
        problems += [f"unexpected keys: {', '.join(unexpected)}"] if unexpected else []
    if problems:
        raise RuntimeError(
            f"the state_dict does not fit {type(model).__name__}:\n  " + "\n  ".join(problems)
        )
