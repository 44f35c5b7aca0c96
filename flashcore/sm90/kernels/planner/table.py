"""Step 6 of the plan: splits, the group table, members, places in the merge lists and in the work
list. Only the lists themselves, which may be long, are left to step 7.

One CTA cuts the groups; then three work side by side, none reading what another writes: members
(`place_members`), groups and work items (`place_items`), merge lists and counts (`place_results`).
"""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64, const_expr

from flashcore.contract.counts import Count, Fault, Seen, Stat
from flashcore.contract.operands import PlannerMemory as Scratch
from flashcore.contract.operands import PlannerProblem as Problem
from flashcore.contract.operands import PlannerResult as Plan
from flashcore.contract.scratch import Entries as E
from flashcore.contract.scratch import Groups as G
from flashcore.contract.scratch import Rows, Sort
from flashcore.contract.scratch import Segments as S
from flashcore.contract.work import DIRECT, Group
from flashcore.planner.split import LONGEST_FIRST, Costs
from flashcore.sm90.config.planner import GROUP_THREADS
from flashcore.sm90.kernels.planner.block import (
    Shared,
    block_reduce,
    block_scan,
    block_scans,
    block_sums,
    sort_pairs,
)
from flashcore.sm90.kernels.planner.costs import split_share, token_cost
from flashcore.sm90.kernels.planner.groups import queries_of, row_blocks
from flashcore.sm90.kernels.planner.layout import is_active
from flashcore.sm90.kernels.planner.owners import chunk_pages


@cute.jit
def cut_groups(
    plan: Plan, scratch: Scratch, problem: Problem, num_groups: Int32, share: Int64, costs: Costs,
    shared: Shared, chunks: cutlass.Constexpr[bool],
):  # fmt: skip
    """`split.split_pages` of each group, or a chunk; the whole run where `share` is 0.

    Returns gathered tokens, partial tokens and work items, in 64 bits: they may be too many.
    """
    tid, _, _ = cute.arch.thread_idx()
    unit = Int64(problem.split_unit // problem.page_tokens)
    gathered, partials, items = Int64(0), Int64(0), Int64(0)
    for h in cutlass.range(tid, num_groups, GROUP_THREADS, unroll=1):
        pages, queries = (
            Int64(plan.groups[h, int(Group.NUM_ENTRIES)]),
            plan.groups[h, int(Group.NUM_Q)],
        )
        blocks = Int64(row_blocks(problem, queries))
        per_split = pages
        if share > 0:
            if const_expr(chunks):
                row = scratch.entries[E.ROW, plan.groups[h, int(Group.ENTRY)]]
                per_split = min(pages, Int64(chunk_pages(plan, problem, row)))
            else:
                tokens = share * blocks // token_cost(blocks, costs)
                length = (tokens // Int64(problem.split_unit) + 1) * unit
                splits = (4 * pages + 3 * length - 1) // (4 * length)
                splits = splits if splits > 1 else Int64(1)
                per_split = (pages + splits - 1) // splits
                per_split = (per_split + unit - 1) // unit * unit
        plan.groups[h, int(Group.SPLIT_ENTRIES)] = per_split.to(Int32)
        splits = (pages + per_split - 1) // per_split
        plan.groups[h, int(Group.NUM_SPLITS)] = splits.to(Int32)
        gathered = gathered + Int64(queries)
        if is_direct(plan, scratch, h) == 0:
            partials = partials + splits * Int64(queries)
        items = items + splits * blocks * Int64(problem.kv_heads)
    sums = block_sums((gathered, partials, items), shared.wide)
    return sums[0], sums[1], sums[2]


@cute.jit
def find_company(scratch: Scratch, num_kept: Int32):
    """Mark groups with a member whose row has other segments: their results are merged."""
    tid, _, _ = cute.arch.thread_idx()
    segments = scratch.segments
    for k in cutlass.range(tid, num_kept, GROUP_THREADS, unroll=1):
        row = segments[S.KEPT_ROW, k]
        company = Int32(0)
        if k > 0:
            if segments[S.KEPT_ROW, k - 1] == row:
                company = Int32(1)
        if k + 1 < num_kept:
            if segments[S.KEPT_ROW, k + 1] == row:
                company = Int32(1)
        if company == 1:
            scratch.found[G.MERGED, segments[S.KEPT_GROUP, k]] = Int32(1)


@cute.jit
def is_direct(plan: Plan, scratch: Scratch, h: Int32):
    """Whether a group's results are all there is to its query tokens: 0 or 1."""
    direct = Int32(0)
    if plan.groups[h, int(Group.NUM_SPLITS)] == 1 and scratch.found[G.MERGED, h] == 0:
        direct = Int32(1)
    return direct


@cute.jit
def tokens_read(plan: Plan, num_groups: Int32):
    """KV tokens of this thread's groups, in 64 bits."""
    tid, _, _ = cute.arch.thread_idx()
    tokens = Int64(0)
    for h in cutlass.range(tid, num_groups, GROUP_THREADS, unroll=1):
        tokens = tokens + Int64(plan.groups[h, int(Group.NUM_TOKENS)])
    return tokens


@cute.jit
def place_groups(
    plan: Plan, scratch: Scratch, num_groups: Int32, longest: Int32, problem: Problem,
    shared: Shared,
):  # fmt: skip
    """First member, gathered token and partial token of each group, and its two classes of items.

    Where there are too many partial tokens the sums are wrong, and `place_results` says so.
    """
    tid, _, _ = cute.arch.thread_idx()
    members_before, queries_before, partials_before = Int32(0), Int32(0), Int32(0)
    for base in cutlass.range(0, num_groups, GROUP_THREADS, unroll=1):
        h = base + tid
        members, queries, partial, direct = Int32(0), Int32(0), Int32(0), Int32(0)
        if h < num_groups:
            members = plan.member_offsets[h]
            queries = plan.groups[h, int(Group.NUM_Q)]
            splits = plan.groups[h, int(Group.NUM_SPLITS)]
            direct = is_direct(plan, scratch, h)
            if direct == 0:
                partial = splits * queries
            enter_classes(plan, scratch, problem, h, splits, longest)
        before, totals = block_scans((members, queries, partial), shared.sums)
        if h < num_groups:
            plan.member_offsets[h] = members_before + before[0]
            plan.groups[h, int(Group.Q_BEGIN)] = queries_before + before[1]
            first = partials_before + before[2]
            plan.groups[h, int(Group.PARTIAL)] = first if direct == 0 else Int32(DIRECT)
        members_before = members_before + totals[0]
        queries_before = queries_before + totals[1]
        partials_before = partials_before + totals[2]
    if tid == 0:
        plan.member_offsets[num_groups] = members_before
    cute.arch.sync_threads()


@cute.jit
def enter_classes(
    plan: Plan, scratch: Scratch, problem: Problem, h: Int32, splits: Int32, longest: Int32
):
    """Two classes of work items, to be sorted longest first: class 2 h, the splits of group h but
    the last, and class 2 h + 1, its last split. Items of a class have one length and stay together.
    """
    full = plan.groups[h, int(Group.SPLIT_ENTRIES)] * problem.page_tokens
    last = plan.groups[h, int(Group.NUM_TOKENS)] - (splits - 1) * full
    full = full if splits > 1 else last
    weight = order_weight(plan, problem, h)
    scratch.classes[Sort.KEY, 2 * h] = longest - weight * full
    scratch.classes[Sort.VALUE, 2 * h] = 2 * h
    scratch.classes[Sort.KEY, 2 * h + 1] = longest - weight * last
    scratch.classes[Sort.VALUE, 2 * h + 1] = 2 * h + 1


@cute.jit
def order_weight(plan: Plan, problem: Problem, h: Int32):
    """How often a token of this group's items counts in the order of the work list."""
    blocks = row_blocks(problem, plan.groups[h, int(Group.NUM_Q)])
    return Int32(LONGEST_FIRST) if blocks > 1 else Int32(1)


@cute.jit
def run_lengths(plan: Plan, problem: Problem, num_groups: Int32, shared: Shared):
    """No split has more tokens than the first number, and none fewer than the second, as the order
    of the work list counts them."""
    tid, _, _ = cute.arch.thread_idx()
    longest, shortest = Int32(0), Int32(2**31 - 1)
    for h in cutlass.range(tid, num_groups, GROUP_THREADS, unroll=1):
        full = plan.groups[h, int(Group.SPLIT_ENTRIES)] * problem.page_tokens
        splits = plan.groups[h, int(Group.NUM_SPLITS)]
        last = plan.groups[h, int(Group.NUM_TOKENS)] - (splits - 1) * full
        weight = order_weight(plan, problem, h)
        longest, shortest = max(longest, weight * full), min(shortest, weight * last)
    found = block_reduce((longest, shortest), ("max", "min"), shared.sums)
    return found[0], found[1]


@cute.jit
def place_classes(
    plan: Plan, scratch: Scratch, problem: Problem, num_groups: Int32, largest: Int32,
    shared: Shared,
):  # fmt: skip
    """Sort the classes, whose keys are at most `largest`; first work item of each. Returns the
    buffer they are in."""
    tid, _, _ = cute.arch.thread_idx()
    buffer = sort_pairs(scratch.classes, 2 * num_groups, largest, shared)
    items_before = Int32(0)
    for base in cutlass.range(0, 2 * num_groups, GROUP_THREADS, unroll=1):
        i = base + tid
        items = Int32(0)
        if i < 2 * num_groups:
            which = scratch.classes[2 * buffer + Sort.VALUE, i]
            h = which >> 1
            splits = plan.groups[h, int(Group.NUM_SPLITS)]
            blocks = row_blocks(problem, plan.groups[h, int(Group.NUM_Q)])
            items = (Int32(1) if (which & 1) == 1 else splits - 1) * blocks * problem.kv_heads
        begin, all_items = block_scan(items, shared.sums)
        if i < 2 * num_groups:
            scratch.classes[Sort.ITEM_BEGIN, i] = items_before + begin
        items_before = items_before + all_items
    cute.arch.sync_threads()
    return buffer


@cute.jit
def place_members(plan: Plan, scratch: Scratch, num_kept: Int32, num_groups: Int32, shared: Shared):
    """Members in the order of groups, within a group in that of segments; their first gathered
    tokens."""
    tid, _, _ = cute.arch.thread_idx()
    segments = scratch.segments
    for k in cutlass.range(tid, num_kept, GROUP_THREADS, unroll=1):
        scratch.members[Sort.KEY, k] = segments[S.KEPT_GROUP, k]
        scratch.members[Sort.VALUE, k] = k
    cute.arch.sync_threads()
    largest = num_groups - 1 if num_groups > 0 else Int32(0)
    buffer = sort_pairs(scratch.members, num_kept, largest, shared)
    queries_before = Int32(0)
    for base in cutlass.range(0, num_kept, GROUP_THREADS, unroll=1):
        i = base + tid
        k, row, queries = Int32(0), Int32(0), Int32(0)
        if i < num_kept:
            k = scratch.members[2 * buffer + Sort.VALUE, i]
            row = segments[S.KEPT_ROW, k]
            queries = queries_of(plan, row)
        begin, all_queries = block_scan(queries, shared.sums)
        if i < num_kept:
            segments[S.Q_BEGIN, k] = queries_before + begin
            segments[S.MEMBER_BEGIN, i] = queries_before + begin
            plan.member_rows[i] = row
            plan.member_starts[i] = segments[S.KEPT_START, k]
        queries_before = queries_before + all_queries
    cute.arch.sync_threads()


@cute.jit
def place_splits(plan: Plan, scratch: Scratch, num_kept: Int32, shared: Shared):
    """Splits before each segment, and the stretch of segments of each row; how many splits."""
    tid, _, _ = cute.arch.thread_idx()
    segments, rows = scratch.segments, scratch.rows
    splits_before = Int32(0)
    for base in cutlass.range(0, num_kept, GROUP_THREADS, unroll=1):
        k = base + tid
        splits, row = Int32(0), Int32(0)
        if k < num_kept:
            row = segments[S.KEPT_ROW, k]
            splits = plan.groups[segments[S.KEPT_GROUP, k], int(Group.NUM_SPLITS)]
            before, after = Int32(-1), Int32(-1)
            if k > 0:
                before = segments[S.KEPT_ROW, k - 1]
            if k + 1 < num_kept:
                after = segments[S.KEPT_ROW, k + 1]
            if before != row:
                rows[Rows.FIRST_SEGMENT, row] = k
            if after != row:
                rows[Rows.END_SEGMENT, row] = k + 1
        begin, all_splits = block_scan(splits, shared.sums)
        if k < num_kept:
            segments[S.SPLITS_BEFORE, k] = splits_before + begin
        splits_before = splits_before + all_splits
    cute.arch.sync_threads()
    return splits_before


@cute.jit
def place_lists(
    plan: Plan, scratch: Scratch, problem: Problem, batch: Int32, num_kept: Int32,
    num_splits: Int32, failed: Int32, shared: Shared,
):  # fmt: skip
    """Length of each sequence's merge lists and where they begin; sequences with a fault get lists
    of one element. Returns the elements of all lists, the longest query, and all faults."""
    tid, _, _ = cute.arch.thread_idx()
    rows = scratch.rows
    elements_before, longest, faults = Int32(0), Int32(0), Int32(0)
    for base in cutlass.range(0, batch, GROUP_THREADS, unroll=1):
        b = base + tid
        elements, length = Int32(0), Int32(0)
        if b < batch:
            queries = queries_of(plan, b)
            longest = longest if longest > queries else queries
            fault = close_row(plan, scratch, problem, b, queries, failed)
            faults = faults | fault
            first, end = rows[Rows.FIRST_SEGMENT, b], rows[Rows.END_SEGMENT, b]
            if fault != 0:
                length = Int32(1)
            elif end > first:
                after = num_splits
                if end < num_kept:
                    after = scratch.segments[S.SPLITS_BEFORE, end]
                length = after - scratch.segments[S.SPLITS_BEFORE, first]
            elements = length * queries
        begin, all_elements = block_scan(elements, shared.sums)
        if b < batch:
            rows[Rows.LIST_LENGTH, b] = length
            rows[Rows.MERGE_BEGIN, b] = elements_before + begin
        elements_before = elements_before + all_elements
    found = block_reduce((longest, faults), ("max", "or"), shared.sums)
    return elements_before, found[0], found[1]


@cute.jit
def close_row(
    plan: Plan, scratch: Scratch, problem: Problem, b: Int32, queries: Int32, failed: Int32
):
    """Write what is wrong with a sequence, and leave PAGE_FAULT as the next update wants it."""
    rows = scratch.rows
    fault = rows[Rows.FAULTS, b]
    if rows[Rows.PAGE_FAULT, b] != 0:
        fault = fault | int(Fault.PAGE)
        rows[Rows.PAGE_FAULT, b] = Int32(0)
    if failed != 0 and queries > 0:
        fault = fault | int(Fault.PLAN)
    if fault != 0:
        plan.kv_lens[b] = Int32(0)
        if problem.seen != 0:
            seen_words(problem)[int(Seen.SEQUENCE)] = b
    plan.bad[b] = fault
    return fault


@cute.jit
def seen_words(problem: Problem):
    """`Seen`, on the host. Kernels alone write it, one after the other, and only after a fault."""
    at = cute.make_ptr(Int32, problem.seen, cute.AddressSpace.gmem, assumed_align=4)
    return cute.make_tensor(at, cute.make_layout(int(Seen.SIZE)))


@cute.jit
def clear_rows(plan: Plan, scratch: Scratch, batch: Int32):
    """No sequence has segments yet. Returns KV tokens of this thread's sequences that take part, in
    64 bits."""
    tid, _, _ = cute.arch.thread_idx()
    rows = scratch.rows
    tokens = Int64(0)
    for b in cutlass.range(tid, batch, GROUP_THREADS, unroll=1):
        rows[Rows.FIRST_SEGMENT, b] = Int32(0)
        rows[Rows.END_SEGMENT, b] = Int32(0)
        if is_active(plan, scratch, b):
            tokens = tokens + Int64(plan.kv_lens[b])
    return tokens


@cute.jit
def cut(
    plan: Plan, scratch: Scratch, problem: Problem, num_groups: Int32, num_kept: Int32,
    split: Int32, shared: Shared, chunks: cutlass.Constexpr[bool],
):  # fmt: skip
    """What all three of the others need: splits (`split` 0: none), which groups' results are
    merged, and how much there is of each list. Returns 1 where all of it fits, else 0."""
    tid, _, _ = cute.arch.thread_idx()
    share, costs = Int64(split), Costs(Int64(1), Int64(0))
    if const_expr(not chunks):
        share, costs = split_share(plan, problem, num_groups, shared)
        share = share if split == 1 else Int64(0)
    find_company(scratch, num_kept)
    cute.arch.sync_threads()
    gathered, partials, items = cut_groups(
        plan, scratch, problem, num_groups, share, costs, shared, chunks
    )
    fits = Int32(1)
    if plan.counts[int(Count.SEGMENTS)] > plan.member_rows.shape[0]:
        fits = Int32(0)
    if gathered > Int64(plan.q_tokens.shape[0]) or items > Int64(plan.work.shape[0]):
        fits = Int32(0)
    # Merge lists have at most one element besides for each query token, and room for it.
    if partials > Int64(plan.merge_partials.shape[0]) - Int64(plan.q_index.shape[0]):
        fits = Int32(0)
    if tid == 0:
        there = Int64(fits)
        plan.counts[int(Count.GROUPS)] = num_groups
        plan.counts[int(Count.MEMBERS)] = num_kept
        plan.counts[int(Count.GATHERED)] = (gathered * there).to(Int32)
        plan.counts[int(Count.PARTIALS)] = (partials * there).to(Int32)
        plan.counts[int(Count.ITEMS)] = (items * there).to(Int32)
        plan.counts[int(Count.FITS)] = fits
    return fits


@cute.jit
def place_items(plan: Plan, scratch: Scratch, problem: Problem, num_groups: Int32, shared: Shared):
    """The group table, and where the work items of each class begin."""
    tid, _, _ = cute.arch.thread_idx()
    longest, shortest = run_lengths(plan, problem, num_groups, shared)
    place_groups(plan, scratch, num_groups, longest, problem, shared)
    buffer = place_classes(plan, scratch, problem, num_groups, longest - shortest, shared)
    if tid == 0:
        plan.counts[int(Count.CLASSES)] = buffer


@cute.jit
def place_results(
    plan: Plan, scratch: Scratch, problem: Problem, batch: Int32, num_groups: Int32,
    num_kept: Int32, shared: Shared,
):  # fmt: skip
    """Merge lists, and all counts; nothing of the lists where one does not fit."""
    tid, _, _ = cute.arch.thread_idx()
    # Before lengths are taken back for faults, and before segments are entered.
    mine = (clear_rows(plan, scratch, batch), tokens_read(plan, num_groups))
    tokens = block_sums(mine, shared.wide)
    num_splits = place_splits(plan, scratch, num_kept, shared)
    fits = plan.counts[int(Count.FITS)]
    merge, longest, faults = place_lists(
        plan, scratch, problem, batch, num_kept, num_splits, 1 - fits, shared
    )
    if tid == 0 and faults != 0 and problem.seen != 0:
        seen = seen_words(problem)
        seen[int(Seen.UPDATES)] = seen[int(Seen.UPDATES)] + 1
        seen[int(Seen.FAULTS)] = seen[int(Seen.FAULTS)] | faults
    if tid == 0:
        kept = Int64(fits)
        counts = plan.counts
        counts[int(Count.TOTAL_Q)] = plan.q_offsets[batch]
        counts[int(Count.MERGE)] = merge
        counts[int(Count.MAX_Q_LEN)] = longest
        counts[int(Count.FAULTS)] = faults
        stats = plan.stats
        stats[int(Stat.TOKENS_UNIQUE)] = stats[int(Stat.TOKENS_UNIQUE)] * kept
        stats[int(Stat.TOKENS_ONCE)] = tokens[1] * kept
        stats[int(Stat.TOKENS_PER_SEQUENCE)] = tokens[0] * kept
        stats[int(Stat.NUM_GROUPS)] = Int64(num_groups) * kept
        stats[int(Stat.NUM_FOLDED)] = Int64(counts[int(Count.FOUND)] - num_groups) * kept
        stats[int(Stat.UNSHARED)] = stats[int(Stat.UNSHARED)] * kept
        stats[int(Stat.FAULTS)] = Int64(faults)
