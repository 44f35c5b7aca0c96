"""Draw what fleets of several sizes share, hit and give, for each routing."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any

from flashcore.replay.fleet.report import describe_traffic
from flashcore.replay.fleet.routing import ROUTINGS
from flashcore.replay.report import Report

_COLOURS = dict(zip(ROUTINGS, ("#444444", "#c8553d", "#1b6ca8"), strict=True))


def draw_fleets(report: Report, path: str | PathLike[str]) -> None:
    """Write a PNG, PDF or SVG, by the ending of `path`.

    Needs matplotlib (ImportError); raises OSError when the file cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.6), dpi=120, layout="constrained")
    panels = figure.subplots(1, 3)
    for routing in dict.fromkeys(row["routing"] for row in report["rows"]):
        rows = [row for row in report["rows"] if row["routing"] == routing]
        rows.sort(key=lambda row: int(row["engines"]))
        _draw(panels[0], rows, "reuse")
        _draw(panels[1], rows, "cache_hit_rate", scale=100)
        _draw(panels[2], rows, "tokens_per_s")
        _draw(panels[2], rows, "tokens_per_s_per_sequence", dashed=True)
    sizes = sorted({row["engines"] for row in report["rows"]})
    for axes, title in zip(panels, _TITLES, strict=True):
        axes.set_title(title, fontsize=10)
        axes.set_xscale("log")
        axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
        axes.minorticks_off()
        axes.set_xlabel("engines")
        axes.grid(alpha=0.25)
    panels[0].legend(fontsize=8, frameon=False)
    figure.suptitle(_title(report), fontsize=11)
    figure.savefig(path)


_TITLES = (
    "KV reuse\n(tokens per sequence / once)",
    "prompt tokens found in the cache\n(%)",
    "output tokens/s of an engine\n(dashed: pages read per sequence)",
)


def _draw(
    axes: Any, rows: list[Report], name: str, *, scale: float = 1, dashed: bool = False
) -> None:
    routing = rows[0]["routing"]
    axes.plot(
        [row["engines"] for row in rows],
        [scale * row[name] for row in rows],
        color=_COLOURS[routing],
        marker="o",
        ms=3.5,
        lw=1.3,
        ls="--" if dashed else "-",
        label=routing,
    )


def _title(report: Report) -> str:
    settings = report["settings"]
    return (
        f"{Path(report['trace']).stem}: {report['trace_requests']:,} requests, "
        f"{describe_traffic(report['traffic'])}\n"
        f"cache of {settings['cache_pages']:,} pages x {settings['page_tokens']} tokens an engine, "
        f"batch up to {settings['max_batch']}"
    )
