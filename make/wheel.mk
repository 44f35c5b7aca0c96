# A wheel with the shipped kernels compiled in, in dist/: see tools/wheel.py. URL as for `make dist`.
# Included by the Makefile; uses its PY and DEV_READY.

.PHONY: wheel

wheel: $(DEV_READY)
	$(PY) -m pip install --quiet --disable-pip-version-check "setuptools>=77"
	$(PY) -m tools.wheel $(if $(URL),--url $(URL))
