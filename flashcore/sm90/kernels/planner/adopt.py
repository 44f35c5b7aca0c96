"""Step 1 of the plan where a pager on the device has made the layout: take it over."""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64

from flashcore.contract.counts import Count, Fault, PagerCount, Stat
from flashcore.contract.operands import PlannerMemory as Scratch
from flashcore.contract.operands import PlannerResult as Plan
from flashcore.contract.operands import PlannerSource as Source
from flashcore.contract.scratch import SCAN_THREADS, Rows
from flashcore.contract.scratch import Entries as E
from flashcore.sm90.kernels.planner.block import block_scan


@cute.jit
def adopt_layout(
    mQLens: cute.Tensor, source: Source, plan: Plan, scratch: Scratch, sums: cute.Tensor
):
    """Entries of the sequences that the plan has, and by the first CTA what it says of these."""
    tid, _, _ = cute.arch.thread_idx()
    bid, _, _ = cute.arch.block_idx()
    grid, _, _ = cute.arch.grid_dim()
    batch, there = mQLens.shape[0], source.counts[int(PagerCount.BATCH)]
    nnz = source.row_offsets[batch if batch < there else there]
    if bid == 0:
        adopt_rows(mQLens, source, plan, scratch, there, nnz, sums)
    for e in cutlass.range(bid * SCAN_THREADS + tid, nnz, grid * SCAN_THREADS, unroll=1):
        start = source.starts[e]
        plan.cols[e] = source.cols[e]
        plan.token_counts[e] = source.token_counts[e]
        scratch.entries[E.ROW, e] = source.rows[e]
        scratch.entries[E.START, e] = start
        if start == 0:
            scratch.entries[E.PREVIOUS, e] = Int32(-1)


@cute.jit
def adopt_rows(
    mQLens: cute.Tensor, source: Source, plan: Plan, scratch: Scratch, there: Int32, nnz: Int32,
    sums: cute.Tensor,
):  # fmt: skip
    """Offsets, lengths and faults of all sequences; those that the layout lacks have a fault."""
    tid, _, _ = cute.arch.thread_idx()
    batch, max_q = mQLens.shape[0], plan.q_index.shape[0]
    queries_before = Int32(0)
    for base in cutlass.range(0, batch, SCAN_THREADS, unroll=1):
        b = base + tid
        queries, faults, length, end = Int32(0), Int32(int(Fault.LENGTH)), Int32(0), nnz
        if b < there:
            faults, length, end = source.bad[b], source.kv_lens[b], source.row_offsets[b + 1]
        if b < batch:
            queries = mQLens[b]
            if queries < 0:
                queries = Int32(0)
                faults = faults | int(Fault.QUERY_LENGTH)
            queries = queries if queries <= max_q else max_q + 1
        before, all_queries = block_scan(queries, sums)
        q_end = queries_before + before + queries
        if b < batch:
            if queries > 0 and q_end > max_q:
                faults = faults | int(Fault.QUERIES)
            plan.q_offsets[b + 1] = q_end if q_end <= max_q else max_q
            plan.row_offsets[b + 1] = end
            plan.kv_lens[b] = length if faults == 0 else Int32(0)
            scratch.rows[Rows.FAULTS, b] = faults
        queries_before = min(queries_before + all_queries, max_q + 1)
    if tid == 0:
        plan.q_offsets[0] = Int32(0)
        plan.row_offsets[0] = Int32(0)
        plan.counts[int(Count.NNZ)] = nnz
        plan.stats[int(Stat.TOKENS_UNIQUE)] = Int64(0)  # the next steps add to it
