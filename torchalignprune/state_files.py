"""Files for the state of a training run: nested dicts of tensors, numbers and strings, no pickle.

>>> import tempfile, torch
>>> path = tempfile.mkdtemp() + "/state.safetensors"
>>> save_state(path, {"step": 3, "sums": {"0.weight": torch.ones(2)}})
>>> load_state(path)
{'step': 3, 'sums': {'0.weight': tensor([1., 1.])}}
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchalignprune.weight_files import WeightFiles, write_tensors

__all__ = ["load_state", "save_state"]

_STATE = "state"  # the key of the file's metadata that holds everything but the tensors, as JSON
_TENSOR = "__tensor__"


def save_state(path: str | os.PathLike[str], state: Mapping[str, Any]) -> None:
    """Writes a state, such as that of a :class:`torchalignprune.Pruner`, to a safetensors file.

    The file is written atomically and is on the disk when this returns.

    Args:
        path: the file to write; an existing one is replaced.
        state: dicts with str keys, and lists, of tensors, numbers, strings, bools and None.

    Raises:
        TypeError: the state has anything else; the error says where.
        OSError: the file cannot be written.
        ImportError: safetensors is not installed.
    """
    tensors: dict[str, Tensor] = {}
    tree = json.dumps(_take_apart(state, "state", tensors))
    write_tensors(path, tensors, {_STATE: tree})


def load_state(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads a file that :func:`save_state` wrote. The tensors are on the CPU.

    Raises:
        ValueError: the file does not exist, is damaged, or was not written by :func:`save_state`.
        ImportError: safetensors is not installed.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path} does not exist")
    files = WeightFiles(path)
    try:
        state = _put_together(json.loads(files.metadata[_STATE]), files)
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} should be a file that save_state wrote") from error
    if not isinstance(state, dict):
        raise ValueError(f"{path} should be a file that save_state wrote")
    return state


def _take_apart(value: Any, where: str, tensors: dict[str, Tensor]) -> Any:
    """The value with its tensors replaced by their names."""
    if isinstance(value, Tensor):
        # The copy also separates tensors that share memory.
        tensors[where] = value.detach().to("cpu", memory_format=torch.contiguous_format, copy=True)
        return {_TENSOR: where}
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str) or key == _TENSOR:
                raise TypeError(f"the keys of {where} should be str, got {key!r}")
        return {key: _take_apart(own, f"{where}.{key}", tensors) for key, own in value.items()}
    if isinstance(value, list | tuple):
        return [_take_apart(own, f"{where}[{i}]", tensors) for i, own in enumerate(value)]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(
        f"{where} should be a tensor, a number, a str, None, or a dict or list of those, got "
        f"{type(value).__name__}"
    )


def _put_together(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_put_together(own, tensors) for own in value]
    if not isinstance(value, dict):
        return value
    if _TENSOR in value:
        return tensors[value[_TENSOR]].clone()
    return {key: _put_together(own, tensors) for key, own in value.items()}
