"""Where the time of a layer that reads little goes: python tools/sweep_paged.py [--json FILE]

For each workload of `flashcore bench paged --latency`, in turns: the plan as the rules make it;
plans of both tile heights whose shared and own runs are cut otherwise; and of the first plan its
attention without the merge, one to four layers in a graph, and a replay that finds the plan's
tables in L2. The kernels are the same ones, so all results but the merge's lie within rounding, and
repeat bit by bit: both are checked. Needs a Hopper GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from flashcore.bench.graphs import Flusher, Graph, Pending, start_sample, time_graphs
from flashcore.bench.latency import latency_problems
from flashcore.bench.paged import Machine, cuda_machine, empty_graph_ms
from flashcore.bench.paged_accuracy import relative_distance
from flashcore.bench.paged_problems import PagedInputs, PagedProblem, make_inputs
from flashcore.bench.paged_providers import our_call
from flashcore.contract.work import Work
from flashcore.planner import build, split
from flashcore.planner.types import Plan
from flashcore.sm90.launch import paged as launch

WHOLE = 1 << 30  # tokens: a run is one split
SHARED = (256, 384, 512, 768, 1024, 1408, 2048, WHOLE)
OWN = (WHOLE, 512, 256, 128)
LAYERS = (2, 3, 4)
REPEATS = 5
WRONG = 2e-2  # relative distance of a query token from the rules' plan's result


class Cut(NamedTuple):
    """A plan by hand: tokens of a split at most, of runs that are shared and of a sequence's own.
    tile_m None: both as the rules have them."""

    tile_m: int | None = None
    shared: int = WHOLE
    own: int = WHOLE

    @property
    def name(self) -> str:
        if self.tile_m is None:
            return "rules"
        words = ("-" if tokens == WHOLE else str(tokens) for tokens in (self.shared, self.own))
        return "tile {}, shared {}, own {}".format(self.tile_m, *words)


RULES = Cut()


def cuts(problem: PagedProblem) -> list[Cut]:
    """Those that cut a run of the problem."""
    own = problem.tokens - problem.prefix_tokens
    shared = [n for n in SHARED if n == WHOLE or n < problem.prefix_tokens]
    return [RULES] + [
        Cut(tile_m, tokens, of_own)
        for tile_m in (64, 128)
        for tokens in shared
        for of_own in OWN
        if of_own == WHOLE or of_own < own
    ]


@contextlib.contextmanager
def instead(module: Any, name: str, value: Any) -> Iterator[None]:
    """`value` in the place of a module's own."""
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def plan_by(cut: Cut, problem: PagedProblem, inputs: PagedInputs) -> Plan:
    """The plan of a batch with that tile height and those splits."""
    import flashcore

    def pages_of_splits(runs: Any, *_: Any) -> torch.Tensor:
        unit = -(-split.TILE_TOKENS // problem.page_tokens)
        most = torch.where(runs.members > 1, cut.shared, cut.own) // problem.page_tokens
        splits = -(-runs.entries // most.clamp(min=unit))
        pages: torch.Tensor = -(-runs.entries // splits)
        return -(-pages // unit) * unit

    rule = build._split_pages if cut.tile_m is None else pages_of_splits
    with instead(build, "_split_pages", rule):
        layout = flashcore.layout_from_page_table(
            inputs.page_table, inputs.seq_lens, page_tokens=problem.page_tokens
        )
        return flashcore.plan(
            layout,
            num_q_heads=problem.q_heads,
            num_kv_heads=problem.kv_heads,
            head_dim=problem.head_dim,
            dtype=inputs.q.dtype,
            tile_m=cut.tile_m,
        )


def distinct(problem: PagedProblem, inputs: PagedInputs) -> dict[Cut, Plan]:
    """The plans of `cuts`, each once."""
    found: dict[Cut, Plan] = {}
    seen = set()
    for cut in cuts(problem):
        plan = plan_by(cut, problem, inputs)
        splits = tuple(plan.work[:, [Work.NUM_TOKENS, Work.NUM_ROWS]].flatten().tolist())
        if (plan.tile_m, splits) not in seen:
            seen.add((plan.tile_m, splits))
            found[cut] = plan
    return found


def sweep(problem: PagedProblem, machine: Machine, rounds: int) -> dict[str, Any]:
    """Microseconds by name, and what each plan is. Raises RuntimeError for a wrong result."""
    inputs = make_inputs(problem, machine.device)
    plans = distinct(problem, inputs)
    graphs = {cut.name: machine.capture(our_call(inputs, plan)) for cut, plan in plans.items()}
    for name, graph in graphs.items():
        _check(name, graph, graphs[RULES.name])
    timed = {**graphs, **_parts(problem, inputs, plans[RULES], machine)}
    found = time_graphs(timed, rounds=rounds, start=machine.start)
    us = {name: 1e3 * timing.median_ms for name, timing in found.items()}
    warm = time_graphs(
        {"": graphs[RULES.name]}, rounds=rounds, start=_after_reading(plans[RULES], machine)
    )
    return {
        "workload": problem.name,
        "us": {**us, "tables in L2": 1e3 * warm[""].median_ms},
        "plans": {
            cut.name: {
                "tile_m": plan.tile_m,
                "items": plan.work.shape[0],
                "longest": int(plan.work[:, Work.NUM_TOKENS].max()),
                "partial_tokens": plan.num_partial_tokens,
            }
            for cut, plan in plans.items()
        },
    }


def _check(name: str, graph: Graph, rules: Graph) -> None:
    graph.replay()
    first = graph.out.clone()
    for _ in range(REPEATS):
        graph.replay()
        if not torch.equal(graph.out, first):
            raise RuntimeError(f"{name}: other bits when it is repeated")
    distance = float(relative_distance(first, rules.out).max())
    if not distance <= WRONG:
        raise RuntimeError(f"{name}: {distance:.2g} from the result of the rules' plan")


def _parts(
    problem: PagedProblem, inputs: PagedInputs, plan: Plan, machine: Machine
) -> dict[str, Graph]:
    """Attention without its merge; layers one after another, on two pools by turns."""
    other = make_inputs(problem, machine.device, seed=1)
    other = replace(inputs, k_pages=other.k_pages, v_pages=other.v_pages)
    layers = [our_call(inputs, plan), our_call(other, plan)]

    def chain(count: int) -> Callable[[], torch.Tensor]:
        return lambda: [layers[i % 2]() for i in range(count)][-1]

    found = {f"{count} layers": machine.capture(chain(count)) for count in LAYERS}
    with instead(launch, "_merge_config", lambda *_: None):
        alone = plan_by(RULES, problem, inputs)  # a plan keeps its launches
        found["no merge"] = machine.capture(our_call(inputs, alone))
    return found


def _after_reading(plan: Plan, machine: Machine) -> Callable[[Graph], Pending]:
    """A sample whose flush is followed by a read of the plan's tables."""
    if machine.device != "cuda":
        return machine.start
    flusher = Flusher(machine.device)
    p = plan
    tables = (p.work, p.cols, p.q_tokens, p.q_positions, p.merge_offsets, p.merge_partials)

    def flush() -> None:
        flusher()
        for table in tables:
            table.sum()

    return lambda graph: start_sample(graph, flush)


def format_row(row: dict[str, Any], best: int = 3) -> str:
    """The rules' plan, the fastest ones, and the parts."""
    us, plans = row["us"], row["plans"]

    def told(name: str) -> str:
        return f"{us[name]:.1f} ({name}; {plans[name]['items']} items)"

    fastest = sorted(plans, key=lambda name: float(us[name]))[:best]
    parts = [f"{name} {value:.1f}" for name, value in us.items() if name not in plans]
    return f"{row['workload']}: " + "; ".join(
        [told(RULES.name), "fastest " + ", ".join(map(told, fastest)), *parts]
    )


def main(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workload", default="", metavar="A,B", help="whose name has one of these")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(words)
    wanted = args.workload.split(",")
    problems = [p for p in latency_problems() if any(text in p.name for text in wanted)]
    machine = cuda_machine(write=False)
    result: dict[str, Any] = {"empty_graph_us": 1e3 * empty_graph_ms(machine, args.rounds)}
    result["rows"] = rows = []
    for problem in problems:
        rows.append(sweep(problem, machine, args.rounds))
        print(format_row(rows[-1]), flush=True)
        torch.cuda.empty_cache()
        if args.json is not None:
            args.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
