"""K/V rows gathered by cp.async: the load path for pages too short for a TMA box each.

Two of the four producer warps load K, two V, each every second tile: a warp waits for no stage but
its own. Rows of fp8 are half as long, so one warp each is enough, and the others convert them. A
lane finds the address of one row of 32; eight lanes copy a row's 128-byte pieces, 16 bytes each, as
the layout of the stages has them.
"""

from __future__ import annotations

from math import gcd
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Int32, Int64, const_expr
from cutlass._mlir.dialects import llvm
from cutlass.cutlass_dsl import dsl_user_op

from flashcore.contract.work import Work
from flashcore.sm90.config.paged import PagedConfig
from flashcore.sm90.kernels.attention.paged import work_loop
from flashcore.sm90.kernels.attention.paged.intervals import Bounds, measure_item
from flashcore.sm90.kernels.attention.paged.operands import Operands
from flashcore.sm90.kernels.attention.paged.pages import EVICT_FIRST
from flashcore.sm90.kernels.attention.paged.work_loop import Item, Slot
from flashcore.sm90.kernels.attention.parts import counter, pipelines
from flashcore.sm90.kernels.attention.parts import device_counts as device_plan

LANES_PER_ROW = 8
ROWS_PER_COPY = 4  # of a warp


class Rows(NamedTuple):
    """K or V of one KV head: byte addresses, 64-bit since pools exceed 2^31 elements."""

    head: Int64  # row 0 of page 0
    page_bytes: Int64
    token_bytes: Int64


class Stages(NamedTuple):
    """The stages of K or of V in shared memory."""

    start: Int32  # byte address
    bytes: cute.ComposedLayout | cute.Layout  # (tile_n, bytes of a row, stage) -> byte


def loaders(config: PagedConfig) -> int:
    """Warps that take turns at the tiles of K, and as many at those of V."""
    return config.loading_warps // 2


def byte_layout(
    layout: cute.ComposedLayout | cute.Layout, width: int = 16
) -> cute.ComposedLayout | cute.Layout:
    """Bytes of `matmul.smem_layout`, whose swizzle is of byte addresses, not of elements.

    Offsets may be swizzled in place of addresses: stages start at multiples of its period.
    width: bits of an element.
    """
    if isinstance(layout, cute.Layout):
        return layout
    outer = layout.outer if width == 8 else cute.recast_layout(8, width, layout.outer)
    return cute.make_composed_layout(layout.inner, 0, outer)


@cute.jit
def head_rows(mPages: cute.Tensor, kv_head: Int32) -> Rows:
    """Rows of one KV head of a pool (page, row, kv head, dim)."""
    size = const_expr(mPages.element_type.width // 8)
    page, token, head, _ = mPages.stride
    start = mPages.iterator.toint() + Int64(kv_head) * Int64(head) * size
    return Rows(start, Int64(page) * size, Int64(token) * size)


def block_rows(config: PagedConfig) -> int:
    """Rows of a tile whose addresses a warp finds at a time, one a lane."""
    return gcd(config.tile_n, 32)


@cute.jit
def lane_token(
    config: cutlass.Constexpr[PagedConfig], n: Int32, block: cutlass.Constexpr[int], item: Item
) -> Int32:
    """Token of the run that this lane finds for a block of tile n; past the run's end, its last.

    A repeated row is masked like any row past the end, and its bytes come from L2.
    """
    rows = const_expr(block_rows(config))
    row = block * rows + cute.arch.lane_idx() % rows
    return max(min(n * config.tile_n + row, item.num_tokens - 1), 0)


@cute.jit
def find_pages(
    config: cutlass.Constexpr[PagedConfig],
    mCols: cute.Tensor,
    n: Int32,
    item: Item,
    found: cute.Tensor,  # (blocks,)
):
    """Page of each `lane_token` of tile n: neighbouring lanes read neighbouring entries."""
    for b in cutlass.range_constexpr(cute.size(found)):
        found[b] = mCols[item.entry + lane_token(config, n, b, item) // config.page_tokens]


@cute.jit
def find_rows(
    config: cutlass.Constexpr[PagedConfig], rows: Rows, n: Int32, item: Item, found: cute.Tensor
) -> list[Int64]:
    """Address of each `lane_token` of tile n, from its page."""
    addresses = []
    for b in cutlass.range_constexpr(cute.size(found)):
        in_page = lane_token(config, n, b, item) % config.page_tokens
        page = rows.head + Int64(found[b]) * rows.page_bytes
        addresses.append(page + Int64(in_page) * rows.token_bytes)
    return addresses


@dsl_user_op
def copy_vector(dst: Int32, src: Int64, evict_first: bool, *, loc=None, ip=None):
    """Start a copy of 16 bytes from global to shared memory, past L1.

    Without a hint that L2 fetch 256 bytes at a time: on an H200 it took 5 % more time, on an H100
    up to 1 % less.
    """
    hint = ".L2::cache_hint" * evict_first
    policy = [Int64(EVICT_FIRST)] * evict_first
    llvm.inline_asm(
        None,
        [x.ir_value(loc=loc, ip=ip) for x in (dst, src, *policy)],
        f"cp.async.cg.shared.global{hint} [$0], [$1], 16{', $2' * evict_first};",
        "r,l" + ",l" * evict_first,
        has_side_effects=True,
        is_align_stack=False,
        asm_dialect=llvm.AsmDialect.AD_ATT,
    )


@cute.jit
def copy_tile(
    config: cutlass.Constexpr[PagedConfig],
    row_bytes: cutlass.Constexpr[int],
    addresses: list[Int64],  # of `find_rows`
    stages: Stages,
    stage: Int32,
):
    """Start the copies of one tile."""
    c = config
    lane = cute.arch.lane_idx()
    vector = lane % LANES_PER_ROW
    vectors = const_expr(row_bytes // 16)
    for b in cutlass.range_constexpr(len(addresses)):
        for i in cutlass.range(block_rows(c) // ROWS_PER_COPY, unroll=2):
            row = i * ROWS_PER_COPY + lane // LANES_PER_ROW
            src = cute.arch.shuffle_sync(addresses[b], row) + Int64(16 * vector)
            for j in cutlass.range_constexpr((vectors + LANES_PER_ROW - 1) // LANES_PER_ROW):
                column = 16 * (vector + LANES_PER_ROW * j)
                at = cute.crd2idx((b * block_rows(c) + row, column, stage), stages.bytes)
                to, start = stages.start + at, src + 16 * LANES_PER_ROW * j
                if const_expr(LANES_PER_ROW * (j + 1) > vectors):
                    if vector < vectors - LANES_PER_ROW * j:
                        copy_vector(to, start, c.evict_first)
                else:
                    copy_vector(to, start, c.evict_first)


@cute.jit
def load_item(
    config: cutlass.Constexpr[PagedConfig],
    mPages: cute.Tensor,
    mCols: cute.Tensor,
    stages: Stages,
    ring,
    state,
    item: Item,
    skip: Int32,
):
    """This warp's tiles of an item, page ids a tile ahead; the next `state` and `skip`."""
    c = config
    rows = head_rows(mPages, item.kv_head)
    row_bytes = const_expr(mPages.shape[3] * mPages.element_type.width // 8)
    found = cute.make_rmem_tensor(c.tile_n // block_rows(c), Int32)
    n = item.end - 1 - skip
    find_pages(c, mCols, n, item, found)
    while n >= item.first:
        addresses = find_rows(c, rows, n, item, found)
        find_pages(c, mCols, n - loaders(c), item, found)
        ring.producer_acquire(state)
        copy_tile(c, row_bytes, addresses, stages, state.index)
        ring.producer_commit(state)
        for _ in cutlass.range_constexpr(loaders(c)):
            state.advance()
        n -= const_expr(loaders(c))
    return state, item.first - 1 - n


@cute.jit
def load_items(
    config: cutlass.Constexpr[PagedConfig],
    mPages: cute.Tensor,
    stages: Stages,
    ring,
    slot: Slot,
    m,
    window: Bounds,
    index: Int32,
    num_items: Int32,
    skip: Int32,  # tiles before this warp's next one
    draws: Boolean,
):
    """Every second tile of K or of V, over all items."""
    c = config
    state = pipelines.producer_state(c.stages)
    if skip > 0:
        state.advance()
    slot_phase = Int32(0)
    item = work_loop.await_item(slot, slot_phase)
    while item.valid >= 0:
        slot_phase ^= 1
        if item.end > item.first:
            state, skip = load_item(c, mPages, m.cols, stages, ring, state, item, skip)
        if draws:
            index = counter.draw(index, m.counter)
            publish(c, slot, slot_phase ^ 1, m, window, index, num_items)
        item = work_loop.await_item(slot, slot_phase)


@cute.jit
def produce(
    config: cutlass.Constexpr[PagedConfig],
    mKPages: cute.Tensor,  # (page, row, kv head, dim)
    mVPages: cute.Tensor,
    k_stages: Stages,
    v_stages: Stages,
    ring_k,
    ring_v,
    slot: Slot,
    m: Operands,
    window: Bounds,
    warp: Int32,
):
    """The loading warps: half of them K, half V; warp 0 also draws items and publishes them."""
    c = config
    index, _, _ = cute.arch.block_idx()
    num_items = device_plan.count_items(c, m)
    if warp == 0:
        publish(c, slot, Int32(1), m, window, index, num_items)
    turn = warp % const_expr(loaders(c))
    if warp < const_expr(loaders(c)):
        load_items(c, mKPages, k_stages, ring_k, slot, m, window, index, num_items, turn, warp == 0)
    else:
        load_items(c, mVPages, v_stages, ring_v, slot, m, window, index, num_items, turn, False)
    # A thread that exits must have no copy under way.
    cute.arch.cp_async_commit_group()
    cute.arch.cp_async_wait_group(0)
    if warp == 0:
        counter.reset(m.counter)


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
        words = work_loop.work_row(m.work, index)
        item = measure_item(
            config, words, Work, m.q_positions, m.q_tokens, m.q_index, m.tree_positions, window
        )
        work_loop.publish_item(slot, phase, item)
    else:
        work_loop.publish_end(slot, phase)
