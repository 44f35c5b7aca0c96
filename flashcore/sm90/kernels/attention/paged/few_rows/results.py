"""The end of an item of few rows: what its warps have of each row is put together and stored.

    peaks, totals ──► shared memory ── barrier ──► every warp: the row's peak, and its own factor
    O^T, block by block ──► the stages of the item's last tile ── barrier ──► sums over the warps

Each warp sums up some of the columns, the warps in one order: results do not depend on timing.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr

from flashcore.sm90.config.paged import PagedConfig
from flashcore.sm90.kernels.attention.paged import barriers
from flashcore.sm90.kernels.attention.paged.few_rows.shape import CHUNK, Shape, Warp
from flashcore.sm90.kernels.attention.paged.operands import Operands
from flashcore.sm90.kernels.attention.paged.work_loop import Item
from flashcore.sm90.kernels.attention.parts import pipelines, warp_products
from flashcore.sm90.kernels.attention.parts.softmax import finalize

CHUNK_BYTES = 512  # of a warp's fp32 products: 16 columns, 8 rows


class Scratch(NamedTuple):
    """Shared memory by byte address: the stages of K and V that the item was done with last, and
    two numbers of each row and warp."""

    k: Int32
    v: Int32
    totals: Int32


class Factors(NamedTuple):
    """Of the rows of a lane: (2 x block)."""

    own: cute.Tensor  # of this warp's sums
    result: cute.Tensor  # of the sum of all warps
    lse: cute.Tensor


def own_bytes(shape: Shape) -> int:
    """Of a block of rows of one warp's sums."""
    return shape.v_chunks * CHUNK_BYTES


@cute.jit
def place(shape: cutlass.Constexpr[Shape], scratch: Scratch, warp: Int32) -> Int32:
    """Where a warp's sums go: some warps' lie in the stage of K, the others' in that of V."""
    at = warp * own_bytes(shape)
    in_v = at - shape.k.stage_bytes
    return scratch.k + at if in_v < 0 else scratch.v + in_v


@cute.jit
def finish(
    shape: cutlass.Constexpr[Shape], dtype: cutlass.Constexpr, m: Operands, item: Item, warp: Warp,
    scratch: Scratch, number: Int32, lane: Int32,
):  # fmt: skip
    """Put an item's rows together and write them to the output or to the partial results."""
    factors = factors_of(shape, m, item, warp, scratch, number, lane)
    part = const_expr(shape.v_chunks // shape.key_warps)  # of the columns, for each warp
    first_row = number % shape.row_warps * (8 * shape.blocks)
    first_chunk = number // shape.row_warps * part
    for b in cutlass.range_constexpr(shape.blocks):
        if const_expr(b > 0):
            barriers.sync_warpgroup(Int32(0))
        own = place(shape, scratch, number) + lane * 16
        for chunk in cutlass.range_constexpr(shape.v_chunks):
            sums = cute.make_rmem_tensor(4, Float32)
            for i in cutlass.range_constexpr(4):
                sums[i] = warp.out[i, chunk, b] * factors.own[2 * b + i % 2]
            warp_products.store_words(sums, own + chunk * CHUNK_BYTES)
        barriers.sync_warpgroup(Int32(0))
        sums = cute.make_rmem_tensor((4, part), Float32)
        for w in cutlass.range_constexpr(shape.key_warps):
            of_warp = Int32(w * shape.row_warps) + number % shape.row_warps
            at = place(shape, scratch, of_warp) + first_chunk * CHUNK_BYTES + lane * 16
            for n in cutlass.range_constexpr(part):
                read = warp_products.load_words(at + n * CHUNK_BYTES, 4)
                for i in cutlass.range_constexpr(4):
                    sums[i, n] = read[i] if const_expr(w == 0) else sums[i, n] + read[i]
        for e in cutlass.range_constexpr(2):
            row = first_row + 8 * b + 2 * (lane % 4) + e
            if row < item.num_rows:
                values = [
                    [sums[2 * h + e, n] * factors.result[2 * b + e] for h in range(2)]
                    for n in range(part)
                ]
                column = first_chunk * CHUNK + 2 * (lane // 4)
                store_columns(shape.config, dtype, m, item, row, values, column)
    if number // shape.row_warps == 0 and lane < 4:
        for r in cutlass.range_constexpr(2 * shape.blocks):
            row = first_row + (8 * (r // 2) + r % 2) + 2 * lane
            if row < item.num_rows:
                store_lse(shape.config, m, item, row, factors.lse[r])


@cute.jit
def factors_of(
    shape: cutlass.Constexpr[Shape], m: Operands, item: Item, warp: Warp, scratch: Scratch,
    number: Int32, lane: Int32,
) -> Factors:  # fmt: skip
    """Exchange peaks and totals; after it no warp reads the item's tiles any more."""
    c = const_expr(shape.config)
    rows = const_expr(2 * shape.blocks)
    own, result, lse = (cute.make_rmem_tensor(rows, Float32) for _ in range(3))
    first_row = number % shape.row_warps * (8 * shape.blocks)
    for r in cutlass.range_constexpr(rows):
        total = warp.total[r]
        for distance in cutlass.range_constexpr(3):
            total = total + cute.arch.shuffle_sync_bfly(total, 4 << distance)
        pair = cute.make_rmem_tensor(2, Float32)
        pair[0], pair[1] = warp.peak[r], total
        row = first_row + (8 * (r // 2) + r % 2) + 2 * (lane % 4)
        if lane < 4:
            at = scratch.totals + (number // shape.row_warps * shape.rows + row) * 8
            warp_products.store_words(pair, at)
    barriers.sync_warpgroup(Int32(0))
    v_scale = m.v_scale[item.kv_head]
    for r in cutlass.range_constexpr(rows):
        row = first_row + (8 * (r // 2) + r % 2) + 2 * (lane % 4)
        pairs = [
            warp_products.load_words(scratch.totals + (w * shape.rows + row) * 8, 2)
            for w in range(shape.key_warps)
        ]
        peak = pairs[0][0]
        for w in cutlass.range_constexpr(1, shape.key_warps):
            peak = cute.arch.fmax(peak, pairs[w][0])
        total = Float32(0.0)
        for w in cutlass.range_constexpr(shape.key_warps):
            total = total + pairs[w][1] * cute.math.exp2(pairs[w][0] - peak, fastmath=True)
        own[r] = cute.math.exp2(warp.peak[r] - peak, fastmath=True)
        sink = Float32(0.0)
        if const_expr(c.sinks):
            head = item.kv_head * c.group_size + (item.row_begin + row) % c.group_size
            sink = m.sinks[head]
        if item.partial < 0:
            result[r], lse[r] = finalize(peak, total, Float32(1.0), sink, c.sinks)
        else:
            result[r], lse[r] = finalize(peak, total, Float32(1.0), Float32(0.0), False)
        result[r] = result[r] * v_scale
    return Factors(own, result, lse)


@cute.jit
def store_columns(
    config: cutlass.Constexpr[PagedConfig], dtype: cutlass.Constexpr, m: Operands, item: Item,
    row: Int32, values: list[list[Float32]], column: Int32,
):  # fmt: skip
    """Pairs of a row's columns, 16 apart."""
    packed, head = place_of(config, item, row)
    if item.partial < 0:
        mRow = m.out[m.q_tokens[packed // config.group_size], head, None]
        store_pairs(mRow, dtype, values, column)
    else:
        first = item.row_begin // config.group_size
        mRow = m.partial_out[item.partial + packed // config.group_size - first, head, None]
        store_pairs(mRow, Float32, values, column)


@cute.jit
def store_pairs(
    mRow: cute.Tensor, dtype: cutlass.Constexpr, values: list[list[Float32]], column: Int32
):  # fmt: skip
    for n in cutlass.range_constexpr(len(values)):
        pair = cute.make_rmem_tensor(2, dtype)
        for h in cutlass.range_constexpr(2):
            pair[h] = values[n][h].to(dtype)
        at = (mRow.iterator + (column + CHUNK * n)).align(const_expr(8 if dtype is Float32 else 4))
        cute.autovec_copy(pair, cute.make_tensor(at, cute.make_layout(2)))


@cute.jit
def store_lse(
    config: cutlass.Constexpr[PagedConfig], m: Operands, item: Item, row: Int32, lse: Float32
):  # fmt: skip
    packed, head = place_of(config, item, row)
    if item.partial < 0:
        m.lse[m.q_tokens[packed // config.group_size], head] = lse
    else:
        first = item.row_begin // config.group_size
        m.partial_lse[item.partial + packed // config.group_size - first, head] = lse


@cute.jit
def place_of(config: cutlass.Constexpr[PagedConfig], item: Item, row: Int32):
    """(Packed row, query head) of a row of an item."""
    packed = item.row_begin + row
    return packed, item.kv_head * config.group_size + packed % config.group_size


@cute.jit
def release_last(ring_k: Any, ring_v: Any, state: Any):
    """Free the last stages, in which sums have been: loads write through another proxy."""
    cute.arch.fence_proxy("async.shared", space="cta")
    cute.arch.sync_warp()
    pipelines.release(ring_k, state)
    pipelines.release(ring_v, state)
