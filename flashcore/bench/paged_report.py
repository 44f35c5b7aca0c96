"""The paged benchmark's result as a table and as a plot; both are made from its JSON object."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flashcore.bench.paged_providers import OURS, OURS_BF16, WAYS
from flashcore.bench.rows import Row, by_workload

LABELS = {
    OURS: "flashcore",
    OURS_BF16: "flashcore bf16",
    "flashcore_converting": "converting",
    "flashcore_expanding": "expanding",
    "fa3": "FA3",
    "fa4": "FA4",
    "flashinfer": "FlashInfer",
    "flashinfer_fa3": "FlashInfer fa3",
    "flashinfer_xqa": "FlashInfer XQA",
    "cascade_fa2": "cascade fa2",
    "cascade_fa3": "cascade fa3",
}
_COLOURS = dict(
    zip(
        LABELS,
        (
            "#1b6ca8",
            "#7fb0d6",
            "#4a7fa5",
            "#2f5d80",
            "#c8553d",
            "#e0a030",
            "#5a9367",
            "#9bb858",
            "#3d8f8f",
            "#8d7b9c",
            "#c0a0c8",
        ),
        strict=True,
    )
)


def summarise(rows: list[Row]) -> list[Row]:
    """For each workload: ours over the bound, and FA3's and the best peer's time over ours; on fp8
    pages ours over ours in bf16, too."""
    lines = []
    for workload, kernels in by_workload(rows).items():
        ours = kernels.get(OURS)
        if ours is None:
            continue
        own = (OURS, OURS_BF16, *WAYS)
        peers = {name: row for name, row in kernels.items() if name not in own}
        bf16 = kernels.get(OURS_BF16)
        best = min(peers, key=lambda name: float(peers[name]["ms"])) if peers else None
        lines.append(
            {
                "workload": workload,
                "ratio_to_bound": ours["ratio_to_bound"],
                "ratio_to_fastest_read": ours.get("ratio_to_fastest_read"),
                "speed_over_fa3": peers["fa3"]["ms"] / ours["ms"] if "fa3" in peers else None,
                "best_peer": best,
                "speed_over_best_peer": peers[best]["ms"] / ours["ms"] if best else None,
                **({"time_over_bf16": ours["ms"] / bf16["ms"]} if bf16 else {}),
            }
        )
    return lines


def format_table(result: dict[str, Any]) -> str:
    """Milliseconds and times the bound of each kernel on each workload, ours in times the fastest
    read, ours against FA3 and the best peer; then every bar with PASS or MISS."""
    found = by_workload(result["rows"])
    kernels = [name for name in LABELS if any(name in rows for rows in found.values())]
    head = f"{'workload':<20}{'bound ms':>9}"
    head += "".join(f"{LABELS[name]:>16}" for name in kernels)
    lines = [head + f"{'x read':>8}{'x FA3':>8}{'x best':>8}"]
    over = {line["workload"]: line for line in result["summary"]}
    for workload, rows in found.items():
        bound = next(iter(rows.values()))["bound_ms"]
        cells = "".join(_cell(rows.get(name)) for name in kernels)
        line = over.get(workload, {})
        columns = ("ratio_to_fastest_read", "speed_over_fa3", "speed_over_best_peer")
        ratios = [line.get(name) for name in columns]
        tail = "".join(f"{'-':>8}" if x is None else f"{x:>8.3f}" for x in ratios)
        lines.append(f"{workload:<20}{bound:>9.4f}{cells}{tail}")
    lines.append(_method_line(result))
    lines += _error_lines(found) + _dram_lines(found) + _extra_lines(result)
    lines += [f"not timed: {text}" for text in result["skipped"]]
    return "\n".join(lines)


def _method_line(result: dict[str, Any]) -> str:
    read = result["read_bandwidth"]
    fastest = ""
    if "fastest_read_gbs" in result:
        fastest = f"; fastest read {result['fastest_read_gbs']:.0f}, {read['fastest_method']}"
    return (
        f"bound: unique KV bytes / {read['bytes_per_second'] / 1e9:.0f} GB/s "
        f"({read['method']}{fastest}); an empty graph takes "
        f"{result['empty_graph_ms'] * 1e3:.1f} us; {result['method']}"
    )


def _cell(row: Row | None) -> str:
    if row is None:
        return f"{'-':>16}"
    return f"{row['ms']:>8.4f} {row['ratio_to_bound']:>6.3f}x"


def _error_lines(found: dict[str, dict[str, Row]]) -> list[str]:
    lines = []
    for workload, rows in found.items():
        ours, fa3 = rows.get(OURS), rows.get("fa3")
        if ours is None:
            continue
        text = f"error on {workload}: {ours['relative_error']:.2e}"
        text += f", FA3 {fa3['relative_error']:.2e}" if fa3 else ""
        if "same_bits_on_repeats" in ours:
            moved = ours["relative_distance_with_sharing_ignored"] / ours["relative_error"]
            text += f"; sharing ignored moves it by {moved:.2f} of that; "
            text += "same" if ours["same_bits_on_repeats"] else "DIFFERENT"
            text += " bits on repeats"
        lines.append(text)
    return lines


def _dram_lines(found: dict[str, dict[str, Row]]) -> list[str]:
    return [
        f"DRAM read on {workload}, {LABELS[name]}: {row['dram_read_bytes'] / 1e6:.1f} MB, "
        f"{row['dram_read_bytes'] / row['unique_kv_bytes']:.3f} x unique KV bytes"
        for workload, rows in found.items()
        for name, row in rows.items()
        if "dram_read_bytes" in row
    ]


def _extra_lines(result: dict[str, Any]) -> list[str]:
    lines = []
    for row in result.get("plan", []):
        lines.append(
            f"plan on the GPU, {row['sequences']} x {row['pages']} pages, half of them shared: "
            f"{row['us']:.1f} us"
        )
    for row in result.get("batch_invariant", []):
        bits = "the same bits" if row["same_bits"] else "OTHER BITS"
        lines.append(
            f"batch-invariant on {row['workload']}: {row['invariant_ms']:.4f} ms, "
            f"{row['ratio']:.3f} x the default plan; {bits} without sharing and alone"
        )
    random = result.get("random")
    if random:
        lines.append(
            f"{random['batches']} random batches, time / time with sharing ignored: "
            f"median {random['median']:.3f}, worst {random['worst']:.3f} "
            f"({random['worst_batch']}), {random['above_1_05']} above 1.05"
        )
    return lines


def plot(result: dict[str, Any], path: Path) -> None:
    """Time over the bound, a point for each workload and kernel. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = {
        workload: rows
        for workload, rows in by_workload(result["rows"]).items()
        if next(iter(rows.values()))["q_len"] == 1  # prefill is not bound by reading
    }
    kernels = [name for name in LABELS if any(name in rows for rows in found.values())]
    figure, axes = pyplot.subplots(figsize=(11, 5), layout="constrained")
    for place, kernel in enumerate(kernels):
        shift = (place - (len(kernels) - 1) / 2) * 0.1
        at = [
            (number + shift, rows[kernel]["ratio_to_bound"])
            for number, rows in enumerate(found.values())
            if kernel in rows
        ]
        axes.plot(
            [x for x, _ in at],
            [y for _, y in at],
            "o" if kernel != OURS else "D",
            markersize=6,
            color=_COLOURS[kernel],
            label=LABELS[kernel],
        )
    axes.axhline(1.0, color="#444444", linewidth=1)
    axes.set_yscale("log", base=2)
    ticks = [1, 1.25, 1.5, 2, 3, 4, 6, 8, 12, 16, 24]
    heights = [row["ratio_to_bound"] for rows in found.values() for row in rows.values()]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_ylim(0.95, 1.1 * max([2.0, *heights]))
    axes.set_xticks(range(len(found)), list(found), rotation=30, ha="right", fontsize=8)
    axes.set_ylabel("time / time to read each KV byte once")
    figure.suptitle(f"Paged attention, {result['device']}, {result['date'][:10]}", fontsize=10)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.legend(
        ncols=len(kernels), fontsize=8, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1)
    )
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
