"""The paged benchmark: workloads x kernels, each kernel's output checked before it is timed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from flashcore.bench.graphs import (
    Flusher,
    Graph,
    Pending,
    capture,
    empty_graph,
    start_sample,
    time_graphs,
)
from flashcore.bench.machine import read_clocks
from flashcore.bench.paged_accuracy import Sample, relative_distance
from flashcore.bench.paged_problems import PagedInputs, PagedProblem, make_inputs
from flashcore.bench.paged_providers import OURS, PagedProvider, our_call, plan_of
from flashcore.bench.rows import Row
from flashcore.bench.timing import Timing

REPEATS = 100
"""Replays whose bits are compared."""
PREFILL_SETTLES = 3
"""Replays before a timed one of a prefill. It draws all the power there is, and the clocks follow
what ran in the last tens of milliseconds: after a kernel that draws less, the next was 15 % faster.
So each is timed after itself."""
PREFILL_ROUNDS = 15
"""At most: a round of all kernels with their replays before takes a second."""


@dataclass(frozen=True)
class Machine:
    """What the benchmark needs of a GPU; tests bring another."""

    device: str
    capture: Callable[[Callable[[], torch.Tensor]], Graph]
    start: Callable[[Graph], Pending]
    clocks: Callable[[], dict[str, float]]


def cuda_machine(*, write: bool) -> Machine:
    """The current CUDA device; `write` as in `Flusher`."""
    flush = Flusher("cuda", write=write)
    return Machine("cuda", capture, lambda graph: start_sample(graph, flush), read_clocks)


def run_paged(
    problems: Sequence[PagedProblem],
    providers: Sequence[PagedProvider],
    machine: Machine,
    *,
    rounds: int,
    on_problem: Callable[[str], None] = lambda name: None,
) -> dict[str, Any]:
    """`rows` without bounds (see `add_bounds`), `skipped` and `clocks`."""
    rows: list[Row] = []
    skipped: dict[tuple[str, str], list[str]] = {}  # (kernel, reason) -> workloads
    clocks = []
    for problem in problems:
        on_problem(problem.name)
        rows += _run_problem(problem, providers, machine, rounds, skipped)
        clocks.append({"after": problem.name, **machine.clocks()})
        if machine.device == "cuda":
            torch.cuda.empty_cache()  # the next pools are as large
    notes = [f"{name} on {', '.join(on)}: {reason}" for (name, reason), on in skipped.items()]
    return {"rows": rows, "skipped": notes, "clocks": clocks}


def add_bounds(rows: list[Row], bytes_per_second: float, fastest: float) -> None:
    """The bound is the time to stream each distinct KV byte once, at a library's rate; beside it
    the ratio to the same at the fastest rate found."""
    for row in rows:
        row["bound_ms"] = row["unique_kv_bytes"] / bytes_per_second * 1e3
        row["ratio_to_bound"] = row["ms"] / row["bound_ms"]
        row["ratio_to_fastest_read"] = row["ms"] / (row["unique_kv_bytes"] / fastest * 1e3)


def empty_graph_ms(machine: Machine, rounds: int) -> float:
    """What the timing says of a graph that does next to nothing."""
    graph = empty_graph(machine.device)
    return time_graphs({"": graph}, rounds=rounds, start=machine.start)[""].median_ms


def _run_problem(
    problem: PagedProblem,
    providers: Sequence[PagedProvider],
    machine: Machine,
    rounds: int,
    skipped: dict[tuple[str, str], list[str]],
) -> list[Row]:
    inputs = make_inputs(problem, machine.device)
    sample = Sample(problem, inputs)
    graphs: dict[str, Graph] = {}
    facts: dict[str, Row] = {}
    ours: torch.Tensor | None = None
    for provider in providers:
        try:
            graph = machine.capture(provider.prepare(problem, inputs))
            graph.replay()
            facts[provider.name] = _check(graph.out, sample, ours, provider.wrong)
            if provider.name == OURS:
                ours = graph.out.clone()
                facts[OURS] |= _facts_of_ours(problem, inputs, sample, graph)
        except Exception as error:  # a kernel that cannot run a problem leaves a note, not a gap
            reason = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:200]}"
            skipped.setdefault((provider.name, reason), []).append(problem.name)
            continue
        graphs[provider.name] = graph
    if problem.q_len > 1:
        rounds, start = min(rounds, PREFILL_ROUNDS), _settled(machine.start)
    else:
        start = machine.start
    timings = time_graphs(graphs, rounds=rounds, start=start)
    return [
        _row(problem, inputs, provider, timings[provider.name], facts[provider.name])
        for provider in providers
        if provider.name in timings
    ]


def _settled(start: Callable[[Graph], Pending]) -> Callable[[Graph], Pending]:
    def settled(graph: Graph) -> Pending:
        for _ in range(PREFILL_SETTLES):
            graph.replay()
        return start(graph)

    return settled


class WrongResultError(Exception):
    """A kernel's output is not the attention of the problem."""


def _check(out: torch.Tensor, sample: Sample, ours: torch.Tensor | None, wrong: float) -> Row:
    error, largest = sample.errors(out)
    if not largest <= wrong:  # NaN too
        raise WrongResultError(f"relative error {largest:.2g} against float64")
    facts: Row = {"relative_error": error, "largest_relative_error": largest}
    if ours is not None:  # every row, where the sample has a few
        distance = float(relative_distance(out, ours).max())
        if not distance <= 2 * wrong:
            raise WrongResultError(f"relative distance {distance:.2g} from flashcore's result")
        facts["largest_distance_from_flashcore"] = distance
    return facts


def _facts_of_ours(problem: PagedProblem, inputs: PagedInputs, sample: Sample, graph: Graph) -> Row:
    """Same bits on repeats; how far the result moves when sharing is ignored; the plan."""
    first = graph.out.clone()
    differs = torch.zeros((), dtype=torch.bool, device=first.device)
    for _ in range(REPEATS):
        graph.replay()
        differs |= (graph.out.view(torch.int16) != first.view(torch.int16)).any()
    ignored = our_call(inputs, plan_of(problem, inputs, share=False))()
    plan = plan_of(problem, inputs)
    stats = plan.stats()
    moved = relative_distance(first, ignored)
    return {
        "repeats": REPEATS,
        "same_bits_on_repeats": not differs.item(),
        "relative_error_with_sharing_ignored": sample.errors(ignored)[0],
        "relative_distance_with_sharing_ignored": float(moved.square().mean().sqrt()),
        "plan": {
            "groups": stats.num_groups,
            "shared_groups": stats.num_shared_groups,
            "work_items": stats.num_work_items,
            "partial_tokens": stats.num_partial_tokens,
            "tokens_read": stats.tokens_once,
            "tile_m": plan.tile_m,
        },
    }


def _row(
    problem: PagedProblem,
    inputs: PagedInputs,
    provider: PagedProvider,
    timing: Timing,
    facts: Row,
) -> Row:
    unique = inputs.batch.unique_tokens * problem.token_bytes
    flops = problem.flops(inputs.batch.seq_lens)
    row: Row = {
        "workload": problem.name,
        "sequences": problem.sequences,
        "tokens": problem.tokens,
        "reuse": inputs.batch.reuse,
        "q_heads": problem.q_heads,
        "kv_heads": problem.kv_heads,
        "head_dim": problem.head_dim,
        "page_tokens": problem.page_tokens,
        "kv_dtype": str(problem.kv_dtype).removeprefix("torch."),
        "q_len": problem.q_len,
        "kernel": provider.name,
        "version": provider.version,
        "ms": timing.median_ms,
        "ms_p10": timing.p10_ms,
        "ms_p90": timing.p90_ms,
        "rounds": timing.rounds,
        "unique_kv_bytes": unique,
        "flops": flops,
        "unique_gb_per_s": unique / timing.median_ms / 1e6,
        **facts,
    }
    if problem.q_len > 1:
        row["tflops"] = flops / timing.median_ms / 1e9
    return row
