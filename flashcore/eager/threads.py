"""Tasks of a few short operators on several threads, every operator on one thread.

An operator of 50 to 300 us that torch spreads over its threads spends much of that time waiting for
the slowest of them, and a task is a dozen such operators. A thread that takes whole tasks waits
once, at the end.
"""

from __future__ import annotations

import ctypes
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple, TypeVar

import torch

MOST_THREADS = 8
"""Between operators a task holds the interpreter lock: about a tenth of a decode task."""

Result = TypeVar("Result")


def run_tasks(tasks: Sequence[Callable[[], Result]], threads: int) -> list[Result]:
    """Results of the tasks, in their order; or the first exception, when none runs any more.

    threads: at most `usable_threads`; this thread is one of them. Tasks must not depend on each
    other.
    """
    results: list[Result | None] = [None] * len(tasks)
    left = deque(enumerate(tasks))  # its popleft is atomic
    inference = torch.is_inference_mode_enabled()

    def work() -> None:
        # Autograd's modes belong to a thread.
        with torch.inference_mode(inference), torch.no_grad(), one_thread_an_operator():
            while left:
                try:
                    place, task = left.popleft()
                except IndexError:  # another thread was quicker
                    return
                results[place] = task()

    helpers = _start(work, min(threads, len(tasks)) - 1)
    try:
        work()
    finally:
        left.clear()
        # One that has not begun (other callers keep the pool busy) has nothing left to do.
        begun = [helper for helper in helpers if not helper.cancel()]
        errors = [helper.exception() for helper in begun]
    for error in errors:
        if error is not None:
            raise error
    return results  # type: ignore[return-value]  # every place is filled


@contextmanager
def one_thread_an_operator() -> Iterator[None]:
    """For operators that this thread calls inside; where that cannot be set, as before.

    For small ones too: some wake torch's threads for a few thousand numbers.
    """
    setters = _setters()
    if setters is None:
        yield
        return
    # Asking first matters: it is where torch sets up a new thread, which would undo what follows.
    before = torch.get_num_threads()
    setters.openmp(1)
    mkl_before = setters.mkl(1) if setters.mkl is not None else 0
    try:
        yield
    finally:
        setters.openmp(before)
        if setters.mkl is not None:
            setters.mkl(mkl_before)


def usable_threads() -> int:
    """Threads that `run_tasks` may use: torch's number, if it can be set for a thread alone."""
    threads = min(torch.get_num_threads(), MOST_THREADS)
    return threads if threads > 1 and _setters() is not None else 1


def _start(work: Callable[[], None], count: int) -> list[Future[None]]:
    pool = _pool(os.getpid())
    try:
        return [pool.submit(work) for _ in range(count)]
    except RuntimeError:  # the interpreter is shutting down: the caller does it alone
        return []


@cache
def _pool(process: int) -> ThreadPoolExecutor:
    """Of this process: a forked one has none of its parent's threads. Threads start when needed."""
    return ThreadPoolExecutor(MOST_THREADS - 1, thread_name_prefix="flashcore")


class _Setters(NamedTuple):
    openmp: Callable[[int], None]
    mkl: Callable[[int], int] | None  # returns what was set before


@cache
def _setters() -> _Setters | None:
    """How the number of threads is set for the calling thread alone; None if it cannot be.

    `torch.set_num_threads` also sets it for threads that start later. OpenMP's omp_set_num_threads
    concerns the calling thread only, and is what torch's number is read from; so does MKL's
    function, whose number comes before OpenMP's once torch's has been set.
    """
    library = ctypes.PyDLL(torch._C.__file__)  # finds what torch itself is linked with
    try:
        openmp = library.omp_set_num_threads
    except AttributeError:
        return None
    openmp.argtypes, openmp.restype = [ctypes.c_int], None
    mkl = getattr(library, "MKL_Set_Num_Threads_Local", None)
    if mkl is not None:
        mkl.argtypes, mkl.restype = [ctypes.c_int], ctypes.c_int
    before = torch.get_num_threads()
    openmp(1)
    effective = torch.get_num_threads() == 1
    openmp(before)
    return _Setters(openmp, mkl) if effective else None
