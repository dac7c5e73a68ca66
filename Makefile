# The targets make a virtual environment in .venv, once, with the versions of requirements.txt. They
# need only make, a C++ compiler, and Python with its headers and venv.
#
#   make demo         prune a real pretrained encoder by every method and compare them; prune it
#                     once more into a folder, load that again and report on it; then see what
#                     pruning does to languages: to made-up ones, with a tiny encoder that is
#                     pretrained on the spot, and to real ones, with the miniature
#   make test         the tests
#   make lint         style and types
#   make cuda-syntax  compile the CUDA sources, without linking them, where nvcc is found
#   make sanitize     the operators' tests, with the extension and the kernels of the emulated GPU
#                     compiled by GCC with sanitizers, which stop at wrong memory accesses; slow
#   make bench        the benchmarks, without zero_shot.py, which needs hours and data
#   make clean        remove everything that these made
#
# PYTHON     the interpreter to make the environment with
# TORCH      the release of torch to install instead of the pinned one
# WORKERS    how many processes share the tests
# ARGS       what to add to the command that a target runs: in the demo to the first one; to those
#            with the made-up languages and the miniature add ZERO_SHOT_ARGS and MINI_ARGS
# ISOLATION  empty: compile in an environment of pip's own, as plain `pip install -e .` does, which
#            fetches the build requirements each time
PYTHON ?= python3
TORCH ?= $(shell grep '^torch==' requirements.txt)
WORKERS ?= 2
ISOLATION ?= --no-build-isolation

VENV := .venv
BIN := $(VENV)/bin
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2> /dev/null)
# The environment is made anew when the pins, TORCH or the version of PYTHON change; the extension
# is compiled again when its sources change.
INSTALLED := $(VENV)/installed-$(VERSION)-$(subst /,_,$(TORCH))
COMPILED := $(VENV)/compiled
SOURCES := $(wildcard csrc/*.* csrc/cpu/*.* csrc/cuda/*.*)
TEST_SOURCES := $(wildcard tests/*.cpp) $(shell find tests/cuda_headers -type f)

.PHONY: demo test lint cuda-syntax sanitize bench clean

demo: $(COMPILED)
	$(BIN)/torchalignprune demo --out build/demo $(ARGS)
	$(BIN)/torchalignprune prune "$$($(BIN)/python -c 'from torchalignprune.demo import \
	  encoder_folder; print(encoder_folder())')" --sparsity 0.5 --out build/demo/pruned --overwrite
	$(BIN)/python examples/zero_shot_pruning.py --out build/demo/zero_shot $(ZERO_SHOT_ARGS)
	$(BIN)/python examples/mini_xlmr_pruning.py --out build/demo/mini_xlmr $(MINI_ARGS)

# Waiting threads sleep, so that one worker's do not take the cores from another's.
test: $(COMPILED)
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

lint: $(COMPILED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(SOURCES) $(TEST_SOURCES)

# Without checks of stacks, which the emulated GPU's threads switch.
SANITIZERS := -fsanitize=address,undefined -fno-sanitize-recover=undefined --param=asan-stack=0
OPERATORS := apply_mask zero_pruned select_global select_rows select_shards square_sums unit_products \
  cosine_gains greedy_match bitmask encode_words emulated_cuda

sanitize: $(COMPILED)
	rm -rf build/sanitized
	mkdir -p build/sanitized
	git ls-files -z | xargs -0 cp --parents -t build/sanitized
	printf '#!/bin/sh\nexec c++ $(SANITIZERS) "$$@"\n' > build/sanitized/sanitizing-c++
	chmod +x build/sanitized/sanitizing-c++
	cd build/sanitized && PATH="$$PWD:$$PATH" CXX=sanitizing-c++ \
	  ../../$(BIN)/python setup.py --quiet build_ext --inplace
	cd build/sanitized && PATH="$$PWD:$$PATH" CXX=sanitizing-c++ PYTHONPATH="$$PWD" \
	  OMP_WAIT_POLICY=passive \
	  LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS="detect_leaks=0:use_sigaltstack=0:log_path='$$PWD/report'" \
	  UBSAN_OPTIONS="print_stacktrace=1:log_path='$$PWD/report'" \
	  ../../$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal \
	  $(patsubst %,tests/test_%.py,$(OPERATORS)) $(ARGS) || { cat report.*; exit 1; }

bench: $(COMPILED)
	set -e; for script in $(filter-out %/common.py %/gpu.py %/sentences.py %/zero_shot%,$(wildcard benchmarks/*.py)); do \
	  echo "== $$script"; $(BIN)/python $$script; done

clean:
	rm -rf $(VENV) build dist torchalignprune.egg-info
	rm -rf .hypothesis .mypy_cache .pytest_cache .ruff_cache
	rm -f torchalignprune/_build.py torchalignprune/_C.*.so

$(INSTALLED): requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 14))' || { \
	  echo "Python 3.10 to 3.14 is needed, and $(PYTHON) is none of them." \
	    "Name another one: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, os, sys, sysconfig; \
	  sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' 2> /dev/null || { \
	  echo "Python's headers and its venv are needed, and $(PYTHON) lacks one of them." \
	    "Debian, Ubuntu: apt-get install python3-dev python3-venv" >&2; exit 1; }
	@compiler=$${CXX:-c++}; command -v $${compiler%% *} > /dev/null || { \
	  echo "A C++ compiler is needed, and $$compiler was not found." \
	    "Debian, Ubuntu: apt-get install g++" >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	grep -v '^torch==' requirements.txt > $(VENV)/requirements.txt
	$(BIN)/python -m pip install --no-compile '$(TORCH)' -r $(VENV)/requirements.txt
	touch '$@'

$(COMPILED): $(INSTALLED) $(SOURCES) setup.py pyproject.toml
	$(BIN)/python -m pip install --no-deps $(ISOLATION) -e .
	touch $@

ifeq ($(shell command -v nvcc),)
cuda-syntax:
	@echo "nvcc was not found: the CUDA sources were not compiled"
else
cuda-syntax: $(patsubst csrc/cuda/%,$(VENV)/cuda/%.o,$(wildcard csrc/cuda/*.cu csrc/cuda/*.cpp))
endif

# As C++17, like the extensions that torch 2.11 compiles.
NVCC := nvcc -c -O3 --fmad=false -std=c++17 -arch=sm_90 -Werror all-warnings -Xcompiler -Wall,-Werror

$(VENV)/cuda/%.cu.o: csrc/cuda/%.cu $(wildcard csrc/*.h csrc/cuda/*.*h) | $(COMPILED)
	@mkdir -p $(@D)
	$(NVCC) $< -o $@

# A torch without CUDA has all headers that this includes, except that of its CUDA configuration.
$(VENV)/cuda/%.cpp.o: csrc/cuda/%.cpp $(wildcard csrc/*.h csrc/cuda/*.*h) | $(COMPILED)
	@mkdir -p $(@D)
	$(NVCC) -DC10_CUDA_NO_CMAKE_CONFIGURE_FILE $$($(BIN)/python -c \
	  'from os.path import relpath; from torch.utils.cpp_extension import include_paths; \
	  print(*("-isystem=" + relpath(path) for path in include_paths("cpu")))') $< -o $@
