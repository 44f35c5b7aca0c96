"""TMA loads of Q, K and V: global views, copy atoms, and one tile's partitions."""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64, const_expr
from cutlass.cute.nvgpu import cpasync

from flashcore.sm90.config.dense import DenseConfig
from flashcore.sm90.kernels.attention.dense.mask import key_blocks
from flashcore.sm90.kernels.attention.dense.scheduler import SLOTS, Extent, Slots, Tile, next_tile
from flashcore.sm90.kernels.attention.parts.pipelines import consumer_state, producer_state


def _at_least_one(n):
    """TMA extents must not be zero; an empty tensor's tiles are never loaded."""
    return cutlass.max(n, 1)


@cute.jit
def query_view(config: cutlass.Constexpr[DenseConfig], mQ: cute.Tensor) -> cute.Tensor:
    """Q as (rows, head_dim, head, batch); packed GQA makes rows (head in group, token)."""
    g = config.pack_gqa
    if const_expr(config.varlen):
        (tokens, heads, dim), (token, head, one) = mQ.shape, mQ.stride
        batch, per_batch = 1, 0
    else:
        (batch, tokens, heads, dim), (per_batch, token, head, one) = mQ.shape, mQ.stride
    tokens = _at_least_one(tokens)
    if const_expr(g > 1):
        layout = cute.make_layout(
            ((g, tokens), dim, heads // g, batch), stride=((head, token), one, head * g, per_batch)
        )
    else:
        layout = cute.make_layout((tokens, dim, heads, batch), stride=(token, one, head, per_batch))
    return cute.make_tensor(mQ.iterator, layout)


@cute.jit
def key_view(config: cutlass.Constexpr[DenseConfig], mK: cute.Tensor) -> cute.Tensor:
    """K or V as (rows, head_dim, head, batch); varlen: (rows, head_dim, head, end of sequence).

    The varlen view ends where the sequence ends, so that TMA fills the tail of its last tile with
    zeros instead of the next sequence's rows (0 * NaN in P V is NaN). With `rows` the extent of
    the row mode, coordinate (r, end) is row r - rows + end: it is out of bounds from row `end` on.
    """
    if const_expr(config.varlen):
        (tokens, heads, dim), (token, head, one) = mK.shape, mK.stride
        tokens = _at_least_one(tokens)
        shifted = mK.iterator - Int64(tokens) * Int64(token)
        layout = cute.make_layout(
            (tokens, dim, heads, tokens + 1), stride=(token, one, head, token)
        )
        return cute.make_tensor(shifted, layout)
    (batch, tokens, heads, dim), (per_batch, token, head, one) = mK.shape, mK.stride
    layout = cute.make_layout(
        (_at_least_one(tokens), dim, heads, batch), stride=(token, one, head, per_batch)
    )
    return cute.make_tensor(mK.iterator, layout)


@cute.jit
def query_copy(config: cutlass.Constexpr[DenseConfig], mQ: cute.Tensor, layout):
    """(copy atom, coordinate tensor) of a Q tile."""
    g = config.pack_gqa
    rows = (g, config.tile_m // g) if const_expr(g > 1) else config.tile_m
    stage = cute.select(layout, mode=[0, 1])
    return cpasync.make_tiled_tma_atom(
        cpasync.CopyBulkTensorTileG2SOp(), mQ, stage, (rows, config.head_dim)
    )


@cute.jit
def key_copy(config: cutlass.Constexpr[DenseConfig], mK: cute.Tensor, layout):
    """(copy atom, coordinate tensor) of one stage of K or V."""
    tile = (config.tile_n, config.head_dim)
    stage = cute.select(layout, mode=[0, 1])
    if const_expr(config.cluster_m > 1):
        op = cpasync.CopyBulkTensorTileG2SMulticastOp()
        return cpasync.make_tiled_tma_atom(op, mK, stage, tile, config.cluster_m)
    return cpasync.make_tiled_tma_atom(cpasync.CopyBulkTensorTileG2SOp(), mK, stage, tile)


@cute.jit
def query_tile(
    config: cutlass.Constexpr[DenseConfig],
    tma: cute.CopyAtom,
    gQ: cute.Tensor,
    sQ: cute.Tensor,
    m_block: Int32,
    tile: Tile,
):
    """(source, destination by stage) of a row tile's Q."""
    g = config.pack_gqa
    gQ = gQ[None, None, tile.head, tile.batch]
    if const_expr(g > 1):
        gQ = cute.domain_offset(((0, tile.q_start), 0), gQ)
        gQ = cute.local_tile(gQ, ((g, config.tile_m // g), config.head_dim), (m_block, 0))
    else:
        gQ = cute.domain_offset((tile.q_start, 0), gQ)
        gQ = cute.local_tile(gQ, (config.tile_m, config.head_dim), (m_block, 0))
    dst, src = cpasync.tma_partition(
        tma, 0, cute.make_layout(1), cute.group_modes(sQ, 0, 2), cute.group_modes(gQ, 0, 2)
    )
    return src, dst


@cute.jit
def key_tiles(
    config: cutlass.Constexpr[DenseConfig],
    tma: cute.CopyAtom,
    gK: cute.Tensor,
    sK: cute.Tensor,
    kv_head: Int32,
    tile: Tile,
    total_k: Int32,
):
    """(source by block, destination by stage) of a sequence's K or V."""
    if const_expr(config.varlen):
        end = tile.k_start + tile.seqlen_k
        gK = gK[None, None, kv_head, end]
        gK = cute.domain_offset((cutlass.max(total_k, 1) - tile.seqlen_k, 0), gK)
    else:
        gK = gK[None, None, kv_head, tile.batch]
    gK = cute.local_tile(gK, (config.tile_n, config.head_dim), (None, 0))
    if const_expr(config.cluster_m > 1):
        rank = cute.arch.make_warp_uniform(cute.arch.block_idx_in_cluster())
        share = cute.make_layout(config.cluster_m)
    else:
        rank, share = 0, cute.make_layout(1)
    dst, src = cpasync.tma_partition(
        tma, rank, share, cute.group_modes(sK, 0, 2), cute.group_modes(gK, 0, 2)
    )
    return src, dst


@cute.jit
def multicast_mask(config: cutlass.Constexpr[DenseConfig]):
    """The CTAs that receive this CTA's share of a K/V stage, or None without a cluster."""
    if const_expr(config.cluster_m == 1):
        return None
    layout = cute.make_layout((1, config.cluster_m, 1, 1))
    rank = cute.arch.make_warp_uniform(cute.arch.block_idx_in_cluster())
    return cpasync.create_tma_multicast_mask(layout, layout.get_flat_coord(rank), mcast_mode=1)


@cute.jit
def load_queries(
    config: cutlass.Constexpr[DenseConfig],
    tma: cute.CopyAtom,
    gQ: cute.Tensor,
    sQ: cute.Tensor,
    ring,
    slots: Slots,
    extent: Extent,
    window_left: Int32,
    window_right: Int32,
):
    """The Q warp: every tile's rows, as soon as a stage is free."""
    state = producer_state(config.q_stages)
    slot_state = consumer_state(SLOTS)
    m_block = Int32(0)
    while m_block >= 0:
        m_block, tile = next_tile(config, slots, slot_state, extent)
        slot_state.advance()
        low, high, _, _ = key_blocks(
            config, m_block * config.tile_m, config.tile_m, tile.seqlen_q, tile.seqlen_k,
            window_left, window_right,
        )  # fmt: skip
        if m_block >= 0 and high > low:
            src, dst = query_tile(config, tma, gQ, sQ, m_block, tile)
            ring.producer_acquire(state)
            barrier = ring.producer_get_barrier(state)
            cute.copy(tma, src, dst[None, state.index], tma_bar_ptr=barrier)
            state.advance()


@cute.jit
def load_keys(
    config: cutlass.Constexpr[DenseConfig],
    tma: cute.CopyAtom,
    gK: cute.Tensor,
    sK: cute.Tensor,
    ring,
    slots: Slots,
    extent: Extent,
    q_heads_per_kv: Int32,
    window_left: Int32,
    window_right: Int32,
):
    """The K warp, and likewise the V warp: every tile's blocks, from the last to the first."""
    state = producer_state(config.stages)
    slot_state = consumer_state(SLOTS)
    mask = multicast_mask(config)
    m_block = Int32(0)
    while m_block >= 0:
        m_block, tile = next_tile(config, slots, slot_state, extent)
        slot_state.advance()
        low, high, _, _ = key_blocks(
            config, m_block * config.tile_m, config.tile_m, tile.seqlen_q, tile.seqlen_k,
            window_left, window_right,
        )  # fmt: skip
        if m_block >= 0 and high > low:
            kv_head = tile.head // (q_heads_per_kv // config.pack_gqa)
            src, dst = key_tiles(config, tma, gK, sK, kv_head, tile, extent.total_k)
            for i in cutlass.range(high - low, unroll=1):
                n = high - 1 - i
                ring.producer_acquire(state)
                barrier = ring.producer_get_barrier(state)
                if const_expr(mask is None):
                    cute.copy(tma, src[None, n], dst[None, state.index], tma_bar_ptr=barrier)
                else:
                    cute.copy(
                        tma,
                        src[None, n],
                        dst[None, state.index],
                        tma_bar_ptr=barrier,
                        mcast_mask=mask,
                    )
                state.advance()
    if const_expr(config.cluster_m > 1):
        # A CTA must not exit while a peer still loads into it or signals its barriers. Alone it
        # need not wait: the consumers have waited for every load.
        ring.producer_tail(state)
