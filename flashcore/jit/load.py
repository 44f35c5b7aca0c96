"""Open a compiled kernel. Imports apache-tvm-ffi and never the CuTe DSL."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from flashcore.jit.target import INSTALL_HINT, MissingRuntimeError, runtime_library

CompiledFunction = Callable[..., Any]


def load_function(path: Path, symbol: str, toolkit: str) -> CompiledFunction:
    """The function `symbol` of the shared object at `path`, ready to call with torch tensors.

    Raises OSError or RuntimeError when the file cannot be opened, MissingRuntimeError when
    apache-tvm-ffi or the DSL's runtime library is not installed.
    """
    try:
        from tvm_ffi import load_module
    except ModuleNotFoundError as error:
        raise MissingRuntimeError(f"apache-tvm-ffi is not installed; {INSTALL_HINT}") from error
    open_runtime_library(toolkit)
    # tvm-ffi looks functions up at their first call, where a missing one ends the process.
    ctypes.CDLL(str(path), mode=os.RTLD_NOW | os.RTLD_LOCAL)
    function: CompiledFunction = load_module(str(path))[symbol]
    return function


def prepared(tensor: Any) -> Any:
    """`tensor` as an argument that is passed again and again: most of what it costs is paid here.

    The tensor itself where it lies on no GPU, and where torch is too old to hand it over without
    waiting for streams. A compiled function runs on the stream that is current for a torch tensor
    among its arguments, so one argument must stay one.
    """
    if tensor is None or not tensor.is_cuda or not hasattr(tensor, "__dlpack_c_exchange_api__"):
        return tensor
    from tvm_ffi import from_dlpack

    return from_dlpack(tensor)


@lru_cache(maxsize=4)
def open_runtime_library(toolkit: str) -> ctypes.CDLL:
    """Open the DSL's runtime library for the whole process; kernels leave its symbols undefined."""
    return ctypes.CDLL(str(runtime_library(toolkit)), mode=ctypes.RTLD_GLOBAL)
