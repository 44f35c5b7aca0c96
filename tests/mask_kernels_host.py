"""The kernels' masks compiled for the host: the same device functions, thread after thread.

Votes, barriers and products are the GPU's; what a thread computes for its rows and keys is not.
"""

from __future__ import annotations

from typing import Any

import cutlass
import cutlass.cute as cute
import torch
from cutlass import BFloat16, Float16, Float32, Int32
from cutlass.cute.runtime import from_dlpack

from flashcore.sm90.config.paged import PagedConfig
from flashcore.sm90.kernels.attention.paged import intervals, nonfinite
from flashcore.sm90.kernels.attention.paged.intervals import Bounds, Rows
from flashcore.sm90.kernels.attention.parts import matmul

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@cute.jit
def _see(
    config: cutlass.Constexpr[PagedConfig],
    mPositions: cute.Tensor,  # (queries,) on the run's scale, by index
    mQIndex: cute.Tensor,
    mTreePositions: cute.Tensor,
    mTree: cute.Tensor,
    mSeen: cute.Tensor,  # (queries, keys)
    mBounds: cute.Tensor,  # (queries, 3): interval, and key of the tree mask's column 0
    left: Int32,
    right: Int32,
):
    keys = mSeen.shape[1]
    for i in cutlass.range(mSeen.shape[0], unroll=1):
        position, first_new = mPositions[i], Int32(0)
        if cutlass.const_expr(config.tree):
            first_new, position = intervals.place_in_tree(
                config, position, Int32(i), mQIndex, mTreePositions
            )
        low, high = intervals.row_interval(config, position, first_new, keys, Bounds(left, right))
        rows = Rows(*(cute.make_rmem_tensor(2, Int32) for _ in range(4)))
        rows.low[0], rows.high[0], rows.token[0], rows.first_new[0] = low, high, i, first_new
        mBounds[i, 0], mBounds[i, 1], mBounds[i, 2] = low, high, first_new
        for key in cutlass.range(keys, unroll=1):
            mSeen[i, key] = Int32(intervals.sees_key(config, rows, 0, mTree, Int32(key)))


def see(
    config: PagedConfig,
    positions: torch.Tensor,
    q_index: torch.Tensor,
    tree_positions: torch.Tensor,
    tree_mask: torch.Tensor,
    keys: int,
    window: tuple[int, int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """bool [queries, keys] of one run, and int [queries, 3] as `_see` has it."""
    seen = torch.zeros(len(positions), keys, dtype=torch.int32)
    bounds = torch.zeros(len(positions), 3, dtype=torch.int32)
    tensors = (positions, q_index, tree_positions, tree_mask.view(torch.uint8), seen, bounds)
    _see(config, *(_dynamic(x) for x in tensors), *window)
    return seen.bool(), bounds


def _dynamic(x: torch.Tensor) -> Any:
    return from_dlpack(x.contiguous()).mark_layout_dynamic(leading_dim=x.dim() - 1)


@cute.jit
def _clear(
    config: cutlass.Constexpr[PagedConfig],
    mV: cute.Tensor,  # (tile_n, dim)
    mStage: cute.Tensor,  # memory of a stage
    mRows: cute.Tensor,  # (tile_m, 2): interval of each packed row
    mOut: cute.Tensor,  # fp32 (tile_m, dim)
    mFound: cute.Tensor,  # (threads,)
    seen: tuple[Int32, Int32, Int32, Int32],
    first_key: Int32,
):
    c = config
    dtype = BFloat16 if cutlass.const_expr(c.dtype == "bf16") else Float16
    layout = matmul.smem_layout(dtype, c.tile_n, c.v_columns)
    sV = cute.make_tensor(cute.recast_ptr(mStage.iterator, layout.inner), layout.outer)
    for i in cutlass.range(c.tile_n * c.v_columns, unroll=1):
        sV[i // c.v_columns, i % c.v_columns] = mV[i // c.v_columns, i % c.v_columns]
    seen = nonfinite.Seen(*seen)
    threads = 128 * c.num_consumer_warpgroups
    for thread in cutlass.range(threads, unroll=1):
        found = nonfinite.clear_and_find(c, sV, seen, Int32(thread))
        mFound[thread] = Int32(found)
    for thread in cutlass.range(threads, unroll=1):
        row, column = thread // 32 * 16 + thread % 32 // 4, 2 * (thread % 4)
        rows = Rows(*(cute.make_rmem_tensor(2, Int32) for _ in range(4)))
        for r in cutlass.range_constexpr(2):
            rows.low[r], rows.high[r] = mRows[row + 8 * r, 0], mRows[row + 8 * r, 1]
            rows.token[r], rows.first_new[r] = Int32(0), Int32(0)
        acc = cute.make_rmem_tensor(((2, 2, c.v_columns // 8), 1, 1), Float32)
        acc.fill(0.0)
        out = matmul.acc_rows_cols(acc)
        nonfinite.add_to_rows(c, out, rows, None, sV, seen, first_key, column)
        for r in cutlass.range_constexpr(2):
            for j in cutlass.range_constexpr(c.v_columns // 4):
                mOut[row + 8 * r, 8 * (j // 2) + column + j % 2] = out[r, j]
    for thread in cutlass.range(threads, unroll=1):
        nonfinite.take_out(c, sV, seen, Int32(thread))
    for i in cutlass.range(c.tile_n * c.v_columns, unroll=1):
        mV[i // c.v_columns, i % c.v_columns] = sV[i // c.v_columns, i % c.v_columns]


def clear(
    config: PagedConfig,
    v: torch.Tensor,
    rows: torch.Tensor,
    seen: tuple[int, int, int, int],
    first_key: int,
) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """What `nonfinite.clear` leaves of a tile of V, what it adds to each packed row, and whether
    any thread found something. seen: as `nonfinite.Seen`, from the tile's first key on."""
    v, out = v.clone(), torch.zeros(config.tile_m, config.v_columns)
    memory = torch.zeros(config.tile_n * config.v_columns + 512, dtype=DTYPES[config.dtype])
    start = -memory.data_ptr() % 1024 // 2  # the swizzle is of addresses
    stage = memory[start : start + config.tile_n * config.v_columns]
    found = torch.zeros(128 * config.num_consumer_warpgroups, dtype=torch.int32)
    views = (from_dlpack(x) for x in (v, stage, rows, out, found))
    _clear(config, *views, tuple(Int32(x) for x in seen), Int32(first_key))
    return v, out, bool(found.any())
