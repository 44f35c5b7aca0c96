"""Step 5 of the plan, by one CTA: groups as found and what folding decides about them.

The rules are those of `planner.folding`.
"""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64

from flashcore.contract.counts import Count
from flashcore.contract.operands import PlannerMemory as Scratch
from flashcore.contract.operands import PlannerProblem as Problem
from flashcore.contract.operands import PlannerResult as Plan
from flashcore.contract.reasons import Reason
from flashcore.contract.scratch import Entries as E
from flashcore.contract.scratch import Groups as G
from flashcore.contract.scratch import Segments as S
from flashcore.contract.scratch import State
from flashcore.contract.work import Group
from flashcore.sm90.config.planner import GROUP_THREADS
from flashcore.sm90.kernels.planner.block import (
    Shared,
    block_any,
    block_counts,
    block_sum,
    block_sums,
)
from flashcore.sm90.kernels.planner.layout import is_active


@cute.jit
def queries_of(plan: Plan, row: Int32):
    """Query tokens of a sequence."""
    return plan.q_offsets[row + 1] - plan.q_offsets[row]


@cute.jit
def row_blocks(problem: Problem, queries: Int32):
    """Work items that the packed query rows of a group need."""
    return (queries * problem.group_size + problem.tile_m - 1) // problem.tile_m


@cute.jit
def segment_end(plan: Plan, scratch: Scratch, s: Int32, num_segments: Int32):
    """Entry after segment s, and whether its row ends with it."""
    row = scratch.segments[S.ROW, s]
    end, last = plan.row_offsets[row + 1], Int32(1)
    if s + 1 < num_segments:
        if scratch.segments[S.ROW, s + 1] == row:
            end, last = scratch.segments[S.ENTRY, s + 1], Int32(0)
    return end, last


@cute.jit
def collect_groups(plan: Plan, scratch: Scratch, problem: Problem, num_segments: Int32):
    """Sums over the members of each group, and the groups before it."""
    tid, _, _ = cute.arch.thread_idx()
    segments, found = scratch.segments, scratch.found
    for s in cutlass.range(tid, num_segments, GROUP_THREADS, unroll=1):
        entry, row, owner = segments[S.ENTRY, s], segments[S.ROW, s], segments[S.OWNER, s]
        g = scratch.entries[E.GROUP, owner]
        end, last = segment_end(plan, scratch, s, num_segments)
        before = Int32(-1)
        if s > 0:
            if segments[S.ROW, s - 1] == row:
                before = scratch.entries[E.GROUP, segments[S.OWNER, s - 1]]
        segments[S.GROUP, s] = g
        add_to(found, G.MEMBERS, g, Int32(1))
        add_to(found, G.QUERIES, g, queries_of(plan, row))
        low, high = line_of(found, G.LOW, g), line_of(found, G.HIGH, g)
        cute.arch.atomic_min(low, before, sem="relaxed", scope="gpu")
        cute.arch.atomic_max(high, before, sem="relaxed", scope="gpu")
        if last == 1:
            found[G.ENDS, g] = Int32(1)
        if owner == entry:
            tokens = (end - 1 - entry) * problem.page_tokens + plan.token_counts[end - 1]
            found[G.ENTRIES, g] = end - entry
            found[G.TOKENS, g] = tokens


@cute.jit
def line_of(matrix: cute.Tensor, line: cutlass.Constexpr[int], index: Int32):
    """Address of an element of a line."""
    return matrix.iterator + cute.crd2idx((line, index), matrix.layout)


@cute.jit
def add_to(matrix: cute.Tensor, line: cutlass.Constexpr[int], index: Int32, value: Int32):
    """Atomic addition to an element of a line."""
    cute.arch.atomic_add(line_of(matrix, line, index), value, sem="relaxed", scope="gpu")


@cute.jit
def parent_of(scratch: Scratch, g: Int32):
    """The group just before a group in all of its members, or -1."""
    low = scratch.found[G.LOW, g]
    return low if low == scratch.found[G.HIGH, g] else Int32(-1)


@cute.jit
def find_parents(scratch: Scratch, problem: Problem, num_found: Int32):
    """Parent of each group; what it has of children."""
    tid, _, _ = cute.arch.thread_idx()
    found = scratch.found
    for g in cutlass.range(tid, num_found, GROUP_THREADS, unroll=1):
        parent = parent_of(scratch, g)
        found[G.PARENT, g] = parent
        if parent >= 0:
            add_to(found, G.CHILDREN, parent, Int32(1))
            blocks = row_blocks(problem, found[G.QUERIES, g])
            add_to(found, G.CHILD_BLOCKS, parent, blocks)


@cute.jit
def find_strays(scratch: Scratch, num_segments: Int32):
    """Mark groups that some following group has not as its parent."""
    tid, _, _ = cute.arch.thread_idx()
    segments, found = scratch.segments, scratch.found
    for s in cutlass.range(tid, num_segments - 1, GROUP_THREADS, unroll=1):
        if segments[S.ROW, s] == segments[S.ROW, s + 1]:
            g = segments[S.GROUP, s]
            if parent_of(scratch, segments[S.GROUP, s + 1]) != g:
                found[G.STRAYS, g] = Int32(1)


@cute.jit
def judge_groups(plan: Plan, scratch: Scratch, problem: Problem, kv_cost: Int32, num_found: Int32):
    """Reasons before any fold; small groups that may be folded stay undecided.

    Returns, of this thread's groups, what those that are worth it save, and how many are undecided.
    """
    tid, _, _ = cute.arch.thread_idx()
    found = scratch.found
    gains, undecided = Int64(0), Int64(0)
    for g in cutlass.range(tid, num_found, GROUP_THREADS, unroll=1):
        members, tokens, children = found[G.MEMBERS, g], found[G.TOKENS, g], found[G.CHILDREN, g]
        state, reason = Int32(State.KEPT), Int32(Reason.PRIVATE)
        if members > 1:
            reason = Int32(Reason.KEPT_ALL)
            if problem.fold != 0:
                state, reason = Int32(State.WORTH), Int32(Reason.KEPT)
                saves = gain(scratch, problem, kv_cost, g, tokens)
                small = saves <= 0
                if small:
                    state = Int32(State.UNDECIDED)
                if found[G.STRAYS, g] != 0:
                    state = Int32(State.KEPT)
                    reason = Int32(Reason.KEPT_BRANCHING) if small else reason
                if found[G.ENDS, g] != 0:
                    state = Int32(State.KEPT)
                    reason = Int32(Reason.KEPT_LAST) if small else reason
                if tokens != found[G.ENTRIES, g] * problem.page_tokens:
                    state = Int32(State.KEPT)
                    reason = Int32(Reason.KEPT_PARTIAL_PAGE) if small else reason
                gains = gains + (saves if state == State.WORTH else Int64(0))
                undecided = undecided + (Int64(1) if state == State.UNDECIDED else Int64(0))
        found[G.STATE, g] = state
        plan.decisions[g, 0] = tokens
        plan.decisions[g, 1] = members
        plan.decisions[g, 2] = children
        plan.decisions[g, 3] = reason
    return gains, undecided


@cute.jit
def gain(scratch: Scratch, problem: Problem, kv_cost: Int32, g: Int32, tokens: Int32):
    """What a group saves of reading `tokens` again, less what its partial results cost."""
    found = scratch.found
    queries = found[G.QUERIES, g]
    blocks = found[G.CHILD_BLOCKS, g] - row_blocks(problem, queries)
    again = Int64(blocks) * Int64(kv_cost) * Int64(tokens)
    return again - Int64(queries) * Int64(problem.partial_token_cost)


@cute.jit
def fold_groups(
    plan: Plan, scratch: Scratch, problem: Problem, kv_cost: Int32, num_found: Int32,
    shared: Shared,
):  # fmt: skip
    """Decide from the root down. A parent has a smaller number than its children, so groups are
    taken by GROUP_THREADS in their order, each as soon as its parent is decided.

    Returns what the groups that could be folded and are not save together."""
    tid, _, _ = cute.arch.thread_idx()
    found = scratch.found
    gains = Int64(0)
    for base in cutlass.range(0, num_found, GROUP_THREADS, unroll=1):
        g = base + tid
        waits = Int32(1) if g < num_found else Int32(0)
        waiting = Int32(1)
        while waiting != 0:
            parent, above = Int32(-1), Int32(State.KEPT)
            if waits == 1:
                parent = found[G.PARENT, g]
                if parent >= 0:
                    above = found[G.STATE, parent]
            # What was decided before this barrier is complete; nobody writes before it.
            cute.arch.sync_threads()
            if waits == 1 and above != State.UNDECIDED:
                gains = gains + decide(plan, scratch, problem, kv_cost, g, parent, above)
                waits = Int32(0)
            waiting = block_any(waits, shared.sums)
    return block_sum(gains, shared.wide)


@cute.jit
def decide(
    plan: Plan, scratch: Scratch, problem: Problem, kv_cost: Int32, g: Int32, parent: Int32,
    above: Int32,
):  # fmt: skip
    """Take over what a folded parent leaves; then fold or keep a group that may be folded. Returns
    what it saves if it is kept, else 0."""
    found = scratch.found
    extra = Int32(0)
    if above == State.FOLDED:
        extra = found[G.TOKENS, parent] + found[G.EXTRA_TOKENS, parent]
        found[G.EXTRA_TOKENS, g] = extra
        found[G.EXTRA_ENTRIES, g] = found[G.ENTRIES, parent] + found[G.EXTRA_ENTRIES, parent]
    saves, state = Int64(0), found[G.STATE, g]
    if state != State.KEPT:
        saves = gain(scratch, problem, kv_cost, g, found[G.TOKENS, g] + extra)
        if state == State.UNDECIDED:
            state = Int32(State.WORTH)
            if saves <= 0:
                saves, state = Int64(0), Int32(State.FOLDED)
                plan.decisions[g, 3] = Int32(Reason.FOLDED)
            found[G.STATE, g] = state
    return saves


@cute.jit
def number_groups(scratch: Scratch, num_found: Int32, shared: Shared):
    """New numbers of the groups that stay; how many do."""
    tid, _, _ = cute.arch.thread_idx()
    found = scratch.found
    kept_before = Int32(0)
    for base in cutlass.range(0, num_found, GROUP_THREADS, unroll=1):
        g = base + tid
        keep = Int32(0)
        if g < num_found:
            keep = Int32(0) if found[G.STATE, g] == State.FOLDED else Int32(1)
        number, kept = block_counts((keep,), shared.sums)
        if g < num_found:
            found[G.NUMBER, g] = kept_before + number[0] if keep == 1 else Int32(-1)
        kept_before = kept_before + kept[0]
    cute.arch.sync_threads()
    return kept_before


@cute.jit
def keep_segments(
    plan: Plan, scratch: Scratch, num_segments: Int32, folding: Int32, shared: Shared
):
    """Segments of the groups that stay, with the pages that folded ancestors leave them; how many.
    All stay as they are where nothing was folded.

    The owner of each group writes its run into the group table.
    """
    tid, _, _ = cute.arch.thread_idx()
    segments, found = scratch.segments, scratch.found
    kept_before = Int32(0)
    for base in cutlass.range(0, num_segments, GROUP_THREADS, unroll=1):
        s = base + tid
        g, h, place = Int32(0), Int32(-1), s
        if s < num_segments:
            g = segments[S.GROUP, s]
            h = g
        if folding != 0:
            if s < num_segments:
                h = found[G.NUMBER, g]
            before, kept = block_counts((Int32(1) if h >= 0 else Int32(0),), shared.sums)
            place = kept_before + before[0]
            kept_before = kept_before + kept[0]
        if h >= 0:
            entry, row = segments[S.ENTRY, s], segments[S.ROW, s]
            extra = found[G.EXTRA_ENTRIES, g]
            segments[S.KEPT_ROW, place] = row
            segments[S.KEPT_GROUP, place] = h
            start = scratch.entries[E.START, entry]
            segments[S.KEPT_START, place] = start - found[G.EXTRA_TOKENS, g]
            if segments[S.OWNER, s] == entry:
                plan.groups[h, int(Group.ENTRY)] = entry - extra
                plan.groups[h, int(Group.NUM_ENTRIES)] = found[G.ENTRIES, g] + extra
                plan.groups[h, int(Group.NUM_TOKENS)] = (
                    found[G.TOKENS, g] + found[G.EXTRA_TOKENS, g]
                )
                plan.groups[h, int(Group.NUM_Q)] = found[G.QUERIES, g]
                plan.member_offsets[h] = found[G.MEMBERS, g]
    cute.arch.sync_threads()
    return kept_before if folding != 0 else num_segments


@cute.jit
def find_groups(
    plan: Plan, scratch: Scratch, problem: Problem, num_segments: Int32, num_found: Int32,
    shared: Shared,
):  # fmt: skip
    """All of this step; how many groups and segments stay."""
    collect_groups(plan, scratch, problem, num_segments)
    cute.arch.sync_threads()
    find_parents(scratch, problem, num_found)
    find_strays(scratch, num_segments)
    cute.arch.sync_threads()
    # Once more, with reading again for nothing, where all groups together save too little.
    kv_cost, again, folding = problem.kv_token_cost, Int32(1), Int32(0)
    while again != 0:
        again = Int32(0)
        worth, undecided = judge_groups(plan, scratch, problem, kv_cost, num_found)
        if problem.fold != 0:
            sums = block_sums((worth, undecided), shared.wide)
            gains = sums[0]
            if sums[1] > 0:
                folding = Int32(1)
                gains = fold_groups(plan, scratch, problem, kv_cost, num_found, shared)
            if gains > 0 and gains <= Int64(problem.least_gain):
                kv_cost, again = Int32(0), Int32(1)
    num_groups = num_found
    if folding != 0:
        num_groups = number_groups(scratch, num_found, shared)
    num_kept = keep_segments(plan, scratch, num_segments, folding, shared)
    return num_groups, num_kept


@cute.jit
def unshare(plan: Plan, scratch: Scratch, problem: Problem, shared: Shared):
    """Replace all groups by those of a plan that ignores sharing: each stretch of a sequence whose
    pages, but for the last, are full. Returns how many; each is a segment too. Where there is no
    room for all, there are none, and Count.SEGMENTS says how many there would be."""
    num_stretches = number_stretches(plan, scratch, problem, shared)
    num_groups = num_stretches if num_stretches <= plan.member_rows.shape[0] else Int32(0)
    tid, _, _ = cute.arch.thread_idx()
    segments = scratch.segments
    for s in cutlass.range(tid, num_groups, GROUP_THREADS, unroll=1):
        entry, row = segments[S.ENTRY, s], segments[S.ROW, s]
        end, last = segment_end(plan, scratch, s, num_groups)
        tokens = (end - 1 - entry) * problem.page_tokens + plan.token_counts[end - 1]
        segments[S.KEPT_ROW, s] = row
        segments[S.KEPT_GROUP, s] = s
        segments[S.KEPT_START, s] = scratch.entries[E.START, entry]
        scratch.found[G.MERGED, s] = Int32(0)
        plan.groups[s, int(Group.ENTRY)] = entry
        plan.groups[s, int(Group.NUM_ENTRIES)] = end - entry
        plan.groups[s, int(Group.NUM_TOKENS)] = tokens
        plan.groups[s, int(Group.NUM_Q)] = queries_of(plan, row)
        plan.member_offsets[s] = Int32(1)
        plan.decisions[s, 0] = tokens
        plan.decisions[s, 1] = Int32(1)
        plan.decisions[s, 2] = 1 - last
        plan.decisions[s, 3] = Int32(Reason.PRIVATE)
    if tid == 0:
        plan.counts[int(Count.SEGMENTS)] = num_stretches
        plan.counts[int(Count.FOUND)] = num_groups
    cute.arch.sync_threads()
    return num_groups


@cute.jit
def number_stretches(plan: Plan, scratch: Scratch, problem: Problem, shared: Shared):
    """First entry and row of each stretch, in the order of entries; how many there are."""
    tid, _, _ = cute.arch.thread_idx()
    nnz, before = plan.counts[int(Count.NNZ)], Int32(0)
    for base in cutlass.range(0, nnz, GROUP_THREADS, unroll=1):
        e = base + tid
        begins, row = Int32(0), Int32(0)
        if e < nnz:
            row = scratch.entries[E.ROW, e]
            if is_active(plan, scratch, row):
                begins = Int32(1)
                if e > plan.row_offsets[row]:
                    if plan.token_counts[e - 1] == problem.page_tokens:
                        begins = Int32(0)
        number, found = block_counts((begins,), shared.sums)
        if begins == 1 and before + number[0] < plan.member_rows.shape[0]:
            scratch.segments[S.ENTRY, before + number[0]] = e
            scratch.segments[S.ROW, before + number[0]] = row
        before = before + found[0]
    cute.arch.sync_threads()
    return before
