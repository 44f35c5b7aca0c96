"""Write a row tile: registers to global memory in 16-byte stores, guarded by row and column."""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Int32, const_expr


@cute.jit
def _exchange(words, lane_bit: Boolean, distance: cutlass.Constexpr[int]):
    """One butterfly of a 4 x 4 transposition between words and the lanes of a quad."""
    out = list(words)
    for k in cutlass.range_constexpr(4):
        if const_expr(k & distance == 0):
            low, high = words[k], words[k + distance]
            received = cute.arch.shuffle_sync_bfly(low if lane_bit else high, distance)
            out[k] = received if lane_bit else low
            out[k + distance] = high if lane_bit else received
    return out


@cute.jit
def store_row(
    packed: cute.Tensor,  # Int32 pairs of one row: pair j holds columns 8 j + 2 lane, + 1
    mRow: cute.Tensor,  # (head_dim,) of the output
    lane: Int32,  # within the quad that holds the row
    visible: Boolean,
):
    """A quad's row in 16-byte chunks: lane t of the quad stores columns 32 i + 8 t ... + 7.

    The accumulator gives each lane 4 bytes of every 16; two butterflies within the quad make them
    16 contiguous bytes without shared memory, which the K/V stages need.
    """
    for i in cutlass.range_constexpr(cute.size(packed) // 4):
        words = [packed[4 * i + k] for k in range(4)]
        words = _exchange(words, (lane & 1) != 0, 1)
        words = _exchange(words, (lane & 2) != 0, 2)
        column = 32 * i + 8 * lane
        if visible and column < mRow.shape[0]:
            chunk = cute.make_rmem_tensor(4, Int32)
            for k in cutlass.range_constexpr(4):
                chunk[k] = words[k]
            target = cute.make_tensor(
                cute.recast_ptr((mRow.iterator + column).align(16), dtype=Int32),
                cute.make_layout(4),
            )
            cute.autovec_copy(chunk, target)
