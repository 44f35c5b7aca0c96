"""Step 7 of the plan: write the lists, by a grid of CTAs that need not meet.

Each element finds its group, member or sequence by binary search in the offsets of steps 5 and 6.
"""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass import Int32, const_expr

from flashcore.contract.counts import INVALID, Count
from flashcore.contract.operands import PlannerMemory as Scratch
from flashcore.contract.operands import PlannerProblem as Problem
from flashcore.contract.operands import PlannerResult as Plan
from flashcore.contract.scratch import Rows, Sort
from flashcore.contract.scratch import Segments as S
from flashcore.contract.work import DIRECT, FIELDS, Group, Work
from flashcore.sm90.kernels.planner.block import Part, last_at_most
from flashcore.sm90.kernels.planner.groups import queries_of, row_blocks


@cute.jit
def emit_gathered(plan: Plan, scratch: Scratch, part: Part):
    """q_tokens and q_positions."""
    members = plan.counts[int(Count.MEMBERS)]
    begins = scratch.segments[S.MEMBER_BEGIN, None]
    for i in cutlass.range(part.first, plan.counts[int(Count.GATHERED)], part.stride, unroll=1):
        member = last_at_most(begins, Int32(0), members, i)
        row = plan.member_rows[member]
        token = i - begins[member]
        own = plan.kv_lens[row] - queries_of(plan, row)
        plan.q_tokens[i] = plan.q_offsets[row] + token
        plan.q_positions[i] = own + token - plan.member_starts[member]


@cute.jit
def emit_tokens(plan: Plan, scratch: Scratch, batch: Int32, part: Part):
    """q_index and merge_offsets. Places past the last query token have empty lists."""
    total = plan.counts[int(Count.TOTAL_Q)]
    for q in cutlass.range(part.first, plan.merge_offsets.shape[0], part.stride, unroll=1):
        begin, token = plan.counts[int(Count.MERGE)], Int32(0)
        if q < total:
            row = last_at_most(plan.q_offsets, Int32(0), batch, q)
            token = q - plan.q_offsets[row]
            begin = (
                scratch.rows[Rows.MERGE_BEGIN, row] + token * scratch.rows[Rows.LIST_LENGTH, row]
            )
        plan.merge_offsets[q] = begin
        if q < plan.q_index.shape[0]:
            plan.q_index[q] = token


@cute.jit
def emit_merge(plan: Plan, scratch: Scratch, batch: Int32, part: Part):
    """merge_partials."""
    segments, rows = scratch.segments, scratch.rows
    begins, splits_before = rows[Rows.MERGE_BEGIN, None], segments[S.SPLITS_BEFORE, None]
    for i in cutlass.range(part.first, plan.counts[int(Count.MERGE)], part.stride, unroll=1):
        row = last_at_most(begins, Int32(0), batch, i)
        partial = Int32(INVALID)
        if plan.bad[row] == 0:
            length = rows[Rows.LIST_LENGTH, row]
            place = i - begins[row]
            token = place // length
            k = rows[Rows.FIRST_SEGMENT, row]
            place = place - token * length + splits_before[k]
            k = last_at_most(splits_before, k, rows[Rows.END_SEGMENT, row], place)
            h = segments[S.KEPT_GROUP, k]
            partial = plan.groups[h, int(Group.PARTIAL)]
            if partial != DIRECT:
                split = place - splits_before[k]
                gathered = segments[S.Q_BEGIN, k] + token - plan.groups[h, int(Group.Q_BEGIN)]
                partial = partial + split * plan.groups[h, int(Group.NUM_Q)] + gathered
        plan.merge_partials[i] = partial


@cute.jit
def emit_work(plan: Plan, scratch: Scratch, problem: Problem, part: Part):
    """The work list."""
    classes = 2 * plan.counts[int(Count.GROUPS)]
    values = 2 * plan.counts[int(Count.CLASSES)] + Sort.VALUE
    begins = scratch.classes[Sort.ITEM_BEGIN, None]
    for i in cutlass.range(part.first, plan.counts[int(Count.ITEMS)], part.stride, unroll=1):
        place = last_at_most(begins, Int32(0), classes, i)
        which = scratch.classes[values, place]
        h = which >> 1
        words = cute.make_rmem_tensor(const_expr(FIELDS), Int32)
        group = cute.make_tensor(
            (plan.groups.iterator + h * FIELDS).align(16), cute.make_layout(FIELDS)
        )
        cute.autovec_copy(group, words)
        blocks = row_blocks(problem, words[int(Group.NUM_Q)])
        index = i - begins[place]
        split = index // (blocks * problem.kv_heads)
        if (which & 1) == 1:
            split = words[int(Group.NUM_SPLITS)] - 1
        item = item_of_group(problem, words, h, split, index, blocks)
        at = (plan.work.iterator + i * FIELDS).align(16)
        cute.autovec_copy(item, cute.make_tensor(at, cute.make_layout(FIELDS)))


@cute.jit
def item_of_group(
    problem: Problem, group: cute.Tensor, h: Int32, split: Int32, index: Int32, blocks: Int32
):
    """Work item number `index` of a class: row blocks vary fastest, then KV heads."""
    row = index % blocks * problem.tile_m
    first_entry = split * group[int(Group.SPLIT_ENTRIES)]
    offset = first_entry * problem.page_tokens
    tokens = group[int(Group.NUM_TOKENS)] - offset
    most = group[int(Group.SPLIT_ENTRIES)] * problem.page_tokens
    rows = group[int(Group.NUM_Q)] * problem.group_size - row
    partial = group[int(Group.PARTIAL)]
    if partial != DIRECT:
        partial = partial + split * group[int(Group.NUM_Q)] + row // problem.group_size
    item = cute.make_rmem_tensor(const_expr(FIELDS), Int32)
    item[int(Work.KV_HEAD)] = index // blocks % problem.kv_heads
    item[int(Work.ROW_BEGIN)] = group[int(Group.Q_BEGIN)] * problem.group_size + row
    item[int(Work.NUM_ROWS)] = rows if rows < problem.tile_m else problem.tile_m
    item[int(Work.ENTRY)] = group[int(Group.ENTRY)] + first_entry
    item[int(Work.NUM_TOKENS)] = tokens if tokens < most else most
    item[int(Work.KV_OFFSET)] = offset
    item[int(Work.PARTIAL)] = partial
    item[int(Work.GROUP)] = h
    return item
