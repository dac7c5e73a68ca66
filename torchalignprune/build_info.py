"""What the extension was built with, and whether it fits the installed torch."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import platform
import re
import shlex
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

PACKAGE = Path(__file__).parent

# The names of the standard's versions, by the date that a compiler gives as `_OPENMP`.
OPENMP = {201511: "4.5", 201811: "5.0", 202011: "5.1", 202111: "5.2", 202411: "6.0"}


def check() -> None:
    """Check that the extension is there and was built for the installed torch.

    Called before torch or the extension is loaded: with another torch than its own an extension
    fails on undefined symbols at best, and at worst does not fail.

    Raises:
        ImportError: it is missing or was built for another torch. The message says what it was
            built with, what is installed, and which command mends it.
    """
    if not any((PACKAGE / f"_C{suffix}").exists() for suffix in EXTENSION_SUFFIXES):
        raise ImportError(_not_compiled())
    try:
        from torchalignprune import _build
    except ImportError:
        raise ImportError(_not_compiled()) from None

    built = "torchalignprune was built with"
    its_torch = f"torch=={_minor(_build.TORCH)}.*"
    here = _installed_torch()
    if here is None:
        raise ImportError(
            f"{built} torch {_build.TORCH}, and no torch is installed here. Install it:\n"
            f"  {_pip_install(its_torch)}"
        )
    version, cuda = here
    if _minor(version) != _minor(_build.TORCH):
        difference = f"torch {_build.TORCH}, and torch {version} is installed here"
    elif _build.CUDA is not None and _major(_build.CUDA) != _major(cuda or "none"):
        difference = f"CUDA {_build.CUDA}, and the torch here, {version}, has {cuda or 'none'}"
    else:
        return
    source = _source()
    if source is None:
        raise ImportError(
            f"{built} {difference}. Install the torch that its wheel was built with:\n"
            f"  {_pip_install(its_torch)}"
        )
    raise ImportError(f"{built} {difference}. Build it for this one:\n  {_reinstall(source)}")


def info() -> dict[str, Any]:
    """What is installed, how it was built and what it uses here.

    Returns:
        Strings, numbers, lists of strings and None (which JSON can hold), under the keys `package`,
        `python`, `platform`, `torch`, `built_with_torch`, `compiler`, `cxx_flags`, `link_flags`,
        `openmp` (the date that names the version, 0 without OpenMP), `threads`, `simd` (the widest
        level that this processor has), `cuda` (the version built with, or None),
        `cuda_architectures`, `nvcc_flags` and `why_no_cuda`.

    Example:
        >>> from torchalignprune import build_info
        >>> build_info.info()["simd"] in ("portable", "avx2", "avx512")
        True
    """
    import torch

    import torchalignprune
    from torchalignprune import _C, _build

    return {
        "package": torchalignprune.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": str(torch.__version__),
        "built_with_torch": _build.TORCH,
        "compiler": _build.COMPILER,
        "cxx_flags": _build.CXX_FLAGS,
        "link_flags": _build.LINK_FLAGS,
        "openmp": _C.openmp(),
        "threads": torch.get_num_threads(),
        "simd": _C.simd_level(),
        "cuda": _build.CUDA,
        "cuda_architectures": _build.CUDA_ARCHITECTURES,
        "nvcc_flags": _build.NVCC_FLAGS,
        "why_no_cuda": _build.WHY_NO_CUDA,
    }


def render(found: dict[str, Any] | None = None) -> str:
    """What `info` returns, now or earlier, as lines of text."""
    found = info() if found is None else found
    openmp = "none, one thread"
    if found["openmp"]:
        version = OPENMP.get(found["openmp"], str(found["openmp"]))
        openmp = f"{version}, {found['threads']} threads"
    rows = {
        "torchalignprune": found["package"],
        "Python": f"{found['python']} on {found['platform']}",
        "torch": f"{found['torch']} (built with {found['built_with_torch']})",
        "compiler": found["compiler"],
        "C++ flags": " ".join(found["cxx_flags"]),
        "link flags": " ".join(found["link_flags"]),
        "OpenMP": openmp,
        "SIMD": found["simd"],
    }
    if found["cuda"] is None:
        rows["CUDA"] = f"not built: {found['why_no_cuda']}"
    else:
        rows["CUDA"] = f"{found['cuda']} for {', '.join(found['cuda_architectures'])}"
        rows["nvcc flags"] = " ".join(found["nvcc_flags"])
    width = max(map(len, rows))
    return "\n".join(f"{name:{width}}  {value}" for name, value in rows.items())


def _installed_torch() -> tuple[str, str | None] | None:
    """Version and CUDA version of the torch that would be imported, read without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    text = Path(spec.origin).with_name("version.py").read_text(encoding="utf-8")
    values = dict(re.findall(r"^(__version__|cuda)\b.*= '(.+)'$", text, re.MULTILINE))
    return values["__version__"], values.get("cuda")


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def _major(version: str) -> str:
    return version.split(".")[0]


def _pip_install(*arguments: str) -> str:
    if not any((Path(folder) / "pip").is_dir() for folder in sys.path):  # uv's environments
        return shlex.join(["uv", "pip", "install", "--python", sys.executable, *arguments])
    return shlex.join([sys.executable, "-m", "pip", "install", *arguments])


def _reinstall(source: list[str]) -> str:
    # Without the cache, which may hold the very wheel that does not fit.
    return _pip_install("--force-reinstall", "--no-deps", "--no-cache-dir", *source)


def _not_compiled() -> str:
    folder = PACKAGE.parent
    missing = f"has no extension for Python {platform.python_version()}"
    if _in_source_tree():
        return (
            f"the source tree of torchalignprune in {folder} {missing}. Leave that folder to import"
            f" another installation, or compile it:\n  {_pip_install('-e', str(folder))}"
        )
    source = _source() or ["torchalignprune"]
    return f"torchalignprune in {folder} {missing}. Install it again:\n  {_reinstall(source)}"


def _in_source_tree() -> bool:
    return (PACKAGE.parent / "setup.py").exists()


def _source() -> list[str] | None:
    """What to give pip to build this installation again; None if it came as a wheel's file."""
    if _in_source_tree():
        return ["-e", str(PACKAGE.parent)]
    try:
        installed = importlib.metadata.distribution("torchalignprune")
    except importlib.metadata.PackageNotFoundError:  # Somebody copied the folder.
        return ["torchalignprune"]
    recorded = installed.read_text("direct_url.json")
    if recorded is None:  # It came from an index.
        return ["--no-binary=torchalignprune", f"torchalignprune=={installed.version}"]
    origin = json.loads(recorded)
    url: str = origin["url"]
    if "vcs_info" in origin:
        return [f"{origin['vcs_info']['vcs']}+{url}@{origin['vcs_info']['commit_id']}"]
    if url.endswith(".whl"):
        return None
    return [url2pathname(urlsplit(url).path) if url.startswith("file:") else url]
