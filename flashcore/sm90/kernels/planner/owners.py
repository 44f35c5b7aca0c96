"""Owners: of a page the first entry that uses it; of a chunk, the first one that is the same.

The rules are those of `planner.sharing` and, for batch-invariant plans, of `planner.chunks`. Which
chunks are the same takes two kernels between the claims and the links: every entry is compared with
its twin, then the uses of every chunk are counted.
"""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass import Int32, const_expr

from flashcore.contract.counts import Count
from flashcore.contract.operands import PlannerMemory as Scratch
from flashcore.contract.operands import PlannerProblem as Problem
from flashcore.contract.operands import PlannerResult as Plan
from flashcore.contract.scratch import Entries as E
from flashcore.contract.scratch import Slots
from flashcore.sm90.kernels.planner.block import Part
from flashcore.sm90.kernels.planner.groups import add_to, queries_of
from flashcore.sm90.kernels.planner.layout import is_active


@cute.jit
def owner_and_uses(plan: Plan, scratch: Scratch, e: Int32):
    """Owner of an entry's page, its uses, and the tokens of the page at the first of them, else 0.

    Entries that disagree on its tokens own themselves: partial counts are all there is and all
    equal, or there are none."""
    words = cute.make_rmem_tensor(const_expr(Slots.LINES), Int32)
    at = (scratch.slots.iterator + plan.cols[e] * Slots.LINES).align(16)
    cute.autovec_copy(cute.make_tensor(at, cute.make_layout(Slots.LINES)), words)
    owner, uses = words[Slots.FIRST], words[Slots.USES]
    partial, longest = words[Slots.PARTIAL_TOKENS], words[Slots.LONGEST]
    tokens = longest if owner == e else Int32(0)
    if partial != 0 and partial != uses * longest:
        owner, uses = e, Int32(1)
    return owner, uses, tokens


@cute.jit
def chunk_pages(plan: Plan, problem: Problem, row: Int32):
    """Pages of a chunk of a sequence, but for its last."""
    long = queries_of(plan, row) > problem.few_queries
    return problem.long_chunk_pages if long else problem.chunk_pages


@cute.jit
def chunk_of(plan: Plan, problem: Problem, row: Int32, e: Int32):
    """First and last entry of an entry's chunk, and whether its row has no other: 0 or 1."""
    row_begin, row_end = plan.row_offsets[row], plan.row_offsets[row + 1]
    pages = chunk_pages(plan, problem, row)
    begin = e - (e - row_begin) % pages
    last = min(begin + pages, row_end) - 1
    alone = Int32(1) if begin == row_begin and last + 1 == row_end else Int32(0)
    return begin, last, alone


@cute.jit
def twin_of_chunk(plan: Plan, scratch: Scratch, problem: Problem, row: Int32, e: Int32):
    """First entries of an entry's chunk and of the one it may be the same as, else of itself twice:
    the one that ends with the owner of its last page, if it is as long."""
    begin, last, alone = chunk_of(plan, problem, row, e)
    owner, _, _ = owner_and_uses(plan, scratch, last)
    other, other_last, other_alone = chunk_of(plan, problem, scratch.entries[E.ROW, owner], owner)
    alike = other_last == owner and other_last - other == last - begin and other_alone == alone
    return begin, other if alike else begin


@cute.jit
def owning_chunk(plan: Plan, scratch: Scratch, problem: Problem, row: Int32, e: Int32):
    """First entries of an entry's chunk and of the chunk's owner, once all have been compared."""
    begin, twin = twin_of_chunk(plan, scratch, problem, row, e)
    return begin, twin if scratch.entries[E.DIFFERS, begin] == 0 else begin


@cute.jit
def compare_chunks(plan: Plan, scratch: Scratch, problem: Problem, part: Part):
    """Each entry compares its page with the one that stands there in its chunk's twin."""
    for e in cutlass.range(part.first, plan.counts[int(Count.NNZ)], part.stride, unroll=1):
        row = scratch.entries[E.ROW, e]
        if is_active(plan, scratch, row):
            begin, twin = twin_of_chunk(plan, scratch, problem, row, e)
            at = twin + e - begin
            same = plan.cols[at] == plan.cols[e] and plan.token_counts[at] == plan.token_counts[e]
            if not same:
                scratch.entries[E.DIFFERS, begin] = Int32(1)


@cute.jit
def count_chunks(plan: Plan, scratch: Scratch, problem: Problem, part: Part):
    """Each chunk's first entry counts as a use of its owner."""
    for e in cutlass.range(part.first, plan.counts[int(Count.NNZ)], part.stride, unroll=1):
        row = scratch.entries[E.ROW, e]
        if is_active(plan, scratch, row):
            begin, owner = owning_chunk(plan, scratch, problem, row, e)
            if begin == e:
                add_to(scratch.entries, E.CHUNK_USES, owner, Int32(1))


@cute.jit
def chunk_owner(plan: Plan, scratch: Scratch, problem: Problem, row: Int32, e: Int32):
    """Owner of an entry and its uses, by chunks."""
    begin, owner = owning_chunk(plan, scratch, problem, row, e)
    return owner + e - begin, scratch.entries[E.CHUNK_USES, owner]
