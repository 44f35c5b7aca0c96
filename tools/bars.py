"""What this project wants to reach, held against results: python tools/bars.py RESULT.json ...

Results of `flashcore bench paged`, also with --latency, and of `flashcore bench serve --small`. A
line for each bar: PASS, MISS, or a dash where the figure was not measured in that run. Every bar is
the most that a figure may be: a time over another time, bytes over bytes, an error over an error,
microseconds; a goal is what the bar is the cautious form of. Exit status 1 where one is missed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flashcore.bench.dram import COUNTED
from flashcore.bench.paged_providers import OURS
from flashcore.bench.rows import Row, by_workload

SERVE = {"step_ms": (1.01, 0.97), "ttft_ms": (1.00, 0.80), "first_request_ttft_ms": (1.05, 1.00)}
"""Figure -> (bar, goal) of its ratio to FA3's."""

TIME_OVER_BOUND = {
    "8x131072-70": (1.04, 1.01),
    "8x65536-70-mha": (1.02, 1.01),
    "16x32768-50": (1.05, 1.02),
    "32x8192-30": (1.08, 1.05),
    "32x8192-70": (1.20, 1.12),
    "64x8192-90": (1.35, 1.18),
    "256x4096-90": (1.27, 1.12),
    "ragged-tree": (1.3, 1.15),
}
"""Workload -> (bar, goal)."""
BEST_PEER = (
    *("32x8192-0-page128", "32x8192-0-page64", "32x8192-0-page16", "32x8192-0-page1"),
    *("64x2048-0-64heads", "1x131072-0", "ragged-tree"),
)
"""Workloads that must not take longer than the best peer."""
FA3 = ("prefill-16x2048",)
"""Workloads that must not take longer than FlashAttention-3: bound by arithmetic."""
DRAM_BYTES = 1.1
PLAN_US = 40.0
EXCESS_US = {
    "64x16384+512-4/1": (8, 5),
    "256x4096+512-8/1": (8, 5),
    "64x4096+512-32/2": (8, 5),
    "64x4096+512-28/4": (8, 5),
    "64x4096+512-32/8": (8, 5),
    "64x4096+512-96/8": (12, 6),
    "64x8192+512-64/8-d64": (16, 8),
    "64x8192+512-16/2-d256": (11, 6),
    "64x8192+512-8/4-d256": (7, 6),
    "64x8192-90": (7, 5),
    "256x4096-90": (7, 5),
    "4x4x1024+256-page16": (5, 4),
    "128x256+128-32/8": (7, 5),
    "512x128+128-32/8": (12, 5),
    "1x0+128-32/8": (5, 3),
    "8x0+1024-8/1": (8, 5),
}
"""Workload of --latency -> (bar, goal) of what it takes above the launch and the longer bound."""
LATENCY_PLAN_US = {64: (18.0, 6.0), 256: (28.0, 6.0)}
"""Sequences -> (bar, goal) of a plan in --latency; fewer sequences are FEW_PLAN_US."""
FEW_PLAN_US = (12.0, 6.0)
RANDOM_MEDIAN, RANDOM_WORST = 1.0, 1.05
ERROR_OVER_FA3 = 1.5
DISTANCE_OVER_ERROR = 2.0


def paged_bars(result: dict[str, Any]) -> list[Row]:
    """`workload, figure, value, bar, met` of each; `value` and `met` are None where not measured.

    Of the workloads that ran, and of those extras (plan, random batches, DRAM bytes) that did.
    """
    found: list[Row] = []
    for workload, kernels in by_workload(result["rows"]).items():
        if OURS in kernels:
            found += _of_workload(workload, kernels)
    found += list(_of_extras(result))
    return found


def latency_bars(result: dict[str, Any]) -> list[Row]:
    """The same of a result of --latency: excess, the best peer's time, bits, plans."""
    found: list[Row] = []
    for workload, kernels in by_workload(result["rows"]).items():
        if OURS not in kernels:
            continue
        ours = kernels[OURS]
        if workload in EXCESS_US:
            found.append(_bar(workload, "excess, us", ours["excess_us"], *EXCESS_US[workload]))
        peers = [row["ms"] for name, row in kernels.items() if name != OURS]
        over = ours["ms"] / min(peers) if peers else None
        found.append(_bar(workload, "time / the best peer's", over, 1.0))
        if "same_bits_on_repeats" in ours:
            found.append(_same_bits(workload, ours))
    for plan in result["plan"]:
        name = f"{plan['sequences']}x{plan['pages']} pages"
        limits = LATENCY_PLAN_US.get(plan["sequences"], FEW_PLAN_US)
        found.append(_bar(name, "plan on the GPU, us", plan["us"], *limits))
    return found


def _same_bits(workload: str, ours: Row) -> Row:
    differ = float(not ours["same_bits_on_repeats"])
    return _bar(workload, f"other bits in {ours['repeats']} repeats", differ, 0.0)


def _of_workload(workload: str, kernels: dict[str, Row]) -> list[Row]:
    ours, fa3 = kernels[OURS], kernels.get("fa3")
    peers = [row["ms"] for name, row in kernels.items() if name != OURS]
    found = []
    if workload in TIME_OVER_BOUND:
        limit, goal = TIME_OVER_BOUND[workload]
        found.append(_bar(workload, "time / bound", ours["ratio_to_bound"], limit, goal))
    if workload in BEST_PEER:
        over = ours["ms"] / min(peers) if peers else None
        found.append(_bar(workload, "time / the best peer's", over, 1.0))
    if workload in FA3:
        over = ours["ms"] / fa3["ms"] if fa3 else None
        found.append(_bar(workload, "time / FA3's", over, 1.0))
    if workload in COUNTED:
        read = ours.get("dram_read_bytes")
        over = None if read is None else read / ours["unique_kv_bytes"]
        found.append(_bar(workload, "DRAM bytes / unique KV bytes", over, DRAM_BYTES))
    error = ours["relative_error"]
    over = error / fa3["relative_error"] if fa3 else None
    found.append(_bar(workload, "error / FA3's", over, ERROR_OVER_FA3))
    if "same_bits_on_repeats" in ours:
        least = min(error, ours["relative_error_with_sharing_ignored"])
        over = ours["relative_distance_with_sharing_ignored"] / least
        figure = "sharing found to ignored / error"
        found.append(_bar(workload, figure, over, DISTANCE_OVER_ERROR))
        found.append(_same_bits(workload, ours))
    return found


def _of_extras(result: dict[str, Any]) -> Iterator[Row]:
    for plan in result.get("plan", []):
        name = f"{plan['sequences']}x{plan['pages']} pages"
        yield _bar(name, "plan on the GPU, us", plan["us"], PLAN_US)
    random = result.get("random")
    if random:
        name = f"{random['batches']} random"
        figure = "time / time with sharing ignored"
        yield _bar(name, f"{figure}, median", random["median"], RANDOM_MEDIAN)
        yield _bar(name, f"{figure}, worst", random["worst"], RANDOM_WORST)


def _bar(
    workload: str, figure: str, value: float | None, bar: float, goal: float | None = None
) -> Row:
    met = None if value is None else value <= bar
    return {
        **{"workload": workload, "figure": figure, "value": value},
        **{"bar": bar, "goal": goal, "met": met},
    }


def serve_bars(result: dict[str, Any]) -> list[Row]:
    """Each of our ratios to FA3's beside its bar. Met: the median does."""
    return [
        _bar(row["workload"], f"{figure} / FA3's", ratio["median"], *SERVE[figure])
        for row in result["rows"]
        if row["backend"] == "flashcore"
        for figure, ratio in row.get("over_fa3", {}).items()
        if figure in SERVE
    ]


def bars_of(result: dict[str, Any]) -> list[Row]:
    """`workload, figure, value, bar, goal, met` of each; value and met are None where not
    measured. ValueError for a result that has none."""
    rows = result.get("rows") or [{}]
    if "arithmetic" in result:
        return latency_bars(result)
    if {"kernel", "workload"} <= rows[0].keys():
        return paged_bars(result)
    if any("over_fa3" in row for row in rows):
        return serve_bars(result)
    raise ValueError("neither a result of `bench paged` nor of `bench serve --small`")


def format_bars(bars: list[Row]) -> list[str]:
    """A line each."""
    lines = []
    for bar in bars:
        word = {True: "PASS", False: "MISS", None: "-"}[bar["met"]]
        value = "not measured" if bar["value"] is None else f"{bar['value']:.3f}"
        goal = "" if bar["goal"] is None else f", goal {bar['goal']:g}"
        text = f"{word:<5}{bar['workload']:<24}{bar['figure']:<44}{value:>12}"
        lines.append(f"{text}, bar {bar['bar']:g}{goal}")
    return lines


def main(files: list[str]) -> int:
    if not files:
        print(__doc__, file=sys.stderr)
        return 2
    found = [bar for file in files for bar in bars_of(json.loads(Path(file).read_text()))]
    print("\n".join(format_bars(found)))
    return int(any(bar["met"] is False for bar in found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
