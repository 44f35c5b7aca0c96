"""What batch-invariant plans cost, and whether their bits keep what they promise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from flashcore.bench.graphs import time_graphs
from flashcore.bench.paged import Machine
from flashcore.bench.paged_problems import PagedInputs, PagedProblem, make_inputs
from flashcore.bench.paged_providers import our_call, plan_of

DEFAULT, INVARIANT = "default", "invariant"


def run_batch_invariance(
    problems: Sequence[PagedProblem],
    machine: Machine,
    *,
    rounds: int,
    on_problem: Callable[[str], None] = lambda name: None,
) -> list[dict[str, Any]]:
    """For each workload the time of our kernel with both kinds of plan, and whether the bits of
    the invariant one are the same where sharing is ignored, and for its first sequence alone."""
    rows = []
    for problem in problems:
        on_problem(problem.name)
        rows.append(_row(problem, machine, rounds))
        if machine.device == "cuda":
            torch.cuda.empty_cache()  # the next pools are as large
    return rows


def _row(problem: PagedProblem, machine: Machine, rounds: int) -> dict[str, Any]:
    inputs = make_inputs(problem, machine.device)
    graphs = {}
    for name in (DEFAULT, INVARIANT):
        plan = plan_of(problem, inputs, batch_invariant=name == INVARIANT)
        graphs[name] = machine.capture(our_call(inputs, plan))
    timings = time_graphs(graphs, rounds=rounds, start=machine.start)
    ms = {name: timings[name].median_ms for name in graphs}
    return {
        "workload": problem.name,
        "default_ms": ms[DEFAULT],
        "invariant_ms": ms[INVARIANT],
        "ratio": ms[INVARIANT] / ms[DEFAULT],
        "same_bits": _same_bits(problem, inputs, graphs[INVARIANT].out),
    }


def _same_bits(problem: PagedProblem, inputs: PagedInputs, out: torch.Tensor) -> bool:
    unshared = plan_of(problem, inputs, share=False, batch_invariant=True)
    alone, first = _first_sequence(problem, inputs)
    plan = plan_of(alone, first, batch_invariant=True)
    return torch.equal(our_call(inputs, unshared)(), out) and torch.equal(
        our_call(first, plan)(), out[: problem.q_len]
    )


def _first_sequence(problem: PagedProblem, inputs: PagedInputs) -> tuple[PagedProblem, PagedInputs]:
    """The batch that has nothing but the first sequence, in the same pool."""
    alone = replace(
        inputs,
        page_table=inputs.page_table[:1].contiguous(),
        seq_lens=inputs.seq_lens[:1],
        q=inputs.q[: problem.q_len],
    )
    return replace(problem, sequences=1, prefix_tokens=0, tree=None, groups=1), alone
