"""Work items, splits and merge lists against their definitions."""

from __future__ import annotations

import dataclasses
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import flashcore
from flashcore.contract.work import FIELDS
from flashcore.planner import split as splitting
from flashcore.sm90.config.paged_schedule import ctas_per_sm
from tests.cases import Batch, batches, small_scale
from tests.plans import assert_lists


@settings(max_examples=300, deadline=None)
@given(batches(), st.booleans(), st.sampled_from([0, 2, 500]), st.sampled_from([1, 5, 64]))
def test_merge_lists_and_work(batch: Batch, fold: bool, workers: int, tile_m: int):
    assert_lists(batch, batch.plan(fold=fold, num_workers=workers, tile_m=tile_m))


def telling_batch() -> Batch:
    """Two of three sequences share pages; GQA, several queries, several splits."""
    table = torch.tensor([[0, 1, 2, 3, 4, 5], [0, 1, 2, 6, 7, 8], [9, 10, 11, 12, 13, 14]])
    return Batch(table.int(), [48, 47, 45], [3, 2, 3], 8, 15, 4, 2, 64)


@pytest.mark.parametrize("tensor", ["work", "groups"])
def test_no_two_columns_can_be_swapped(tensor: str) -> None:
    batch = telling_batch()
    with small_scale():
        plan = batch.plan(fold=False, num_workers=20, tile_m=5)
    assert_lists(batch, plan)
    rows = getattr(plan, tensor)
    for one, other in combinations(range(FIELDS), 2):
        swapped = rows.clone()
        swapped[:, [one, other]] = rows[:, [other, one]]
        with pytest.raises((AssertionError, ArithmeticError, LookupError, ValueError)):
            assert_lists(batch, dataclasses.replace(plan, **{tensor: swapped}))


@pytest.mark.parametrize(
    ("tokens", "pages_of_a_split"),
    [(128, 2), (512, 2), (768, 2), (4000, 2), (4224, 10), (8192, 10)],
)
def test_one_sequence_is_split_into_tiles(tokens, pages_of_a_split):
    """8 KV heads, 264 workers: tiles of two pages as long as they are fewer than workers."""
    costs = splitting.costs_of(tokens, tokens, splitting.BLOCK_COST)
    cost = splitting.run_cost(tokens, 1, costs)
    share = splitting.split_share(8 * cost, cost, cost, 264)
    assert splitting.split_pages(-(-tokens // 64), 1, share, 64, costs) == pages_of_a_split


@given(
    st.lists(st.tuples(st.integers(1, 10**6), st.integers(1, 300)), min_size=1, max_size=40),
    st.integers(2, 300),
    st.sampled_from([1, 16, 48, 64, 128, 192]),
    st.sampled_from([0, 8, 16]),
)
def test_splits_balance_workers(runs, workers, page_tokens, block):
    """Whole pages and N tiles; no item far above a worker's share; not many more than balance
    needs."""
    pages = [(-(-tokens // page_tokens), blocks) for tokens, blocks in runs]
    once = sum(n * page_tokens for n, _ in pages)
    in_blocks = sum(n * page_tokens * blocks for n, blocks in pages)
    kinds = splitting.costs_of(once, in_blocks, block)
    costs = [splitting.run_cost(n * page_tokens, blocks, kinds) for n, blocks in pages]
    total = sum(cost * blocks for cost, (_, blocks) in zip(costs, pages, strict=True))
    share = splitting.split_share(total, max(costs), min(costs), workers)
    if share == 0:
        assert max(costs) <= 1.25 * total / workers
        return
    few = total < 16 * splitting.TILE_TOKENS * workers
    least = splitting.SHORT_SPLIT_TOKENS if few else splitting.MIN_SPLIT_TOKENS
    assert share >= 16 * least
    more = 0
    for (n, blocks), cost in zip(pages, costs, strict=True):
        length = splitting.split_pages(n, blocks, share, page_tokens, kinds)
        number = -(-n // length)
        assert length % -(-splitting.TILE_TOKENS // page_tokens) == 0
        rounding = 16 * (splitting.TILE_TOKENS + page_tokens)
        assert cost / number <= 1.25 * (share + rounding)
        more += (number - 1) * blocks
    # Splits beyond the first of each item are at least 4 / 5 of a quarter of a worker's share.
    assert more <= 5 * workers


def _tile_of(lengths: list[int], q_lens: list[int], page_tokens: int = 128) -> int:
    """tile_m of a batch with nothing shared, 32/8 heads of 128."""
    counts = [-(-n // page_tokens) for n in lengths]
    table = torch.full((len(lengths), max(counts)), -1, dtype=torch.int32)
    first = 0
    for row, count in zip(table, counts, strict=True):
        row[:count] = torch.arange(first, first + count)
        first += count
    layout = flashcore.layout_from_page_table(table, torch.tensor(lengths), page_tokens=page_tokens)
    return flashcore.plan(
        layout, q_lens=q_lens, num_q_heads=32, num_kv_heads=8, head_dim=128,
        page_tokens=page_tokens, itemsize=2,
    ).tile_m  # fmt: skip


def test_a_token_costs_what_takes_longer():
    """16: read by an SM's share of the DRAM. A block of 64 rows computes half as long."""
    reads = splitting.costs_of(1000, 1500, 8)
    assert reads == (1, 8)
    assert [splitting.token_cost(blocks, reads) for blocks in (1, 2, 4, 16)] == [16, 21, 32, 128]
    computes = splitting.costs_of(1000, 2001, 8)
    assert computes == (0, 8)
    assert [splitting.token_cost(blocks, computes) for blocks in (1, 2, 16)] == [8, 16, 128]
    assert splitting.costs_of(1000, 1001, 16) == (0, 16)
    assert splitting.token_cost(3, splitting.Costs(0, 16)) == 48


def test_computing_counts_where_two_ctas_share_an_sm():
    """A block of 128 rows is computed in two of 64; with one CTA an SM only reading counts."""
    for head_dim in range(8, 264, 8):
        for v_head_dim in {head_dim, min(head_dim, 128), min(head_dim, 64)}:
            paired = ctas_per_sm(head_dim, 64, v_head_dim) == 2
            costs = [splitting.block_cost(tile_m, head_dim, v_head_dim) for tile_m in (64, 128)]
            assert costs == ([8, 16] if paired else [0, 0]), (head_dim, v_head_dim)


def test_tile_rows_follow_the_cost_of_all_items():
    assert _tile_of([8192] * 32, [1] * 32) == 64  # decode
    assert _tile_of([4096] * 4, [2048] * 4) == 128  # prefill
    assert _tile_of([16384] * 60 + [8192], [1] * 60 + [2048]) == 128  # a chunk beside decode
    assert _tile_of([16384] * 60 + [300], [1] * 60 + [64]) == 64  # too little of it
