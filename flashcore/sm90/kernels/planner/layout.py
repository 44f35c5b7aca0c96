"""Step 1 of the plan: page table and lengths -> the layout's entries, with every id checked."""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64, const_expr

from flashcore.contract.counts import Count, Fault, Stat
from flashcore.contract.operands import PlannerMemory as Scratch
from flashcore.contract.operands import PlannerProblem as Problem
from flashcore.contract.operands import PlannerResult as Plan
from flashcore.contract.scratch import Entries as E
from flashcore.contract.scratch import Rows
from flashcore.sm90.kernels.planner.block import Part, block_reduce, block_scans, last_at_most


@cute.jit
def row_need(
    mTable: cute.Tensor, mSeqLens: cute.Tensor, mQLens: cute.Tensor, b: Int32, problem: Problem,
    max_q: Int32,
):  # fmt: skip
    """Pages and query tokens that sequence b asks for, and what is wrong with its lengths.

    No sum can overflow: pages are at most the table's columns; query tokens at most max_q + 1, and
    so are those of all sequences before a tile.
    """
    pages, queries, faults = Int32(0), Int32(0), Int32(0)
    if b < mSeqLens.shape[0]:
        length, queries = mSeqLens[b], mQLens[b]
        if length > 0:
            pages = (length - 1) // problem.page_tokens + 1
        if length < 0 or pages > mTable.shape[1]:
            pages = Int32(0)
            faults = faults | int(Fault.LENGTH)
        if queries < 0:
            queries = Int32(0)
            faults = faults | int(Fault.QUERY_LENGTH)
        queries = queries if queries <= max_q else max_q + 1
    return pages, queries, faults


@cute.jit
def scan_rows(
    mTable: cute.Tensor, mSeqLens: cute.Tensor, mQLens: cute.Tensor, plan: Plan, scratch: Scratch,
    problem: Problem, sEnds: cute.Tensor, sums: cute.Tensor,
):  # fmt: skip
    """sEnds[b + 1]: pages of sequences 0 .. b. Every CTA finds them for itself; the first one
    writes what the plan says of sequences. Returns the entries of the sequences that fit."""
    tid, _, _ = cute.arch.thread_idx()
    bid, _, _ = cute.arch.block_idx()
    batch = mSeqLens.shape[0]
    threads = const_expr(32 * cute.size(sums, mode=[1]))
    max_entries, max_q = plan.cols.shape[0], plan.q_index.shape[0]
    pages_before, queries_before, nnz = Int32(0), Int32(0), Int32(0)
    for base in cutlass.range(0, batch, threads, unroll=1):
        b = base + tid
        pages, queries, faults = row_need(mTable, mSeqLens, mQLens, b, problem, max_q)
        before, totals = block_scans((pages, queries), sums)
        end = pages_before + before[0] + pages
        q_end = queries_before + before[1] + queries
        if b < batch:
            sEnds[b + 1] = end
            nnz = end if end <= max_entries else nnz
            if bid == 0:
                if pages > 0 and end > max_entries:
                    faults = faults | int(Fault.ENTRIES)
                if queries > 0 and q_end > max_q:
                    faults = faults | int(Fault.QUERIES)
                plan.q_offsets[b + 1] = q_end if q_end <= max_q else max_q
                plan.kv_lens[b] = mSeqLens[b] if faults == 0 else Int32(0)
                scratch.rows[Rows.FAULTS, b] = faults
        pages_before = pages_before + totals[0]
        queries_before = min(queries_before + totals[1], max_q + 1)
    if tid == 0:
        sEnds[0] = Int32(0)
        if bid == 0:
            plan.q_offsets[0] = Int32(0)
            plan.row_offsets[0] = Int32(0)
            plan.stats[int(Stat.TOKENS_UNIQUE)] = Int64(0)  # the next steps add to it
    nnz = block_reduce((nnz,), ("max",), sums)[0]
    if bid == 0:
        for b in cutlass.range(tid, batch, threads, unroll=1):
            end = sEnds[b + 1]
            plan.row_offsets[b + 1] = end if end < nnz else nnz
        if tid == 0:
            plan.counts[int(Count.NNZ)] = nnz
    return nnz


@cute.jit
def fill_entries(
    mTable: cute.Tensor, mSeqLens: cute.Tensor, plan: Plan, scratch: Scratch, problem: Problem,
    sEnds: cute.Tensor, nnz: Int32, part: Part,
):  # fmt: skip
    """Pages and token counts, by CTAs that need not meet. An id out of range becomes page 0 of a
    sequence marked as bad."""
    batch = mSeqLens.shape[0]
    for e in cutlass.range(part.first, nnz, part.stride, unroll=1):
        row = last_at_most(sEnds, Int32(0), batch, e)
        column = e - sEnds[row]
        page = mTable[row, column]
        left = mSeqLens[row] - column * problem.page_tokens
        if page < 0 or page >= problem.num_pages:
            page = Int32(0)
            scratch.rows[Rows.PAGE_FAULT, row] = Int32(1)
        plan.cols[e] = page
        plan.token_counts[e] = left if left < problem.page_tokens else problem.page_tokens
        scratch.entries[E.ROW, e] = row
        scratch.entries[E.START, e] = column * problem.page_tokens
        if column == 0:
            scratch.entries[E.PREVIOUS, e] = Int32(-1)


@cute.jit
def is_active(plan: Plan, scratch: Scratch, row: Int32):
    """Whether the sequence takes part: it has queries and nothing is wrong with it."""
    queries = plan.q_offsets[row + 1] - plan.q_offsets[row]
    faults = scratch.rows[Rows.FAULTS, row] + scratch.rows[Rows.PAGE_FAULT, row]
    return queries > 0 and faults == 0
