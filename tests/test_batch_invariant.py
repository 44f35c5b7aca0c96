"""Batch-invariant plans: what a sequence's results are made of depends on that sequence alone."""

from __future__ import annotations

import dataclasses
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import flashcore
from flashcore import ops
from flashcore.bench.paged_problems import make_batch, paged_problems
from flashcore.contract.chunks import tallest_tile
from flashcore.contract.work import DIRECT, Group, Work
from flashcore.dispatch import Path
from flashcore.planner import chunks
from flashcore.reference import paged_attention_reference
from flashcore.sm90.config.merge import MergeConfig, choose_device_merge, choose_merge
from flashcore.sm90.config.paged import PAGE_TOKENS, PagedCall, choose
from flashcore.sm90.launch import paged as launch_paged
from tests import oracle
from tests.cases import Batch, batches, picked
from tests.compare import assert_close
from tests.plans import active_rows, assert_groups, members_of, tree
from tests.test_paged_attention import REGIMES, rules

FEW_QUERIES = 2
WHOLE = 1 << 20  # pages
SHAPE = {"num_q_heads": 32, "num_kv_heads": 8, "head_dim": 128}
chunk_sizes = st.sampled_from([1, 2, 4])
any_plan = given(
    batches(max_batch=8),
    chunk_sizes,
    st.sampled_from([True, False, "always"]),
    st.booleans(),
    st.sampled_from([0, 3, 500]),
)


def small_chunks(batch: Batch, pages: int) -> Any:
    """Chunks of so few pages that small batches have several."""
    tokens = pages * batch.page_tokens
    return mock.patch.multiple(chunks, CHUNK_TOKENS=tokens, FEW_QUERIES=FEW_QUERIES)


def invariant(batch: Batch, pages: int, **options: Any) -> flashcore.Plan:
    with small_chunks(batch, pages):
        return batch.plan(batch_invariant=True, **options)


def chunk_pages(batch: Batch, pages: int) -> list[int]:
    rows, whole = active_rows(batch), []
    for row, n in zip(rows, batch.q_lens, strict=True):
        broken = any(tokens < batch.page_tokens for _, tokens in row[:-1])
        whole.append(n > FEW_QUERIES and not broken)
    return [WHOLE if uncut else pages for uncut in whole]


def recipe(plan: flashcore.Plan, row: int) -> list[list[tuple[int, int, int, bool]]]:
    """Of each query token of a sequence, the partial results in the order in which they are merged:
    KV begin and tokens, the query's place, and whether it is the output."""
    of_partial, direct = {}, {}
    starts = dict(enumerate(plan.member_starts.tolist()))
    for item in plan.work.tolist():
        if item[Work.KV_HEAD]:
            continue
        group = plan.groups[item[Work.GROUP]].tolist()
        g = plan.num_q_heads // plan.num_kv_heads
        first = item[Work.ROW_BEGIN] // g
        last = (item[Work.ROW_BEGIN] + item[Work.NUM_ROWS] - 1) // g
        sizes = plan.q_offsets.diff()[plan.member_rows.long()].tolist()
        span = range(*plan.member_offsets[item[Work.GROUP] : item[Work.GROUP] + 2].tolist())
        member_of = [m for m in span for _ in range(sizes[m])]
        for gathered in range(first, last + 1):
            start = starts[member_of[gathered - group[Group.Q_BEGIN]]]
            position = int(plan.q_positions[gathered]) + start
            piece = start + item[Work.KV_OFFSET], item[Work.NUM_TOKENS], position
            if item[Work.PARTIAL] == DIRECT:
                direct[int(plan.q_tokens[gathered])] = (*piece, True)
            else:
                of_partial[item[Work.PARTIAL] + gathered - first] = (*piece, False)
    lists = []
    for token in range(*plan.q_offsets[row : row + 2].tolist()):
        span = slice(*plan.merge_offsets[token : token + 2].tolist())
        lists.append(
            [
                direct[token] if p == DIRECT else of_partial[p]
                for p in plan.merge_partials[span].tolist()
            ]
        )
    return lists


@settings(max_examples=400, deadline=None)
@given(batches(), chunk_sizes)
def test_groups_against_oracle(batch: Batch, pages: int):
    plan = invariant(batch, pages, fold=False)
    rows = active_rows(batch)
    expected = oracle.chunk_groups(rows, batch.page_tokens, chunk_pages(batch, pages))
    assert_groups(plan, rows, expected)


@settings(max_examples=300, deadline=None)
@any_plan
def test_every_item_is_one_chunk_of_its_members(
    batch: Batch, pages: int, fold: Any, share: bool, workers: int
):
    plan = invariant(batch, pages, fold=fold, share=share, num_workers=workers)
    rows = active_rows(batch)
    expected = []
    for row, size in zip(rows, chunk_pages(batch, pages), strict=True):
        ends = [0]
        for _, n in row:
            ends.append(ends[-1] + n)
        cut = oracle.chunks(row, size, batch.page_tokens)
        expected.append({(ends[begin], ends[end] - ends[begin]) for begin, end in cut})
    seen = [set() for _ in rows]
    for item in plan.work.tolist():
        for row, start in members_of(plan, item[Work.GROUP]):
            seen[row].add((start + item[Work.KV_OFFSET], item[Work.NUM_TOKENS]))
    assert seen == expected


@settings(max_examples=300, deadline=None)
@any_plan
def test_a_sequence_is_computed_as_if_it_were_alone(
    batch: Batch, pages: int, fold: Any, share: bool, workers: int
):
    plan = invariant(batch, pages, fold=fold, share=share, num_workers=workers)
    for row in range(len(batch.q_lens)):
        assert recipe(plan, row) == recipe(invariant(picked(batch, [row]), pages), 0)


@settings(max_examples=150, deadline=None)
@given(batches(), chunk_sizes, st.sampled_from(REGIMES), st.booleans(), st.booleans())
def test_against_reference(batch: Batch, pages: int, regime: str, fold: bool, share: bool):
    q, k, v = batch.tensors()
    options = rules(batch, regime)
    expected = paged_attention_reference(q, k, v, batch.layout, batch.q_lens, **options)
    plan = invariant(batch, pages, fold=fold, share=share)
    out, lse = flashcore.paged_attention(q, k, v, plan, return_lse=True, **options)
    assert_close(out, expected[0], torch.float32)
    assert_close(lse, expected[1], torch.float32)


def test_hostile_batches_share_and_fold():
    """The tests above are about something: chunks are shared, folded, cut inside of a run."""
    table = torch.arange(4 * 8).view(4, 8)
    table[:, :4] = table[0, :4]
    batch = Batch(table.int(), [8 * 4, 8 * 4, 30, 4 * 4], [1] * 4, 4, 32, 1, 1, 8)
    plan = invariant(batch, 2, fold=False)
    assert plan.member_offsets.diff().tolist() == [4, 1, 1, 1]
    assert plan.groups[:, Group.NUM_SPLITS].tolist() == [2, 2, 2, 2]
    folded = invariant(dataclasses.replace(batch, kv_lens=[32, 32, 30, 20]), 2, fold="always")
    assert folded.groups[:, Group.NUM_SPLITS].tolist() == [4, 4, 4, 3]


def invariant_tree(prefix_tokens: int, own_tokens: int, sequences: int, **options: Any):
    layout = tree(prefix_tokens // 16, sequences, own_tokens // 16)
    return flashcore.plan(layout, **SHAPE, page_tokens=16, batch_invariant=True, **options)


def test_less_than_a_chunk_is_left_to_each_sequence():
    stats = invariant_tree(4096 + 512, 1024, 16, fold=False).stats()
    assert stats.num_shared_groups == 1
    assert stats.tokens_once == 4096 + 16 * (512 + 1024)
    assert invariant_tree(1008, 1024, 16, fold=False).stats().num_shared_groups == 0


def test_many_queries_are_not_cut():
    q_lens = [1, chunks.FEW_QUERIES, chunks.FEW_QUERIES + 1]
    plan = invariant_tree(0, 16384, 3, q_lens=q_lens)
    assert plan.groups[:, Group.NUM_SPLITS].tolist() == [16, 16, 1]


# Nearly all that the workloads of `flashcore bench paged` share is shared by chunks as well.
@pytest.mark.parametrize("name", [p.name for p in paged_problems() if p.prefix_tokens])
def test_shared_workloads_stay_shared(name: str):
    problem = next(p for p in paged_problems() if p.name == name)
    batch = make_batch(problem)
    layout = flashcore.layout_from_page_table(
        batch.page_table, batch.seq_lens, page_tokens=problem.page_tokens
    )
    stats = flashcore.plan(
        layout, **SHAPE, page_tokens=problem.page_tokens, batch_invariant=True, fold=False
    ).stats()
    assert stats.tokens_once <= stats.tokens_unique + problem.sequences * chunks.CHUNK_TOKENS


def test_chunks_are_whole_pages_and_tiles():
    assert chunks.CHUNK_TOKENS % 128 == 0
    layout = tree(4, 2, 1, page_tokens=48)
    with pytest.raises(
        ValueError, match="page_tokens must divide 1024 for batch_invariant, got 48"
    ):
        flashcore.plan(layout, **SHAPE, page_tokens=48, batch_invariant=True)


def test_the_plan_says_so():
    plan = invariant_tree(1024, 16, 2)
    assert plan.batch_invariant
    assert plan.to("meta").batch_invariant
    assert not flashcore.plan(tree(4, 2, 1), **SHAPE, page_tokens=16).batch_invariant


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_kernels_of_a_launch(monkeypatch: pytest.MonkeyPatch, batch_invariant: bool):
    configs = []

    def function(config: Any) -> Any:
        configs.append(config)
        return lambda *arguments: None

    monkeypatch.setattr(ops, "device_path", lambda device: Path("hopper", ""))
    monkeypatch.setattr(launch_paged, "_function", function)
    monkeypatch.setattr(launch_paged, "sm_count", lambda device: 132)
    monkeypatch.setattr(launch_paged, "scheduler_scratch", lambda index: None)
    monkeypatch.setattr(launch_paged, "lasting_stream", lambda index: 0)
    plan = flashcore.plan(
        tree(64, 2, 64), **SHAPE, page_tokens=16, num_workers=100, batch_invariant=batch_invariant
    )
    pages = torch.zeros(256, 16, 8, 128, dtype=torch.bfloat16)
    q = torch.zeros(2, 32, 128, dtype=torch.bfloat16)
    flashcore.paged_attention(q, pages, pages, plan)
    attend, merge = configs
    assert attend.chunked == batch_invariant
    assert isinstance(merge, MergeConfig)
    assert merge.fixed_order == batch_invariant


def test_merges_of_all_lengths_have_the_fixed_order():
    for partials in (2, 800):
        assert choose_merge("bf16", 128, False, partials, 1, 32).fixed_order
    for rows in (1, 10**4):
        assert choose_device_merge("bf16", 128, False, rows, True).fixed_order


def test_a_cta_folds_a_row_where_rows_are_few_and_long():
    """A warp takes no more than a CTA where there are CTAs enough to fill the GPU twice."""
    for total_q, heads, results, warps in ((8, 32, 128, 8), (8, 32, 7, 1), (64, 32, 8, 1)):
        chosen = choose_merge("bf16", 128, False, results * total_q, total_q, heads)
        assert chosen.warps_per_row == warps
    assert choose_merge("bf16", 128, False, 512, 64).warps_per_row == 8, "of other plans"


@pytest.mark.parametrize("v_head_dim", [0, 64, 128])
@pytest.mark.parametrize("head_dim", range(8, 257, 8))
def test_one_order_of_sums_for_all_tiles_and_pages(head_dim: int, v_head_dim: int):
    """Tiles of one width, so one sequence of products; the chunk is whole tiles of them."""
    if v_head_dim > head_dim:
        return
    widths = set()
    for page_tokens in PAGE_TOKENS:
        call = PagedCall("bf16", head_dim, page_tokens, 4, v_head_dim, chunked=True)
        for tile_m in {64, tallest_tile(v_head_dim or head_dim)}:
            widths.add(choose(call, tile_m).tile_n)
    (width,) = widths
    assert chunks.CHUNK_TOKENS % width == 0


@settings(max_examples=200, deadline=None)
@any_plan
def test_what_is_folded_does_not_depend_on_the_number_of_queries(
    batch: Batch, pages: int, fold: Any, share: bool, workers: int
):
    """A query token's chunks are those of its sequence, as items or inside of one."""
    plan = invariant(batch, pages, fold=fold, share=share, num_workers=workers)
    for row, entries in enumerate(active_rows(batch)):
        cut = oracle.chunks(entries, pages, batch.page_tokens)
        before = [sum(n for _, n in entries[:first]) for first, _ in cut]
        for pieces in recipe(plan, row):
            begins = [begin for begin, *_ in pieces]
            if len(cut) > 1 and len(pieces) == 1 and pieces[0][3]:
                assert begins == [0]  # the kernel counts chunks from the item's beginning
                assert before == [i * pages * batch.page_tokens for i in range(len(cut))]
            else:
                assert begins == before
