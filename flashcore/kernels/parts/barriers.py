"""Named barriers of the paged kernel; ids 1 to 3 are the turns (pipelines.NamedBarrier)."""

from __future__ import annotations

from enum import IntEnum

import cutlass
import cutlass.cute as cute
from cutlass import Int32


class GroupBarrier(IntEnum):
    """Hardware barrier ids. QUERIES + w is consumer warpgroup w's own."""

    QUERIES = 4
    CONSUMERS = 6


@cute.jit
def sync_warpgroup(warpgroup: Int32):
    """All threads of one consumer warpgroup."""
    cute.arch.barrier(barrier_id=int(GroupBarrier.QUERIES) + warpgroup, number_of_threads=128)


@cute.jit
def sync_consumers(warpgroups: cutlass.Constexpr[int]):
    """All threads of all consumer warpgroups."""
    cute.arch.barrier(barrier_id=int(GroupBarrier.CONSUMERS), number_of_threads=128 * warpgroups)
