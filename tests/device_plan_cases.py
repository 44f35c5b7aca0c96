"""What a plan made on the device must equal, for its emulation and for the kernels."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any
from unittest import mock

import torch

from flashcore.contract.counts import INVALID, Stat
from flashcore.contract.work import Group, Work
from flashcore.planner import chunks
from flashcore.planner.device_plan import Capacities
from flashcore.planner.types import Plan
from flashcore.sm90.device_planner import DevicePlanner
from tests.cases import Batch


def planner_for(batch: Batch, capacities: Capacities, device: str, **options: Any) -> DevicePlanner:
    return DevicePlanner(
        capacities,
        num_pages=batch.num_pages,
        num_q_heads=batch.num_q_heads,
        num_kv_heads=batch.num_kv_heads,
        head_dim=batch.head_dim,
        v_head_dim=batch.v_head_dim,
        page_tokens=batch.page_tokens,
        device=device,
        **options,
    )


def always_a_chain(planner: DevicePlanner, page_table: torch.Tensor | None) -> Any:
    """In place of `DevicePlanner._config`: the chain of kernels for small batches too."""
    return planner._chain_from_layout if page_table is None else planner._chain


def inputs(batch: Batch, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    lens = (torch.tensor(n, dtype=torch.int32) for n in (batch.kv_lens, batch.q_lens))
    return (batch.page_table.to(device), *(n.to(device) for n in lens))


def assert_same_plan(found: Plan, expected: Plan) -> None:
    """Every number and every element of every tensor. What becomes of fp8 pages is not in
    `DevicePlanner.trimmed`."""
    for field in (field for field in fields(Plan) if field.name != "expansion"):
        a, b = getattr(found, field.name), getattr(expected, field.name)
        if isinstance(b, torch.Tensor):
            assert a.dtype == b.dtype == torch.int32
            assert a.tolist() == b.tolist(), field.name
        else:
            assert a == b, field.name


def assert_same_stats(planner: DevicePlanner, expected: Plan, unshared: bool = False) -> None:
    """What the planner counted on the device, against `Plan.stats`."""
    stats = expected.stats()
    found = dict(zip(list(Stat)[:-1], planner.stats().tolist(), strict=True))
    assert found.pop(Stat.FAULTS) == planner.plan.faults()
    assert found.pop(Stat.UNSHARED) == unshared
    assert found == {stat: getattr(stats, stat.name.lower()) for stat in found}


def plan_without(
    batch: Batch, left_out: list[int], pages_kept: list[int], **options: Any
) -> dict[str, torch.Tensor]:
    """The plan of a batch some of whose sequences could not be planned.

    left_out: those; pages_kept: those of them whose pages stand in the layout all the same.
    """
    kv_lens = [0 if b in left_out else n for b, n in enumerate(batch.kv_lens)]
    q_lens = [0 if b in left_out else n for b, n in enumerate(batch.q_lens)]
    emptied = replace(batch, kv_lens=kv_lens, q_lens=q_lens)
    plan = emptied._plan(**options)
    pages = [-(-n // batch.page_tokens) for n in batch.kv_lens]
    new_entry, new_query = [], []  # where entries and query tokens of the others stand
    entry = query = 0
    offsets, partials = [0], []
    old = 0
    for b, q_len in enumerate(batch.q_lens):
        if b in left_out:
            entry += pages[b] if b in pages_kept else 0
            offsets += [offsets[-1] + i + 1 for i in range(q_len)]
            partials += [INVALID] * q_len
        else:
            new_entry += range(entry, entry + pages[b])
            entry += pages[b]
            new_query += range(query, query + q_len)
            lists = plan.merge_offsets[old : old + q_len + 1].tolist()
            offsets += [offsets[-1] + n - lists[0] for n in lists[1:]]
            partials += plan.merge_partials[lists[0] : lists[-1]].tolist()
            old += q_len
        query += q_len
    groups, work = plan.groups.clone(), plan.work.clone()
    at = torch.tensor(new_entry, dtype=torch.int32)
    groups[:, Group.ENTRY] = at[groups[:, Group.ENTRY].long()]
    work[:, Work.ENTRY] = at[work[:, Work.ENTRY].long()]
    return {
        "groups": groups,
        "work": work,
        "member_rows": plan.member_rows,
        "member_starts": plan.member_starts,
        "member_offsets": plan.member_offsets,
        "decisions": plan.decisions,
        "q_tokens": torch.tensor(new_query, dtype=torch.int32)[plan.q_tokens.long()],
        "q_positions": plan.q_positions,
        "kv_lens": plan.kv_lens,
        "merge_offsets": torch.tensor(offsets, dtype=torch.int32),
        "merge_partials": torch.tensor(partials, dtype=torch.int32),
    }


def plan_that_fits(batch: Batch, c: Capacities, **options: Any) -> tuple[Plan | None, bool]:
    """The plan that a device planner of these capacities must make, and whether it has given up
    sharing. None: no plan fits. All are given but max_segments, of which 0 is room for any."""
    apart: dict[str, Any] = {"share": False}
    for attempt, changes in enumerate(({}, apart, apart | {"num_workers": 0})):
        uncut = attempt == 2 and options.get("batch_invariant")
        few = -1 if uncut else chunks.FEW_QUERIES
        with mock.patch.object(chunks, "FEW_QUERIES", few):
            plan, segments = _plan_and_segments(batch, options | changes)
        if c.max_segments and segments > c.max_segments:
            continue
        gathered, items = plan.q_tokens.numel(), plan.work.shape[0]
        if (
            gathered <= c.max_gathered
            and items <= c.max_items
            and plan.num_partial_tokens <= c.max_partials
        ):
            return plan, attempt > 0
    return None, True


def _plan_and_segments(batch: Batch, options: dict[str, Any]) -> tuple[Plan, int]:
    segments = batch._plan(**options | {"fold": False}).member_rows.numel()
    return batch._plan(**options), segments
