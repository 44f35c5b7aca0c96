"""K/V rows gathered by cp.async: the load path for pages too short for a TMA box each.

The four producer warps copy a quarter of every tile each. A lane finds the addresses of one row;
eight lanes copy a row's 128-byte pieces, 16 bytes each, as the swizzle of the stages has them.
"""

from __future__ import annotations

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64, const_expr
from cutlass.cute.nvgpu import cpasync

from flashcore.config.paged import PagedConfig
from flashcore.kernels.parts import device_plan, pipelines, work_loop
from flashcore.kernels.parts.intervals import Bounds, measure_item
from flashcore.kernels.parts.pages import VECTOR
from flashcore.kernels.parts.work_loop import Item, Slot
from flashcore.planner.work import Work

LANES_PER_ROW = 8
ROWS_PER_COPY = 4  # of a warp


class Rows(NamedTuple):
    """K or V of one KV head: byte addresses, 64-bit since pools exceed 2^31 elements."""

    head: Int64  # row 0 of page 0
    page_bytes: Int64
    token_bytes: Int64


@cute.jit
def head_rows(mPages: cute.Tensor, kv_head: Int32) -> Rows:
    """Rows of one KV head of a pool (page, row, kv head, dim)."""
    size = const_expr(mPages.element_type.width // 8)
    page, token, head, _ = mPages.stride
    start = mPages.iterator.toint() + Int64(kv_head) * Int64(head) * size
    return Rows(start, Int64(page) * size, Int64(token) * size)


@cute.jit
def lane_token(config: cutlass.Constexpr[PagedConfig], n: Int32, item: Item, warp: Int32) -> Int32:
    """Token of the run that this lane finds for tile n; past the run's end, its last token.

    A repeated row is masked like any row past the end, and its bytes come from L2.
    """
    rows = const_expr(config.tile_n // 4)
    row = warp * rows + cute.arch.lane_idx() % rows
    return max(min(n * config.tile_n + row, item.num_tokens - 1), 0)


@cute.jit
def lane_page(
    config: cutlass.Constexpr[PagedConfig], mCols: cute.Tensor, n: Int32, item: Item, warp: Int32
) -> Int32:
    """Page of `lane_token`: neighbouring lanes read neighbouring entries."""
    return mCols[item.entry + lane_token(config, n, item, warp) // config.page_tokens]


@cute.jit
def copy_tile(
    config: cutlass.Constexpr[PagedConfig],
    rows: Rows,
    sKV: cute.Tensor,  # (tile_n, dim, stage)
    page: Int32,  # lane_page of tile n
    n: Int32,
    item: Item,
    warp: Int32,
    ring,
    state,
):
    """Start this warp's quarter of one tile into the ring's next stage."""
    c = config
    lane = cute.arch.lane_idx()
    in_page = lane_token(c, n, item, warp) % c.page_tokens
    address = rows.head + Int64(page) * rows.page_bytes + Int64(in_page) * rows.token_bytes
    atom = cute.make_copy_atom(
        cpasync.CopyG2SOp(cache_mode=cpasync.LoadCacheMode.GLOBAL),
        sKV.element_type,
        num_bits_per_copy=128,
    )
    ring.producer_acquire(state)
    sVectors = cute.logical_divide(sKV[None, None, state.index], (None, VECTOR))
    vector = lane % LANES_PER_ROW
    for i in cutlass.range(c.tile_n // 4 // ROWS_PER_COPY, unroll=c.gather_unroll):
        row = i * ROWS_PER_COPY + lane // LANES_PER_ROW
        row_address = cute.arch.shuffle_sync(address, row) + Int64(16 * vector)
        for j in cutlass.range_constexpr(c.head_dim // (VECTOR * LANES_PER_ROW)):
            src = cute.make_ptr(
                sKV.element_type,
                row_address + 16 * LANES_PER_ROW * j,
                cute.AddressSpace.gmem,
                assumed_align=16,
            )
            dst = sVectors[warp * (c.tile_n // 4) + row, (None, vector + LANES_PER_ROW * j)]
            cute.copy(atom, cute.make_tensor(src, cute.make_layout(VECTOR)), dst)
    ring.producer_commit(state)


@cute.jit
def load_item(
    config: cutlass.Constexpr[PagedConfig],
    mKPages: cute.Tensor,
    mVPages: cute.Tensor,
    mCols: cute.Tensor,
    sK: cute.Tensor,
    sV: cute.Tensor,
    ring_k,
    k_state,
    ring_v,
    v_state,
    item: Item,
    warp: Int32,
):
    """All tiles of an item, K a tile ahead of V and page ids a tile ahead of K."""
    c = config
    k_rows, v_rows = head_rows(mKPages, item.kv_head), head_rows(mVPages, item.kv_head)
    last = item.end - 1
    page = lane_page(c, mCols, last, item, warp)
    ahead = lane_page(c, mCols, last - 1, item, warp)
    copy_tile(c, k_rows, sK, page, last, item, warp, ring_k, k_state)
    k_state.advance()
    for i in cutlass.range(last - item.first, unroll=1):
        n = last - i
        page_v, page = page, ahead
        ahead = lane_page(c, mCols, n - 2, item, warp)
        copy_tile(c, k_rows, sK, page, n - 1, item, warp, ring_k, k_state)
        k_state.advance()
        copy_tile(c, v_rows, sV, page_v, n, item, warp, ring_v, v_state)
        v_state.advance()
    copy_tile(c, v_rows, sV, page, item.first, item, warp, ring_v, v_state)
    v_state.advance()
    return k_state, v_state


@cute.jit
def produce(
    config: cutlass.Constexpr[PagedConfig],
    mKPages: cute.Tensor,  # (page, row, kv head, dim)
    mVPages: cute.Tensor,
    sK: cute.Tensor,
    sV: cute.Tensor,
    ring_k,
    ring_v,
    slot: Slot,
    m,  # kernels.paged.Operands
    window: Bounds,
    warp: Int32,
):
    """The producer warps: warp 0 draws items and publishes them, all four copy their rows."""
    c = config
    k_state = pipelines.producer_state(c.stages)
    v_state = pipelines.producer_state(c.stages)
    index, _, _ = cute.arch.block_idx()
    num_items = device_plan.count_items(c, m)
    slot_phase = Int32(0)
    if warp == 0:
        publish(c, slot, slot_phase ^ 1, m, window, index, num_items)
    item = work_loop.await_item(slot, slot_phase)
    while item.valid >= 0:
        slot_phase ^= 1
        if item.end > item.first:
            k_state, v_state = load_item(
                c, mKPages, mVPages, m.mCols, sK, sV, ring_k, k_state, ring_v, v_state, item, warp
            )
        if warp == 0:
            index = work_loop.next_item(index, m.mCounter)
            publish(c, slot, slot_phase ^ 1, m, window, index, num_items)
        item = work_loop.await_item(slot, slot_phase)
    # A thread that exits must have no copy under way.
    cute.arch.cp_async_commit_group()
    cute.arch.cp_async_wait_group(0)
    if warp == 0:
        work_loop.reset_counter(m.mCounter)


@cute.jit
def publish(
    config: cutlass.Constexpr[PagedConfig],
    slot: Slot,
    phase: Int32,
    m,
    window: Bounds,
    index: Int32,
    num_items: Int32,
):
    """Publish item `index` of the work list, or its end."""
    if index < num_items:
        words = work_loop.work_row(m.mWork, index)
        item = measure_item(config, words, Work, m.mPositions, m.mTokens, m.mQIndex, window)
        work_loop.publish_item(slot, phase, item)
    else:
        work_loop.publish_end(slot, phase)
