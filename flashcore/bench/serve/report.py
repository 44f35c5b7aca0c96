"""A serving result as a table and as a plot; both are made from its JSON object alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flashcore.bench.rows import Row, by_workload

OURS = "flashcore"
PEERS = {"sglang": ("fa3", "triton"), "vllm": ("FLASH_ATTN", "TRITON_ATTN")}
"""Of each engine the backend that others are compared with, FlashAttention-3 in both, and one that
shows how far apart backends usually are."""
BASELINES = {engine: peers[0] for engine, peers in PEERS.items()}
NAMES = {"sglang": "SGLang", "vllm": "vLLM"}
ORDER = (OURS, "fa3", "flashinfer", "triton", "FLASH_ATTN", "FLASHINFER", "TRITON_ATTN")
_OF_PEERS = ("#c8553d", "#e0a030", "#5a9367")
_COLOURS = dict(zip(ORDER, ("#1b6ca8", *_OF_PEERS, *_OF_PEERS), strict=True))


def engine_of(rows: Sequence[Row]) -> str:
    """The engine that the rows are of; those of old files do not say it."""
    return next((row["engine"] for row in rows if "engine" in row), "sglang")


def by_engine(rows: list[Row]) -> dict[str, dict[str, Row]]:
    """Workload -> name of the engine -> row, backends in their usual order, others after them.

    In old files an engine has its backend's name.
    """
    named = [{**row, "name": engine_name(row)} for row in rows]
    return {
        workload: {name: engines[name] for name in _ordered(engines)}
        for workload, engines in by_workload(named, "name").items()
    }


def engine_name(row: Row) -> str:
    """Of the engine that a row is of."""
    return str(row.get("name", row["backend"]))


def speed(row: Row) -> float:
    """Tokens per second; where only prefill was timed, 1000 / milliseconds to the first token."""
    if row["tokens_per_s"] is not None:
        return float(row["tokens_per_s"])
    return 1e3 / float(row["ttft_ms"])


def summarise(rows: list[Row]) -> list[dict[str, Any]]:
    """For each workload: every engine's speed over FA3's, and ours over every other's."""
    summary = []
    baseline = BASELINES[engine_of(rows)]
    for name, backends in by_engine(rows).items():
        entry: dict[str, Any] = {"workload": name, "spec": next(iter(backends.values()))["spec"]}
        if baseline in backends:
            base = speed(backends[baseline])
            entry[f"speed_over_{baseline}"] = {b: speed(row) / base for b, row in backends.items()}
        if OURS in backends:
            ours = speed(backends[OURS])
            entry["flashcore_over"] = {
                b: ours / speed(row) for b, row in backends.items() if b != OURS
            }
        summary.append(entry)
    return summary


def format_table(result: dict[str, Any]) -> str:
    """A line a workload and backend: tokens/s, step, time to the first token, ratio to FA3's."""
    baseline = BASELINES[engine_of(result["rows"])]
    head = ("workload", "backend", "tokens/s", "step ms", "TTFT ms", "/ FA3", "GB/step", "reuse")
    width = max([10, *(len(engine_name(row)) for row in result["rows"])]) + 2
    lines = [f"{head[0]:<44}{head[1]:<{width}}" + "".join(f"{word:>10}" for word in head[2:])]
    key = f"speed_over_{baseline}"
    over = {entry["workload"]: entry.get(key, {}) for entry in result["summary"]}
    for name, backends in by_engine(result["rows"]).items():
        for backend, row in backends.items():
            label = name if name == row["spec"] else f"{name} ({row['spec']})"
            figures = (
                (row["tokens_per_s"], ".0f"),
                (row["step_ms"], ".2f"),
                (row["ttft_ms"], ".1f"),
                (over[name].get(backend), ".3f"),
                (row["gb_per_step"], ".1f"),
                (row["reuse"], ".2f"),
            )
            cells = "".join(
                f"{'-':>10}" if value is None else f"{value:>10{form}}" for value, form in figures
            )
            lines.append(f"{label:<44}{backend:<{width}}{cells}")
    lines += [f"not timed: {text}" for text in result["skipped"]]
    return "\n".join(lines)


def plot(result: dict[str, Any], path: Path) -> None:
    """Bars of each backend's speed over FA3's, or its own without one. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found, baseline = by_engine(result["rows"]), BASELINES[engine_of(result["rows"])]
    backends = _ordered({engine_name(row): row for row in result["rows"]})
    figure, axes = pyplot.subplots(figsize=(1.5 * len(found) + 3, 4.8), layout="constrained")
    width = 0.84 / max(1, len(backends))
    for place, backend in enumerate(backends):
        shift = (place - (len(backends) - 1) / 2) * width
        for number, rows in enumerate(found.values()):
            if backend not in rows:
                continue
            base = rows.get(baseline, rows[backend])
            height = speed(rows[backend]) / speed(base)
            label = backend if number == _first_with(backend, found) else None
            axes.bar(
                number + shift, height, width, label=label, color=_COLOURS.get(backend, "#888")
            )
            axes.text(
                number + shift, height, _figure(rows[backend]), ha="center", va="bottom", fontsize=6
            )
    labels = []
    for name, rows in found.items():
        spec = next(iter(rows.values()))["spec"]
        labels.append((spec if spec == name else f"{name}\n{spec}").replace("/", "\n"))
    axes.set_xticks(range(len(found)), labels, fontsize=7)
    axes.axhline(1, color="#888", linewidth=0.7)
    axes.set_ylabel(
        f"speed over {baseline} (tokens/s or ms to the first token above the bar)", fontsize=8
    )
    name = NAMES[engine_of(result["rows"])]
    axes.set_title(f"Serving with {name}, {result['device']}, {result['date'][:10]}", fontsize=10)
    axes.legend(ncols=max(1, len(backends)), fontsize=8, frameon=False, loc="upper left")
    axes.set_ylim(top=axes.get_ylim()[1] * 1.15)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _figure(row: Row) -> str:
    if row["tokens_per_s"] is not None:
        return f"{row['tokens_per_s']:.0f}"
    return f"{row['ttft_ms']:.0f} ms"


def _first_with(backend: str, found: dict[str, dict[str, Row]]) -> int:
    return next(number for number, rows in enumerate(found.values()) if backend in rows)


def _ordered(backends: dict[str, Any]) -> list[str]:
    """By backend, its engines in their order in the run."""
    place = {name: number for number, name in enumerate(ORDER)}
    return sorted(backends, key=lambda name: place.get(name.split()[0], len(ORDER)))
