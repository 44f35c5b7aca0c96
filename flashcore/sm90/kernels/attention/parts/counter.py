"""The counter that hands out a launch's work: int32 (2,), drawn and done, zero between launches."""

from __future__ import annotations

import cutlass.cute as cute
from cutlass import Int32


@cute.jit
def draw(index: Int32, mCounter: cute.Tensor):
    """What comes after `index`, of a warp's: each CTA has begun with its own place in the grid."""
    grid, _, _ = cute.arch.grid_dim()
    if cute.arch.lane_idx() == 0:
        index = grid + cute.arch.atomic_add(mCounter.iterator, Int32(1), sem="relaxed", scope="gpu")
    return cute.arch.shuffle_sync(index, 0)


@cute.jit
def reset(mCounter: cute.Tensor):
    """The last CTA that has drawn in vain leaves zeros, so that a launch needs no memset."""
    grid, _, _ = cute.arch.grid_dim()
    if cute.arch.lane_idx() == 0:
        done = cute.arch.atomic_add(mCounter.iterator + 1, Int32(1), sem="acq_rel", scope="gpu")
        if done == grid - 1:
            mCounter[0] = Int32(0)
            mCounter[1] = Int32(0)
