"""Dense attention forward for Hopper: one producer warp, one to three consumer warpgroups.

The schedule is drawn in docs/kernels/dense.md. Everything static is in `DenseConfig`; a feature
that is off leaves no instruction behind.
"""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float16, Float32, Int32, Int64, const_expr
from cutlass.cute.nvgpu import cpasync, warpgroup

from flashcore.sm90.config.dense import (
    SMEM_BYTES_PER_SM90_CTA,
    WARPGROUP_ROWS,
    DenseConfig,
    illegal_reason,
)
from flashcore.sm90.kernels.attention.dense import loads, scheduler
from flashcore.sm90.kernels.attention.dense.mask import View, key_blocks, mask_scores
from flashcore.sm90.kernels.attention.dense.scheduler import SLOT_WORDS, SLOTS, Extent, Slots, Tile
from flashcore.sm90.kernels.attention.parts import matmul, pipelines
from flashcore.sm90.kernels.attention.parts.consumer import (
    Fragments,
    fragments,
    last_product,
)
from flashcore.sm90.kernels.attention.parts.epilogue import store_row
from flashcore.sm90.kernels.attention.parts.softmax import (
    Scale,
    finalize,
    online_softmax,
    quad_sum,
    rescale,
    scale_of,
    soft_cap,
)
from flashcore.sm90.kernels.dsl import SmemAllocator


class DenseAttention:
    """out = softmax(scale q k^T) v by tiles of rows, for one `DenseConfig`."""

    def __init__(self, config: DenseConfig):
        reason = illegal_reason(config)
        if reason is not None:
            raise ValueError(reason)
        self.config = config
        self.dtype = {"bf16": BFloat16, "fp16": Float16}[config.dtype]
        self.warpgroups = config.num_consumer_warpgroups
        self.turns = config.num_consumer_warpgroups if config.ping_pong else 1

    @cute.jit
    def __call__(
        self,
        q: cute.Tensor,  # these as in `contract.operands.Dense`
        k: cute.Tensor,
        v: cute.Tensor,
        out: cute.Tensor,
        lse: cute.Tensor | None,
        cu_seqlens_q: cute.Tensor | None,
        cu_seqlens_k: cute.Tensor | None,
        sinks: cute.Tensor | None,
        counter: cute.Tensor | None,
        softmax_scale: Float32,
        softcap: Float32,
        window_left: Int32,
        window_right: Int32,
        max_seqlen_q: Int32,
        num_ctas: Int32,
        stream,
    ):
        c = self.config
        sQ_l = matmul.smem_layout(self.dtype, c.tile_m, c.head_dim, c.q_stages)
        sKV_l = matmul.smem_layout(self.dtype, c.tile_n, c.head_dim, c.stages)
        tma_q, gQ = loads.query_copy(c, loads.query_view(c, q), sQ_l)
        tma_k, gK = loads.key_copy(c, loads.key_view(c, k), sKV_l)
        tma_v, gV = loads.key_copy(c, loads.key_view(c, v), sKV_l)
        mma_qk = matmul.qk_product(self.dtype, self.warpgroups, c.tile_n)
        mma_pv = matmul.pv_product(self.dtype, self.warpgroups, c.head_dim)

        @cute.struct
        class Storage:
            q_barriers: cute.struct.MemRange[Int64, 2 * c.q_stages]
            k_barriers: cute.struct.MemRange[Int64, 2 * c.stages]
            v_barriers: cute.struct.MemRange[Int64, 2 * c.stages]
            slot_barriers: cute.struct.MemRange[Int64, 2 * SLOTS]
            slots: cute.struct.MemRange[Int32, SLOT_WORDS * SLOTS]
            q: cute.struct.Align[cute.struct.MemRange[self.dtype, cute.cosize(sQ_l)], 1024]
            k: cute.struct.Align[cute.struct.MemRange[self.dtype, cute.cosize(sKV_l)], 1024]
            v: cute.struct.Align[cute.struct.MemRange[self.dtype, cute.cosize(sKV_l)], 1024]

        assert Storage.size_in_bytes() <= SMEM_BYTES_PER_SM90_CTA
        self.Storage = Storage

        heads_q, heads_kv = q.shape[-2], k.shape[-2]
        if const_expr(c.varlen):
            batch = cu_seqlens_q.shape[0] - 1
            seqlen_q, seqlen_k, total_k = max_seqlen_q, Int32(0), k.shape[0]
        else:
            batch = q.shape[0]
            seqlen_q, seqlen_k, total_k = q.shape[1], k.shape[1], Int32(0)
        m_blocks = cute.ceil_div(seqlen_q * c.pack_gqa, c.tile_m)
        m_blocks = cute.ceil_div(m_blocks, c.cluster_m) * c.cluster_m
        extent = Extent(
            m_blocks=Int32(m_blocks),
            heads=Int32(heads_q // c.pack_gqa),
            batch=Int32(batch),
            seqlen_q=Int32(seqlen_q),
            seqlen_k=Int32(seqlen_k),
            total_k=Int32(total_k),
        )
        self.kernel(
            tma_q, gQ, tma_k, gK, tma_v, gV, out, lse, cu_seqlens_q, cu_seqlens_k, sinks, counter,
            extent, Int32(heads_q // heads_kv), softmax_scale, softcap, window_left, window_right,
            sQ_l, sKV_l, mma_qk, mma_pv,
        ).launch(
            grid=[num_ctas, 1, 1],
            block=[c.threads, 1, 1],
            cluster=[c.cluster_m, 1, 1] if c.cluster_m > 1 else None,
            stream=stream,
            min_blocks_per_mp=1,
        )  # fmt: skip

    @cute.kernel
    def kernel(
        self,
        tma_q: cute.CopyAtom,
        gQ: cute.Tensor,
        tma_k: cute.CopyAtom,
        gK: cute.Tensor,
        tma_v: cute.CopyAtom,
        gV: cute.Tensor,
        mO: cute.Tensor,
        mLSE: cute.Tensor | None,
        mCuQ: cute.Tensor | None,
        mCuK: cute.Tensor | None,
        mSinks: cute.Tensor | None,
        mCounter: cute.Tensor | None,
        extent: Extent,
        q_heads_per_kv: Int32,
        softmax_scale: Float32,
        softcap: Float32,
        window_left: Int32,
        window_right: Int32,
        sQ_l: cute.ComposedLayout,
        sKV_l: cute.ComposedLayout,
        mma_qk: cute.TiledMma,
        mma_pv: cute.TiledMma,
    ):
        c = self.config
        tidx, _, _ = cute.arch.thread_idx()
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        if warp == 0:
            for atom in (tma_q, tma_k, tma_v):
                cpasync.prefetch_descriptor(atom)
        storage = SmemAllocator().allocate(self.Storage)
        sQ = storage.q.get_tensor(sQ_l.outer, swizzle=sQ_l.inner)
        sK = storage.k.get_tensor(sKV_l.outer, swizzle=sKV_l.inner)
        sV = storage.v.get_tensor(sKV_l.outer, swizzle=sKV_l.inner)
        slot_barriers = storage.slot_barriers.data_ptr()
        words = storage.slots.get_tensor(cute.make_layout((SLOT_WORDS, SLOTS)))
        slots = Slots(words, slot_barriers, slot_barriers + SLOTS)
        warps = 4 * self.warpgroups
        kv_bytes = cute.size_in_bytes(self.dtype, cute.select(sKV_l, mode=[0, 1]))
        q_bytes = cute.size_in_bytes(self.dtype, cute.select(sQ_l, mode=[0, 1]))
        ring_q = pipelines.tma_ring(storage.q_barriers.data_ptr(), c.q_stages, q_bytes, warps)
        ring_k, ring_v = (
            pipelines.tma_ring(barriers.data_ptr(), c.stages, kv_bytes, warps, c.cluster_m)
            for barriers in (storage.k_barriers, storage.v_barriers)
        )
        if warp == 0:
            with cute.arch.elect_one():
                for i in cutlass.range_constexpr(SLOTS):
                    cute.arch.mbarrier_init(slots.full + i, 1)
                    cute.arch.mbarrier_init(slots.empty + i, 32 * (warps + 3))  # and three loaders
        cute.arch.mbarrier_init_fence()
        if const_expr(c.cluster_m > 1):
            cute.arch.cluster_arrive_relaxed()
            cute.arch.cluster_wait()
        else:
            cute.arch.sync_threads()

        if warp < 4:
            cute.arch.setmaxregister_decrease(c.producer_registers)
            window = (window_left, window_right)
            if warp == 0:
                scheduler.schedule(c, slots, extent, mCuQ, mCuK, mCounter)
            if warp == 1:
                loads.load_queries(c, tma_q, gQ, sQ, ring_q, slots, extent, *window)
            if warp == 2:
                loads.load_keys(c, tma_k, gK, sK, ring_k, slots, extent, q_heads_per_kv, *window)
            if warp == 3:
                loads.load_keys(c, tma_v, gV, sV, ring_v, slots, extent, q_heads_per_kv, *window)
        else:
            cute.arch.setmaxregister_increase(c.consumer_registers)
            self.consume(
                mO, mLSE, mSinks, sQ, sK, sV, ring_q, ring_k, ring_v, slots, extent,
                softmax_scale, softcap, window_left, window_right, mma_qk, mma_pv, tidx - 128,
            )  # fmt: skip

    @cute.jit
    def consume(
        self,
        mO: cute.Tensor,
        mLSE: cute.Tensor | None,
        mSinks: cute.Tensor | None,
        sQ: cute.Tensor,
        sK: cute.Tensor,
        sV: cute.Tensor,
        ring_q,
        ring_k,
        ring_v,
        slots: Slots,
        extent: Extent,
        softmax_scale: Float32,
        softcap: Float32,
        window_left: Int32,
        window_right: Int32,
        mma_qk: cute.TiledMma,
        mma_pv: cute.TiledMma,
        tid: Int32,
    ):
        """A consumer warpgroup: 64 rows of every tile, from scores to stores."""
        c = self.config
        wg = cute.arch.make_warp_uniform(tid // 128)
        frag = fragments(c, self.dtype, mma_qk, mma_pv, sQ, sK, sV, wg)
        scale = scale_of(c, softmax_scale, softcap)
        lane = tid % 32
        thread_row = tid // 32 * 16 + lane // 4
        column = 2 * (lane % 4)
        q_state = pipelines.consumer_state(c.q_stages)
        k_state = pipelines.consumer_state(c.stages)
        v_state = pipelines.consumer_state(c.stages)
        pipelines.first_turn(wg, self.turns)
        slot_state = pipelines.consumer_state(SLOTS)
        m_block, tile = scheduler.next_tile(c, slots, slot_state, extent)
        slot_state.advance()
        while m_block >= 0:
            row = m_block * c.tile_m + thread_row
            view = View(row, column, tile.seqlen_q, tile.seqlen_k, window_left, window_right)
            low, high, full_high, full_low = key_blocks(
                c, m_block * c.tile_m, c.tile_m, tile.seqlen_q, tile.seqlen_k,
                window_left, window_right,
            )  # fmt: skip
            frag.accO.fill(0.0)
            frag.row_max.fill(-Float32.inf)
            frag.row_sum.fill(0.0)
            if const_expr(c.own_blocks):
                # Of rows that see no key a block, all masked; of no rows nothing.
                tile_high, first_row = high, m_block * c.tile_m + wg * WARPGROUP_ROWS
                if const_expr(c.causal or c.local):
                    _, high, full_high, full_low = key_blocks(
                        c, first_row, WARPGROUP_ROWS, tile.seqlen_q, tile.seqlen_k,
                        window_left, window_right,
                    )  # fmt: skip
                    high = min(tile_high, max(high, low + 1))
                absent = first_row >= tile.seqlen_q * c.pack_gqa
                high = min(high, low) if absent else high
                for _ in cutlass.range(tile_high - high, unroll=1):
                    pipelines.pass_over(ring_k, k_state, wg, self.turns)
                    k_state.advance()
                    pipelines.pass_over(ring_v, v_state, wg, 1)
                    v_state.advance()
                if high <= low and low < tile_high:
                    pipelines.pass_over(ring_q, q_state, wg, 1)
                    q_state.advance()
            if high > low:
                pipelines.await_stage(ring_q, q_state)
                self.first_block(frag, view, scale, q_state, ring_k, k_state, wg, high - 1)
                k_state.advance()
                # high-2 .. masked_end: right edge; then no mask; below plain_end: left edge.
                masked_end, plain_end = high - 1, low
                if const_expr(c.causal or c.local):
                    masked_end = min(high - 1, max(low, full_high))
                    plain_end = min(masked_end, max(low, full_low))
                    for i in cutlass.range(high - 1 - masked_end, unroll=1):
                        self.block(
                            frag, view, scale, q_state, ring_k, k_state, ring_v, v_state, wg,
                            high - 2 - i, True,
                        )  # fmt: skip
                        k_state.advance()
                        v_state.advance()
                for _ in cutlass.range(masked_end - plain_end, unroll=1):
                    self.block(
                        frag, view, scale, q_state, ring_k, k_state, ring_v, v_state, wg, 0, False
                    )
                    k_state.advance()
                    v_state.advance()
                if const_expr(c.local):
                    for i in cutlass.range(plain_end - low, unroll=1):
                        self.block(
                            frag, view, scale, q_state, ring_k, k_state, ring_v, v_state, wg,
                            plain_end - 1 - i, True,
                        )  # fmt: skip
                        k_state.advance()
                        v_state.advance()
                ring_q.consumer_release(q_state)
                q_state.advance()
                last_product(frag, ring_v, v_state)
                v_state.advance()
            self.store(frag, mO, mLSE, mSinks, tile, row, lane, scale)
            m_block, tile = scheduler.next_tile(c, slots, slot_state, extent)
            slot_state.advance()

    @cute.jit
    def first_block(
        self, frag: Fragments, view: View, scale: Scale, q_state, ring_k, k_state, wg, n
    ):
        """Scores and softmax of the last block of keys: always masked, nothing to rescale."""
        pipelines.await_stage(ring_k, k_state)
        pipelines.take_turn(wg, self.turns)
        accS = cute.make_rmem_tensor(frag.layout_s, Float32)
        tSrK = frag.tSrK[None, None, None, k_state.index]
        matmul.issue(frag.mma_qk, accS, frag.tSrQ[None, None, None, q_state.index], tSrK, True)
        pipelines.pass_turn(wg, self.turns)
        warpgroup.wait_group(0)
        ring_k.consumer_release(k_state)
        self.softmax(frag, view, scale, accS, n, True, True)
        matmul.round_to_operand(matmul.acc_as_operand(accS), frag.rP)

    @cute.jit
    def block(
        self,
        frag: Fragments,
        view: View,
        scale: Scale,
        q_state,
        ring_k,
        k_state,
        ring_v,
        v_state,
        wg: Int32,
        n: Int32,
        masked: cutlass.Constexpr[bool],
    ):
        """QK of block n in flight with PV of the block before it; then softmax of block n."""
        pipelines.await_stage(ring_k, k_state)
        pipelines.take_turn(wg, self.turns)
        # A fresh accumulator for each block: with a reused one ptxas serialises every product.
        accS = cute.make_rmem_tensor(frag.layout_s, Float32)
        tSrQ = frag.tSrQ[None, None, None, q_state.index]
        matmul.issue(frag.mma_qk, accS, tSrQ, frag.tSrK[None, None, None, k_state.index], True)
        pipelines.await_stage(ring_v, v_state)
        tOrV = frag.tOrV[None, None, None, v_state.index]
        matmul.issue(frag.mma_pv, frag.accO, frag.rP, tOrV, False)
        pipelines.pass_turn(wg, self.turns)
        warpgroup.wait_group(1)
        ring_k.consumer_release(k_state)
        moved = self.softmax(frag, view, scale, accS, n, masked, False)
        warpgroup.wait_group(0)
        ring_v.consumer_release(v_state)
        matmul.round_to_operand(matmul.acc_as_operand(accS), frag.rP)
        if moved:
            rescale(matmul.acc_rows_cols(frag.accO), frag.alpha)

    @cute.jit
    def softmax(
        self,
        frag: Fragments,
        view: View,
        scale: Scale,
        accS: cute.Tensor,
        n: Int32,
        masked: cutlass.Constexpr[bool],
        first: cutlass.Constexpr[bool],
    ):
        """Cap, mask and exponentiate a block of scores in place."""
        c = self.config
        scores = matmul.acc_rows_cols(accS)
        if const_expr(c.softcap):
            soft_cap(scores, scale.cap_factor)
        if const_expr(masked):
            mask_scores(c, scores, view, n)
        return online_softmax(
            scores, frag.row_max, frag.row_sum, frag.alpha, scale.log2, first, c.rescale_log2
        )

    @cute.jit
    def store(
        self,
        frag: Fragments,
        mO: cute.Tensor,
        mLSE: cute.Tensor | None,
        mSinks: cute.Tensor | None,
        tile: Tile,
        row: Int32,
        lane: Int32,
        scale: Scale,
    ):
        """Normalise this thread's two rows and write them, with their LSE."""
        c = self.config
        out = matmul.acc_rows_cols(frag.accO)
        for r in cutlass.range_constexpr(cute.size(out, mode=[0])):
            packed_row = row + 8 * r
            token = packed_row // c.pack_gqa
            head = tile.head * c.pack_gqa + packed_row % c.pack_gqa
            visible = token < tile.seqlen_q
            sink = Float32(0.0)
            if const_expr(c.sinks):
                if visible:
                    sink = mSinks[head]
            factor, lse = finalize(
                frag.row_max[r], quad_sum(frag.row_sum[r]), scale.log2, sink, c.sinks
            )
            rO = cute.make_rmem_tensor(cute.size(out, mode=[1]), self.dtype)
            for col in cutlass.range_constexpr(cute.size(out, mode=[1])):
                rO[col] = (out[r, col] * factor).to(self.dtype)
            token += tile.q_start
            mRow = (
                mO[token, head, None] if const_expr(c.varlen) else mO[tile.batch, token, head, None]
            )
            store_row(cute.recast_tensor(rO, Int32), mRow, lane % 4, visible)
            if const_expr(c.return_lse):
                if visible and lane % 4 == 0:
                    if const_expr(c.varlen):
                        mLSE[token, head] = lse
                    else:
                        mLSE[tile.batch, token, head] = lse
