"""The serving benchmark's tables and plots, and those of benchmarks/report.py."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flashcore.bench.serve.engine import EngineOptions
from flashcore.bench.serve.report import format_table, plot, summarise
from flashcore.bench.serve.suite import Turns, run_serve
from flashcore.bench.serve.workloads import parse_workload
from tests.serve_fakes import OPTIONS, result_of, starting


def test_table_and_plot(tmp_path: Path) -> None:
    result = result_of(["4x16+8:40", "4x16+8:1", "7x1+1:9"], ["flashcore", "fa3"])
    table = format_table(result).splitlines()
    assert table[1].split() == [
        "4x16+8:40",
        *["flashcore", "400", "10.00", "1.0", "2.500", "0.0", "1.38"],
    ]
    assert table[3].split()[:5] == ["4x16+8:1", "flashcore", "-", "-", "10.0"]
    assert table[-1] == "not timed: fa3 on 7x1+1:9: needs room"
    pytest.importorskip("matplotlib")
    plot(result, tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_vllm_s_rows_are_compared_with_its_own_flash_attention() -> None:
    peers = {"fa3": "FLASH_ATTN"}
    rows = [
        {
            **row,
            "engine": "vllm",
            **dict.fromkeys(("backend", "name"), peers.get(row["backend"], row["backend"])),
        }
        for row in result_of(["4x16+8:40"], ["flashcore", "fa3"])["rows"]
    ]
    (entry,) = summarise(rows)
    assert entry["speed_over_FLASH_ATTN"] == {"flashcore": 2.5, "FLASH_ATTN": 1.0}
    assert entry["flashcore_over"] == {"FLASH_ATTN": 2.5}
    table = format_table({"rows": rows, "summary": [entry], "skipped": []}).splitlines()
    assert table[1].split()[1:6] == ["flashcore", "400", "10.00", "1.0", "2.500"]


def load_report() -> Any:
    """benchmarks/report.py as a module."""
    path = Path(__file__).parent.parent / "benchmarks" / "report.py"
    spec = importlib.util.spec_from_file_location("report", path)
    assert spec is not None
    assert spec.loader is not None
    report = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(report)
    return report


def test_table_of_the_readme() -> None:
    report = load_report()
    result = result_of(["4x16+8:40", "llama-3.2-1b/4x16+8:1"], ["flashcore", "fa3"])
    named = ("sglang", "torch", "flashinfer-python", "sglang-kernel")
    about = {"versions": dict.fromkeys(named, "1"), "command": "flashcore bench serve"}
    lines = report.serve_table({**result, **about}).splitlines()
    assert lines[0].count("|") == lines[1].count("|") == lines[2].count("|")
    assert lines[2] == (
        "| 4x16+8:40 | tiny | 400 tokens/s, 10.0 ms | 160 tokens/s, 25.0 ms | 2.50 |"
    )
    assert lines[3] == (
        "| 4x16+8:1 | llama-3.2-1b | first token 10 ms | first token 25 ms | 2.50 |"
    )
    assert lines[-1].endswith("`flashcore bench serve`")
    runs = {"runs": [{"command": "a"}, {"command": "b"}]}
    assert report.serve_table({**result, **about, **runs}).endswith("; `a`, `b`")


ABOUT = {
    "device": "a GPU",
    "driver": "1",
    "commit": "abc",
    "date": "2026-01-01T00:00:00",
    "command": "flashcore bench serve",
    "versions": dict.fromkeys(("sglang", "torch", "sglang-kernel"), "1"),
}


def test_table_of_small_steps() -> None:
    def row(backend: str, step: float, **over: Any) -> dict[str, Any]:
        figures = {"step_ms": step, "ttft_ms": 20 * step, "first_request_ttft_ms": 30 * step}
        spread = {"step_ms_quartiles": [step - 0.01, step + 0.02], "ttft_ms_quartiles": None}
        about = {"workload": "m/1x2+3:4", "spec": "m/1x2+3:4", "model": "m", "backend": backend}
        return {**about, **figures, **spread, "over_fa3": over}

    ratio = {"median": 0.98, "low": 0.97, "high": 1.0, "pairs": 15}
    alone = {**row("flashcore", 9.0), "workload": "m/5x2+3:4", "spec": "m/5x2+3:4"}
    rows = [row("flashcore", 1.47, step_ms=ratio, first_request_ttft_ms=ratio), row("fa3", 1.5)]
    lines = load_report().serve_small_table({**ABOUT, "rows": [*rows, alone]}).splitlines()
    assert lines[2:4] == [
        "| 1x2+3:4 | m | decode step | 1.47 ms (1.46 to 1.49) | 1.5 ms (1.49 to 1.52) | "
        "0.980 (0.970 to 1.000) |",
        "| 1x2+3:4 | m | first token, first of its kind | 44.1 ms | 45 ms | "
        "0.980 (0.970 to 1.000) |",
    ]
    assert lines[4] == ""
    assert lines[5].endswith("`flashcore bench serve`")


def test_table_of_model_families() -> None:
    def row(family: str, backend: str, **more: Any) -> dict[str, Any]:
        nothing = dict.fromkeys(("peer", "mean_difference", "same_tokens", "tokens", "passed"))
        return {"family": family, "sglang": "1", "backend": backend, **nothing, **more}

    close = {"peer": "fa3", "mean_difference": 0.0123, "same_tokens": 9, "tokens": 10}
    rows = [
        row("llama", "flashcore", **{**close, "passed": True}),
        row("llama", "triton", **{**close, "mean_difference": 0.02}),
        row("odd", "flashcore", **{**close, "passed": False, "peer": "triton"}),
        row("odd", "fa3", error="ValueError: no"),
        row("mla", "flashcore", passed=False, error="MLA: use fa3 | triton"),
        row("mla", "triton", **close),
    ]
    lines = load_report().models_table({**ABOUT, "rows": rows}).splitlines()
    assert lines[2:5] == [
        "| llama | yes | fa3 | 0.0123 | 0.0200 | 9 of 10 |",
        "| odd | no | triton | 0.0123 | fa3 did not run | 9 of 10 |",
        "| mla | no: MLA: use fa3 \\| triton | | | 0.0123 | |",
    ]


def test_table_of_model_families_in_vllm() -> None:
    told = {"family": "llama", "vllm": "0.26.0", "same_tokens": 9, "tokens": 10, "passed": True}
    rows = [
        {**told, "backend": "flashcore", "peer": "FLASH_ATTN", "mean_difference": 0.0123},
        {**told, "backend": "TRITON_ATTN", "peer": "FLASH_ATTN", "mean_difference": 0.02},
    ]
    about = {**ABOUT, "versions": {"vllm": "0.26.0", "torch": "2.11.0"}}
    lines = load_report().models_table({**about, "rows": rows}).splitlines()
    assert "TRITON_ATTN from FLASH_ATTN" in lines[0]
    assert lines[2] == "| llama | yes | FLASH_ATTN | 0.0123 | 0.0200 | 9 of 10 |"
    assert "vLLM 0.26.0" in lines[-1]


def test_tables_that_have_no_file_yet_stay_as_they_are(tmp_path: Path) -> None:
    report = load_report()
    text = "a\n<!-- table: models -->\nold\n<!-- end -->\nb\n"
    assert report.filled(text, tmp_path) == text
    rows = [{"family": "x", "backend": "flashcore", "passed": False, "error": "e"}]
    (tmp_path / "models_h200.json").write_text(json.dumps({**ABOUT, "rows": rows}))
    assert "| x | no: e |" in report.filled(text, tmp_path)
    for page in report.PAGES:
        assert report.filled(page.read_text()) == page.read_text(), page


def test_table_without_the_baseline() -> None:
    result = result_of(["4x16+8:40"], ["flashcore"])
    assert format_table(result).splitlines()[1].split()[5] == "-"
    assert "speed_over_fa3" not in result["summary"][0]


def test_engines_of_one_backend_have_rows_of_their_own() -> None:
    """Caches of several dtypes, in one run: each engine's samples are its own."""
    steps = {"auto": 20.0, "fp8_e4m3": 10.0}

    def answer(options: EngineOptions, command: dict[str, Any]) -> dict[str, Any]:
        if command["do"] == "start":
            return {}
        return {"samples": [{"step_ms": steps[options.kv_cache_dtype], "ttft_ms": 1.0}]}

    engines = [
        replace(OPTIONS, backend=backend, kv_cache_dtype=dtype, label=label)
        for dtype, label in (("auto", ""), ("fp8_e4m3", "fp8_e4m3"))
        for backend in ("flashcore", "fa3")
    ]
    for together in (True, False):
        result = run_serve(
            [parse_workload("4x16+8:40")],
            engines,
            Turns(1, 1, together),
            start=starting(answer),
        )
        found = {(r["name"], r["backend"], r["kv_cache_dtype"]): r for r in result["rows"]}
        assert {key: row["step_ms"] for key, row in found.items()} == {
            ("flashcore", "flashcore", "auto"): 20.0,
            ("fa3", "fa3", "auto"): 20.0,
            ("flashcore fp8_e4m3", "flashcore", "fp8_e4m3"): 10.0,
            ("fa3 fp8_e4m3", "fa3", "fp8_e4m3"): 10.0,
        }
        (entry,) = summarise(result["rows"])
        assert entry["speed_over_fa3"]["flashcore fp8_e4m3"] == 2.0
