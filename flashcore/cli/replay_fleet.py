"""`flashcore replay TRACE --engines N`: several engines behind a router."""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from flashcore.cli.files import writing
from flashcore.cli.progress import ProgressBar
from flashcore.cli.results import provenance

if TYPE_CHECKING:
    from flashcore.replay.fleet.routing import RoutingSettings
    from flashcore.replay.fleet.tally import Tally
    from flashcore.replay.fleet.traffic import Traffic
    from flashcore.replay.report import ModelShape, Report
    from flashcore.replay.simulate import EngineSettings
    from flashcore.replay.trace import Trace

# What an option that is not given means; with --engines alone, so that none is ignored without it.
_DEFAULTS: dict[str, Any] = {
    "routing": "round-robin",
    "balance_abs": 8,
    "balance_rel": 1.5,
    "report_ms": 100.0,
    "weight_gb": 16.06,
    "bandwidth_tb_s": 3.05,
    "system_prompts": 0,
    "system_tokens": 2048,
    "zipf": 1.0,
    "copies": None,
    "copies_per_engine": None,
    "processes": None,
    "per_engine": False,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of a fleet."""
    group = parser.add_argument_group(
        "fleet",
        "several engines behind a router, and what their steps cost by a model; nothing of them is "
        "timed. All of these need --engines.",
    )
    group.add_argument(
        "--engines", metavar="N[,N...]", help="simulate fleets of so many engines, up to 10000"
    )
    group.add_argument(
        "--routing",
        metavar="R[,R...]",
        help="round-robin, least-loaded (fewest requests in flight), prefix-aware (the engine that "
        "was sent the longest part of the prompt, unless crowded) or several of them "
        "(default: round-robin)",
    )
    group.add_argument(
        "--balance-abs",
        type=int,
        metavar="A",
        help="crowded is an engine with more than A requests above the least loaded one (default: "
        "8) and",
    )
    group.add_argument(
        "--balance-rel", type=float, metavar="B", help="more than B times as many (default: 1.5)"
    )
    group.add_argument(
        "--report-ms",
        type=float,
        metavar="MS",
        help="how often the router hears which requests have ended (default: 100)",
    )
    _add_traffic_arguments(group)
    _add_cost_arguments(group)
    group.add_argument(
        "--per-engine",
        action="store_const",
        const=True,
        help="the figures of each engine, not only of all together",
    )
    group.add_argument(
        "--processes",
        type=int,
        metavar="P",
        help="that the engines are spread over (default: one for each core)",
    )


def _add_traffic_arguments(group: argparse._ArgumentGroup) -> None:
    copies = group.add_mutually_exclusive_group()
    copies.add_argument(
        "--copies",
        type=float,
        metavar="X",
        help="lay so many copies of the trace over each other, with fresh prompts and at random "
        "shifts; of a fraction, some conversations are left out (default: 1)",
    )
    copies.add_argument(
        "--copies-per-engine", type=float, metavar="X", help="the same for each engine of the fleet"
    )
    group.add_argument(
        "--system-prompts",
        type=int,
        metavar="P",
        help="let each conversation begin with one of P system prompts (default: 0, none)",
    )
    group.add_argument(
        "--system-tokens",
        type=int,
        metavar="T",
        help="of each, a multiple of --block-tokens (default: 2048)",
    )
    group.add_argument(
        "--zipf",
        type=float,
        metavar="S",
        help="the k-th system prompt is drawn with a weight of 1 / k^S (default: 1)",
    )


def _add_cost_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--weight-gb",
        type=float,
        metavar="GB",
        help="10^9 bytes of weights that each step reads (default: 16.06, Llama-3.1-8B in bf16)",
    )
    group.add_argument(
        "--bandwidth-tb-s",
        type=float,
        metavar="TB",
        help="10^12 bytes that an engine reads in a second (default: 3.05, an H100)",
    )


def refuse_without_engines(args: argparse.Namespace) -> None:
    """ValueError where an option of fleets is given and no fleet."""
    for name in _DEFAULTS:
        if getattr(args, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')} needs --engines")


def check_outputs(args: argparse.Namespace) -> None:
    """ValueError where something is asked of a fleet that only one engine's replay can give."""
    given = {
        "--attention": args.attention,
        "--sample-every": args.sample_every is not None,
        "--heads": args.heads is not None,
        "--device cuda": args.device == "cuda",
        "--steps-csv": args.steps_csv is not None,
    }
    for option, asked in given.items():
        if asked:
            raise ValueError(f"{option} is of one engine's replay; leave it or --engines out")


def replay_fleets(
    args: argparse.Namespace, trace: Trace, shape: ModelShape, settings: EngineSettings
) -> Report:
    """Every fleet that is asked for, one after the other; ValueError before the first one runs."""
    from flashcore.bench.machine import cpu_name
    from flashcore.replay.fleet.cost import CostModel
    from flashcore.replay.fleet.report import fleet_figures

    options = {
        name: default if getattr(args, name) is None else getattr(args, name)
        for name, default in _DEFAULTS.items()
    }
    cost = CostModel(
        weight_gb=options["weight_gb"],
        bandwidth_tb_s=options["bandwidth_tb_s"],
        token_bytes=shape.token_bytes,
        prefill_tokens_per_s=settings.prefill_tokens_per_s,
    )
    fleets = [
        (routing, _traffic(trace, settings, options, args.seed, routing.engines))
        for routing in _routings(args.engines, options)
    ]
    processes = _processes(options["processes"])
    rows = []
    for routing, traffic in fleets:
        began, user = time.perf_counter(), _user_s()
        tallies = _run(traffic, settings, routing, processes, args.progress)
        row = fleet_figures(tallies, routing, cost, options["per_engine"])
        rows.append({**row, "wall_s": time.perf_counter() - began, "user_s": _user_s() - user})
    return {
        "cpu": f"{cpu_name()}, {os.cpu_count()} cores",
        **provenance(args.commit),
        "versions": _versions(),
        "trace": trace.name,
        "trace_requests": len(trace.requests),
        "out_of_order": trace.out_of_order,
        "settings": {**asdict(settings), "model_shape": str(shape)},
        "traffic": {
            **{name: options[name] for name in ("system_prompts", "system_tokens", "zipf")},
            "copies": None if options["copies_per_engine"] else options["copies"] or 1.0,
            "copies_per_engine": options["copies_per_engine"],
            "seed": args.seed,
        },
        "router": {n: options[n] for n in ("balance_abs", "balance_rel", "report_ms")},
        "cost_model": asdict(cost),
        "processes": processes,
        "peak_mib": _peak_mib(processes),
        "rows": rows,
    }


def write_outputs(args: argparse.Namespace, report: Report) -> None:
    """Print the report and draw what is asked for."""
    from flashcore.replay.fleet.plot import draw_fleets
    from flashcore.replay.fleet.report import format_fleets

    if args.plot is not None:
        with writing(args.plot):
            draw_fleets(report, args.plot)
    print(json.dumps(report, indent=1) if args.json else format_fleets(report))


def _routings(engines: str, options: dict[str, Any]) -> list[RoutingSettings]:
    from flashcore.replay.fleet.routing import RoutingSettings

    names = [name for name in options["routing"].split(",") if name]
    base = {name: options[name] for name in ("balance_abs", "balance_rel", "report_ms")}
    found = [
        RoutingSettings(engines=number, routing=name, **base)
        for number in map(_number, engines.split(","))
        for name in names
    ]
    if not found:
        raise ValueError("--routing is empty; name round-robin, least-loaded or prefix-aware")
    return found


def _number(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"--engines: '{text}' is no integer from 1 to 10000") from None


def _traffic(
    trace: Trace, settings: EngineSettings, options: dict[str, Any], seed: int, engines: int
) -> Traffic:
    from flashcore.replay.fleet.traffic import Traffic, TrafficSettings

    drawn = TrafficSettings(
        system_prompts=options["system_prompts"],
        system_tokens=options["system_tokens"],
        zipf=options["zipf"],
        seed=seed,
    )
    copies = options["copies"]
    if (per_engine := options["copies_per_engine"]) is not None:
        copies = per_engine * engines
    if copies is not None:
        drawn = replace(drawn, copies=copies)
    return Traffic(trace.requests, drawn, settings.block_tokens)


def _processes(asked: int | None) -> int:
    if asked is not None and not 1 <= asked <= 1024:
        raise ValueError(f"--processes is {asked}; it must be 1 to 1024")
    return asked or os.cpu_count() or 1


def _run(
    traffic: Traffic,
    settings: EngineSettings,
    routing: RoutingSettings,
    processes: int,
    progress: bool | None,
) -> list[Tally]:
    from flashcore.replay.fleet.engines import LocalEngines, SpreadEngines
    from flashcore.replay.fleet.run import run_fleet

    label = f"{routing.engines} {routing.routing}"
    with ProgressBar(label, len(traffic), shown=progress) as bar:
        if min(processes, routing.engines) == 1:
            local = LocalEngines(range(routing.engines), settings)
            return run_fleet(traffic, local, settings, routing, bar.update)
        spread = SpreadEngines(routing.engines, settings, min(processes, routing.engines))
        with spread as engines:
            return run_fleet(traffic, engines, settings, routing, bar.update)


def _versions() -> dict[str, str]:
    import numpy

    return {"python": platform.python_version(), "numpy": numpy.__version__}


def _user_s() -> float:
    """User seconds of this process and those it has waited for."""
    times = os.times()
    return times.user + times.children_user


def _peak_mib(processes: int) -> float | None:
    """At most: this process's peak and the largest child's for each; None where unknown."""
    try:
        import resource
    except ImportError:
        return None
    here, child = (
        resource.getrusage(who).ru_maxrss / 1024
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    return here + processes * child
