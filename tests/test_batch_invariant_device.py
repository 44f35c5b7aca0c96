"""Batch-invariant plans made on the device, emulated, against those of `flashcore.plan`."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import flashcore
from flashcore.contract.counts import Fault
from flashcore.planner import chunks
from flashcore.planner.device_plan import Capacities, fill_defaults
from flashcore.sm90.config.planner import PlannerConfig, choose, illegal_reason
from flashcore.sm90.device_planner import DevicePlanner
from tests.cases import Batch, small_scale
from tests.device_plan_cases import (
    assert_same_plan,
    assert_same_stats,
    plan_that_fits,
)
from tests.emulation import planner as planner_emulation
from tests.emulation.planner import batches_of_rows
from tests.emulation.planner_chunks import ChunkEmulation
from tests.test_batch_invariant import chunk_sizes, small_chunks

emulate = partial(planner_emulation.emulate, kind=ChunkEmulation, batch_invariant=True)


@settings(max_examples=250, deadline=None)
@given(
    batches_of_rows,
    chunk_sizes,
    st.sampled_from([True, False, "always"]),
    st.sampled_from([0, 40]),
    st.sampled_from([5, 64]),
)
def test_same_plan(batch: Batch, pages: int, fold: Any, workers: int, tile_m: int):
    options = {"fold": fold, "num_workers": workers, "tile_m": tile_m}
    with small_scale(), small_chunks(batch, pages):
        planner = emulate(batch, **options)
        expected = batch._plan(batch_invariant=True, **options)
    assert_same_plan(planner.trimmed(len(batch.kv_lens)), expected)
    assert_same_stats(planner, expected)
    assert planner.plan.batch_invariant
    assert planner.plan.faults() == Fault(0)


@settings(max_examples=100, deadline=None)
@given(batches_of_rows, chunk_sizes, st.sampled_from([1, 4, 16]), st.sampled_from([2, 12]))
def test_nothing_is_cut_where_lists_do_not_fit(batch: Batch, pages: int, room: int, gathered: int):
    """Without sharing first, then without cuts, to the same bits."""
    capacities = Capacities(16, 400, 64, gathered, room, 1000)
    options = {"fold": False, "num_workers": 40, "tile_m": 64}
    with small_scale(), small_chunks(batch, pages):
        planner = emulate(batch, capacities, **options)
        expected, unshared = plan_that_fits(batch, capacities, batch_invariant=True, **options)
    if expected is None:
        assert planner.plan.faults() == (Fault.PLAN if sum(batch.q_lens) else Fault(0))
        return
    assert_same_plan(planner.trimmed(len(batch.kv_lens)), expected)
    assert_same_stats(planner, expected, unshared)


def planner(page_tokens: int = 16, **options: Any) -> DevicePlanner:
    return DevicePlanner(
        Capacities(4, 64, 4), num_pages=64, num_q_heads=8, num_kv_heads=2, head_dim=64,
        page_tokens=page_tokens, device="cpu", batch_invariant=True, **options,
    )  # fmt: skip


def test_default_room_is_enough_for_decode_of_any_lengths():
    entries, batch, queries = 4096, 32, 4
    for page_tokens in (16, 128):
        size, _ = chunks.lengths(page_tokens)
        filled = fill_defaults(Capacities(batch, entries, batch * queries), 32, 8, 64, 264, size)
        for rows in (1, 5, batch):
            pages = torch.full((rows,), entries // rows)
            partials = int(-(-pages // size).sum()) * queries
            assert partials <= filled.max_partials
            assert 8 * partials <= filled.max_items


def test_layouts_are_refused():
    layout = flashcore.DevicePager(
        max_batch=4, max_entries=64, num_pages=64, page_tokens=16, device="cpu"
    ).layout
    with pytest.raises(NotImplementedError, match="plans are made from page tables"):
        planner().update_from_layout(layout, torch.ones(4, dtype=torch.int32))
    assert "counted from a page table" in str(illegal_reason(PlannerConfig(1024, True, True)))


def test_a_kernel_of_its_own():
    assert choose(7, chunks=True) == PlannerConfig(1024, chunks=True)
    assert planner()._chain.chunks
    assert planner()._small.chunks
    with pytest.raises(ValueError, match="page_tokens must divide 1024"):
        planner(page_tokens=48)
