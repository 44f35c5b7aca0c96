"""Compiled kernels on disk: compiled once per machine, whoever asks first, and loaded by all.

Kernel ── key ──► <folder>/<key>.so ── checked ──► shared object ── load ──► function
                      │ missing or corrupt
                      └─► lock <key>.lock, look again, compile, publish by rename
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from pathlib import Path

from flashcore.jit.build import BuildError, build_entry
from flashcore.jit.entry import CorruptEntryError, Entry, unpack
from flashcore.jit.folder import default_folder, exclusive_lock, open_folder, publish
from flashcore.jit.kernel import Kernel
from flashcore.jit.load import CompiledFunction, load_function
from flashcore.jit.sources import source_digest
from flashcore.jit.target import MissingRuntimeError, Target, detect_target


@dataclass
class KernelCache:
    """The kernels compiled for one target, in one folder.

    `compiled` counts what this object compiled itself, `loaded` holds the functions it has handed
    out: asking again for the same kernel costs a dictionary look-up.
    """

    folder: Path
    target: Target
    compiled: int = 0
    loaded: dict[Kernel, CompiledFunction] = field(default_factory=dict)
    _guard: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @classmethod
    def open(cls, folder: Path | None = None, target: Target | None = None) -> KernelCache:
        """The cache in `folder` (by default the user's) for `target` (by default this machine).

        Raises UnsafeCacheError for a folder that another user owns or can write.
        """
        return cls(open_folder(folder or default_folder()), target or detect_target())

    def path(self, kernel: Kernel) -> Path:
        """Where the entry of `kernel` is or would be."""
        return self.folder / f"{kernel.key(self.target)}.so"

    def entry(self, kernel: Kernel) -> Entry | None:
        """The valid entry of `kernel`, None when it is missing, corrupt or another kernel's."""
        path = self.path(kernel)
        try:
            found = unpack(path.read_bytes())
        except (FileNotFoundError, CorruptEntryError):
            return None
        # A file renamed by hand has a valid checksum and the wrong code.
        return found if found.facts.get("key") == path.stem else None

    def ensure(self, kernel: Kernel) -> Entry:
        """The entry of `kernel`, compiled first if need be; of many processes one compiles."""
        found = self.entry(kernel)
        return found if found is not None else self._compile(kernel, replace=False)

    def function(self, kernel: Kernel) -> CompiledFunction:
        """The compiled function of `kernel`: from memory, from disk, or compiled now."""
        function = self.loaded.get(kernel)
        if function is None:
            with self._guard:
                function = self.loaded.get(kernel) or self._load(kernel)
                self.loaded[kernel] = function
        return function

    def _load(self, kernel: Kernel) -> CompiledFunction:
        entry = self.ensure(kernel)
        try:
            return self._open(kernel, entry)
        except MissingRuntimeError:
            raise  # compiling again would not help
        except (OSError, RuntimeError, AttributeError):
            # Intact and yet not loadable, as after a change of the C library: build it anew, once.
            return self._open(kernel, self._compile(kernel, replace=True))

    def _open(self, kernel: Kernel, entry: Entry) -> CompiledFunction:
        return load_function(self.path(kernel), entry.facts["symbol"], self.target.toolkit)

    def _compile(self, kernel: Kernel, *, replace: bool) -> Entry:
        path = self.path(kernel)
        with exclusive_lock(path.with_suffix(".lock")):
            # Another process may have compiled it while this one waited for the lock.
            found = None if replace else self.entry(kernel)
            if found is not None:
                return found
            data = build_entry(kernel, self.target, path.stem)
            source_digest.cache_clear()
            if self.path(kernel) != path:
                raise BuildError(
                    "the sources of flashcore changed during a compilation; start anew"
                )
            publish(path, data)
            self.compiled += 1
        return unpack(data)


_shared: KernelCache | None = None
_shared_guard = threading.Lock()


def shared_cache() -> KernelCache:
    """The cache of this process: the user's folder, this machine's target; opened on first use."""
    global _shared
    with _shared_guard:
        if _shared is None:
            _shared = KernelCache.open()
        return _shared
