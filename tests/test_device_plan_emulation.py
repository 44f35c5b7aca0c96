"""The steps of the planner's kernels, emulated, against `flashcore.plan`, element by element."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flashcore.contract.counts import INVALID, Count, Fault
from flashcore.contract.reasons import Reason
from flashcore.contract.reasons import Reason as KernelReason
from flashcore.planner import folding
from flashcore.planner.device_plan import Capacities
from tests.cases import Batch, small_scale
from tests.device_plan_cases import (
    assert_same_plan,
    assert_same_stats,
    inputs,
    plan_that_fits,
    plan_without,
    planner_for,
)
from tests.emulation.planner import ROOMY, Emulation, batches_of_rows, emulate


def test_kernels_name_the_reasons_of_folding():
    assert {r.name: int(r) for r in Reason} == {
        name: value for name, value in vars(KernelReason).items() if name.isupper()
    }


@settings(max_examples=400, deadline=None)
@given(
    batches_of_rows, st.booleans(), st.sampled_from([0, 2, 40, 500]), st.sampled_from([1, 5, 64])
)
def test_same_plan(batch: Batch, fold: bool, workers: int, tile_m: int):
    options = {"fold": fold, "num_workers": workers, "tile_m": tile_m}
    with small_scale():
        planner = emulate(batch, **options)
        expected = batch._plan(**options)
    assert_same_plan(planner.trimmed(len(batch.kv_lens)), expected)
    assert_same_stats(planner, expected)
    # What the default capacity for partial tokens relies on.
    splits = -(-5 * workers * tile_m // batch.num_q_heads)
    assert expected.num_partial_tokens <= len(expected.q_tokens) + splits
    assert planner.plan.faults() == Fault(0)
    assert not planner.plan.bad.any()


@settings(max_examples=400, deadline=None)
@given(
    batches_of_rows,
    st.sampled_from([1, 2, 8]),
    st.sampled_from([1, 4, 64]),
    st.sampled_from([0, 1, folding.L2_COST, folding.PARTIAL_COST]),
    st.sampled_from([0, 10**4, 10**6]),
)
def test_same_folds(batch: Batch, itemsize: int, tile_m: int, partial_cost: int, least: int):
    """What is cheaper is kept in small batches too, or all given back where it saves too little."""
    options = {"itemsize": itemsize, "tile_m": tile_m, "num_workers": 2}
    with mock.patch.multiple(folding, PARTIAL_COST=partial_cost, LEAST_GAIN=least):
        planner = emulate(batch, **options)
        expected = batch._plan(**options)
    assert_same_plan(planner.trimmed(len(batch.kv_lens)), expected)


@settings(max_examples=200, deadline=None)
@given(batches_of_rows, st.data())
def test_pages_out_of_range_concern_their_sequence_alone(batch: Batch, data: st.DataObject):
    held = [b for b, n in enumerate(batch.kv_lens) if n]
    bad = sorted(data.draw(st.sets(st.sampled_from(held)))) if held else []
    damaged = batch.page_table.clone()
    for b in bad:
        column = data.draw(st.integers(0, -(-batch.kv_lens[b] // batch.page_tokens) - 1))
        damaged[b, column] = data.draw(st.sampled_from([-1, batch.num_pages, 2**31 - 1, -(2**31)]))
    with small_scale():
        planner = planner_for(batch, ROOMY, "cpu", num_workers=40)
        table, *lens = inputs(batch, "cpu")
        Emulation(planner).update(damaged, *lens)
        expected = plan_without(batch, bad, bad, num_workers=40, tile_m=64)
    found = planner.trimmed(len(batch.kv_lens))
    for name, value in expected.items():
        assert getattr(found, name).tolist() == value.tolist(), name
    assert planner.plan.faults() == (Fault.PAGE if bad else Fault(0))
    left = replace(batch, kv_lens=[0 if b in bad else n for b, n in enumerate(batch.kv_lens)])
    with small_scale():
        assert_same_stats(planner, left._plan(num_workers=40, tile_m=64))
    assert [b for b, fault in enumerate(planner.plan.bad.tolist()) if fault] == bad
    # The next update is not affected.
    with small_scale():
        Emulation(planner).update(table, *lens)
        assert_same_plan(
            planner.trimmed(len(batch.kv_lens)), batch._plan(num_workers=40, tile_m=64)
        )


@settings(max_examples=200, deadline=None)
@given(batches_of_rows, st.integers(1, 30), st.integers(1, 10), st.data())
def test_capacities_and_lengths(batch: Batch, max_entries: int, max_q: int, data: st.DataObject):
    """Sequences that do not fit or have impossible lengths are left out, the others planned."""
    rows = len(batch.kv_lens)
    kv_lens, q_lens = np.array(batch.kv_lens, np.int64), np.array(batch.q_lens, np.int64)
    expected = np.zeros(rows, np.int64)
    for b in range(rows):
        wrong = data.draw(st.sampled_from([None] * 4 + [-1, 2**31 - 1, -(2**31)]))
        if wrong is not None:
            kv_lens[b], expected[b] = wrong, Fault.LENGTH
    pages = np.where(expected == 0, -(-kv_lens // batch.page_tokens), 0)
    expected |= np.where((pages > 0) & (pages.cumsum() > max_entries), Fault.ENTRIES, 0)
    expected |= np.where((q_lens > 0) & (q_lens.cumsum() > max_q), Fault.QUERIES, 0)
    capacities = Capacities(16, max_entries, max_q, 2000, 4000)
    planner = planner_for(batch, capacities, "cpu")
    lens = (torch.from_numpy(n).int() for n in (kv_lens, q_lens))
    Emulation(planner).update(batch.page_table, *lens)
    assert planner.plan.bad[:rows].tolist() == expected.tolist()
    assert planner.plan.faults() == Fault(int(np.bitwise_or.reduce(expected, initial=0)))
    total_q = min(int(q_lens.sum()), max_q)
    assert int(planner.plan.counts[Count.TOTAL_Q]) == total_q
    found = planner.trimmed(rows)
    offsets = found.merge_offsets.tolist()
    for row in range(rows):
        for q in range(*found.q_offsets[row : row + 2].tolist()):
            elements = found.merge_partials[offsets[q] : offsets[q + 1]].tolist()
            assert (elements == [INVALID]) == bool(expected[row])
    members = set(found.member_rows.tolist())
    active = {b for b in range(rows) if not expected[b] and q_lens[b] and kv_lens[b]}
    assert members == active


@settings(max_examples=300, deadline=None)
@given(
    batches_of_rows,
    st.sampled_from(["max_gathered", "max_partials", "max_items"]),
    st.integers(1, 40),
    st.sampled_from([0, 40]),
    st.data(),
)
def test_lists_that_do_not_fit_give_up_sharing(
    batch: Batch, short: str, room: int, workers: int, data: st.DataObject
):
    """Then splits; only what does not fit even so is a fault."""
    lists = {"max_gathered": 2000, "max_partials": 4000, "max_items": 20_000} | {short: room}
    capacities = Capacities(16, 400, 64, **lists)
    options = {"num_workers": workers, "tile_m": 4, "fold": data.draw(st.booleans())}
    with small_scale():
        planner = emulate(batch, capacities, **options)
        expected, unshared = plan_that_fits(batch, capacities, **options)
    if expected is None:
        assert short != "max_partials"
        assert planner.plan.faults() == Fault.PLAN
        return
    assert_same_plan(planner.trimmed(len(batch.kv_lens)), expected)
    assert_same_stats(planner, expected, unshared)
    assert planner.plan.faults() == Fault(0)


def test_the_next_update_shares_again():
    """Giving up sharing leaves nothing behind."""
    table = torch.tensor([[0, 1, 2], [0, 1, 3], [0, 4, 5]], dtype=torch.int32)
    tree = Batch(table, [6, 6, 6], [1, 1, 1], 2, 8, 2, 2, 8)
    alone = replace(tree, page_table=torch.arange(9).reshape(3, 3).int(), num_pages=9)
    planner = planner_for(
        replace(tree, num_pages=9), Capacities(4, 16, 8, 100, 6), "cpu", fold=False
    )
    for batch, unshared in ((tree, True), (alone, False), (tree, True)):
        Emulation(planner).update(*inputs(batch, "cpu"))
        expected = batch._plan(share=not unshared, fold=False, tile_m=64)
        assert_same_plan(planner.trimmed(3), expected)
        assert_same_stats(planner, expected, unshared)


@pytest.mark.parametrize("short", ["max_gathered", "max_items"])
def test_lists_that_fit_in_no_way_leave_no_plan(short: str):
    batch = Batch(torch.arange(8).reshape(2, 4).int(), [8, 8], [3, 2], 2, 8, 2, 2, 8)
    with small_scale():
        capacities = {"max_gathered": 100, "max_partials": 100, "max_items": 100} | {short: 3}
        planner = emulate(batch, Capacities(4, 16, 8, **capacities), num_workers=40)
    assert planner.plan.faults() == Fault.PLAN
    counts = planner.plan.counts
    assert counts[[Count.ITEMS, Count.GATHERED, Count.PARTIALS]].tolist() == [0, 0, 0]
    assert planner.stats().tolist() == [0, 0, 0, 0, 0, 0, Fault.PLAN]
    found = planner.trimmed(2)
    assert found.merge_partials.tolist() == [INVALID] * 5
    assert planner.plan.merge_offsets.tolist() == [0, 1, 2, 3, 4, 5, 5, 5, 5]
