"""The pager's kernels, chained on one stream: token map or page table -> CSR layout, and the pages
to stage.

    changes ─► pieces ─► rows ─► entries ─► claim ─► stage
     grid       grid    one CTA    grid      grid     grid
    (token maps alone)

Each is started while the one before it runs, and waits for that one's end. The rules are those of
`pager.csr`.
"""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64, const_expr

from flashcore.contract.counts import Fault, PagerCount
from flashcore.contract.operands import PagerBatch as Batch
from flashcore.contract.operands import PagerMemory as Scratch
from flashcore.contract.operands import PagerResult as Layout
from flashcore.contract.scratch import SCAN_THREADS
from flashcore.contract.scratch import PagerRanges as Ranges
from flashcore.contract.scratch import PagerTiles as Tiles
from flashcore.sm90.config.pager import PagerConfig, illegal_reason
from flashcore.sm90.config.planner import ENTRY_THREADS
from flashcore.sm90.kernels.dsl import SmemAllocator
from flashcore.sm90.kernels.planner.block import (
    block_scan,
    last_at_most,
    part_of_grid,
    scan_memory,
)
from flashcore.sm90.kernels.planner.sharing import await_count, publish_count


class Pager:
    """The layout of one batch, for one `PagerConfig`."""

    def __init__(self, config: PagerConfig):
        reason = illegal_reason(config)
        if reason is not None:
            raise ValueError(reason)
        self.config = config

    @cute.jit
    def __call__(
        self,
        pages: cute.Tensor,  # these as in `contract.operands.Pager`
        begins: cute.Tensor | None,
        ends: cute.Tensor,
        resident: cute.Tensor | None,
        layout: Layout,
        scratch: Scratch,
        page_tokens: Int32,
        num_pages: Int32,
        num_sms: Int32,
        stream,
    ):
        batch = Batch(pages, begins, ends, resident)
        entries = layout.cols.shape[0]
        scans = cute.ceil_div(entries, SCAN_THREADS)
        scans = scans if scans < num_sms else num_sms
        visits = cute.ceil_div(entries, ENTRY_THREADS)
        visits = visits if visits < 8 * num_sms else 8 * num_sms
        scan = {"block": [SCAN_THREADS, 1, 1], "stream": stream}
        visit = {"block": [ENTRY_THREADS, 1, 1], "stream": stream, "use_pdl": True}
        if const_expr(self.config.tokens):
            tiles = cute.ceil_div(batch.pages.shape[0], SCAN_THREADS)
            tiles = tiles if tiles < num_sms else num_sms
            self.changes(batch, layout, scratch).launch(grid=[tiles, 1, 1], **scan)
            self.pieces(batch, layout, scratch, page_tokens).launch(
                grid=[tiles, 1, 1], use_pdl=True, **scan
            )
        self.rows(batch, layout, scratch, page_tokens).launch(
            grid=[1, 1, 1], use_pdl=self.config.tokens, **scan
        )
        self.entries(batch, layout, scratch, page_tokens, num_pages).launch(
            grid=[visits, 1, 1], **visit
        )
        self.claim(batch, layout, scratch).launch(grid=[visits, 1, 1], **visit)
        self.stage(batch, layout, scratch).launch(grid=[scans, 1, 1], use_pdl=True, **scan)

    @cute.jit
    def take_over(self):
        """Wait for the kernel before; its results are there. The next one may be started."""
        cute.arch.griddepcontrol_wait()
        cute.arch.griddepcontrol_launch_dependents()

    @cute.kernel
    def changes(self, batch: Batch, layout: Layout, scratch: Scratch):
        """Tokens that lie in another page than the one before, in their order."""
        cute.arch.griddepcontrol_launch_dependents()
        tid, _, _ = cute.arch.thread_idx()
        total = batch.pages.shape[0]
        begin, stretch = my_stretch(total)
        sums = scan_memory(SmemAllocator(), SCAN_THREADS)
        mine = Int32(0)
        for offset in cutlass.range(tid, stretch, SCAN_THREADS, unroll=4):
            mine = mine + is_change(batch.pages, begin + offset, total)
        _, found = block_scan(mine, sums)
        before = exchange(layout, scratch, Tiles.CHANGES, found, sums)
        close_scan(layout, PagerCount.CHANGES, before + found)
        for offset in cutlass.range(0, stretch, SCAN_THREADS, unroll=1):
            t = begin + offset + tid
            change = is_change(batch.pages, t, total)
            place, all_changes = block_scan(change, sums)
            if change == 1:
                scratch.changes[before + place] = t
            before = before + all_changes

    @cute.kernel
    def pieces(self, batch: Batch, layout: Layout, scratch: Scratch, page_tokens: Int32):
        """Entries of the runs between changes, added up: a run is cut into pages."""
        self.take_over()
        tid, _, _ = cute.arch.thread_idx()
        total = batch.pages.shape[0]
        changes = layout.counts[int(PagerCount.CHANGES)]
        begin, stretch = my_stretch(changes)
        sums = scan_memory(SmemAllocator(), SCAN_THREADS)
        mine = Int32(0)
        for offset in cutlass.range(tid, stretch, SCAN_THREADS, unroll=1):
            mine = mine + run_pieces(scratch, begin + offset, changes, total, page_tokens)
        _, found = block_scan(mine, sums)
        before = exchange(layout, scratch, Tiles.PIECES, found, sums)
        for offset in cutlass.range(0, stretch, SCAN_THREADS, unroll=1):
            i = begin + offset + tid
            place, all_pieces = block_scan(
                run_pieces(scratch, i, changes, total, page_tokens), sums
            )
            if i < changes:
                scratch.pieces[i] = before + place
            before = before + all_pieces

    @cute.kernel
    def rows(self, batch: Batch, layout: Layout, scratch: Scratch, page_tokens: Int32):
        """Entries of each sequence, those of the sequences that fit in all, and faults."""
        if const_expr(self.config.tokens):
            cute.arch.griddepcontrol_wait()
        cute.arch.griddepcontrol_launch_dependents()
        tid, _, _ = cute.arch.thread_idx()
        smem = SmemAllocator()
        sums = scan_memory(smem, SCAN_THREADS)
        fits = smem.allocate_tensor(Int32, cute.make_layout(1))
        if tid == 0:
            fits[0] = Int32(0)
            layout.row_offsets[0] = Int32(0)
        cute.arch.sync_threads()
        number, most = batch.ends.shape[0], layout.cols.shape[0]
        before = Int32(0)
        for base in cutlass.range(0, number, SCAN_THREADS, unroll=1):
            b = base + tid
            need, length, fault = Int32(0), Int32(0), Int32(0)
            if b < number:
                need, length, fault = self.row_need(batch, layout, scratch, page_tokens, b)
                need = need if need <= most else most + 1
            place, all_needs = block_scan(need, sums)
            end = before + place + need
            if b < number:
                if need > 0 and end > most:
                    fault = fault | int(Fault.ENTRIES)
                if end <= most:
                    cute.arch.atomic_max(fits.iterator, end, sem="relaxed", scope="cta")
                layout.row_offsets[b + 1] = end
                layout.kv_lens[b] = length
                layout.bad[b] = fault
            before = before + all_needs
        cute.arch.sync_threads()
        nnz = fits[0]
        for b in cutlass.range(tid, number, SCAN_THREADS, unroll=1):
            end = layout.row_offsets[b + 1]
            layout.row_offsets[b + 1] = end if end < nnz else nnz
        if tid == 0:
            layout.counts[int(PagerCount.BATCH)] = number
            layout.counts[int(PagerCount.NNZ)] = nnz
            layout.counts[int(PagerCount.FAULTS)] = Int32(0)
            layout.counts[int(PagerCount.STAMP)] = layout.counts[int(PagerCount.STAMP)] + 1

    @cute.jit
    def row_need(
        self, batch: Batch, layout: Layout, scratch: Scratch, page_tokens: Int32, b: Int32
    ):
        """Entries that sequence b asks for, its tokens, and what is wrong with it."""
        need, fault = Int32(0), Int32(0)
        begin, end = Int32(0), batch.ends[b]
        if const_expr(self.config.tokens):
            begin = batch.begins[b]
            if begin < 0 or end < begin or end > batch.pages.shape[0]:
                begin, end, fault = Int32(0), Int32(0), Int32(int(Fault.LENGTH))
            if end > begin:
                changes = layout.counts[int(PagerCount.CHANGES)]
                first = count_below(scratch.changes, changes, begin + 1)
                after = count_below(scratch.changes, changes, end)
                scratch.ranges[Ranges.FIRST_CHANGE, b] = first
                scratch.ranges[Ranges.END_CHANGE, b] = after
                need = cut(end - begin, page_tokens)
                if after > first:
                    last = scratch.changes[after - 1]
                    inner = scratch.pieces[after - 1] - scratch.pieces[first]
                    need = cut(scratch.changes[first] - begin, page_tokens)
                    need = need + inner + cut(end - last, page_tokens)
        else:
            pages = cut(end, page_tokens) if end > 0 else Int32(0)
            if end < 0 or pages > batch.pages.shape[1]:
                end, pages, fault = Int32(0), Int32(0), Int32(int(Fault.LENGTH))
            need = pages
        return need, end - begin, fault

    @cute.kernel
    def entries(
        self, batch: Batch, layout: Layout, scratch: Scratch, page_tokens: Int32, num_pages: Int32
    ):
        """Pages and token counts. An id out of range becomes page 0 of a sequence marked as bad."""
        self.take_over()
        first, stride = part_of_grid(ENTRY_THREADS)
        number = batch.ends.shape[0]
        for e in cutlass.range(first, layout.counts[int(PagerCount.NNZ)], stride, unroll=1):
            row = last_at_most(layout.row_offsets, Int32(0), number, e)
            place = e - layout.row_offsets[row]
            page, start, tokens = Int32(0), Int32(0), Int32(0)
            if const_expr(self.config.tokens):
                page, start, tokens = piece_of_map(batch, scratch, row, place, page_tokens)
            else:
                page, start = batch.pages[row, place], place * page_tokens
                left = batch.ends[row] - start
                tokens = left if left < page_tokens else page_tokens
            if page < 0 or page >= num_pages:
                page = Int32(0)
                cute.arch.atomic_or(
                    layout.bad.iterator + row, Int32(int(Fault.PAGE)), sem="relaxed", scope="gpu"
                )
            layout.cols[e] = page
            layout.token_counts[e] = tokens
            layout.starts[e] = start
            layout.rows[e] = row

    @cute.kernel
    def claim(self, batch: Batch, layout: Layout, scratch: Scratch):
        """Each page learns the first entry that uses it; faults of all sequences meet."""
        self.take_over()
        first, stride = part_of_grid(ENTRY_THREADS)
        stamp = layout.counts[int(PagerCount.STAMP)]
        for e in cutlass.range(first, layout.counts[int(PagerCount.NNZ)], stride, unroll=1):
            if layout.bad[layout.rows[e]] == 0:
                at = scratch.slots.iterator + layout.cols[e]
                cute.arch.atomic_min(at, slot_word(stamp, e), sem="relaxed", scope="gpu")
        faults = Int32(0)
        for b in cutlass.range(first, batch.ends.shape[0], stride, unroll=1):
            faults = faults | layout.bad[b]
        if faults != 0:
            at = layout.counts.iterator + int(PagerCount.FAULTS)
            cute.arch.atomic_or(at, faults, sem="relaxed", scope="gpu")

    @cute.kernel
    def stage(self, batch: Batch, layout: Layout, scratch: Scratch):
        """Pages at their first use that are not resident, in the order of entries."""
        self.take_over()
        tid, _, _ = cute.arch.thread_idx()
        nnz = layout.counts[int(PagerCount.NNZ)]
        begin, stretch = my_stretch(nnz)
        sums = scan_memory(SmemAllocator(), SCAN_THREADS)
        mine = Int32(0)
        for offset in cutlass.range(tid, stretch, SCAN_THREADS, unroll=1):
            mine = mine + self.is_staged(batch, layout, scratch, begin + offset, nnz)
        _, found = block_scan(mine, sums)
        before = exchange(layout, scratch, Tiles.STAGED, found, sums)
        close_scan(layout, PagerCount.STAGED, before + found)
        for offset in cutlass.range(0, stretch, SCAN_THREADS, unroll=1):
            e = begin + offset + tid
            staged = self.is_staged(batch, layout, scratch, e, nnz)
            place, all_staged = block_scan(staged, sums)
            if staged == 1:
                layout.staging_ids[before + place] = layout.cols[e]
            before = before + all_staged

    @cute.jit
    def is_staged(self, batch: Batch, layout: Layout, scratch: Scratch, e: Int32, nnz: Int32):
        """Whether entry e is the first to use its page, which is not resident: 0 or 1."""
        staged = Int32(0)
        if e < nnz:
            page = layout.cols[e]
            if scratch.slots[page] == slot_word(layout.counts[int(PagerCount.STAMP)], e):
                staged = Int32(1)
                if const_expr(self.config.bitmap == "bytes"):
                    staged = Int32(1) if batch.resident[page] == 0 else Int32(0)
                elif const_expr(self.config.bitmap == "words"):
                    staged = 1 - ((batch.resident[page >> 5] >> (page & 31)) & 1)
        return staged


@cute.jit
def cut(tokens: Int32, page_tokens: Int32):
    """Pages that a run of one token or more fills."""
    return (tokens - 1) // page_tokens + 1


@cute.jit
def slot_word(stamp: Int32, e: Int32):
    """Smaller for later updates, so that nothing need be cleared, then for smaller entries."""
    return (Int64(2**31 - 1 - stamp) << 32) | Int64(e)


@cute.jit
def my_stretch(n: Int32):
    """First of the elements that this CTA scans, and how many: whole tiles."""
    bid, _, _ = cute.arch.block_idx()
    grid, _, _ = cute.arch.grid_dim()
    stretch = cute.ceil_div(cute.ceil_div(n, grid), SCAN_THREADS) * SCAN_THREADS
    return bid * stretch, stretch


@cute.jit
def is_change(mPages: cute.Tensor, t: Int32, total: Int32):
    """Whether token t lies in another page than the one before: 0 or 1."""
    change = Int32(0)
    if t > 0 and t < total:
        change = Int32(1) if mPages[t] != mPages[t - 1] else Int32(0)
    return change


@cute.jit
def run_pieces(scratch: Scratch, i: Int32, changes: Int32, total: Int32, page_tokens: Int32):
    """Entries of the run from change i to the next."""
    pieces = Int32(0)
    if i < changes:
        end = total
        if i + 1 < changes:
            end = scratch.changes[i + 1]
        pieces = cut(end - scratch.changes[i], page_tokens)
    return pieces


@cute.jit
def piece_of_map(batch: Batch, scratch: Scratch, row: Int32, place: Int32, page_tokens: Int32):
    """Entry number `place` of a sequence of a token map: page, tokens before it, its tokens."""
    begin, end = batch.begins[row], batch.ends[row]
    first = scratch.ranges[Ranges.FIRST_CHANGE, row]
    after = scratch.ranges[Ranges.END_CHANGE, row]
    run_begin, run_end, piece = begin, end, place
    if after > first:
        run_end = scratch.changes[first]
        head = cut(run_end - begin, page_tokens)
        if place >= head:
            wanted = scratch.pieces[first] + place - head
            change = last_at_most(scratch.pieces, first, after, wanted)
            piece = wanted - scratch.pieces[change]
            run_begin, run_end = scratch.changes[change], end
            if change + 1 < after:
                run_end = scratch.changes[change + 1]
    token = run_begin + piece * page_tokens
    left = run_end - token
    return batch.pages[run_begin], token - begin, left if left < page_tokens else page_tokens


@cute.jit
def count_below(values: cute.Tensor, n: Int32, x: Int32):
    """How many of n ascending values are below x."""
    low, high = Int32(0), n
    while low < high:
        middle = (low + high) >> 1
        below = values[middle] < x
        low = middle + 1 if below else low
        high = high if below else middle
    return low


@cute.jit
def exchange(
    layout: Layout, scratch: Scratch, line: cutlass.Constexpr[int], count: Int32, sums: cute.Tensor
):
    """Publish this CTA's count and add up those of all CTAs before it, which were started no later
    than itself."""
    tid, _, _ = cute.arch.thread_idx()
    bid, _, _ = cute.arch.block_idx()
    # `rows` counts updates, so a line is stamped alike in no two of them; 0 is in fresh memory.
    stamp = layout.counts[int(PagerCount.STAMP)] + 1
    tiles = scratch.tiles.iterator + line * SCAN_THREADS
    if tid == 0:
        publish_count(tiles + bid, stamp, count)
    there = Int32(0)
    if tid < bid:
        there = await_count(tiles + tid, stamp)
    _, before = block_scan(there, sums)
    return before


@cute.jit
def close_scan(layout: Layout, count: cutlass.Constexpr[PagerCount], total: Int32):
    """The last CTA of a scan says how many there are."""
    tid, _, _ = cute.arch.thread_idx()
    bid, _, _ = cute.arch.block_idx()
    grid, _, _ = cute.arch.grid_dim()
    if bid == grid - 1 and tid == 0:
        layout.counts[int(count)] = total
