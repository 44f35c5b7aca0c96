"""The planner's kernels on a Hopper GPU against `flashcore.plan`, element by element."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch

from flashcore.contract import scratch as lines
from flashcore.contract.counts import Count, Fault
from flashcore.planner import folding
from flashcore.planner.device_plan import Capacities
from flashcore.planner.folding import Fold
from flashcore.sm90.available import available
from flashcore.sm90.device_planner import DevicePlanner
from flashcore.sm90.planner_scratch import PlannerScratch
from tests.cases import ABSURD_PAGE, Batch, hide_unused, prefix_tree, small_scale
from tests.device_plan_cases import (
    always_a_chain,
    assert_same_plan,
    assert_same_stats,
    inputs,
    plan_that_fits,
    plan_without,
    planner_for,
)

pytestmark = pytest.mark.skipif(
    not available("cuda")[0], reason=f"no Hopper GPU: {available('cuda')[1]}"
)

ROWS = 64
COLUMNS = 40
PAGE_TOKENS = 16
CAPACITIES = Capacities(
    ROWS, max_entries=ROWS * COLUMNS, max_q=256, max_gathered=12_000, max_partials=12_000
)


@pytest.fixture(autouse=True, params=["small", "chain"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of a few sequences by one kernel, as ever; and by the chain that large ones take."""
    if request.param == "chain":
        monkeypatch.setattr(DevicePlanner, "_config", always_a_chain)


def random_batch(seed: int, rows: int = ROWS, columns: int = COLUMNS) -> Batch:
    """Prefix trees over few pages (repeats, accidental sharing) or many; zero lengths occur."""
    rng = np.random.default_rng(seed)
    rows = int(rng.integers(0, rows + 1))
    num_pages = int(rng.choice([3, 60, 4000]))
    longest = int(rng.integers(1, columns + 1)) * PAGE_TOKENS
    kv_lens = [int(rng.integers(0, longest + 1)) for _ in range(rows)]
    table = prefix_tree(rng, rows, columns, num_pages, [n // PAGE_TOKENS for n in kv_lens])
    hide_unused(table, kv_lens, PAGE_TOKENS)
    q_lens = [int(rng.integers(0, rng.choice([2, 5]))) for _ in range(rows)]
    return Batch(
        torch.from_numpy(table).reshape(rows, columns).int(),
        kv_lens,
        q_lens,
        PAGE_TOKENS,
        4000,
        *((8, 2) if seed % 2 else (6, 1)),
        head_dim=64,
        seed=seed,
    )


def padded(batch: Batch, rows: int) -> Batch:
    """The same batch with idle sequences at its end, as a captured graph has them."""
    missing = rows - len(batch.kv_lens)
    table = torch.full((missing, batch.page_table.shape[1]), ABSURD_PAGE, dtype=torch.int32)
    idle = [0] * missing
    return Batch(
        torch.cat([batch.page_table, table]),
        batch.kv_lens + idle,
        batch.q_lens + idle,
        batch.page_tokens,
        batch.num_pages,
        batch.num_q_heads,
        batch.num_kv_heads,
        batch.head_dim,
    )


def captured(
    planner: DevicePlanner, table: torch.Tensor, *lens: torch.Tensor
) -> Callable[[], None]:
    """An update of these tensors as a graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        planner.update(table, *lens)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        planner.update(table, *lens)
    return graph.replay


@pytest.mark.parametrize("workers", [0, 40, 400])
@pytest.mark.parametrize("fold", [True, False, "always"])
def test_same_plan(workers: int, fold: Fold) -> None:
    for seed in range(12):
        batch = random_batch(seed)
        options = {"num_workers": workers, "fold": fold, "tile_m": 64}
        with small_scale():
            planner = planner_for(batch, CAPACITIES, "cuda", **options)
            planner.update(*inputs(batch, "cuda"))
            found, expected = planner.trimmed(len(batch.kv_lens)), batch._plan(**options)
            assert_same_plan(found.to("cpu"), expected)
            assert_same_stats(planner, expected)
        assert planner.plan.faults() == Fault(0)


@pytest.mark.parametrize("least", [0, 10**5, 10**7])
@pytest.mark.parametrize("tile_m", [4, 64])
def test_same_folds(tile_m: int, least: int) -> None:
    """Some groups fold, some do not; where the rest saves too little, all do."""
    outcomes: set[int] = set()
    for partial_cost in (1, folding.L2_COST, folding.PARTIAL_COST):
        for seed in range(1, 24, 2):
            batch = random_batch(seed)
            options = {"num_workers": 40, "tile_m": tile_m}
            with mock.patch.multiple(folding, PARTIAL_COST=partial_cost, LEAST_GAIN=least):
                planner = planner_for(batch, CAPACITIES, "cuda", **options)
                expected = batch._plan(**options)
            planner.update(*inputs(batch, "cuda"))
            assert_same_plan(planner.trimmed(len(batch.kv_lens)).to("cpu"), expected)
            assert_same_stats(planner, expected)
            outcomes |= set(expected.decisions[:, 3].tolist())
    assert folding.Reason.FOLDED in outcomes


def test_replayed_with_other_contents() -> None:
    """One graph, other tables, lengths and sharing at each replay; again and again the same."""
    odd = [padded(random_batch(seed), ROWS) for seed in range(1, 60, 2)]
    with small_scale():
        planner = planner_for(odd[0], CAPACITIES, "cuda", num_workers=40)
        buffers = inputs(odd[0], "cuda")
        replay = captured(planner, *buffers)
        for _ in range(2):
            for batch in odd:
                for buffer, value in zip(buffers, inputs(batch, "cpu"), strict=True):
                    buffer.copy_(value)
                replay()
                assert_same_plan(
                    planner.trimmed(ROWS).to("cpu"), batch._plan(num_workers=40, tile_m=64)
                )


# 64 x 1024 entries: several tiles in every scan and sort, splits as in earnest.
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_large_batches(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows, columns, num_pages = 64, 1024, 70_000
    kv_lens = [int(n) for n in rng.integers(1, columns * PAGE_TOKENS + 1, rows)]
    full = [n // PAGE_TOKENS for n in kv_lens]
    table = prefix_tree(rng, rows, columns, num_pages, full)
    if seed == 2:  # chance meetings everywhere: thousands of short segments
        table = rng.integers(0, 30_000, (rows, columns))
    q_lens = [1] * rows
    batch = Batch(
        torch.from_numpy(table).int(), kv_lens, q_lens, PAGE_TOKENS, num_pages, 32, 8, 128
    )
    capacities = Capacities(rows, rows * columns, 64, max_partials=rows * columns)
    planner = planner_for(batch, capacities, "cuda", num_workers=132)
    expected = batch._plan(num_workers=132, tile_m=64)
    for _ in range(3):
        planner.update(*inputs(batch, "cuda"))
        assert_same_plan(planner.trimmed(rows).to("cpu"), expected)
        assert_same_stats(planner, expected)


def test_faults_concern_their_sequences_alone() -> None:
    for seed in range(1, 30, 2):
        batch = random_batch(seed)
        rng = np.random.default_rng(seed)
        bad = [b for b, n in enumerate(batch.kv_lens) if n and rng.random() < 0.2]
        damaged = batch.page_table.clone()
        for b in bad:
            column = rng.integers(0, -(-batch.kv_lens[b] // PAGE_TOKENS))
            damaged[b, column] = int(rng.choice([-1, batch.num_pages, 2**31 - 1]))
        with small_scale():
            planner = planner_for(batch, CAPACITIES, "cuda", num_workers=40)
            table, *lens = inputs(batch, "cuda")
            planner.update(damaged.cuda(), *lens)
            found = planner.trimmed(len(batch.kv_lens))
            for name, value in plan_without(batch, bad, bad, num_workers=40, tile_m=64).items():
                assert getattr(found, name).tolist() == value.tolist(), name
            assert planner.plan.faults() == (Fault.PAGE if bad else Fault(0))
            assert torch.nonzero(planner.plan.bad).flatten().tolist() == bad
            planner.update(table, *lens)
            assert_same_plan(
                planner.trimmed(len(batch.kv_lens)).to("cpu"),
                batch._plan(num_workers=40, tile_m=64),
            )


def test_capacities() -> None:
    batch = padded(random_batch(5), ROWS)
    planner = planner_for(batch, Capacities(ROWS, 100, 20, 500, 1000), "cuda")
    planner.update(*inputs(batch, "cuda"))
    pages = np.cumsum([-(-n // PAGE_TOKENS) for n in batch.kv_lens])
    faults = np.where((pages > 100) & (np.array(batch.kv_lens) > 0), Fault.ENTRIES, 0)
    queries = np.cumsum(batch.q_lens)
    faults |= np.where((queries > 20) & (np.array(batch.q_lens) > 0), Fault.QUERIES, 0)
    assert planner.plan.bad.tolist() == faults.tolist()
    too_small = planner_for(batch, Capacities(ROWS, 4000, 256, 7, 7, 7), "cuda")
    too_small.update(*inputs(batch, "cuda"))
    assert too_small.plan.faults() == Fault.PLAN
    assert int(too_small.plan.counts[Count.ITEMS]) == 0


@pytest.mark.parametrize("workers", [0, 40])
def test_lists_that_do_not_fit_give_up_sharing(workers: int) -> None:
    """In a captured graph, and the next update shares again."""
    options = {"num_workers": workers, "tile_m": 64, "fold": False}
    outcomes = set()
    with small_scale():
        for room in (1, 60, 300):
            capacities = Capacities(ROWS, ROWS * COLUMNS, 256, 12_000, room, 20_000)
            odd = [padded(random_batch(seed), ROWS) for seed in range(1, 40, 2)]
            planner = planner_for(odd[0], capacities, "cuda", **options)
            buffers = inputs(odd[0], "cuda")
            replay = captured(planner, *buffers)
            for batch in odd:
                for buffer, value in zip(buffers, inputs(batch, "cpu"), strict=True):
                    buffer.copy_(value)
                replay()
                expected, unshared = plan_that_fits(batch, capacities, **options)
                assert expected is not None
                assert_same_plan(planner.trimmed(ROWS).to("cpu"), expected)
                assert_same_stats(planner, expected, unshared)
                outcomes.add(unshared)
    assert outcomes == {False, True}


@pytest.mark.parametrize("room", [ROWS, 200])
def test_segments_that_do_not_fit_give_up_sharing(room: int) -> None:
    """In a captured graph, with nothing written past the capacity; the next update shares again."""
    options = {"num_workers": 40, "tile_m": 64, "fold": False}
    outcomes = set()
    with small_scale():
        capacities = replace(CAPACITIES, max_items=20_000, max_segments=room)
        odd = [padded(random_batch(seed), ROWS) for seed in range(1, 60, 2)]
        planner = planner_for(odd[0], capacities, "cuda", **options)
        buffers = inputs(odd[0], "cuda")
        replay = captured(planner, *buffers)
        for batch in odd:
            for buffer, value in zip(buffers, inputs(batch, "cpu"), strict=True):
                buffer.copy_(value)
            replay()
            expected, unshared = plan_that_fits(batch, planner.capacities, **options)
            assert expected is not None
            assert_same_plan(planner.trimmed(ROWS).to("cpu"), expected)
            assert_same_stats(planner, expected, unshared)
            outcomes.add(unshared)
    assert outcomes == {False, True}


def test_many_more_segments_than_fit() -> None:
    """Every CTA of the groups kernel has some of which there is no room: a segment a page."""
    rows, columns = 64, 1024
    rng = np.random.default_rng(2)
    table = rng.integers(0, 30_000, (rows, columns))
    lens = [columns * PAGE_TOKENS] * rows
    batch = Batch(torch.from_numpy(table).int(), lens, [1] * rows, PAGE_TOKENS, 30_000, 32, 8, 128)
    capacities = Capacities(
        rows, rows * columns, 64, max_gathered=rows * columns, max_partials=rows * columns,
        max_segments=rows,
    )  # fmt: skip
    planner = planner_for(batch, capacities, "cuda", num_workers=132)
    held = planner.scratch.memory.segments
    assert held.shape == (lines.Segments.LINES, rows)
    for _ in range(3):
        planner.update(*inputs(batch, "cuda"))
        expected = batch._plan(num_workers=132, tile_m=64, share=False)
        assert_same_plan(planner.trimmed(rows).to("cpu"), expected)
        assert_same_stats(planner, expected, unshared=True)


def test_planners_that_take_turns_share_scratch() -> None:
    """Graphs of two planners and of their variants, replayed in any order: each finds the scratch
    as it needs it, and no other one's counts pass for its own."""
    odd = [padded(random_batch(seed), ROWS) for seed in range(1, 24, 2)]
    rng = np.random.default_rng(0)
    with small_scale():
        scratch = PlannerScratch(ROWS, ROWS * COLUMNS + 100, ROWS * COLUMNS + 100, 4000)
        narrow = replace(CAPACITIES, max_q=300)
        wide = replace(narrow, max_entries=CAPACITIES.max_entries + 100)
        graphs = []
        for capacities in (narrow, wide):
            base = planner_for(odd[0], capacities, "cuda", num_workers=40, scratch=scratch)
            for tile_m, fold in ((64, True), (128, "always"), (64, False)):
                variant = base.variant(tile_m=tile_m, fold=fold, max_q=256)
                buffers = inputs(odd[0], "cuda")
                graphs.append((variant, buffers, captured(variant, *buffers), tile_m, fold))
        for batch in odd * 4:
            variant, buffers, replay, tile_m, fold = graphs[rng.integers(len(graphs))]
            for buffer, value in zip(buffers, inputs(batch, "cpu"), strict=True):
                buffer.copy_(value)
            replay()
            expected = batch._plan(num_workers=40, tile_m=tile_m, fold=fold)
            assert_same_plan(variant.trimmed(ROWS).to("cpu"), expected)


def test_scratch_is_right_again_after_a_reset() -> None:
    """What a memory saver gives back comes again with anything in it."""
    batch = padded(random_batch(3), ROWS)
    with small_scale():
        planner = planner_for(batch, CAPACITIES, "cuda", num_workers=40)
        buffers = inputs(batch, "cuda")
        replay = captured(planner, *buffers)
        expected = batch._plan(num_workers=40, tile_m=64)
        for seed in range(3):
            torch.manual_seed(seed)
            tensors = [*vars(planner.scratch).values(), *vars(planner.plan).values()]
            for tensor in tensors:
                if isinstance(tensor, torch.Tensor) and not tensor.is_floating_point():
                    tensor.random_(-(2**31), 2**31 - 1)
            planner.reset()
            replay()
            assert_same_plan(planner.trimmed(ROWS).to("cpu"), expected)
            assert planner.plan.counter.tolist() == [0, 0]


def test_no_fault_of_a_replayed_graph_is_lost() -> None:
    """The host knows, without a copy, which faults there were in any replay, and in how many."""
    batch = padded(random_batch(5), ROWS)
    assert batch.kv_lens[7]
    planner = planner_for(batch, CAPACITIES, "cuda")
    table, kv_lens, q_lens = inputs(batch, "cuda")
    replay = captured(planner, table, kv_lens, q_lens)
    torch.cuda.synchronize()
    assert planner.faults_seen() == (Fault(0), 0, 0)

    def broken(buffer: torch.Tensor, index: object, value: int) -> None:
        kept = buffer[index].clone()
        buffer[index] = value
        replay()
        buffer[index] = kept
        replay()

    for step in range(40):
        if step in (10, 11):
            broken(table, (7, 0), 10**6)
        else:
            replay()
    torch.cuda.synchronize()
    assert planner.plan.faults() == Fault(0)
    assert planner.faults_seen() == (Fault.PAGE, 2, 7)
    broken(kv_lens, 3, -5)
    torch.cuda.synchronize()
    assert planner.faults_seen() == (Fault.PAGE | Fault.LENGTH, 3, 3)
    assert planner.variant(tile_m=128).faults_seen()[1] == 0


@pytest.mark.parametrize("rows", [16_385, 40_000, 57_344])
def test_very_many_sequences(rows: int) -> None:
    """Most with one page, some that share two; lengths whose sum passes 2**31 are faults."""
    table = torch.arange(3 * rows).reshape(rows, 3).int()
    table[:500, :2] = torch.tensor([0, 1], dtype=torch.int32)
    kv_lens = [3 * PAGE_TOKENS if b < 500 else 5 for b in range(rows)]
    batch = Batch(table, kv_lens, [1] * rows, PAGE_TOKENS, 3 * rows, 8, 2, 64)
    capacities = Capacities(rows, rows + 1000, rows, max_segments=rows + 500)
    planner = planner_for(batch, capacities, "cuda", num_workers=132)
    planner.update(*inputs(batch, "cuda"))
    expected = batch._plan(num_workers=132, tile_m=64)
    assert_same_plan(planner.trimmed(rows).to("cpu"), expected)
    assert planner.plan.faults() == Fault(0)
    on_gpu, lens, _ = inputs(batch, "cuda")
    planner.update(on_gpu, lens, torch.full((rows,), 2**31 - 1, dtype=torch.int32, device="cuda"))
    assert (planner.plan.bad == Fault.QUERIES).all()
    assert int(planner.plan.counts[Count.ITEMS]) == 0
