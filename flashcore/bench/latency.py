"""What a layer costs above what it must: batches that read little, where a fixed price shows.

What it must is the launch (an empty graph) and the longer of two bounds: the distinct KV bytes at
the rate of a streaming read, and the arithmetic that no kernel can leave out. Both rates are
measured in the same run.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from flashcore.bench.graphs import time_graphs
from flashcore.bench.paged import Machine
from flashcore.bench.paged_problems import DTYPE, PagedProblem, paged_problems
from flashcore.bench.paged_providers import OURS
from flashcore.bench.paged_report import LABELS
from flashcore.bench.rows import Row, by_workload

EXPONENTIALS = 16
"""Of a clock and SM on Hopper: `ex2.approx.f32`, throughput of compute capability 9.0."""
PRODUCT_SIZE = 8192
"""Rows, columns and depth of the matrix product whose rate counts."""
PLAN_SHAPES = ((1, 1), (1, 64), (4, 64), (8, 64), (16, 64), (64, 64), (256, 64))
"""Sequences x pages of the plans that are timed."""
_README = ("64x8192-90", "256x4096-90")


def latency_problems() -> list[PagedProblem]:
    """Shards of a model on several GPUs, models of few or small heads, short prefixes, few
    sequences; pages of 64 where the name says nothing."""
    readme = [problem for problem in paged_problems() if problem.name in _README]
    return [
        _shared(64, 16384, 512, (4, 1)),
        _shared(256, 4096, 512, (8, 1)),
        *(_shared(64, 4096, 512, heads) for heads in ((32, 2), (28, 4), (32, 8), (96, 8))),
        _shared(64, 8192, 512, (64, 8), head_dim=64),
        _shared(64, 8192, 512, (16, 2), head_dim=256),
        _shared(64, 8192, 512, (8, 4), head_dim=256),
        *readme,
        replace(_shared(16, 1024, 256, (32, 8), page=16), name="4x4x1024+256-page16", groups=4),
        _shared(128, 256, 128, (32, 8)),
        _shared(512, 128, 128, (32, 8)),
        _shared(1, 0, 128, (32, 8)),
        _shared(8, 0, 1024, (8, 1)),
    ]


def _shared(
    sequences: int,
    prefix: int,
    own: int,
    heads: tuple[int, int],
    *,
    head_dim: int = 128,
    page: int = 64,
) -> PagedProblem:
    name = f"{sequences}x{prefix}+{own}-{heads[0]}/{heads[1]}"
    return PagedProblem(
        name if head_dim == 128 else f"{name}-d{head_dim}",
        sequences,
        prefix + own,
        prefix,
        q_heads=heads[0],
        kv_heads=heads[1],
        head_dim=head_dim,
        page_tokens=page,
    )


def arithmetic_rates(
    machine: Machine, clocks: list[dict[str, Any]], sms: int, rounds: int
) -> dict[str, Any]:
    """`flops_per_second` of torch's matrix product, and `exponentials_per_second` at the highest
    SM clock of `clocks`; None where no clock is known."""
    size = PRODUCT_SIZE
    a, b = (torch.empty(size, size, dtype=DTYPE, device=machine.device).normal_() for _ in range(2))
    graph = machine.capture(lambda: a @ b)
    timing = time_graphs({"": graph}, rounds=rounds, start=machine.start)[""]
    seen = [float(one["sm_mhz"]) for one in clocks if "sm_mhz" in one]
    return {
        "flops_per_second": 2 * size**3 / timing.median_ms * 1e3,
        "product": f"torch.matmul of {size} x {size} x {size} in bf16",
        "exponentials_per_second": EXPONENTIALS * sms * max(seen) * 1e6 if seen else None,
        "exponentials_per_clock_and_sm": EXPONENTIALS,
        "sm_mhz": max(seen, default=None),
    }


def add_excess(rows: list[Row], rates: dict[str, Any], empty_ms: float) -> None:
    """To rows that have bounds: `arithmetic_ms`, `empty_graph_ms`, `excess_us`.

    Products count the rows and keys there are, not what tiles pad them to; exponentials one for
    each score. Both run side by side, so the longer is the bound.
    """
    for row in rows:
        products = row["flops"] / rates["flops_per_second"] * 1e3
        scores = row["flops"] / (4 * row["head_dim"])
        rate = rates["exponentials_per_second"]
        row["products_ms"] = products
        row["exponentials_ms"] = None if rate is None else scores / rate * 1e3
        row["arithmetic_ms"] = max(products, row["exponentials_ms"] or 0.0)
        row["empty_graph_ms"] = empty_ms
        must = empty_ms + max(row["bound_ms"], row["arithmetic_ms"])
        row["excess_us"] = (row["ms"] - must) * 1e3


def format_latency(result: dict[str, Any]) -> str:
    """Microseconds of each workload: both bounds, then each kernel's time and its excess."""
    found = by_workload(result["rows"])
    kernels = [name for name in LABELS if any(name in rows for rows in found.values())]
    head = f"{'workload':<24}{'DRAM':>7}{'arith.':>7}"
    lines = [head + "".join(f"{LABELS[name]:>18}" for name in kernels)]
    for workload, rows in found.items():
        first = next(iter(rows.values()))
        cells = "".join(_cell(rows.get(name)) for name in kernels)
        bounds = f"{1e3 * first['bound_ms']:>7.1f}{1e3 * first['arithmetic_ms']:>7.1f}"
        lines.append(f"{workload:<24}{bounds}{cells}")
    lines += [
        f"plan of {plan['sequences']} x {plan['pages']} pages: {plan['us']:.1f} us"
        for plan in result["plan"]
    ]
    differ = [w for w, rows in found.items() if OURS in rows and _differs(rows[OURS])]
    lines += [f"DIFFERENT bits on repeats: {workload}" for workload in differ]
    lines.append(method_of(result))
    return "\n".join([*lines, *(f"not timed: {text}" for text in result["skipped"])])


def method_of(result: dict[str, Any]) -> str:
    """How the figures of a result came about, in a sentence."""
    rates, read = result["arithmetic"], result["read_bandwidth"]
    clock = rates["sm_mhz"]
    exponentials = "exponentials not counted (no clock known)"
    if clock is not None:
        per = rates["exponentials_per_clock_and_sm"]
        exponentials = f"{per} exponentials a clock and SM at {clock:.0f} MHz"
    return (
        f"time (excess over an empty graph, {1e3 * result['empty_graph_ms']:.1f} us, and the "
        f"longer bound), us; DRAM: distinct KV bytes at {read['bytes_per_second'] / 1e9:.0f} GB/s "
        f"({read['method']}); arithmetic: the longer of {rates['flops_per_second'] / 1e12:.0f} "
        f"TFLOP/s ({rates['product']}) and {exponentials}"
    )


def _cell(row: Row | None) -> str:
    if row is None:
        return f"{'-':>18}"
    return f"{1e3 * row['ms']:>9.1f} ({row['excess_us']:>5.1f})"


def _differs(row: Row) -> bool:
    return not row.get("same_bits_on_repeats", True)
