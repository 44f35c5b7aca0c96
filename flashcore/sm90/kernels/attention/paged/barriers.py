"""Named barriers of the paged kernel; ids 1 to 3 are the turns (pipelines.NamedBarrier)."""

from __future__ import annotations

from enum import IntEnum

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Int32
from cutlass._mlir.dialects import llvm
from cutlass.cutlass_dsl import T, dsl_user_op


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


@dsl_user_op
def vote_consumers(warpgroups: int, yes: Boolean, *, loc=None, ip=None) -> Int32:
    """`sync_consumers` that tells every thread whether any of them says yes: 0 or 1."""
    barrier = f"{int(GroupBarrier.CONSUMERS)}, {128 * warpgroups}"
    return Int32(
        llvm.inline_asm(
            T.i32(),
            [Int32(yes).ir_value(loc=loc, ip=ip)],
            "{ .reg .pred mine, any; setp.ne.s32 mine, $1, 0; "
            f"barrier.cta.red.or.pred any, {barrier}, mine; selp.s32 $0, 1, 0, any; }}",
            "=r,r,~{memory}",
            has_side_effects=True,
            is_align_stack=False,
            asm_dialect=llvm.AsmDialect.AD_ATT,
        )
    )
