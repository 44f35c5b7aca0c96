"""What a compiled kernel was built for: every field is part of its cache key.

Nothing here imports the CuTe DSL: a machine that only loads kernels may have just its runtime
library, and importing the DSL costs a second.
"""

from __future__ import annotations

import ctypes
import platform
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

HOPPER = "sm_90a"
RUNTIME_LIBRARY = "libcute_dsl_runtime.so"
INSTALL_HINT = "install it with: pip install 'flashcore-attention[gpu]'"

# The wheels are released together under one version, so any of them names the DSL's version; a
# loading machine may have only the runtime library's wheel.
_DSL_WHEELS = ("nvidia-cutlass-dsl", "nvidia-cutlass-dsl-libs-cu13", "nvidia-cutlass-dsl-libs-cu12")


class MissingRuntimeError(RuntimeError):
    """A package that compiling or loading a kernel needs is not installed."""


@dataclass(frozen=True)
class Target:
    """The machine and toolkit a kernel is compiled for.

    The number of SMs is absent on purpose: kernels take it as an argument of each launch.
    """

    arch: str  # GPU architecture, "sm_90a"
    host: str  # processor of the launching code inside the shared object, "x86_64"
    toolkit: str  # flavour of the DSL's wheel that generated the code, "cu12" or "cu13"
    dsl: str  # version of nvidia-cutlass-dsl
    tvm_ffi: str  # version of apache-tvm-ffi, whose ABI the shared object calls


@lru_cache(maxsize=8)
def detect_target(arch: str = HOPPER) -> Target:
    """The target of this machine. Raises MissingRuntimeError naming the package to install."""
    return Target(
        arch=arch,
        host=platform.machine(),
        toolkit=toolkit_flavour(),
        dsl=_version_of(*_DSL_WHEELS),
        tvm_ffi=_version_of("apache-tvm-ffi"),
    )


def toolkit_flavour() -> str:
    """The flavour the DSL itself would choose: the newest installed that the driver can run.

    With no driver (a build machine) that is the newest installed.
    """
    installed = installed_flavours()
    if not installed:
        raise MissingRuntimeError(f"{RUNTIME_LIBRARY} was not found; {INSTALL_HINT}")
    limit = driver_cuda_major()
    usable = [major for major in installed if limit is None or major <= limit]
    if not usable:
        have = ", ".join(f"cu{major}" for major in sorted(installed))
        raise MissingRuntimeError(
            f"the CUDA driver supports CUDA {limit}, but only {have} of the CuTe DSL is installed; "
            "install nvidia-cutlass-dsl without extras for CUDA 12, or update the driver"
        )
    return f"cu{max(usable)}"


def runtime_library(toolkit: str) -> Path:
    """Path of the DSL's runtime library, which every compiled kernel calls."""
    library = installed_flavours().get(int(toolkit.removeprefix("cu")))
    if library is None:
        raise MissingRuntimeError(f"{RUNTIME_LIBRARY} of {toolkit} was not found; {INSTALL_HINT}")
    return library


def installed_flavours() -> dict[int, Path]:
    """CUDA major version -> runtime library, for each installed flavour of the DSL's wheel."""
    spec = find_spec("nvidia_cutlass_dsl")  # a namespace package: finding it runs none of its code
    found: dict[int, Path] = {}
    for root in (spec.submodule_search_locations or ()) if spec else ():
        for library in Path(root).glob(f"cu[0-9]*/lib/{RUNTIME_LIBRARY}"):
            found.setdefault(int(library.parents[1].name.removeprefix("cu")), library)
    return found


def driver_cuda_major() -> int | None:
    """Major CUDA version the installed driver supports, None where there is no driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    number = ctypes.c_int(0)
    if driver.cuDriverGetVersion(ctypes.byref(number)) != 0:
        return None
    return number.value // 1000


def _version_of(*distributions: str) -> str:
    for distribution in distributions:
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    raise MissingRuntimeError(f"{distributions[0]} is not installed; {INSTALL_HINT}")
