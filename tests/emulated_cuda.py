"""The CUDA kernels on the CPU, through tests/cuda_headers, for machines without a GPU.

The tensors that :func:`on_gpu` makes lie on the CPU, but their operators run the CUDA sources: the
checks, layouts, workspaces, launches and kernels.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import sys
import sysconfig
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor
from torch.utils import cpp_extension
from torch.utils._pytree import tree_map

HERE = Path(__file__).parent
CSRC = HERE.parent / "csrc"
NAMESPACE = "torchalignprune_emulated"
# The name of a kernel, with or without template arguments, and its launch configuration.
LAUNCH = re.compile(r"([A-Za-z_]\w*(?:<[^;{}]*?>)?)\s*<<<(.*?)>>>\s*\(", re.DOTALL)

_libraries = []  # An operator lives as long as the library that defines it.


def build() -> None:
    """Compiles the CUDA sources for the CPU, unless that has been done before, and loads them."""
    library = torch.library.Library(NAMESPACE, "DEF")
    _libraries.append(library)
    for name in re.findall(r'm\.impl\("(\w+)"', (CSRC / "cuda" / "glue.cpp").read_text()):
        schema = str(getattr(torch.ops.torchalignprune, name).default._schema)
        library.define(schema.removeprefix("torchalignprune::"))
    folder = HERE.parent / "build" / "emulated_cuda" / _key()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if folder.exists():
            torch.ops.load_library(folder / f"{NAMESPACE}.so")
            return
        partial = folder.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        sources = _translate(partial)
        # torch calls ninja by its name, and an environment that is not activated is not on PATH.
        path = [os.environ.get("PATH", os.defpath), sysconfig.get_path("scripts")]
        os.environ["PATH"] = os.pathsep.join(path)
        cpp_extension.load(
            NAMESPACE,
            sources,
            extra_cflags=["-O2", "-g0", "-ffp-contract=off", "-w"],
            extra_include_paths=[str(HERE / "cuda_headers")],
            build_directory=str(partial),
            is_python_module=False,
        )
        partial.rename(folder)


def _key() -> str:
    """A hash of everything that the compiled library depends on."""
    found = hashlib.sha256(repr((sys.version, torch.__version__, os.environ.get("CXX"))).encode())
    files = [Path(__file__), CSRC / "checks.h"]
    for folder in (CSRC / "cuda", HERE / "cuda_headers"):
        files += sorted(path for path in folder.rglob("*") if path.is_file())
    for path in files:
        found.update(path.read_bytes())
    return found.hexdigest()[:16]


def _translate(folder: Path) -> list[str]:
    """Writes the CUDA sources as C++ that launches kernels through a function."""
    (folder / "cuda").mkdir(parents=True)
    shutil.copy(CSRC / "checks.h", folder)
    sources = []
    for path in sorted((CSRC / "cuda").iterdir()):
        text = LAUNCH.sub(r"::emulated::launch(\1, \2)(", path.read_text())
        text = text.replace("(torchalignprune, CUDA,", f"({NAMESPACE}, CPU,")
        copy = (folder / "cuda" / path.name).with_suffix(
            path.suffix if path.suffix in (".h", ".cuh") else ".cpp"
        )
        copy.write_text(text)
        if copy.suffix == ".cpp":
            sources.append(str(copy))
    return sources


class OnGpu(Tensor):
    """A tensor whose operators are those of the CUDA sources."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> OnGpu:
        made: OnGpu = Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=inner.device,
        )
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "torchalignprune":
            func = getattr(getattr(torch.ops, NAMESPACE), func._opname).default
        args, kwargs = tree_map(_unwrapped, (args, kwargs or {}))
        return tree_map(_wrapped, func(*args, **kwargs))


def _unwrapped(value: Any) -> Any:
    return value.inner if isinstance(value, OnGpu) else value


def _wrapped(value: Any) -> Any:
    return OnGpu(value) if isinstance(value, Tensor) else value


def on_gpu(given: Any) -> Any:
    """Copies of the tensors in memory of their own, with the same strides and storage offsets."""
    return tree_map(_moved, given)


def _moved(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    whole = value.untyped_storage().size() // value.element_size()
    memory = value.as_strided((whole,), (1,), 0).clone()
    return OnGpu(memory.as_strided(value.shape, value.stride(), value.storage_offset()))
