"""Other functions in the place of compiled kernels, for as long as a block runs.

Launches keep the functions that they have once got, so those are put aside with the cache.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from flashcore.cli.check.judge import SelfTest, Setting
from flashcore.jit.cache import KernelCache
from flashcore.jit.kernel import Kernel
from flashcore.remembered import Remembered

Wrap = Callable[[Kernel, Any], Any]  # a kernel and its function (None if it is not wanted)


class _Replaced:
    """In place of the process's `KernelCache`, as far as launches use it."""

    def __init__(self, wrap: Wrap, cache: KernelCache | None) -> None:
        self._wrap, self._cache = wrap, cache

    def function(self, kernel: Kernel) -> Any:
        real = None if self._cache is None else self._cache.function(kernel)
        return self._wrap(kernel, real)

    def entry(self, kernel: Kernel) -> bool:
        return True


@contextmanager
def functions_from(wrap: Wrap, cache: KernelCache | None) -> Iterator[None]:
    """Every compiled function that a launch asks for is `wrap(kernel, function of the cache)`."""
    from flashcore import api
    from flashcore.jit import cache as jit_cache
    from flashcore.sm90.launch import dense, paged, pager, planner

    fresh: list[tuple[ModuleType, str, Any]] = [
        (jit_cache, "_shared", _Replaced(wrap, cache)),
        (api, "_dense_launches", Remembered(4096)),
        (dense, "_plans", Remembered(4096)),
        *((module, "_functions", {}) for module in (paged, pager, planner)),
    ]
    before = [(module, name, getattr(module, name)) for module, name, _ in fresh]
    try:
        for module, name, value in fresh:
            setattr(module, name, value)
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


def kernels_of(tests: Sequence[SelfTest], setting: Setting) -> dict[str, list[Kernel]]:
    """The kernels that each test asks for: its launches run with functions that do nothing. A
    launch that fails here fails again in earnest, where it is told."""
    noted: dict[Kernel, None] = {}

    def note(kernel: Kernel, _: Any) -> Any:
        noted[kernel] = None
        return lambda *arguments: None

    found = {}
    for test in tests:
        noted.clear()
        with functions_from(note, None), contextlib.suppress(Exception):
            test.launch(setting)
        found[test.name] = list(noted)
    return found
