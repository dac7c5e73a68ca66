"""Saving whole pruned models: small as bitmasks, or dense for ``from_pretrained``."""

from __future__ import annotations

import copy
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import prune

from torchalignprune.checkpoints import (
    Checkpoint,
    architecture,
    names_in_model,
    new_folder,
    quiet_transformers,
    same_bits,
    save_pretrained,
)
from torchalignprune.dtensors import is_dtensor
from torchalignprune.hooks import put_masks
from torchalignprune.parameters import bool_mask, check_mask, mask_of, stored
from torchalignprune.pruned_files import (
    PrunedFiles,
    dense_contents,
    own_files,
    parse_size,
    write_bitmask,
    write_dense,
    write_index,
)
from torchalignprune.weight_files import DTYPE_NAMES

__all__ = ["load_pruned", "save_pruned", "write_pruned"]

Format = Literal["dense", "bitmask"]

_LISTED = 10  # how many misfits an error names
_MADE = (
    "should be a parameter or buffer, got a tensor that only state_dict() makes (as by "
    "get_extra_state), which load_pruned cannot restore"
)


def save_pruned(
    model: nn.Module,
    folder: str | os.PathLike[str],
    format: Format = "dense",
    *,
    max_shard_size: int | str = "5GB",
) -> None:
    """Writes a pruned model to a folder, which appears only once it is complete.

    ``"bitmask"`` stores one bit for each weight of a pruned tensor and the values that remain; any
    other tensor is stored as it is. At 50% sparsity this takes 0.53 of the float32 weights.
    :func:`load_pruned` restores everything bit for bit. A model that is still being pruned keeps
    its masks. The weights under them are stored too, unless they are zeros, as
    :class:`torchalignprune.Pruner` leaves them. In a model whose pruning was made permanent, the
    zeros of a tensor are left out if that saves space; a tensor with -0.0, which
    ``torch.nn.utils.prune.remove`` leaves behind after torch's own hooks, takes one more bit for
    each zero.

    ``"dense"`` writes zeros instead of masks; the model itself keeps its masks. For a transformers
    model the folder is an ordinary one for ``from_pretrained``, for any other model it has plain
    names in ``model.safetensors``.

    Tied weights are stored once. ``pruned.index.json`` lets :func:`load_pruned` detect altered
    files. A transformers model is written with its config. Nothing is pickled.

    A folder that ``save_pruned`` wrote earlier is replaced; files that others put there, such as a
    tokenizer, are kept. On Linux the new folder replaces the old one in one atomic step: a process
    that is killed, even by SIGKILL, leaves one of them whole, and maybe a hidden folder
    ``.NAME.*.partial`` beside it. On other systems the old folder is ``.NAME.*.former`` for a
    moment. Only one process may write at a time.

    Args:
        model: any module, on any device; wrappers of ``torch.compile`` and
            ``DistributedDataParallel`` are removed.
        folder: the folder to write; missing parents are created.
        format: ``"dense"`` or ``"bitmask"``.
        max_shard_size: how large a file may become, in bytes or as in ``"5GB"``; larger models are
            written in several files. Writing needs as much memory as one file.

    Raises:
        FileExistsError: ``folder`` is a file, or holds something other than an earlier model.
        ValueError: the format or size is invalid; a mask has other numbers than 0 and 1; weights
            are on the meta device; the model is quantized or has adapters; or, for ``"dense"``,
            tied weights have different masks or a transformers model does not declare its ties.
        TypeError: the model's state has an entry that is not a tensor, is sharded or sparse, or is
            neither a parameter nor a buffer (``get_extra_state``).
        ImportError: safetensors is not installed.

    Example:
        >>> import tempfile, torch, torchalignprune as tap
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 8))
        >>> params = tap.prunable_parameters(model)
        >>> tap.global_unstructured(params, tap.AlignedMagnitude, amount=0.8)
        >>> fresh = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 8))
        >>> with tempfile.TemporaryDirectory() as parent:
        ...     tap.save_pruned(model, f"{parent}/pruned", "bitmask")
        ...     fresh = tap.load_pruned(fresh, f"{parent}/pruned")
        >>> torch.equal(fresh[0].weight_mask, model[0].weight_mask)
        True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model should be an nn.Module, got {type(model).__name__}")
    if format not in get_args(Format):
        raise ValueError(f'format should be "dense" or "bitmask", got {format!r}')
    parse_size(max_shard_size)
    folder = Path(folder).resolve()
    _check_folder(folder)
    model = _unwrapped(model)
    with new_folder(folder, overwrite=True) as partial:
        write_pruned(model, partial, format, max_shard_size)
        if folder.exists():
            _carry_over(folder, partial)


def load_pruned(model_or_class: Any, folder: str | os.PathLike[str], *, verify: bool = True) -> Any:
    """Reads a model from a folder that :func:`save_pruned` wrote, in either format.

    A module is loaded in place: its parameters stay the same objects. Parameters that have masks in
    the folder get hooks and masks, all others lose theirs, and those that were tied are tied again.
    The module must have the same names, shapes and dtypes and must not be sharded. An error leaves
    it unchanged. A transformers class gives a new model from the config in the folder, in ``eval``
    mode like ``from_pretrained``, without network access.

    The files are memory-mapped, and tensors are unpacked one at a time.

    Args:
        model_or_class: a module of the same architecture, pruned or not, or a class such as
            ``transformers.BertModel`` or ``transformers.AutoModelForSequenceClassification``.
        folder: the folder that :func:`save_pruned` wrote.
        verify: compare SHA-256 digests, which detect any altered byte. This reads the files once
            more, at 0.5 to 2 GB/s. Without it, the index, the sizes, shapes and dtypes and the
            number of bits are still checked.

    Returns:
        The model.

    Raises:
        ValueError: ``save_pruned`` did not write the folder, or a newer version did; a file is
            missing, cut off or altered; or the files do not fit the model. The message lists the
            differences.
        TypeError: ``model_or_class`` is neither a module nor a class with ``from_pretrained``.
        ImportError: safetensors is not installed, or transformers for a class.
    """
    files = PrunedFiles(folder, verify=verify)
    if isinstance(model_or_class, nn.Module):
        _load(_unwrapped(model_or_class), files)
        return model_or_class
    if not isinstance(model_or_class, type) or not hasattr(model_or_class, "from_pretrained"):
        what = getattr(model_or_class, "__name__", type(model_or_class).__name__)
        raise TypeError(
            "model_or_class should be a module or a transformers class with from_pretrained, "
            f"got {what}"
        )
    if not (files.path / "config.json").is_file():
        raise ValueError(
            f"{folder} should have a config.json for {model_or_class.__name__}, got none: a folder "
            "that was not saved from a transformers model can only be loaded into a module"
        )
    files.check_other_files()
    return (_ordinary if files.layout == "dense" else _built)(model_or_class, files)


def write_pruned(
    model: Any, folder: Path, format: Format, max_shard_size: int | str = "5GB"
) -> None:
    """Writes the files of :func:`save_pruned` into a folder, which exists and is empty."""
    max_shard_size = parse_size(max_shard_size)
    of_transformers = _is_transformers(model)
    if of_transformers:
        _check_transformers(model)
    state, name = _State(model), type(model).__name__
    if format == "bitmask":
        contents = write_bitmask(folder, state.tensors, state.masks, max_shard_size)
        if of_transformers:
            _save_config(model, folder)
        write_index(folder, format, name, contents, state.pruned, state.tied)
        return
    tensors, tied = state.baked()
    if of_transformers:
        # transformers decides itself which names of tied weights to drop.
        every = tensors | {name: tensors[first] for name, first in tied.items()}
        try:
            with quiet_transformers():
                save_pretrained(model, folder, every, max_shard_size=max_shard_size)
        except RuntimeError as error:
            if not tied or "shared tensors" not in str(error):
                raise
            raise ValueError(
                f"{name} has tied weights that it does not declare to transformers, which cannot "
                f'save them ({", ".join(sorted(tied)[:_LISTED])}): use format="bitmask"'
            ) from error
    else:
        write_dense(folder, tensors, max_shard_size)
    contents = dense_contents(folder)
    write_index(folder, format, name, contents, (), _ties_to(contents.tensors, tied))


def verify_pruned(model: nn.Module, folder: Path) -> None:
    """Reads a folder in the format ``"bitmask"`` and compares every tensor with the model's.

    Raises:
        RuntimeError: a tensor differs; the error names it.
    """
    files = PrunedFiles(folder)
    for name, tensor in model.state_dict().items():
        again = files[name] if name in files else tensor.new_empty(0)
        if not same_bits(again, tensor):
            raise RuntimeError(f"{name} differs from the model when it is loaded from {folder}")


def load_checkpoint(folder: Path) -> Checkpoint:
    """:func:`torchalignprune.checkpoints.load_checkpoint` for folders in the format ``"bitmask"``.

    Masks are made permanent.

    Raises:
        ValueError: the folder is damaged, or not from a transformers model.
        ImportError: transformers or safetensors is not installed.
    """
    model = load_pruned(architecture(folder), folder)
    for module, name in [_place(model, name) for name in _pruned(model)]:
        prune.remove(module, name)
    return Checkpoint(folder, model, frozenset(), frozenset(), frozenset())


class _State:
    """The state of a model as it is stored.

    Attributes:
        tensors: by their names in ``model.state_dict()``; tied ones only by their first name, and
            masks as bool.
        tied: the first name of tied tensors, by each of the other names.
        pruned: the plain names of the parameters that have a mask.
        masks: the name of the mask of each parameter that has one; both as in ``tensors``.
    """

    def __init__(self, model: nn.Module) -> None:
        self.pruned = list(_pruned(model))
        masks = {f"{name}_mask" for name in self.pruned}
        self.tensors: dict[str, Tensor] = {}
        self.tied: dict[str, str] = {}
        first: dict[int, str] = {}
        state = model.state_dict(keep_vars=True)
        own = _own_tensors(model)
        for name, tensor in state.items():
            _check_tensor(name, tensor)
            if id(tensor) not in own:
                raise TypeError(f"{name} {_MADE}")
            known = first.setdefault(id(tensor), name)
            if known != name:
                self.tied[name] = known
            else:
                if name in masks:
                    check_mask(tensor, name.removesuffix("_mask"))
                self.tensors[name] = bool_mask(tensor) if name in masks else tensor.detach()
        self.masks: dict[str, str] = {}
        for name in self.pruned:
            original, mask = (self.first(f"{name}_{end}") for end in ("orig", "mask"))
            known = self.masks.setdefault(original, mask)
            # Moving a model to another device turns a shared mask into several copies.
            if known != mask and torch.equal(self.tensors[known], self.tensors[mask]):
                del self.tensors[mask]
                self.tied = {n: known if f == mask else f for n, f in self.tied.items()}
                self.tied[mask] = known

    def first(self, name: str) -> str:
        return self.tied.get(name, name)

    def baked(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The tensors and ties that the model would have if its pruning were made permanent.

        Raises:
            ValueError: tied weights have different masks.
        """
        plain = {f"{name}_orig": name for name in self.pruned}
        for name, first in self.tied.items():
            pair = [
                self.first(f"{plain[key]}_mask") if key in plain else None for key in (name, first)
            ]
            if pair[0] != pair[1]:
                one, other = (plain.get(key, key) for key in (first, name))
                raise ValueError(
                    f"{one} and {other} are tied but have different masks, so one dense tensor "
                    'cannot represent both: prune both, or use format="bitmask"'
                )
        masks = {f"{name}_mask" for name in self.pruned}
        tensors = {}
        for name, tensor in self.tensors.items():
            if name in self.masks:
                tensors[plain[name]] = tensor.masked_fill(~self.tensors[self.masks[name]], 0)
            elif name not in masks:
                tensors[name] = tensor
        tied = {
            plain.get(name, name): plain.get(first, first)
            for name, first in self.tied.items()
            if name not in masks
        }
        return tensors, tied


def _ties_to(there: Iterable[str], tied: Mapping[str, str]) -> dict[str, str]:
    """The ties by the names that were stored, which need not be the first ones."""
    groups: dict[str, list[str]] = {}
    for name, first in tied.items():
        groups.setdefault(first, [first]).append(name)
    found: dict[str, str] = {}
    for group in groups.values():
        kept = next((name for name in group if name in there), None)
        found |= {name: kept for name in group if kept is not None and name not in there}
    return found


def _load(model: nn.Module, files: PrunedFiles) -> None:
    """Loads files into a model in place. All errors are raised before the model changes."""
    state = _plain_state(model)
    keys = _fit(model, state, files)
    files.check()
    first: dict[str, str] = {}
    ties = {name: first.setdefault(files.tied.get(key, key), name) for name, key in keys.items()}
    masks: dict[str, Tensor] = {}
    entries = []
    for name in files.pruned:
        key = files.tied.get(f"{name}_mask", f"{name}_mask")
        if key not in masks:
            masks[key] = files[key].to(state[name].device)
        entries.append((*_place(model, name), masks[key]))
    dense_again = [_place(model, name) for name in _pruned(model) if name not in files.pruned]

    put_masks(entries)
    for module, name in dict.fromkeys(dense_again):
        prune.remove(module, name)
    for name, other in ties.items():
        if state[name] is not state[other] and isinstance(state[name], nn.Parameter):
            _tie(model, name, other)
            state[name] = state[other]
    with torch.no_grad():
        for name, other in ties.items():
            # A buffer that is shared in the files may be several in a model that was moved or cast.
            if name == other or state[name] is not state[other]:
                state[name].copy_(files[keys[name]])
    for entry in entries:  # once more, since the masked weights are still those from before
        put_masks([entry])


def _built(kind: Any, files: PrunedFiles) -> Any:
    """A new model of a transformers class, from the config in a ``"bitmask"`` folder."""
    from transformers import AutoConfig, GenerationConfig

    config = AutoConfig.from_pretrained(files.path, local_files_only=True, trust_remote_code=False)
    wanted = getattr(kind, "config_class", None)
    if wanted is not None and not isinstance(config, wanted):
        raise ValueError(
            f"{kind.__name__} takes a {wanted.__name__}, but {files.path} has a "
            f"{type(config).__name__}: it was saved from a {files.model}"
        )
    if hasattr(kind, "from_config"):  # one of the Auto classes
        with torch.device("meta"):
            kind = type(kind.from_config(config))
    names = {_plain(key, files): key for key in files if not _is_mask(key, files)}
    # Uninitialized memory, which transformers puts into the model without a copy.
    blank = {
        name: torch.empty(files.shape(key), dtype=files.dtype(key)) for name, key in names.items()
    }
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else None
    with quiet_transformers():
        model = kind.from_pretrained(
            None,
            config=config,
            state_dict=dict(blank),
            dtype=dtype or "auto",
            ignore_mismatched_sizes=True,
        )
    if model.can_generate() and (files.path / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(files.path)
    for name, tensor in _plain_state(model).items():
        if name in blank and tensor.dtype != blank[name].dtype:
            tensor.data = blank[name]
    _load(model, files)
    return model


def _ordinary(kind: Any, files: PrunedFiles) -> Any:
    """A new model of a transformers class, from an ordinary (``"dense"``) folder."""
    files.check()
    with quiet_transformers():
        model, found = kind.from_pretrained(
            files.path, dtype="auto", local_files_only=True, output_loading_info=True
        )
    problems = [
        f"{what} {', '.join(sorted(map(str, found[key]))[:_LISTED])}"
        for key, what in (("missing_keys", "missing:"), ("unexpected_keys", "unexpected:"))
        if found[key]
    ]
    if problems:
        raise ValueError(_does_not_fit(model, files, problems))
    # dtype="auto" gives all tensors one dtype, but files may have several.
    for name, tensor in _plain_state(model).items():
        if name in files and files.dtype(name) != tensor.dtype:
            tensor.data = files[name].clone()
    return model


def _fit(model: nn.Module, state: Mapping[str, Tensor], files: PrunedFiles) -> dict[str, str]:
    """The name in the files of each tensor of the model.

    Raises:
        ValueError: tensors are missing in the files or the model, or differ in shape or dtype.
    """
    keys = {_plain(key, files): key for key in files if not _is_mask(key, files)}
    ignored: set[str] = set()
    if files.layout == "dense" and _is_transformers(model):
        ignored = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
        if not set(state) - ignored <= set(keys):
            keys = names_in_model(files.path, keys)
    problems = []
    own = _own_tensors(model)
    loaded = {id(tensor) for name, tensor in state.items() if name in keys}
    for name, tensor in state.items():
        if name not in keys:
            if name not in ignored and id(tensor) not in loaded:
                problems.append(f"{name}: missing")
            continue
        shape, dtype = files.shape(keys[name]), files.dtype(keys[name])
        if not isinstance(tensor, Tensor):
            problems.append(f"{name}: should be a tensor in the model, got {type(tensor).__name__}")
        elif id(tensor) not in own:
            problems.append(f"{name}: {_MADE}")
        elif is_lazy(tensor):
            problems.append(f"{name}: has no shape in the model yet: run a forward first")
        elif is_dtensor(tensor):
            problems.append(f"{name}: is a DTensor: load into the model before it is sharded")
        elif tensor.layout != torch.strided:
            problems.append(f"{name}: should be strided in the model, got {tensor.layout}")
        elif _is_expanded(tensor):
            problems.append(f"{name}: is expanded in the model, so its entries share memory")
        elif tuple(tensor.shape) != shape:
            problems.append(f"{name}: should have shape {tuple(tensor.shape)}, got {shape}")
        elif tensor.dtype != dtype:
            problems.append(f"{name}: should be {tensor.dtype} as in the model, got {dtype}")
        elif tensor.is_meta:
            problems.append(f"{name}: has no memory in the model, which is on the meta device")
        elif tensor.is_inference() and not torch.is_inference_mode_enabled():
            problems.append(f"{name}: was made in inference mode and can only be written to in it")
    problems += [f"{name}: not in the model" for name in keys if name not in state]
    problems += [
        f"{name}: pruned in the files, but not a parameter of the model"
        for name in files.pruned
        if name in state and not isinstance(state[name], nn.Parameter)
    ]
    if not problems:
        stored_as: dict[int, str] = {}
        for name, key in keys.items():
            other = stored_as.setdefault(id(state[name]), name)
            if files.tied.get(keys[other], keys[other]) != files.tied.get(key, key):
                problems.append(f"{name}: tied to {other} in the model, but not in the files")
    if problems:
        raise ValueError(_does_not_fit(model, files, problems))
    return keys


def _does_not_fit(model: nn.Module, files: PrunedFiles, problems: Sequence[str]) -> str:
    listed = list(problems[:_LISTED])
    if len(problems) > _LISTED:
        listed.append(f"and {len(problems) - _LISTED} more")
    if files.layout == "dense" and files.model == type(model).__name__ and _is_transformers(model):
        listed.append(
            "(transformers stores some models in another form: pass load_pruned the class, "
            f"{files.model}, for a new model)"
        )
    return "\n  ".join(
        [f"{files.path}, saved from {files.model}, does not fit {type(model).__name__}:", *listed]
    )


def _is_mask(key: str, files: PrunedFiles) -> bool:
    return key.endswith("_mask") and key.removesuffix("_mask") in files.pruned


def _plain(key: str, files: PrunedFiles) -> str:
    name = key.removesuffix("_orig")
    return name if name in files.pruned else key


def _plain_state(model: nn.Module) -> dict[str, Tensor]:
    """The model's state without masks, by the names of the unpruned model."""
    state: dict[str, Tensor] = dict(model.state_dict(keep_vars=True))
    for name in _pruned(model):
        state[name] = state.pop(f"{name}_orig")
        del state[f"{name}_mask"]
    return state


def _is_expanded(tensor: Tensor) -> bool:
    sides = zip(tensor.shape, tensor.stride(), strict=True)
    return tensor.numel() > 0 and any(size > 1 and step == 0 for size, step in sides)


def _own_tensors(model: nn.Module) -> set[int]:
    return {id(tensor) for tensor in (*model.parameters(), *model.buffers())}


def _pruned(model: nn.Module) -> Iterator[str]:
    """The dotted names of the parameters that have a hook and a mask."""
    for path, module in model.named_modules(remove_duplicate=False):
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, prune.BasePruningMethod) and hook._tensor_name is not None:
                yield f"{path}.{hook._tensor_name}".lstrip(".")


def _place(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, own = name.rpartition(".")
    return model.get_submodule(path), own


def _tie(model: nn.Module, name: str, other: str) -> None:
    """Replaces the parameter ``name`` by the parameter ``other``."""
    (module, own), pair = _place(model, name), _place(model, other)
    own = own if mask_of(module, own) is None else f"{own}_orig"
    shared = stored(*pair)
    assert isinstance(shared, nn.Parameter)
    module._parameters[own] = shared


def _check_tensor(name: str, tensor: Any) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(
            f"{name} in the model's state should be a tensor, got {type(tensor).__name__}, which "
            "safetensors cannot store"
        )
    if is_lazy(tensor):
        raise ValueError(f"{name} has no shape yet: run a forward first")
    if tensor.is_meta:
        raise ValueError(f"{name} should have values, got a tensor on the meta device")
    if is_dtensor(tensor):
        raise TypeError(
            f"{name} should not be sharded, got a DTensor: load the full state of "
            "torch.distributed.checkpoint.state_dict into a model that is not sharded, and save "
            "that"
        )
    if tensor.layout != torch.strided or tensor.dtype not in DTYPE_NAMES:
        kind = f"{tensor.layout} {tensor.dtype}".replace("torch.", "")
        raise TypeError(f"{name} is a {kind} tensor, which safetensors cannot store")


def _unwrapped(model: nn.Module) -> nn.Module:
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif type(model).__name__ == "OptimizedModule":  # of torch.compile
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def _is_transformers(model: nn.Module) -> bool:
    """Whether the model is a ``PreTrainedModel``, without importing transformers."""
    loaded = sys.modules.get("transformers.modeling_utils")
    return loaded is not None and isinstance(model, loaded.PreTrainedModel)


def _check_transformers(model: Any) -> None:
    if getattr(model, "hf_quantizer", None) is not None:
        raise ValueError(f"{type(model).__name__} is quantized: only float weights can be saved")
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(
            f"{type(model).__name__} has adapters, which are not saved with its own weights: merge "
            "or remove them first"
        )


def _save_config(model: Any, folder: Path) -> None:
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = model.dtype
    config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)


def _check_folder(folder: Path) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise FileExistsError(f"{folder} exists and is not a folder")
    if any(folder.iterdir()):
        try:
            own_files(folder)
        except ValueError as error:
            raise FileExistsError(
                f"{folder} should be a new folder or hold a model that save_pruned wrote, and was "
                f"not replaced: {error}"
            ) from error


def _carry_over(former: Path, folder: Path) -> None:
    """Carries files of others over into the new folder, by hard links where there are any."""
    own = own_files(former) if any(former.iterdir()) else set()

    def carry(source: str, target: str) -> None:
        if os.path.lexists(target):
            return
        try:
            os.link(source, target, follow_symlinks=False)
        except OSError:
            shutil.copy2(source, target, follow_symlinks=False)

    shutil.copytree(
        former,
        folder,
        symlinks=True,
        ignore=lambda parent, _: own if Path(parent) == former else set(),
        copy_function=carry,
        dirs_exist_ok=True,
    )
