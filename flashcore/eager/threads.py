"""Tasks of a few short operators on several threads, every operator on one thread.

An operator of 50 to 300 us that torch spreads over its threads spends much of that time waiting for
the slowest of them, and a task is a dozen such operators. A thread that takes whole tasks waits
once, at the end. The threads are those that torch's operators use: after any operator these stay
awake for milliseconds, and threads of our own would have to share the cores with them.
"""

from __future__ import annotations

import ctypes
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple, TypeVar

import torch

from flashcore.eager.workspace import own_buffers, use_buffers

MOST_THREADS = 16
"""Between operators a task holds the interpreter lock, for about a tenth of a decode task."""

Result = TypeVar("Result")


def run_tasks(tasks: Sequence[Callable[[], Result]], threads: int) -> list[Result]:
    """Results of the tasks, in their order; or the first exception, when none runs any more.

    threads: 1, or `usable_threads`; this thread is one of them. Tasks must not depend on each
    other.
    """
    results: list[Result | None] = [None] * len(tasks)
    errors: list[BaseException] = []
    left = deque(enumerate(tasks))  # its popleft is atomic
    inference = torch.is_inference_mode_enabled()
    caller, lent = threading.get_ident(), deque(own_buffers(threads - 1))

    def take_tasks() -> None:
        # Autograd's modes belong to a thread.
        with torch.inference_mode(inference), torch.no_grad():
            while left:
                try:
                    place, task = left.popleft()
                except IndexError:  # another thread was quicker
                    return
                results[place] = task()

    def member(_: int | None) -> None:
        try:
            if threading.get_ident() == caller:
                take_tasks()
            elif left:
                with use_buffers(lent.popleft()):
                    take_tasks()
        except BaseException as error:  # nothing may pass through OpenMP
            errors.append(error)
            left.clear()

    if threads == 1 or len(tasks) == 1:
        member(None)
    else:
        openmp = _openmp()
        assert openmp is not None
        # Of the size of torch's teams: between teams of different sizes threads end and start.
        openmp.parallel(openmp.function(member), None, threads, 0)
    if errors:
        raise errors[0]
    return results  # type: ignore[return-value]  # every place is filled


def usable_threads() -> int:
    """Threads for `run_tasks`: torch's number; 1 if there are too many or we cannot have them."""
    threads = torch.get_num_threads()
    return threads if threads <= MOST_THREADS and _openmp() is not None else 1


@contextmanager
def one_thread_an_operator() -> Iterator[None]:
    """For operators that this thread calls inside; where that cannot be set, as before.

    For small ones too: some wake torch's threads for a few thousand numbers.
    """
    openmp = _openmp()
    if openmp is None:
        yield
        return
    # Asking first matters: it is where torch sets up a new thread, which would undo what follows.
    before = torch.get_num_threads()
    openmp.set_threads(1)
    mkl_before = openmp.set_mkl_threads(1) if openmp.set_mkl_threads is not None else 0
    try:
        yield
    finally:
        openmp.set_threads(before)
        if openmp.set_mkl_threads is not None:
            openmp.set_mkl_threads(mkl_before)


class _OpenMP(NamedTuple):
    """What torch's own OpenMP runtime, and MKL, offer."""

    function: Any  # of the members of a team, called with a pointer that nobody uses
    parallel: Callable[..., None]  # (function, pointer, threads, flags): what compilers call
    set_threads: Callable[[int], None]  # for the calling thread alone
    set_mkl_threads: Callable[[int], int] | None  # likewise; returns what was set before


@cache
def _openmp() -> _OpenMP | None:
    """None where torch comes without OpenMP, or hides it.

    `torch.set_num_threads` also sets the number for threads that start later; OpenMP's own
    function, from whose number torch reads its own, concerns the calling thread only. MKL's number
    comes before OpenMP's once torch's has been set.
    """
    path = torch._C.__file__  # what is looked up is found in the libraries it is linked with
    waiting, quick = ctypes.CDLL(path), ctypes.PyDLL(path)  # without and with the interpreter lock
    try:
        parallel, set_threads = waiting.GOMP_parallel, quick.omp_set_num_threads
    except AttributeError:
        return None
    function = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
    parallel.argtypes = [function, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    set_threads.argtypes = [ctypes.c_int]
    parallel.restype = set_threads.restype = None
    set_mkl = getattr(quick, "MKL_Set_Num_Threads_Local", None)
    if set_mkl is not None:
        set_mkl.argtypes, set_mkl.restype = [ctypes.c_int], ctypes.c_int
    before = torch.get_num_threads()
    set_threads(1)
    effective = torch.get_num_threads() == 1
    set_threads(before)
    return _OpenMP(function, parallel, set_threads, set_mkl) if effective else None
