"""Fill the cache ahead of time: many kernels, several processes, no GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from flashcore.jit.cache import KernelCache
from flashcore.jit.kernel import Kernel
from flashcore.jit.target import Target
from flashcore.jit.workers import run_all


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
    build = partial(build_one, folder=folder, target=target)
    return run_all(build, kernels, jobs, _crashed, on_done)


def _crashed(kernel: Kernel) -> Built:
    return Built(kernel, False, "a compiling process died")  # its own, or one beside it


def build_one(kernel: Kernel, folder: Path, target: Target) -> Built:
    """Compile one kernel if the cache at `folder` lacks it; what goes wrong is in the result."""
    cache = KernelCache.open(folder, target)
    try:
        cache.ensure(kernel)
    except Exception as error:  # whatever the compiler raises is reported with its kernel
        return Built(kernel, False, f"{type(error).__name__}: {error}")
    return Built(kernel, cache.compiled > 0, None)
