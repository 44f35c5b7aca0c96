"""Groups and folding against brute force, and what a plan refuses."""

from __future__ import annotations

import dataclasses
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import flashcore
from flashcore.bench.paged_problems import make_batch, paged_problems
from flashcore.contract.reasons import Reason
from flashcore.contract.work import Group
from flashcore.planner import folding
from flashcore.planner.folding import Costs
from tests import oracle
from tests.cases import Batch, batches
from tests.plans import active_rows, assert_groups, members_of, plan_tree, run_of, tree


@settings(max_examples=400, deadline=None)
@given(batches())
def test_groups_against_oracle(batch: Batch):
    plan = batch.plan(fold=False)
    rows = active_rows(batch)
    expected = oracle.groups(rows, batch.page_tokens)
    assert_groups(plan, rows, expected)


@settings(max_examples=300, deadline=None)
@given(batches(), st.booleans(), st.booleans(), st.sampled_from([0, 3, 40]))
def test_members_partition_every_sequence(batch: Batch, fold: bool, share: bool, workers: int):
    """Folded or not: each sequence is covered once, in order, by runs that hold its own pages."""
    plan = batch.plan(fold=fold, share=share, num_workers=workers, itemsize=8)
    rows = active_rows(batch)
    covered: dict[int, list[tuple[int, tuple[tuple[int, int], ...]]]] = {}
    for group in range(plan.groups.shape[0]):
        run = run_of(plan, group)
        assert all(count == batch.page_tokens for _, count in run[:-1])
        assert int(plan.groups[group, Group.NUM_TOKENS]) == sum(n for _, n in run)
        for row, start in members_of(plan, group):
            covered.setdefault(row, []).append((start, run))
    for row, entries in enumerate(rows):
        pieces = sorted(covered.get(row, []))
        assert [entry for _, run in pieces for entry in run] == entries
        position = 0
        for start, run in pieces:
            assert start == position
            position += sum(n for _, n in run)


def folding_by_recursion(batch: Batch, costs: Costs, tile_m: int) -> list[tuple[int, ...]]:
    """Expected sets of (row, pages before the run) of the groups kept, from the tree of groups."""
    rows = active_rows(batch)
    runs = oracle.groups(rows, batch.page_tokens)
    at = {place: run for run in runs for place in run.members}
    before: dict[oracle.Run, set[oracle.Run | None]] = {run: set() for run in runs}
    after: dict[oracle.Run, list[oracle.Run | None]] = {run: [] for run in runs}
    for run in runs:
        for r, i in run.members:
            follower = at.get((r, i + len(run.pages)))
            after[run].append(follower)
            if follower is not None:
                before[follower].add(run)
    for run in runs:
        if any(i == 0 for _, i in run.members):
            before[run].add(None)

    def only_parent(run: oracle.Run) -> oracle.Run | None:
        return next(iter(before[run])) if len(before[run]) == 1 else None

    def absorbed(run: oracle.Run, kv_token: int) -> int:
        parent = only_parent(run)
        if parent is None or not folded(parent, kv_token):
            return 0
        return sum(n for _, n in parent.pages) + absorbed(parent, kv_token)

    def exact(run: oracle.Run) -> bool:
        return (
            len(run.members) > 1
            and run.pages[-1][1] == batch.page_tokens
            and all(f is not None and only_parent(f) == run for f in after[run])
        )

    def queries(run: oracle.Run) -> int:
        return sum(batch.q_lens[r] for r, _ in run.members)

    def blocks(run: oracle.Run) -> int:
        return -(-queries(run) * batch.num_q_heads // batch.num_kv_heads // tile_m)

    def gain(run: oracle.Run, kv_token: int) -> int:
        again = sum(blocks(f) for f in set(after[run])) - blocks(run)
        tokens = sum(n for _, n in run.pages) + absorbed(run, kv_token)
        return again * tokens * kv_token - queries(run) * costs.partial_token

    def folded(run: oracle.Run, kv_token: int) -> bool:
        return exact(run) and gain(run, kv_token) <= 0

    cost = costs.kv_token
    gains = sum(gain(run, cost) for run in runs if exact(run) and not folded(run, cost))
    if 0 < gains <= costs.least_gain:
        cost = 0
    kept = [run for run in runs if not folded(run, cost)]
    return [(sum(n for _, n in run.pages) + absorbed(run, cost), len(run.members)) for run in kept]


@settings(max_examples=400, deadline=None)
@given(
    batches(max_batch=8),
    st.sampled_from([1, 2, 8]),
    st.sampled_from([1, 4, 64]),
    st.sampled_from([0, 1, folding.L2_COST, folding.PARTIAL_COST]),
    st.sampled_from([0, 10**4, 10**6]),
)
def test_folding_against_recursion(
    batch: Batch, itemsize: int, tile_m: int, partial_cost: int, least: int
):
    with mock.patch.multiple(folding, PARTIAL_COST=partial_cost, LEAST_GAIN=least):
        plan = flashcore.plan(
            batch.layout,
            q_lens=batch.q_lens,
            num_q_heads=batch.num_q_heads,
            num_kv_heads=batch.num_kv_heads,
            head_dim=batch.head_dim,
            v_head_dim=batch.v_head_dim,
            page_tokens=batch.page_tokens,
            itemsize=itemsize,
            tile_m=tile_m,
            num_workers=2,
        )
        costs = Costs.of(plan.problem)
    assert plan.problem.itemsize == itemsize
    found = list(
        zip(
            plan.groups[:, Group.NUM_TOKENS].tolist(),
            plan.member_offsets.diff().tolist(),
            strict=True,
        )
    )
    assert found == folding_by_recursion(batch, costs, tile_m)


def test_a_long_prefix_is_read_once_and_a_page_is_given_back():
    kept = plan_tree(tree(prefix_pages=64, tails=16, tail_pages=4)).stats()
    assert kept.num_shared_groups == 1
    assert kept.largest_fan_out == 16
    assert kept.tokens_once == (64 + 16 * 4) * 16 == kept.tokens_unique
    assert kept.reuse == pytest.approx(16 * 68 / 128)
    assert kept.bytes_once(torch.bfloat16) == kept.tokens_once * 2 * 8 * 128 * 2
    assert kept.num_folded == 0

    # One page of one token in front of 16 sequences saves 15 tokens and costs 16 partial rows.
    folded = plan_tree(tree(1, 16, 64, page_tokens=1), page_tokens=1)
    stats = folded.stats()
    assert stats.num_folded == 1
    assert stats.tokens_once == stats.tokens_per_sequence == 16 * 65
    assert folded.num_partial_tokens == 0
    assert "partial results would cost more" in next(iter(k for k in stats.reasons if "fold" in k))


def test_folds_sink_down_a_tree():
    """A small root and small inner nodes all end up in front of the leaves."""
    table = torch.tensor([[0, 1, 4], [0, 1, 5], [0, 2, 6], [0, 2, 7]])
    layout = flashcore.layout_from_page_table(table, torch.full((4,), 48), page_tokens=16)
    plan = plan_tree(layout, q_lens=[16] * 4)
    assert [run_of(plan, g) for g in range(plan.groups.shape[0])] == [
        tuple((page, 16) for page in row) for row in table.tolist()
    ]
    assert plan.stats().num_folded == 3
    assert plan.num_partial_tokens == 0


def test_fold_always_gives_back_what_it_exactly_can():
    """Runs that bytes would keep go to their children; one that a sequence ends with stays."""
    layout = tree(prefix_pages=64, tails=16, tail_pages=4)
    plan = plan_tree(layout, fold="always", num_workers=0)
    assert plan.stats().num_shared_groups == 0
    assert plan.num_partial_tokens == 0
    table = torch.tensor([[0, 1], [0, 2], [0, 3]])
    lens = torch.tensor([32, 32, 16])
    layout = flashcore.layout_from_page_table(table, lens, page_tokens=16)
    assert plan_tree(layout, fold="always").stats().num_shared_groups == 1


GPU = {"num_workers": 264, "page_tokens": 128}


def kept_groups(*, sequences: int, shared: int, own: int, q_len: int = 1, **options) -> int:
    """Shared groups on a GPU, of sequences with so many common and own tokens in pages of 128."""
    layout = tree(shared // 128, sequences, own // 128, page_tokens=128)
    plan = plan_tree(layout, q_lens=[q_len] * sequences, **GPU, **options)
    return plan.stats().num_shared_groups


# The workloads of `flashcore bench paged` that share: what they save is worth its partial results.
@pytest.mark.parametrize("name", [p.name for p in paged_problems() if p.prefix_tokens or p.tree])
def test_shared_workloads_keep_their_groups(name: str):
    problem = next(p for p in paged_problems() if p.name == name)
    batch = make_batch(problem)
    layout = flashcore.layout_from_page_table(
        batch.page_table, batch.seq_lens, page_tokens=problem.page_tokens
    )
    q_lens = [problem.q_len] * problem.sequences
    stats = plan_tree(layout, q_lens=q_lens, num_kv_heads=problem.kv_heads, **GPU).stats()
    if problem.q_len > 1:  # a prefill whose own rows fill the tiles
        assert stats.num_shared_groups == 0
        assert stats.num_partial_tokens == 0
    elif problem.tree:  # the inner nodes of a ragged tree are many and small
        assert stats.num_folded > 10
        assert stats.tokens_once < 1.05 * stats.tokens_unique
    else:
        assert stats.num_shared_groups == 1
        assert stats.tokens_once == stats.tokens_unique


def test_short_common_runs_are_read_again_from_l2():
    """16 tokens never pay for a partial result of 32 heads each; 32 do, if there are many."""
    gpu = GPU | {"page_tokens": 16}
    for pages, kept in ((1, 0), (2, 1)):
        layout = tree(prefix_pages=pages, tails=2000, tail_pages=1)
        assert plan_tree(layout, **gpu).stats().num_shared_groups == kept
        assert plan_tree(layout, **gpu, fold=False).stats().num_shared_groups == 1


def test_savings_too_small_for_a_merge_are_left():
    """Of the whole batch: eight pairs keep what one pair alone does not."""
    assert kept_groups(sequences=2, shared=5 * 128, own=128) == 0
    assert kept_groups(sequences=2, shared=64 * 128, own=128) == 1
    table = torch.arange(16 * 24).view(16, 24)
    table[1::2, :23] = table[::2, :23]
    for pairs, kept in ((1, 0), (8, 8)):
        lens = torch.full((2 * pairs,), 24 * 128)
        layout = flashcore.layout_from_page_table(table[: 2 * pairs], lens, page_tokens=128)
        assert plan_tree(layout, **GPU).stats().num_shared_groups == kept


def test_prefill_shares_where_tiles_are_not_full():
    """Rows that fill tiles by themselves read a run as often in company."""
    batch = {"sequences": 64, "shared": 8192, "own": 128}
    assert kept_groups(**batch, q_len=16) == 1
    assert kept_groups(**batch, q_len=64) == 0
    assert kept_groups(**batch, q_len=16, tile_m=64) == 0
    assert kept_groups(**batch, q_len=8, tile_m=64) == 1


def test_inactive_sequences_do_not_break_a_shared_run():
    layout = tree(prefix_pages=8, tails=3, tail_pages=1)
    table = layout.cols.view(3, 9).clone()
    table[1, 4] = 100  # this row parts from the others in the middle of their prefix
    lens = torch.full((3,), 9 * 16)
    layout = flashcore.layout_from_page_table(table, lens, page_tokens=16)
    shared = plan_tree(layout, q_lens=[1, 0, 1], fold=False)
    assert shared.stats().num_shared_groups == 1
    assert plan_tree(layout, fold=False).stats().num_shared_groups == 3


def test_sharing_at_different_positions_is_found():
    table = torch.tensor([[0, 5, 6, 7, 1], [5, 6, 7, 2, 3]])
    layout = flashcore.layout_from_page_table(table, torch.tensor([80, 80]), page_tokens=16)
    plan = plan_tree(layout, fold=False)
    shared = [g for g in range(plan.groups.shape[0]) if len(members_of(plan, g)) == 2]
    assert [run_of(plan, g) for g in shared] == [((5, 16), (6, 16), (7, 16))]
    assert members_of(plan, shared[0]) == [(0, 16), (1, 0)]


def test_share_off_reads_every_sequence_alone():
    layout = tree(prefix_pages=64, tails=4, tail_pages=1)
    stats = plan_tree(layout, share=False).stats()
    assert stats.reuse == 1.0
    assert stats.num_groups == 4
    assert stats.largest_fan_out == 1


def test_plan_is_immutable_and_moves():
    plan = plan_tree(tree(2, 2, 1))
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.total_q = 3
    there = plan.to("meta")
    assert {t.device.type for t in vars(there).values() if isinstance(t, torch.Tensor)} == {"meta"}
    assert there.total_q == plan.total_q


@pytest.mark.parametrize("reason", list(Reason))
def test_every_reason_occurs(reason):
    """Each outcome of folding has a batch that brings it about."""
    table, lens, options = {
        Reason.PRIVATE: ([[0, 1]], [32], {}),
        Reason.KEPT: ([[0, 1], [0, 2]], [32, 32], {"num_q_heads": 1, "num_kv_heads": 1}),
        Reason.FOLDED: ([[0, 1], [0, 2]], [32, 32], {"q_lens": [16, 16]}),
        Reason.KEPT_LAST: ([[0, 1], [0, 2]], [32, 16], {"q_lens": [16, 16]}),
        Reason.KEPT_PARTIAL_PAGE: ([[0, 1], [0, 1]], [20, 20], {"q_lens": [16, 16]}),
        Reason.KEPT_BRANCHING: ([[0, 1], [0, 1], [2, 1]], [32, 32, 32], {"q_lens": [16] * 3}),
        Reason.KEPT_ALL: ([[0, 1], [0, 2]], [32, 32], {"fold": False}),
    }[reason]
    layout = flashcore.layout_from_page_table(
        torch.tensor(table), torch.tensor(lens), page_tokens=16
    )
    plan = plan_tree(layout, **options)
    assert reason in plan.decisions[:, 3].tolist()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_q_heads": 5, "num_kv_heads": 2}, ValueError, "num_q_heads must be a multiple of"),
        ({"num_kv_heads": 0}, ValueError, "num_kv_heads must be at least 1, got 0"),
        ({"head_dim": 0}, ValueError, "head_dim must be at least 1, got 0"),
        ({"head_dim": 64.0}, TypeError, "head_dim must be an int, got float"),
        ({"page_tokens": 8}, ValueError, "page_tokens must be what .* built with, 16, got 8"),
        ({"q_lens": [1]}, ValueError, r"q_lens must have one length per row \(2\), got 1"),
        ({"q_lens": [1, -2]}, ValueError, r"q_lens\[1\] must be at least 0, got -2"),
        ({"q_lens": torch.ones(2)}, TypeError, "q_lens must have dtype int32, int64, got float32"),
        ({"tile_m": 0}, ValueError, "tile_m must be at least 1, got 0"),
        ({"num_workers": -1}, ValueError, "num_workers must be at least 1, got -1"),
        ({"itemsize": 9}, ValueError, "itemsize must be at least 1 and at most 8, got 9"),
        ({"num_workers": True}, TypeError, "num_workers must be an int, got bool"),
        ({"num_workers": 0.5}, TypeError, "num_workers must be an int, got float"),
        ({"q_lens": [1.5, 1]}, TypeError, r"q_lens\[0\] must be an int, got 1\.5"),
        ({"q_lens": [1, True]}, TypeError, r"q_lens\[1\] must be an int, got True"),
        ({"q_lens": ["1", 1]}, TypeError, r"q_lens\[0\] must be an int, got '1'"),
        ({"q_lens": 1}, TypeError, "q_lens must be a tensor or a sequence of ints, got 1"),
        ({"q_lens": "11"}, TypeError, "q_lens must be a tensor or a sequence of ints, got '11'"),
        ({"q_lens": [2**40, 1]}, ValueError, r"q_lens\[0\] must be below 2\*\*31, got 1099511"),
        ({"q_lens": [1, 999]}, ValueError, r"q_lens\[1\] = 999 is more than the 32 KV tokens"),
        (
            {"q_lens": torch.ones(2, dtype=torch.int32).to_sparse()},
            ValueError,
            "q_lens must be a dense tensor with contents, got one that is torch.sparse_coo",
        ),
        ({"share": "no"}, TypeError, "share must be True or False, got 'no'"),
        ({"share": 0}, TypeError, "share must be True or False, got 0"),
        ({"batch_invariant": "no"}, TypeError, "batch_invariant must be True or False, got 'no'"),
        (
            {"fold": "sometimes"},
            ValueError,
            "fold must be True, False or 'always', got 'sometimes'",
        ),
        ({"fold": 1}, ValueError, "fold must be True, False or 'always', got 1"),
    ],
)
def test_plan_names_what_is_wrong(options, error, message):
    with pytest.raises(error, match=message):
        plan_tree(tree(1, 2, 1), **options)


def test_a_sequence_with_no_keys_may_have_queries():
    layout = flashcore.layout_from_page_table(
        torch.zeros(2, 1, dtype=torch.int32), torch.tensor([0, 3]), page_tokens=16
    )
    assert plan_tree(layout, q_lens=[2, 3]).total_q == 5


def test_plan_wants_a_layout():
    with pytest.raises(TypeError, match=r"layout must be a flashcore\.Layout, got tuple"):
        plan_tree(tuple(tree(1, 2, 1)))
