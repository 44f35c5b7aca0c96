"""Take out of a cache folder what this installation cannot use any more."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from flashcore.jit.entry import CorruptEntryError, unpack
from flashcore.jit.kernel import Family
from flashcore.jit.sources import source_digest
from flashcore.jit.target import Target

_ABANDONED_S = 3600.0  # a file that is still being written is younger


@dataclass(frozen=True)
class Pruned:
    """What was removed: kernels, and the bytes of all files."""

    kernels: int
    kept: int
    bytes: int


def prune(folder: Path, families: Sequence[Family], target: Target) -> Pruned:
    """Remove entries of other sources, versions or targets, damaged ones, and what is left beside
    none: verdicts, locks, halves of files that nobody writes any more.

    A process that has loaded an entry keeps it. Another installation that shares the folder
    compiles its kernels anew.
    """
    current = {f.name: source_digest(f.module, f.root) for f in families}
    kept = {path.stem for path in folder.glob("*.so") if _is_current(path, current, target)}
    removed = size = 0
    for path in folder.iterdir():
        if path.is_dir() or path.name.partition(".")[0] in kept:
            continue
        if path.suffix not in (".so", ".json", ".lock") and not path.name.startswith("."):
            continue  # not ours
        found = path.stat()
        # A lock or a half may belong to a compilation that is under way.
        if path.suffix != ".so" and time.time() - found.st_mtime < _ABANDONED_S:
            continue
        path.unlink(missing_ok=True)
        removed += path.suffix == ".so" and not path.name.startswith(".")
        size += found.st_size
    return Pruned(removed, len(kept), size)


def _is_current(path: Path, sources: dict[str, str], target: Target) -> bool:
    try:
        facts = unpack(path.read_bytes()).facts
    except (OSError, CorruptEntryError):
        return False
    return (
        facts.get("key") == path.stem
        and facts.get("target") == asdict(target)
        and facts.get("sources") == sources.get(facts.get("family", ""), "")
    )
