"""A kernel family that compiles with the C compiler, so that cache tests take milliseconds.

Its shared objects speak the same calling convention as the real ones and are loaded by the same
loader; the function returns `value` of its configuration.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest

from flashcore.jit.inspect import find_tool
from flashcore.jit.kernel import Family
from flashcore.jit.target import MissingRuntimeError, Target

TESTS = Path(__file__).resolve().parent
COMPILE_LOG = "FLASHCORE_TEST_COMPILE_LOG"  # a file that gets one line for each compilation

TARGET = Target(arch="sm_90a", host="x86_64", toolkit="cu13", dsl="4.8.1", tvm_ffi="0.1.11")


def _needs(present: bool, reason: str) -> pytest.MarkDecorator:
    """Skip where a package is missing, but not in CI: a gate that never ran must not look green."""
    return pytest.mark.skipif(not present and not os.environ.get("CI"), reason=reason)


def _has_tool(name: str) -> bool:
    try:
        return bool(find_tool(name))
    except MissingRuntimeError:
        return False


needs_loader = _needs(
    find_spec("tvm_ffi") is not None
    and find_spec("nvidia_cutlass_dsl") is not None
    and shutil.which("gcc") is not None,
    "needs apache-tvm-ffi, the CuTe DSL's runtime library and gcc",
)
needs_dsl = _needs(
    find_spec("cutlass") is not None and find_spec("tvm_ffi") is not None,
    "needs the CuTe DSL (extra gpu)",
)
needs_disassembler = _needs(
    _has_tool("nvdisasm") and _has_tool("cuobjdump"),
    "needs nvidia-cuda-nvdisasm and nvidia-cuda-cuobjdump",
)

_SOURCE = """
#include <stdint.h>
typedef struct {{ int32_t type_index; uint32_t pad; int64_t value; }} Any;
__attribute__((visibility("default")))
int32_t __tvm_ffi_{symbol}(void* self, const Any* args, int32_t count, Any* result) {{
    result->type_index = 1; /* kTVMFFIInt */
    result->value = {value};
    return 0;
}}
"""


@dataclass(frozen=True)
class ConstantConfig:
    value: int = 7
    broken: bool = False  # the compiler raises
    crash: bool = False  # the compiler ends the process
    unloadable: bool = False  # the shared object wants a symbol that nothing has


class CompiledConstant:
    """What a compile function returns, as far as the runtime uses it."""

    ir_module = ""

    def __init__(self, config: ConstantConfig) -> None:
        self._config = config

    def export_to_c(self, object_file_path: str, function_name: str) -> None:
        source = Path(object_file_path).with_suffix(".c")
        text = _SOURCE.format(symbol=function_name, value=self._config.value)
        if self._config.unloadable:
            text += "extern int nowhere(void); int (*keep)(void) = nowhere;\n"
        source.write_text(text)
        subprocess.run(["gcc", "-c", "-fPIC", "-o", object_file_path, str(source)], check=True)


def compile_constant(config: ConstantConfig, options: str = "") -> CompiledConstant:
    if log := os.environ.get(COMPILE_LOG):
        with open(log, "a") as file:
            file.write(f"{os.getpid()} {config.value}\n")
    if config.crash:
        os._exit(9)
    if config.broken:
        raise ValueError("this configuration cannot be compiled")
    return CompiledConstant(config)


CONSTANT = Family("constant", "tests.runtime_fixtures:compile_constant", root=TESTS.parent)
TILE = Family(
    "tile",
    "tests.toy_kernels:compile_tile",
    root=TESTS.parent,
)
