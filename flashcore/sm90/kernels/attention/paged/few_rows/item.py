"""Items of few rows on fp8 pages: operands exchanged, and converted on their way into registers.

An item of decode has 4 rows where WGMMA multiplies 64. Here keys, or columns of V, are the 16 rows
of mma.sync and packed rows its 8 columns, and each warp has keys of its own in every tile, with a
softmax of its own, until the item's end. With lane = 4 g + t, S^T = K Q^T and O^T = V^T P^T:

    K, 8 keys x 16 columns, ldmatrix         a lane has columns 4 t .. 4 t + 3 of key g; they are
      byte  4t   4t+1 4t+2 4t+3               k = 2 t, 2 t + 1, 2 t + 8, 2 t + 9 of the product,
            a0        a2                      and Q has its columns in the same places
    S^T                                      keys g (c0, c1), g + 8 (c2, c3); rows 2 t, 2 t + 1
    P^T   fp16 pairs, movmatrix              b0: keys 2 t, 2 t + 1 of row g; b1: those + 8
    V, 8 keys x 16 columns, ldmatrix.trans   a lane has columns 2 g, 2 g + 1 of keys 2 t, 2 t + 1;
      bytes, exchanged by prmt                columns 2 g are row g of the product (a0), columns
            a0        a1                      2 g + 1 are row g + 8 (a1); of keys + 8: a2, a3
    O^T                                      columns 2 g (c0, c1), 2 g + 1 (c2, c3); rows 2 t, + 1

The lanes of equal t hold a row, four warps have parts of it (results.py).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float16, Float32, Int32, Uint32, const_expr

from flashcore.sm90.kernels.attention.paged import convert
from flashcore.sm90.kernels.attention.paged.few_rows import nonfinite, results
from flashcore.sm90.kernels.attention.paged.few_rows.shape import Shape, Warp, sees
from flashcore.sm90.kernels.attention.paged.intervals import Bounds, row_interval
from flashcore.sm90.kernels.attention.paged.operands import Operands
from flashcore.sm90.kernels.attention.paged.work_loop import Item
from flashcore.sm90.kernels.attention.parts import matmul, pipelines, warp_products
from flashcore.sm90.kernels.attention.parts.consumer import here
from flashcore.sm90.kernels.attention.parts.softmax import Scale, soft_cap

UNSEEN = -1e30  # the peak of a row without a key: below any score, and no NaN comes of it
BOTH_KEYS = 0x3120  # of `permute_bytes`: column 2 g of two keys, then column 2 g + 1
FIRST_GONE, SECOND_GONE = 0x0404, 0x4040  # and zeros in place of one of them


class Loads(NamedTuple):
    """Stages of fp8 by byte address, their rings, and what warps exchange at an item's end."""

    k: Int32
    v: Int32
    ring_k: Any
    ring_v: Any
    totals: Int32


@cute.jit
def attend(
    shape: cutlass.Constexpr[Shape], dtype: cutlass.Constexpr, m: Operands, item: Item,
    window: Bounds, scale: Scale, loads: Loads, tiles: Int32, tid: Int32,
):  # fmt: skip
    """An item, from its queries to its results: tiles from the last to the first, as they come; the
    last stages are kept for the end.

    tiles: of K, and of V, that the CTA has had before.
    """
    c = const_expr(shape.config)
    tid = here(tid)  # or what comes of it takes registers of the other items, too
    lane, number = tid % 32, cute.arch.make_warp_uniform(tid // 32)
    warp = start(shape, m, item, window, number, lane)
    first_key = number // shape.row_warps * (16 * shape.key_blocks)
    in_k = loads.k + shape.k.row_offset(first_key) + shape.k.lane_offset(lane)
    in_v = loads.v + shape.v.row_offset(first_key) + shape.v.lane_offset(lane)
    state = pipelines.state_at(tiles, c.stages, False)
    for i in cutlass.range(item.end - item.first, unroll=1):
        n = item.end - 1 - i
        masked = n >= item.full_high
        if const_expr(c.window):
            masked = masked or n < item.full_low
        key = n * c.tile_n + first_key
        pipelines.await_stage(loads.ring_k, state)
        scores = multiply_keys(shape, warp, in_k + state.index * shape.k.stage_bytes)
        if n > item.first:
            pipelines.release(loads.ring_k, state)
        weights = softmax(shape, warp, scale, scores, key + lane // 4, masked)
        selectors = cute.make_rmem_tensor((2, shape.key_blocks), Int32)
        selectors.fill(BOTH_KEYS)
        if masked:
            clear_unseen(shape, item, selectors, key + 2 * (lane % 4))
        pipelines.await_stage(loads.ring_v, state)
        at = in_v + state.index * shape.v.stage_bytes
        if const_expr(c.window):
            found = Boolean(False)
            if item.all_low > n * c.tile_n or item.all_high < (n + 1) * c.tile_n:
                found = nonfinite.found(shape, at, selectors)
            if found:
                nonfinite.add_by_hand(shape, warp, at, selectors, key + lane // 4)
                multiply_values(shape, warp, weights, at, selectors, True)
            else:
                multiply_values(shape, warp, weights, at, selectors, False)
        else:
            multiply_values(shape, warp, weights, at, selectors, False)
        if n > item.first:
            pipelines.release(loads.ring_v, state)
            state.advance()
    scratch = results.Scratch(
        loads.k + state.index * shape.k.stage_bytes,
        loads.v + state.index * shape.v.stage_bytes,
        loads.totals,
    )
    results.finish(shape, dtype, m, item, warp, scratch, number, lane)
    results.release_last(loads.ring_k, loads.ring_v, state)


@cute.jit
def start(
    shape: cutlass.Constexpr[Shape], m: Operands, item: Item, window: Bounds, number: Int32,
    lane: Int32,
) -> Warp:  # fmt: skip
    """Queries of row g of each block, intervals of rows 2 t and 2 t + 1, and nothing seen yet."""
    c = const_expr(shape.config)
    rows = const_expr(2 * shape.blocks)
    queries = cute.make_rmem_tensor((2, shape.k_steps, shape.blocks), Int32)
    low, high = (cute.make_rmem_tensor(rows, Int32) for _ in range(2))
    first_row = number % shape.row_warps * (8 * shape.blocks)
    for b in cutlass.range_constexpr(shape.blocks):
        row = first_row + 8 * b + lane // 4
        # Rows past num_rows are the first row's.
        packed = item.row_begin + (row if row < item.num_rows else Int32(0))
        head = item.kv_head * c.group_size + packed % c.group_size
        mRow = m.q[m.q_tokens[packed // c.group_size], head, None]
        for step in cutlass.range_constexpr(shape.k_steps):
            pairs = warp_products.load_pairs(mRow, 16 * step + 4 * (lane % 4))
            for h in cutlass.range_constexpr(2):
                queries[h, step, b] = pairs[h]
        for e in cutlass.range_constexpr(2):
            row = first_row + 8 * b + 2 * (lane % 4) + e
            packed = item.row_begin + (row if row < item.num_rows else Int32(0))
            position = m.q_positions[packed // c.group_size] - item.kv_offset
            low[2 * b + e], high[2 * b + e] = row_interval(
                c, position, Int32(0), item.num_tokens, window
            )
    if const_expr(m.q.element_type is not Float16):
        for b in cutlass.range_constexpr(shape.blocks):
            for step in cutlass.range_constexpr(shape.k_steps):
                for h in cutlass.range_constexpr(2):
                    queries[h, step, b] = as_fp16(queries[h, step, b])
    out = cute.make_rmem_tensor((4, shape.v_chunks, shape.blocks), Float32)
    peak, total = (cute.make_rmem_tensor(rows, Float32) for _ in range(2))
    out.fill(0.0)
    peak.fill(UNSEEN)
    total.fill(0.0)
    return Warp(queries, low, high, out, peak, total)


def as_fp16(pair: Int32) -> Int32:
    """Of two bf16."""
    return Int32(convert.pair_as_fp16(Uint32(pair)))


@cute.jit
def multiply_keys(shape: cutlass.Constexpr[Shape], warp: Warp, at: Int32) -> cute.Tensor:
    """S^T of this warp's keys: (4, block of rows, block of keys)."""
    c = const_expr(shape.config)
    scores = cute.make_rmem_tensor((4, shape.blocks, shape.key_blocks), Float32)
    chains = const_expr(shape.chains)
    for kb in cutlass.range_constexpr(shape.key_blocks):
        # Products in turn to several sums: each waits for the one before it.
        sums = cute.make_rmem_tensor((4, chains, shape.blocks), Float32)
        sums.fill(0.0)
        for pair in cutlass.range_constexpr(shape.k_steps // 2):
            words = warp_products.load_matrices(shape.k.address(at, kb, pair), False)
            wide = warp_products.widen(words, c.kv_dtype)
            for h in cutlass.range_constexpr(2):
                a = [wide[4 * h], wide[4 * h + 2], wide[4 * h + 1], wide[4 * h + 3]]
                step = const_expr(2 * pair + h)
                for b in cutlass.range_constexpr(shape.blocks):
                    q = [warp.queries[0, step, b], warp.queries[1, step, b]]
                    warp_products.multiply(sums[None, step % chains, b], a, q)
        for b in cutlass.range_constexpr(shape.blocks):
            for i in cutlass.range_constexpr(4):
                score = sums[i, 0, b]
                for chain in cutlass.range_constexpr(1, chains):
                    score = score + sums[i, chain, b]
                scores[i, b, kb] = score
    return scores


@cute.jit
def softmax(
    shape: cutlass.Constexpr[Shape], warp: Warp, scale: Scale, scores: cute.Tensor, key: Int32,
    masked: Boolean,
):  # fmt: skip
    """P^T as the product's operand: (2, block of rows, block of keys) words. key: the lane's first.

    A peak is looked for only where a score is far above the last one: in a row's first tile, and
    hardly ever after it, so lanes do not exchange anything in most tiles.
    """
    c = const_expr(shape.config)
    if const_expr(c.softcap):
        for kb in cutlass.range_constexpr(shape.key_blocks):
            soft_cap(scores[None, None, kb], scale.cap_factor)
    if masked:
        for kb in cutlass.range_constexpr(shape.key_blocks):
            for b in cutlass.range_constexpr(shape.blocks):
                for i in cutlass.range_constexpr(4):
                    seen = sees(c.window, warp, 2 * b + i % 2, key + (16 * kb + 8 * (i // 2)))
                    scores[i, b, kb] = scores[i, b, kb] if seen else -Float32.inf
    moved = Boolean(False)
    for kb in cutlass.range_constexpr(shape.key_blocks):
        for b in cutlass.range_constexpr(shape.blocks):
            for i in cutlass.range_constexpr(4):
                above = scores[i, b, kb] * scale.log2 - warp.peak[2 * b + i % 2]
                moved = moved or above > c.rescale_log2
    if cute.arch.vote_any_sync(moved):
        move_peaks(shape, warp, scale, scores)
    weights = cute.make_rmem_tensor((2, shape.blocks, shape.key_blocks), Int32)
    for kb in cutlass.range_constexpr(shape.key_blocks):
        for b in cutlass.range_constexpr(shape.blocks):
            for h in cutlass.range_constexpr(2):
                p = []
                for e in cutlass.range_constexpr(2):
                    r = const_expr(2 * b + e)
                    above = scores[2 * h + e, b, kb] * scale.log2 - warp.peak[r]
                    p.append(cute.math.exp2(above, fastmath=True))
                    warp.total[r] = warp.total[r] + p[e]
                pair = matmul.pack_pair(p[0], p[1], Float16)
                weights[h, b, kb] = warp_products.transpose(pair)
    return weights


@cute.jit
def move_peaks(
    shape: cutlass.Constexpr[Shape], warp: Warp, scale: Scale, scores: cute.Tensor
):  # fmt: skip
    """Peaks of this warp's keys where they lag too far, and what has been summed up with them."""
    c = const_expr(shape.config)
    for b in cutlass.range_constexpr(shape.blocks):
        for e in cutlass.range_constexpr(2):
            top = scores[e, b, 0]
            for kb in cutlass.range_constexpr(shape.key_blocks):
                for h in cutlass.range_constexpr(2):
                    top = cute.arch.fmax(top, scores[2 * h + e, b, kb])
            for distance in cutlass.range_constexpr(3):
                top = cute.arch.fmax(top, cute.arch.shuffle_sync_bfly(top, 4 << distance))
            r = const_expr(2 * b + e)
            peak = warp.peak[r]
            top = top * scale.log2
            top = top if top - peak > c.rescale_log2 else peak
            alpha = cute.math.exp2(peak - top, fastmath=True)
            warp.peak[r] = top
            warp.total[r] = warp.total[r] * alpha
            for chunk in cutlass.range_constexpr(shape.v_chunks):
                for h in cutlass.range_constexpr(2):
                    warp.out[2 * h + e, chunk, b] = warp.out[2 * h + e, chunk, b] * alpha


@cute.jit
def clear_unseen(
    shape: cutlass.Constexpr[Shape], item: Item, selectors: cute.Tensor, key: Int32
):  # fmt: skip
    """Zeros in place of the keys that no row sees, which may be NaN, and 0 * NaN is NaN."""
    for kb in cutlass.range_constexpr(shape.key_blocks):
        for h in cutlass.range_constexpr(2):
            first = key + (16 * kb + 8 * h)
            selector = Int32(BOTH_KEYS)
            if first < item.low or first >= item.high:
                selector = (selector & ~0x0F0F) | FIRST_GONE
            if first + 1 < item.low or first + 1 >= item.high:
                selector = (selector & ~0xF0F0) | SECOND_GONE
            selectors[h, kb] = selector


@cute.jit
def multiply_values(
    shape: cutlass.Constexpr[Shape], warp: Warp, weights: cute.Tensor, at: Int32,
    selectors: cute.Tensor, finite: cutlass.Constexpr[bool],
):  # fmt: skip
    """O^T += V^T P^T; finite: of what is finite alone."""
    c = const_expr(shape.config)
    for kb in cutlass.range_constexpr(shape.key_blocks):
        for pair in cutlass.range_constexpr(shape.v_chunks // 2):
            words = warp_products.load_matrices(shape.v.address(at, kb, pair), True)
            for i in cutlass.range_constexpr(4):
                words[i] = warp_products.permute_bytes(words[i], selectors[i % 2, kb])
                if const_expr(finite):
                    words[i] = words[i] & ~nonfinite.bytes_of(words[i], c.kv_dtype)
            wide = warp_products.widen(words, c.kv_dtype)
            for h in cutlass.range_constexpr(2):
                a = [wide[4 * h + i] for i in range(4)]
                for b in cutlass.range_constexpr(shape.blocks):
                    p = [weights[0, b, kb], weights[1, b, kb]]
                    warp_products.multiply(warp.out[None, 2 * pair + h, b], a, p)
