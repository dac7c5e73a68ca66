"""Keeps FSDP2 (``torch.distributed.fsdp.fully_shard``) up to date about pruned parameters.

FSDP2 switches a module's parameter between the sharded DTensor that the optimizer has and the
gathered plain tensor that forward and backward use. For that it keeps a list of modules and names
for each parameter. A pruned parameter needs two entries there: ``name_orig`` among the module's
parameters, and ``name``, a plain attribute.

That list is private to torch, so its attributes are checked before anything is changed.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from torchalignprune.dtensors import is_dtensor

__all__ = ["Managed", "groups_of", "managed", "parameters_of", "sharded"]

_STATES = "torch.distributed.fsdp._fully_shard._fsdp_state"


class Managed:
    """A parameter that FSDP2 shards, and the group that it is gathered with."""

    def __init__(self, param: Any, group: Any) -> None:
        # Weak, because both hold the modules, which are the weak keys of _KNOWN.
        self._param = weakref.ref(param)
        self._group = weakref.ref(group)

    @property
    def param(self) -> Any:
        return self._param()

    @property
    def group(self) -> Any:
        return self._group()

    @property
    def sharded(self) -> nn.Parameter:
        """The parameter that the optimizer has, even while the module shows the gathered one."""
        found: nn.Parameter = self.param.sharded_param
        return found

    def reshard(self, name: str) -> None:
        """Frees the gathered copies, so that changes of the sharded parameters take effect.

        Raises:
            RuntimeError: a forward or backward is running.
        """
        if self.group._training_state.name != "IDLE":
            raise RuntimeError(
                f"{name} is gathered for a forward or backward that is still running: prune "
                "between the steps, after optimizer.step()"
            )
        self.group._to_sharded()

    def wait(self) -> None:
        """Makes the current stream wait for the gradients that FSDP2 is reducing.

        FSDP2 adds to the sharded gradients in its own streams, and makes the current one wait only
        at the end of the backward.
        """
        for name in ("reduce_scatter_stream", "all_reduce_stream"):
            stream = getattr(self.group.comm_ctx, name, None)
            if stream is not None:  # None before the first forward
                torch.cuda.current_stream(stream.device).wait_stream(stream)

    def rename(self, module: nn.Module, old: str, new: str) -> None:
        """Renames the parameter in one of its modules."""
        info = self.param._module_info
        if info.module is module and info.param_name == old:
            info.param_name = new
        for i, other in enumerate(info.shared_modules):
            if other is module and info.shared_param_names[i] == old:
                info.shared_param_names[i] = new
        if self.param._param_fqn is not None:
            path, dot, last = self.param._param_fqn.rpartition(".")
            self.param._param_fqn = path + dot + (new if last == old else last)
        _KNOWN.pop(module, None)

    def show(self, module: nn.Module, name: str) -> None:
        """Also makes the parameter a plain attribute of the module, which FSDP2 keeps current."""
        info = self.param._module_info
        self.hide(module, name)
        info.shared_modules.append(_Attributes(module))
        info.shared_param_names.append(name)
        vars(module)[name] = self.sharded

    def hide(self, module: nn.Module, name: str) -> None:
        """Undoes :meth:`show`."""
        info = self.param._module_info
        places = list(zip(info.shared_modules, info.shared_param_names, strict=True))
        kept = [
            (place, own)
            for place, own in places
            if not (isinstance(place, _Attributes) and place.belongs_to(module) and own == name)
        ]
        info.shared_modules[:] = [place for place, _ in kept]
        info.shared_param_names[:] = [own for _, own in kept]
        vars(module).pop(name, None)


class _Attributes:
    """Stands in for a module, so that FSDP2 sets a plain attribute instead of a parameter."""

    def __init__(self, module: nn.Module) -> None:
        object.__setattr__(self, "_module", weakref.ref(module))

    def belongs_to(self, module: nn.Module) -> bool:
        owner: nn.Module | None = vars(self)["_module"]()
        return owner is module

    def __setattr__(self, name: str, value: Any) -> None:
        module = vars(self)["_module"]()
        if module is not None:
            vars(module)[name] = value


_KNOWN: weakref.WeakKeyDictionary[nn.Module, dict[str, Managed]] = weakref.WeakKeyDictionary()


def managed(module: nn.Module, name: str) -> Managed | None:
    """FSDP2's records of a module's parameter, or None if FSDP2 does not shard it.

    Raises:
        RuntimeError: this version of torch keeps other records.
    """
    if _STATES not in sys.modules:
        return None
    known = _KNOWN.get(module, {}).get(name)
    if known is not None and known.param is not None:
        return known
    for group in _groups():
        for param in group.fsdp_params:
            _check(param, group)
            info = param._module_info
            entry = Managed(param, group)
            _KNOWN.setdefault(info.module, {})[info.param_name] = entry
            for other, own in zip(info.shared_modules, info.shared_param_names, strict=True):
                if isinstance(other, nn.Module):
                    _KNOWN.setdefault(other, {})[own] = entry
    return _KNOWN.get(module, {}).get(name)


def sharded(module: nn.Module, name: str, shown: Tensor) -> Tensor:
    """The sharded parameter if the module shows the gathered one; otherwise the one shown."""
    if torch.compiler.is_compiling() or _STATES not in sys.modules or is_dtensor(shown):
        return shown
    entry = managed(module, name)
    return shown if entry is None else entry.sharded


def groups_of(parameters: Iterable[Tensor]) -> list[Any]:
    """The FSDP2 groups of sharded parameters, each of which is gathered and reduced together."""
    wanted = {id(parameter) for parameter in parameters if is_dtensor(parameter)}
    if not wanted or _STATES not in sys.modules:
        return []
    return [
        group
        for group in _groups()
        if any(id(param.sharded_param) in wanted for param in group.fsdp_params)
    ]


def parameters_of(groups: Iterable[Any]) -> list[nn.Parameter]:
    """All sharded parameters of FSDP2 groups."""
    return [param.sharded_param for group in groups for param in group.fsdp_params]


def _groups() -> Iterator[Any]:
    from torch.distributed._composable_state import _module_state_mapping

    state_type = sys.modules[_STATES].FSDPState
    for reference in list(_module_state_mapping.values()):
        state = reference()
        if isinstance(state, state_type):
            if hasattr(state, "_fsdp_param_groups"):
                yield from state._fsdp_param_groups
            elif hasattr(state, "_fsdp_param_group"):  # torch 2.11 has one, or None
                yield from filter(None, [state._fsdp_param_group])
            else:
                raise _unknown("FSDPState._fsdp_param_groups")


def _check(param: Any, group: Any) -> None:
    """Checks that this version of torch has all private attributes that are used here."""
    for owner, names in (
        (group, ("fsdp_params", "_to_sharded", "_training_state", "reduce_grads", "comm_ctx")),
        (param, ("_module_info", "sharded_param", "_param_fqn", "_setattr_on_modules")),
        (
            param._module_info if hasattr(param, "_module_info") else param,
            ("module", "param_name", "shared_modules", "shared_param_names"),
        ),
    ):
        for name in names:
            if not hasattr(owner, name):
                raise _unknown(f"{type(owner).__name__}.{name}")


def _unknown(what: str) -> RuntimeError:
    return RuntimeError(
        f"the FSDP2 of torch {torch.__version__} has no {what}, which pruning under fully_shard "
        "needs: install a torch release that this torchalignprune supports"
    )
