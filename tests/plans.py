"""Plans read by the definitions of their rows, for tests."""

from __future__ import annotations

import torch

import flashcore
from flashcore.contract.work import DIRECT, Group, Work
from tests import oracle
from tests.cases import Batch
from tests.test_layout import rows_of


def active_rows(batch: Batch) -> list[list[tuple[int, int]]]:
    rows = rows_of(batch.layout)
    return [row if n else [] for row, n in zip(rows, batch.q_lens, strict=True)]


def members_of(plan: flashcore.Plan, group: int) -> list[tuple[int, int]]:
    """(row, tokens before the run) of each member."""
    span = slice(int(plan.member_offsets[group]), int(plan.member_offsets[group + 1]))
    return list(
        zip(plan.member_rows[span].tolist(), plan.member_starts[span].tolist(), strict=True)
    )


def run_of(plan: flashcore.Plan, group: int) -> tuple[tuple[int, int], ...]:
    row = plan.groups[group].tolist()
    span = slice(row[Group.ENTRY], row[Group.ENTRY] + row[Group.NUM_ENTRIES])
    cols, counts = plan.cols[span].tolist(), plan.token_counts[span].tolist()
    return tuple(zip(cols, counts, strict=True))


def assert_groups(
    plan: flashcore.Plan, rows: list[list[tuple[int, int]]], expected: list[oracle.Run]
) -> None:
    """Every group of the plan is the oracle's run, with its members and their places."""
    assert plan.groups.shape[0] == len(expected)
    for number, run in enumerate(expected):
        assert run_of(plan, number) == run.pages
        starts = [(r, sum(n for _, n in rows[r][:i])) for r, i in run.members]
        assert members_of(plan, number) == starts


def assert_lists(batch: Batch, plan: flashcore.Plan) -> None:
    """Groups, merge lists and work items hold every query token's keys once, each where its
    columns say."""
    group_size = batch.num_q_heads // batch.num_kv_heads
    expected: dict[int, list[tuple[int, int]]] = {t: [] for t in range(plan.total_q)}
    owner_of_partial: dict[int, int] = {}
    rows_left: dict[tuple[int, int, int, int], int] = {}
    for number, row in enumerate(plan.groups.tolist()):
        lists = zip(members_of(plan, number), _queries(batch, plan, number), strict=True)
        place = row[Group.Q_BEGIN]
        for (seq, start), tokens in lists:
            for token in tokens:
                assert int(plan.q_tokens[place]) == token
                own = token - int(plan.q_offsets[seq])
                position = batch.kv_lens[seq] - batch.q_lens[seq] + own - start
                assert int(plan.q_positions[place]) == position
                for split in range(row[Group.NUM_SPLITS]):
                    begin = start + split * row[Group.SPLIT_ENTRIES] * batch.page_tokens
                    partial = row[Group.PARTIAL]
                    if partial != DIRECT:
                        partial += split * row[Group.NUM_Q] + place - row[Group.Q_BEGIN]
                        assert owner_of_partial.setdefault(partial, token) == token
                    expected[token].append((begin, partial))
                place += 1
        assert place == row[Group.Q_BEGIN] + row[Group.NUM_Q]
        assert row[Group.NUM_ENTRIES] == -(-row[Group.NUM_TOKENS] // batch.page_tokens)
        assert row[Group.NUM_SPLITS] == -(-row[Group.NUM_ENTRIES] // row[Group.SPLIT_ENTRIES])
        for split in range(row[Group.NUM_SPLITS]):
            for head in range(batch.num_kv_heads):
                for r in range(row[Group.NUM_Q] * group_size):
                    rows_left[number, split, head, row[Group.Q_BEGIN] * group_size + r] = 0
    assert sorted(owner_of_partial) == list(range(plan.num_partial_tokens))
    for token in range(plan.total_q):
        span = slice(int(plan.merge_offsets[token]), int(plan.merge_offsets[token + 1]))
        assert plan.merge_partials[span].tolist() == [p for _, p in sorted(expected[token])]
    _assert_work(batch, plan, rows_left)


def _queries(batch: Batch, plan: flashcore.Plan, group: int) -> list[range]:
    ends = plan.q_offsets.tolist()
    return [range(ends[row], ends[row + 1]) for row, _ in members_of(plan, group)]


def _assert_work(batch: Batch, plan: flashcore.Plan, rows_left: dict) -> None:
    """Every (group, split, head, packed row) is in one item, with the right keys and target."""
    group_size = batch.num_q_heads // batch.num_kv_heads
    order = []
    for item in plan.work.tolist():
        rows = plan.groups[item[Work.GROUP], Group.NUM_Q] * group_size
        order.append(item[Work.NUM_TOKENS] * (2 if rows > plan.tile_m else 1))
    assert order == sorted(order, reverse=True)
    for item in plan.work.tolist():
        group = plan.groups[item[Work.GROUP]].tolist()
        split = item[Work.KV_OFFSET] // (group[Group.SPLIT_ENTRIES] * batch.page_tokens)
        assert item[Work.ENTRY] == group[Group.ENTRY] + split * group[Group.SPLIT_ENTRIES]
        rest = group[Group.NUM_TOKENS] - item[Work.KV_OFFSET]
        assert item[Work.NUM_TOKENS] == min(rest, group[Group.SPLIT_ENTRIES] * batch.page_tokens)
        assert item[Work.NUM_TOKENS] > 0
        assert 1 <= item[Work.NUM_ROWS] <= plan.tile_m
        if group[Group.PARTIAL] == DIRECT:
            assert item[Work.PARTIAL] == DIRECT
        else:
            gathered = item[Work.ROW_BEGIN] // group_size - group[Group.Q_BEGIN]
            first = group[Group.PARTIAL] + split * group[Group.NUM_Q]
            assert item[Work.PARTIAL] == first + gathered
        for row in range(item[Work.ROW_BEGIN], item[Work.ROW_BEGIN] + item[Work.NUM_ROWS]):
            rows_left[item[Work.GROUP], split, item[Work.KV_HEAD], row] += 1
    assert set(rows_left.values()) <= {1}


def tree(prefix_pages: int, tails: int, tail_pages: int, page_tokens: int = 16) -> flashcore.Layout:
    table = torch.arange(tails * (prefix_pages + tail_pages)).view(tails, -1)
    table[:, :prefix_pages] = table[0, :prefix_pages]
    lens = torch.full((tails,), table.shape[1] * page_tokens)
    return flashcore.layout_from_page_table(table, lens, page_tokens=page_tokens)


def plan_tree(layout: flashcore.Layout, **options) -> flashcore.Plan:
    shape = {"num_q_heads": 32, "num_kv_heads": 8, "head_dim": 128, "page_tokens": 16}
    return flashcore.plan(layout, **{**shape, **options})
