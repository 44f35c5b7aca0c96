# The integration of transformers on the CPU, with the oldest and the newest version that it serves.
# Included by the Makefile; uses its PY. Each goes into a folder of its own, so that nothing of it is
# found by the other tests; numpy is the environment's.

TRANSFORMERS_VERSIONS ?= 4.56.0 5.24.0
TRANSFORMERS_DIR ?= .venv-transformers

.PHONY: test-transformers

test-transformers: $(TRANSFORMERS_VERSIONS:%=test-transformers-%)

test-transformers-%: $(DEV_READY) $(TRANSFORMERS_DIR)/%/.ready
	PYTHONPATH=$(TRANSFORMERS_DIR)/$* OMP_NUM_THREADS=1 $(PY) -m pytest tests/transformers -W ignore

.PRECIOUS: $(TRANSFORMERS_DIR)/%/.ready

$(TRANSFORMERS_DIR)/%/.ready: | $(DEV_READY)
	rm -rf $(@D)
	$(PY) -m pip install --quiet --disable-pip-version-check --target $(@D) "transformers==$*"
	rm -rf $(@D)/numpy $(@D)/numpy-* $(@D)/numpy.libs
	touch $@
