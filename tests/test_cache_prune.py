"""`flashcore compile --prune`: what goes, what stays."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from flashcore.cli.main import main
from flashcore.jit.cache import KernelCache
from flashcore.jit.kernel import Family, Kernel
from flashcore.jit.prune import prune
from flashcore.jit.sources import source_digest
from tests.runtime_fixtures import CONSTANT, TARGET, TESTS, ConstantConfig, needs_loader

OLD = 2 * 3600


@pytest.fixture
def family(tmp_path: Path) -> Family:
    """The quick family, with sources that a test may change."""
    (tmp_path / "sources/tests").mkdir(parents=True)
    shutil.copy(TESTS / "runtime_fixtures.py", tmp_path / "sources/tests")
    return replace(CONSTANT, root=tmp_path / "sources")


def age(path: Path) -> Path:
    before = path.stat().st_mtime - OLD
    os.utime(path, (before, before))
    return path


@needs_loader
def test_what_is_not_current_goes(tmp_path: Path, family: Family) -> None:
    cache = KernelCache.open(tmp_path / "cache", TARGET)
    kept = Kernel(family, ConstantConfig(1))
    cache.ensure(kept)
    cache.path(kept).with_suffix(".sass.json").write_text("{}")
    KernelCache.open(cache.folder, replace(TARGET, dsl="4.6.0")).ensure(kept)
    (cache.folder / f"{'0' * 64}.so").write_bytes(b"damaged")
    shutil.copy(cache.path(kept), cache.folder / f"{'1' * 64}.so")  # renamed by hand
    (cache.folder / f"{'2' * 64}.sass.json").write_text("{}")
    age(cache.folder / f"{'2' * 64}.sass.json")
    abandoned = cache.folder / ".3.so.abc"
    abandoned.touch()
    age(abandoned)
    (cache.folder / ".4.so.abc").touch()  # being written
    (cache.folder / "README").touch()
    done = prune(cache.folder, [family], TARGET)
    assert (done.kernels, done.kept) == (3, 1)
    left = {path.name.replace(cache.path(kept).stem, "KEPT") for path in cache.folder.iterdir()}
    left -= {name for name in left if name.endswith(".lock")}  # young ones stay, for an hour
    assert left == {"KEPT.so", "KEPT.sass.json", ".4.so.abc", "README"}
    assert cache.entry(kept) is not None


@needs_loader
def test_other_sources_go(tmp_path: Path, family: Family) -> None:
    cache = KernelCache.open(tmp_path / "cache", TARGET)
    cache.ensure(Kernel(family, ConstantConfig(1)))
    assert prune(cache.folder, [family], TARGET).kernels == 0
    source = family.root / "tests/runtime_fixtures.py"
    source.write_text(source.read_text() + "# another version\n")
    source_digest.cache_clear()
    age(next(cache.folder.glob("*.lock")))
    assert prune(cache.folder, [family], TARGET).kernels == 1
    assert list(cache.folder.iterdir()) == []


@needs_loader
def test_families_that_are_gone_go(tmp_path: Path, family: Family) -> None:
    cache = KernelCache.open(tmp_path / "cache", TARGET)
    cache.ensure(Kernel(family, ConstantConfig(1)))
    assert prune(cache.folder, [replace(family, name="other")], TARGET).kernels == 1


def test_the_command_says_what_it_did(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / f"{'0' * 64}.so").write_bytes(b"damaged" * 1024)
    assert main(["compile", "--prune", "--cache-dir", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"kernels removed: 1 (0.0 MiB), kept: 0, in {tmp_path}\n"
