"""The persistent tile loop: the producer warp picks tiles and publishes them to the consumers.

Static order: CTA c takes tiles c, c + grid, ... Dynamic order: an atomic counter hands out tiles,
longest first; the last CTA to finish zeroes the counter again, so a launch needs no memset.
"""

from __future__ import annotations

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Int32, const_expr

from flashcore.config.dense import DenseConfig

SLOT_WORDS = 8  # of the published tile: m_block (-1: no more), head, batch, then varlen's extents
# K and V of the heads that are in flight together should stay in half of H100's 50 MB L2.
L2_BYTES_FOR_KV = 32 * 2**20


class Extent(NamedTuple):
    """Run-time sizes of a launch; heads are kv heads when GQA is packed."""

    m_blocks: Int32  # row tiles of one head (dense)
    heads: Int32
    batch: Int32
    seqlen_q: Int32
    seqlen_k: Int32
    total_k: Int32  # rows of the packed K (varlen)


class Tile(NamedTuple):
    """A row tile: where its rows and keys are. batch is 0 when varlen."""

    head: Int32
    batch: Int32
    q_start: Int32
    seqlen_q: Int32
    k_start: Int32
    seqlen_k: Int32


class Slot(NamedTuple):
    """Shared memory through which the producer publishes a tile."""

    words: cute.Tensor
    full: cute.Pointer
    empty: cute.Pointer


@cute.jit
def publish(slot: Slot, phase: Int32, values):
    """Write a tile once every consumer warp has read the last one."""
    cute.arch.mbarrier_wait(slot.empty, phase)
    if cute.arch.lane_idx() == 0:
        for i in cutlass.range_constexpr(len(values)):
            slot.words[i] = values[i]
        cute.arch.mbarrier_arrive(slot.full)


@cute.jit
def await_tile(slot: Slot, phase: Int32):
    """Block until a tile is published; its m_block, or -1 after the last."""
    cute.arch.mbarrier_wait(slot.full, phase)
    return slot.words[0]


@cute.jit
def read_tile(config: cutlass.Constexpr[DenseConfig], slot: Slot, extent: Extent):
    """The rest of the published tile."""
    if const_expr(config.varlen):
        w = slot.words
        return Tile(w[1], Int32(0), w[3], w[4], w[5], w[6])
    zero = Int32(0)
    return Tile(slot.words[1], slot.words[2], zero, extent.seqlen_q, zero, extent.seqlen_k)


@cute.jit
def release_tile(slot: Slot):
    """This warp has read the tile."""
    cute.arch.sync_warp()
    with cute.arch.elect_one():
        cute.arch.mbarrier_arrive(slot.empty)


@cute.jit
def first_index():
    """The tile a CTA starts with, in both orders."""
    bid, _, _ = cute.arch.block_idx()
    return bid


@cute.jit
def next_index(config: cutlass.Constexpr[DenseConfig], index: Int32, mCounter):
    """The tile after `index`. Uniform in the producer warp."""
    grid, _, _ = cute.arch.grid_dim()
    if const_expr(not config.dynamic):
        index += grid
    else:
        if cute.arch.lane_idx() == 0:
            index = grid + cute.arch.atomic_add(
                mCounter.iterator, Int32(1), sem="relaxed", scope="gpu"
            )
        index = cute.arch.shuffle_sync(index, 0)
    return index


@cute.jit
def reset_counter(config: cutlass.Constexpr[DenseConfig], mCounter):
    """The last CTA that has drawn its final tile leaves both counters at zero."""
    if const_expr(config.dynamic):
        grid, _, _ = cute.arch.grid_dim()
        if cute.arch.lane_idx() == 0:
            done = cute.arch.atomic_add(mCounter.iterator + 1, Int32(1), sem="acq_rel", scope="gpu")
            if done == grid - 1:
                mCounter[0] = Int32(0)
                mCounter[1] = Int32(0)


@cute.jit
def locate_dense(config: cutlass.Constexpr[DenseConfig], index: Int32, extent: Extent):
    """(m_block, head, batch) of a tile; m_block -1 beyond the last."""
    pairs = extent.heads * extent.batch
    m_block = Int32(-1)
    pair = Int32(0)
    if index < pairs * extent.m_blocks:
        if const_expr(not (config.causal or config.local)):
            # Equal tiles: CTAs that run together share a head's K and V.
            m_block = index % extent.m_blocks
            pair = index // extent.m_blocks
        else:
            # Longest first, within sections of heads whose K and V fit in L2 together.
            kv_bytes = max(extent.seqlen_k, 1) * (4 * config.head_dim)
            section = max(L2_BYTES_FOR_KV // kv_bytes, 1)
            start = index // (section * extent.m_blocks) * section
            width = min(section, pairs - start)
            rest = index - start * extent.m_blocks
            m_block = extent.m_blocks - 1 - rest // width
            pair = start + rest % width
    return m_block, pair % extent.heads, pair // extent.heads


@cute.jit
def locate_varlen(
    config: cutlass.Constexpr[DenseConfig],
    index: Int32,
    batch0: Int32,
    before: Int32,
    extent: Extent,
    mCuQ: cute.Tensor,
):
    """(m_block, head, batch, batch0, before) of a tile, 32 sequences at a time.

    Tiles of a CTA come in rising order, so the search resumes at the group of 32 sequences that
    starts at batch0 and has `before` tiles ahead of it.
    """
    lane = cute.arch.lane_idx()
    found = Boolean(False)
    blocks, inclusive = Int32(0), Int32(0)
    while batch0 < extent.batch and not found:
        b = batch0 + lane
        blocks = Int32(0)
        if b < extent.batch:
            rows = (mCuQ[b + 1] - mCuQ[b]) * config.pack_gqa
            blocks = cute.ceil_div(rows, config.tile_m)
        inclusive = blocks * extent.heads
        for k in cutlass.range_constexpr(5):
            lower = cute.arch.shuffle_sync_up(inclusive, 1 << k, mask_and_clamp=0)
            inclusive = inclusive + (lower if lane >= (1 << k) else Int32(0))
        group = cute.arch.shuffle_sync(inclusive, 31)
        found = index < before + group
        if not found:
            before += group
            batch0 += 32
    m_block, head, batch = Int32(-1), Int32(0), Int32(0)
    if found:
        rest = index - before
        which = cute.arch.popc(cute.arch.vote_ballot_sync(inclusive <= rest))
        exclusive = inclusive - blocks * extent.heads
        rest -= cute.arch.shuffle_sync(exclusive, which)
        blocks = cute.arch.shuffle_sync(blocks, which)
        batch = batch0 + which
        if const_expr(config.causal or config.local):
            m_block = blocks - 1 - rest // extent.heads
            head = rest % extent.heads
        else:
            m_block = rest % blocks
            head = rest // blocks
    return m_block, head, batch, batch0, before
