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

from flashcore.jit import build, folder
from flashcore.jit.build import BuildError
from flashcore.jit.cache import KernelCache
from flashcore.jit.entry import CorruptEntryError, pack, unpack
from flashcore.jit.folder import exclusive_lock
from flashcore.jit.kernel import Family, Kernel
from flashcore.jit.prebuild import prebuild
from flashcore.jit.sources import source_digest, source_files
from flashcore.jit.target import Target, detect_target
from flashcore.sm90.families import DENSE, MERGE, PAGED, PAGER, PLANNER
from tests.runtime_fixtures import (
    COMPILE_LOG,
    CONSTANT,
    TARGET,
    TESTS,
    ConstantConfig,
    needs_dsl,
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
    source = tmp_path / "tests/source.py"
    source.parent.mkdir()
    source.write_text("before = 1\n")
    family = replace(CONSTANT, compiler="tests.source:compile_constant", root=tmp_path)
    kernel = Kernel(family, ConstantConfig())

    def edit(*_: object) -> bytes:
        source.write_text("after = 1\n")
        return pack(b"code", {"key": "k"})

    monkeypatch.setattr("flashcore.jit.cache.build_entry", edit)
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


TREE = {
    "__init__.py": "from pkg import unrelated\n",
    "compile/__init__.py": "",
    "compile/one.py": "def f():\n    from pkg.kernels.part import (\n        a,\n        b)\n",
    "kernels/__init__.py": "",
    "kernels/part.py": "from pkg import rows, words as w  # two\nimport os, pkg.tables\na = 1\n",
    "rows.py": "a = 1\n",
    "words.py": "from pkg.kernels import part\n",  # a circle
    "tables.py": "",
    "unrelated.py": "",
}
NEEDED = {"compile/__init__.py", "compile/one.py", "kernels/__init__.py", "kernels/part.py"}
NEEDED |= {"rows.py", "words.py", "tables.py"}


def tree(folder: Path) -> Path:
    for name, text in TREE.items():
        (folder / "pkg" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "pkg" / name).write_text(text)
    return folder


def test_sources_are_what_the_compile_module_imports(tmp_path: Path) -> None:
    found = source_files("pkg.compile.one", tree(tmp_path))
    assert {file.relative_to(tmp_path / "pkg").as_posix() for file in found} == NEEDED


@pytest.mark.parametrize("name", sorted(NEEDED))
@pytest.mark.parametrize("change", ["edited", "renamed"])
def test_key_depends_on_every_source(tmp_path: Path, name: str, change: str) -> None:
    family = Family("f", "pkg.compile.one:f", root=tree(tmp_path))

    def key() -> str:
        source_digest.cache_clear()  # a new process
        return Kernel(family, ConstantConfig()).key(TARGET)

    before = key()
    for other in ("unrelated.py", "__init__.py", "compile/another.py"):
        (tmp_path / "pkg" / other).write_text("changed = True\n")
    assert key() == before
    path = tmp_path / "pkg" / name
    if change == "edited":
        path.write_text(path.read_text() + "# more\n")
    else:
        path.rename(path.with_name("moved.py"))
    if change == "renamed" and name == "compile/one.py":
        with pytest.raises(FileNotFoundError, match=r"no module pkg\.compile\.one"):
            key()
    else:
        assert key() != before


def test_relative_imports_are_refused(tmp_path: Path) -> None:
    (tree(tmp_path) / "pkg/rows.py").write_text("from . import tables\n")
    with pytest.raises(ValueError, match=r"rows\.py: the relative import from \. is not followed"):
        source_files("pkg.compile.one", tmp_path)


_IMPORTED = """
import sys
from flashcore.sm90.shipped import shipped_kernels

kernel = next(k for k in shipped_kernels() if k.family.name == sys.argv[1])
for name in [name for name in sys.modules if name.startswith("flashcore")]:
    del sys.modules[name]
kernel.family.resolve_compiler()(kernel.config, options="--gpu-arch sm_90a")
print(*(name for name in sys.modules if name.startswith("flashcore.")))
"""


@needs_dsl
@pytest.mark.parametrize("family", [DENSE, PAGED, MERGE, PLANNER, PAGER], ids=lambda f: f.name)
def test_sources_are_all_that_compiling_imports(family: Family) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _IMPORTED, family.name], capture_output=True, text=True, check=True
    )
    found = {
        ".".join(file.relative_to(family.root).with_suffix("").parts).removesuffix(".__init__")
        for file in source_files(family.module, family.root)
    }
    assert set(done.stdout.split()) <= found
    # Nor much more: an edit of what launches and caches kernels leaves the compiled ones good.
    assert {name.split(".")[1] for name in found} <= {"contract", "planner", "sm90"}
    assert not any(name.startswith("flashcore.sm90.launch") for name in found)


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
