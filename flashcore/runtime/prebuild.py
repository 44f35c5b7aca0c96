"""Fill the cache ahead of time: many kernels, several processes, no GPU."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

from flashcore.runtime.cache import KernelCache
from flashcore.runtime.kernel import Kernel
from flashcore.runtime.target import Target


@dataclass(frozen=True)
class Built:
    """What became of one kernel."""

    kernel: Kernel
    compiled: bool  # False: it was in the cache, or it failed
    error: str | None


def prebuild(
    kernels: Sequence[Kernel],
    folder: Path,
    target: Target,
    jobs: int,
    on_done: Callable[[Built], None] = lambda built: None,
) -> list[Built]:
    """Compile what the cache at `folder` lacks; one kernel's failure does not stop the others.

    `on_done` hears of each kernel as it is finished; the result is in the order of `kernels`.
    """
    results: dict[int, Built] = {}
    context = multiprocessing.get_context("spawn")  # the DSL keeps state that must not be forked
    with ProcessPoolExecutor(max_workers=max(1, jobs), mp_context=context) as pool:
        waiting = {
            pool.submit(_build_one, kernel, folder, target): number
            for number, kernel in enumerate(kernels)
        }
        for future in as_completed(waiting):
            number = waiting[future]
            try:
                built = future.result()
            except BrokenProcessPool:  # the compiler crashed, here or in a kernel beside this one
                built = Built(kernels[number], False, "a compiling process died")
            results[number] = built
            on_done(built)
    return [results[number] for number in range(len(kernels))]


def _build_one(kernel: Kernel, folder: Path, target: Target) -> Built:
    cache = KernelCache.open(folder, target)
    try:
        cache.ensure(kernel)
    except Exception as error:  # whatever the compiler raises is reported with its kernel
        return Built(kernel, False, f"{type(error).__name__}: {error}")
    return Built(kernel, cache.compiled > 0, None)
