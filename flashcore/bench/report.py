"""A benchmark's result as a table and as a plot; both are made from its JSON object alone."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

OURS = "flashcore"
KERNELS = (OURS, "fa3", "fa4", "cudnn", "fa2")
_COLOURS = dict(zip(KERNELS, ("#1b6ca8", "#c8553d", "#e0a030", "#5a9367", "#8d7b9c"), strict=True))
_PROBLEM_FIELDS = ("batch", "heads", "kv_heads", "seqlen", "head_dim", "causal", "dtype")

Row = dict[str, Any]
Problem = tuple[Any, ...]


def best_by_kernel(rows: list[Row]) -> dict[Problem, dict[str, Row]]:
    """Problem -> kernel -> its fastest row: a peer may be installed in several builds."""
    best: dict[Problem, dict[str, Row]] = {}
    for row in rows:
        kernels = best.setdefault(tuple(row[name] for name in _PROBLEM_FIELDS), {})
        if row["kernel"] not in kernels or row["ms"] < kernels[row["kernel"]]["ms"]:
            kernels[row["kernel"]] = row
    return best


def summarise(rows: list[Row]) -> dict[str, Any]:
    """dtype -> our speed over each peer's and over the best one's: by problem, and over all."""
    dtypes = dict.fromkeys(row["dtype"] for row in rows)
    return {dtype: _summary([row for row in rows if row["dtype"] == dtype]) for dtype in dtypes}


def _summary(rows: list[Row]) -> dict[str, Any]:
    problems, ratios = [], dict[str, list[float]]()
    for problem, kernels in best_by_kernel(rows).items():
        ours = kernels.get(OURS)
        peers = {name: row for name, row in kernels.items() if name != OURS}
        if ours is None or not peers:
            continue
        winner = min(peers, key=lambda name: float(peers[name]["ms"]))
        over = {name: row["ms"] / ours["ms"] for name, row in peers.items()}
        over["best_peer"] = over[winner]
        for name, ratio in over.items():
            ratios.setdefault(name, []).append(ratio)
        shape = dict(zip(_PROBLEM_FIELDS, problem, strict=True))
        problems.append({**shape, "best_peer": winner, "speed_over": over})
    return {
        "problems": problems,
        "geometric_mean_speed_over": {name: _geometric_mean(v) for name, v in ratios.items()},
        "lowest_speed_over": {name: min(values) for name, values in ratios.items()},
    }


def format_table(result: dict[str, Any]) -> str:
    """TFLOP/s of each kernel on each problem, and our ratio to FA3 and to the best peer."""
    best = best_by_kernel(result["rows"])
    kernels = [name for name in KERNELS if any(name in found for found in best.values())]
    head = f"{'problem':<34}" + "".join(f"{name:>10}" for name in kernels)
    lines = [head + f"{'/ fa3':>8}{'/ best':>8}"]
    for problem, found in best.items():
        cells = "".join(
            f"{found[name]['tflops']:>10.1f}" if name in found else f"{'-':>10}" for name in kernels
        )
        lines.append(f"{_label(problem):<34}{cells}{_ratios(found)}")
    for dtype, summary in result["summary"].items():
        for measure in ("geometric_mean_speed_over", "lowest_speed_over"):
            if summary[measure]:
                values = "  ".join(f"{name} {x:.3f}" for name, x in summary[measure].items())
                lines.append(f"{dtype} {measure.replace('_', ' ')}: {values}")
    lines += [f"not timed: {text}" for text in result["skipped"]]
    return "\n".join(lines)


def plot(result: dict[str, Any], path: Path) -> None:
    """Bars of TFLOP/s for each problem, a bar for each kernel. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    best = best_by_kernel(result["rows"])
    kernels = [name for name in KERNELS if any(name in found for found in best.values())]
    figure, axes = pyplot.subplots(figsize=(1.1 * len(best) + 3, 4.8), layout="constrained")
    width = 0.84 / max(1, len(kernels))
    for place, kernel in enumerate(kernels):
        at = [
            (number + (place - (len(kernels) - 1) / 2) * width, found[kernel]["tflops"])
            for number, found in enumerate(best.values())
            if kernel in found
        ]
        label, colour = kernel, _COLOURS[kernel]
        axes.bar([x for x, _ in at], [y for _, y in at], width, label=label, color=colour)
    labels = [_label(problem).replace(" ", "\n") for problem in best]
    axes.set_xticks(range(len(best)), labels, fontsize=7)
    axes.set_ylabel("TFLOP/s")
    axes.set_title(f"Dense attention, {result['device']}, {result['date'][:10]}", fontsize=10)
    axes.legend(ncols=len(kernels), fontsize=8, frameon=False, loc="upper left")
    axes.set_ylim(top=axes.get_ylim()[1] * 1.12)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _ratios(found: dict[str, Row]) -> str:
    ours = found.get(OURS)
    peers = [row["ms"] for name, row in found.items() if name != OURS]
    if ours is None or not peers:
        return f"{'-':>8}{'-':>8}"
    fa3 = f"{found['fa3']['ms'] / ours['ms']:>8.3f}" if "fa3" in found else f"{'-':>8}"
    return fa3 + f"{min(peers) / ours['ms']:>8.3f}"


def _label(problem: Problem) -> str:
    batch, heads, kv_heads, seqlen, head_dim, causal, dtype = problem
    grouped = "" if heads == kv_heads else f"/{kv_heads}"
    mask = "causal" if causal else "full"
    return f"B{batch} H{heads}{grouped} S{seqlen} D{head_dim} {mask} {dtype}"


def _geometric_mean(values: list[float]) -> float:
    return math.exp(sum(math.log(value) for value in values) / len(values))
