"""Loading a compiled kernel: what it imports, what it checks, what it says of missing parts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from flashcore.jit import load, target
from flashcore.jit.cache import KernelCache
from flashcore.jit.inspect import find_tool
from flashcore.jit.kernel import Kernel
from flashcore.jit.target import MissingRuntimeError, detect_target
from tests.runtime_fixtures import CONSTANT, TESTS, TILE, ConstantConfig, needs_dsl, needs_loader
from tests.toy_kernels import TileConfig

_LOAD = """
import sys
sys.path.insert(0, {root!r})
from pathlib import Path
from flashcore.jit.cache import KernelCache
from flashcore.jit.kernel import Kernel
from tests.runtime_fixtures import TILE
from tests.toy_kernels import TileConfig

cache = KernelCache.open(Path({folder!r}))
function = cache.function(Kernel(TILE, TileConfig()))
assert callable(function)
loaded = [name for name in ("cutlass", "cutlass.cute") if name in sys.modules]
print("compiled", cache.compiled, "imported", loaded)
try:
    function(1, 2, 3)
except Exception as error:
    print(type(error).__name__, error)
"""


@pytest.fixture(scope="module")
def tile_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that holds the compiled tile kernel."""
    folder = tmp_path_factory.mktemp("cache")
    KernelCache.open(folder).ensure(Kernel(TILE, TileConfig()))
    return folder


@needs_dsl
def test_loading_does_not_import_the_dsl(tile_folder: Path) -> None:
    code = _LOAD.format(root=str(TESTS.parent), folder=str(tile_folder))
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.strip().splitlines()
    assert first == "compiled 0 imported []"
    # The loaded function is the kernel's: it checks the arguments of the tile kernel.
    assert "mA" in second


@needs_dsl
def test_compiling_needs_no_gpu_and_leaves_the_environment(
    tile_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUTE_DSL_ARCH", raising=False)
    entry = KernelCache.open(tile_folder).entry(Kernel(TILE, TileConfig()))
    assert entry is not None
    assert entry.facts["target"]["arch"] == "sm_90a"
    assert entry.facts["symbol"].startswith("flashcore_tile_")
    assert entry.facts["dynamic_smem_bytes"] >= 2 * 64 * 64 * 2


@needs_dsl
def test_an_import_of_the_dsl_before_does_not_choose_the_target(tmp_path: Path) -> None:
    code = """
import sys
import cutlass.cute
from pathlib import Path
from flashcore.jit.cache import KernelCache
from flashcore.jit.inspect import inspect_entry
from flashcore.jit.kernel import Kernel
from tests.runtime_fixtures import TILE
from tests.toy_kernels import TileConfig

print(inspect_entry(KernelCache.open(Path(sys.argv[1])).ensure(Kernel(TILE, TileConfig()))).arch)
"""
    environment = {name: value for name, value in os.environ.items() if name != "CUTE_DSL_ARCH"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=TESTS.parent,
        env=environment,
    )
    assert done.stdout.split() == ["sm_90a"], done.stderr


@needs_loader
def test_runtime_library_is_opened_once() -> None:
    toolkit = detect_target().toolkit
    assert load.open_runtime_library(toolkit) is load.open_runtime_library(toolkit)


@needs_loader
def test_missing_tvm_ffi_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = KernelCache.open(tmp_path)
    monkeypatch.setitem(sys.modules, "tvm_ffi", None)
    with pytest.raises(MissingRuntimeError, match=r"apache-tvm-ffi is not installed; .*pip"):
        cache.function(Kernel(CONSTANT, ConstantConfig()))


def test_missing_runtime_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target, "find_spec", lambda name: None)
    with pytest.raises(MissingRuntimeError, match=r"libcute_dsl_runtime\.so was not found; .*pip"):
        target.toolkit_flavour()
    with pytest.raises(MissingRuntimeError, match="of cu12 was not found"):
        target.runtime_library("cu12")


@pytest.mark.parametrize(
    ("installed", "driver", "expected"),
    [
        ((12, 13), None, "cu13"),
        ((12, 13), 13, "cu13"),
        ((12, 13), 12, "cu12"),
        ((12,), 13, "cu12"),
        ((12, 13), 14, "cu13"),
    ],
)
def test_toolkit_is_the_newest_the_driver_runs(
    monkeypatch: pytest.MonkeyPatch, installed: tuple[int, ...], driver: int | None, expected: str
) -> None:
    monkeypatch.setattr(target, "installed_flavours", lambda: dict.fromkeys(installed, Path("x")))
    monkeypatch.setattr(target, "driver_cuda_major", lambda: driver)
    assert target.toolkit_flavour() == expected


def test_driver_too_old_for_every_toolkit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target, "installed_flavours", lambda: {13: Path("x")})
    monkeypatch.setattr(target, "driver_cuda_major", lambda: 12)
    with pytest.raises(MissingRuntimeError, match=r"supports CUDA 12, but only cu13"):
        target.toolkit_flavour()


def test_missing_disassembler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flashcore.jit.inspect.find_spec", lambda name: None)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(MissingRuntimeError, match="pip install nvidia-cuda-nvdisasm"):
        find_tool("nvdisasm")


def test_missing_compiler_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(family: object) -> None:
        raise ModuleNotFoundError("No module named 'cutlass'", name="cutlass")

    monkeypatch.setattr("flashcore.jit.kernel.Family.resolve_compiler", absent)
    from flashcore.jit.build import build_entry
    from tests.runtime_fixtures import TARGET

    with pytest.raises(MissingRuntimeError, match="needs cutlass, which is not installed"):
        build_entry(Kernel(CONSTANT, ConstantConfig()), TARGET, "0" * 64)
