"""A test that loads a kernel which `launched` does not name for it says so."""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from flashcore.jit import cache
from tests.gpu.launched import kernels_of_test

# References are computed on the CPU: processes side by side with a thread for each core wait for
# each other, so that a minute's tests take ten.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _loads_what_is_named(request: pytest.FixtureRequest) -> Iterator[None]:
    before = _loaded()
    yield
    if new := _loaded() - before:
        taken = inspect.signature(request.function).parameters.keys()
        given: dict[str, Any] = getattr(getattr(request.node, "callspec", None), "params", {})
        parameters = {name: given[name] for name in given if name in taken}
        named = kernels_of_test(request.path.stem, request.function.__name__, parameters)
        for kernel in sorted(k.describe() for k in new.difference(named or ())):
            warnings.warn(f"tests/gpu/launched.py does not name {kernel}", stacklevel=2)


def _loaded() -> set[Any]:
    """Of the cache, if there is one yet and no test has put another in its place."""
    return set(getattr(cache._shared, "loaded", ()))
