#!/usr/bin/env bash
# Builds with CUDA, then runs the tests marked `cuda` and benchmarks/gpu.py, all in less than nine
# minutes and without a network.
#
#   benchmarks/gpu.sh                     writes to benchmarks/results/gpu
#   OUT=/some/folder benchmarks/gpu.sh    writes elsewhere
#
# Needs a GPU, the CUDA toolkit, and a python3 (or PYTHON=...) with torch 2.11 or newer for CUDA,
# setuptools, ninja, numpy, pytest, hypothesis and transformers. The package is built into a
# temporary folder; the environment and the working tree are left unchanged.
#
# Writes gpu.json (machine, tests, benchmarks), tests.xml, tests.log, build.log and benchmarks.log.
# The benchmarks run even if tests fail. The exit code is 0 only if the build succeeds, every test
# passes and every benchmark finds the right results.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
root=$PWD
python=${PYTHON:-python3}
out=${OUT:-benchmarks/results/gpu}
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 1
scratch=$(mktemp -d) || exit 1
trap 'rm -rf "$scratch"' EXIT
# Because of --foreground, an interrupt reaches the running command. Then it ends this script.
trap 'exit 130' INT

capability=$("$python" -c '
import torch
print("%d.%d" % torch.cuda.get_device_capability())') || {
  echo "gpu.sh: $python has no torch that sees a GPU" >&2
  exit 1
}
python=$("$python" -c 'import sys; print(sys.executable)') # its full path
rm -f "$out"/{gpu.json,tests.xml,tests.log,build.log,benchmarks.log}

echo "== build for compute capability $capability"
begun=$SECONDS
# From a copy, because building leaves files next to the sources.
mkdir "$scratch/source"
tar --exclude=./.git --exclude=./.venv --exclude=./build --exclude='*.so' \
  --exclude=./benchmarks/results -cf - . | tar -xf - -C "$scratch/source"
TORCHALIGNPRUNE_CUDA=1 TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$capability} \
  timeout --foreground 200 "$python" -m pip install --verbose --no-index --no-build-isolation \
  --no-deps --target "$scratch/site" "$scratch/source" > "$out/build.log" 2>&1 || {
  tail -n 40 "$out/build.log"
  echo "gpu.sh: the build failed; all of it is in $out/build.log" >&2
  exit 1
}
echo "-- $((SECONDS - begun)) s"

# From another folder: the package in the working tree has no extension built for this machine.
cd "$scratch" || exit 1
export PYTHONPATH="$scratch/site${PYTHONPATH:+:$PYTHONPATH}" PYTHONDONTWRITEBYTECODE=1
"$python" -m torchalignprune info
"$python" -c '
import sys, torch, torchalignprune
has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
sys.exit(not has_kernel("torchalignprune::select_global", "CUDA"))' || {
  echo "gpu.sh: the extension has no CUDA kernels" >&2
  exit 1
}
failed=0

echo "== tests"
begun=$SECONDS
# Only files with such tests: collecting the others takes time and more packages.
mapfile -t files < <(grep -lE 'mark\.cuda|\bdevice: str' "$root"/tests/test_*.py)
# With -W default warnings of other packages on this machine are no failures.
timeout --foreground -s INT -k 20 240 "$python" -m pytest "${files[@]}" -m cuda -q -W default \
  -p no:cacheprovider --continue-on-collection-errors --durations=10 \
  --junit-xml="$out/tests.xml" 2>&1 |
  tee "$out/tests.log" | tail -n 60
status=${PIPESTATUS[0]}
echo "-- $((SECONDS - begun)) s, exit code $status"
[ "$status" -eq 0 ] || failed=1

echo "== benchmarks"
begun=$SECONDS
timeout --foreground -s INT -k 20 "$((520 - SECONDS > 30 ? 520 - SECONDS : 30))" \
  "$python" -u "$root/benchmarks/gpu.py" --out "$out" --tests "$out/tests.xml" 2>&1 |
  tee "$out/benchmarks.log"
status=${PIPESTATUS[0]}
echo "-- $((SECONDS - begun)) s, exit code $status"
[ "$status" -eq 0 ] || failed=1
exit "$failed"
