"""Which bars a result meets; the figures are made up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flashcore.bench.dram import COUNTED
from flashcore.bench.paged_problems import paged_problems
from tools.bars import BEST_PEER, FA3, TIME_OVER_BOUND, format_bars, main, paged_bars, serve_bars

NAMES = {problem.name for problem in paged_problems()}


def row(workload: str, kernel: str, ms: float, **more: Any) -> dict[str, Any]:
    facts: dict[str, Any] = {"workload": workload, "kernel": kernel, "ms": ms}
    facts |= {"relative_error": 2e-3, "ratio_to_bound": ms, "unique_kv_bytes": 1000}
    if kernel == "flashcore":
        facts |= {"same_bits_on_repeats": True, "repeats": 100}
        facts |= {"relative_error_with_sharing_ignored": 1e-3}
        facts |= {"relative_distance_with_sharing_ignored": 2e-3}
    return {**facts, **more}


def bars(*rows: dict[str, Any], **extras: Any) -> dict[tuple[str, str], Any]:
    found = paged_bars({"rows": list(rows), **extras})
    return {(bar["workload"], bar["figure"]): (bar["value"], bar["met"]) for bar in found}


def test_every_workload_has_a_bar_of_speed() -> None:
    assert {*TIME_OVER_BOUND, *BEST_PEER, *FA3} == NAMES
    assert {*COUNTED} <= NAMES


def test_a_bar_is_met_up_to_its_value() -> None:
    name = "8x131072-70"
    for ms, met in ((1.04, True), (1.0401, False)):
        assert bars(row(name, "flashcore", ms))[name, "time / bound"] == (ms, met)


def test_the_best_peer_is_the_fastest_of_all() -> None:
    name = "ragged-tree"
    ours = row(name, "flashcore", 1.2)
    found = bars(ours, row(name, "fa3", 2.0), row(name, "cascade_fa2", 1.0))
    assert found[name, "time / the best peer's"] == (1.2, False)
    assert found[name, "time / bound"] == (1.2, True)
    assert bars(ours)[name, "time / the best peer's"] == (None, None)


def test_prefill_is_held_against_fa3_alone() -> None:
    (name,) = FA3
    found = bars(
        row(name, "flashcore", 9.0), row(name, "fa3", 10.0), row(name, "flashinfer_fa3", 1.0)
    )
    assert found[name, "time / FA3's"] == (0.9, True)
    assert (name, "time / bound") not in found


def test_errors_bits_and_bytes() -> None:
    name = COUNTED[0]
    found = bars(
        row(name, "flashcore", 1.0, relative_error=3.1e-3, dram_read_bytes=1101),
        row(name, "fa3", 1.0),
    )
    assert found[name, "error / FA3's"] == (pytest.approx(1.55), False)
    assert found[name, "DRAM bytes / unique KV bytes"] == (pytest.approx(1.101), False)
    assert found[name, "sharing found to ignored / error"] == (2.0, True)  # the smaller error
    assert found[name, "other bits in 100 repeats"] == (0.0, True)
    uncounted = bars(row(name, "flashcore", 1.0, same_bits_on_repeats=False))
    assert uncounted[name, "other bits in 100 repeats"] == (1.0, False)
    assert uncounted[name, "DRAM bytes / unique KV bytes"] == (None, None)
    assert uncounted[name, "error / FA3's"] == (None, None)


def test_plan_and_random_batches() -> None:
    found = bars(
        plan=[{"sequences": 256, "pages": 64, "us": 40.5}],
        random={"batches": 200, "median": 1.0, "worst": 1.06},
    )
    assert found == {
        ("256x64 pages", "plan on the GPU, us"): (40.5, False),
        ("200 random", "time / time with sharing ignored, median"): (1.0, True),
        ("200 random", "time / time with sharing ignored, worst"): (1.06, False),
    }
    assert bars() == {}


def test_a_peer_alone_has_no_bars() -> None:
    assert bars(row("ragged-tree", "fa3", 1.0)) == {}


def test_lines_begin_with_the_verdict() -> None:
    name = "8x131072-70"
    lines = format_bars(paged_bars({"rows": [row(name, "flashcore", 1.05)]}))
    words = [line.split()[0] for line in lines]
    assert words == ["MISS", "-", "-", "PASS", "PASS"]  # no bytes were counted, no FA3 ran
    assert lines[0].split() == [
        *("MISS", name, "time", "/", "bound"),
        *["1.050,", "bar", "1.04,", "goal", "1.01"],
    ]


def test_serve_bars_are_those_of_the_figures() -> None:
    ratios = {
        figure: {"median": 1.02, "low": 1.0, "high": 1.03}
        for figure in ("step_ms", "ttft_ms", "first_request_ttft_ms", "host_us")
    }
    rows = [{"workload": "w", "backend": "flashcore", "over_fa3": ratios}]
    rows.append({"workload": "w", "backend": "fa3"})
    assert [(bar["figure"], bar["bar"], bar["met"]) for bar in serve_bars({"rows": rows})] == [
        ("step_ms / FA3's", 1.01, False),
        ("ttft_ms / FA3's", 1.00, False),
        ("first_request_ttft_ms / FA3's", 1.05, True),
    ]


def test_results_that_stand_have_bars(capsys: pytest.CaptureFixture[str]) -> None:
    results = Path(__file__).parents[1] / "benchmarks/results"
    status = main([str(results / name) for name in ("paged_h100.json", "serve_small_h200.json")])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 40
    assert status == any(line.startswith("MISS") for line in lines)
    with pytest.raises(ValueError, match="neither a result"):
        main([str(results / "dense_h100.json")])
