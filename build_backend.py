"""The build backend: setuptools', with the installed torch importable.

A package that compiles against torch has to compile against the torch it will run with. Build
isolation hides that torch, and listing torch as a build requirement would fetch another one. So the
hooks that compile find the environment the package is being installed into and put its site
folders at the end of `sys.path`, after everything the isolated environment has. They require torch
only if none is installed.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from setuptools import build_meta

TORCH = "torch>=2.11"

# Run by the interpreter of another environment, to print where its torch and its packages are.
LOOK = """
import importlib.util, json, os, sys, sysconfig
sys.path = [folder for folder in sys.path if folder]
torch = importlib.util.find_spec("torch")
if torch is not None and torch.origin is not None:
    folders = [os.path.dirname(os.path.dirname(torch.origin)), *sys.path]
    named = ("site-packages", "dist-packages")
    keep = folders[:1] + [folder for folder in folders if os.path.basename(folder) in named]
    print(json.dumps({"abi": sysconfig.get_config_var("SOABI"), "folders": keep}))
"""


class _FrontEnd:
    """The process that called this hook: pip, build, uv or another.

    Such tools change the environment variables of their hooks; those that they were started with
    tell where torch is. Only Linux shows them; elsewhere this process's own variables have to do.
    """

    def __init__(self) -> None:
        process = Path("/proc") / str(os.getppid())
        try:
            variables = os.fsdecode((process / "environ").read_bytes()).split("\0")
            self.variables = dict(each.split("=", 1) for each in variables if "=" in each)
            self.command = os.fsdecode((process / "cmdline").read_bytes()).split("\0")
            self.folder = os.readlink(process / "cwd")
        except OSError:
            hidden = ("PYTHONPATH", "PYTHONNOUSERSITE")  # pip sets both to isolate its builds.
            self.variables = {key: each for key, each in os.environ.items() if key not in hidden}
            self.command, self.folder = [""], ""

    def interpreters(self) -> Iterator[str]:
        """The interpreters that the package may be installed for, the likeliest first."""
        yield sys.executable
        name = os.path.basename(self.command[0])
        if name.startswith("python"):
            program = self._find(self.command[0])
            if program == sys.executable:
                return  # This is pip, which runs the hooks with the interpreter it installs for.
            if program is not None:
                yield program  # `python -m build` runs them in a virtual environment of its own.
        if name == "uv" and (named := self._named_to_uv_pip()) is not None:
            yield named
            return
        prefixes = [self.variables.get("VIRTUAL_ENV"), os.environ.get("VIRTUAL_ENV")]
        if name == "uv":
            prefixes += [self.variables.get("CONDA_PREFIX"), os.path.join(self.folder, ".venv")]
        for prefix in prefixes:
            if prefix:
                yield os.path.join(prefix, "bin", "python")

    def _named_to_uv_pip(self) -> str | None:
        """The interpreter named by `uv pip install --python`, unless that is a version."""
        if "pip" not in self.command:
            return None  # Other commands install into an environment of the project.
        parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
        parser.add_argument("-p", "--python", default=self.variables.get("UV_PYTHON"))
        try:
            named = parser.parse_known_args(self.command[1:])[0].python
        except argparse.ArgumentError:
            return None
        if named and os.path.isdir(os.path.join(self.folder, named, "bin")):
            named = os.path.join(named, "bin", "python")  # It was an environment's folder.
        return self._find(named) if named else None

    def _find(self, program: str) -> str | None:
        if os.sep in program:
            return os.path.join(self.folder, program)
        return shutil.which(program, path=self.variables.get("PATH"))


def show_torch() -> bool:
    """Make the installed torch importable here. Returns whether there is one."""
    if importlib.util.find_spec("torch") is not None:
        return True
    front_end = _FrontEnd()
    for interpreter in dict.fromkeys(front_end.interpreters()):
        try:
            answer = subprocess.run(
                [interpreter, "-c", LOOK],
                env=front_end.variables,
                capture_output=True,
                text=True,
                check=True,
            ).stdout
        except (OSError, subprocess.CalledProcessError):
            continue
        found = json.loads(answer) if answer.strip() else None
        # Another Python's torch cannot be loaded by this one.
        if found is not None and found["abi"] == sysconfig.get_config_var("SOABI"):
            sys.path += [folder for folder in found["folders"] if folder not in sys.path]
            importlib.invalidate_caches()
            return True
    return False


def _requires_torch(hook: Callable[..., list[str]]) -> Callable[..., list[str]]:
    @functools.wraps(hook)
    def wrapped(config_settings: Any = None) -> list[str]:
        found = show_torch()
        return [*hook(config_settings), *([] if found else [TORCH])]

    return wrapped


def _with_torch(hook: Callable[..., str]) -> Callable[..., str]:
    @functools.wraps(hook)
    def wrapped(*args: Any, **kwargs: Any) -> str:
        show_torch()
        return hook(*args, **kwargs)

    return wrapped


get_requires_for_build_wheel = _requires_torch(build_meta.get_requires_for_build_wheel)
get_requires_for_build_editable = _requires_torch(build_meta.get_requires_for_build_editable)
prepare_metadata_for_build_wheel = _with_torch(build_meta.prepare_metadata_for_build_wheel)
prepare_metadata_for_build_editable = _with_torch(build_meta.prepare_metadata_for_build_editable)
build_wheel = _with_torch(build_meta.build_wheel)
build_editable = _with_torch(build_meta.build_editable)

# A source distribution does not depend on what is installed, so it needs no torch.
get_requires_for_build_sdist = build_meta.get_requires_for_build_sdist
build_sdist = build_meta.build_sdist
