"""Paged operands: K/V pages by TMA with the page id as a coordinate, Q rows by cp.async."""

from __future__ import annotations

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Int32, Int64, const_expr
from cutlass.cute.nvgpu import cpasync

from flashcore.sm90.config.paged import PagedConfig, rows_at_a_time

VECTOR = 8  # 16-bit elements of a 16-byte copy
EVICT_FIRST = 0x12F0000000000000  # createpolicy.fractional.L2::evict_first of everything


class Pages(NamedTuple):
    """K or V of one KV head, partitioned for TMA."""

    tma: cute.CopyAtom
    src: cute.Tensor  # (box, box in page, page)
    dst: cute.Tensor  # (box, box in tile, 1, stage)


@cute.jit
def page_copy(config: cutlass.Constexpr[PagedConfig], mPages: cute.Tensor, layout):
    """(copy atom, coordinate tensor (row, dim, kv head, page)) of a pool.

    mPages: (page, row, kv head, dim) in any strides TMA takes. A box is as wide as the stages of
    `layout`: TMA fills the columns past dim with zeros and reads nothing for them.
    """
    c = config
    box_shape = (c.box_n, const_expr(cute.size(layout, mode=[1])))
    view = cute.make_tensor(mPages.iterator, cute.select(mPages.layout, mode=[1, 3, 2, 0]))
    box = cute.select(cute.flat_divide(layout, box_shape), mode=[0, 1])
    op = cpasync.CopyBulkTensorTileG2SOp()
    return cpasync.make_tiled_tma_atom(op, view, box, box_shape)


@cute.jit
def head_pages(
    config: cutlass.Constexpr[PagedConfig],
    tma: cute.CopyAtom,
    gPages: cute.Tensor,
    sKV: cute.Tensor,
    kv_head: Int32,
) -> Pages:
    """All pages of one KV head as boxes, and the boxes of each stage."""
    c = config
    box_shape = (c.box_n, const_expr(cute.size(sKV, mode=[1])))
    head = gPages[None, None, kv_head, None]
    boxes = cute.local_tile(head, box_shape, (None, 0, None))
    stages = cute.group_modes(cute.flat_divide(sKV, box_shape), 0, 2)
    dst, src = cpasync.tma_partition(
        tma, 0, cute.make_layout(1), stages, cute.group_modes(boxes, 0, 2)
    )
    return Pages(tma, src, dst)


@cute.jit
def tile_pages(
    config: cutlass.Constexpr[PagedConfig],
    mCols: cute.Tensor,
    entry: Int32,  # first entry of the item's run
    last_entry: Int32,
    n: Int32,  # tile of the run
) -> Int32:
    """Page ids of a tile: this lane's is that of box `lane`, the run's last page past its end."""
    c = config
    box = n * const_expr(c.tile_n // c.box_n) + cute.arch.lane_idx()
    return mCols[min(entry + box // const_expr(c.page_tokens // c.box_n), last_entry)]


@cute.jit
def load_tile(
    config: cutlass.Constexpr[PagedConfig],
    pages: Pages,
    ids: Int32,  # of `tile_pages`
    n: Int32,
    ring,
    state,
):
    """Start the load of one tile into the ring's next stage.

    Boxes past the run's last page repeat that page: their rows are masked, the bytes come from L2,
    and the barrier's byte count stays a constant.
    """
    c = config
    ring.producer_acquire(state)
    barrier = ring.producer_get_barrier(state)
    boxes = const_expr(c.tile_n // c.box_n)
    per_page = const_expr(c.page_tokens // c.box_n)
    policy = {"cache_policy": Int64(EVICT_FIRST)} if const_expr(c.evict_first) else {}
    for j in cutlass.range(boxes, unroll=min(boxes, 4)):
        cute.copy(
            pages.tma,
            pages.src[None, (n * boxes + j) % per_page, cute.arch.shuffle_sync(ids, j)],
            pages.dst[None, j, 0, state.index],
            tma_bar_ptr=barrier,
            **policy,
        )


@cute.jit
def gather_queries(
    config: cutlass.Constexpr[PagedConfig],
    mQ: cute.Tensor,  # (token, head, dim)
    mTokens: cute.Tensor,  # query token of each gathered token
    sQ: cute.Tensor,  # (tile_m, columns)
    kv_head: Int32,
    row_begin: Int32,
    num_rows: Int32,
    first_row: Int32,  # of this warpgroup in the tile
    thread: Int32,  # in this warpgroup
):
    """Copy this warpgroup's 64 packed rows of Q. Not waited for.

    Rows past num_rows are zero, and so are columns past head_dim.
    """
    c = config
    vectors = const_expr(c.head_dim // VECTOR)
    per_row = const_expr(c.k_columns // VECTOR)
    step = const_expr(rows_at_a_time(c.k_columns, 1))
    lanes = const_expr(128 // step)  # of a row
    atom = cute.make_copy_atom(
        cpasync.CopyG2SOp(cache_mode=cpasync.LoadCacheMode.GLOBAL),
        mQ.element_type,
        num_bits_per_copy=128,
    )
    sVectors = cute.logical_divide(sQ, (None, VECTOR))
    vector = thread % lanes
    for i in cutlass.range_constexpr(64 // step):
        row = first_row + i * step + thread // lanes
        there = row < num_rows
        packed = row_begin + (row if there else Int32(0))
        token = mTokens[packed // c.group_size]
        head = kv_head * c.group_size + packed % c.group_size
        for j in cutlass.range_constexpr(per_row // lanes):
            copied = there
            if const_expr(lanes * (j + 1) > vectors):
                copied = there and vector + lanes * j < vectors
            src = cute.logical_divide(mQ[token, head, None], VECTOR)[None, vector + lanes * j]
            src = cute.make_tensor(src.iterator.align(16), src.layout)
            dst = sVectors[row, (None, vector + lanes * j)]
            pred = cute.make_fragment_like(dst, Boolean)
            pred.fill(copied)
            cute.copy(atom, src, dst, pred=pred)


@cute.jit
def clear_rows(
    config: cutlass.Constexpr[PagedConfig],
    sV: cute.Tensor,  # (tile_n, columns) of one stage
    begin: Int32,
    end: Int32,
    thread: Int32,  # among all consumers
):
    """Zero the rows of a V tile outside [begin, end): they may hold NaN, and 0 * NaN is NaN."""
    c = config
    per_row = const_expr(c.v_columns // VECTOR)
    threads = const_expr(128 * c.num_consumer_warpgroups)
    step = const_expr(rows_at_a_time(c.v_columns, c.num_consumer_warpgroups))
    lanes = const_expr(threads // step)  # of a row
    sVectors = cute.logical_divide(sV, (None, VECTOR))
    zero = cute.make_rmem_tensor(VECTOR, sV.element_type)
    zero.fill(0.0)
    for i in cutlass.range(c.tile_n // step, unroll=1):
        row = i * step + thread // lanes
        if row < begin or row >= end:
            for j in cutlass.range_constexpr(per_row // lanes):
                dst = sVectors[row, (None, thread % lanes + lanes * j)]
                cute.autovec_copy(zero, dst)


@cute.jit
def clear_padding(
    sKV: cute.Tensor,  # (tile_n, columns, stage)
    dim: cutlass.Constexpr[int],
    thread: Int32,
    threads: cutlass.Constexpr[int],
):
    """Zero the columns past dim of all stages, once: gathered rows never write there."""
    width = const_expr(128 // sKV.element_type.width)
    tile_n, columns, stages = (const_expr(cute.size(sKV, mode=[i])) for i in range(3))
    vectors = const_expr((columns - dim) // width)  # of a row
    sVectors = cute.logical_divide(sKV, (None, width, None))
    zero = cute.make_rmem_tensor(width, sKV.element_type)
    zero.fill(0)
    total = const_expr(tile_n * stages * vectors)
    for i in cutlass.range((total - thread + threads - 1) // threads, unroll=1):
        place = thread + i * threads
        row, vector = place // vectors, place % vectors + dim // width
        cute.autovec_copy(zero, sVectors[row % tile_n, (None, vector), row // tile_n])
