"""Kernels that are about to be asked for, compiled by a process of their own while a call waits for
the first of them.

Nothing depends on it but time. Who asks for one of them waits for the lock of the process that
compiles it, takes what it has published, or compiles by itself where that process failed.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from flashcore.jit.build import compiler_installed
from flashcore.jit.cache import KernelCache
from flashcore.jit.kernel import Kernel

_CODE = """
import pickle, sys
from flashcore.jit.prebuild import build_one
folder, target, kernels = pickle.load(sys.stdin.buffer)
for kernel in kernels:
    build_one(kernel, folder, target)  # an error is told by the call that compiles it anew
"""
_running: list[subprocess.Popen[bytes]] = []  # kept, so that they are not left as zombies


def compile_beside(cache: Any, first: Kernel, others: Sequence[Kernel]) -> None:
    """Begin to compile what `cache` lacks of `others`, if it lacks `first` too, and return at once.

    cache: a `KernelCache`; with anything that only stands for one, nothing is done.
    """
    _running[:] = [process for process in _running if process.poll() is None]
    if not isinstance(cache, KernelCache) or len(os.sched_getaffinity(0)) < 2:
        return
    if not compiler_installed() or first in cache.loaded or cache.entry(first) is not None:
        return
    missing = [kernel for kernel in others if kernel != first and cache.entry(kernel) is None]
    if not missing:
        return
    order = pickle.dumps((cache.folder, cache.target, missing))
    paths = os.pathsep.join(path for path in sys.path if path)
    with contextlib.suppress(OSError):  # no process to be had, or gone at once: the call goes on
        process = subprocess.Popen(
            [sys.executable, "-c", _CODE],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": paths},
            start_new_session=True,  # Ctrl-C is for the call that waits
        )
        _running.append(process)
        assert process.stdin is not None
        with process.stdin as pipe:
            pipe.write(order)
