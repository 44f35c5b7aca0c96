"""The cost of batch-invariant plans in the paged benchmark, without a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import flashcore
from flashcore.bench import batch_invariance
from flashcore.bench.paged_problems import PagedInputs, PagedProblem, make_inputs
from flashcore.bench.paged_providers import our_call, plan_of
from flashcore.bench.paged_report import format_table
from tests.bench_paged_fakes import PREFILL, SHARED, TREE, complete, machine, measured, ours


@pytest.mark.parametrize("problem", [SHARED, TREE, PREFILL], ids=lambda p: p.name)
def test_batch_invariant_plans_are_timed_against_the_default(
    monkeypatch: pytest.MonkeyPatch, problem: PagedProblem
) -> None:
    invariant: dict[Any, bool] = {}

    def remembered(inputs: PagedInputs, plan: flashcore.Plan) -> Callable[[], torch.Tensor]:
        call = our_call(inputs, plan)
        invariant[call] = plan.batch_invariant
        return call

    monkeypatch.setattr(batch_invariance, "our_call", remembered)
    times = machine(lambda graph: 3.0 if invariant[graph.call] else 2.0)
    (row,) = batch_invariance.run_batch_invariance([problem], times, rounds=1)
    assert (row["workload"], row["ratio"]) == (problem.name, 1.5)
    result = complete({**measured(ours(), problem=problem), "batch_invariant": [row]})
    for same, words in ((True, "the same bits"), (False, "OTHER BITS")):
        row["same_bits"] = same
        assert f"{problem.name}: 3.0000 ms, 1.500 x the default plan; {words}" in format_table(
            result
        )


@pytest.mark.parametrize("problem", [SHARED, TREE, PREFILL], ids=lambda p: p.name)
def test_a_sequence_alone_is_the_first_of_the_batch(problem: PagedProblem) -> None:
    inputs = make_inputs(problem, "cpu")
    out = our_call(inputs, plan_of(problem, inputs))()
    alone, first = batch_invariance._first_sequence(problem, inputs)
    found = our_call(first, plan_of(alone, first))()
    assert found.shape[0] == problem.q_len
    assert torch.allclose(found.float(), out[: problem.q_len].float(), atol=2e-2)
    changed = batch_invariance._same_bits(problem, inputs, out + 1)
    assert not changed
