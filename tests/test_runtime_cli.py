"""`flashcore compile` and `flashcore check` on a machine with no GPU."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import flashcore
from flashcore.cli import check, check_paged, compile_cmd
from flashcore.jit.gates import representative
from flashcore.jit.kernel import Kernel
from flashcore.problem import Packing, Rules
from flashcore.reference import attention_reference
from flashcore.sm90.config import dense
from flashcore.sm90.families import DENSE, PAGED
from flashcore.sm90.launch import dense as launch
from flashcore.sm90.shipped import shipped_kernels
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
    """Only that model's kernels: both tiles, both merges, the planners, and the tree mask's."""
    words = ("--cache-dir", str(tmp_path), "--list", "--serve", "32/8x128", "--page-size", "16")
    assert compile_cmd.run(parse(compile_cmd, *words, "--features", "tree")) == 0
    lines = capsys.readouterr().out.splitlines()
    paged = [line for line in lines if line.startswith("missing paged")]
    assert len(paged) == 3
    assert all("page_tokens=16 group_size=4" in line for line in paged)
    assert sum("tree" in line for line in paged) == 1
    assert sum(line.startswith("missing combine") for line in lines) == 2
    assert sum(line.startswith("missing planner") for line in lines) == 2
    assert compile_cmd.run(parse(compile_cmd, "--list", "--serve", "32/8x100")) == 2
    said = capsys.readouterr().err
    assert "head_dim must be a multiple of 8 from 8 to 256, got 100" in said


def test_compile_for_a_server_whose_values_are_narrower(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--cache-dir", str(tmp_path), "--list", "--serve", "16/4x192/128")
    assert compile_cmd.run(parse(compile_cmd, *words)) == 0
    lines = capsys.readouterr().out.splitlines()
    paged = [line for line in lines if line.startswith("missing paged")]
    assert len(paged) == 2
    assert all("head_dim=192 v_head_dim=128" in line for line in paged)
    merges = [line for line in lines if line.startswith("missing combine")]
    assert len(merges) == 2
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


# ---------------------------------------------------------------- check


@pytest.mark.skipif(torch.cuda.is_available(), reason="the message for a machine without a GPU")
@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ((), "torch sees no CUDA device"),
        (("--device", "cpu"), "cpu is not a CUDA device"),
        (("--device", "toaster"), "toaster"),
    ],
)
def test_check_without_a_gpu_is_one_line(
    capsys: pytest.CaptureFixture[str], words: tuple[str, ...], reason: str
) -> None:
    assert check.run(parse(check, *words)) == 2
    said = capsys.readouterr()
    assert said.err.startswith("flashcore check: no Hopper GPU to test: ")
    assert reason in said.err
    assert (said.err.count("\n"), said.out) == (1, "")


def test_check_of_no_case_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert check.run(parse(check, "--only", "no such case")) == 2
    assert "no case has 'no such case' in its name" in capsys.readouterr().err


def test_cases_reach_every_feature() -> None:
    cases = check.cases()
    assert len({case.name for case in cases}) == len(cases)
    assert {case.dtype for case in cases} == {"bf16", "fp16"}
    assert {64, 96, 128, 192, 256} <= {case.head_dim for case in cases}
    assert any(case.packed for case in cases)
    assert any(case.sinks for case in cases)
    assert any(case.softcap for case in cases)
    assert any(case.heads[0] != case.heads[1] for case in cases)


def stand_in(fault: str) -> Any:
    """The reference in the kernel's place, rounded as the kernel rounds, with a fault."""
    calls = [0]

    def attend(
        q: Any, k: Any, v: Any, rules: Rules, sinks: Any, packing: Packing, return_lse: bool
    ) -> Any:
        calls[0] += 1
        assert return_lse
        out, lse = attention_reference(
            q,
            k,
            v,
            causal=rules.causal,
            scale=rules.scale,
            window=(rules.window_left, rules.window_right),
            softcap=rules.softcap,
            sinks=sinks,
            cu_seqlens_q=packing.cu_seqlens_q,
            cu_seqlens_k=packing.cu_seqlens_k,
        )
        out, lse = out.to(q.dtype), lse.float()
        if fault == "values":
            out = out * 1.02
        if fault == "lse":
            lse = lse + 0.01
        if fault == "NaN":
            out = out.clone()
            out.view(-1)[5] = float("nan")
        if fault == "unstable" and calls[0] % 2:
            out = out.clone()
            out.view(-1)[0] += 0.01
        return out, lse

    return attend


SMALL = [
    check.Case("batched", ((70, 90),), 40, heads=(4, 2), causal=True, softcap=9.0, sinks=True),
    check.Case("packed", ((3, 5), (0, 4), (6, 0)), 64, packed=True, window=(2, 2)),
]


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
@pytest.mark.parametrize(
    ("fault", "problem"),
    [
        ("", ""),
        ("values", "the output is wrong"),
        ("NaN", "the output is wrong"),
        ("lse", "the LSE is wrong"),
        ("unstable", "two runs differ"),
    ],
)
def test_check_finds_faults(
    monkeypatch: pytest.MonkeyPatch, case: check.Case, fault: str, problem: str
) -> None:
    monkeypatch.setattr(launch, "dense_attention", stand_in(fault))
    assert check._run_case(case, 0, "cpu")[0] == problem


# Of gathered rows and of boxes, padded, and with fewer columns in V.
@pytest.mark.parametrize("case", [(40, 40, 1), (24, 16, 64)])
@pytest.mark.parametrize(
    ("fault", "problem"),
    [
        ("", ""),
        ("values", "the output is wrong"),
        ("lse", "the LSE is wrong"),
        ("unstable", "two runs differ"),
    ],
)
def test_check_finds_faults_of_paged_attention(
    monkeypatch: pytest.MonkeyPatch, case: tuple[int, int, int], fault: str, problem: str
) -> None:
    calls = [0]

    def attend(case: Any, q: Any, k: Any, v: Any, table: Any, kv_lens: Any, q_lens: Any) -> Any:
        calls[0] += 1
        plan = flashcore.plan(
            flashcore.layout_from_page_table(table, kv_lens, page_tokens=case.page_tokens),
            q_lens=q_lens,
            num_q_heads=8,
            num_kv_heads=2,
            head_dim=case.head_dim,
            v_head_dim=case.v_head_dim,
            page_tokens=case.page_tokens,
        )
        assert plan.stats().reuse > 1.5
        out, lse = flashcore.paged_attention(q, k, v, plan, return_lse=True)
        if fault == "values" or (fault == "unstable" and calls[0] == 2):
            out = out * 1.02
        return out, lse + 0.01 * (fault == "lse")

    monkeypatch.setattr(check_paged, "attend", attend)
    assert check._run_paged(check_paged.PagedCase(*case), 0, "cpu")[0] == problem


def test_paged_cases_use_what_is_shipped() -> None:
    shipped = {
        (c.head_dim, c.v_head_dim, c.page_tokens)
        for c in (kernel.config for kernel in shipped_kernels() if kernel.family is PAGED)
        if c.device_counts and c.dtype == "bf16" and c.group_size == 4
    }
    cases = check_paged.cases()
    assert {(c.head_dim, c.v_head_dim, c.page_tokens) for c in cases} <= shipped
    assert len({case.name for case in cases}) == len(cases)


def test_check_of_torch_compile_runs() -> None:
    assert check._run_compiled("cpu") == ("", "one graph")


def test_check_reports_a_case_that_raises(capsys: pytest.CaptureFixture[str]) -> None:
    def fails() -> tuple[str, str]:
        raise RuntimeError("the launch failed\nwith details")

    assert check._report("a case", fails) is False
    said = capsys.readouterr().out
    assert said.startswith("FAILED a case")
    assert said.rstrip().endswith("RuntimeError: the launch failed")


def test_check_reports_an_error_without_a_message(capsys: pytest.CaptureFixture[str]) -> None:
    def fails() -> tuple[str, str]:
        raise AssertionError

    assert check._report("a case", fails) is False
    assert capsys.readouterr().out.rstrip().endswith("AssertionError: AssertionError")


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
