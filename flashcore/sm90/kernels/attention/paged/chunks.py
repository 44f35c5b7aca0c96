"""Consumers of a chunked kernel: each chunk by itself, then the fold of the chunks of an item.

An item of one chunk ends in registers. In one of several the running total waits in shared memory,
each thread's own elements where only it goes: touched once a chunk, it would cost registers in
every tile.
"""

from __future__ import annotations

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr

from flashcore.contract.chunks import CHUNK_TOKENS
from flashcore.sm90.config.paged import PagedConfig
from flashcore.sm90.kernels.attention.paged import convert, work_loop
from flashcore.sm90.kernels.attention.paged.epilogue import store_rows
from flashcore.sm90.kernels.attention.paged.intervals import Bounds, row_intervals
from flashcore.sm90.kernels.attention.paged.operands import Operands
from flashcore.sm90.kernels.attention.paged.work_loop import Slot
from flashcore.sm90.kernels.attention.parts import fold, matmul, pipelines
from flashcore.sm90.kernels.attention.parts.consumer import (
    ROWS,
    Fragments,
    fragments,
    last_product,
)
from flashcore.sm90.kernels.attention.parts.softmax import Scale, quad_sum, scale_of

VECTOR = 4  # fp32 elements of a 16-byte access
QUAD = 4  # lanes that hold a row


class Totals(NamedTuple):
    """Shared memory of the running totals of an item's rows."""

    out: cute.Tensor  # (VECTOR, consumer threads, elements of a thread / VECTOR)
    rows: cute.Tensor  # (consumer threads): of a quad, peaks and totals of its two rows


class ChunkedConsumer:
    """What `kernel.PagedAttention` does where its config is chunked."""

    @cute.jit
    def consume_chunks(
        self,
        m: Operands,
        sQ: cute.Tensor,
        sK: cute.Tensor,
        sV: cute.Tensor,
        totals: Totals,
        ring_k,
        ring_v,
        slot: Slot,
        softmax_scale: Float32,
        softcap: Float32,
        window: Bounds,
        mma_qk: cute.TiledMma,
        mma_pv: cute.TiledMma,
        tid: Int32,
    ):
        """A consumer warpgroup: 64 packed rows of every item, from scores to stores."""
        c = self.config
        wg = cute.arch.make_warp_uniform(tid // 128)
        frag = fragments(c, self.dtype, mma_qk, mma_pv, sQ, sK, sV, wg)
        scale = scale_of(c, softmax_scale, softcap)
        lane = tid % 32
        thread_row = tid // 32 * 16 + lane // 4
        column = 2 * (lane % 4)
        k_state, v_state = (pipelines.consumer_state(stages) for stages in c.product_stages)
        pipelines.first_turn(wg, self.warpgroups)
        per_chunk = const_expr(CHUNK_TOKENS // c.tile_n)
        slot_phase = Int32(0)
        item = work_loop.await_item(slot, slot_phase)
        while item.valid >= 0:
            slot_phase ^= 1
            rows = row_intervals(c, m, item, window, thread_row)
            of_item, v_scale = scale, Float32(1.0)
            if const_expr(c.scaled):
                of_item = convert.item_scale(c, scale, m, item.kv_head)
                v_scale = m.v_scale[item.kv_head]
            frag.accO.fill(0.0)
            frag.row_max.fill(-Float32.inf)
            frag.row_sum.fill(0.0)
            if item.end > item.first:
                self.load_queries(m, item, rows, sQ, frag, wg, tid)
                end = item.end
                while end > item.first:
                    begin = max(item.first, (end - 1) // per_chunk * per_chunk)
                    frag.accO.fill(0.0)
                    self.first_tile(
                        frag, rows, m, of_item, sV, ring_k, k_state, ring_v, v_state, wg, tid,
                        item._replace(end=end), column,
                    )  # fmt: skip
                    k_state.advance()
                    last = end - 1
                    masked_end = min(last, max(begin, item.full_high))
                    plain_end = min(masked_end, max(begin, item.full_low))
                    for j in cutlass.range(last - masked_end, unroll=1):
                        self.tile(
                            frag, rows, m, of_item, sV, ring_k, k_state, ring_v, v_state, wg, tid,
                            item, column, last - 1 - j, True,
                        )  # fmt: skip
                        k_state.advance()
                        v_state.advance()
                    for _ in cutlass.range(masked_end - plain_end, unroll=1):
                        self.tile(
                            frag, rows, m, of_item, sV, ring_k, k_state, ring_v, v_state, wg, tid,
                            item, column, 0, False,
                        )  # fmt: skip
                        k_state.advance()
                        v_state.advance()
                    if const_expr(c.window):
                        for j in cutlass.range(plain_end - begin, unroll=1):
                            self.tile(
                                frag, rows, m, of_item, sV, ring_k, k_state, ring_v, v_state, wg,
                                tid, item, column, plain_end - 1 - j, True,
                            )  # fmt: skip
                            k_state.advance()
                            v_state.advance()
                    last_product(frag, ring_v, v_state)
                    v_state.advance()
                    close(c, frag, of_item, v_scale)
                    if end < item.end:
                        add_to_total(frag, totals, tid)
                    if begin > item.first:
                        keep_total(frag, totals, tid)
                    end = begin
            store_rows(c, self.out_dtype, frag, m, item, rows, thread_row, lane, of_item)
            item = work_loop.await_item(slot, slot_phase)


@cute.jit
def close(config: cutlass.Constexpr[PagedConfig], frag: Fragments, scale: Scale, v_scale: Float32):
    """From what the online softmax leaves to a total of one chunk."""
    out = matmul.acc_rows_cols(frag.accO)
    for r in cutlass.range_constexpr(ROWS):
        factor, lse = fold.close(frag.row_max[r], quad_sum(frag.row_sum[r]), scale.log2)
        if const_expr(config.scaled):
            factor = fold.mul(factor, v_scale)
        for col in cutlass.range_constexpr(cute.size(out, mode=[1])):
            out[r, col] = fold.mul(out[r, col], factor)
        frag.row_max[r] = lse
        frag.row_sum[r] = fold.exponent(lse, lse)


@cute.jit
def add_to_total(frag: Fragments, totals: Totals, tid: Int32):
    """The total with the chunk in `frag`, in `frag`."""
    peaks, sums = rows_of(totals, tid)
    before, added = (cute.make_rmem_tensor(ROWS, Float32) for _ in range(2))
    first = [peaks[r] == -Float32.inf for r in range(ROWS)]
    unseen = [frag.row_max[r] == -Float32.inf for r in range(ROWS)]
    for r in cutlass.range_constexpr(ROWS):
        frag.row_max[r], frag.row_sum[r], before[r], added[r] = fold.factors(
            peaks[r], sums[r], frag.row_max[r]
        )
    for i in cutlass.range_constexpr(cute.size(frag.accO) // VECTOR):
        x = cute.make_rmem_tensor(VECTOR, Float32)
        cute.autovec_copy(vector(totals, tid, i), x)
        for j in cutlass.range_constexpr(VECTOR):
            r = const_expr(row_of(j))
            frag.accO[VECTOR * i + j] = fold.weigh(
                x[j], frag.accO[VECTOR * i + j], before[r], added[r], first[r], unseen[r]
            )


@cute.jit
def keep_total(frag: Fragments, totals: Totals, tid: Int32):
    """Put the total in `frag` away until the next chunk is done."""
    for i in cutlass.range_constexpr(cute.size(frag.accO) // VECTOR):
        x = cute.make_rmem_tensor(VECTOR, Float32)
        for j in cutlass.range_constexpr(VECTOR):
            x[j] = frag.accO[VECTOR * i + j]
        cute.autovec_copy(x, vector(totals, tid, i))
    low = frag.row_max[1] if tid % 2 == 1 else frag.row_max[0]
    high = frag.row_sum[1] if tid % 2 == 1 else frag.row_sum[0]
    totals.rows[tid] = high if tid % QUAD >= 2 else low


@cute.jit
def rows_of(totals: Totals, tid: Int32):
    """Peaks and totals of this thread's two rows: each lane of the quad keeps one of the four."""
    own, quad = totals.rows[tid], tid % 32 // QUAD * QUAD
    values = [cute.arch.shuffle_sync(own, quad + k) for k in range(QUAD)]
    return values[:2], values[2:]


@cute.jit
def vector(totals: Totals, tid: Int32, i: cutlass.Constexpr[int]) -> cute.Tensor:
    """The i-th four elements of a thread."""
    at = totals.out[None, tid, i].iterator.align(16)
    return cute.make_tensor(at, cute.make_layout(VECTOR))


def row_of(element: int) -> int:
    """Row of a thread's element of a WGMMA accumulator: two columns of one, then of the other."""
    return element // 2 % ROWS


def totals_layout(config: PagedConfig) -> cute.Layout:
    """Neighbouring threads' vectors are neighbours: no bank is asked twice."""
    threads = 128 * config.num_consumer_warpgroups
    elements = config.v_columns // 2
    return cute.make_layout(
        (VECTOR, threads, elements // VECTOR), stride=(1, VECTOR, VECTOR * threads)
    )
