"""The persistent tile loop: one warp picks tiles and publishes them to loaders and consumers.

Static order: CTA c takes tiles c, c + grid, ... Dynamic order: an atomic counter hands out tiles,
longest first.
"""

from __future__ import annotations

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Int32, const_expr

from flashcore.sm90.config.dense import DenseConfig
from flashcore.sm90.kernels.attention.parts import counter
from flashcore.sm90.kernels.attention.parts.pipelines import producer_state

SLOTS = 1  # tiles published ahead; two spoil longest-first: 0.94 against 1.12 of FA3 (hd 256)
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


class Slots(NamedTuple):
    """The ring in shared memory through which tiles are published, SLOTS deep."""

    words: cute.Tensor  # (SLOT_WORDS, SLOTS)
    full: cute.Pointer
    empty: cute.Pointer


@cute.jit
def publish(slots: Slots, state, values):
    """Write a tile into a slot that every reading warp is done with."""
    if cute.arch.lane_idx() == 0:
        for i in cutlass.range_constexpr(len(values)):
            slots.words[i, state.index] = values[i]
        cute.arch.mbarrier_arrive(slots.full + state.index)


@cute.jit
def next_tile(config: cutlass.Constexpr[DenseConfig], slots: Slots, state, extent: Extent):
    """(m_block, tile) of the next slot, freed for this warp; m_block -1 after the last tile."""
    cute.arch.mbarrier_wait(slots.full + state.index, state.phase)
    words = slots.words[None, state.index]
    m_block, head, zero = words[0], words[1], Int32(0)
    if const_expr(config.varlen):
        tile = Tile(head, zero, words[3], words[4], words[5], words[6])
    else:
        tile = Tile(head, words[2], zero, extent.seqlen_q, zero, extent.seqlen_k)
    # Every lane has read and every lane arrives: compute-sanitizer follows no __syncwarp here.
    cute.arch.mbarrier_arrive(slots.empty + state.index)
    return m_block, tile


@cute.jit
def schedule(
    config: cutlass.Constexpr[DenseConfig],
    slots: Slots,
    extent: Extent,
    mCuQ: cute.Tensor | None,
    mCuK: cute.Tensor | None,
    mCounter: cute.Tensor | None,
):
    """The scheduler warp: draw, locate and publish tiles until there are none."""
    state = producer_state(SLOTS)
    index = Int32(-1)
    batch0, before = Int32(0), Int32(0)
    m_block = Int32(0)
    while m_block >= 0:
        # Drawn only now: every tile drawn ahead of need is one that an idle CTA cannot take.
        cute.arch.mbarrier_wait(slots.empty + state.index, state.phase)
        index = next_index(config, index, mCounter)
        if const_expr(config.varlen):
            m_block, head, batch, batch0, before = locate_varlen(
                config, index, batch0, before, extent, mCuQ
            )
            q_start, k_start, seqlen_q, seqlen_k = Int32(0), Int32(0), Int32(0), Int32(0)
            if m_block >= 0:
                q_start, k_start = mCuQ[batch], mCuK[batch]
                seqlen_q, seqlen_k = mCuQ[batch + 1] - q_start, mCuK[batch + 1] - k_start
            words = (m_block, head, batch, q_start, seqlen_q, k_start, seqlen_k)
        else:
            words = locate_dense(config, index, extent)
            m_block = words[0]
        publish(slots, state, words)
        state.advance()
    if const_expr(config.dynamic):
        counter.reset(mCounter)


@cute.jit
def next_index(config: cutlass.Constexpr[DenseConfig], index: Int32, mCounter):
    """The tile after `index` (-1: the first). Uniform in the warp."""
    cta, _, _ = cute.arch.block_idx()
    grid, _, _ = cute.arch.grid_dim()
    if index < 0:
        index = cta
    else:
        if const_expr(not config.dynamic):
            index += grid
        else:
            index = counter.draw(index, mCounter)
    return index


@cute.jit
def locate_dense(config: cutlass.Constexpr[DenseConfig], index: Int32, extent: Extent):
    """(m_block, head, batch) of a tile; m_block -1 beyond the last."""
    pairs = extent.heads * extent.batch
    m_block = Int32(-1)
    pair = Int32(0)
    if index < pairs * extent.m_blocks:
        full = const_expr(not (config.causal or config.local))
        if const_expr(full and not config.own_blocks):
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
            if const_expr(full):
                # Only a head's last tile is shorter; the others run together as above.
                equal = max(extent.m_blocks - 1, 1)
                m_block, pair = rest % equal, start + rest // equal
                if rest >= width * (extent.m_blocks - 1):
                    m_block = extent.m_blocks - 1
                    pair = start + rest - width * m_block
            else:
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
