"""Schedules of gathered rows beside each other and FlashAttention-3's kernel:

    python tools/sweep_gather.py [--workload A,B] [--schedule A,B] [--json FILE]

All have the same tiles, so the same bits: that is checked before anything is timed, on repeats too.
Times are of CUDA graphs, the L2 emptied before each replay, in turns. Needs a Hopper GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from flashcore.bench.graphs import Graph, time_graphs
from flashcore.bench.paged import Machine, cuda_machine, empty_graph_ms
from flashcore.bench.paged_accuracy import relative_distance
from flashcore.bench.paged_problems import PagedProblem, make_inputs, paged_problems
from flashcore.bench.paged_providers import PagedProvider, our_call, paged_providers, plan_of
from flashcore.sm90.config.paged import PagedCall, PagedConfig, choose
from flashcore.sm90.launch import paged as launch
from tools.sweep_paged import WRONG, instead

RULES = "rules"
SCHEDULES: dict[str, dict[str, Any]] = {
    RULES: {},
    "2 stages": {"stages": 2},
    "64 in flight": {"rows_in_flight": 64},
    "48 in flight": {"rows_in_flight": 48},
    "32 in flight": {"rows_in_flight": 32},
    "2 stages, 48 in flight": {"stages": 2, "rows_in_flight": 48},
    "no 256-byte fetch": {"fetch_whole_rows": False},
    "one CTA, 4 stages": {"stages": 4, "ctas_per_sm": 1},
    "one CTA, 6 stages": {"stages": 6, "ctas_per_sm": 1},
}
"""Changes of a configuration, by name."""
REPEATS = 20


def problems() -> list[PagedProblem]:
    """Nothing shared, with short pages and the shortest that come as boxes; much shared."""
    known = {problem.name: problem for problem in paged_problems()}
    alone = known["32x8192-0-page1"]
    shared = [known[name] for name in ("32x8192-70", "64x8192-90")]
    return [
        alone,
        replace(alone, name="32x8192-0-page8", page_tokens=8),
        known["32x8192-0-page16"],
        *(replace(one, name=f"{one.name}-page1", page_tokens=1) for one in shared),
    ]


def changed(config: PagedConfig, changes: Mapping[str, Any]) -> PagedConfig:
    """`config` with a schedule; boxes are gathered where a schedule is not the rules'."""
    if not changes:
        return config
    return replace(config, kv_load="gather", **changes)


def chosen_with(changes: Mapping[str, Any]) -> Callable[[PagedCall, int], PagedConfig]:
    """`config.paged.choose` with a schedule."""
    return lambda call, tile_m: changed(choose(call, tile_m), changes)


def captured(
    problem: PagedProblem,
    machine: Machine,
    schedules: Sequence[str],
    peers: Sequence[PagedProvider],
) -> tuple[dict[str, Graph], dict[str, str]]:
    """Graphs by name, checked, and why a peer is missing. RuntimeError for a wrong result."""
    inputs = make_inputs(problem, machine.device)
    plan = plan_of(problem, inputs)
    graphs, missing = {}, {}
    for name in schedules:
        with instead(launch, "_choose", chosen_with(SCHEDULES[name])):
            call = our_call(inputs, replace(plan))  # a plan keeps its launches
            graphs[name] = machine.capture(call)
        _check_bits(name, graphs[name], graphs[RULES])
    for peer in peers:
        try:
            graph = machine.capture(peer.prepare(problem, inputs))
            graph.replay()
        except Exception as error:  # peers fail in many ways
            missing[peer.name] = f"{type(error).__name__}: {error}"
            continue
        distance = float(relative_distance(graph.out, graphs[RULES].out).max())
        if not distance <= WRONG:
            raise RuntimeError(f"{peer.name}: {distance:.2g} from the rules' result")
        graphs[peer.name] = graph
    return graphs, missing


def _check_bits(name: str, graph: Graph, rules: Graph) -> None:
    rules.replay()
    expected = rules.out.clone()
    for _ in range(REPEATS):
        graph.replay()
        if not torch.equal(graph.out.view(torch.int16), expected.view(torch.int16)):
            raise RuntimeError(f"{name}: other bits than with the rules' schedule")


def sweep(
    problem: PagedProblem,
    machine: Machine,
    rounds: int,
    schedules: Sequence[str],
    peers: Sequence[PagedProvider],
) -> dict[str, Any]:
    """Microseconds by name: median, and the tenth and ninetieth percentiles."""
    graphs, missing = captured(problem, machine, schedules, peers)
    found = time_graphs(graphs, rounds=rounds, start=machine.start)
    return {
        "workload": problem.name,
        "us": {name: 1e3 * timing.median_ms for name, timing in found.items()},
        "us_p10_p90": {name: (1e3 * t.p10_ms, 1e3 * t.p90_ms) for name, t in found.items()},
        "missing": missing,
    }


def format_row(row: dict[str, Any]) -> str:
    """A line for each schedule and peer, each with its ratio to the rules' time."""
    us, spread = row["us"], row["us_p10_p90"]
    lines = [
        f"  {name:<24}{value:>8.1f} ({spread[name][0]:.1f} to {spread[name][1]:.1f})"
        f"{value / us[RULES]:>8.3f}"
        for name, value in us.items()
    ]
    lines += [f"  {name} is missing: {reason}" for name, reason in row["missing"].items()]
    return "\n".join([row["workload"], *lines])


def main(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workload", default="", metavar="A,B", help="whose name has one of these")
    parser.add_argument("--schedule", default="", metavar="A,B", help="beside that of the rules")
    parser.add_argument("--peer", default="fa3", help="of `flashcore bench paged`")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(words)
    schedules = [
        name
        for name in SCHEDULES
        if name == RULES or any(text in name for text in args.schedule.split(","))
    ]
    peers = [peer for peer in paged_providers()[0] if peer.name in args.peer.split(",")]
    machine = cuda_machine(write=False)
    result: dict[str, Any] = {"empty_graph_us": 1e3 * empty_graph_ms(machine, args.rounds)}
    result["rows"] = rows = []
    for problem in problems():
        if not any(text in problem.name for text in args.workload.split(",")):
            continue
        rows.append(sweep(problem, machine, args.rounds, schedules, peers))
        print(format_row(rows[-1]), flush=True)
        torch.cuda.empty_cache()
        if args.json is not None:
            args.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
