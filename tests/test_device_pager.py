"""The steps of the pager's kernels, emulated, against `flashcore.build_layout`; their machine code
and their caller."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import flashcore
from flashcore.contract.counts import Fault, PagerCount
from flashcore.dispatch import Path
from flashcore.jit.cache import KernelCache
from flashcore.jit.folder import default_folder
from flashcore.jit.gates import check_kernel
from flashcore.jit.kernel import Kernel
from flashcore.jit.target import detect_target
from flashcore.sm90 import device_pager as pager_device
from flashcore.sm90 import device_planner as planner_device
from flashcore.sm90.config.pager import BITMAPS, PagerConfig, illegal_reason
from flashcore.sm90.device_pager import DevicePager, unit_stride
from flashcore.sm90.families import PAGER
from flashcore.sm90.launch import pager as launch_pager
from flashcore.sm90.launch import planner as launch_planner
from tests.cases import Batch, batches
from tests.device_pager_cases import (
    KINDS,
    assert_same_layout,
    bitmap,
    host_plan,
    pager_for,
    planner_of,
    token_map,
)
from tests.device_plan_cases import assert_same_plan, assert_same_stats
from tests.emulation.pager import PagerEmulation
from tests.emulation.planner import Emulation
from tests.pretend_gpu import no_gpu, pretend
from tests.runtime_fixtures import needs_disassembler, needs_dsl

seeds = st.integers(0, 2**31 - 1)


@settings(max_examples=400, deadline=None)
@given(seeds, st.sampled_from(KINDS))
def test_token_maps(seed: int, kind: str) -> None:
    m = token_map(seed)
    resident = bitmap(kind, m.num_pages, seed)
    pager = pager_for(m.num_pages, m.page_tokens, "cpu")
    emulation = PagerEmulation(pager, seed)
    for _ in range(2):  # the first leaves its scratch to the second
        emulation.update(m.pages, m.starts, m.ends, resident)
    expected = flashcore.build_layout(
        m.pages, m.starts, m.ends, resident, page_tokens=m.page_tokens, num_pages=m.num_pages
    )
    assert_same_layout(pager, expected)


@settings(max_examples=200, deadline=None)
@given(batches(max_batch=9, ragged=False), st.sampled_from(KINDS))
def test_page_tables(batch: Batch, kind: str) -> None:
    resident = bitmap(kind, batch.num_pages, batch.seed)
    pager = pager_for(batch.num_pages, batch.page_tokens, "cpu")
    lens = torch.tensor(batch.kv_lens, dtype=torch.int32)
    emulation = PagerEmulation(pager, batch.seed)
    for _ in range(2):
        emulation.update(batch.page_table, None, lens, resident)
    expected = flashcore.layout_from_page_table(
        batch.page_table, lens, page_tokens=batch.page_tokens, page_resident_bitmap=resident
    )
    assert_same_layout(pager, expected)


@settings(max_examples=200, deadline=None)
@given(seeds, st.data())
def test_faults_concern_their_sequences_alone(seed: int, data: st.DataObject) -> None:
    """Ranges outside the map, page ids outside the pool: neither is laid out wrongly nor staged."""
    m = token_map(seed)
    rows = len(m.starts)
    expected_faults = [Fault(0)] * rows
    for b in range(rows):
        wrong = data.draw(st.sampled_from([None, None, (-1, 0), (1, 0), (0, 301), (0, 2**31 - 1)]))
        if wrong is not None:
            m.starts[b], m.ends[b] = wrong
            expected_faults[b] = Fault.LENGTH
    kept = [b for b in range(rows) if not expected_faults[b] and m.ends[b] > m.starts[b]]
    if kept:
        b = data.draw(st.sampled_from(kept))
        token = data.draw(st.integers(int(m.starts[b]), int(m.ends[b]) - 1))
        m.pages[token] = data.draw(st.sampled_from([-1, m.num_pages, -(2**31)]))
        for row in kept:
            if m.starts[row] <= token < m.ends[row]:
                expected_faults[row] = Fault.PAGE
    pager = pager_for(m.num_pages, m.page_tokens, "cpu")
    PagerEmulation(pager, seed).update(m.pages, m.starts, m.ends, None)
    found = pager.layout.trimmed()
    assert pager.layout.bad[:rows].tolist() == expected_faults
    good = [b for b in range(rows) if not expected_faults[b]]
    expected = flashcore.build_layout(
        m.pages, m.starts[good], m.ends[good], page_tokens=m.page_tokens, num_pages=m.num_pages
    )
    offsets = found.row_offsets.tolist()
    places = [e for b in good for e in range(offsets[b], offsets[b + 1])]
    assert found.cols[places].tolist() == expected.cols.tolist()
    assert found.token_counts[places].tolist() == expected.token_counts.tolist()
    assert found.staging_ids.tolist() == expected.staging_ids.tolist()
    assert pager.layout.faults() == (Fault(0) if not rows else max(0, *_union(expected_faults)))


def _union(faults: list[Fault]) -> tuple[Fault, Fault]:
    total = Fault(0)
    for fault in faults:
        total |= fault
    return total, total


@settings(max_examples=100, deadline=None)
@given(seeds, st.integers(1, 40))
def test_sequences_that_do_not_fit(seed: int, max_entries: int) -> None:
    m = token_map(seed)
    pager = pager_for(m.num_pages, m.page_tokens, "cpu", max_entries=max_entries)
    PagerEmulation(pager, seed).update(m.pages, m.starts, m.ends, None)
    full = flashcore.build_layout(
        m.pages, m.starts, m.ends, page_tokens=m.page_tokens, num_pages=m.num_pages
    )
    ends = full.row_offsets[1:]
    over = (ends > max_entries) & (full.row_offsets.diff() > 0)
    assert pager.layout.bad[: len(ends)].tolist() == (over * int(Fault.ENTRIES)).tolist()
    nnz = int(full.row_offsets[full.row_offsets <= max_entries].max())
    assert int(pager.layout.counts[PagerCount.NNZ]) == nnz
    assert pager.layout.trimmed().cols.tolist() == full.cols[:nnz].tolist()
    assert pager.layout.row_offsets[1 : len(ends) + 1].tolist() == ends.clamp(max=nnz).tolist()


# ---------------------------------------------------------------- plans of layouts on the device


@settings(max_examples=300, deadline=None)
@given(seeds, st.sampled_from([0, 40]), st.booleans())
def test_plan_of_a_token_map(seed: int, workers: int, idle: bool) -> None:
    """Partial pages stand in the middle of sequences; sequences without queries take no part."""
    m = token_map(seed)
    q_lens = m.new_tokens(seed, 0 if idle else 1)
    pager, planner = pager_for(m.num_pages, m.page_tokens, "cpu"), planner_of(m, workers)
    emulation = Emulation(planner, seed)
    for _ in range(2):
        PagerEmulation(pager, seed).update(m.pages, m.starts, m.ends, None)
        emulation.update_from_layout(pager.layout, q_lens)
    expected = host_plan(m, q_lens, workers)
    assert_same_plan(planner.trimmed(len(q_lens)), expected)
    assert_same_stats(planner, expected)


@settings(max_examples=200, deadline=None)
@given(seeds, st.sampled_from([0, 40]))
def test_plan_of_a_token_map_without_room_to_share(seed: int, workers: int) -> None:
    """Partial pages end the runs of a plan that gives up sharing too."""
    m = token_map(seed)
    q_lens = torch.ones(len(m.starts), dtype=torch.int32)
    shared, alone = (host_plan(m, q_lens, workers, share=share) for share in (True, False))
    room = max(1, alone.num_partial_tokens)
    pager = pager_for(m.num_pages, m.page_tokens, "cpu")
    planner = planner_of(m, workers, max_partials=room)
    PagerEmulation(pager, seed).update(m.pages, m.starts, m.ends, None)
    Emulation(planner, seed).update_from_layout(pager.layout, q_lens)
    unshared = shared.num_partial_tokens > room
    expected = alone if unshared else shared
    assert_same_plan(planner.trimmed(len(q_lens)), expected)
    assert_same_stats(planner, expected, unshared)


def test_plan_leaves_out_what_was_not_laid_out() -> None:
    m = token_map(6)
    assert len(m.starts) > 3
    m.ends[1] = 10_000
    pager, planner = pager_for(m.num_pages, m.page_tokens, "cpu"), planner_of(m, 0)
    PagerEmulation(pager).update(m.pages, m.starts[:-1], m.ends[:-1], None)
    Emulation(planner).update_from_layout(pager.layout, torch.ones(len(m.starts)).int())
    bad = [0] * len(m.starts)
    bad[1] = bad[-1] = Fault.LENGTH  # the last is not in the layout
    assert planner.plan.bad[: len(bad)].tolist() == bad
    assert set(planner.trimmed(len(bad)).member_rows.tolist()) <= set(range(len(bad) - 1)) - {1}


@pytest.mark.parametrize(
    ("sizes", "rows", "message"),
    [
        ({"num_pages": 9}, 1, "layout must have the planner's num_pages 8, got 9"),
        ({"page_tokens": 2}, 1, "layout must have the planner's page_tokens 4, got 2"),
        ({"max_entries": 65}, 1, "layout has max_entries 65, the planner's is 64"),
        ({"max_batch": 2}, 3, "3 sequences, max_batch of planner and layout is 2"),
        ({}, 1, "plans with Hopper kernels: cpu"),
    ],
)
def test_layouts_are_checked(sizes: dict[str, int], rows: int, message: str) -> None:
    sizes = {"max_batch": 4, "max_entries": 64, "num_pages": 8, "page_tokens": 4} | sizes
    layout = DevicePager(**sizes, device="cpu").layout
    planner = flashcore.DevicePlanner(
        flashcore.Capacities(4, 64, 16),
        num_pages=8,
        num_q_heads=2,
        num_kv_heads=1,
        head_dim=8,
        page_tokens=4,
        device="cpu",
    )
    with pytest.raises((ValueError, NotImplementedError), match=message):
        planner.update_from_layout(layout, torch.ones(rows, dtype=torch.int32))


# ---------------------------------------------------------------- without a GPU


@needs_dsl
@needs_disassembler
@pytest.mark.parametrize("config", [PagerConfig(True, "words"), PagerConfig(False, "bytes")])
def test_nothing_spills(config: PagerConfig) -> None:
    row = check_kernel(Kernel(PAGER, config), default_folder(), detect_target())
    assert row.violations == []


def test_kinds_of_bitmap_are_named() -> None:
    assert "bitmap 'bits' is not one of" in str(illegal_reason(PagerConfig(True, "bits")))
    assert [illegal_reason(PagerConfig(True, kind)) for kind in BITMAPS] == [None] * 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_batch": 0}, "max_batch must be at least 1.* got 0"),
        ({"max_entries": 0}, "max_entries must be at least 1.* got 0"),
        ({"num_pages": 0}, "num_pages must be at least 1.* got 0"),
        ({"page_tokens": 0}, "page_tokens must be at least 1, got 0"),
        (
            {"max_batch": 40_000, "max_entries": 60_000},
            r"max_batch x \(max_entries \+ 1\) must be below",
        ),
    ],
)
def test_impossible_capacities_are_named(changes: dict[str, int], message: str) -> None:
    sizes = {"max_batch": 4, "max_entries": 64, "num_pages": 8} | changes
    with pytest.raises(ValueError, match=message):
        DevicePager(**sizes, device="cpu")


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((ints(1).long(), ints(0), ints(1)), TypeError, "token_to_page must have dtype int32"),
        ((torch.zeros(99).int(), ints(0), ints(1)), ValueError, "has 99 tokens, max_tokens is 9"),
        ((ints(1), ints(0), ints(1, 1)), ValueError, r"as many elements as seq_starts \(1\), got"),
        ((ints(1, 2)[::2], ints(0), ints(1)), NotImplementedError, "runs Hopper kernels: cpu"),
        ((ints(1, 2, 3)[::2], ints(0), ints(1)), ValueError, "token_to_page must be contiguous"),
        ((ints(1), ints(*[0] * 5), ints(*[1] * 5)), ValueError, "5 sequences, max_batch is 4"),
        (
            (ints(1), ints(0), ints(1), torch.zeros(7, dtype=torch.bool)),
            ValueError,
            "page_resident_bitmap must be contiguous and cover num_pages = 8 pages, it covers 7",
        ),
        ((ints(1), ints(0), ints(1), torch.zeros(8)), TypeError, "page_resident_bitmap must have"),
    ],
)
def test_inputs_are_checked(arguments: Any, error: type[Exception], message: str) -> None:
    pager = DevicePager(max_batch=4, max_entries=64, max_tokens=9, num_pages=8, device="cpu")
    with pytest.raises(error, match=message):
        pager.update(*arguments)


def test_page_tables_are_checked() -> None:
    pager = DevicePager(max_batch=4, max_entries=64, num_pages=8, device="cpu")
    table = torch.zeros(3, 8, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"one length per row of page_table \(3\), got 2"):
        pager.update_from_page_table(table, ints(1, 1))
    with pytest.raises(ValueError, match="page_table must have contiguous rows"):
        pager.update_from_page_table(table.T.contiguous().T, ints(1, 1, 1))


# ---------------------------------------------------------------- the real functions


@needs_dsl
@no_gpu
@pytest.mark.parametrize("kind", ["none", "bool", "words"])
@pytest.mark.parametrize("form", ["map", "table", "plan of a table", "plan of a layout"])
def test_compiled_functions_take_what_the_launch_passes(
    monkeypatch: pytest.MonkeyPatch, form: str, kind: str
) -> None:
    """The functions check their arguments before they ask for a driver, which is not there."""
    cache = KernelCache.open()

    class Pretending:
        def function(self, kernel: Kernel) -> Any:
            compiled = cache.function(kernel)
            return lambda *arguments: compiled(*(pretend(a) for a in arguments))

    for module in (launch_pager, launch_planner):
        monkeypatch.setattr(module, "shared_cache", Pretending)
        monkeypatch.setattr(module, "_functions", {})
    for module in (pager_device, planner_device):
        monkeypatch.setattr(module, "sm_count", lambda device: 132)
        monkeypatch.setattr(module, "device_path", lambda device: Path("hopper", ""))
    m = token_map(6)
    pager, planner = pager_for(m.num_pages, m.page_tokens, "cpu"), planner_of(m, 0)
    table, lens = torch.zeros(5, 7, dtype=torch.int32), torch.ones(5, dtype=torch.int32)
    resident = bitmap(kind, m.num_pages, 0)
    calls = {
        "map": lambda: pager.update(m.pages, m.starts, m.ends, resident),
        "table": lambda: pager.update_from_page_table(table, lens, resident),
        "plan of a table": lambda: planner.update(table, lens, lens),
        "plan of a layout": lambda: planner.update_from_layout(pager.layout, lens),
    }
    with pytest.raises(RuntimeError, match="InsufficientDriver"):
        calls[form]()


@pytest.mark.parametrize("length", [0, 1, 3])
def test_vectors_get_a_stride_of_one(length: int) -> None:
    """torch leaves vectors of 0 and 1 elements any stride, and a launch refuses all but 1."""
    strided = torch.arange(10, dtype=torch.int32)[::7][:length] if length < 2 else torch.arange(3)
    assert unit_stride(strided).stride() == (1,)
    assert unit_stride(strided).tolist() == strided.tolist()
