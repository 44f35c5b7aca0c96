"""Draw reuse and batch size of a replay over the simulated time."""

from __future__ import annotations

from itertools import pairwise
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashcore.replay.report import Report, step_reuse
from flashcore.replay.step_log import StepLog

_BINS = 240
_REUSE_COLOUR = "#1b6ca8"
_BATCH_COLOUR = "#444444"
_SHARED_COLOUR = "#c8553d"


def draw_plot(log: StepLog, report: Report, path: str | PathLike[str]) -> None:
    """Write a PNG, PDF or SVG, by the ending of `path`.

    Steps are gathered into bins of equal simulated time, so a line is readable however many there
    are. Needs matplotlib (ImportError); raises OSError when the file cannot be written.
    """
    from matplotlib.figure import Figure

    seconds = log.column("time_ms") / 1000.0
    unit, in_units = ("min", seconds / 60) if np.ptp(seconds) > 600 else ("s", seconds)
    bins = _bins(in_units)
    figure = Figure(figsize=(10, 7), dpi=120, layout="constrained")
    panels = figure.subplots(3, 1, sharex=True, height_ratios=(3, 2, 1.4))
    _draw_reuse(panels[0], bins, step_reuse(log), report["reuse"])
    _draw_filled(panels[1], bins, log.column("batch"), "running\nsequences", _BATCH_COLOUR)
    shared = 100.0 * log.column("pages_shared") / log.column("pages_used")
    _draw_filled(panels[2], bins, shared, "pages shared\n(% of pages used)", _SHARED_COLOUR)
    panels[-1].set_xlabel(f"simulated time ({unit})")
    figure.align_ylabels(panels)
    for axes in panels:
        axes.grid(alpha=0.25)
        axes.margins(x=0.01)
    figure.suptitle(_title(report), fontsize=11)
    figure.savefig(path)


class _Bin:
    """Consecutive steps drawn as one point."""

    def __init__(self, time: float, steps: slice) -> None:
        self.time = time
        self.steps = steps


def _bins(time: NDArray[Any]) -> list[_Bin]:
    edges = np.linspace(time[0], time[-1], _BINS + 1)
    # The last edge is the last step's own time: it belongs to the last bin.
    first = np.append(np.searchsorted(time, edges[:-1]), time.size)
    return [
        _Bin(float(time[begin:end].mean()), slice(int(begin), int(end)))
        for begin, end in pairwise(first)
        if end > begin
    ]


def _means(bins: list[_Bin], values: NDArray[Any]) -> list[float]:
    return [float(values[one.steps].mean()) for one in bins]


def _draw_reuse(axes: Any, bins: list[_Bin], reuse: NDArray[np.float64], overall: float) -> None:
    time = [one.time for one in bins]
    low = [float(np.percentile(reuse[one.steps], 5)) for one in bins]
    high = [float(np.percentile(reuse[one.steps], 95)) for one in bins]
    axes.fill_between(
        time, low, high, color=_REUSE_COLOUR, alpha=0.2, lw=0, label="5th to 95th percentile"
    )
    axes.plot(time, _means(bins, reuse), color=_REUSE_COLOUR, lw=1.4, label="mean of the steps")
    axes.axhline(overall, color="black", lw=0.8, ls="--", label=f"overall {overall:.3f}")
    axes.set_ylabel("KV reuse\n(tokens per sequence / once)")
    # Above the panel, where it can hide no peak.
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3, fontsize=8, frameon=False)


def _draw_filled(
    axes: Any, bins: list[_Bin], values: NDArray[Any], label: str, colour: str
) -> None:
    time, means = [one.time for one in bins], _means(bins, values)
    axes.plot(time, means, color=colour, lw=1.3)
    axes.fill_between(time, means, color=colour, alpha=0.12, lw=0)
    axes.set_ylabel(label)
    axes.set_ylim(bottom=0)


def _title(report: Report) -> str:
    settings = report["settings"]
    scale = settings["time_scale"]
    return (
        f"{Path(report['trace']).stem}: {report['completed']:,} requests, "
        f"cache of {settings['cache_pages']:,} pages x {settings['page_tokens']} tokens, "
        f"batch up to {settings['max_batch']}\n"
        f"{settings['prefill_chunk']:,} prompt tokens a step, {settings['step_ms']:g} ms a step, "
        f"{settings['prefill_tokens_per_s']:,.0f} prompt tokens/s"
        + (f", arrival times x {scale:g}" if scale != 1 else "")
    )
