"""The expansion's Triton kernel in its interpreter, where Triton is."""

from __future__ import annotations

from tests.test_append_kernel import needs_triton, run

# Casts of fp8 by torch, as tests/test_append_kernel.py has them.
SCRIPT = """
import numpy as np, torch, triton.runtime.interpreter as interpreter
from flashcore import expand_kernel
from tests.expand_cases import cases, differences, pools_of, targets_of

DTYPES = {"fp8e4nv": torch.float8_e4m3fn, "fp8e5": torch.float8_e5m2, "fp16": torch.float16}

def cast(data, source, target, rounding):
    bits = torch.from_numpy(np.frombuffer(data.tobytes(), dtype="int8").copy().reshape(data.shape))
    return bits.view(DTYPES[source.name]).to(DTYPES[target.name]).view(torch.int16).numpy()

interpreter._convert_float = cast
for case in cases():
    pools = pools_of(case, "cpu")
    targets = targets_of(pools, 4)
    pages = torch.tensor([*case.picked, 99], dtype=torch.int32)  # the last one is not looked at
    count = torch.tensor([len(case.picked)], dtype=torch.int32)
    expand_kernel.expand(pools, pages, count, targets)
    expand_kernel._compiled.clear()
    for target, pool in zip(targets, pools):
        assert differences(target, pool, case.picked) == 0, case
print(len(cases()))
"""


@needs_triton
def test_every_case_in_the_interpreter() -> None:
    assert run(SCRIPT, TRITON_INTERPRET="1") > 50


PLANS = """
import torch
from flashcore.contract.counts import Count
from flashcore.expand_plan_kernel import plan_expansion
from flashcore.planner import expansion
from tests.expansion_cases import ABSURD, assert_expansion, at_capacity, plans, room

found = plans()
for plan in found:
    pages = expansion.EXPANSION_BYTES // expansion.expanded_bytes(1, plan.problem)
    tensors, counts = at_capacity(plan, "cpu")
    filled = room(plan, pages, "cpu")
    scratch = torch.full((plan.num_pages,), ABSURD, dtype=torch.int32)
    for _ in range(2):  # nothing is left of the last time
        plan_expansion(tensors, counts, filled, scratch, plan.tile_m)
        assert_expansion(filled, plan, counts)
    # Ids of sequences that could not be planned, which no work item reads.
    wrong = torch.cat([tensors.cols[: plan.cols.numel()], torch.tensor([ABSURD, -1, 2**31 - 1])])
    counts[Count.NNZ] += 3
    plan_expansion(tensors._replace(cols=wrong.int()), counts, filled, scratch, plan.tile_m)
    assert filled.outcome.tolist() == [plan.expansion.way, plan.cols.unique().numel()]
    assert filled.places.cols[plan.cols.numel() :][:3].tolist() == [0, 0, 0]
print(len({int(plan.expansion.way) for plan in found}))
"""


@needs_triton
def test_a_plan_made_on_the_device_has_the_expansion_of_one_made_on_the_host() -> None:
    assert run(PLANS, TRITON_INTERPRET="1") == 3
