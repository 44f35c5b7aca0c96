"""The planner's kernels, chained on one stream.

    layout ─► claim ─► link ─► groups ─► lists
     grid     grid     grid     grid     grid
    (adopt)  (then compare, count, for batch-invariant plans)

Each is started while the one before it runs, and waits for that one's end.

All sizes but the batch are capacities; what is there is counted on the device, so one captured
graph serves any page tables, lengths and sharing.
"""

from __future__ import annotations

import cutlass.cute as cute
from cutlass import Int32, Int64, const_expr

from flashcore.contract.counts import Count, Stat
from flashcore.contract.operands import PlannerMemory as Scratch
from flashcore.contract.operands import PlannerProblem as Problem
from flashcore.contract.operands import PlannerResult as Plan
from flashcore.contract.operands import PlannerSource as Source
from flashcore.contract.scratch import SCAN_THREADS, Tiles
from flashcore.sm90.config.planner import ENTRY_THREADS, GROUP_THREADS, PlannerConfig
from flashcore.sm90.kernels.dsl import SmemAllocator
from flashcore.sm90.kernels.planner.adopt import adopt_layout
from flashcore.sm90.kernels.planner.block import (
    Part,
    Shared,
    part_of_grid,
    scan_memory,
    shared_memory,
)
from flashcore.sm90.kernels.planner.emit import emit_gathered, emit_merge, emit_tokens, emit_work
from flashcore.sm90.kernels.planner.groups import find_groups, unshare
from flashcore.sm90.kernels.planner.layout import fill_entries, scan_rows
from flashcore.sm90.kernels.planner.owners import compare_chunks, count_chunks
from flashcore.sm90.kernels.planner.sharing import (
    await_count,
    claim_pages,
    mark_breaks,
    next_stamp,
    number_segments,
    publish_count,
)
from flashcore.sm90.kernels.planner.table import cut, place_items, place_members, place_results


class Planner:
    """The plan of one batch, for one `PlannerConfig`."""

    def __init__(self, config: PlannerConfig):
        self.config = config

    @cute.jit
    def __call__(
        self,
        page_table: cute.Tensor | None,  # these as in `contract.operands.Planner`
        seq_lens: cute.Tensor | None,
        q_lens: cute.Tensor,
        source: Source | None,
        plan: Plan,
        scratch: Scratch,
        problem: Problem,
        num_sms: Int32,
        stream,
    ):
        entries = plan.cols.shape[0]
        scans = cute.ceil_div(entries, SCAN_THREADS)
        scans = scans if scans < num_sms else num_sms
        visits = cute.ceil_div(entries, ENTRY_THREADS)
        visits = visits if visits < 8 * num_sms else 8 * num_sms
        first = {"block": [SCAN_THREADS, 1, 1], "stream": stream}
        visit = {"block": [ENTRY_THREADS, 1, 1], "stream": stream, "use_pdl": True}
        if const_expr(self.config.from_layout):
            self.adopt(q_lens, source, plan, scratch).launch(grid=[scans, 1, 1], **first)
        else:
            self.layout(page_table, seq_lens, q_lens, plan, scratch, problem).launch(
                grid=[scans, 1, 1], **first
            )
        self.claim(plan, scratch, problem).launch(grid=[visits, 1, 1], **visit)
        if const_expr(self.config.chunks):
            self.compare(plan, scratch, problem).launch(grid=[visits, 1, 1], **visit)
            self.count(plan, scratch, problem).launch(grid=[visits, 1, 1], **visit)
        self.link(plan, scratch, problem).launch(grid=[visits, 1, 1], **visit)
        tiles = cute.ceil_div(entries, GROUP_THREADS)
        tiles = tiles if tiles < num_sms else num_sms
        tile = {"block": [GROUP_THREADS, 1, 1], "stream": stream, "use_pdl": True}
        # Told that one CTA on an SM will do, ptxas takes the registers that it needs.
        roomy = {"min_blocks_per_mp": 1}
        self.groups(q_lens, plan, scratch, problem).launch(grid=[tiles, 1, 1], **tile, **roomy)
        self.lists(q_lens, plan, scratch, problem).launch(grid=[num_sms, 4, 1], **visit, **roomy)

    @cute.kernel
    def layout(
        self,
        mTable: cute.Tensor,
        mSeqLens: cute.Tensor,
        mQLens: cute.Tensor,
        plan: Plan,
        scratch: Scratch,
        problem: Problem,
    ):
        smem = SmemAllocator()
        sums = scan_memory(smem, SCAN_THREADS)
        ends = smem.allocate_tensor(
            Int32, cute.make_layout(const_expr(self.config.row_capacity + 1))
        )
        cute.arch.griddepcontrol_launch_dependents()
        nnz = scan_rows(mTable, mSeqLens, mQLens, plan, scratch, problem, ends, sums)
        part = part_of_grid(SCAN_THREADS)
        fill_entries(mTable, mSeqLens, plan, scratch, problem, ends, nnz, part)

    @cute.kernel
    def adopt(self, mQLens: cute.Tensor, source: Source, plan: Plan, scratch: Scratch):
        sums = scan_memory(SmemAllocator(), SCAN_THREADS)
        cute.arch.griddepcontrol_launch_dependents()
        adopt_layout(mQLens, source, plan, scratch, sums)

    @cute.kernel
    def claim(self, plan: Plan, scratch: Scratch, problem: Problem):
        self.take_over()
        claim_pages(plan, scratch, problem, part_of_grid(ENTRY_THREADS), self.config.chunks)

    @cute.kernel
    def compare(self, plan: Plan, scratch: Scratch, problem: Problem):
        self.take_over()
        compare_chunks(plan, scratch, problem, part_of_grid(ENTRY_THREADS))

    @cute.kernel
    def count(self, plan: Plan, scratch: Scratch, problem: Problem):
        self.take_over()
        count_chunks(plan, scratch, problem, part_of_grid(ENTRY_THREADS))

    @cute.kernel
    def link(self, plan: Plan, scratch: Scratch, problem: Problem):
        self.take_over()
        warps = const_expr(ENTRY_THREADS // 32)
        wide = SmemAllocator().allocate_tensor(Int64, cute.make_layout(warps))
        part = part_of_grid(ENTRY_THREADS)
        mark_breaks(plan, scratch, problem, part, wide, self.config.chunks)

    @cute.kernel
    def groups(self, mQLens: cute.Tensor, plan: Plan, scratch: Scratch, problem: Problem):
        self.take_over()
        shared = shared_memory(SmemAllocator())
        self.number_and_cut(mQLens.shape[0], plan, scratch, problem, shared)

    @cute.jit
    def number_and_cut(
        self, batch: Int32, plan: Plan, scratch: Scratch, problem: Problem, shared: Shared
    ):
        """All CTAs number the segments. The last to be done finds and cuts the groups, then the
        last three place everything side by side. Nobody waits for a CTA that may not run yet."""
        tid, _, _ = cute.arch.thread_idx()
        grid, _, _ = cute.arch.grid_dim()
        stamp = next_stamp(scratch)
        number_segments(plan, scratch, grid, shared.sums)
        role = self.role(scratch, shared)
        ready = scratch.tiles.iterator + (Tiles.CUT * SCAN_THREADS + Tiles.READY)
        if role < 3:
            if role == 0:
                self.cut(plan, scratch, problem, shared)
                cute.arch.sync_threads()
                if tid == 0:
                    publish_count(ready, stamp, Int32(0), "release")
            elif tid == 0:
                await_count(ready, stamp, "acquire")
            cute.arch.sync_threads()
            self.place(batch, plan, scratch, problem, role, grid, shared)

    @cute.jit
    def place(
        self, batch: Int32, plan: Plan, scratch: Scratch, problem: Problem, role: Int32,
        ctas: Int32, shared: Shared,
    ):  # fmt: skip
        """This CTA's third of step 6; the last CTA's also what there is no other for."""
        counts = plan.counts
        num_groups, num_kept = counts[int(Count.GROUPS)], counts[int(Count.MEMBERS)]
        if role == 0:
            place_items(plan, scratch, problem, num_groups, shared)
        if role == 1 or ctas < 2:
            place_members(plan, scratch, num_kept, num_groups, shared)
        if role == 2 or (role == 0 and ctas < 3):
            place_results(plan, scratch, problem, batch, num_groups, num_kept, shared)

    @cute.jit
    def role(self, scratch: Scratch, shared: Shared):
        """How many CTAs are not done yet, this one aside; what those that are wrote can be seen."""
        tid, _, _ = cute.arch.thread_idx()
        grid, _, _ = cute.arch.grid_dim()
        done = scratch.tiles.iterator + (Tiles.CUT * SCAN_THREADS + Tiles.DONE)
        cute.arch.sync_threads()
        if tid == 0:
            before = cute.arch.atomic_add(done, Int64(1), sem="acq_rel", scope="gpu").to(Int32)
            if before == grid - 1:
                scratch.tiles[Tiles.CUT, Tiles.DONE] = Int64(0)
            shared.bins[0] = grid - 1 - before
        cute.arch.sync_threads()
        role = shared.bins[0]
        cute.arch.sync_threads()
        return role

    @cute.jit
    def cut(self, plan: Plan, scratch: Scratch, problem: Problem, shared: Shared):
        """Groups and their splits."""
        tid, _, _ = cute.arch.thread_idx()
        num_segments, num_found = plan.counts[int(Count.SEGMENTS)], plan.counts[int(Count.FOUND)]
        # Where segments or lists do not fit: as if nothing were shared, and then without splits.
        # The attention kernel folds the chunks of a run that is not cut to the same bits.
        chunks = const_expr(self.config.chunks)
        attempt, fits, num_groups, num_kept = Int32(1), Int32(0), Int32(0), Int32(0)
        if num_segments <= plan.member_rows.shape[0]:
            attempt = Int32(0)
            num_groups, num_kept = find_groups(
                plan, scratch, problem, num_segments, num_found, shared
            )
        while attempt < 3 and fits == 0:
            if attempt == 1:
                num_groups = unshare(plan, scratch, problem, shared)
                num_kept = num_groups
            split = Int32(1) if attempt < 2 else Int32(0)
            fits = cut(plan, scratch, problem, num_groups, num_kept, split, shared, chunks)
            attempt = attempt + 1
        if tid == 0:
            plan.stats[int(Stat.UNSHARED)] = Int64(1) if attempt > 1 else Int64(0)

    @cute.kernel
    def lists(self, mQLens: cute.Tensor, plan: Plan, scratch: Scratch, problem: Problem):
        cute.arch.griddepcontrol_wait()
        # A list for each y: the searches of one do not wait for those of another.
        tid, _, _ = cute.arch.thread_idx()
        first, which, _ = cute.arch.block_idx()
        if which == 0 and first == 0 and tid == 0:
            self.count_update(scratch)
        self.emit(which, mQLens.shape[0], plan, scratch, problem, part_of_grid(ENTRY_THREADS))

    @cute.jit
    def count_update(self, scratch: Scratch):
        """By one thread, when nobody looks at the update's stamp any more."""
        scratch.tiles[Tiles.CUT, Tiles.STAMP] = Int64(next_stamp(scratch))

    @cute.jit
    def emit(
        self, which: Int32, batch: Int32, plan: Plan, scratch: Scratch, problem: Problem, part: Part
    ):
        """This thread's part of one of the four lists of step 7."""
        if which == 0:
            emit_work(plan, scratch, problem, part)
        elif which == 1:
            emit_merge(plan, scratch, batch, part)
        elif which == 2:
            emit_gathered(plan, scratch, part)
        else:
            emit_tokens(plan, scratch, batch, part)

    @cute.jit
    def take_over(self):
        """Let the next kernel be started, and wait for the one before; its results are there."""
        cute.arch.griddepcontrol_launch_dependents()
        cute.arch.griddepcontrol_wait()
