# The SGLang backend on the CPU, against the oldest and the newest SGLang that it serves.
# Included by the Makefile; uses its PY. SGLang goes into folders of its own, so that nothing of it is
# found by the other tests.

SGLANG_VERSIONS ?= 0.5.16 0.5.23
SGLANG_DIR ?= .venv-sglang
PIP_TARGET = $(PY) -m pip install --quiet --disable-pip-version-check --no-deps --target

.PHONY: test-sglang test-families-gpu

test-sglang: $(SGLANG_VERSIONS:%=test-sglang-%)

test-sglang-%: $(DEV_READY) $(SGLANG_DIR)/deps/.ready $(SGLANG_DIR)/%/.ready
	PYTHONPATH=$(SGLANG_DIR)/$*:$(SGLANG_DIR)/deps OMP_NUM_THREADS=1 $(PY) -m pytest tests/sglang \
		tests/test_append_kernel.py -W ignore

.PRECIOUS: $(SGLANG_DIR)/%/.ready

$(SGLANG_DIR)/deps/.ready: tests/sglang/requirements.txt | $(DEV_READY)
	rm -rf $(@D)
	$(PIP_TARGET) $(@D) -r $<
	touch $@

$(SGLANG_DIR)/%/.ready: | $(DEV_READY)
	rm -rf $(@D)
	$(PIP_TARGET) $(@D) "sglang==$*"
	touch $@

# 22 model families in SGLang's engine, flashcore beside fa3 and triton: 66 engines, several at a
# time, 8 minutes on two GPUs. Apart from `make test-gpu` for that reason.
test-families-gpu: $(DEV_READY)
	$(PY) -m pytest tests/families_gpu
