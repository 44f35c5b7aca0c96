"""Static gates: what must hold for the machine code of every shipped kernel. No GPU is needed.

Speed on Hopper dies silently: a kernel that spills, or whose matrix products ptxas has serialised,
compiles without a word and gives right results. These gates read the SASS instead.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

from flashcore.jit.cache import KernelCache
from flashcore.jit.folder import publish
from flashcore.jit.inspect import Resources, inspect_entry
from flashcore.jit.kernel import Kernel
from flashcore.jit.target import HOPPER, Target
from flashcore.jit.workers import run_all

SMEM_BYTES_PER_SM90_CTA = 232_448
# A healthy main loop arrives once per product of tiles, which is many HGMMA. One arrival for each
# HGMMA is how serialised products look ("C7512" of ptxas, hidden by default).
HGMMA_PER_ARRIVE = 4
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")  # the DSL colours its errors


@dataclass(frozen=True)
class GateRow:
    """The verdict on one kernel. `resources` is None when it did not compile."""

    kernel: str
    resources: Resources | None
    violations: list[str] = field(default_factory=list)


def violations(
    resources: Resources,
    required_opcodes: Sequence[str] = ("HGMMA", "UTMALDG"),
    arch: str = HOPPER,
) -> list[str]:
    """Why a kernel with these resources may not ship for `arch`; empty when it may."""
    r = resources
    found = []
    if r.arch != arch:
        found.append(f"compiled for {r.arch}, not for {arch}")
    if r.stack_bytes:
        found.append(f"stack frame of {r.stack_bytes} bytes")
    if spills := r.count("LDL", "STL"):
        found.append(f"{spills} local loads and stores (spills)")
    hgmma, arrive = r.count("HGMMA"), r.count("WARPGROUP.ARRIVE")
    if hgmma and arrive * HGMMA_PER_ARRIVE > hgmma:
        found.append(f"{arrive} WARPGROUP.ARRIVE for {hgmma} HGMMA: serialised products")
    found += [f"no {opcode}" for opcode in required_opcodes if not r.count(opcode)]
    if r.dynamic_smem_bytes is None:
        found.append("shared memory of the launch is unknown")
    elif (smem := r.static_smem_bytes + r.dynamic_smem_bytes) > SMEM_BYTES_PER_SM90_CTA:
        found.append(f"{smem} bytes of shared memory, {SMEM_BYTES_PER_SM90_CTA} allowed")
    return found


def check_kernels(
    kernels: Sequence[Kernel],
    folder: Path,
    target: Target,
    jobs: int = 2,
    on_done: Callable[[GateRow], None] = lambda row: None,
) -> list[GateRow]:
    """Compile each kernel into the cache at `folder` and judge its SASS, in the order given.

    Kernels and verdicts already in the cache cost nothing. A kernel that does not compile is a
    violation, not an exception. `on_done` hears of each kernel as it is finished.
    """
    check = partial(check_kernel, folder=folder, target=target)
    return run_all(check, kernels, jobs, _crashed, on_done)


def _crashed(kernel: Kernel) -> GateRow:
    # The compiler crashed, in this kernel or in one beside it.
    return GateRow(kernel.describe(), None, ["a compiling process died"])


def check_kernel(kernel: Kernel, folder: Path, target: Target) -> GateRow:
    """The verdict on one kernel; runs in a worker process."""
    cache = KernelCache.open(folder, target)
    try:
        resources = _resources(cache, kernel)
    except Exception as error:  # whatever the compiler raises is this kernel's verdict
        text = next(iter(_COLOUR.sub("", str(error)).strip().splitlines()), "")
        return GateRow(kernel.describe(), None, [f"{type(error).__name__}: {text}"])
    found = violations(resources, kernel.required_opcodes, target.arch)
    return GateRow(kernel.describe(), resources, found)


def _resources(cache: KernelCache, kernel: Kernel) -> Resources:
    """Resources of a kernel, remembered beside its entry: disassembling takes a second."""
    remembered = cache.path(kernel).with_suffix(".sass.json")
    entry = cache.ensure(kernel)
    try:
        return Resources(**json.loads(remembered.read_text()))
    except (OSError, ValueError, TypeError):
        resources = inspect_entry(entry)
        publish(remembered, json.dumps(asdict(resources)).encode())
        return resources


def representative(kernels: Sequence[Kernel]) -> list[Kernel]:
    """A few of `kernels` that together have every value of every field of their configurations.

    For checks that cannot afford all, such as a second version of the DSL.
    """
    wanted = [(kernel, set(asdict(kernel.config).items())) for kernel in kernels]
    missing = set().union(*(values for _, values in wanted)) if wanted else set()
    chosen = []
    while missing:
        kernel, values = max(wanted, key=lambda pair: len(pair[1] & missing))
        chosen.append(kernel)
        missing -= values
    return chosen


def format_table(rows: Sequence[GateRow]) -> str:
    """The verdicts as text: one line per kernel, then one for each violation."""
    head = f"{'REG':>4} {'STACK':>5} {'SMEM':>7} {'HGMMA':>6} {'ARRIVE':>6} {'UTMALDG':>7} "
    head += f"{'LDGSTS':>6} "
    lines = [head + f"{'SPILL':>5}  kernel"]
    for row in rows:
        if row.resources is None:
            lines.append(" " * (len(head) + 5) + "  " + row.kernel)
        else:
            r = row.resources
            smem = (
                "?" if r.dynamic_smem_bytes is None else r.static_smem_bytes + r.dynamic_smem_bytes
            )
            lines.append(
                f"{r.registers:>4} {r.stack_bytes:>5} {smem:>7} {r.count('HGMMA'):>6} "
                f"{r.count('WARPGROUP.ARRIVE'):>6} {r.count('UTMALDG'):>7} "
                f"{r.count('LDGSTS'):>6} {r.count('LDL', 'STL'):>5}  {row.kernel}"
            )
        lines += [f"     FAILED: {violation}" for violation in row.violations]
    failed = sum(bool(row.violations) for row in rows)
    lines.append(f"{len(rows)} kernels, {failed} failed")
    return "\n".join(lines)


def default_jobs() -> int:
    """Worker processes that this machine can feed; each takes about 1 GiB."""
    return max(1, len(os.sched_getaffinity(0)))
