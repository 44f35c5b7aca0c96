"""The pager's kernels on a Hopper GPU against `flashcore.build_layout`, element by element."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import flashcore
from flashcore.contract.counts import Fault
from flashcore.sm90.available import available
from flashcore.sm90.device_pager import DevicePager
from tests.device_pager_cases import (
    KINDS,
    TokenMap,
    assert_same_layout,
    bitmap,
    host_plan,
    pager_for,
    planner_of,
    token_map,
)
from tests.device_plan_cases import assert_same_plan, assert_same_stats
from tests.gpu.test_device_plan_gpu import COLUMNS, PAGE_TOKENS, ROWS, padded, random_batch

pytestmark = pytest.mark.skipif(
    not available("cuda")[0], reason=f"no Hopper GPU: {available('cuda')[1]}"
)


def on_gpu(*tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    return [None if t is None else t.cuda() for t in tensors]


def expected_layout(m: TokenMap, resident: torch.Tensor | None) -> flashcore.Layout:
    return flashcore.build_layout(
        m.pages, m.starts, m.ends, resident, page_tokens=m.page_tokens, num_pages=m.num_pages
    )


@pytest.mark.parametrize("kind", KINDS)
def test_token_maps(kind: str) -> None:
    for seed in range(25):
        m = token_map(seed)
        resident = bitmap(kind, m.num_pages, seed)
        pager = pager_for(m.num_pages, m.page_tokens, "cuda")
        for _ in range(2):
            pager.update(*on_gpu(m.pages, m.starts, m.ends, resident))
            assert_same_layout(pager, expected_layout(m, resident))


@pytest.mark.parametrize("kind", KINDS)
def test_page_tables(kind: str) -> None:
    pager = pager_for(4000, PAGE_TOKENS, "cuda", ROWS, ROWS * COLUMNS)
    for seed in range(10):
        batch = random_batch(seed)
        resident = bitmap(kind, batch.num_pages, seed)
        lens = torch.tensor(batch.kv_lens, dtype=torch.int32)
        pager.update_from_page_table(*on_gpu(batch.page_table, lens, resident))
        expected = flashcore.layout_from_page_table(
            batch.page_table, lens, page_tokens=PAGE_TOKENS, page_resident_bitmap=resident
        )
        assert_same_layout(pager, expected)


# Several tiles in every scan; runs longer than pages; overlapping ranges over 600,000 tokens.
@pytest.mark.parametrize("kind", ["none", "words"])
def test_large_maps(kind: str) -> None:
    rng = np.random.default_rng(3)
    lengths = rng.choice([1, 16, 16, 16, 40], 40_000)
    pages = np.repeat(rng.integers(0, 50_000, 40_000), lengths)
    cuts = np.sort(rng.integers(0, len(pages) + 1, (1500, 2)), axis=1)
    cuts[:, 1] = np.minimum(cuts[:, 1], cuts[:, 0] + rng.integers(0, 9000, 1500))
    starts, ends = (torch.from_numpy(cuts[:, i].copy()).int() for i in (0, 1))
    m = TokenMap(torch.from_numpy(pages).int(), starts, ends, 16, 50_000)
    resident = bitmap(kind, m.num_pages, 0)
    expected = expected_layout(m, resident)
    pager = pager_for(m.num_pages, 16, "cuda", 1500, expected.cols.numel(), len(pages))
    for _ in range(3):
        pager.update(*on_gpu(m.pages, m.starts, m.ends, resident))
        assert_same_layout(pager, expected)


def test_plans_of_token_maps() -> None:
    for seed in range(20):
        m = token_map(seed)
        q_lens = m.new_tokens(seed)
        pager, planner = pager_for(m.num_pages, m.page_tokens, "cuda"), planner_of(m, 40, "cuda")
        layout = pager.update(*on_gpu(m.pages, m.starts, m.ends))
        planner.update_from_layout(layout, q_lens.cuda())
        expected = host_plan(m, q_lens, 40)
        assert_same_plan(planner.trimmed(len(q_lens)).to("cpu"), expected)
        assert_same_stats(planner, expected)


def test_replayed_with_other_contents() -> None:
    """One graph of both forms, with other tables, lengths, maps and bitmaps at each replay."""
    odd = [padded(random_batch(seed), ROWS) for seed in range(1, 20, 2)]
    pager = pager_for(4000, PAGE_TOKENS, "cuda", ROWS, ROWS * COLUMNS)
    mapped = pager_for(4000, PAGE_TOKENS, "cuda", ROWS, ROWS * 640, ROWS * 640)
    table = odd[0].page_table.cuda()
    ends, resident = torch.zeros(ROWS, dtype=torch.int32).cuda(), bitmap("words", 4000, 0).cuda()
    tokens = torch.zeros(ROWS * 640, dtype=torch.int32).cuda()
    starts = torch.arange(ROWS, dtype=torch.int32).cuda() * 640

    def step() -> None:
        pager.update_from_page_table(table, ends, resident)
        mapped.update(tokens, starts, starts + ends, resident)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for seed, batch in enumerate(odd * 2):
        table.copy_(batch.page_table)
        ends.copy_(torch.tensor(batch.kv_lens))
        resident.copy_(bitmap("words", 4000, seed))
        tokens.copy_(batch.page_table.repeat_interleave(PAGE_TOKENS, 1).flatten())
        graph.replay()
        assert_same_layout(
            pager,
            flashcore.layout_from_page_table(
                batch.page_table,
                ends.cpu(),
                page_tokens=PAGE_TOKENS,
                page_resident_bitmap=resident.cpu(),
            ),
        )
        m = TokenMap(tokens.cpu(), starts.cpu(), (starts + ends).cpu(), PAGE_TOKENS, 4000)
        assert_same_layout(mapped, expected_layout(m, resident.cpu()))


def test_faults() -> None:
    pages = torch.tensor([3, 3, 1, 1, 9, 2, 2, -1], dtype=torch.int32)
    starts = torch.tensor([0, 3, 5, 6, 7, -1, 4, 0], dtype=torch.int32)
    ends = torch.tensor([3, 5, 7, 9, 8, 2, 3, 7], dtype=torch.int32)
    pager = DevicePager(max_batch=9, max_entries=9, max_tokens=8, num_pages=9, page_tokens=2)
    layout = pager.update(*on_gpu(pages, starts, ends))
    bad = [0, Fault.PAGE, 0, Fault.LENGTH, Fault.PAGE, Fault.LENGTH, Fault.LENGTH, Fault.ENTRIES]
    assert layout.bad[:8].tolist() == bad
    assert layout.faults() == Fault.PAGE | Fault.LENGTH | Fault.ENTRIES
    found = layout.trimmed()
    assert found.row_offsets.tolist() == [0, 2, 4, 5, 5, 6, 6, 6, 6]
    assert found.cols.tolist() == [3, 1, 1, 0, 2, 0]
    assert found.staging_ids.tolist() == [3, 1, 2]


def test_no_waiting() -> None:
    m = token_map(6)
    pager, values = pager_for(m.num_pages, m.page_tokens, "cuda"), on_gpu(m.pages, m.starts, m.ends)
    pager.update(*values)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(500_000_000)
        pager.update(*values)
        assert not torch.cuda.current_stream().query()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_same_layout(pager, expected_layout(m, None))
