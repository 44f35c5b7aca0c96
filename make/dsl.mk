# The oldest CuTe DSL that the kernels must compile with, beside the newest one in $(VENV).
# Included by the Makefile; uses its PYTHON.

DSL_OLD ?= 4.6.0
DSL_OLD_VENV ?= .venv-dsl-$(DSL_OLD)

.PHONY: test-dsl-old

test-dsl-old: $(DSL_OLD_VENV)/.ready
	$(DSL_OLD_VENV)/bin/python tools/gate_subset.py

$(DSL_OLD_VENV)/.ready: make/dsl.mk
	$(PYTHON) -m venv $(DSL_OLD_VENV)
	$(DSL_OLD_VENV)/bin/python -m pip install --quiet --disable-pip-version-check \
		"nvidia-cutlass-dsl[cu13]==$(DSL_OLD)" "apache-tvm-ffi>=0.1.11,<0.2" \
		nvidia-cuda-nvdisasm nvidia-cuda-cuobjdump
	touch $@
