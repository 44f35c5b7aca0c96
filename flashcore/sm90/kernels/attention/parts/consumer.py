"""What a consumer warpgroup holds, in every kernel: operands, accumulators, factors of a score."""

from __future__ import annotations

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr
from cutlass._mlir.dialects import llvm
from cutlass.cute.nvgpu import warpgroup
from cutlass.cutlass_dsl import T, dsl_user_op

from flashcore.sm90.kernels.attention.parts import matmul, pipelines

ROWS = 2  # of a thread in the 64 rows of a warpgroup


class Fragments(NamedTuple):
    """A consumer warpgroup's operands and registers."""

    mma_qk: cute.TiledMma
    mma_pv: cute.TiledMma
    tSrQ: cute.Tensor
    tSrK: cute.Tensor  # by stage
    tOrV: cute.Tensor  # by stage
    layout_s: cute.Layout  # of a score accumulator
    accO: cute.Tensor
    rP: cute.Tensor
    row_max: cute.Tensor
    row_sum: cute.Tensor
    alpha: cute.Tensor


@cute.jit
def fragments(
    config: cutlass.Constexpr,  # DenseConfig or PagedConfig: tile_m, tile_n
    dtype: cutlass.Constexpr,
    mma_qk: cute.TiledMma,
    mma_pv: cute.TiledMma,
    sQ: cute.Tensor | None,  # None: Q is in registers
    sK: cute.Tensor,
    sV: cute.Tensor,
    wg,
) -> Fragments:
    """Operand descriptors and accumulators of one warpgroup."""
    c = config
    thr_qk, thr_pv = mma_qk.get_slice(wg * 128), mma_pv.get_slice(wg * 128)
    sVt = cute.make_tensor(sV.iterator, cute.select(sV.layout, mode=[1, 0, 2]))
    v_columns = const_expr(cute.size(sV, mode=[1]))
    accO = cute.make_rmem_tensor(thr_pv.partition_shape_C((c.tile_m, v_columns)), Float32)
    accS = cute.make_rmem_tensor(thr_qk.partition_shape_C((c.tile_m, c.tile_n)), Float32)
    if const_expr(sQ is None):
        k_columns = const_expr(cute.size(sK, mode=[1]))
        tSrQ = cute.make_rmem_tensor(thr_qk.partition_shape_A((c.tile_m, k_columns)), dtype)
    else:
        tSrQ = mma_qk.make_fragment_A(thr_qk.partition_A(sQ))
    rows = const_expr(ROWS)
    return Fragments(
        mma_qk,
        mma_pv,
        tSrQ,
        mma_qk.make_fragment_B(thr_qk.partition_B(sK)),
        mma_pv.make_fragment_B(thr_pv.partition_B(sVt)),
        accS.layout,
        accO,
        cute.make_rmem_tensor(matmul.acc_as_operand(accS).layout, dtype),
        cute.make_rmem_tensor(rows, Float32),
        cute.make_rmem_tensor(rows, Float32),
        cute.make_rmem_tensor(rows, Float32),
    )


@cute.jit
def last_product(frag: Fragments, ring_v, v_state):
    """PV of a tile's or item's last block, alone."""
    pipelines.await_stage(ring_v, v_state)
    tOrV = frag.tOrV[None, None, None, v_state.index]
    matmul.issue(frag.mma_pv, frag.accO, frag.rP, tOrV, False)
    warpgroup.wait_group(0)
    ring_v.consumer_release(v_state)


@dsl_user_op
def here(x: Int32, *, loc=None, ip=None) -> Int32:
    """`x`, so that what comes of it is computed here, and not once and kept in registers."""
    return Int32(
        llvm.inline_asm(
            T.i32(),
            [x.ir_value(loc=loc, ip=ip)],
            "mov.b32 $0, $1;",
            "=r,r",
            has_side_effects=True,
            is_align_stack=False,
            asm_dialect=llvm.AsmDialect.AD_ATT,
        )
    )
