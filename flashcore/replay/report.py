"""The outcome of a replay as one JSON-ready dictionary, and that dictionary as a table."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashcore.replay.sample import StepSampler
from flashcore.replay.simulate import Engine
from flashcore.replay.step_log import StepLog
from flashcore.replay.trace import Trace

Report = dict[str, Any]


@dataclass(frozen=True)
class ModelShape:
    """What one KV token weighs: layers x KV heads x head dimension, K and V."""

    layers: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    element_bytes: int = 2

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's keys and values over all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.element_bytes

    def __str__(self) -> str:
        return f"{self.layers}x{self.kv_heads}x{self.head_dim}"


def build_report(
    trace: Trace, engine: Engine, sampler: StepSampler, shape: ModelShape, wall_s: float
) -> Report:
    """Everything `flashcore replay` reports; ratios of nothing are 1 (reuse) or 0 (shares)."""
    log, totals = engine.log, engine.totals
    per_sequence = int(log.column("tokens_per_sequence").sum())
    once = int(log.column("tokens_once").sum())
    return {
        "trace": trace.name,
        "requests": len(trace.requests),
        "completed": totals.completed,
        "refused": totals.refused,
        "out_of_order": trace.out_of_order,
        "settings": {
            **asdict(engine.settings),
            "cache_tokens": engine.settings.cache_pages * engine.settings.page_tokens,
            "model_shape": str(shape),
            "element_bytes": shape.element_bytes,
        },
        "steps": len(log),
        "simulated_s": engine.now_ms / 1000.0,
        "wall_s": wall_s,
        "tokens_per_sequence": per_sequence,
        "tokens_once": once,
        "reuse": per_sequence / once if once else 1.0,
        "bytes_per_sequence": per_sequence * shape.token_bytes,
        "bytes_once": once * shape.token_bytes,
        "share_of_pages_shared": _share(
            int(log.column("pages_shared").sum()), int(log.column("pages_used").sum())
        ),
        "pages_staged": int(log.column("pages_staged").sum()),
        "prompt_tokens": totals.prompt_tokens,
        "cached_tokens": totals.cached_tokens,
        "cache_hit_rate": _share(totals.cached_tokens, totals.prompt_tokens),
        "evictions": engine.cache.evictions,
        "per_step": _per_step(log),
        "samples": _samples(sampler),
    }


def step_reuse(log: StepLog) -> NDArray[np.float64]:
    """Tokens per sequence over tokens once, for each step."""
    reuse: NDArray[np.float64] = log.column("tokens_per_sequence") / log.column("tokens_once")
    return reuse


def _per_step(log: StepLog) -> dict[str, dict[str, float] | None]:
    columns = {
        name: log.column(name)
        for name in ("batch", "waiting", "tokens_per_sequence", "tokens_once", "pages_staged")
    }
    return {
        "reuse": distribution(step_reuse(log)),
        "share_of_pages_shared": distribution(
            log.column("pages_shared") / log.column("pages_used")
        ),
        **{name: distribution(values) for name, values in columns.items()},
    }


def _samples(sampler: StepSampler) -> Report:
    settings = sampler.settings
    return {
        "count": len(sampler.layout_ms),
        "every": settings.every,
        "device": settings.device,
        "heads": f"{settings.num_q_heads}x{settings.num_kv_heads}x{settings.head_dim}",
        "layout_ms": distribution(np.array(sampler.layout_ms)),
        "plan_ms": distribution(np.array(sampler.plan_ms)),
        "attention_ms": distribution(np.array(sampler.attention_ms)),
        "fa3_ms": distribution(np.array(sampler.peer_ms)),
        "speed_over_fa3": distribution(_ratios(sampler)),
        "fa3_absent": sampler.peer_absent,
        "plan_reuse": distribution(np.array(sampler.plan_reuse)),
        "disagreements": sampler.disagreements,
        "steps": sampler.steps,
    }


def _ratios(sampler: StepSampler) -> NDArray[np.float64]:
    """FlashAttention-3's time over ours, for the steps that have both."""
    peer = np.array(sampler.peer_ms)
    ratios: NDArray[np.float64] = peer / np.array(sampler.attention_ms)[: peer.size]
    return ratios


def distribution(values: NDArray[Any]) -> dict[str, float] | None:
    """Mean, extremes and percentiles; None of nothing."""
    if not values.size:
        return None
    p10, p50, p90, p99 = np.percentile(values, [10, 50, 90, 99]).tolist()
    return {
        "mean": float(values.mean()),
        "min": float(values.min()),
        "p10": p10,
        "p50": p50,
        "p90": p90,
        "p99": p99,
        "max": float(values.max()),
    }


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


_COLUMNS = ("mean", "p10", "p50", "p90", "p99", "max")
_STEP_ROWS = (
    ("batch (sequences)", "batch", 1, ".1f"),
    ("waiting requests", "waiting", 1, ".1f"),
    ("tokens read per sequence (thousands)", "tokens_per_sequence", 1e-3, ".1f"),
    ("tokens read once per batch (thousands)", "tokens_once", 1e-3, ".1f"),
    ("reuse (per sequence / once)", "reuse", 1, ".3f"),
    ("pages shared (% of pages used)", "share_of_pages_shared", 100, ".2f"),
    ("pages staged", "pages_staged", 1, ".1f"),
)
_SAMPLE_ROWS = (
    ("layout (ms)", "layout_ms"),
    ("plan (ms)", "plan_ms"),
    ("attention (ms)", "attention_ms"),
    ("FlashAttention-3 (ms)", "fa3_ms"),
    ("FlashAttention-3's time over ours", "speed_over_fa3"),
    ("reuse as planned", "plan_reuse"),
)


def format_report(report: Report) -> str:
    """The report as text: totals, then one line for each per-step figure and each timing."""
    return "\n".join([*_total_lines(report), "", *_table_lines(report)])


def _total_lines(report: Report) -> list[str]:
    settings = report["settings"]
    refused = report["refused"]
    gib = 2.0**30
    bytes_a_token = report["bytes_once"] / report["tokens_once"] if report["tokens_once"] else 0.0
    pairs = [
        ("trace", report["trace"]),
        ("requests", f"{report['completed']:,} completed, {refused:,} refused (beyond the cache)"),
        (
            "cache",
            f"{settings['cache_pages']:,} pages of {settings['page_tokens']:,} tokens, "
            f"{settings['cache_tokens'] * bytes_a_token / gib:.1f} GiB "
            f"at {settings['model_shape']} x {settings['element_bytes']} bytes",
        ),
        ("simulated", f"{report['steps']:,} steps, {report['simulated_s']:,.1f} s"),
        ("run time", f"{report['wall_s']:.1f} s"),
        (
            "prefix cache",
            f"{report['cache_hit_rate']:.1%} of {report['prompt_tokens']:,} prompt tokens hit, "
            f"{report['evictions']:,} pages evicted",
        ),
        ("KV read", _read_line(report)),
        ("reuse", f"{report['reuse']:.3f} x"),
        ("pages shared", f"{report['share_of_pages_shared']:.2%} of the pages used"),
        ("pages staged", f"{report['pages_staged']:,}"),
    ]
    if report["out_of_order"]:
        pairs.insert(2, ("sorted", f"{report['out_of_order']:,} timestamps went backwards"))
    return [f"{name:<13} {value}" for name, value in pairs]


def _read_line(report: Report) -> str:
    tib = 2.0**40
    return (
        f"{report['tokens_per_sequence']:,} tokens per sequence, "
        f"{report['tokens_once']:,} once per batch "
        f"({report['bytes_per_sequence'] / tib:,.1f} and {report['bytes_once'] / tib:,.1f} TiB)"
    )


def _table_lines(report: Report) -> list[str]:
    lines = [_row("per step", _COLUMNS)]
    for label, name, scale, form in _STEP_ROWS:
        figures = report["per_step"][name]
        if figures:
            lines.append(_row(label, [format(figures[c] * scale, form) for c in _COLUMNS]))
    samples = report["samples"]
    if samples["count"]:
        lines += ["", _row(f"{samples['count']} steps on {samples['device']}", _COLUMNS)]
        for label, name in _SAMPLE_ROWS:
            if figures := samples[name]:
                lines.append(_row(label, [format(figures[c], ".3f") for c in _COLUMNS]))
    if samples["fa3_absent"]:
        lines.append(f"FlashAttention-3 not timed: {samples['fa3_absent']}")
    if samples["disagreements"]:
        lines.append(f"{samples['disagreements']} sampled steps disagree with the layout and plan")
    return lines


def _row(label: str, cells: list[str] | tuple[str, ...]) -> str:
    return f"{label:<40}" + "".join(f"{cell:>10}" for cell in cells)
