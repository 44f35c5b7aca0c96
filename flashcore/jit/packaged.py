"""Kernels that came with the package: compiled when its wheel was built, read before any cache.

    flashcore/_kernels/target.json   what they were compiled for
    flashcore/_kernels/<key>.so      entries as in the cache, keys for that target

An entry is of use where its key is that of the installed sources and the machine runs what it was
built for. Whoever can write the folder must be someone who can write the package's own code: then
it deserves the same trust, whoever owns it.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from flashcore.jit.entry import Entry, read_entry
from flashcore.jit.kernel import Kernel
from flashcore.jit.target import Target

FOLDER = Path(__file__).resolve().parents[1] / "_kernels"
TARGET_FILE = "target.json"


@dataclass(frozen=True)
class Packaged:
    """The folder of a wheel's kernels, and the target that they were built for."""

    folder: Path
    target: Target

    def path(self, kernel: Kernel) -> Path:
        """Where the entry of `kernel` would be."""
        return self.folder / f"{kernel.key(self.target)}.so"

    def entry(self, kernel: Kernel) -> Entry | None:
        """The valid entry of `kernel`; None where the wheel has none for these sources."""
        return read_entry(self.path(kernel))

    def count(self) -> int:
        """Entries there are, of whatever sources."""
        return sum(1 for _ in self.folder.glob("*.so"))


def open_packaged(machine: Target) -> tuple[Packaged | None, str]:
    """The package's kernels where this machine can use them; else None, and the reason."""
    folder = FOLDER
    if not (folder / TARGET_FILE).is_file():
        return None, "this installation came without compiled kernels"
    if not _as_trusted_as_the_package(folder):
        return None, f"{folder} can be written by more users than the package that it lies in"
    try:
        target = Target(**json.loads((folder / TARGET_FILE).read_text()))
    except (OSError, ValueError, TypeError):
        return None, f"{folder / TARGET_FILE} cannot be read"
    reason = _unusable(target, machine)
    return (None, reason) if reason else (Packaged(folder, target), "")


def pack(kernels: Sequence[Kernel], entries: Sequence[bytes], target: Target, folder: Path) -> None:
    """Write the folder that `open_packaged` reads."""
    folder.mkdir(parents=True)
    for kernel, data in zip(kernels, entries, strict=True):
        (folder / f"{kernel.key(target)}.so").write_bytes(data)
    (folder / TARGET_FILE).write_text(json.dumps(asdict(target), indent=1) + "\n")


def _unusable(built: Target, machine: Target) -> str:
    """Why kernels built for `built` do not run on `machine`; "" where they do.

    The runtime library and tvm-ffi may be newer than at the build: a kernel calls some functions of
    each by name, which loading looks up.
    """
    for name in ("arch", "host", "toolkit"):
        if getattr(built, name) != getattr(machine, name):
            return f"built for {getattr(built, name)}, this machine has {getattr(machine, name)}"
    for package, parts in (("dsl", 1), ("tvm_ffi", 2)):
        at_build, here = getattr(built, package), getattr(machine, package)
        if _numbers(here) < _numbers(at_build) or (
            _numbers(here)[:parts] != _numbers(at_build)[:parts]
        ):
            series = ".".join(map(str, _numbers(at_build)[:parts]))
            return f"built with {_PACKAGES[package]} {at_build}, here is {here}: " + (
                f"{at_build} or a newer one of {series} is needed"
            )
    return ""


_PACKAGES = {"dsl": "nvidia-cutlass-dsl", "tvm_ffi": "apache-tvm-ffi"}


def _numbers(version: str) -> tuple[int, ...]:
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in found[0].split(".")) if found else ()


def _as_trusted_as_the_package(folder: Path) -> bool:
    package = folder.parent.stat()
    owners = {0, os.geteuid(), package.st_uid}
    others = stat.S_IWGRP | stat.S_IWOTH
    for place in (folder, folder / TARGET_FILE, *folder.glob("*.so")):
        found = place.lstat()
        if stat.S_ISLNK(found.st_mode) or found.st_uid not in owners:
            return False
        if found.st_mode & others & ~package.st_mode:
            return False
    return True
