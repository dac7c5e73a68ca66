"""The weights of the unpruned network, which pruned units are compared with."""

from __future__ import annotations

import copy
import functools
import json
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from torchalignprune.checkpoints import find_checkpoint_weights
from torchalignprune.dtensors import converted, is_dtensor
from torchalignprune.parameters import DTYPES, Parameters, PrunableParameters, pairs_of
from torchalignprune.pruned_files import open_weights
from torchalignprune.targets import targets_of
from torchalignprune.weight_files import StoredTensors, WeightFiles, find_weights, write_tensors

__all__ = ["Reference"]

_FORMAT, _VERSION = "torchalignprune.reference", "1"


class Reference(Mapping[tuple[nn.Module, str], Tensor]):
    """The weights of the unpruned network, by ``(module, name)``.

    Pass it wherever a reference is expected: ``AlignedMagnitude(reference=...)``,
    :func:`torchalignprune.alignment_report`, the regularizers. Make it before pruning with
    :meth:`capture`, or from the files of the unpruned model with :meth:`from_checkpoint`. It keeps
    the modules of its parameters alive, but nothing else of the model. All places of a tied
    parameter share one tensor.

    A reference does not change: do not write to its tensors. It may be on another device than the
    model; its tensors are moved one at a time, when they are needed.

    ``copy.deepcopy`` of a model that holds its reference, for example in a regularizer, makes a
    reference for the copied modules that shares the tensors. A reference cannot be pickled:
    :meth:`save` and :meth:`load` match tensors and parameters by name instead.

    Example:
        >>> import torch, torchalignprune as tap
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
        >>> params = tap.prunable_parameters(model)
        >>> reference = tap.Reference.capture(params, dtype=torch.bfloat16)
        >>> reference
        Reference(2 parameters, 24 entries, bfloat16, cpu)
        >>> model[0].weight.data.mul_(2).shape  # training goes on
        torch.Size([4, 4])
        >>> tap.global_unstructured(params, tap.AlignedMagnitude, reference=reference, amount=0.5)
        >>> reference[model[0], "weight"].shape
        torch.Size([4, 4])
    """

    _tensors: dict[tuple[nn.Module, str], Tensor]
    _names: dict[tuple[nn.Module, str], str] | None  # dotted; None if they are unknown

    def __init__(self) -> None:
        raise TypeError("use Reference.capture, Reference.from_checkpoint or Reference.load")

    @classmethod
    def _of(
        cls,
        tensors: dict[tuple[nn.Module, str], Tensor],
        names: dict[tuple[nn.Module, str], str] | None,
    ) -> Reference:
        made = cls.__new__(cls)
        made._tensors, made._names = tensors, names
        return made

    @classmethod
    def capture(
        cls,
        params: Parameters,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Reference:
        """A copy of the current weights. Masks are not applied to weights that are pruned already.

        Each rank copies its own part of a sharded parameter.

        Args:
            params: ``(module, name)`` pairs. Those of :func:`torchalignprune.prunable_parameters`
                have names, which :meth:`save` needs.
            dtype: float32, float64, float16 or bfloat16. Default: the dtype of each weight.
            device: where to keep the copy. Default: the device of each weight.

        Returns:
            A reference that shares no memory with the model.

        Raises:
            TypeError: ``params`` are not pairs of a module and a name, or not floating-point
                parameters; or ``dtype`` is another one.
            ValueError: there are no pairs, or weights are on the meta device and have no values.
        """
        _check_dtype(dtype)
        pairs = pairs_of(params)
        targets = targets_of(pairs)
        for target in targets:
            if target.weight.is_meta:
                raise ValueError(
                    f"{target.name} should have values, got a tensor on the meta device"
                )
        tensors: dict[tuple[nn.Module, str], Tensor] = {}
        for target in targets:
            copied = converted(target.weight, device, dtype, copy=True)
            tensors |= dict.fromkeys(target.places, copied)
        names = _names(pairs) if isinstance(pairs, PrunableParameters) else None
        return cls._of({(module, name): tensors[module, name] for module, name in pairs}, names)

    @classmethod
    def from_checkpoint(cls, path: str | os.PathLike[str], params: PrunableParameters) -> Reference:
        """The weights of the parameters in a safetensors checkpoint, without a copy.

        The tensors are views of the memory-mapped files. They are read when they are used, so the
        checkpoint may be larger than the memory. Do not write to the files meanwhile; replacing
        them by others is safe. ``.to(dtype=...)`` makes a copy in memory.

        Names are matched as they are, or with one prefix removed, added or replaced in all of
        them: a base model's checkpoint fits a task model, a task model's fits its base model, and
        either fits a wrapper. Names that transformers changes when it loads a checkpoint are
        changed in the same way. The checkpoint may be of a pruned model, with ``name_orig`` and
        ``name_mask``, and may hold other tensors too.

        Args:
            path: a folder with ``model.safetensors`` or ``model.safetensors.index.json``, a
                safetensors file, or an index.
            params: from :func:`torchalignprune.prunable_parameters`; tensors are found by their
                names. For other pairs or other names, pass
                ``PrunableParameters(pairs, names, left_out={})``.

        Returns:
            A reference in the dtypes of the checkpoint, on the CPU.

        Raises:
            TypeError: ``params`` are pairs without names.
            ValueError: there is no such checkpoint; parameters are missing in it or have another
                shape there (all are listed); or more than one prefix would fit.
            ImportError: safetensors is not installed.
        """
        return cls._from_files(open_weights(path), params, find_checkpoint_weights)

    @classmethod
    def load(cls, path: str | os.PathLike[str], params: PrunableParameters) -> Reference:
        """A reference that :meth:`save` wrote, memory-mapped as by :meth:`from_checkpoint`.

        Args:
            path: the file.
            params: parameters with names, as for :meth:`from_checkpoint`: all or some of those
                that were saved, of the same model or of another with the same architecture.

        Raises:
            TypeError: ``params`` are pairs without names.
            ValueError: :meth:`save` did not write the file, or it does not fit; see
                :meth:`from_checkpoint`.
            ImportError: safetensors is not installed.
        """
        files = WeightFiles(path)
        if files.metadata.get("format") != _FORMAT or "names" not in files.metadata:
            raise ValueError(
                f"{path} should be a file that Reference.save wrote; Reference.from_checkpoint "
                "reads checkpoints"
            )
        if files.metadata.get("version") != _VERSION:
            raise ValueError(
                f"{path} should have format version {_VERSION}, got "
                f"{files.metadata.get('version')}: it needs another version of torchalignprune"
            )
        known = json.loads(files.metadata["names"])
        return cls._from_files(files, params, functools.partial(find_weights, stored=known))

    @classmethod
    def _from_files(
        cls,
        files: StoredTensors,
        params: PrunableParameters,
        find: Callable[..., list[str]],
    ) -> Reference:
        if not isinstance(params, PrunableParameters):
            raise TypeError(
                "params should come from prunable_parameters(model) or be a "
                "PrunableParameters(pairs, names, left_out={}), because the tensors of a file are "
                f"found by name, got {type(params).__name__}"
            )
        names = _names(params)
        targets = targets_of(params)
        keys = find(
            files,
            [[names[place] for place in target.places] for target in targets],
            [tuple(target.weight.shape) for target in targets],
        )
        tensors: dict[tuple[nn.Module, str], Tensor] = {}
        for target, key in zip(targets, keys, strict=True):
            tensors |= dict.fromkeys(target.places, files[key])
        return cls._of({pair: tensors[pair] for pair in names}, names)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the tensors and the names of their parameters into one safetensors file.

        The file appears under its name only once it is complete. A tied parameter is stored once.

        Args:
            path: the file; an existing one is replaced.

        Raises:
            TypeError: the reference was captured from plain pairs, which have no names; or its
                parameters are sharded.
            OSError: the file cannot be written.
            ImportError: safetensors is not installed.
        """
        if self._names is None:
            raise TypeError(
                "Reference.save needs the names of the parameters, which plain pairs do not have: "
                "capture the reference from prunable_parameters(model)"
            )
        if any(map(is_dtensor, self._tensors.values())):
            raise TypeError(
                "Reference.save writes whole tensors, but those of this reference are sharded: "
                "Reference.from_checkpoint gives each rank its part of the unpruned model's "
                "checkpoint instead"
            )
        first: dict[int, str] = {}
        keys, tensors = {}, {}
        for pair, tensor in self._tensors.items():
            key = first.setdefault(id(tensor), self._names[pair])
            keys[self._names[pair]] = key
            tensors[key] = tensor
        metadata = {"format": _FORMAT, "version": _VERSION, "names": json.dumps(keys)}
        write_tensors(path, tensors, metadata)

    def to(
        self,
        device: torch.device | str | torch.dtype | None = None,
        dtype: torch.dtype | None = None,
    ) -> Reference:
        """The same reference on another device or in another dtype.

        Args:
            device: default: the device of each tensor. A dtype may be given in its place.
            dtype: float32, float64, float16 or bfloat16. Default: the dtype of each tensor.

        Returns:
            A new reference. It shares the tensors that already have that device and dtype.

        Raises:
            TypeError: ``dtype`` is another one.
        """
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        _check_dtype(dtype)
        moved = {id(tensor): tensor for tensor in self._tensors.values()}
        moved = {key: converted(tensor, device, dtype) for key, tensor in moved.items()}
        return self._of(
            {pair: moved[id(tensor)] for pair, tensor in self._tensors.items()}, self._names
        )

    def __getitem__(self, pair: tuple[nn.Module, str]) -> Tensor:
        try:
            return self._tensors[pair]
        except (KeyError, TypeError):
            known = isinstance(pair, tuple) and len(pair) == 2
            what = f"{type(pair[0]).__name__}, {pair[1]!r}" if known else repr(pair)
            raise KeyError(f"the reference has no entry for ({what})") from None

    def __iter__(self) -> Iterator[tuple[nn.Module, str]]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    # Mapping.__eq__ would compare tensors, and would leave the class without a hash.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __repr__(self) -> str:
        tensors = {id(tensor): tensor for tensor in self._tensors.values()}.values()
        entries = sum(tensor.numel() for tensor in tensors)
        dtypes = dict.fromkeys(str(tensor.dtype).removeprefix("torch.") for tensor in tensors)
        devices = dict.fromkeys(str(tensor.device) for tensor in tensors)
        return (
            f"Reference({len(self)} parameters, {entries:,} entries, {'/'.join(dtypes)}, "
            f"{'/'.join(devices)})"
        )

    def __copy__(self) -> Reference:
        return self._of(self._tensors, self._names)

    def __deepcopy__(self, memo: dict[int, Any]) -> Reference:
        copies = {pair: (copy.deepcopy(pair[0], memo), pair[1]) for pair in self._tensors}
        names = self._names
        return self._of(
            {copies[pair]: tensor for pair, tensor in self._tensors.items()},
            None if names is None else {copies[pair]: name for pair, name in names.items()},
        )

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Reference cannot be pickled: use Reference.save and Reference.load")


def _names(params: PrunableParameters) -> dict[tuple[nn.Module, str], str]:
    return dict(zip(params, params.names, strict=True))


def _check_dtype(dtype: torch.dtype | None) -> None:
    if dtype is not None and dtype not in DTYPES:
        expected = ", ".join(str(known).removeprefix("torch.") for known in DTYPES)
        raise TypeError(f"dtype should be one of {expected}, got {dtype}")
