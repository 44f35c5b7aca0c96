"""Whether two trees compile the same kernels:

    python tools/compare_machine_code.py BEFORE AFTER [OLD=NEW ...]

Each tree is a checkout of flashcore, whose shipped kernels are compiled into a temporary cache, or
a cache folder that `flashcore compile --cache-dir` filled. Kernels are matched by what describes
them and compared instruction by instruction, operands included, registers, stack and shared memory
too. Names of functions do not count: they hold module names. OLD=NEW: what BEFORE calls a family
that AFTER calls NEW. Exit status 1 where anything differs.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from flashcore.jit.entry import unpack
from flashcore.jit.inspect import disassemble, extract_cubins, inspect_cubins

_ADDRESS = re.compile(r"/\*[0-9a-f]{4,}\*/")
_FUNCTION = re.compile(r"kernel_cutlass_\w+")


@dataclass(frozen=True)
class Code:
    """What the GPU executes of one kernel. resources: registers, stack and shared memory."""

    resources: tuple[int | None, ...]
    instructions: tuple[str, ...]


def main(arguments: list[str]) -> int:
    trees = [argument for argument in arguments if "=" not in argument]
    names = dict(argument.split("=") for argument in arguments if "=" in argument)
    if len(trees) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="flashcore-") as scratch:
        before, after = (
            read(_compiled(Path(argument), Path(scratch) / name))
            for argument, name in zip(trees, ("before", "after"), strict=True)
        )
    before = {renamed(kernel, names): code for kernel, code in before.items()}
    lines = differences(before, after)
    print("\n".join(lines))
    common = before.keys() & after.keys()
    count = sum(len(before[kernel].instructions) for kernel in common)
    print(f"{len(common)} kernels and {count} instructions compared, {len(lines)} differences")
    return 1 if lines or not common else 0


def _compiled(place: Path, cache: Path) -> Path:
    """The cache folder to read: `place` itself, or `cache`, filled by the checkout there."""
    if not (place / "pyproject.toml").exists():
        return place
    subprocess.run(
        [sys.executable, "-m", "flashcore", "compile", "--cache-dir", str(cache)],
        cwd=place,
        env={**os.environ, "PYTHONPATH": str(place.resolve())},
        check=True,
    )
    return cache


def read(cache: Path) -> dict[str, Code]:
    """The kernels in a cache folder by their description; the oldest entry of each."""
    entries = {}
    for path in sorted(cache.glob("*.so"), key=lambda p: p.stat().st_mtime, reverse=True):
        entry = unpack(path.read_bytes())
        entries[entry.facts["kernel"]] = entry
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        codes = pool.map(
            lambda entry: _code(entry.shared_object, entry.facts.get("dynamic_smem_bytes")),
            entries.values(),
        )
        return dict(zip(entries, codes, strict=True))


def _code(shared_object: bytes, dynamic_smem_bytes: int | None) -> Code:
    cubins = extract_cubins(shared_object)
    resources = inspect_cubins(cubins, dynamic_smem_bytes)
    sass = "".join(disassemble(cubin) for cubin in cubins)
    return Code(
        (
            resources.registers,
            resources.stack_bytes,
            resources.static_smem_bytes,
            resources.dynamic_smem_bytes,
        ),
        instructions(sass),
    )


def instructions(sass: str) -> tuple[str, ...]:
    """The instructions and labels of a disassembly, without addresses and names of functions."""
    body = (line for line in sass.splitlines() if _ADDRESS.search(line) or line.startswith(".L_"))
    return tuple(" ".join(_FUNCTION.sub("kernel", _ADDRESS.sub("", line)).split()) for line in body)


def renamed(kernel: str, names: dict[str, str]) -> str:
    """A kernel's description with the name that its family has now."""
    family, space, rest = kernel.partition(" ")
    return names.get(family, family) + space + rest


def differences(before: dict[str, Code], after: dict[str, Code]) -> list[str]:
    """A line for each kernel that is not the same in both."""
    lines = []
    for kernel in sorted(before.keys() | after.keys()):
        old, new = before.get(kernel), after.get(kernel)
        if old is None or new is None:
            lines.append(f"only {'after' if old is None else 'before'}: {kernel}")
        elif old.resources != new.resources:
            lines.append(f"resources {old.resources}, then {new.resources}: {kernel}")
        elif old.instructions != new.instructions:
            lengths = len(old.instructions), len(new.instructions)
            pairs = zip(old.instructions, new.instructions, strict=False)
            at = next((i for i, (a, b) in enumerate(pairs) if a != b), min(lengths))
            lines.append(
                f"instruction {at} of {lengths[0]}: {old.instructions[at : at + 1]}, then "
                f"{new.instructions[at : at + 1]}: {kernel}"
            )
    return lines


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
