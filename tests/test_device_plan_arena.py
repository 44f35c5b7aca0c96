"""Memory of planners on the device: what an entry costs, what planners share, what must survive."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flashcore.contract import scratch as lines
from flashcore.contract.counts import Count, Fault, Seen
from flashcore.planner.device_plan import Capacities, fill_defaults, planned_bytes
from flashcore.sm90.device_planner import DevicePlanner
from flashcore.sm90.planner_scratch import PlannerScratch
from tests.cases import Batch, small_scale
from tests.device_pager_cases import pager_for, planner_of, token_map
from tests.device_plan_cases import (
    assert_same_plan,
    assert_same_stats,
    inputs,
    plan_that_fits,
    planner_for,
)
from tests.emulation.pager import PagerEmulation
from tests.emulation.planner import ROOMY, Emulation, batches_of_rows, emulate


def tensors_of(planner: DevicePlanner) -> list[torch.Tensor]:
    return [t for t in vars(planner.plan).values() if isinstance(t, torch.Tensor)]


def test_an_entry_costs_what_is_per_entry():
    """28 bytes with 4 of a page table beside them; everything else grows with segments."""
    few, many = (
        fill_defaults(Capacities(64, n, 64, max_segments=4096), 32, 8, 64, 264)
        for n in (10_000, 1_010_000)
    )
    taken = [
        planned_bytes(c) + PlannerScratch.bytes_of(64, c.max_entries, 4096, 1000)
        for c in (few, many)
    ]
    assert (taken[1] - taken[0]) / 1_000_000 == 28
    assert replace(few, max_entries=0) == replace(many, max_entries=0)


def test_told_bytes_are_those_taken():
    for chunks in (False, True):
        planner = DevicePlanner(
            Capacities(5, 300, 20, max_segments=40), num_pages=9, num_q_heads=8, num_kv_heads=2,
            head_dim=64, page_tokens=16, device="cpu", batch_invariant=chunks,
        )  # fmt: skip
        p = planner.plan
        shared = {id(t) for t in (p.counter, p.partial_out, p.partial_lse)}
        own = [t for t in tensors_of(planner) if id(t) not in shared]
        assert sum(t.numel() * t.element_size() for t in own) == planner.bytes
        taken = planner.scratch.memory
        assert len(taken) == 8
        told = PlannerScratch.bytes_of(5, 300, 40, 9, chunks)
        assert sum(t.numel() * t.element_size() for t in taken) == told


@settings(max_examples=300, deadline=None)
@given(batches_of_rows, st.integers(9, 40), st.sampled_from([0, 40]), st.booleans())
def test_more_segments_than_fit_give_up_sharing(batch: Batch, room: int, workers: int, fold: bool):
    """Never NaN: a segment for each sequence always fits. Nothing past the capacity is touched."""
    capacities = Capacities(9, 400, 64, 2000, 4000, 20_000, max_segments=room)
    options = {"num_workers": workers, "tile_m": 4, "fold": fold}
    with small_scale():
        planner = emulate(batch, capacities, **options)
        expected, unshared = plan_that_fits(batch, capacities, **options)
    assert expected is not None
    assert_same_plan(planner.trimmed(len(batch.kv_lens)), expected)
    assert_same_stats(planner, expected, unshared)
    assert planner.plan.faults() == Fault(0)


def tree_of(rows: int, depth: int) -> Batch:
    """Sequence b leaves the path that all follow after b + 1 pages."""
    table = torch.arange(depth).repeat(rows, 1)
    for b in range(rows):
        table[b, b + 1 :] = depth * (b + 1) + torch.arange(depth - b - 1)
    return Batch(table.int(), [2 * depth] * rows, [1] * rows, 2, depth * (rows + 1), 2, 2, 8)


def test_overflow_of_segments_leaves_nothing_behind():
    deep = tree_of(6, 10)
    alone = replace(deep, page_table=torch.arange(60).reshape(6, 10).int())
    planner = planner_for(deep, Capacities(6, 60, 6, max_segments=8), "cpu", fold=False)
    emulation = Emulation(planner)
    for batch, unshared in ((deep, True), (alone, False), (deep, True)):
        emulation.update(*inputs(batch, "cpu"))
        assert_same_plan(planner.trimmed(6), batch._plan(share=not unshared, fold=False, tile_m=64))
        assert planner.plan.counts[Count.FAULTS] == 0


def test_stretches_that_fit_in_no_way_leave_no_plan():
    """A layout's pages may be partial anywhere, and a stretch ends at each."""
    m = next(m for seed in range(99) if len((m := token_map(seed)).starts) > 5 < m.page_tokens)
    pager, planner = pager_for(m.num_pages, m.page_tokens, "cpu"), planner_of(m, 0)
    PagerEmulation(pager).update(m.pages, m.starts, m.ends, None)
    rows = len(m.starts)
    stretches = DevicePlanner(
        replace(planner.capacities, max_segments=9), num_pages=m.num_pages,
        page_tokens=m.page_tokens, num_q_heads=4, num_kv_heads=2, head_dim=64, device="cpu",
    )  # fmt: skip
    Emulation(planner).update_from_layout(pager.layout, torch.ones(rows).int())
    found = planner.plan.counts[Count.SEGMENTS]
    Emulation(stretches).update_from_layout(pager.layout, torch.ones(rows).int())
    assert found > 9
    assert stretches.plan.faults() == Fault.PLAN
    assert stretches.plan.counts[[Count.ITEMS, Count.GROUPS, Count.FOUND]].tolist() == [0, 0, 0]


@settings(max_examples=60, deadline=None)
@given(st.lists(batches_of_rows, min_size=2, max_size=3), st.data())
def test_planners_that_take_turns_share_scratch(batches: list[Batch], data: st.DataObject):
    """Of other pools, capacities and heads; and variants of each share its plan's tensors too."""
    pages = max(batch.num_pages for batch in batches)
    scratch = PlannerScratch(16, 500, 500, pages, device="cpu")
    with small_scale():
        planners = [
            planner_for(batch, replace(ROOMY, max_entries=400 + i), "cpu", scratch=scratch)
            for i, batch in enumerate(batches)
        ]
        for _ in range(6):
            which = data.draw(st.integers(0, len(batches) - 1))
            batch, planner = batches[which], planners[which]
            options = {"tile_m": data.draw(st.sampled_from([4, 64])),
                       "fold": data.draw(st.sampled_from([True, False, "always"]))}  # fmt: skip
            total = max(sum(batch.q_lens), 1)
            variant = planner.variant(**options, max_q=data.draw(st.integers(total, 64)))
            Emulation(variant, which).update(*inputs(batch, "cpu"))
            assert_same_plan(variant.trimmed(len(batch.kv_lens)), batch._plan(**options))


def test_variants_take_no_memory():
    planner = DevicePlanner(
        Capacities(4, 64, 16), num_pages=8, num_q_heads=8, num_kv_heads=2, head_dim=64,
        page_tokens=16, device="cpu",
    )  # fmt: skip
    variant = planner.variant(tile_m=128, fold="always", max_q=4)
    assert (variant.plan.tile_m, variant.plan.max_q, variant.capacities.max_q) == (128, 4, 4)
    assert (planner.plan.tile_m, planner.plan.max_q) == (64, 16)
    own = {t.data_ptr() for t in tensors_of(planner)}
    assert {t.data_ptr() for t in tensors_of(variant)} == own
    assert variant.scratch is planner.scratch
    assert variant.plan.merge_partials.numel() == planner.capacities.max_partials + 4
    with pytest.raises(ValueError, match="max_q must be at least 1 and at most 16, got 17"):
        planner.variant(max_q=17)


@pytest.mark.parametrize("name", ["max_batch", "max_entries", "max_segments", "num_pages"])
def test_small_scratch_is_named(name: str):
    sizes = {"max_batch": 4, "max_entries": 64, "max_segments": 64, "num_pages": 8}
    small = PlannerScratch(**sizes | {name: 3}, device="cpu")
    with pytest.raises(ValueError, match=f"scratch has {name} 3, the planner's is {sizes[name]}"):
        DevicePlanner(
            Capacities(4, 64, 16), num_pages=8, num_q_heads=8, num_kv_heads=2, head_dim=64,
            page_tokens=16, device="cpu", scratch=small,
        )  # fmt: skip


def test_query_tokens_may_be_many_times_many_sequences():
    """Their sum is cut where it passes max_q, so that no number overflows."""
    rows = 40_000
    batch = Batch(torch.zeros(3, 1).int(), [1] * 3, [1] * 3, 2, 8, 2, 2, 8)
    planner = planner_for(batch, Capacities(rows, rows, 60_000), "cpu", tile_m=64)
    emulation, lens = Emulation(planner), np.zeros(rows, np.int32)
    emulation.batch = rows
    emulation.layout(np.zeros((rows, 1), np.int32), lens, np.full(rows, 2**31 - 1, np.int32))
    assert planner.plan.q_offsets.max() == 60_000
    assert (planner.scratch.memory.rows[lines.Rows.FAULTS] == Fault.QUERIES).all()


# ---------------------------------------------------------------- faults


def test_no_fault_is_lost():
    """Updates rewrite `faults()`; what the host is told stays, whichever update had it."""
    good = Batch(torch.arange(6).reshape(2, 3).int(), [6, 6], [1, 1], 2, 8, 2, 2, 8)
    planner = planner_for(good, Capacities(2, 6, 2), "cpu", tile_m=64)
    emulation = Emulation(planner)
    table, kv, q = inputs(good, "cpu")
    emulation.update(table, kv, q)
    assert planner.faults_seen() == (Fault(0), 0, 0)
    damaged = table.clone()
    damaged[1, 2] = 99
    emulation.update(damaged, kv, q)
    emulation.update(table, kv, q)
    assert planner.plan.faults() == Fault(0)
    assert planner.faults_seen() == (Fault.PAGE, 1, 1)
    emulation.update(table, torch.tensor([-1, 6]).int(), q)
    emulation.update(table, kv, q)
    assert planner.faults_seen() == (Fault.PAGE | Fault.LENGTH, 2, 0)
    # A variant has its own, so that one knows in which of them it was.
    assert planner.variant(tile_m=128).faults_seen() == (Fault(0), 0, 0)
    assert planner._problem.seen == planner._seen.data_ptr() != 0
    assert planner._seen.numel() == Seen.SIZE


# ---------------------------------------------------------------- memory given back


@settings(max_examples=60, deadline=None)
@given(batches_of_rows, st.integers(0, 2**31))
def test_reset_makes_any_memory_safe(batch: Batch, seed: int):
    """All device memory comes back with anything in it; after a reset plans are right again."""
    with small_scale():
        planner = emulate(batch, num_workers=40)
        rng = torch.Generator().manual_seed(seed)
        scratch = [t for t in vars(planner.scratch).values() if isinstance(t, torch.Tensor)]
        for tensor in (*scratch, *tensors_of(planner)):
            if not tensor.is_floating_point():
                tensor.random_(-(2**31), 2**31 - 1, generator=rng)
        planner.reset()
        Emulation(planner, batch.seed).update(*inputs(batch, "cpu"))
        expected = batch._plan(num_workers=40, tile_m=64)
    assert_same_plan(planner.trimmed(len(batch.kv_lens)), expected)
    assert not planner.plan.counter.any()
    # What else is relied on between updates: no stamp that was published, nobody done yet.
    kept = planner.scratch.memory.tiles.clone()
    kept[lines.Tiles.CUT, lines.Tiles.STAMP] = 0
    assert not kept.any()
