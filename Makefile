# make demo, make test: set up what they need in .venv, then run. On a machine with an NVIDIA GPU the
# same two install the GPU path as well. To use a Python that has everything: make test PY=python3

VENV ?= .venv
PYTHON ?= python3
PY ?= $(VENV)/bin/python

# Where a GPU answers, torch comes with CUDA and in whatever version is current; elsewhere one version
# is pinned, which keeps the set-up reproducible.
HAS_GPU := $(shell nvidia-smi -L >/dev/null 2>&1 && echo yes)
TORCH := $(if $(HAS_GPU),torch,torch==2.13.0)

ifeq ($(filter command line environment,$(origin PY)),)
READY := $(VENV)/.ready
DEV_READY := $(VENV)/.dev-ready
endif

.PHONY: demo test test-gpu gpu-test-kernels sanitize-gpu lint types bench-cpu dist clean

include make/dsl.mk
include make/sglang.mk
include make/transformers.mk
include make/vllm.mk
include make/wheel.mk

# One for each core, up to 8: the longest test is a pool of processes itself.
TEST_PROCESSES ?= $(shell n=$$(nproc 2>/dev/null || echo 2); echo $$((n < 8 ? n : 8)))

# Each in one process or two, with a thread each: side by side.
CI_TESTS = test-dsl-old test-sglang test-transformers test-vllm

demo: $(READY)
	$(PY) -m flashcore demo

test: $(DEV_READY) lint types
	OMP_NUM_THREADS=1 $(PY) -m pytest tests --ignore=tests/gpu --ignore=tests/families_gpu \
		-n $(TEST_PROCESSES) --dist worksteal
	$(if $(CI),$(MAKE) -j$(TEST_PROCESSES) --output-sync=target $(CI_TESTS))
	$(if $(HAS_GPU),$(MAKE) test-gpu)

# Kernels are compiled at first use unless `make gpu-test-kernels` has done so, on this machine or on
# one without a GPU; hence several processes. Those that import SGLang, where it is installed, take
# half a minute to do so and are fewer.
GPU_TEST_PROCESSES ?= 8
SGLANG_TEST_PROCESSES ?= 4
GPU_TEST = OMP_NUM_THREADS=1 $(PY) -m pytest
SGLANG_GPU_TESTS = tests/gpu/test_sglang_gpu.py

test-gpu: $(DEV_READY)
	$(GPU_TEST) tests/gpu --ignore=$(SGLANG_GPU_TESTS) -n $(GPU_TEST_PROCESSES)
	if $(PY) -c "import importlib.util as u; exit(u.find_spec('sglang') is None)"; then \
		$(GPU_TEST) $(SGLANG_GPU_TESTS) -n $(SGLANG_TEST_PROCESSES); fi

gpu-test-kernels: $(DEV_READY)
	$(PY) tools/gpu_test_kernels.py

# memcheck and racecheck on a small choice of the GPU tests.
sanitize-gpu: $(DEV_READY)
	$(PY) tools/sanitize.py

lint: $(DEV_READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

types: $(DEV_READY)
	$(PY) -m mypy

# The figures of the CPU table in docs/results.md; takes a few minutes, wants an idle machine.
bench-cpu: $(DEV_READY)
	$(PY) benchmarks/cpu.py

$(VENV)/.ready: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 10) else "flashcore needs Python \
	3.10 or newer, this is %d.%d: make PYTHON=python3.12 ..." % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -e ".$(if $(HAS_GPU),[gpu])"
	touch $@

$(VENV)/.dev-ready: $(VENV)/.ready
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -e ".[dev,gpu]"
	touch $@

# sdist and wheel, in dist/. URL, of the repository: what links of the README and the project's own lead to.
dist: $(DEV_READY)
	rm -rf dist build/stage
	$(PY) -m pip install --quiet --disable-pip-version-check build
	$(PY) -m tools.index_page $(if $(URL),--url $(URL)) build/stage
	$(PY) -m build --quiet --outdir dist build/stage
	rm -rf build/stage

clean:
	rm -rf $(VENV) $(DSL_OLD_VENV) $(SGLANG_DIR) $(TRANSFORMERS_DIR) $(VLLM_DIR) build dist *.egg-info \
		.pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.venv*' -prune -exec rm -rf {} +
