"""`flashcore compile` and `flashcore check` on a machine with no GPU."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from flashcore.cli import compile_cmd
from flashcore.jit.gates import representative
from flashcore.jit.kernel import Kernel
from flashcore.sm90.config import dense
from flashcore.sm90.families import DENSE
from tests.runtime_fixtures import CONSTANT, ConstantConfig, needs_dsl

GOOD = dense.choose(dense.DenseProblem("bf16", 64, 1, 128, 128, 1, 1))
ILLEGAL = replace(GOOD, tile_n=24)


def parse(command: ModuleType, *words: str) -> Any:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(words)


def ship(monkeypatch: pytest.MonkeyPatch, *configs: dense.DenseConfig) -> None:
    kernels = [Kernel(DENSE, config) for config in configs]
    monkeypatch.setattr("flashcore.sm90.shipped.shipped_kernels", lambda: kernels)


# ---------------------------------------------------------------- compile


@needs_dsl
def test_compile_fills_the_cache_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ship(monkeypatch, GOOD)
    words = ("--cache-dir", str(tmp_path), "--jobs", "1")
    said = []
    for extra in ("--list", None, "--list", None):
        assert compile_cmd.run(parse(compile_cmd, *words, *([extra] if extra else []))) == 0
        said.append(capsys.readouterr().out)
    assert said[0].startswith("missing dense dtype=bf16 head_dim=64")
    assert said[1].startswith("1 compiled, 0 already there, 0 failed")
    assert said[2].startswith("cached  dense dtype=bf16 head_dim=64")
    assert said[3].startswith("0 compiled, 1 already there, 0 failed")


def test_compile_for_a_server(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Only that model's kernels: both tiles, all merges, the planners, and the tree mask's."""
    words = ("--cache-dir", str(tmp_path), "--list", "--serve", "32/8x128", "--page-size", "16")
    assert compile_cmd.run(parse(compile_cmd, *words, "--features", "tree")) == 0
    lines = capsys.readouterr().out.splitlines()
    paged = [line for line in lines if line.startswith("missing paged")]
    assert len(paged) == 3
    assert all("page_tokens=16 group_size=4" in line for line in paged)
    assert sum("tree" in line for line in paged) == 1
    assert sum(line.startswith("missing merge") for line in lines) == 3
    assert sum(line.startswith("missing planner") for line in lines) == 3
    assert compile_cmd.run(parse(compile_cmd, "--list", "--serve", "32/8x100")) == 2
    said = capsys.readouterr().err
    assert "head_dim must be a multiple of 8 from 8 to 256, got 100" in said


def test_compile_for_a_deterministic_server(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--cache-dir", str(tmp_path), "--list", "--serve", "8/8x256", "--batch-invariant")
    assert compile_cmd.run(parse(compile_cmd, *words)) == 0
    lines = capsys.readouterr().out.splitlines()
    (paged,) = [line for line in lines if line.startswith("missing paged")]  # of the one tile
    assert "chunked" in paged
    merges = [line for line in lines if line.startswith("missing merge")]
    assert all("fixed_order" in line for line in merges)


def test_compile_for_a_server_with_an_fp8_cache(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--cache-dir", str(tmp_path), "--list", "--serve", "32/8x128")
    for dtype in ("e4m3", "e5m2"):
        assert compile_cmd.run(parse(compile_cmd, *words, "--kv-cache-dtype", f"fp8_{dtype}")) == 0
        lines = capsys.readouterr().out.splitlines()
        paged = [line for line in lines if line.startswith("missing paged")]
        assert len(paged) == 3
        (expanded,) = [line for line in paged if f"kv_dtype={dtype}" not in line]
        assert expanded.endswith(" expanded")  # of long prefills
    assert compile_cmd.run(parse(compile_cmd, *words)) == 0
    assert "kv_dtype" not in capsys.readouterr().out
    odd = ("--list", "--serve", "32/8x72", "--kv-cache-dtype", "fp8_e4m3")
    assert compile_cmd.run(parse(compile_cmd, *odd)) == 2
    assert "head_dim of fp8 pages must be a multiple of 16, got 72" in capsys.readouterr().err


def test_compile_for_a_server_whose_values_are_narrower(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--cache-dir", str(tmp_path), "--list", "--serve", "16/4x192/128")
    assert compile_cmd.run(parse(compile_cmd, *words)) == 0
    lines = capsys.readouterr().out.splitlines()
    paged = [line for line in lines if line.startswith("missing paged")]
    assert len(paged) == 2
    assert all("head_dim=192 v_head_dim=128" in line for line in paged)
    merges = [line for line in lines if line.startswith("missing merge")]
    assert len(merges) == 3
    assert all("head_dim=128" in line for line in merges)
    assert compile_cmd.run(parse(compile_cmd, "--list", "--serve", "16/4x128/192")) == 2
    assert "v_head_dim must be at most head_dim (128), got 192" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ("--serve", "32x128"),
        ("--serve", "32/7x128"),
        ("--serve", "32/8x128/"),
        ("--features", "wings"),
    ],
)
def test_compile_rejects_a_shape_that_is_none(words: tuple[str, str]) -> None:
    with pytest.raises(SystemExit):
        parse(compile_cmd, *words)


@needs_dsl
@pytest.mark.parametrize("gate", [False, True])
def test_compile_reports_a_kernel_that_fails(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    gate: bool,
) -> None:
    ship(monkeypatch, ILLEGAL)
    words = ["--cache-dir", str(tmp_path), "--jobs", "1", *(["--gate"] if gate else [])]
    assert compile_cmd.run(parse(compile_cmd, *words)) == 1
    said = capsys.readouterr()
    assert "tile_n 24: 16 to 256, step 16" in said.out + said.err
    assert "1 failed" in said.out


@needs_dsl
def test_compile_refuses_a_shared_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ship(monkeypatch, GOOD)
    tmp_path.chmod(0o777)
    assert compile_cmd.run(parse(compile_cmd, "--cache-dir", str(tmp_path))) == 2
    said = capsys.readouterr().err
    assert said.startswith("flashcore compile: cache folder")
    assert said.count("\n") == 1


@pytest.mark.parametrize("jobs", ["0", "-1", "many"])
def test_compile_rejects_a_bad_number_of_jobs(jobs: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse(compile_cmd, "--jobs", jobs)
    assert stopped.value.code == 2


# ---------------------------------------------------------------- the subset


def test_representative_subset_has_every_value() -> None:
    kernels = [
        Kernel(CONSTANT, ConstantConfig(value, broken, False))
        for value in range(5)
        for broken in (False, True)
    ]
    chosen = representative(kernels)
    assert {kernel.config.value for kernel in chosen} == set(range(5))
    assert {kernel.config.broken for kernel in chosen} == {False, True}
    assert len(chosen) == 5
    assert representative([]) == []
