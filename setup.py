"""Compiles `torchalignprune._C` against the installed torch, which build_backend.py finds.

TORCHALIGNPRUNE_CUDA=0|1 turns the CUDA sources off or on; if it is not set, they are built if torch
has CUDA and a matching nvcc is found. TORCH_CUDA_ARCH_LIST, CUDA_HOME, CXX and MAX_JOBS are torch's
own.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any, NoReturn

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

from build_backend import TORCH

CPU_SOURCES = sorted(map(str, [*Path("csrc").glob("*.cpp"), *Path("csrc/cpu").glob("*.cpp")]))
CUDA_SOURCES = [*sorted(map(str, Path("csrc/cuda").glob("*.cu"))), "csrc/cuda/glue.cpp"]
RECORD = "torchalignprune/_build.py"
MINIMUM = (2, 11)
# -g0, because Python's own flags may ask for debug information, most of the extension's size.
# Nothing looks at floating-point exceptions, and with them GCC does not vectorise what it puts
# behind a mask's branch.
CXX_FLAGS = [
    "-O3",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
    "-Wall",
    "-g0",
]
# Apple's compiler has no OpenMP; everywhere else it comes with the compiler.
OPENMP_FLAGS = [] if sys.platform == "darwin" else ["-fopenmp"]
NVCC_FLAGS = ["-O3", "--fmad=false"]

COMPILERS = """\
  Debian, Ubuntu:  apt-get install g++
  Fedora, RHEL:    dnf install gcc-c++
  conda:           conda install -c conda-forge gxx
  macOS:           xcode-select --install
or name one that is installed: CXX=/path/to/g++"""


def fail(message: str) -> NoReturn:
    raise SystemExit(f"torchalignprune cannot be built: {message}")


def output(*command: str) -> str:
    """What a command prints, or the empty string if it cannot be run or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def toolkit() -> str | None:
    """The folder of the CUDA toolkit."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        return home
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return "/usr/local/cuda" if os.path.exists("/usr/local/cuda/bin/nvcc") else None
    # nvcc on PATH may be a wrapper outside of the toolkit; a dry run says where that is.
    dry_run = subprocess.run(
        [nvcc, "--dryrun", "-x", "cu", "-E", os.devnull], capture_output=True, text=True
    )
    top = re.search(r"^#\$ TOP=(.+)$", dry_run.stderr, re.MULTILINE)
    return os.path.realpath(top[1] if top else os.path.join(os.path.dirname(nvcc), ".."))


def why_no_cuda(torch: Any) -> str | None:
    """The reason why the CUDA sources are not built; None if they are."""
    wish = os.environ.get("TORCHALIGNPRUNE_CUDA", "")
    if wish not in ("", "0", "1"):
        fail(f"TORCHALIGNPRUNE_CUDA should be 0 or 1, got {wish!r}")
    if wish == "0":
        return "TORCHALIGNPRUNE_CUDA=0"

    reason = None
    if torch.version.cuda is None:
        reason = f"the installed torch {torch.__version__} is built without CUDA"
    elif (home := toolkit()) is None:
        reason = (
            "nvcc was not found: install the CUDA toolkit "
            f"{torch.version.cuda} or set CUDA_HOME to its folder"
        )
    else:
        nvcc = os.path.join(home, "bin", "nvcc")
        release = re.search(r"release (\d+)\.(\d+)", output(nvcc, "--version"))
        if release is None:
            reason = f"{nvcc} --version does not run: set CUDA_HOME to the CUDA toolkit's folder"
        elif release[1] != torch.version.cuda.split(".")[0]:
            reason = (
                f"{nvcc} is of CUDA {release[1]}.{release[2]}, "
                f"but the installed torch {torch.__version__} of CUDA {torch.version.cuda}"
            )
        else:
            os.environ["CUDA_HOME"] = home
    if reason is not None and wish == "1":
        fail(f"TORCHALIGNPRUNE_CUDA=1, but {reason}")
    return reason


def check_compiler(compiler: str) -> None:
    """Fail with what to install; the compiler would only say what is missing."""
    if shutil.which(shlex.split(compiler)[0]) is None:
        fail(f"no C++ compiler was found ({compiler!r} is not on PATH). Install one:\n{COMPILERS}")
    header = os.path.join(sysconfig.get_path("include"), "Python.h")
    if not os.path.exists(header):
        fail(
            f"{header} is missing. Install Python's headers:\n"
            "  Debian, Ubuntu:  apt-get install python3-dev\n"
            "  Fedora, RHEL:    dnf install python3-devel"
        )
    trial = subprocess.run(
        [*shlex.split(compiler), *OPENMP_FLAGS, "-x", "c++", "-c", "-", "-o", os.devnull],
        input="#include <vector>\n" + ("#include <omp.h>\n" if OPENMP_FLAGS else ""),
        capture_output=True,
        text=True,
    )
    if trial.returncode != 0:
        fail(
            f"the C++ compiler {compiler!r} does not compile a small program"
            f"{' with OpenMP' if OPENMP_FLAGS else ''}:\n{trial.stderr}Install a complete one:\n"
            f"{COMPILERS}"
        )


def choose_architectures(torch: Any) -> None:
    """With no GPU here and none named, build for the architectures that torch was built for."""
    if os.environ.get("TORCH_CUDA_ARCH_LIST") or torch.cuda.device_count() > 0:
        return
    numbers = re.findall(r"\bsm_(\d+)(\d)\b", torch._C._cuda_getArchFlags() or "")
    os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(map(".".join, numbers)) + "+PTX"


def architectures(nvcc_flags: list[str]) -> list[str]:
    """What the CUDA sources are compiled for: sm_90 for GPUs of 9.0, compute_90 for newer ones."""
    named = re.findall(r",code=(\w+)", " ".join(nvcc_flags))
    return sorted(named, key=lambda name: (int(re.sub(r"\D", "", name)), not name.startswith("sm")))


def with_torch(torch: Any) -> dict[str, Any]:
    """The arguments of `setup` that compile the extension against this torch."""
    if sys.platform == "win32":
        fail("Windows is not supported; the Windows Subsystem for Linux is")
    major, minor = map(int, torch.__version__.split(".")[:2])
    if (major, minor) < MINIMUM:
        fail(
            f"it needs {TORCH}, and torch {torch.__version__} is installed. Upgrade that first:\n"
            f"  pip install '{TORCH}'"
        )
    reason = why_no_cuda(torch)
    # torch finds ninja on PATH, which lacks an environment that is not activated.
    path = [os.environ.get("PATH", os.defpath), sysconfig.get_path("scripts")]
    os.environ["PATH"] = os.pathsep.join(path)

    from torch.utils import cpp_extension

    cxx_flags = [*CXX_FLAGS, *OPENMP_FLAGS]
    if reason is None:
        choose_architectures(torch)
        extension = cpp_extension.CUDAExtension(
            "torchalignprune._C",
            [*CPU_SOURCES, *CUDA_SOURCES],
            extra_compile_args={
                "cxx": [*cxx_flags, "-DTORCHALIGNPRUNE_CUDA"],
                "nvcc": [*NVCC_FLAGS, *cpp_extension._get_cuda_arch_flags()],
            },
            extra_link_args=OPENMP_FLAGS,
        )
    else:
        extension = cpp_extension.CppExtension(
            "torchalignprune._C",
            CPU_SOURCES,
            extra_compile_args={"cxx": cxx_flags},
            extra_link_args=OPENMP_FLAGS,
        )

    class BuildExtension(cpp_extension.BuildExtension):
        """Compiles, and records in `torchalignprune/_build.py` what it was compiled with."""

        def finalize_options(self) -> None:
            super().finalize_options()
            # Whatever was compiled before may have been compiled against another torch.
            self.force = True
            self.build_temp = os.path.join(self.build_temp, f"torch-{torch.__version__}")

        def run(self) -> None:
            compiler = cpp_extension.get_cxx_compiler()
            check_compiler(compiler)
            super().run()
            nvcc = extension.extra_compile_args["nvcc"]
            record = {
                "TORCH": str(torch.__version__),
                "COMPILER": output(*shlex.split(compiler), "--version").partition("\n")[0],
                "CXX_FLAGS": [*self.compiler.compiler_so[1:], *extension.extra_compile_args["cxx"]],
                "LINK_FLAGS": extension.extra_link_args,
                "CUDA": torch.version.cuda if reason is None else None,
                "NVCC_FLAGS": nvcc,
                "CUDA_ARCHITECTURES": architectures(nvcc),
                "WHY_NO_CUDA": reason,
            }
            file = self.record_file()
            with open(file, "w", encoding="utf-8") as stream:
                stream.write('"""What this was built with; written by setup.py."""\n\n')
                stream.writelines(f"{name} = {value!r}\n" for name, value in record.items())
            if self.inplace:
                self.copy_file(file, RECORD)

        def record_file(self) -> str:
            return os.path.join(self.build_lib, RECORD)

        def get_outputs(self) -> list[str]:
            return sorted({*super().get_outputs(), self.record_file()})

        def get_output_mapping(self) -> dict[str, str]:
            mapping = super().get_output_mapping()
            return {**mapping, self.record_file(): RECORD} if self.inplace else mapping

    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": BuildExtension},
        # The extension runs only with the minor version of torch that it was compiled against.
        "install_requires": [f"torch=={major}.{minor}.*", "numpy"],
    }


def without_torch(error: ImportError | None) -> dict[str, Any]:
    """The arguments of `setup` that suffice for metadata and source distributions."""

    class BuildExtension(build_ext):
        def run(self) -> None:
            fail(f"torch cannot be imported ({error}). Install it first: pip install '{TORCH}'")

    return {
        "ext_modules": [Extension("torchalignprune._C", CPU_SOURCES)],
        "cmdclass": {"build_ext": BuildExtension},
        "install_requires": [TORCH, "numpy"],
    }


def arguments() -> dict[str, Any]:
    if "sdist" in sys.argv:  # A source distribution does not depend on what is installed.
        return without_torch(None)
    try:
        import torch
    except ImportError as error:
        return without_torch(error)
    return with_torch(torch)


setup(**arguments())
