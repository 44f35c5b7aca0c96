"""From a consumer's registers to the output, or to partial results."""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr

from flashcore.sm90.config.paged import PagedConfig
from flashcore.sm90.kernels.attention.paged.intervals import Rows
from flashcore.sm90.kernels.attention.paged.operands import Operands
from flashcore.sm90.kernels.attention.paged.work_loop import Item
from flashcore.sm90.kernels.attention.parts import fold, matmul
from flashcore.sm90.kernels.attention.parts.consumer import Fragments
from flashcore.sm90.kernels.attention.parts.epilogue import store_row
from flashcore.sm90.kernels.attention.parts.softmax import Scale, finalize, quad_sum


@cute.jit
def store_rows(
    c: cutlass.Constexpr[PagedConfig],
    dtype: cutlass.Constexpr,
    frag: Fragments,
    m: Operands,
    item: Item,
    rows: Rows,
    thread_row: Int32,
    lane: Int32,
    scale: Scale,
):
    """Normalise this thread's two rows; write them to the output or to the partial results."""
    out = matmul.acc_rows_cols(frag.accO)
    v_scale = Float32(1.0)
    if const_expr(c.scaled and not c.chunked):  # chunks have been multiplied
        v_scale = m.v_scale[item.kv_head]
    columns = const_expr((c.v_head_dim + 31) // 32 * 8)  # of a thread: what `store_row` takes
    for r in cutlass.range_constexpr(2):
        row = thread_row + 8 * r
        packed = item.row_begin + row
        head = item.kv_head * c.group_size + packed % c.group_size
        there = row < item.num_rows
        total = frag.row_sum[r]
        if const_expr(not c.chunked):
            total = quad_sum(total)
        if item.partial < 0:
            sink = Float32(0.0)
            if const_expr(c.sinks):
                sink = m.sinks[head]
            if const_expr(c.chunked):
                factor, lse = fold.finish(frag.row_max[r], total, sink, c.sinks)
            else:
                factor, lse = finalize(frag.row_max[r], total, scale.log2, sink, c.sinks)
            if const_expr(c.scaled and not c.chunked):
                factor = factor * v_scale
            rO = cute.make_rmem_tensor(columns, dtype)
            for col in cutlass.range_constexpr(columns):
                rO[col] = (out[r, col] * factor).to(dtype)
            token = rows.token[r]
            store_row(cute.recast_tensor(rO, Int32), m.out[token, head, None], lane % 4, there)
            if there and lane % 4 == 0:
                m.lse[token, head] = lse
        else:
            if const_expr(c.chunked):
                factor, lse = fold.finish(frag.row_max[r], total, Float32(0.0), False)
            else:
                factor, lse = finalize(frag.row_max[r], total, scale.log2, Float32(0.0), False)
            if const_expr(c.scaled and not c.chunked):
                factor = factor * v_scale
            first = item.row_begin // c.group_size
            partial = item.partial + packed // c.group_size - first
            if there:
                mRow = m.partial_out[partial, head, None]
                for col in cutlass.range_constexpr(0, c.v_head_dim // 4, 2):
                    pair = cute.make_rmem_tensor(2, Float32)
                    pair[0], pair[1] = out[r, col] * factor, out[r, col + 1] * factor
                    at = (mRow.iterator + (4 * col + 2 * (lane % 4))).align(8)
                    cute.autovec_copy(pair, cute.make_tensor(at, cute.make_layout(2)))
                if lane % 4 == 0:
                    m.partial_lse[partial, head] = lse
