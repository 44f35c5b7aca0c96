"""What the GPU will execute: registers, stack, shared memory and opcodes of a compiled kernel.

Works on a cache entry alone. Needs cuobjdump and nvdisasm (packages nvidia-cuda-cuobjdump and
nvidia-cuda-nvdisasm), and neither a GPU nor the CuTe DSL.
"""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from flashcore.jit.entry import Entry
from flashcore.jit.target import MissingRuntimeError

_ELF64_LITTLE_ENDIAN = b"\x7fELF\x02\x01"
_ELF_HEADER_BYTES = 64
_EM_CUDA = 190
_OPCODE = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Za-z0-9_.]+)", re.MULTILINE)
_TARGET = re.compile(r"^\s*\.target\s+(\w+)", re.MULTILINE)
_RESOURCE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)")


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes: the largest of its functions, opcodes of all of them."""

    registers: int  # at launch, before warpgroups trade registers
    stack_bytes: int
    static_smem_bytes: int
    dynamic_smem_bytes: int | None  # None: not known to the host code at compile time
    opcodes: dict[str, int]  # full SASS mnemonic -> number of instructions
    arch: str  # "sm_90a"; several, joined by a comma, where the binaries differ

    def count(self, *prefixes: str) -> int:
        """Instructions whose mnemonic is one of `prefixes` or continues one with a dot."""
        return sum(
            number
            for opcode, number in self.opcodes.items()
            if any(opcode == prefix or opcode.startswith(prefix + ".") for prefix in prefixes)
        )


def inspect_entry(entry: Entry) -> Resources:
    """Resources of a cache entry. Raises ValueError when it holds no GPU code."""
    cubins = extract_cubins(entry.shared_object)
    if not cubins:
        raise ValueError(f"no GPU code in the shared object of {entry.facts.get('kernel')}")
    return inspect_cubins(cubins, entry.facts.get("dynamic_smem_bytes"))


def inspect_cubins(cubins: list[bytes], dynamic_smem_bytes: int | None) -> Resources:
    """Resources of GPU binaries; `dynamic_smem_bytes` comes from the code that launches them."""
    usage: list[tuple[int, int, int]] = []
    opcodes: Counter[str] = Counter()
    targets: set[str] = set()
    with tempfile.TemporaryDirectory(prefix="flashcore-") as scratch:
        for number, cubin in enumerate(cubins):
            path = Path(scratch) / f"{number}.cubin"
            path.write_bytes(cubin)
            report = _run("cuobjdump", "-res-usage", str(path))
            usage += [(int(r), int(s), int(m)) for r, s, m in _RESOURCE.findall(report)]
            sass = disassemble(cubin)
            opcodes.update(_OPCODE.findall(sass))
            targets.update(_TARGET.findall(sass))
    if not usage:
        raise ValueError("cuobjdump reported no function")
    return Resources(
        registers=max(u[0] for u in usage),
        stack_bytes=max(u[1] for u in usage),
        static_smem_bytes=max(u[2] for u in usage),
        dynamic_smem_bytes=dynamic_smem_bytes,
        opcodes=dict(opcodes),
        arch=",".join(sorted(targets)),
    )


def disassemble(cubin: bytes) -> str:
    """The machine code of a GPU binary as text."""
    with tempfile.NamedTemporaryFile(prefix="flashcore-", suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return _run("nvdisasm", "-c", file.name)


def extract_cubins(shared_object: bytes) -> list[bytes]:
    """The GPU binaries embedded in a shared object: ELF images for CUDA inside its data."""
    cubins = []
    start = shared_object.find(_ELF64_LITTLE_ENDIAN)
    while start >= 0:
        image = shared_object[start:]
        is_cuda = len(image) >= _ELF_HEADER_BYTES and image[18:20] == struct.pack("<H", _EM_CUDA)
        size = _elf_bytes(image) if is_cuda else 0
        if size:
            cubins.append(image[:size])
        start = shared_object.find(_ELF64_LITTLE_ENDIAN, start + max(size, 1))
    return cubins


def _elf_bytes(image: bytes) -> int:
    """Length of the ELF image: where its program or section headers end, whichever is later."""
    program_at, section_at = struct.unpack_from("<QQ", image, 32)
    sizes = struct.unpack_from("<HHHH", image, 54)  # of a program header, how many; of a section's
    program_end: int = program_at + sizes[0] * sizes[1]
    section_end: int = section_at + sizes[2] * sizes[3]
    return max(program_end, section_end)


def _run(tool: str, *arguments: str) -> str:
    done = subprocess.run(
        [find_tool(tool), *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f"{tool} failed: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def find_tool(name: str) -> str:
    """Path of a CUDA binary tool: from its package, newest CUDA first, else from PATH."""
    spec = find_spec("nvidia")
    for root in (spec.submodule_search_locations or ()) if spec else ():
        for path in sorted(Path(root).glob(f"cu[0-9]*/bin/{name}"), reverse=True):
            return str(path)
    on_path = shutil.which(name)
    if on_path is None:
        raise MissingRuntimeError(f"{name} is not installed: pip install nvidia-cuda-{name}")
    return on_path
