"""Compile a kernel and link it into a shared object: needs the CuTe DSL and a linker, no GPU."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from flashcore.jit.entry import pack
from flashcore.jit.kernel import Kernel, symbol_of
from flashcore.jit.sources import source_digest
from flashcore.jit.target import INSTALL_HINT, MissingRuntimeError, Target

# The plain linkers first: they need no C library headers or start files.
LINKERS = ("ld", "ld.lld", "gcc", "cc", "clang")

# cudaLaunchConfig_t as it stands in the host code's LLVM dialect; its field 2 is the dynamic
# shared memory. The cubin does not hold that number: it is an argument of the launch.
_LAUNCH_FIELD = re.compile(
    r"(%\w+) = llvm\.getelementptr %\w+\[0, 2\] : .*"
    r"struct<\(array<3 x i32>, array<3 x i32>, i64, ptr, ptr, i32\)>"
)


class BuildError(RuntimeError):
    """Compiling or linking a kernel failed."""


def compiler_installed() -> bool:
    """Whether kernels can be compiled here; nothing is imported to see it."""
    return find_spec("cutlass") is not None and find_spec("tvm_ffi") is not None


def build_entry(kernel: Kernel, target: Target, key: str) -> bytes:
    """Compile `kernel` for `target` and return the bytes of its cache entry."""
    with pinned_arch(target.arch):
        try:
            compiler = kernel.family.resolve_compiler()
            # An option, since the DSL read the variable if another library imported it before.
            compiled = compiler(kernel.config, options=f"--gpu-arch {target.arch}")
        except ModuleNotFoundError as error:
            if (error.name or "").split(".")[0] not in ("cutlass", "tvm_ffi"):
                raise
            raise MissingRuntimeError(
                f"compiling the kernel {kernel.describe()!r} needs {error.name}, which is not "
                f"installed (nor is that kernel among those installed with flashcore); "
                f"{INSTALL_HINT}"
            ) from error
        symbol = symbol_of(kernel, key)
        with tempfile.TemporaryDirectory(prefix="flashcore-") as scratch:
            shared_object = link(compiled, symbol, Path(scratch)).read_bytes()
    facts = {
        "symbol": symbol,
        "key": key,
        "kernel": kernel.describe(),
        "family": kernel.family.name,
        "sources": source_digest(kernel.family.module, kernel.family.root),
        "target": asdict(target),
        "dynamic_smem_bytes": dynamic_smem_bytes(str(compiled.ir_module)),
    }
    return pack(shared_object, facts)


def link(compiled: Any, symbol: str, scratch: Path) -> Path:
    """Export `compiled` as the function `symbol` of a shared object in `scratch`."""
    objects, shared_object = scratch / "kernel.o", scratch / "kernel.so"
    compiled.export_to_c(str(objects), function_name=symbol)
    command = [*linker_command(), "-o", str(shared_object), str(objects)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BuildError(f"linking failed: {' '.join(command)}\n{done.stderr.strip()}")
    return shared_object


def linker_command() -> list[str]:
    """The linker of this machine with its flags. Raises BuildError when there is none."""
    for name in LINKERS:
        if path := shutil.which(name):
            break
    else:
        raise BuildError(
            f"no linker on PATH (looked for {', '.join(LINKERS)}); "
            "install binutils, e.g. apt-get install binutils"
        )
    # The generated object does not say that its stack need not be executable, and hardened systems
    # refuse to open a library that might want one.
    flags = ["-z", "noexecstack", "-Bsymbolic"]
    if name.startswith("ld"):
        return [path, "-shared", *flags]
    return [path, "-shared", "-Wl,-z,noexecstack", "-Wl,-Bsymbolic"]


@contextmanager
def pinned_arch(arch: str) -> Iterator[None]:
    """Set the DSL's default target for the block, so that it looks for no GPU at its import."""
    before = os.environ.get("CUTE_DSL_ARCH")
    os.environ["CUTE_DSL_ARCH"] = arch
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("CUTE_DSL_ARCH", None)
        else:
            os.environ["CUTE_DSL_ARCH"] = before


def dynamic_smem_bytes(host_code: str) -> int | None:
    """Largest dynamic shared memory of the launches in a compiled function's LLVM dialect.

    None where it is not a constant of the code.
    """
    sizes = []
    for function in host_code.split("llvm.func ")[1:]:  # value names are unique per function only
        for pointer in _LAUNCH_FIELD.findall(function):
            stored = re.search(rf"llvm\.store (%\w+), {re.escape(pointer)} : i64", function)
            if not stored:
                continue
            value = re.escape(stored.group(1))
            constant = re.search(rf"{value} = llvm\.mlir\.constant\((\d+) : i64\)", function)
            if constant:
                sizes.append(int(constant.group(1)))
    return max(sizes, default=None)
