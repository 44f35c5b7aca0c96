"""The plan of a small batch by one kernel: every step of `kernel.Planner`, in one launch.

    scan the rows ─► few entries ─► one CTA takes all steps, in its shared memory
                 └─► more ────────► a cluster takes them together, a barrier after each

A step that has little to do costs what its dependent loads cost, and a kernel what its start and
its end cost; in shared memory and between barriers both are a fraction of it.
"""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64, const_expr

from flashcore.contract.counts import Count, Stat
from flashcore.contract.operands import PlannerMemory as Scratch
from flashcore.contract.operands import PlannerProblem as Problem
from flashcore.contract.operands import PlannerResult as Plan
from flashcore.contract.scratch import Entries, Groups, Rows, Segments, Sort
from flashcore.contract.work import FIELDS
from flashcore.sm90.config.planner import (
    GROUP_THREADS,
    NEAR_ENTRIES,
    SMALL_BATCH,
    SMALL_CLUSTER,
    PlannerConfig,
)
from flashcore.sm90.kernels.dsl import SmemAllocator
from flashcore.sm90.kernels.planner.block import Part, Shared, part_of_grid, shared_memory
from flashcore.sm90.kernels.planner.kernel import Planner
from flashcore.sm90.kernels.planner.layout import fill_entries, scan_rows
from flashcore.sm90.kernels.planner.owners import compare_chunks, count_chunks
from flashcore.sm90.kernels.planner.sharing import (
    claim_pages,
    mark_breaks,
    number_segments,
)

LISTS = 4  # of step 7


class SmallPlanner(Planner):
    """The plan of at most SMALL_BATCH sequences, of any lengths; the same plan."""

    @cute.jit
    def __call__(
        self,
        page_table: cute.Tensor,  # these as in `contract.operands.Planner`
        seq_lens: cute.Tensor,
        q_lens: cute.Tensor,
        source: None,  # layouts made on the device are not for this kernel
        plan: Plan,
        scratch: Scratch,
        problem: Problem,
        num_sms: Int32,
        stream,
    ):
        self.whole(page_table, seq_lens, q_lens, plan, scratch, problem).launch(
            grid=[SMALL_CLUSTER, 1, 1],
            cluster=[SMALL_CLUSTER, 1, 1],
            block=[GROUP_THREADS, 1, 1],
            stream=stream,
            min_blocks_per_mp=1,
        )

    @cute.kernel
    def whole(
        self,
        mTable: cute.Tensor,
        mSeqLens: cute.Tensor,
        mQLens: cute.Tensor,
        plan: Plan,
        scratch: Scratch,
        problem: Problem,
    ):
        tid, _, _ = cute.arch.thread_idx()
        bid, _, _ = cute.arch.block_idx()
        smem = SmemAllocator()
        shared = shared_memory(smem)
        wide = smem.allocate_tensor(Int64, cute.make_layout(const_expr(GROUP_THREADS // 32)))
        ends = smem.allocate_tensor(Int32, cute.make_layout(const_expr(SMALL_BATCH + 1)))
        near_plan = plan_in(smem, plan)
        near = scratch_in(smem, scratch, const_expr(self.config))
        if tid < SMALL_BATCH:
            near.rows[Rows.PAGE_FAULT, tid] = Int32(0)
        if tid < const_expr(int(Count.SIZE)):
            near_plan.counts[tid] = Int32(0)
        if tid < const_expr(int(Stat.SIZE)):
            near_plan.stats[tid] = Int64(0)
        cute.arch.sync_threads()
        sums = shared.sums
        nnz = scan_rows(mTable, mSeqLens, mQLens, near_plan, near, problem, ends, sums)
        if nnz <= NEAR_ENTRIES:
            if bid == 0:
                part = Part(tid, Int32(GROUP_THREADS))
                fill_entries(mTable, mSeqLens, near_plan, near, problem, ends, nnz, part)
                self.alone(mQLens.shape[0], near_plan, near, problem, shared, wide)
                copy_plan(near_plan, plan, mQLens.shape[0], nnz, part)
        else:
            scan_rows(mTable, mSeqLens, mQLens, plan, scratch, problem, ends, sums)
            part = part_of_grid(GROUP_THREADS)
            fill_entries(mTable, mSeqLens, plan, scratch, problem, ends, nnz, part)
            self.together(mQLens.shape[0], plan, scratch, problem, shared, wide)

    @cute.jit
    def alone(
        self, batch: Int32, plan: Plan, scratch: Scratch, problem: Problem, shared: Shared,
        wide: cute.Tensor,
    ):  # fmt: skip
        """Steps 2 to 7 by one CTA."""
        tid, _, _ = cute.arch.thread_idx()
        self.link_entries(plan, scratch, problem, Part(tid, Int32(GROUP_THREADS)), wide, False)
        number_segments(plan, scratch, Int32(1), shared.sums)
        meet(False)
        self.cut(plan, scratch, problem, shared)
        meet(False)
        self.place(batch, plan, scratch, problem, Int32(0), Int32(1), shared)
        meet(False)
        if tid == 0:
            self.count_update(scratch)
        threads = const_expr(GROUP_THREADS // LISTS)
        mine = Part(tid % threads, Int32(threads))
        self.emit(tid // threads, batch, plan, scratch, problem, mine)

    @cute.jit
    def together(
        self, batch: Int32, plan: Plan, scratch: Scratch, problem: Problem, shared: Shared,
        wide: cute.Tensor,
    ):  # fmt: skip
        """Steps 2 to 7 by the cluster."""
        tid, _, _ = cute.arch.thread_idx()
        bid, _, _ = cute.arch.block_idx()
        self.link_entries(plan, scratch, problem, part_of_grid(GROUP_THREADS), wide, True)
        self.number_and_cut(batch, plan, scratch, problem, shared)
        meet(True)
        if bid * GROUP_THREADS + tid == 0:
            self.count_update(scratch)
        ctas = const_expr(SMALL_CLUSTER // LISTS)
        mine = Part(bid % ctas * GROUP_THREADS + tid, Int32(const_expr(ctas * GROUP_THREADS)))
        self.emit(bid // ctas, batch, plan, scratch, problem, mine)

    @cute.jit
    def link_entries(
        self, plan: Plan, scratch: Scratch, problem: Problem, part: Part, wide: cute.Tensor,
        clustered: cutlass.Constexpr[bool],
    ):  # fmt: skip
        """Steps 2 and 3, by all that `meet`, once the entries are there."""
        chunks = const_expr(self.config.chunks)
        meet(clustered)
        claim_pages(plan, scratch, problem, part, chunks)
        meet(clustered)
        if const_expr(chunks):
            compare_chunks(plan, scratch, problem, part)
            meet(clustered)
            count_chunks(plan, scratch, problem, part)
            meet(clustered)
        mark_breaks(plan, scratch, problem, part, wide, chunks)
        meet(clustered)


@cute.jit
def meet(clustered: cutlass.Constexpr[bool]):
    """Wait for the threads of the CTA or of all CTAs of the cluster; what they wrote before can be
    seen."""
    if const_expr(clustered):
        cute.arch.cluster_arrive()
        cute.arch.cluster_wait()
    else:
        cute.arch.sync_threads()


@cute.jit
def plan_in(smem, plan: Plan) -> Plan:
    """`plan` with what later steps read in shared memory. Shapes are those of the capacities, which
    the steps compare with; of entries, groups and members there is room for NEAR_ENTRIES."""
    n, rows = NEAR_ENTRIES, SMALL_BATCH
    return Plan(
        counts=smem.allocate_tensor(Int32, cute.make_layout(int(Count.SIZE))),
        stats=smem.allocate_tensor(Int64, cute.make_layout(int(Stat.SIZE))),
        bad=line_in(smem, rows, plan.bad),
        row_offsets=line_in(smem, rows + 1, plan.row_offsets),
        kv_lens=line_in(smem, rows, plan.kv_lens),
        q_offsets=line_in(smem, rows + 1, plan.q_offsets),
        cols=line_in(smem, n, plan.cols),
        token_counts=line_in(smem, n, plan.token_counts),
        groups=cute.make_tensor(
            smem.allocate_tensor(Int32, cute.make_layout(n * FIELDS), byte_alignment=16).iterator,
            cute.make_ordered_layout((plan.groups.shape[0], FIELDS), (1, 0)),
        ),
        member_offsets=line_in(smem, n + 1, plan.member_offsets),
        member_rows=line_in(smem, n, plan.member_rows),
        member_starts=line_in(smem, n, plan.member_starts),
        decisions=plan.decisions,
        q_tokens=plan.q_tokens,
        q_positions=plan.q_positions,
        q_index=plan.q_index,
        work=plan.work,
        merge_offsets=plan.merge_offsets,
        merge_partials=plan.merge_partials,
    )


@cute.jit
def scratch_in(smem, scratch: Scratch, config: cutlass.Constexpr[PlannerConfig]) -> Scratch:
    """`scratch` in shared memory, but for what lives on: the slots of pages, and the stamp."""
    n, rows = NEAR_ENTRIES, SMALL_BATCH
    entry_lines = Entries.LINES_OF_CHUNKS if config.chunks else Entries.LINES
    return Scratch(
        slots=scratch.slots,
        entries=lines_in(smem, entry_lines, n, scratch.entries),
        segments=lines_in(smem, Segments.LINES, n, scratch.segments),
        found=lines_in(smem, Groups.LINES, n, scratch.found),
        rows=lines_in(smem, Rows.LINES, rows, scratch.rows),
        members=lines_in(smem, Sort.LINES, n, scratch.members),
        classes=lines_in(smem, Sort.LINES_OF_CLASSES, 2 * n, scratch.classes),
        tiles=scratch.tiles,
    )


@cute.jit
def line_in(smem, length: cutlass.Constexpr[int], like: cute.Tensor) -> cute.Tensor:
    """Room for `length` elements, in the shape of `like`."""
    room = smem.allocate_tensor(Int32, cute.make_layout(length))
    return cute.make_tensor(room.iterator, cute.make_layout((like.shape[0],)))


@cute.jit
def lines_in(
    smem, lines: cutlass.Constexpr[int], length: cutlass.Constexpr[int], like: cute.Tensor
) -> cute.Tensor:
    """Room for `length` elements of each line, in the shape of `like`."""
    room = smem.allocate_tensor(Int32, cute.make_layout(lines * length))
    layout = cute.make_layout((lines, like.shape[1]), stride=(length, 1))
    return cute.make_tensor(room.iterator, layout)


@cute.jit
def copy_plan(near: Plan, plan: Plan, batch: Int32, nnz: Int32, part: Part):
    """What `plan_in` put into shared memory, to where it belongs."""
    counts = near.counts
    groups, members = counts[int(Count.GROUPS)], counts[int(Count.MEMBERS)]
    copy_line(near.counts, plan.counts, Int32(int(Count.SIZE)), part)
    copy_line(near.stats, plan.stats, Int32(int(Stat.SIZE)), part)
    copy_line(near.bad, plan.bad, batch, part)
    copy_line(near.row_offsets, plan.row_offsets, batch + 1, part)
    copy_line(near.kv_lens, plan.kv_lens, batch, part)
    copy_line(near.q_offsets, plan.q_offsets, batch + 1, part)
    copy_line(near.cols, plan.cols, nnz, part)
    copy_line(near.token_counts, plan.token_counts, nnz, part)
    for i in cutlass.range(part.first, groups * FIELDS, part.stride, unroll=1):
        plan.groups[i // FIELDS, i % FIELDS] = near.groups[i // FIELDS, i % FIELDS]
    copy_line(near.member_offsets, plan.member_offsets, groups + 1, part)
    copy_line(near.member_rows, plan.member_rows, members, part)
    copy_line(near.member_starts, plan.member_starts, members, part)


@cute.jit
def copy_line(source: cute.Tensor, target: cute.Tensor, count: Int32, part: Part):
    """This thread's part of so many elements."""
    for i in cutlass.range(part.first, count, part.stride, unroll=1):
        target[i] = source[i]
