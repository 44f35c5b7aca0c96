"""The disk cache: hits, misses, damage, rivals for one key, and what a key is made of."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from flashcore.runtime import build, folder
from flashcore.runtime.build import BuildError
from flashcore.runtime.cache import KernelCache
from flashcore.runtime.entry import CorruptEntryError, pack, unpack
from flashcore.runtime.folder import UnsafeCacheError, default_folder, exclusive_lock, open_folder
from flashcore.runtime.kernel import DENSE, Family, Kernel, source_digest
from flashcore.runtime.prebuild import prebuild
from flashcore.runtime.target import Target, detect_target
from tests.runtime_fixtures import (
    COMPILE_LOG,
    CONSTANT,
    TARGET,
    TESTS,
    ConstantConfig,
    needs_loader,
)

KERNEL = Kernel(CONSTANT, ConstantConfig(value=7))


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "compiled.log"
    path.touch()
    monkeypatch.setenv(COMPILE_LOG, str(path))
    return path


def compilations(log: Path) -> int:
    return len(log.read_text().splitlines())


def fresh(folder_path: Path) -> KernelCache:
    """A cache object as a new process has it: nothing in memory."""
    return KernelCache.open(folder_path, replace(TARGET, toolkit=detect_target().toolkit))


# ---------------------------------------------------------------- entries


def test_entry_round_trip() -> None:
    entry = unpack(pack(b"\x7fELF code", {"symbol": "f", "dynamic_smem_bytes": 3}))
    assert entry.shared_object == b"\x7fELF code"
    assert entry.facts == {"symbol": "f", "dynamic_smem_bytes": 3}


@pytest.mark.parametrize("cut", [1, 8, 40, 60])
def test_truncated_entry_is_corrupt(cut: int) -> None:
    with pytest.raises(CorruptEntryError):
        unpack(pack(b"x" * 30, {"symbol": "f"})[:-cut])


@pytest.mark.parametrize("position", [0, 29, 32])
def test_flipped_byte_is_corrupt(position: int) -> None:
    data = bytearray(pack(b"x" * 30, {"symbol": "f"}))
    data[position] ^= 1
    with pytest.raises(CorruptEntryError, match="checksum"):
        unpack(bytes(data))


# ---------------------------------------------------------------- hit, miss, damage


@needs_loader
def test_miss_compiles_and_hit_does_not(tmp_path: Path, log: Path) -> None:
    first, second = fresh(tmp_path), fresh(tmp_path)
    assert first.function(KERNEL)() == 7
    assert first.function(KERNEL) is first.function(KERNEL)
    assert second.function(KERNEL)() == 7
    assert (first.compiled, second.compiled, compilations(log)) == (1, 0, 1)


@needs_loader
def test_configurations_do_not_share_code(tmp_path: Path) -> None:
    cache = fresh(tmp_path)
    functions = [cache.function(Kernel(CONSTANT, ConstantConfig(value=n))) for n in (1, 2, 3)]
    assert [function() for function in functions] == [1, 2, 3]


@needs_loader
@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[: len(data) // 2],
        lambda data: b"not a shared object",
        lambda data: bytes([data[0] ^ 1]) + data[1:],
    ],
    ids=["empty", "truncated", "garbage", "bit flip"],
)
def test_corrupt_entry_is_rebuilt(tmp_path: Path, log: Path, damage) -> None:
    cache = fresh(tmp_path)
    path = cache.path(KERNEL)
    cache.ensure(KERNEL)
    path.write_bytes(damage(path.read_bytes()))
    assert cache.entry(KERNEL) is None
    assert fresh(tmp_path).function(KERNEL)() == 7
    assert compilations(log) == 2
    assert fresh(tmp_path).function(KERNEL)() == 7
    assert compilations(log) == 2, "the rebuilt entry was not published"


@needs_loader
def test_intact_entry_that_does_not_load_is_rebuilt(tmp_path: Path, log: Path) -> None:
    cache = fresh(tmp_path)
    facts = cache.ensure(KERNEL).facts
    cache.path(KERNEL).write_bytes(pack(b"not a shared object at all", facts))
    assert cache.function(KERNEL)() == 7
    assert compilations(log) == 2


@needs_loader
def test_kernel_that_never_loads_raises_after_one_rebuild(tmp_path: Path, log: Path) -> None:
    kernel = Kernel(CONSTANT, ConstantConfig(unloadable=True))
    with pytest.raises((RuntimeError, OSError), match="nowhere"):
        fresh(tmp_path).function(kernel)
    assert compilations(log) == 2


@needs_loader
def test_entry_of_another_key_is_not_used(tmp_path: Path) -> None:
    cache = fresh(tmp_path)
    other = Kernel(CONSTANT, ConstantConfig(value=8))
    cache.ensure(other)
    cache.path(other).rename(cache.path(KERNEL))
    assert cache.function(KERNEL)() == 7


@needs_loader
def test_failed_compilation_leaves_nothing(tmp_path: Path) -> None:
    cache = fresh(tmp_path)
    with pytest.raises(ValueError, match="cannot be compiled"):
        cache.ensure(Kernel(CONSTANT, ConstantConfig(broken=True)))
    assert [path.suffix for path in tmp_path.iterdir() if path.name != "compiled.log"] == [".lock"]


def test_sources_edited_during_a_compilation_are_not_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "source.py").write_text("before = 1\n")
    kernel = Kernel(replace(CONSTANT, sources=("source.py",), root=tmp_path), ConstantConfig())

    def edit(*_: object) -> bytes:
        (tmp_path / "source.py").write_text("after = 1\n")
        return pack(b"code", {"key": "k"})

    monkeypatch.setattr("flashcore.runtime.cache.build_entry", edit)
    cache = KernelCache.open(tmp_path / "cache", TARGET)
    with pytest.raises(BuildError, match="changed during a compilation"):
        cache.ensure(kernel)
    assert not list(cache.folder.glob("*.so"))


def test_interrupted_write_is_invisible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(folder.os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        folder.publish(tmp_path / "entry.so", b"data")
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- many at once

_ASK = """
import sys
sys.path[:0] = {paths!r}
from pathlib import Path
from tests.test_runtime_cache import KERNEL, fresh
print(fresh(Path({folder!r})).function(KERNEL)())
"""


@needs_loader
def test_concurrent_processes_compile_once(tmp_path: Path, log: Path) -> None:
    paths = [str(TESTS.parent)]
    code = _ASK.format(paths=paths, folder=str(tmp_path / "cache"))
    askers = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    assert [asker.communicate(timeout=120)[0].strip() for asker in askers] == ["7"] * 4
    assert compilations(log) == 1


@needs_loader
def test_concurrent_threads_compile_once(tmp_path: Path, log: Path) -> None:
    cache = fresh(tmp_path)
    results: list[int] = []
    threads = [
        threading.Thread(target=lambda: results.append(cache.function(KERNEL)())) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (results, compilations(log)) == ([7] * 8, 1)


def test_lock_excludes_and_times_out(tmp_path: Path) -> None:
    path = tmp_path / "key.lock"
    started = time.monotonic()
    with (
        exclusive_lock(path),
        pytest.raises(TimeoutError, match=r"key\.lock was locked"),
        exclusive_lock(path, timeout_s=0.2),
    ):
        pass
    assert time.monotonic() - started >= 0.2
    with exclusive_lock(path, timeout_s=0.0):
        pass  # released


@needs_loader
def test_prebuild_reports_each_kernel_in_order(tmp_path: Path, log: Path) -> None:
    configs = [ConstantConfig(1), ConstantConfig(2, broken=True), ConstantConfig(3)]
    kernels = [Kernel(CONSTANT, config) for config in configs]
    cache, told = fresh(tmp_path), list[Kernel]()
    cache.ensure(kernels[2])
    built = prebuild(kernels, tmp_path, cache.target, 2, lambda b: told.append(b.kernel))
    assert [result.kernel for result in built] == kernels
    assert [result.compiled for result in built] == [True, False, False]
    errors = [result.error for result in built]
    assert errors == [None, "ValueError: this configuration cannot be compiled", None]
    assert set(told) == set(kernels)


def test_prebuild_survives_a_crashing_compiler(tmp_path: Path) -> None:
    kernels = [Kernel(CONSTANT, ConstantConfig(crash=True))]
    (built,) = prebuild(kernels, tmp_path, TARGET, 1)
    assert built.error == "a compiling process died"


# ---------------------------------------------------------------- the folder


def test_new_folder_is_private(tmp_path: Path) -> None:
    made = open_folder(tmp_path / "a" / "b")
    assert made.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o722, 0o1777])
def test_folder_others_can_write_is_refused(tmp_path: Path, mode: int) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(mode)
    with pytest.raises(UnsafeCacheError, match=f"mode {mode:04o}: other users can write"):
        open_folder(shared)


def test_readable_folder_is_accepted(tmp_path: Path) -> None:
    folder_path = tmp_path / "readable"
    folder_path.mkdir()
    folder_path.chmod(0o755)
    assert open_folder(folder_path) == folder_path.resolve()


def test_folder_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.geteuid() == 0:
        foreign = tmp_path / "foreign"
        foreign.mkdir(mode=0o700)
        os.chown(foreign, 12345, 12345)
    else:
        foreign = tmp_path
        monkeypatch.setattr(folder.os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(UnsafeCacheError, match="belongs to user"):
        open_folder(foreign)


def test_folder_that_others_can_replace_is_refused(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(UnsafeCacheError, match="every user can replace it"):
        open_folder(tmp_path / "open" / "mine")
    (tmp_path / "open").chmod(0o1777)  # as /tmp is
    assert open_folder(tmp_path / "open" / "mine").name == "mine"


def test_link_to_a_shared_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(0o777)
    (tmp_path / "link").symlink_to(tmp_path / "shared")
    with pytest.raises(UnsafeCacheError, match="other users can write"):
        open_folder(tmp_path / "link")


def test_file_in_the_way_names_the_variable(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UnsafeCacheError, match="FLASHCORE_CACHE_DIR"):
        open_folder(tmp_path / "file")


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"FLASHCORE_CACHE_DIR": "/somewhere/else"}, "/somewhere/else"),
        ({"XDG_CACHE_HOME": "/xdg"}, "/xdg/flashcore"),
        ({"XDG_CACHE_HOME": "relative"}, "/home/me/.cache/flashcore"),
        ({}, "/home/me/.cache/flashcore"),
    ],
)
def test_default_folder(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], expected: str
) -> None:
    for name in ("FLASHCORE_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": "/home/me", **environment}.items():
        monkeypatch.setenv(name, value)
    assert default_folder() == Path(expected)


# ---------------------------------------------------------------- the key


@pytest.mark.parametrize("name", ["arch", "host", "toolkit", "dsl", "tvm_ffi"])
def test_key_depends_on_every_field_of_the_target(name: str) -> None:
    assert KERNEL.key(TARGET) != KERNEL.key(replace(TARGET, **{name: "another"}))


def test_targets_are_compared_whole() -> None:
    """A field added to Target must be added to the test above."""
    assert list(Target.__dataclass_fields__) == ["arch", "host", "toolkit", "dsl", "tvm_ffi"]


def test_key_depends_on_configuration_and_family() -> None:
    other_family = replace(CONSTANT, compiler="tests.runtime_fixtures:another")
    kernels = [
        KERNEL,
        Kernel(CONSTANT, ConstantConfig(value=8)),
        Kernel(CONSTANT, ConstantConfig(broken=True)),
        Kernel(other_family, KERNEL.config),
        Kernel(replace(CONSTANT, name="other"), KERNEL.config),
    ]
    assert len({kernel.key(TARGET) for kernel in kernels}) == len(kernels)


def test_key_is_stable() -> None:
    assert KERNEL.key(TARGET) == Kernel(CONSTANT, ConstantConfig(value=7)).key(TARGET)


@pytest.mark.parametrize(
    "change",
    [
        lambda root: (root / "kernels/part.py").write_text("b = 2\n"),
        lambda root: (root / "kernels/new.py").write_text(""),
        lambda root: (root / "kernels/part.py").rename(root / "kernels/moved.py"),
        lambda root: (root / "compile.py").write_text("options = 3\n"),
    ],
    ids=["edited", "added", "renamed", "compile module"],
)
def test_key_depends_on_sources(tmp_path: Path, change) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels/part.py").write_text("a = 1\n")
    (tmp_path / "compile.py").write_text("options = 2\n")
    (tmp_path / "unrelated.py").write_text("")
    family = Family("f", "m:f", ("kernels", "compile.py"), root=tmp_path)

    def key() -> str:
        source_digest.cache_clear()  # a new process
        return Kernel(family, ConstantConfig()).key(TARGET)

    before = key()
    (tmp_path / "unrelated.py").write_text("changed = True\n")
    assert key() == before
    change(tmp_path)
    assert key() != before


def test_dense_sources_exist_and_cover_the_device_code() -> None:
    for source in DENSE.sources:
        assert (DENSE.root / source).exists(), source
    assert {"kernels", "config", "runtime/compile.py"} <= set(DENSE.sources)


# ---------------------------------------------------------------- building


def test_missing_linker_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    with pytest.raises(BuildError, match=r"no linker on PATH .*install binutils"):
        build.linker_command()


@needs_loader
@pytest.mark.parametrize("linker", ["ld", "gcc"])
def test_either_linker_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, linker: str) -> None:
    monkeypatch.setattr(build, "LINKERS", (linker,))
    assert fresh(tmp_path).function(KERNEL)() == 7


def test_failed_link_shows_the_command(tmp_path: Path) -> None:
    class Garbage:
        def export_to_c(self, object_file_path: str, function_name: str) -> None:
            Path(object_file_path).write_text("not an object")

    with pytest.raises(BuildError, match=r"linking failed: .*kernel\.o"):
        build.link(Garbage(), "f", tmp_path)


@pytest.mark.parametrize("before", [None, "sm_80"])
def test_architecture_is_pinned_for_the_block_only(
    monkeypatch: pytest.MonkeyPatch, before: str | None
) -> None:
    monkeypatch.delenv("CUTE_DSL_ARCH", raising=False)
    if before is not None:
        monkeypatch.setenv("CUTE_DSL_ARCH", before)
    with build.pinned_arch("sm_90a"):
        assert os.environ["CUTE_DSL_ARCH"] == "sm_90a"
    assert os.environ.get("CUTE_DSL_ARCH") == before
