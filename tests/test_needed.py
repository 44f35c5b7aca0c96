"""`kernels_for` names what launches ask for."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch

import flashcore
from flashcore.problem import Extras, KVPool, Problem, Rules
from flashcore.sm90.config.planner import SMALL_BATCH, SMALL_QUERIES
from flashcore.sm90.families import MERGE, PAGED, PLANNER
from flashcore.sm90.launch import paged
from flashcore.sm90.needed import Attached, Plans, kernels_for
from tests.cases import small_scale
from tests.recorded_launches import Recorder, install

PROBLEM = Problem(8, 2, 128, 64, page_tokens=16)
KINDS = [
    Rules(1.0, causal, left, right, softcap)
    for causal, left, right, softcap in product((True, False), (-1, 9), (-1, 0), (0.0, 5.0))
]
PLANNER_OPTIONS: dict[str, Any] = {
    "num_q_heads": 8,
    "num_kv_heads": 2,
    "head_dim": 128,
    "v_head_dim": 64,
    "page_tokens": 16,
    "tile_m": 64,
    "device": "cpu",
}


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    return install(monkeypatch)


def call(planned: Any, rules: Rules, attached: Attached) -> None:
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[attached.dtype]
    q = torch.zeros(4, 8, 128, dtype=dtype)
    pool = KVPool(q.new_zeros(33, 16, 2, 128), q.new_zeros(33, 16, 2, 64))
    mask = torch.ones(4, 4, dtype=torch.bool) if attached.tree_mask else None
    extras = Extras(torch.zeros(8) if attached.sinks else None, mask)
    paged.paged_attention(q, pool, planned, rules, extras)


@pytest.mark.parametrize("tree_mask", [False, True])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("invariant", [False, True])
def test_of_a_device_plan(
    recorder: Recorder,
    tree_mask: bool,
    sinks: bool,
    invariant: bool,
) -> None:
    planner = flashcore.DevicePlanner(
        flashcore.Capacities(max_batch=2000, max_entries=3000, max_q=SMALL_QUERIES),
        num_pages=33,
        batch_invariant=invariant,
        **PLANNER_OPTIONS,
    )
    for batch in (4, SMALL_BATCH + 1):
        planner.update(*(torch.ones(s, dtype=torch.int32) for s in ((batch, 1), batch, batch)))
    planners = recorder.asked()
    assert {k.family for k in planners} == {PLANNER}
    plans = Plans((64,), True, invariant, (2000,), rows=(4 * 8,))
    for rules in KINDS:
        attached = Attached("fp16", sinks, tree_mask)
        call(planner.plan.planned, rules, attached)
        asked = {*planners, *recorder.asked()}
        assert asked == set(kernels_for(PROBLEM, rules, plans, attached))


@pytest.mark.parametrize("tree_mask", [False, True])
@pytest.mark.parametrize("sinks", [False, True])
def test_of_a_plan_of_the_host(recorder: Recorder, tree_mask: bool, sinks: bool) -> None:
    table = torch.arange(4 * 8, dtype=torch.int32).view(4, 8)
    layout = flashcore.layout_from_page_table(table, torch.full((4,), 128), page_tokens=16)
    options = {n: x for n, x in PLANNER_OPTIONS.items() if n != "device"}
    with small_scale():
        plan = flashcore.plan(layout, **options, num_workers=100)
    assert plan.needs_merge
    plans = Plans((64,))
    for rules in KINDS:
        attached = Attached("bf16", sinks, tree_mask)
        call(plan.planned, rules, attached)
        named = kernels_for(PROBLEM, rules, plans, attached)
        asked = set(recorder.asked())
        assert asked <= set(named)
        assert {k.family for k in asked} == {PAGED, MERGE}
        assert [k for k in named if k.family is PAGED] == [k for k in asked if k.family is PAGED]


def test_what_has_no_kernel_is_named() -> None:
    with pytest.raises(ValueError, match="head_dim must be a multiple of 8 from 8 to 256, got 100"):
        kernels_for(Problem(8, 2, 100, 100, 16), Rules(1.0), Plans((64,)))
    with pytest.raises(ValueError, match="tile_m must be 64 or 128, got 96"):
        kernels_for(PROBLEM, Rules(1.0), Plans((96,)))
