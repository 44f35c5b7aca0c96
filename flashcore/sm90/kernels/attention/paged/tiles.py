"""A consumer warpgroup's tiles of an item: queries, products by WGMMA, masks, softmax."""

from __future__ import annotations

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr
from cutlass.cute.nvgpu import warpgroup

from flashcore.sm90.config.paged import PagedConfig
from flashcore.sm90.kernels.attention.paged import barriers, convert, nonfinite, pages
from flashcore.sm90.kernels.attention.paged.intervals import Rows, mask_scores
from flashcore.sm90.kernels.attention.paged.operands import Operands
from flashcore.sm90.kernels.attention.paged.work_loop import Item
from flashcore.sm90.kernels.attention.parts import matmul, pipelines
from flashcore.sm90.kernels.attention.parts.consumer import Fragments, here
from flashcore.sm90.kernels.attention.parts.softmax import (
    Scale,
    online_softmax,
    rescale,
    soft_cap,
)


class Thread(NamedTuple):
    """A consumer thread."""

    wg: Int32
    tid: Int32  # among all consumers
    lane: Int32
    row: Int32  # its first in the tile
    column: Int32  # its first


class TileConsumer:
    """What `kernel.PagedAttention` does with a tile."""

    config: PagedConfig
    dtype: type  # of the products
    out_dtype: type
    warpgroups: int

    @cute.jit
    def load_queries(
        self, m: Operands, item: Item, rows: Rows, sQ: cute.Tensor | None, frag: Fragments,
        wg: Int32, tid: Int32,
    ):  # fmt: skip
        """Gather this warpgroup's rows of Q; its last products have been waited for."""
        if const_expr(self.config.q_registers):
            lane = tid % 32
            convert.load_queries(
                self.config, m, item, rows, frag.tSrQ, tid // 32 * 16 + lane // 4, 2 * (lane % 4)
            )
        else:
            barriers.sync_warpgroup(wg)
            if const_expr(self.config.window and self.config.k_columns == 256):
                tid = here(tid)  # no register is left to keep addresses in from item to item
            if const_expr(self.out_dtype is not self.dtype):
                convert.gather_queries(self.config, m, item, sQ, wg * 64, tid % 128)
            else:
                pages.gather_queries(
                    self.config, m.q, m.q_tokens, sQ, item.kv_head, item.row_begin, item.num_rows,
                    wg * 64, tid % 128,
                )  # fmt: skip
                cute.arch.cp_async_commit_group()
                cute.arch.cp_async_wait_group(0)
            cute.arch.fence_proxy("async.shared", space="cta")
            barriers.sync_warpgroup(wg)

    @cute.jit
    def first_tile(
        self, frag: Fragments, rows: Rows, m: Operands, scale: Scale, sV: cute.Tensor, ring_k,
        k_state, ring_v, v_state, wg: Int32, tid: Int32, item: Item, column: Int32,
    ):  # fmt: skip
        """Scores and softmax of the item's last tile: always masked, nothing to rescale."""
        pipelines.await_stage(ring_k, k_state)
        pipelines.take_turn(wg, self.warpgroups)
        accS = cute.make_rmem_tensor(frag.layout_s, Float32)
        tSrK = frag.tSrK[None, None, None, k_state.index]
        matmul.issue(frag.mma_qk, accS, frag.tSrQ, tSrK, True, self.config.k_steps)
        pipelines.pass_turn(wg, self.warpgroups)
        warpgroup.wait_group(0)
        ring_k.consumer_release(k_state)
        n = item.end - 1
        self.softmax(frag, rows, m, scale, accS, column + n * self.config.tile_n, True, True)
        matmul.round_to_operand(matmul.acc_as_operand(accS), frag.rP)
        self.clear_unseen(frag, rows, m, sV, ring_v, v_state, item, column, n, tid)

    @cute.jit
    def tile(
        self, frag: Fragments, rows: Rows, m: Operands, scale: Scale, sV: cute.Tensor, ring_k,
        k_state, ring_v, v_state, wg: Int32, tid: Int32, item: Item, column: Int32, n: Int32,
        masked: cutlass.Constexpr[bool],
    ):  # fmt: skip
        """QK of tile n in flight with PV of the tile before it; then softmax of tile n."""
        pipelines.await_stage(ring_k, k_state)
        pipelines.take_turn(wg, self.warpgroups)
        # A fresh accumulator for each tile: with a reused one ptxas serialises every product.
        accS = cute.make_rmem_tensor(frag.layout_s, Float32)
        tSrK = frag.tSrK[None, None, None, k_state.index]
        matmul.issue(frag.mma_qk, accS, frag.tSrQ, tSrK, True, self.config.k_steps)
        pipelines.await_stage(ring_v, v_state)
        tOrV = frag.tOrV[None, None, None, v_state.index]
        matmul.issue(frag.mma_pv, frag.accO, frag.rP, tOrV, False)
        pipelines.pass_turn(wg, self.warpgroups)
        warpgroup.wait_group(1)
        ring_k.consumer_release(k_state)
        key = column + n * self.config.tile_n
        moved = self.softmax(frag, rows, m, scale, accS, key, masked, False)
        warpgroup.wait_group(0)
        ring_v.consumer_release(v_state)
        matmul.round_to_operand(matmul.acc_as_operand(accS), frag.rP)
        if moved:
            rescale(matmul.acc_rows_cols(frag.accO), frag.alpha)
        if const_expr(masked):
            following = v_state.clone()
            following.advance()
            self.clear_unseen(frag, rows, m, sV, ring_v, following, item, column, n, tid)

    @cute.jit
    def clear_unseen(
        self, frag: Fragments, rows: Rows, m: Operands, sV: cute.Tensor, ring_v, v_state,
        item: Item, column: Int32, n: Int32, tid: Int32,
    ):  # fmt: skip
        """Zero what no row of the item sees of V tile n, and with a window what is not finite and
        not every row sees; all consumers take part, with nothing in flight."""
        c = self.config
        begin, end = item.low - n * c.tile_n, item.high - n * c.tile_n
        if const_expr(c.window):
            all_low, all_high = item.all_low - n * c.tile_n, item.all_high - n * c.tile_n
            seen = nonfinite.Seen(begin, end, all_low, all_high)
            if all_low > 0 or all_high < c.tile_n:
                pipelines.await_stage(ring_v, v_state)
                stage = sV[None, None, v_state.index]
                nonfinite.clear(
                    c, frag.accO, rows, m.tree_mask, stage, seen, n * c.tile_n, column, tid
                )
        elif const_expr(not convert.clears_v(c)):
            if begin > 0 or end < c.tile_n:
                pipelines.await_stage(ring_v, v_state)
                pages.clear_rows(c, sV[None, None, v_state.index], begin, end, tid)
                cute.arch.fence_proxy("async.shared", space="cta")
                barriers.sync_consumers(self.warpgroups)

    @cute.jit
    def softmax(
        self, frag: Fragments, rows: Rows, m: Operands, scale: Scale, accS: cute.Tensor, key: Int32,
        masked: cutlass.Constexpr[bool], first: cutlass.Constexpr[bool],
    ):  # fmt: skip
        """Cap, mask and exponentiate a tile of scores in place."""
        c = self.config
        scores = matmul.acc_rows_cols(accS)
        if const_expr(c.softcap):
            soft_cap(scores, scale.cap_factor)
        if const_expr(masked):
            mask_scores(c, scores, rows, m.tree_mask, key)
        return online_softmax(
            scores, frag.row_max, frag.row_sum, frag.alpha, scale.log2, first, c.rescale_log2
        )
