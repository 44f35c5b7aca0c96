"""`flashcore bench paged --latency` without a GPU: workloads, bounds, tables; times are made up."""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from flashcore.bench import bandwidth, latency, paged, paged_providers, plan_time
from flashcore.bench import machine as machine_module
from flashcore.bench.latency import (
    PLAN_SHAPES,
    add_excess,
    arithmetic_rates,
    format_latency,
    latency_problems,
)
from flashcore.bench.paged_problems import PagedProblem, make_batch
from flashcore.cli import bench as bench_command
from tests import cli_calls
from tests.bench_paged_fakes import SMALL, complete, machine, measured, ours
from tests.cli_calls import assert_refused
from tools.bars import EXCESS_US, bars_of
from tools.bench_kernels import kernels

RATES = {
    **{"flops_per_second": 1e12, "product": "a product", "sm_mhz": 1000.0},
    **{"exponentials_per_second": 1e9, "exponentials_per_clock_and_sm": 16},
}


def test_the_workloads_and_their_dram_bounds() -> None:
    problems = {problem.name: problem for problem in latency_problems()}
    assert set(problems) == set(EXCESS_US)
    # Microseconds at 3.055 TB/s, as they are stated for an H100.
    stated = {
        "64x16384+512-4/1": 8.2,
        "256x4096+512-8/1": 22.6,
        "64x4096+512-32/2": 12.3,
        "64x4096+512-28/4": 24.7,
        "64x4096+512-32/8": 49.4,
        "64x4096+512-96/8": 49.4,
        "64x8192+512-64/8-d64": 27.4,
        "64x8192+512-16/2-d256": 27.4,
        "64x8192+512-8/4-d256": 54.9,
        "64x8192-90": 65,
        "256x4096-90": 137,
        "4x4x1024+256-page16": 11.0,
        "128x256+128-32/8": 22.3,
        "512x128+128-32/8": 88,
        "1x0+128-32/8": 0.17,
        "8x0+1024-8/1": 1.4,
    }
    for name, bound in stated.items():
        problem = problems[name]
        unique = make_batch(problem).unique_tokens * problem.token_bytes
        assert unique / 3.055e6 == pytest.approx(bound, rel=0.03), name


def test_groups_have_prefixes_of_their_own() -> None:
    problem = PagedProblem("groups", 6, 96, prefix_tokens=64, groups=3, **SMALL)
    batch = make_batch(problem)
    rows = [row[:6].tolist() for row in batch.page_table]
    for first in (0, 2, 4):
        assert rows[first][:4] == rows[first + 1][:4]
        assert not set(rows[first]) & set(rows[(first + 2) % 6])
        assert not set(rows[first][4:]) & set(rows[first + 1])
    assert batch.unique_tokens == 3 * 64 + 6 * 32
    prefixes, own = batch.levels
    assert prefixes.q_offsets.tolist() == [0, 2, 4, 6]
    assert own.q_offsets.tolist() == [0, 1, 2, 3, 4, 5, 6]


def test_excess_is_over_the_longer_bound() -> None:
    problem = PagedProblem("small", 3, 128, prefix_tokens=96, **SMALL)
    (row,) = measured(ours(), problem=problem)["rows"]
    assert row["flops"] == 4 * 3 * 128 * 4 * 64  # q heads, head_dim
    row["bound_ms"], row["ms"] = 0.25, 1.0
    add_excess([row], RATES, 0.125)
    assert row["products_ms"] == pytest.approx(row["flops"] / 1e9)
    assert row["exponentials_ms"] == pytest.approx(3 * 128 * 4 / 1e6)
    assert row["arithmetic_ms"] == max(row["products_ms"], row["exponentials_ms"]) < 0.25
    assert row["empty_graph_ms"] == 0.125
    assert row["excess_us"] == pytest.approx(1e3 * (1.0 - 0.125 - 0.25))
    slow = {**RATES, "exponentials_per_second": 1e6}
    add_excess([row], slow, 0.125)
    assert row["arithmetic_ms"] == pytest.approx(1.536)
    assert row["excess_us"] == pytest.approx(1e3 * (1.0 - 0.125 - 1.536))
    add_excess([row], {**RATES, "exponentials_per_second": None}, 0.125)
    assert row["arithmetic_ms"] == row["products_ms"]


def test_rates_are_of_this_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "PRODUCT_SIZE", 32)
    clocks: list[dict[str, Any]] = [{}, {"sm_mhz": 1500.0}, {"sm_mhz": 1980.0}]
    rates = arithmetic_rates(machine(lambda graph: 0.5), clocks, 132, 3)
    assert rates["flops_per_second"] == pytest.approx(2 * 32**3 / 0.5e-3)
    assert rates["exponentials_per_second"] == pytest.approx(16 * 132 * 1980e6)
    assert arithmetic_rates(machine(), [{}], 132, 3)["exponentials_per_second"] is None


def latency_result() -> dict[str, Any]:
    problem = PagedProblem("1x0+128-32/8", 3, 128, prefix_tokens=96, **SMALL)
    result = measured(ours(), ours(name="fa3"), problem=problem)
    add_excess(result["rows"], RATES, 0.002)
    plans = [{"sequences": n, "pages": pages, "us": 10.0 + n} for n, pages in PLAN_SHAPES]
    return {**complete(result), "arithmetic": RATES, "plan": plans, "versions": {"torch": "2"}}


def test_table_says_times_excess_and_bounds() -> None:
    result = {**latency_result(), "command": "flashcore bench"}
    excess = result["rows"][0]["excess_us"]
    text = format_latency(result)
    for words in (f"1000.0 ({excess:>5.1f})", "plan of 256 x 64 pages: 266.0 us", "1000 MHz"):
        assert words in text
    assert "DIFFERENT" not in text
    result["rows"][0]["same_bits_on_repeats"] = False
    assert "DIFFERENT bits on repeats: 1x0+128-32/8" in format_latency(result)


def test_table_of_the_report() -> None:
    path = Path(__file__).parents[1] / "benchmarks" / "report.py"
    spec = importlib.util.spec_from_file_location("benchmark_report_of_latency", path)
    assert spec is not None
    assert spec.loader is not None
    report = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(report)
    result = {**latency_result(), "command": "flashcore bench"}
    lines = report.latency_table(result).splitlines()
    assert lines[0].startswith("| batch | bound, DRAM | bound, arithmetic |")
    assert lines[0].endswith("| flashcore | FA3 |")
    assert lines[2].startswith("| 1x0+128-32/8 | ")
    assert "| plan, 256 x 64 pages | | | | 266.0 | |" in lines
    assert lines[-1].endswith("`flashcore bench`")


def test_bars() -> None:
    found = {(bar["workload"], bar["figure"]): bar for bar in bars_of(latency_result())}
    assert found["1x0+128-32/8", "excess, us"]["met"] is False
    assert found["1x0+128-32/8", "time / the best peer's"]["met"] is True
    assert found["1x0+128-32/8", "other bits in 100 repeats"]["met"] is True
    assert found["1x64 pages", "plan on the GPU, us"]["met"] is True
    assert found["256x64 pages", "plan on the GPU, us"]["met"] is False


def test_kernels_of_the_benchmarks_are_known_ahead() -> None:
    said = [kernel.describe() for kernel in kernels()]
    assert len(said) == len(set(said)) > 20
    for words in ("head_dim=256 v_head_dim=256", "group_size=12", "group_size=7", "planner"):
        assert any(words in text for text in said)


# Command line


def parse(*words: str) -> argparse.Namespace:
    return cli_calls.parse(bench_command, "paged", *words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--plan",), "--plan does not go with --latency"),
        (("--random", "3"), "--random does not go with --latency"),
        (("--dram",), "--dram does not go with --latency"),
        (("--plot", "x.png"), "--plot does not go with --latency"),
        (("--workload", "8x131072"), "no workload has '8x131072' in its name; there are 64x16384+"),
    ],
)
def test_refusals(words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert_refused(bench_command, parse("--latency", *words), message, capsys)


def test_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the command line to the JSON, with a pretended GPU whose every replay takes 1 ms."""
    problem = PagedProblem("few", 3, 128, prefix_tokens=96, **SMALL)
    asked: list[Any] = []

    def plans(pretended: Any, rounds: int, sizes: Any) -> list[dict[str, Any]]:
        asked.append(sizes)
        return [{"sequences": n, "pages": pages, "us": 9.0} for n, pages in sizes]

    about = {"device": "a GPU", "sm_count": 132, "driver": "1"}
    for module, name, value in (
        (torch.cuda, "is_available", lambda: True),
        (torch.cuda, "empty_cache", lambda: None),
        (latency, "latency_problems", lambda: [problem]),
        (latency, "PRODUCT_SIZE", 16),
        (bandwidth, "read_bandwidth", lambda device: {bandwidth.TORCH_SUM: 1e9, "a loop": 2e9}),
        (paged, "cuda_machine", lambda *, write: machine()),
        (paged, "empty_graph_ms", lambda pretended, rounds: 1.0),
        (paged_providers, "paged_providers", lambda **_: ([ours()], {"fa3": "absent"})),
        (plan_time, "plan_times", plans),
        (machine_module, "describe_device", lambda: about),
        (machine_module, "read_clocks", lambda: {"sm_mhz": 1900.0}),
    ):
        monkeypatch.setattr(module, name, value)
    file = tmp_path / "latency.json"
    assert bench_command.run(parse("--latency", "--rounds", "2", "--json", str(file))) == 0
    result = json.loads(file.read_text())
    (row,) = result["rows"]
    promised = {"workload", "kernel", "ms", "bound_ms", "arithmetic_ms", "empty_graph_ms"}
    assert {*promised, "excess_us"} <= set(row)
    assert row["excess_us"] == pytest.approx(-1e3 * max(row["bound_ms"], row["arithmetic_ms"]))
    assert asked == [PLAN_SHAPES]
    assert len(result["plan"]) == len(PLAN_SHAPES)
    assert result["arithmetic"]["sm_mhz"] == 1900.0
    assert "fa3: absent" in result["skipped"]
    assert "few " in capsys.readouterr().out


def test_xqa_is_a_peer_of_latency_alone() -> None:
    def names(xqa: bool) -> set[str]:
        found, missing = paged_providers.paged_providers(xqa)
        return {*missing, *(provider.name for provider in found)}

    assert names(True) - names(False) == {"flashinfer_xqa"}


def test_result_is_printed_without_a_gpu(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "latency.json"
    file.write_text(json.dumps(latency_result()))
    assert bench_command.run(parse("--from-json", str(file))) == 0
    assert "plan of 1 x 64 pages" in capsys.readouterr().out
    refused = parse("--from-json", str(file), "--plot", str(tmp_path / "p.png"))
    assert bench_command.run(refused) == 2
