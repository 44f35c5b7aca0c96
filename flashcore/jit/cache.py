"""Compiled kernels on disk: compiled once per machine, whoever asks first, and loaded by all.

Kernel ── key ──► <key>.so, the package's or <folder>'s ── checked ──► load ──► function
                      │ missing or corrupt
                      └─► lock <key>.lock, look again, compile, publish by rename
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from pathlib import Path

from flashcore.jit.build import BuildError, build_entry
from flashcore.jit.entry import Entry, read_entry, unpack
from flashcore.jit.folder import (
    NoCacheError,
    default_folder,
    exclusive_lock,
    open_folder,
    publish,
)
from flashcore.jit.kernel import Kernel
from flashcore.jit.load import CompiledFunction, load_function
from flashcore.jit.packaged import Packaged, open_packaged
from flashcore.jit.sources import source_digest
from flashcore.jit.target import MissingRuntimeError, Target, detect_target

FROM_PACKAGE = "from the installed package"


@dataclass
class KernelCache:
    """The kernels compiled for one target, in one folder, and those that came with the package.

    `compiled` counts what this object compiled itself, `loaded` holds the functions it has handed
    out: asking again for the same kernel costs a dictionary look-up. `no_folder` says why there is
    no folder: then there are the package's kernels and no others.
    """

    folder: Path
    target: Target
    packaged: Packaged | None = None
    no_folder: NoCacheError | None = None
    compiled: int = 0
    loaded: dict[Kernel, CompiledFunction] = field(default_factory=dict)
    _guard: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @classmethod
    def open(cls, folder: Path | None = None, target: Target | None = None) -> KernelCache:
        """The cache in `folder` for `target` (by default this machine).

        Without a folder it is the user's, and the package's own kernels are taken before it.
        Raises UnsafeCacheError for a folder that another user owns or can write.
        """
        target = target or detect_target()
        if folder is not None:
            return cls(open_folder(folder), target)
        return cls(open_folder(default_folder()), target, open_packaged(target)[0])

    @classmethod
    def of_package(cls, no_folder: NoCacheError) -> KernelCache:
        """Only what came with the package; raises `no_folder` where that is nothing."""
        target = detect_target()
        packaged = open_packaged(target)[0]
        if packaged is None:
            raise no_folder
        return cls(packaged.folder, target, packaged, no_folder)

    def path(self, kernel: Kernel) -> Path:
        """Where the entry of `kernel` is or would be."""
        return self.folder / f"{kernel.key(self.target)}.so"

    def entry(self, kernel: Kernel) -> Entry | None:
        """The valid entry of `kernel`, None when it is missing, corrupt or another kernel's."""
        packaged = None if self.packaged is None else self.packaged.entry(kernel)
        return packaged or self._own(kernel)

    def _own(self, kernel: Kernel) -> Entry | None:
        """The valid entry in the folder."""
        return None if self.no_folder else read_entry(self.path(kernel))

    def origin(self, kernel: Kernel) -> str | None:
        """Where the entry of `kernel` is, in words; None where there is none."""
        if self.packaged is not None and self.packaged.entry(kernel) is not None:
            return FROM_PACKAGE
        return None if self._own(kernel) is None else f"from {self.folder}"

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
        packaged = None if self.packaged is None else self.packaged.entry(kernel)
        if self.packaged is not None and packaged is not None:
            try:
                return self._open(self.packaged.path(kernel), packaged)
            except MissingRuntimeError:
                raise
            except (OSError, RuntimeError, AttributeError):
                pass  # does not load here: as if it were not there
        entry = self._own(kernel) or self._compile(kernel, replace=False)
        try:
            return self._open(self.path(kernel), entry)
        except MissingRuntimeError:
            raise  # compiling again would not help
        except (OSError, RuntimeError, AttributeError):
            # Intact and yet not loadable, as after a change of the C library: build it anew, once.
            return self._open(self.path(kernel), self._compile(kernel, replace=True))

    def _open(self, path: Path, entry: Entry) -> CompiledFunction:
        return load_function(path, entry.facts["symbol"], self.target.toolkit)

    def _compile(self, kernel: Kernel, *, replace: bool) -> Entry:
        if self.no_folder is not None:
            raise NoCacheError(
                f"the kernel {kernel.describe()!r} is not among those installed with flashcore, "
                f"and there is no place to compile it to: {self.no_folder}"
            )
        path = self.path(kernel)
        with exclusive_lock(path.with_suffix(".lock")):
            # Another process may have compiled it while this one waited for the lock.
            found = None if replace else read_entry(path)
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
    """The cache of this process: the user's folder, this machine's target; opened on first use.

    Where there is no such folder, as in a read-only container, the package's kernels are enough.
    """
    global _shared
    with _shared_guard:
        if _shared is None:
            try:
                _shared = KernelCache.open()
            except NoCacheError as no_folder:
                _shared = KernelCache.of_package(no_folder)
        return _shared
