"""WGMMA: tiled products, fragments, and the two views of an accumulator."""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
import cutlass.utils.hopper_helpers as sm90
from cutlass import BFloat16, Float32, Int32, Uint8
from cutlass._mlir.dialects import llvm
from cutlass.cute.nvgpu import OperandMajorMode, warpgroup
from cutlass.cutlass_dsl import T, dsl_user_op


def smem_layout(dtype, rows: int, cols: int, stages: int | None = None) -> cute.ComposedLayout:
    """A row-major 16-bit tile in the widest swizzle that divides it, optionally with stages."""
    kind = warpgroup.SmemLayoutAtomKind.K_SW128 if cols % 64 == 0 else None
    atom = warpgroup.make_smem_layout_atom(kind or warpgroup.SmemLayoutAtomKind.K_SW64, dtype)
    if stages is None:
        return cute.tile_to_shape(atom, (rows, cols), order=(0, 1))
    return cute.tile_to_shape(atom, (rows, cols, stages), order=(0, 1, 2))


def narrow_smem_layout(rows: int, cols: int, stages: int) -> cute.ComposedLayout:
    """Row-major tiles of bytes, as `smem_layout` has those of 16 bits."""
    kinds = warpgroup.SmemLayoutAtomKind
    atom = warpgroup.make_smem_layout_atom(
        kinds.K_SW128 if cols % 128 == 0 else kinds.K_SW64, Uint8
    )
    return cute.tile_to_shape(atom, (rows, cols, stages), order=(0, 1, 2))


def qk_product(dtype, warpgroups: int, tile_n: int, q_registers: bool = False) -> cute.TiledMma:
    """S = Q K^T: K from shared memory, and Q unless it is in registers; 64 rows a warpgroup."""
    return sm90.make_trivial_tiled_mma(
        dtype,
        dtype,
        OperandMajorMode.K,
        OperandMajorMode.K,
        Float32,
        (warpgroups, 1, 1),
        (64, tile_n),
        warpgroup.OperandSource.RMEM if q_registers else warpgroup.OperandSource.SMEM,
    )


def pv_product(dtype, warpgroups: int, head_dim: int) -> cute.TiledMma:
    """O += P V: P from registers, V as it lies in memory (MN-major)."""
    return sm90.make_trivial_tiled_mma(
        dtype,
        dtype,
        OperandMajorMode.K,
        OperandMajorMode.MN,
        Float32,
        (warpgroups, 1, 1),
        (64, head_dim),
        warpgroup.OperandSource.RMEM,
    )


@cute.jit
def issue(
    tiled_mma: cute.TiledMma,
    acc: cute.Tensor,
    a: cute.Tensor,
    b: cute.Tensor,
    zero: cutlass.Constexpr[bool],
    steps: cutlass.Constexpr[int | None] = None,
):
    """Start acc = (zero ? 0 : acc) + a b as one commit group; the caller waits for it.

    steps: products along the inner dimension, of 16 each; None: all that there are.
    """
    warpgroup.fence()
    atom = cute.make_mma_atom(tiled_mma.op)  # .set() on a shared atom breaks SSA dominance
    atom.set(warpgroup.Field.ACCUMULATE, not zero)
    for k in cutlass.range_constexpr(cute.size(a, mode=[2]) if steps is None else steps):
        cute.gemm(atom, acc, a[None, None, k], b[None, None, k], acc)
        atom.set(warpgroup.Field.ACCUMULATE, True)
    warpgroup.commit_group()


def acc_rows_cols(acc: cute.Tensor) -> cute.Tensor:
    """The accumulator ((2, 2, N/8), M, N) viewed as (rows, columns) of one thread."""
    s, d = acc.layout.shape, acc.layout.stride
    return cute.make_tensor(
        acc.iterator,
        cute.make_layout(
            ((s[0][1], s[1]), (s[0][0], s[0][2], s[2])),
            stride=((d[0][1], d[1]), (d[0][0], d[0][2], d[2])),
        ),
    )


def acc_as_operand(acc: cute.Tensor) -> cute.Tensor:
    """The accumulator viewed as the register operand ((2, 2, 2), M, N/16) of a k16 product."""
    layout = cute.logical_divide(acc.layout, ((None, None, 2), None, None))
    s, d = layout.shape, layout.stride
    return cute.make_tensor(
        acc.iterator,
        cute.make_layout(
            ((s[0][0], s[0][1], s[0][2][0]), s[1], (s[0][2][1], s[2])),
            stride=((d[0][0], d[0][1], d[0][2][0]), d[1], (d[0][2][1], d[2])),
        ),
    )


@dsl_user_op
def pack_pair(low: Float32, high: Float32, dtype, *, loc=None, ip=None) -> Int32:
    """Two floats rounded to 16 bits in one register."""
    kind = "bf16x2" if dtype is BFloat16 else "f16x2"
    operands = [Float32(x).ir_value(loc=loc, ip=ip) for x in (low, high)]
    return Int32(
        llvm.inline_asm(
            T.i32(),
            operands,
            f"cvt.rn.{kind}.f32 $0, $2, $1;",
            "=r,f,f",
            has_side_effects=False,
            is_align_stack=False,
            asm_dialect=llvm.AsmDialect.AD_ATT,
        )
    )


@cute.jit
def round_to_operand(acc: cute.Tensor, operand: cute.Tensor):
    """operand <- acc in 16 bits, as whole registers.

    A vector conversion leaves 16-bit halves that ptxas packs again between the products for some
    tile_n (80, 96, 144, ...), which serialises them.
    """
    words = cute.recast_tensor(operand, Int32)
    for i in cutlass.range_constexpr(cute.size(words)):
        words[i] = pack_pair(acc[2 * i], acc[2 * i + 1], operand.element_type)
