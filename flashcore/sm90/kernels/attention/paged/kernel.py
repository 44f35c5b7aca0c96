"""Paged attention for Hopper over a plan's work list: each run of shared pages is read once.

A producer warp (four where rows are gathered), one or two consumer warpgroups, persistent; pages of
fp8 pass through warps that convert them, and what follows is as of fp16 (convert.py). A work
item is a KV run of a group, up to tile_m packed query rows of its members, and one KV head
(flashcore/contract/work.py); sharing only decides how many rows ride on a run. Every mask but the
tree's is an interval of keys per row.
"""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float16, Float32, Int32, const_expr
from cutlass.cute.nvgpu import cpasync

from flashcore.contract.work import Work
from flashcore.sm90.config.paged import PagedConfig, illegal_reason
from flashcore.sm90.kernels.attention.paged import (
    chunks,
    convert,
    gather,
    pages,
    tiles,
    work_loop,
)
from flashcore.sm90.kernels.attention.paged.epilogue import store_rows
from flashcore.sm90.kernels.attention.paged.few_rows.item import Loads, attend
from flashcore.sm90.kernels.attention.paged.few_rows.shape import shapes_of, takes
from flashcore.sm90.kernels.attention.paged.intervals import (
    Bounds,
    measure_item,
    row_intervals,
)
from flashcore.sm90.kernels.attention.paged.operands import Operands
from flashcore.sm90.kernels.attention.paged.storage import (
    Layouts,
    layouts_of,
    rings_of,
    storage_of,
)
from flashcore.sm90.kernels.attention.paged.work_loop import SLOT_WORDS, Item, Slot
from flashcore.sm90.kernels.attention.parts import counter, matmul, pipelines
from flashcore.sm90.kernels.attention.parts import device_counts as device_plan
from flashcore.sm90.kernels.attention.parts.consumer import (
    Fragments,
    fragments,
    last_product,
)
from flashcore.sm90.kernels.attention.parts.softmax import (
    Scale,
    scale_of,
)
from flashcore.sm90.kernels.dsl import SmemAllocator


class PagedAttention(tiles.TileConsumer, chunks.ChunkedConsumer):
    """Partial or final results of every work item of a plan, for one `PagedConfig`."""

    def __init__(self, config: PagedConfig):
        reason = illegal_reason(config)
        if reason is not None:
            raise ValueError(reason)
        self.config = config
        self.out_dtype = {"bf16": BFloat16, "fp16": Float16}[config.dtype]
        self.dtype = Float16 if config.scaled else self.out_dtype  # of the products
        self.warpgroups = config.num_consumer_warpgroups

    @cute.jit
    def __call__(
        self,
        q: cute.Tensor,  # these as in `contract.operands.Paged`
        k_pages: cute.Tensor,
        v_pages: cute.Tensor,
        out: cute.Tensor,
        lse: cute.Tensor,
        partial_out: cute.Tensor,
        partial_lse: cute.Tensor,
        cols: cute.Tensor,
        work: cute.Tensor,
        q_tokens: cute.Tensor,
        q_positions: cute.Tensor,
        q_index: cute.Tensor | None,
        tree_mask: cute.Tensor | None,
        tree_positions: cute.Tensor | None,
        sinks: cute.Tensor | None,
        k_scale: cute.Tensor | None,
        v_scale: cute.Tensor | None,
        counter: cute.Tensor,
        counts: cute.Tensor | None,
        softmax_scale: Float32,
        softcap: Float32,
        window_left: Int32,
        window_right: Int32,
        num_ctas: Int32,
        stream,
    ):
        c = self.config
        layouts = layouts_of(c, self.dtype)
        if const_expr(c.kv_load == "tma"):
            tma_k, gK = pages.page_copy(c, k_pages, layouts.loaded[0])
            tma_v, gV = pages.page_copy(c, v_pages, layouts.loaded[1])
        else:
            tma_k, gK, tma_v, gV = None, k_pages, None, v_pages
        mma_qk = matmul.qk_product(self.dtype, self.warpgroups, c.tile_n, c.q_registers)
        mma_pv = matmul.pv_product(self.dtype, self.warpgroups, c.v_columns)

        self.Storage = storage_of(c, self.dtype, layouts)
        assert self.Storage.size_in_bytes() <= c.smem_bytes
        operands = Operands(
            q, out, lse, partial_out, partial_lse, cols, work, q_tokens, q_positions, q_index,
            tree_mask, tree_positions, sinks, k_scale, v_scale, counter, counts,
        )  # fmt: skip
        self.kernel(
            tma_k, gK, tma_v, gV, operands, softmax_scale, softcap,
            Bounds(window_left, window_right), layouts, mma_qk, mma_pv,
        ).launch(
            grid=[num_ctas, 1, 1],
            block=[c.threads, 1, 1],
            stream=stream,
            min_blocks_per_mp=c.ctas_per_sm,
            preferred_smem_carveout=100,  # left open, the DSL would ask a device for it
        )  # fmt: skip

    @cute.kernel
    def kernel(
        self,
        tma_k: cute.CopyAtom | None,
        gK: cute.Tensor,
        tma_v: cute.CopyAtom | None,
        gV: cute.Tensor,
        m: Operands,
        softmax_scale: Float32,
        softcap: Float32,
        window: Bounds,
        layouts: Layouts,
        mma_qk: cute.TiledMma,
        mma_pv: cute.TiledMma,
    ):
        c = self.config
        tidx, _, _ = cute.arch.thread_idx()
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        if const_expr(c.kv_load == "tma"):
            if warp == 0:
                cpasync.prefetch_descriptor(tma_k)
                cpasync.prefetch_descriptor(tma_v)
            # The first item is on its way while the barriers are made.
            words = work_loop.work_row(m.work, cute.arch.block_idx()[0])
        storage = SmemAllocator().allocate(self.Storage)
        sQ = None
        if const_expr(not c.q_registers):
            sQ = storage.q.get_tensor(layouts.q.outer, swizzle=layouts.q.inner)
        sK = storage.k.get_tensor(layouts.k.outer, swizzle=layouts.k.inner)
        sV = storage.v.get_tensor(layouts.v.outer, swizzle=layouts.v.inner)
        loaded_k, loaded_v = sK, sV
        if const_expr(c.kv_dtype):
            loaded_k, loaded_v = (
                stages.get_tensor(layout.outer, swizzle=layout.inner)
                if const_expr(c.few_rows > 0)
                else stages.get_tensor(layout)
                for stages, layout in zip(
                    (storage.narrow_k, storage.narrow_v), layouts.loaded, strict=True
                )
            )
        slot_barriers = storage.slot_barriers.data_ptr()
        slot = Slot(
            storage.slot.get_tensor(cute.make_layout(SLOT_WORDS)), slot_barriers, slot_barriers + 1
        )
        rings = rings_of(c, self.dtype, storage, layouts)
        if const_expr(c.kv_load == "gather"):
            self.clear_padding(loaded_k, loaded_v, tidx)
        if warp == 0:
            with cute.arch.elect_one():
                cute.arch.mbarrier_init(slot.full, 1)
                cute.arch.mbarrier_init(slot.empty, 32 * c.awaiting_warps)
        cute.arch.mbarrier_init_fence()
        cute.arch.sync_threads()

        # The merge takes the place of CTAs that are done, and waits there for all of them.
        cute.arch.griddepcontrol_launch_dependents()
        if warp < 4:
            cute.arch.setmaxregister_decrease(c.producer_registers)
            if const_expr(c.kv_dtype):
                first = const_expr(4 - c.converting_warps)
                if warp >= first:
                    k, v = (
                        convert.Side(narrow.iterator.toint(), wide.iterator.toint(), *of)
                        for narrow, wide, of in (
                            (loaded_k, sK, (rings.loaded_k, rings.k, c.wide_k_stages)),
                            (loaded_v, sV, (rings.loaded_v, rings.v, c.wide_v_stages)),
                        )
                    )
                    convert.convert_items(c, k, v, slot, warp - first)
            if const_expr(c.kv_load == "gather"):
                k_stages, v_stages = (
                    gather.Stages(
                        tile.iterator.toint(),
                        gather.byte_layout(layout, 8 if const_expr(c.kv_dtype) else 16),
                    )
                    for tile, layout in zip((loaded_k, loaded_v), layouts.loaded, strict=True)
                )
                if warp < c.loading_warps:
                    gather.produce(
                        c, gK, gV, k_stages, v_stages, rings.loaded_k, rings.loaded_v, slot, m,
                        window, warp,
                    )  # fmt: skip
            elif warp == 0:
                self.produce(
                    tma_k, gK, tma_v, gV, loaded_k, loaded_v, rings.loaded_k, rings.loaded_v,
                    slot, m, window, words,
                )  # fmt: skip
        else:
            cute.arch.setmaxregister_increase(c.consumer_registers)
            if const_expr(c.chunked):
                totals = chunks.Totals(
                    storage.totals.get_tensor(chunks.totals_layout(c)),
                    storage.row_totals.get_tensor(cute.make_layout(c.total_rows)),
                )
                self.consume_chunks(
                    m, sQ, sK, sV, totals, rings.k, rings.v, slot, softmax_scale, softcap,
                    window, mma_qk, mma_pv, tidx - 128,
                )  # fmt: skip
            else:
                few = None
                if const_expr(c.few_rows > 0):
                    few = Loads(
                        *(x.iterator.toint() for x in (loaded_k, loaded_v)), rings.loaded_k,
                        rings.loaded_v, storage.few_totals.data_ptr().toint(),
                    )  # fmt: skip
                self.consume(
                    m, sQ, sK, sV, rings.k, rings.v, slot, softmax_scale, softcap, window, mma_qk,
                    mma_pv, few, tidx - 128,
                )  # fmt: skip

    @cute.jit
    def clear_padding(self, sK: cute.Tensor, sV: cute.Tensor, tidx: Int32):
        """Zero the columns that gathered rows leave, before the CTA's first barrier."""
        c = self.config
        for sKV, dim in ((sK, c.head_dim), (sV, c.v_head_dim)):
            if const_expr(cute.size(sKV, mode=[1]) > dim):
                pages.clear_padding(sKV, dim, tidx, c.threads)
                cute.arch.fence_proxy("async.shared", space="cta")

    @cute.jit
    def produce(
        self,
        tma_k: cute.CopyAtom,
        gK: cute.Tensor,
        tma_v: cute.CopyAtom,
        gV: cute.Tensor,
        sK: cute.Tensor,
        sV: cute.Tensor,
        ring_k,
        ring_v,
        slot: Slot,
        m: Operands,
        window: Bounds,
        words: cute.Tensor,  # row of the work list at the CTA's place in the grid
    ):
        """The producer warp: draw items, publish them, keep the rings full."""
        c = self.config
        k_state = pipelines.producer_state(c.stages)
        v_state = pipelines.producer_state(c.stages)
        index, _, _ = cute.arch.block_idx()
        num_items = device_plan.count_items(c, m)
        slot_phase = Int32(1)
        while index < num_items:
            entry, num_tokens = words[int(Work.ENTRY)], words[int(Work.NUM_TOKENS)]
            last_entry = entry + (num_tokens - 1) // c.page_tokens
            # On its way while the item is measured: most items begin with their run's last tile.
            guess = (num_tokens - 1) // c.tile_n
            ids = pages.tile_pages(c, m.cols, entry, last_entry, guess)
            item = measure_item(
                c, words, Work, m.q_positions, m.q_tokens, m.q_index, m.tree_positions, window
            )
            work_loop.publish_item(slot, slot_phase, item)
            slot_phase ^= 1
            if item.end > item.first:
                k_pages = pages.head_pages(c, tma_k, gK, sK, item.kv_head)
                v_pages = pages.head_pages(c, tma_v, gV, sV, item.kv_head)
                # K runs a tile ahead of V: the consumers need K of tile n - 1 before V of n.
                last = item.end - 1
                if last != guess:
                    ids = pages.tile_pages(c, m.cols, entry, last_entry, last)
                ahead = pages.tile_pages(c, m.cols, entry, last_entry, max(last - 1, 0))
                pages.load_tile(c, k_pages, ids, last, ring_k, k_state)
                k_state.advance()
                for i in cutlass.range(last - item.first, unroll=1):
                    n = last - i
                    below = ahead
                    ahead = pages.tile_pages(c, m.cols, entry, last_entry, max(n - 2, 0))
                    pages.load_tile(c, k_pages, below, n - 1, ring_k, k_state)
                    k_state.advance()
                    pages.load_tile(c, v_pages, ids, n, ring_v, v_state)
                    v_state.advance()
                    ids = below
                pages.load_tile(c, v_pages, ids, item.first, ring_v, v_state)
                v_state.advance()
            index = counter.draw(index, m.counter)
            work_loop.read_row(m.work, min(index, num_items - 1), words)
        work_loop.publish_end(slot, slot_phase)
        counter.reset(m.counter)
        ring_k.producer_tail(k_state)
        ring_v.producer_tail(v_state)

    @cute.jit
    def consume(
        self,
        m: Operands,
        sQ: cute.Tensor,
        sK: cute.Tensor,
        sV: cute.Tensor,
        ring_k,
        ring_v,
        slot: Slot,
        softmax_scale: Float32,
        softcap: Float32,
        window: Bounds,
        mma_qk: cute.TiledMma,
        mma_pv: cute.TiledMma,
        few: Loads | None,
        tid: Int32,
    ):
        """A consumer warpgroup: 64 packed rows of every item, from scores to stores."""
        c = self.config
        wg = cute.arch.make_warp_uniform(tid // 128)
        frag = fragments(c, self.dtype, mma_qk, mma_pv, sQ, sK, sV, wg)
        scale = scale_of(c, softmax_scale, softcap)
        lane = tid % 32
        thread = tiles.Thread(wg, tid, lane, tid // 32 * 16 + lane // 4, 2 * (lane % 4))
        k_state, v_state = (pipelines.consumer_state(stages) for stages in c.product_stages)
        pipelines.first_turn(wg, self.warpgroups)
        slot_phase, num_tiles = Int32(0), Int32(0)
        item = work_loop.await_item(slot, slot_phase)
        while item.valid >= 0:
            slot_phase ^= 1
            if const_expr(c.few_rows > 0):
                shapes = const_expr(shapes_of(c))
                few_rows = takes(c, item)
                fewest = few_rows and item.num_rows <= shapes[0].rows
                if fewest:
                    of_item = convert.item_scale(c, scale, m, item.kv_head)
                    attend(shapes[0], self.out_dtype, m, item, window, of_item, few, num_tiles, tid)
                elif not few_rows:
                    k_state, v_state = self.consume_item(
                        m, item, frag, window, scale, sQ, sV, ring_k, ring_v, k_state, v_state,
                        thread,
                    )  # fmt: skip
                else:  # last, so that the ways of most items lie together in the cache of code
                    if const_expr(len(shapes) > 1):
                        of_item = convert.item_scale(c, scale, m, item.kv_head)
                        attend(
                            shapes[1], self.out_dtype, m, item, window, of_item, few, num_tiles, tid
                        )
                num_tiles += max(item.end - item.first, 0)
            else:
                k_state, v_state = self.consume_item(
                    m, item, frag, window, scale, sQ, sV, ring_k, ring_v, k_state, v_state, thread
                )
            item = work_loop.await_item(slot, slot_phase)

    @cute.jit
    def consume_item(
        self, m: Operands, item: Item, frag: Fragments, window: Bounds, scale: Scale,
        sQ: cute.Tensor | None, sV: cute.Tensor, ring_k, ring_v, k_state, v_state,
        thread: tiles.Thread,
    ):  # fmt: skip
        """An item, from its queries to its results; the next states of the rings."""
        c = self.config
        wg, tid, lane, thread_row, column = thread
        rows = row_intervals(c, m, item, window, thread_row)
        of_item = scale
        if const_expr(c.scaled):
            of_item = convert.item_scale(c, scale, m, item.kv_head)
        frag.accO.fill(0.0)
        frag.row_max.fill(-Float32.inf)
        frag.row_sum.fill(0.0)
        if item.end > item.first:
            self.load_queries(m, item, rows, sQ, frag, wg, tid)
            last = item.end - 1
            self.first_tile(
                frag, rows, m, of_item, sV, ring_k, k_state, ring_v, v_state, wg, tid, item,
                column,
            )  # fmt: skip
            k_state.advance()
            masked_end = min(last, max(item.first, item.full_high))
            plain_end = min(masked_end, max(item.first, item.full_low))
            for i in cutlass.range(last - masked_end, unroll=1):
                self.tile(
                    frag, rows, m, of_item, sV, ring_k, k_state, ring_v, v_state, wg, tid, item,
                    column, last - 1 - i, True,
                )  # fmt: skip
                k_state.advance()
                v_state.advance()
            for _ in cutlass.range(masked_end - plain_end, unroll=1):
                self.tile(
                    frag, rows, m, of_item, sV, ring_k, k_state, ring_v, v_state, wg, tid, item,
                    column, 0, False,
                )  # fmt: skip
                k_state.advance()
                v_state.advance()
            if const_expr(c.window):
                for i in cutlass.range(plain_end - item.first, unroll=1):
                    self.tile(
                        frag, rows, m, of_item, sV, ring_k, k_state, ring_v, v_state, wg, tid,
                        item, column, plain_end - 1 - i, True,
                    )  # fmt: skip
                    k_state.advance()
                    v_state.advance()
            last_product(frag, ring_v, v_state)
            v_state.advance()
        store_rows(c, self.out_dtype, frag, m, item, rows, thread_row, lane, of_item)
        return k_state, v_state
