"""Kernels that come with the package: what a wheel holds, when it is used, and when it is not."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from flashcore.cli import info
from flashcore.cli.info import _kernels
from flashcore.jit import cache as cache_module
from flashcore.jit import packaged
from flashcore.jit.cache import FROM_PACKAGE, KernelCache
from flashcore.jit.folder import NoCacheError
from flashcore.jit.kernel import Kernel
from flashcore.jit.target import Target, detect_target
from flashcore.sm90.families import PAGER
from flashcore.sm90.shipped import shipped_kernels
from tests.runtime_fixtures import (
    CONSTANT,
    TARGET,
    TESTS,
    ConstantConfig,
    needs_dsl,
    needs_loader,
)
from tools import wheel

SEVEN = Kernel(CONSTANT, ConstantConfig())
EIGHT = Kernel(CONSTANT, ConstantConfig(8))

# ---------------------------------------------------------------- a wheel, from the build to a call

_USE = """
import sys
from importlib.util import find_spec

# Where the DSL's packages are found stands in a .pth file; its runtime library lies beside them.
sys.path[:] = [sys.argv[1], *(p for p in sys.path if "dsl_packages" not in p and p != sys.argv[2])]
assert find_spec("cutlass") is None

import time

import flashcore
from flashcore.cli.main import main
from flashcore.jit.cache import KernelCache, shared_cache
from flashcore.jit.target import MissingRuntimeError
from flashcore.sm90.shipped import shipped_kernels

assert flashcore.__file__.startswith(sys.argv[1])
cache = shared_cache()
there = [kernel for kernel in shipped_kernels() if cache.origin(kernel)]
print(len(there), "there", cache.origin(there[0]))
import tvm_ffi
from flashcore.jit.load import open_runtime_library
open_runtime_library(cache.target.toolkit)
started = time.perf_counter()
function = cache.function(there[0])
print(f"{time.perf_counter() - started:.4f} s")
try:
    function(1)
except Exception as error:
    print(type(error).__name__, "of the call")
try:
    cache.function(next(kernel for kernel in shipped_kernels() if kernel not in there))
except MissingRuntimeError as error:
    print(error)
print([name for name in sys.modules if name.split(".")[0] == "cutlass"], cache.compiled)
main(["info"])
"""


@needs_dsl
def test_a_wheel_s_kernels_need_no_compiler(tmp_path: Path) -> None:
    kernels = [kernel for kernel in shipped_kernels() if kernel.family is PAGER][:1]
    built = wheel.build(kernels, tmp_path / "dist", 1, tmp_path / "build-cache")
    assert built.name.endswith(f"-py3-none-{wheel.PLATFORM}.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(built) as archive:
        names = archive.namelist()
        archive.extractall(site)
    assert sum(name.startswith("flashcore/_kernels/") for name in names) == 2
    assert "flashcore/sm90/kernels/pager.py" in names  # of which the keys are made
    done = subprocess.run(
        [sys.executable, "-c", _USE, str(site), str(TESTS.parent)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "FLASHCORE_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": ""},
    )
    assert done.returncode == 0, done.stderr
    there, seconds, called, missing, state, *told = done.stdout.splitlines()
    assert there == f"1 there {FROM_PACKAGE}"
    assert float(seconds.split()[0]) < 0.05
    assert called == "TypeError of the call"  # it looks at its arguments: it is the kernel's
    assert missing.startswith("compiling the kernel 'dense ")
    assert "needs cutlass, which is not installed" in missing
    assert "pip install" in missing
    assert state == "[] 0"
    said = "\n".join(told)
    assert "installed         1 for sm_90a, CuTe DSL " in said
    assert "compiler          not installed" in said


# ---------------------------------------------------------------- which of them are used


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Puts kernels into a package's folder; the user's cache is another one."""
    monkeypatch.setenv("FLASHCORE_CACHE_DIR", str(tmp_path / "cache"))
    folder = tmp_path / "package" / "_kernels"
    monkeypatch.setattr(packaged, "FOLDER", folder)

    def install(*kernels: Kernel, target: Target | None = None) -> Path:
        target = target or detect_target()
        scratch = KernelCache.open(tmp_path / "build", target)
        for kernel in kernels:
            scratch.ensure(kernel)
        entries = [scratch.path(kernel).read_bytes() for kernel in kernels]
        packaged.pack(kernels, entries, target, folder)
        return folder

    return install


@needs_loader
def test_the_package_comes_before_the_cache(install: Callable[..., Path], tmp_path: Path) -> None:
    install(SEVEN)
    cache = KernelCache.open()
    assert cache.origin(SEVEN) == FROM_PACKAGE
    assert cache.function(SEVEN)() == 7
    assert (cache.compiled, list(cache.folder.glob("*.so"))) == (0, [])
    assert cache.origin(EIGHT) is None
    assert cache.function(EIGHT)() == 8
    assert cache.origin(EIGHT) == f"from {cache.folder}"
    # A folder that was asked for holds what is asked of it.
    other = KernelCache.open(tmp_path / "other")
    assert other.origin(SEVEN) is None


@needs_loader
@pytest.mark.parametrize("why", ["no such place", "no home"])
def test_without_a_cache_folder_the_package_s_kernels_are_enough(
    install: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    """As in a read-only container, or under a user id that nobody has."""
    install(SEVEN)
    if why == "no home":
        monkeypatch.delenv("FLASHCORE_CACHE_DIR")
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setattr(Path, "home", _no_home)
    else:
        (tmp_path / "file").touch()
        monkeypatch.setenv("FLASHCORE_CACHE_DIR", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(cache_module, "_shared", None)
    cache = cache_module.shared_cache()
    assert cache.function(SEVEN)() == 7
    assert cache.origin(EIGHT) is None
    with pytest.raises(NoCacheError, match=r"no place to compile it to: .*FLASHCORE_CACHE_DIR"):
        cache.function(EIGHT)
    assert _kernels()["cache"].startswith("none: " if why == "no home" else "0 in ")
    monkeypatch.setattr(packaged, "FOLDER", tmp_path / "nothing")
    monkeypatch.setattr(cache_module, "_shared", None)
    with pytest.raises(NoCacheError, match="FLASHCORE_CACHE_DIR"):
        cache_module.shared_cache()


def _no_home() -> Path:
    raise RuntimeError("Could not determine home directory.")


@needs_loader
def test_kernels_of_other_sources_are_not_used(
    install: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    install(SEVEN)
    monkeypatch.setattr("flashcore.jit.kernel.source_digest", lambda *_: "changed since")
    cache = KernelCache.open()
    assert cache.packaged is not None
    assert cache.origin(SEVEN) is None
    monkeypatch.undo()


@needs_loader
@pytest.mark.parametrize("damage", ["cut", "renamed", "gone"])
def test_a_damaged_entry_is_compiled_anew(install: Callable[..., Path], damage: str) -> None:
    folder = install(SEVEN, EIGHT)
    path = folder / f"{SEVEN.key(detect_target())}.so"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    elif damage == "renamed":
        (folder / f"{EIGHT.key(detect_target())}.so").rename(path)
    else:
        path.unlink()
    cache = KernelCache.open()
    assert cache.function(SEVEN)() == 7
    assert cache.compiled == 1


@needs_loader
def test_an_entry_that_does_not_load_is_compiled_anew(
    install: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the runtime library lacks a function: it must not end the process at a call."""
    broken = Kernel(CONSTANT, ConstantConfig(unloadable=True))
    folder = install(broken)
    cache = KernelCache.open()
    with pytest.raises((OSError, RuntimeError), match="nowhere"):
        cache.function(broken)
    assert cache.compiled == 2  # for the cache, and once more since that does not load either
    assert len(list(folder.glob("*.so"))) == 1


@pytest.mark.parametrize(
    ("machine", "reason"),
    [
        ({}, ""),
        ({"dsl": "4.9.0"}, ""),
        ({"tvm_ffi": "0.1.12.post3"}, ""),
        ({"dsl": "4.7.0"}, "built with nvidia-cutlass-dsl 4.8.1, here is 4.7.0: 4.8.1 or a newer"),
        ({"dsl": "5.0.0"}, "one of 4 is needed"),
        ({"tvm_ffi": "0.1.10"}, "built with apache-tvm-ffi 0.1.11, here is 0.1.10"),
        ({"tvm_ffi": "0.2.0"}, "0.1.11 or a newer one of 0.1 is needed"),
        ({"toolkit": "cu12"}, "built for cu13, this machine has cu12"),
        ({"host": "aarch64"}, "built for x86_64, this machine has aarch64"),
        ({"arch": "sm_100a"}, "built for sm_90a, this machine has sm_100a"),
    ],
)
def test_what_a_machine_must_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, machine: dict[str, str], reason: str
) -> None:
    monkeypatch.setattr(packaged, "FOLDER", tmp_path / "_kernels")
    packaged.pack([], [], TARGET, tmp_path / "_kernels")
    found, why = packaged.open_packaged(replace(TARGET, **machine))
    assert (found is None) == bool(reason)
    assert reason in why


def test_without_kernels_and_with_an_unreadable_target(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packaged, "FOLDER", tmp_path / "_kernels")
    assert packaged.open_packaged(TARGET) == (
        None,
        "this installation came without compiled kernels",
    )
    packaged.pack([], [], TARGET, tmp_path / "_kernels")
    for text in ("", "[]", '{"arch": "sm_90a"}', "\0"):
        (tmp_path / "_kernels" / packaged.TARGET_FILE).write_text(text)
        assert "cannot be read" in packaged.open_packaged(TARGET)[1]


# ---------------------------------------------------------------- whom it is trusted from


@pytest.mark.parametrize("place", ["", packaged.TARGET_FILE, "a.so"])
@pytest.mark.parametrize("fault", ["mode", "owner", "link"])
def test_a_folder_that_more_can_write_than_the_package_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, fault: str
) -> None:
    folder = tmp_path / "_kernels"
    monkeypatch.setattr(packaged, "FOLDER", folder)
    packaged.pack([], [], TARGET, folder)
    (folder / "a.so").write_bytes(b"")
    for path in (tmp_path, folder, *folder.iterdir()):
        path.chmod(path.stat().st_mode & ~0o022)
    assert packaged.open_packaged(TARGET)[1] == ""
    path = folder / place
    if fault == "mode":
        path.chmod(path.stat().st_mode | 0o002)
    elif fault == "owner":
        if os.geteuid() != 0:
            pytest.skip("only root can give files away")
        os.chown(path, 12345, -1)
    else:
        path.rename(tmp_path / "elsewhere")
        path.symlink_to(tmp_path / "elsewhere")
    found, reason = packaged.open_packaged(TARGET)
    assert found is None
    assert "can be written by more users than the package that it lies in" in reason


def test_a_package_of_another_owner_may_bring_kernels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An administrator's, as site-packages often is: whose code runs here already."""
    folder = tmp_path / "_kernels"
    monkeypatch.setattr(packaged, "FOLDER", folder)
    packaged.pack([], [], TARGET, folder)
    mine = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: mine + 1)
    assert packaged.open_packaged(TARGET)[1] == ""


def test_info_says_where_kernels_come_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHCORE_CACHE_DIR", str(tmp_path))
    (tmp_path / "a.so").write_bytes(b"")
    monkeypatch.setattr("flashcore.jit.target.detect_target", lambda: TARGET)
    monkeypatch.setattr(packaged, "FOLDER", tmp_path / "_kernels")
    report = info.collect()
    assert report["kernels"]["installed"] == "this installation came without compiled kernels"
    assert report["kernels"]["cache"] == f"1 in {tmp_path}"
    packaged.pack([], [], TARGET, tmp_path / "_kernels")
    assert info.collect()["kernels"]["installed"] == "0 for sm_90a, CuTe DSL 4.8.1 cu13"
