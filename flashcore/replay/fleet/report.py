"""The outcome of a fleet as JSON-ready dictionaries, and those as a table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from flashcore.replay.fleet.cost import CostModel
from flashcore.replay.fleet.routing import RoutingSettings
from flashcore.replay.fleet.tally import Tally
from flashcore.replay.report import Report, distribution

_QUANTILES = {"p10": 0.1, "p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
_OVER_ENGINES = ("requests", "reuse", "cache_hit_rate", "batch_mean", "tokens_per_s")


def engine_figures(tally: Tally, cost: CostModel) -> Report:
    """Of one engine, or of several together; those of `flashcore replay` by the same names.

    Ratios of nothing are 1 (reuse) or 0 (shares). Seconds, steps and tokens per second are by the
    cost model, and the last are those of an engine that is always as busy as in its steps: with
    pages read once per batch, and (`_per_sequence`) as often as sequences use them.
    """
    totals, sums = tally.totals, tally.sums
    per_sequence, once = sums["tokens_per_sequence"], sums["tokens_once"]
    busy_s, busy_per_sequence_s = cost.busy_s(tally, once), cost.busy_s(tally, per_sequence)
    return {
        "requests": totals.completed + totals.refused,
        "completed": totals.completed,
        "refused": totals.refused,
        "steps": tally.steps,
        "simulated_s": tally.end_ms / 1000.0,
        "tokens_per_sequence": per_sequence,
        "tokens_once": once,
        "reuse": per_sequence / once if once else 1.0,
        "bytes_per_sequence": per_sequence * cost.token_bytes,
        "bytes_once": once * cost.token_bytes,
        "share_of_pages_shared": _over(sums["pages_shared"], sums["pages_used"]),
        "pages_staged": sums["pages_staged"],
        "prompt_tokens": totals.prompt_tokens,
        "cached_tokens": totals.cached_tokens,
        "cache_hit_rate": _over(totals.cached_tokens, totals.prompt_tokens),
        "evictions": tally.evictions,
        "output_tokens": totals.output_tokens,
        "batch_mean": _over(sums["batch"], tally.steps),
        **{f"batch_{name}": tally.batch_quantile(share) for name, share in _QUANTILES.items()},
        "waiting_mean": _over(sums["waiting"], tally.steps),
        "busy_s": busy_s,
        "busy_per_sequence_s": busy_per_sequence_s,
        "step_ms": 1000 * _over(busy_s, tally.steps),
        "step_per_sequence_ms": 1000 * _over(busy_per_sequence_s, tally.steps),
        "tokens_per_s": _over(totals.output_tokens, busy_s),
        "tokens_per_s_per_sequence": _over(totals.output_tokens, busy_per_sequence_s),
    }


def fleet_figures(
    tallies: Sequence[Tally], routing: RoutingSettings, cost: CostModel, per_engine: bool
) -> Report:
    """A fleet's row: all engines together, how they differ, and with `per_engine` each of them.

    `fleet_tokens_per_s` is what all engines give together, each always as busy as in its steps;
    `balance` is the mean of their busy seconds over the largest.
    """
    whole = Tally()
    for tally in tallies:
        whole.add(tally)
    engines = [engine_figures(tally, cost) for tally in tallies]
    busiest = max(engine["busy_s"] for engine in engines)
    overall = engine_figures(whole, cost)
    row = {
        "engines": routing.engines,
        "routing": routing.routing,
        **overall,
        "fleet_tokens_per_s": routing.engines * overall["tokens_per_s"],
        "balance": overall["busy_s"] / len(engines) / busiest if busiest else 1.0,
        "over_engines": {
            name: distribution(np.array([engine[name] for engine in engines]))
            for name in _OVER_ENGINES
        },
    }
    return row | {"per_engine": engines} if per_engine else row


def format_fleets(report: Report) -> str:
    """Settings, then a line for each fleet, and for each engine where the report has them."""
    lines = [*_setting_lines(report), "", _line(_COLUMNS)]
    lines += [_row(row) for row in report["rows"]]
    for row in report["rows"]:
        if engines := row.get("per_engine"):
            lines += ["", _line(_COLUMNS)]
            named = ((f"no. {number}", engine) for number, engine in enumerate(engines))
            lines += [_row({**row, "balance": None, **e, "engines": name}) for name, e in named]
    return "\n".join(lines)


def _setting_lines(report: Report) -> Iterable[str]:
    settings, cost, traffic = report["settings"], report["cost_model"], report["traffic"]
    yield f"trace         {report['trace']}, {report['trace_requests']:,} requests"
    yield f"traffic       {describe_traffic(traffic)}, seed {traffic['seed']}"
    yield (
        f"each engine   {settings['cache_pages']:,} pages of {settings['page_tokens']:,} tokens, "
        f"batch up to {settings['max_batch']}"
    )
    yield (
        f"cost of steps {cost['weight_gb']:g} GB of weights and {cost['token_bytes']:,} bytes "
        f"of KV a token at {cost['bandwidth_tb_s']:g} TB/s, "
        f"{cost['prefill_tokens_per_s']:,.0f} prompt tokens/s"
    )
    yield "pages are read once per batch, or (in brackets) per sequence; tokens/s are an engine's"


def describe_traffic(traffic: Report) -> str:
    """Copies of the trace and what they begin with, in words."""
    per_engine = traffic["copies_per_engine"]
    text = (
        f"{traffic['copies']:g} copies"
        if per_engine is None
        else f"{per_engine:g} copies an engine"
    )
    if traffic["system_prompts"]:
        text += (
            f", {traffic['system_prompts']:,} system prompts of "
            f"{traffic['system_tokens']:,} tokens (Zipf {traffic['zipf']:g})"
        )
    return text


_COLUMNS = (
    "engines",
    "routing",
    "requests",
    "reuse",
    "hit %",
    "batch",
    "p90",
    "waiting",
    "balance",
    "step ms",
    "tokens/s",
)
_WIDTHS = (9, 14, 11, 8, 7, 7, 7, 9, 9, 17, 19)


def _row(row: Report) -> str:
    balance = row["balance"]
    return _line(
        (
            row["engines"] if isinstance(row["engines"], str) else f"{row['engines']:,}",
            row["routing"],
            f"{row['requests']:,}",
            f"{row['reuse']:.3f}",
            f"{100 * row['cache_hit_rate']:.1f}",
            f"{row['batch_mean']:.1f}",
            f"{row['batch_p90']:.0f}",
            f"{row['waiting_mean']:.2f}",
            "" if balance is None else f"{balance:.2f}",
            f"{row['step_ms']:.2f} ({row['step_per_sequence_ms']:.2f})",
            f"{row['tokens_per_s']:,.0f} ({row['tokens_per_s_per_sequence']:,.0f})",
        )
    )


def _line(cells: Sequence[str]) -> str:
    return "".join(f"{cell:>{width}}" for cell, width in zip(cells, _WIDTHS, strict=True))


def _over(part: Any, whole: Any) -> float:
    return float(part / whole) if whole else 0.0
