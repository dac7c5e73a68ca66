"""The build without compiling: the backend, setup.py's errors, and what an import checks."""

import ast
import importlib.metadata
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import venv
from pathlib import Path

import pytest
import setuptools

import torchalignprune
from torchalignprune import _build, build_info

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.skipif(
    not (ROOT / "setup.py").exists(), reason="these tests are about the source tree"
)


def run(*command, **kwargs):
    return subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, timeout=300, **kwargs
    )


def git(*arguments):
    listed = run("git", "-C", ROOT, "ls-files", "-z", *arguments)
    return set(listed.stdout.split("\0")) - {""} if listed.returncode == 0 else set()


def sources():
    """What git tracks, and what it will: files that are new in the folders of sources."""
    folders = ["csrc", "torchalignprune", "tests", "benchmarks", "examples"]
    listed = git("--cached") | git("--others", "--exclude-standard", "--", *folders)
    return {name for name in listed if (ROOT / name).exists()}


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the source tree, since setuptools writes into the one it works on."""
    copy = tmp_path_factory.mktemp("tree") / "torchalignprune"
    left_out = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, copy, ignore=left_out)
    for name in sources():
        (copy / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def isolated(tmp_path_factory):
    """An interpreter as build isolation makes it: with setuptools and without torch."""
    folder = tmp_path_factory.mktemp("isolated")
    venv.create(folder / "venv", with_pip=False)
    (folder / "site").mkdir()
    packages = Path(setuptools.__file__).parent.parent
    for entry in [*packages.glob("setuptools*"), packages / "_distutils_hack"]:
        (folder / "site" / entry.name).symlink_to(entry)
    return folder / "venv" / "bin" / "python", str(folder / "site")


def ask_backend(isolated, tree, expression, virtual_env=None, front_end="sh", **variables):
    """The value of an expression about the backend, in a process that a shell starts.

    The shell may pass for another front end: its command line is ``sh -c ... FRONT_END``.
    """
    interpreter, site = isolated
    hidden = ("VIRTUAL_ENV", "CONDA_PREFIX", "UV_PYTHON")
    environ = {name: value for name, value in os.environ.items() if name not in hidden}
    environ.update(variables)
    program = (
        f"import sys; sys.path[:0] = [{str(tree)!r}, {site!r}]\n"
        f"import importlib.util, build_backend\nprint('ANSWER', repr({expression}))"
    )
    if virtual_env is not None:
        environ["VIRTUAL_ENV"] = str(virtual_env)
    command = shlex.join([str(interpreter), "-c", program])
    name, *arguments = shlex.split(front_end)
    shell = [name, "-c", f"{command}; exit $?", *arguments]
    done = run(*shell, executable=shutil.which("sh"), cwd=tree, env=environ)
    assert done.returncode == 0, done.stderr
    return ast.literal_eval(done.stdout.rpartition("ANSWER ")[2])


@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_without_torch_the_backend_asks_for_it(isolated, tree, kind):
    asked = ask_backend(isolated, tree, f"build_backend.get_requires_for_build_{kind}()")
    assert asked == ["torch>=2.11"]


@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_with_torch_the_backend_asks_for_nothing(isolated, tree, kind):
    hook = f"build_backend.get_requires_for_build_{kind}()"
    assert ask_backend(isolated, tree, hook, virtual_env=sys.prefix) == []


def test_a_source_distribution_needs_no_torch(isolated, tree):
    assert ask_backend(isolated, tree, "build_backend.get_requires_for_build_sdist()") == []


def test_the_backend_shows_the_installed_torch_and_keeps_its_own_setuptools(isolated, tree):
    where = "[importlib.util.find_spec(name).origin for name in ('torch', 'setuptools')]"
    found = ask_backend(
        isolated, tree, f"build_backend.show_torch() and {where}", virtual_env=sys.prefix
    )
    assert os.path.samefile(found[0], importlib.util.find_spec("torch").origin)
    assert found[1].startswith(isolated[1])


on_linux = pytest.mark.skipif(
    not Path("/proc/self/cmdline").exists(), reason="only Linux shows the parent"
)


@on_linux
@pytest.mark.parametrize(
    "arguments", ["--python {python} x", "-p {python}", "--python={prefix}", "x -p ../python"]
)
def test_the_backend_finds_the_torch_of_the_interpreter_named_to_uv(isolated, tree, arguments):
    link = tree.parent / "python"
    link.unlink(missing_ok=True)
    # Not a link to it, which would be another environment's interpreter.
    link.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    link.chmod(0o755)
    named = arguments.format(python=shlex.quote(sys.executable), prefix=shlex.quote(sys.prefix))
    uv = {"front_end": f"uv pip install {named}"}
    assert ask_backend(isolated, tree, "build_backend.show_torch()", **uv)
    # It is the only one that counts.
    uv["front_end"] = f"uv pip install -p {shlex.quote(str(isolated[0]))}"
    hook = "build_backend.get_requires_for_build_wheel()"
    assert ask_backend(isolated, tree, hook, virtual_env=sys.prefix, **uv) == ["torch>=2.11"]


@on_linux
@pytest.mark.parametrize("variable", ["UV_PYTHON", "CONDA_PREFIX"])
def test_the_backend_finds_the_torch_of_the_environment_that_uv_takes(isolated, tree, variable):
    uv = {"front_end": "uv pip install --python-version 3.10", variable: sys.prefix}
    assert ask_backend(isolated, tree, "build_backend.show_torch()", **uv)


@on_linux
@pytest.mark.parametrize(
    "command",
    ["uv run train.py -p -v", "uv run x --python 3.10 -p", "uv sync", "uv pip install -p"],
)
def test_other_commands_of_uv_install_into_the_environment(isolated, tree, command):
    uv = {"front_end": command, "virtual_env": sys.prefix}
    assert ask_backend(isolated, tree, "build_backend.show_torch()", **uv)
    if command == "uv sync":
        assert ask_backend(isolated, tree, "build_backend.show_torch()", UV_PYTHON="python3", **uv)


@on_linux
def test_the_backend_finds_the_torch_of_the_interpreter_that_runs_the_front_end(isolated, tree):
    interpreter, site = isolated
    environ = {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"}
    program = (
        f"import sys; sys.path[:0] = [{str(tree)!r}, {site!r}]; import build_backend\n"
        "print(build_backend.show_torch())"
    )
    front_end = (
        "import subprocess, sys\n"
        "print(subprocess.run(sys.argv[1:], capture_output=True, text=True, check=True).stdout)"
    )
    done = run(sys.executable, "-c", front_end, interpreter, "-c", program, env=environ)
    assert done.stdout.strip() == "True", done.stderr


def test_the_metadata_requires_the_minor_of_torch_that_is_installed(tree, tmp_path):
    done = run(
        sys.executable,
        "-c",
        "import sys, build_backend; build_backend.prepare_metadata_for_build_wheel(sys.argv[1])",
        tmp_path,
        cwd=tree,
    )
    assert done.returncode == 0, done.stderr
    (folder,) = tmp_path.glob("*.dist-info")
    metadata = importlib.metadata.PathDistribution(folder)
    minor = ".".join(_build.TORCH.split(".")[:2])
    core = [each for each in metadata.requires if "extra ==" not in each]
    assert core == [f"torch=={minor}.*", "numpy"]
    assert metadata.version == torchalignprune.__version__


@pytest.mark.skipif("csrc/ops.cpp" not in sources(), reason="git says what should be in it")
def test_the_source_distribution_is_complete(isolated, tree, tmp_path):
    name = ask_backend(isolated, tree, f"build_backend.build_sdist({str(tmp_path)!r})")
    with tarfile.open(tmp_path / name) as archive:
        held = {each.partition("/")[2] for each in archive.getnames()}
    assert sources() - held == set()
    assert "torchalignprune/_build.py" not in held
    assert not [each for each in held if each.endswith((".so", ".pyc"))]


FAKE_TORCH = """
class version:
    cuda = {cuda!r}
class cuda:
    device_count = staticmethod(lambda: 0)
__version__ = {version!r}
"""


def fake_torch(folder, version, cuda=None):
    package = folder / "torch"
    package.mkdir()
    (package / "__init__.py").write_text(FAKE_TORCH.format(version=version, cuda=cuda))
    declared = f"__version__ = {version!r}\ncuda: Optional[str] = {cuda!r}\n"
    (package / "version.py").write_text(f"from typing import Optional\n{declared}")
    return python_path(folder)


def python_path(folder):
    return {"PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])}


def setup(tree, *command, **variables):
    keep = {name: each for name, each in os.environ.items() if not name.startswith("TORCH")}
    done = run(sys.executable, "setup.py", *command, cwd=tree, env={**keep, **variables})
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    return done.stderr


def test_too_old_a_torch(tree, tmp_path):
    message = setup(tree, "build_ext", **fake_torch(tmp_path, "2.5.1"))
    assert "it needs torch>=2.11, and torch 2.5.1 is installed" in message


def test_no_torch(tree, tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('libc10.so is missing')")
    message = setup(tree, "build_ext", **python_path(tmp_path))
    assert "torch cannot be imported (libc10.so is missing)" in message
    assert "pip install 'torch>=2.11'" in message


def test_no_compiler(tree):
    message = setup(tree, "build_ext", CXX="no-such-compiler", TORCHALIGNPRUNE_CUDA="0")
    assert "no C++ compiler was found ('no-such-compiler' is not on PATH)" in message
    assert "apt-get install g++" in message
    assert "conda install -c conda-forge gxx" in message


def test_a_compiler_that_fails(tree, tmp_path):
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho 'omp.h: no such file' >&2\nexit 1\n")
    compiler.chmod(0o755)
    message = setup(tree, "build_ext", CXX=str(compiler), TORCHALIGNPRUNE_CUDA="0")
    assert f"the C++ compiler '{compiler}' does not compile a small program" in message
    assert "omp.h: no such file" in message


@pytest.mark.parametrize("value", ["yes", "2"])
def test_a_cuda_switch_other_than_0_and_1(tree, tmp_path, value):
    torch = fake_torch(tmp_path, "2.13.0+cpu")
    message = setup(tree, "build_ext", TORCHALIGNPRUNE_CUDA=value, **torch)
    assert f"TORCHALIGNPRUNE_CUDA should be 0 or 1, got {value!r}" in message


def test_cuda_with_a_torch_that_has_none(tree, tmp_path):
    torch = fake_torch(tmp_path, "2.13.0+cpu")
    message = setup(tree, "build_ext", TORCHALIGNPRUNE_CUDA="1", **torch)
    expected = "TORCHALIGNPRUNE_CUDA=1, but the installed torch 2.13.0+cpu is built without CUDA"
    assert expected in message


def test_cuda_without_nvcc(tree, tmp_path):
    torch = fake_torch(tmp_path, "2.13.0+cu130", cuda="13.0")
    home = str(tmp_path / "toolkit")
    message = setup(tree, "build_ext", TORCHALIGNPRUNE_CUDA="1", CUDA_HOME=home, **torch)
    assert f"{home}/bin/nvcc --version does not run: set CUDA_HOME" in message


def test_cuda_with_an_nvcc_of_another_release(tree, tmp_path):
    torch = fake_torch(tmp_path, "2.13.0+cu130", cuda="13.0")
    nvcc = tmp_path / "toolkit" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 11.8, V11.8.89'\n")
    nvcc.chmod(0o755)
    home = str(tmp_path / "toolkit")
    message = setup(tree, "build_ext", TORCHALIGNPRUNE_CUDA="1", CUDA_HOME=home, **torch)
    assert f"{nvcc} is of CUDA 11.8, but the installed torch 2.13.0+cu130 of CUDA 13.0" in message


def test_an_import_under_another_torch(tmp_path):
    environ = {**os.environ, **fake_torch(tmp_path, "2.99.1")}
    done = run(sys.executable, "-c", "import torchalignprune", env=environ, cwd=tmp_path)
    message = done.stderr.partition("ImportError: ")[2].splitlines()
    assert message[0] == (
        f"torchalignprune was built with torch {_build.TORCH}, and torch 2.99.1 is installed here. "
        "Build it for this one:"
    )
    assert shlex.split(message[1])[:4] == [sys.executable, "-m", "pip", "install"]


def test_check_passes_here():
    build_info.check()


@pytest.mark.parametrize("version", ["{minor}.0", "{minor}.7+cu130", "{minor}.0.dev20260101"])
def test_check_passes_for_every_torch_of_the_minor(monkeypatch, version):
    version = version.format(minor=".".join(_build.TORCH.split(".")[:2]))
    monkeypatch.setattr(build_info, "_installed_torch", lambda: (version, _build.CUDA))
    build_info.check()


def test_check_without_torch(monkeypatch):
    monkeypatch.setattr(build_info, "_installed_torch", lambda: None)
    with pytest.raises(ImportError, match=r"no torch is installed here. Install it:\n.* install"):
        build_info.check()


@pytest.mark.parametrize("here, described", [(None, "has none"), ("12.8", "has 12.8")])
def test_check_with_another_cuda(monkeypatch, here, described):
    monkeypatch.setattr(_build, "CUDA", "13.0")
    monkeypatch.setattr(build_info, "_installed_torch", lambda: (_build.TORCH, here))
    with pytest.raises(ImportError, match=rf"built with CUDA 13.0, and the torch .*, {described}"):
        build_info.check()


def test_check_without_the_extension(monkeypatch, tmp_path):
    package = tmp_path / "torchalignprune"
    package.mkdir()
    monkeypatch.setattr(build_info, "PACKAGE", package)
    with pytest.raises(ImportError, match=r"no extension for Python .*\n.* --force-reinst"):
        build_info.check()
    (tmp_path / "setup.py").touch()
    with pytest.raises(ImportError, match=rf"compile it:\n.* install -e {tmp_path}"):
        build_info.check()


@pytest.mark.parametrize(
    "recorded, source",
    [
        (None, ["--no-binary=torchalignprune", "torchalignprune==0.1.0"]),
        ({"url": "file:///home/me/tap%20dev", "dir_info": {}}, ["/home/me/tap dev"]),
        ({"url": "file:///tmp/tap-0.1.0.tar.gz", "archive_info": {}}, ["/tmp/tap-0.1.0.tar.gz"]),
        ({"url": "https://a.org/tap.tar.gz", "archive_info": {}}, ["https://a.org/tap.tar.gz"]),
        ({"url": "file:///tmp/tap-0.1.0-cp311.whl", "archive_info": {}}, None),
        (
            {"url": "https://a.org/tap", "vcs_info": {"vcs": "git", "commit_id": "abc"}},
            ["git+https://a.org/tap@abc"],
        ),
    ],
)
def test_the_command_installs_from_where_it_came(monkeypatch, tmp_path, recorded, source):
    class Installed:
        version = "0.1.0"

        def read_text(self, name):
            assert name == "direct_url.json"
            return None if recorded is None else json.dumps(recorded)

    monkeypatch.setattr(build_info, "PACKAGE", tmp_path / "torchalignprune")
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: Installed())
    assert build_info._source() == source


def test_the_version_is_the_same_everywhere():
    assert importlib.metadata.version("torchalignprune") == torchalignprune.__version__


def test_info_is_complete_and_fits_into_json():
    info = build_info.info()
    assert json.loads(json.dumps(info)) == info
    assert info["package"] == torchalignprune.__version__
    assert "-O3" in info["cxx_flags"]
    assert "-ffp-contract=off" in info["cxx_flags"]
    assert not [flag for flag in info["cxx_flags"] if flag.startswith("-march")]
    assert (info["cuda"] is None) == bool(info["why_no_cuda"])
    assert (info["cuda"] is None) == (info["cuda_architectures"] == [])
    text = build_info.render(info)
    for key in ("package", "python", "torch", "compiler", "simd"):
        assert info[key] in text
    assert (info["cuda"] or f"not built: {info['why_no_cuda']}") in text


def test_render_names_the_cuda_architectures():
    info = {**build_info.info(), "cuda": "13.0", "cuda_architectures": ["sm_80", "sm_90"]}
    assert "13.0 for sm_80, sm_90" in build_info.render(info)


def test_the_module_and_the_command_print_the_same():
    command = shutil.which("torchalignprune", path=str(Path(sys.executable).parent))
    by_module = run(sys.executable, "-m", "torchalignprune", "info")
    by_command = run(command, "info")
    assert by_module.returncode == 0, by_module.stderr
    assert by_module.stdout == by_command.stdout == build_info.render() + "\n"


def test_an_import_starts_no_cuda_context_and_loads_no_extras():
    # Replacing what initialises CUDA makes this fail without a GPU, too.
    program = """
import sys, torch
calls, before = [], set(sys.modules)
torch.cuda._lazy_init = lambda: calls.append("CUDA was initialised")
import torchalignprune
new = set(sys.modules) - before
extras = {"transformers", "safetensors", "matplotlib", "rich", "tqdm", "scipy", "pandas"} & new
extras |= {"torch._dynamo"} & new  # a second of its own
print(calls, torch.cuda.is_initialized(), sorted(extras))
"""
    done = run(sys.executable, "-c", program)
    assert done.stdout.strip() == "[] False []", done.stderr


def test_the_command_that_refreshes_the_pins_drops_torch_alone():
    text = (ROOT / "requirements.txt").read_text()
    dropped = re.search(r"grep -vE '(.+)'", text)[1]
    pins = [line for line in text.splitlines() if not line.startswith("#")]
    assert [pin.partition("==")[0] for pin in pins if re.match(dropped, pin)] == ["torch"]


def make(folder, *arguments, **variables):
    """``make`` in a folder with nothing but the Makefile and the pins."""
    (folder / "tests" / "cuda_headers").mkdir(parents=True, exist_ok=True)
    for name in ("Makefile", "requirements.txt"):
        shutil.copy2(ROOT / name, folder)
    outer = ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "PYTHON", "TORCH")
    environ = {name: value for name, value in os.environ.items() if name not in outer}
    return run("make", *arguments, cwd=folder, env={**environ, **variables})


with_make = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


@with_make
@pytest.mark.parametrize("missing", ["ensurepip", "sysconfig"])
def test_make_says_what_python_lacks_before_it_downloads(tmp_path, missing):
    """As where Debian's python3-venv and python3-dev are not installed."""
    (tmp_path / "fake").mkdir()
    code = (
        "def get_path(name):\n    return '/none'\n"
        if missing == "sysconfig"
        else "raise ImportError"
    )
    (tmp_path / "fake" / f"{missing}.py").write_text(code)
    done = make(tmp_path, f"PYTHON={sys.executable}", "test", PYTHONPATH=str(tmp_path / "fake"))
    assert done.returncode != 0
    assert "apt-get install python3-dev python3-venv" in done.stderr
    assert not (tmp_path / ".venv").exists()


@with_make
def test_make_renews_the_environment_for_another_python(tmp_path):
    ours = f"PYTHON={sys.executable}"
    stamp = re.search(r"^touch '(.*)'$", make(tmp_path, "-n", ours, "test").stdout, re.MULTILINE)[1]
    (tmp_path / ".venv").mkdir()
    for name in (stamp, ".venv/compiled"):
        (tmp_path / name).touch()
    assert "venv --clear" not in make(tmp_path, "-n", ours, "test").stdout
    other = tmp_path / "python"
    other.write_text("#!/bin/sh\necho 3.99\n")
    other.chmod(0o755)
    assert "venv --clear" in make(tmp_path, "-n", f"PYTHON={other}", "test").stdout


FAKE_PYTHON = """#!/bin/sh
case "$*" in
  *get_device_capability*) echo 9.0 ;;
  *sys.executable*) echo "$0" ;;
  *"-m pytest"*) touch "$OUT/testing" && exec {python} -c '
import time
try:
    time.sleep(60)
except KeyboardInterrupt:
    raise SystemExit(2)' ;;
  *gpu.py*) touch "$OUT/benchmarking" ;;
esac
"""


@pytest.mark.skipif(sys.platform != "linux", reason="gpu.sh needs GNU's tools")
def test_an_interrupt_stops_the_gpu_run(tmp_path):
    fake = tmp_path / "python"
    fake.write_text(FAKE_PYTHON.format(python=shlex.quote(sys.executable)))
    fake.chmod(0o755)
    for name in ("gpu.json", "tests.xml"):
        (tmp_path / name).write_text("of an earlier run")
    process = subprocess.Popen(
        ["bash", ROOT / "benchmarks" / "gpu.sh"],
        env={**os.environ, "PYTHON": str(fake), "OUT": str(tmp_path), "TMPDIR": str(tmp_path)},
        stdout=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "testing").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)  # until the command that is to be interrupted has begun
    os.killpg(process.pid, signal.SIGINT)
    try:
        assert process.wait(timeout=30) == 130
    finally:
        process.kill()
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"python", "testing", "build.log", "tests.log"}
