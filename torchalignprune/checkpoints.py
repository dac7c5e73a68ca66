"""Transformers checkpoint folders: loading them, and writing them atomically."""

from __future__ import annotations

import ctypes
import functools
import json
import os
import re
import secrets
import shutil
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchalignprune.parameters import DTYPES, some
from torchalignprune.pruned_files import INDEX
from torchalignprune.weight_files import (
    StoredTensors,
    WeightFiles,
    find_weights,
    flush,
    plain_names,
)

__all__ = [
    "Checkpoint",
    "architecture",
    "check_other_files",
    "check_output",
    "copy_other_files",
    "empty_model",
    "find_checkpoint_weights",
    "load_checkpoint",
    "names_in_model",
    "new_folder",
    "quiet_transformers",
    "same_bits",
    "save_checkpoint",
    "save_pretrained",
    "verify_checkpoint",
]

_WEIGHT_SUFFIXES = {
    ".bin",
    ".ckpt",
    ".gguf",
    ".h5",
    ".msgpack",
    ".onnx",
    ".onnx_data",
    ".ot",
    ".pt",
    ".pth",
    ".safetensors",
    ".tflite",
}


@dataclass(frozen=True)
class Checkpoint:
    """A model that was loaded from a checkpoint folder.

    Attributes:
        folder: the folder.
        model: a ``transformers.PreTrainedModel``, in the dtype of the stored weights.
        missing: names of parameters that the folder lacks; they were newly initialized.
        unused: stored names of tensors that the model's class does not use.
        lost: names that transformers reported as unused, but that are not among the stored ones.
    """

    folder: Path
    model: Any
    missing: frozenset[str]
    unused: frozenset[str]
    lost: frozenset[str]


def load_checkpoint(folder: Path) -> Checkpoint:
    """Loads a checkpoint folder with safetensors weights, without network access.

    The class is the first of the config's ``architectures``, or else ``AutoModel``. The dtype is
    that of the stored weights, the widest if there are several.

    Args:
        folder: with ``config.json``, and ``model.safetensors`` or its shards and their index.

    Raises:
        ValueError: the folder is not such a checkpoint, or it is quantized.
        ImportError: transformers or safetensors is not installed.
    """
    kind = architecture(folder)
    stored = WeightFiles(folder)
    kinds = {kind for kind in map(stored.dtype, stored) if kind.is_floating_point}
    if not kinds or not kinds <= set(DTYPES):
        got = ", ".join(sorted(str(kind).removeprefix("torch.") for kind in kinds))
        raise ValueError(
            f"the weights of {folder} should be float32, float64, float16 or bfloat16, got "
            f"{got or 'no floating-point tensors'}"
        )
    dtype = functools.reduce(torch.promote_types, kinds)
    try:
        model, found = kind.from_pretrained(
            folder,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,  # otherwise transformers asks on standard output
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise _cannot_load(folder, error) from error
    if found["mismatched_keys"]:
        name, *shapes = min(found["mismatched_keys"])
        there, expected = (tuple(shape) for shape in shapes)
        raise ValueError(
            f"{name} in {folder} should have shape {expected} according to its config, got {there}"
        )
    unused, lost = _unused(model, stored.keys(), found["unexpected_keys"])
    return Checkpoint(folder, model, frozenset(found["missing_keys"]), unused, lost)


def empty_model(folder: Path) -> Any:
    """The model of a checkpoint folder on the meta device, without weights.

    Args:
        folder: with ``config.json``; the class is found as in :func:`load_checkpoint`.

    Raises:
        ValueError: the folder is not such a checkpoint, or it is quantized.
        ImportError: transformers or safetensors is not installed.
    """
    kind = architecture(folder)
    try:
        config = _transformers().AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        with torch.device("meta"):
            return kind.from_config(config) if hasattr(kind, "from_config") else kind(config)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise _cannot_load(folder, error) from error


def find_checkpoint_weights(
    files: StoredTensors, names: Sequence[Sequence[str]], shapes: Sequence[tuple[int, ...]]
) -> list[str]:
    """:func:`torchalignprune.weight_files.find_weights`, also for renamed parameters.

    The checkpoints of some architectures have older names than their models. transformers renames
    them when it loads a checkpoint, and back when it saves one.

    Raises:
        ValueError: as ``find_weights``.
    """
    known = plain_names(files)
    try:
        return find_weights(files, names, shapes, known)
    except ValueError:
        renamed = names_in_model(files.path, known)
        if renamed == known:
            raise
    return find_weights(files, names, shapes, renamed)


def save_checkpoint(checkpoint: Checkpoint, folder: Path) -> None:
    """Writes the model's config and weights, with the same tensors as the source folder.

    These include stored tensors that the model's class does not use, and exclude parameters that
    the source lacked.
    """
    state: dict[str, Tensor] = checkpoint.model.state_dict()
    for name in checkpoint.missing:
        state.pop(name, None)
    if checkpoint.unused:
        stored = WeightFiles(checkpoint.folder)
        state |= {name: stored[name] for name in sorted(checkpoint.unused)}
    save_pretrained(checkpoint.model, folder, state)


def save_pretrained(model: Any, folder: Path, state: dict[str, Tensor], **options: Any) -> None:
    """``model.save_pretrained``, with the usual file modes for the weights too.

    Raises:
        OSError: the files cannot be written.
    """
    from safetensors import SafetensorError

    try:
        model.save_pretrained(folder, state_dict=state, **options)
    except SafetensorError as error:  # as when the disk is full
        raise OSError(f"{folder} cannot be written: {error}") from error
    # Some versions of safetensors make files that only the owner may read.
    for file in folder.glob("*.safetensors"):
        file.chmod((folder / "config.json").stat().st_mode)


def copy_other_files(source: Path, target: Path) -> None:
    """Copies the files of a checkpoint folder that are neither weights nor in ``target`` already.

    These are tokenizers, model cards, the modules of a sentence-transformers model with their own
    weights, and so on. Other weight formats, training state, a Trainer's checkpoints and ``.git``
    are not copied: they belong to the dense model.
    """
    modules = _module_folders(source)
    own = tuple(f"{path}/" for path in modules)
    for parent, folders, files in os.walk(source, followlinks=True):
        here = {name: Path(parent) / name for name in folders if not _is_foreign(name, {".cache"})}
        # A link may lead anywhere, so only links to modules of the model are followed.
        folders[:] = sorted(
            name
            for name, path in here.items()
            if not path.is_symlink() or path.relative_to(source).as_posix() in modules
        )
        for name in sorted(files):
            relative = (Path(parent) / name).relative_to(source)
            if _is_weights(name) and not relative.as_posix().startswith(own):
                continue
            copy = target / relative
            if not copy.exists():
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source / relative, copy)


def check_other_files(source: Path) -> None:
    """Checks that :func:`copy_other_files` can read a folder's ``modules.json``, if it has one.

    Raises:
        ValueError: ``modules.json`` is not that of a sentence-transformers model.
    """
    _module_folders(source)


def _module_folders(source: Path) -> list[str]:
    """The folders of a sentence-transformers model's modules, without the root (the encoder)."""
    modules = _json(source, "modules.json") if (source / "modules.json").is_file() else []
    try:
        return [str(module["path"]) for module in modules if module.get("path")]
    except (AttributeError, TypeError):
        raise ValueError(
            f"{source / 'modules.json'} should be a list of modules with paths"
        ) from None


def verify_checkpoint(checkpoint: Checkpoint, folder: Path) -> None:
    """Loads a written folder again and compares every tensor with the model's.

    Raises:
        RuntimeError: a tensor differs or is missing; the error names it.
    """
    model = checkpoint.model
    again, found = type(model).from_pretrained(
        folder, dtype=model.dtype, local_files_only=True, output_loading_info=True
    )
    there = again.state_dict()
    for name, tensor in model.state_dict().items():
        if name in checkpoint.missing:
            continue
        if name in found["missing_keys"] or not same_bits(there[name], tensor):
            raise RuntimeError(f"{name} differs from the model when it is loaded from {folder}")


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same shape, dtype and bits, NaN and -0.0 included."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    bits, others = (t.detach().cpu().flatten().view(torch.uint8) for t in (one, other))
    return torch.equal(bits, others)


def check_output(out: Path, source: Path, *, overwrite: bool) -> None:
    """Refuses an output folder if writing to it would destroy something.

    Raises:
        ValueError: ``out`` is ``source``, in it or around it; it is a mount point or the current
            folder; it exists without ``overwrite``; or it is not a folder, is not a checkpoint, or
            holds more than one, such as the ``checkpoint-*`` of a Trainer.
    """
    out, source = out.resolve(), source.resolve()
    if out == source or out in source.parents or source in out.parents:
        raise ValueError(f"--out {out} should lie apart from the checkpoint {source}")
    if not out.exists():
        return
    if not out.is_dir():
        raise ValueError(f"--out {out} exists and is not a folder")
    _check_replaceable(out)
    if not overwrite:
        raise ValueError(f"--out {out} exists; --overwrite replaces it")
    if any(out.iterdir()) and not (out / "config.json").is_file():
        raise ValueError(f"--out {out} is not a checkpoint, so --overwrite does not replace it")
    # Folders beside a report.json were copied from the source by an earlier run of the command.
    own = (out / "report.json").is_file()
    folders = sorted(entry.name for entry in out.iterdir() if entry.is_dir())
    if kept := [name for name in folders if _is_foreign(name) or not own]:
        raise ValueError(
            f"--out {out} holds more than a checkpoint, so --overwrite does not replace it: "
            f"{some(kept)}"
        )


def _check_replaceable(folder: Path) -> None:
    if folder.exists() and (os.path.ismount(folder) or folder.samefile(os.curdir)):
        what = "a mount point" if os.path.ismount(folder) else "the current folder"
        raise ValueError(f"{folder} is {what}, which cannot be replaced: use a folder in it")


@contextmanager
def new_folder(out: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder beside ``out`` that becomes ``out`` when the block ends without an error.

    All files are flushed to the disk before one rename makes the folder visible. With
    ``overwrite``, the same step exchanges it with an existing folder, which is removed once the
    exchange is on the disk. On systems without such a step, the existing folder is moved aside just
    before. If the block fails or the process is killed in it, nothing changes.

    Args:
        out: the folder to make; missing parents are created.
        overwrite: replace an existing folder.

    Raises:
        ValueError: ``out`` is a mount point or the current folder, which cannot be replaced.
        OSError: ``out`` exists and is not empty, without ``overwrite``.
    """
    out = out.resolve()
    _check_replaceable(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    token = secrets.token_hex(4)
    partial, former = (out.with_name(f".{out.name}.{token}.{end}") for end in ("partial", "former"))
    partial.mkdir()
    try:
        yield partial
        _flush_all(partial)
        try:
            if overwrite and out.exists():
                if _exchange(partial, out):
                    flush(out.parent)
                    return
                out.rename(former)
            partial.rename(out)
            flush(out.parent)
        except BaseException:
            if former.exists() and not out.exists():
                former.rename(out)
            raise
    finally:
        _remove(partial)
        if out.exists():
            _remove(former)


def _remove(folder: Path) -> None:
    """Removes a folder, even if an interrupt comes in between."""
    try:
        shutil.rmtree(folder, ignore_errors=True)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _flush_all(folder: Path) -> None:
    for parent, _, files in os.walk(folder):
        for path in (*(Path(parent) / name for name in files), Path(parent)):
            # We may not have the permission to open a file that was carried over.
            with suppress(PermissionError):
                if not path.is_symlink():
                    flush(path)


def _exchange(one: Path, other: Path) -> bool:
    """Exchanges two folders in one atomic step; returns False if the system cannot."""
    if sys.platform != "linux":
        return False
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:  # an old C library
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    done: int = renameat2(here, os.fsencode(one), here, os.fsencode(other), exchange)
    return done == 0


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Turns off transformers' messages and progress bars, and restores them at the end."""
    logging = _transformers().utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _transformers() -> Any:
    try:
        import safetensors  # noqa: F401
        import transformers
    except ImportError as error:
        raise ImportError(
            'checkpoints need transformers: pip install "torchalignprune[transformers]"'
        ) from error
    return transformers


def architecture(folder: Path) -> Any:
    """The transformers class of a checkpoint folder's model, or ``AutoModel``."""
    transformers = _transformers()
    config = _json(folder, "config.json")
    if not isinstance(config, dict):
        raise ValueError(f"{folder / 'config.json'} should be a JSON object, got {config!r}")
    if "quantization_config" in config:
        raise ValueError(f"{folder} is quantized: only float weights can be pruned")
    names = config.get("architectures")
    name = str(names[0]) if isinstance(names, list) and names else ""
    kind = getattr(transformers, name, None)
    known = isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)
    return kind if known else transformers.AutoModel


def names_in_model(path: Path, known: dict[str, str]) -> dict[str, str]:
    """``known`` with the names that transformers gives the tensors when it loads the checkpoint."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            rename_source_key,
        )

        model = empty_model(path if path.is_dir() else path.parent)
    except (ImportError, ValueError):  # transformers before 5.0, or no model of transformers
        return known
    changes = get_model_conversion_mapping(model)
    renamings = [change for change in changes if isinstance(change, WeightRenaming)]
    converters = [change for change in changes if isinstance(change, WeightConverter)]
    renamed = {}
    for name, stored in known.items():
        own, converted = rename_source_key(name, renamings, converters)
        if converted is None:  # otherwise the model has the tensor in another form
            renamed[own] = stored
    return renamed


def _cannot_load(folder: Path, error: Exception) -> ValueError:
    reason = str(error).strip().partition("\n")[0]
    return ValueError(f"transformers cannot load {folder}: {reason}")


def _json(folder: Path, name: str) -> Any:
    try:
        return json.loads((folder / name).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{folder} is not a checkpoint folder: it has no {name}") from None
    except ValueError as error:
        raise ValueError(f"{folder / name} is not JSON: {error}") from error


def _unused(model: Any, stored: Any, unexpected: set[str]) -> tuple[frozenset[str], frozenset[str]]:
    """The stored names of tensors that the model did not load, and reported names not stored."""
    unused, lost = set(), set()
    for name in unexpected:
        legacy = re.sub(r"LayerNorm\.weight$", "LayerNorm.gamma", name)
        legacy = re.sub(r"LayerNorm\.bias$", "LayerNorm.beta", legacy)
        spelled = {name, legacy} & set(stored)
        unused |= spelled
        lost |= set() if spelled else {name}
    # Some classes never report certain tensors, such as the pooler that a language model lacks.
    known = model.state_dict().keys()
    silent = model._keys_to_ignore_on_load_unexpected or ()
    for name in stored:
        bare = name.removeprefix(f"{model.base_model_prefix}.")
        if not {name, bare} & known and any(re.search(pattern, name) for pattern in silent):
            unused.add(name)
    return frozenset(unused), frozenset(lost)


def _is_foreign(name: str, others: Collection[str] = ()) -> bool:
    """Whether a folder of this name is not part of a checkpoint and should not be deleted."""
    return name in {".git", *others} or re.fullmatch(r"checkpoint-\d+", name) is not None


def _is_weights(name: str) -> bool:
    if name == "training_args.bin":
        return False
    if name == INDEX:
        return True
    path = Path(name.removesuffix(".index.json"))
    return path.suffix in _WEIGHT_SUFFIXES
