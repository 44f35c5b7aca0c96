"""Steps 2 to 4 of the plan: owners of pages, links between entries, segments and groups.

The rules are those of `planner.sharing`. Entries of sequences that take no part stay where they
are and are passed over; two entries of one row are neighbours whatever lies between the rows.
"""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64, const_expr

from flashcore.contract.counts import Count, Stat
from flashcore.contract.operands import PlannerMemory as Scratch
from flashcore.contract.operands import PlannerProblem as Problem
from flashcore.contract.operands import PlannerResult as Plan
from flashcore.contract.scratch import SCAN_THREADS, UNUSED, Slots, Tiles
from flashcore.contract.scratch import Entries as E
from flashcore.contract.scratch import Groups as G
from flashcore.contract.scratch import Segments as S
from flashcore.sm90.config.planner import GROUP_THREADS
from flashcore.sm90.kernels.planner.block import Part, block_counts, block_reduce, warp_sum
from flashcore.sm90.kernels.planner.layout import is_active
from flashcore.sm90.kernels.planner.owners import chunk_owner, owner_and_uses


@cute.jit
def claim_pages(
    plan: Plan, scratch: Scratch, problem: Problem, part: Part, chunks: cutlass.Constexpr[bool]
):
    """Each entry enters itself in the slot of its page."""
    for e in cutlass.range(part.first, plan.counts[int(Count.NNZ)], part.stride, unroll=1):
        scratch.entries[E.BROKEN, e] = Int32(0)
        if const_expr(chunks):
            scratch.entries[E.DIFFERS, e] = Int32(0)
            scratch.entries[E.CHUNK_USES, e] = Int32(0)
        if is_active(plan, scratch, scratch.entries[E.ROW, e]):
            tokens = plan.token_counts[e]
            slot = scratch.slots.iterator + plan.cols[e] * Slots.LINES
            cute.arch.atomic_min(slot + Slots.FIRST, e, sem="relaxed", scope="gpu")
            cute.arch.atomic_add(slot + Slots.USES, Int32(1), sem="relaxed", scope="gpu")
            cute.arch.atomic_max(slot + Slots.LONGEST, tokens, sem="relaxed", scope="gpu")
            if tokens < problem.page_tokens:
                cute.arch.atomic_add(
                    slot + Slots.PARTIAL_TOKENS, tokens, sem="relaxed", scope="gpu"
                )


@cute.jit
def mark_breaks(
    plan: Plan, scratch: Scratch, problem: Problem, part: Part, wide: cute.Tensor,
    chunks: cutlass.Constexpr[bool],
):  # fmt: skip
    """Each entry finds its owner, and breaks the owner's run where it does not go on like it.

    wide: int64 of shared memory for each warp, in which tokens of distinct pages are added up.
    """
    tid, _, _ = cute.arch.thread_idx()
    unique = Int64(0)
    for e in cutlass.range(part.first, plan.counts[int(Count.NNZ)], part.stride, unroll=1):
        row = scratch.entries[E.ROW, e]
        owner, uses = Int32(-1), Int32(0)
        if is_active(plan, scratch, row):
            owner, uses, tokens = owner_and_uses(plan, scratch, e)
            unique = unique + Int64(tokens)
            if const_expr(chunks):
                owner, uses = chunk_owner(plan, scratch, problem, row, e)
            linked = Int32(0)
            if e + 1 < plan.row_offsets[row + 1]:
                next_owner, next_uses, _ = owner_and_uses(plan, scratch, e + 1)
                if const_expr(chunks):
                    next_owner, next_uses = chunk_owner(plan, scratch, problem, row, e + 1)
                full = plan.token_counts[e] == problem.page_tokens
                if full and next_uses == uses and next_owner == owner + 1:
                    linked = Int32(1)
                scratch.entries[E.PREVIOUS, e + 1] = owner
            if linked == 0:
                scratch.entries[E.BROKEN, owner] = Int32(1)
        scratch.entries[E.OWNER, e] = owner
    lane, warp = cute.arch.lane_idx(), cute.arch.warp_idx()
    unique = warp_sum(unique)
    if lane == 0:
        wide[warp] = unique
    cute.arch.sync_threads()
    if tid == 0:
        for w in cutlass.range_constexpr(1, const_expr(cute.size(wide))):
            unique = unique + wide[w]
        if unique > 0:
            at = plan.stats.iterator + int(Stat.TOKENS_UNIQUE)
            cute.arch.atomic_add(at, unique, sem="relaxed", scope="gpu")


@cute.jit
def begins_segment(scratch: Scratch, e: Int32, nnz: Int32):
    """Whether a segment begins at entry e, and whether it begins a group: it owns its first page.

    Returns both as 0 or 1.
    """
    segment, group = Int32(0), Int32(0)
    if e < nnz:
        owner, previous = scratch.entries[E.OWNER, e], scratch.entries[E.PREVIOUS, e]
        if owner >= 0:
            segment = Int32(1)
            if previous >= 0:
                segment = scratch.entries[E.BROKEN, previous]
            if segment == 1 and owner == e:
                group = Int32(1)
    return segment, group


@cute.jit
def number_segments(plan: Plan, scratch: Scratch, ctas: Int32, sums: cute.Tensor):
    """Segments and groups in the order of entries, by so many CTAs.

    Every CTA counts its stretch of the entries, tells the others, and waits for those before it,
    which were started no later than itself. All are counted, and those written for which there is
    room; a group has no larger number than its first segment.
    """
    tid, _, _ = cute.arch.thread_idx()
    bid, _, _ = cute.arch.block_idx()
    nnz = plan.counts[int(Count.NNZ)]
    stretch = ((nnz - 1) // (ctas * GROUP_THREADS) + 1) * GROUP_THREADS
    begin = bid * stretch
    segment, group = begins_segment(scratch, begin + tid, nnz)
    places, totals = block_counts((segment, group), sums)
    all_segments, all_groups = totals[0], totals[1]
    for offset in cutlass.range(GROUP_THREADS, stretch, GROUP_THREADS, unroll=1):
        more_segments, more_groups = begins_segment(scratch, begin + offset + tid, nnz)
        more = block_reduce((more_segments, more_groups), ("add", "add"), sums)
        all_segments, all_groups = all_segments + more[0], all_groups + more[1]
    segments_before, groups_before = exchange_counts(scratch, all_segments, all_groups, sums)
    if bid == ctas - 1 and tid == 0:
        plan.counts[int(Count.SEGMENTS)] = segments_before + all_segments
        plan.counts[int(Count.FOUND)] = groups_before + all_groups
    s, g, tile_segments, tile_groups = places[0], places[1], totals[0], totals[1]
    for offset in cutlass.range(0, stretch, GROUP_THREADS, unroll=1):
        e = begin + offset + tid
        if offset > 0:  # else all of this is known from above
            segment, group = begins_segment(scratch, e, nnz)
            places, totals = block_counts((segment, group), sums)
            s, g, tile_segments, tile_groups = places[0], places[1], totals[0], totals[1]
        there = segments_before + s < plan.member_rows.shape[0]
        if segment == 1 and there:
            scratch.segments[S.ENTRY, segments_before + s] = e
            scratch.segments[S.ROW, segments_before + s] = scratch.entries[E.ROW, e]
            scratch.segments[S.OWNER, segments_before + s] = scratch.entries[E.OWNER, e]
        if group == 1 and there:
            scratch.entries[E.GROUP, e] = groups_before + g
            clear_group(scratch, groups_before + g)
        if e < nnz:
            release_page(plan, scratch, e)
        segments_before = segments_before + tile_segments
        groups_before = groups_before + tile_groups


@cute.jit
def next_stamp(scratch: Scratch):
    """The stamp of this update."""
    return scratch.tiles[Tiles.CUT, Tiles.STAMP].to(Int32) + 1


@cute.jit
def exchange_counts(scratch: Scratch, segments: Int32, groups: Int32, sums: cute.Tensor):
    """Publish this CTA's counts and add up those of all CTAs before it."""
    tid, _, _ = cute.arch.thread_idx()
    bid, _, _ = cute.arch.block_idx()
    stamp = next_stamp(scratch)
    tiles = scratch.tiles.iterator
    if tid == 0:
        publish_count(tiles + Tiles.SEGMENTS * SCAN_THREADS + bid, stamp, segments)
        publish_count(tiles + Tiles.GROUPS * SCAN_THREADS + bid, stamp, groups)
    segments_there, groups_there = Int32(0), Int32(0)
    if tid < bid:
        segments_there = await_count(tiles + Tiles.SEGMENTS * SCAN_THREADS + tid, stamp)
        groups_there = await_count(tiles + Tiles.GROUPS * SCAN_THREADS + tid, stamp)
    before = block_reduce((segments_there, groups_there), ("add", "add"), sums)
    return before[0], before[1]


@cute.jit
def publish_count(
    at: cute.Pointer, stamp: Int32, count: Int32, order: cutlass.Constexpr[str] = "relaxed"
):
    """One word, so that whoever sees the stamp sees the count; what was written before, by
    "release"."""
    word = (Int64(stamp) << 32) | Int64(count)
    cute.arch.atomic_exch(at, word, sem=order, scope="gpu")


@cute.jit
def await_count(at: cute.Pointer, stamp: Int32, order: cutlass.Constexpr[str] = "relaxed"):
    """The count that another CTA publishes in this update; what it wrote before, by "acquire"."""
    word = cute.arch.load(at, Int64, sem=order, scope="gpu")
    while (word >> 32).to(Int32) != stamp:
        word = cute.arch.load(at, Int64, sem=order, scope="gpu")
    return (word & Int64(0x7FFFFFFF)).to(Int32)


@cute.jit
def release_page(plan: Plan, scratch: Scratch, e: Int32):
    """Leave the slot as the next update wants it; users of a page all write the same."""
    words = cute.make_rmem_tensor(const_expr(Slots.LINES), Int32)
    words.fill(0)
    words[Slots.FIRST] = Int32(UNUSED)
    at = (scratch.slots.iterator + plan.cols[e] * Slots.LINES).align(16)
    cute.autovec_copy(words, cute.make_tensor(at, cute.make_layout(Slots.LINES)))


@cute.jit
def clear_group(scratch: Scratch, g: Int32):
    """Start values of what the next step adds up."""
    for line in cutlass.range_constexpr(G.LINES):
        if const_expr(line in G.ZEROED):
            scratch.found[line, g] = Int32(0)
    scratch.found[G.LOW, g] = Int32(UNUSED)
    scratch.found[G.HIGH, g] = Int32(-1)
