"""Products of one warp: mma.sync m16n8k16 on fp16 registers, and what brings operands to them."""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass import Float8E4M3FN, Float8E5M2, Float16, Float32, Int32
from cutlass._mlir.dialects import llvm
from cutlass.cutlass_dsl import T, dsl_user_op


@dsl_user_op
def load_matrices(address: Int32, transposed: bool, *, loc=None, ip=None) -> list[Int32]:
    """Four matrices of 8 x 8 16-bit elements in shared memory; lane 8 i + r has the address of row
    r of matrix i. Lane 4 g + t gets elements 2 t, 2 t + 1 of row g, or of column g."""
    kind = ".trans" if transposed else ""
    found = llvm.inline_asm(
        llvm.StructType.get_literal([T.i32()] * 4),
        [address.ir_value(loc=loc, ip=ip)],
        f"ldmatrix.sync.aligned.m8n8.x4{kind}.shared.b16 {{$0, $1, $2, $3}}, [$4];",
        "=r,=r,=r,=r,r",
        has_side_effects=True,  # another tile comes to the same address
        is_align_stack=False,
        asm_dialect=llvm.AsmDialect.AD_ATT,
    )
    return [Int32(llvm.extractvalue(T.i32(), found, [i], loc=loc, ip=ip)) for i in range(4)]


@dsl_user_op
def transpose(matrix: Int32, *, loc=None, ip=None) -> Int32:
    """An 8 x 8 matrix of 16-bit elements, of which a lane has two of a row: two of a column."""
    return Int32(
        llvm.inline_asm(
            T.i32(),
            [matrix.ir_value(loc=loc, ip=ip)],
            "movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;",
            "=r,r",
            has_side_effects=True,
            is_align_stack=False,
            asm_dialect=llvm.AsmDialect.AD_ATT,
        )
    )


@dsl_user_op
def permute_bytes(word: Int32, selector: Int32, *, loc=None, ip=None) -> Int32:
    """Bytes of `word` by the nibbles of `selector`, the lowest first; 4: zero."""
    return Int32(
        llvm.inline_asm(
            T.i32(),
            [x.ir_value(loc=loc, ip=ip) for x in (word, selector)],
            "prmt.b32 $0, $1, 0, $2;",
            "=r,r,r",
            has_side_effects=False,
            is_align_stack=False,
            asm_dialect=llvm.AsmDialect.AD_ATT,
        )
    )


@cute.jit
def widen(words: list[Int32], kv_dtype: cutlass.Constexpr[str]) -> list[Int32]:
    """Words of four fp8 values as pairs of fp16: of word i, words 2 i and 2 i + 1."""
    narrow = cute.make_rmem_tensor(len(words), Int32)
    for i in cutlass.range_constexpr(len(words)):
        narrow[i] = words[i]
    wide = cute.make_rmem_tensor(4 * len(words), Float16)
    values = cute.recast_tensor(narrow, Float8E4M3FN if kv_dtype == "e4m3" else Float8E5M2)
    wide.store(values.load().to(Float16))
    pairs = cute.recast_tensor(wide, Int32)
    return [pairs[i] for i in range(2 * len(words))]


@dsl_user_op
def _multiply(acc, a, b, *, loc=None, ip=None) -> list[Float32]:
    found = llvm.inline_asm(
        llvm.StructType.get_literal([T.f32()] * 4),
        [x.ir_value(loc=loc, ip=ip) for x in (*a, *b, *acc)],
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};",
        "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f",
        has_side_effects=False,
        is_align_stack=False,
        asm_dialect=llvm.AsmDialect.AD_ATT,
    )
    return [Float32(llvm.extractvalue(T.f32(), found, [i], loc=loc, ip=ip)) for i in range(4)]


@cute.jit
def multiply(acc: cute.Tensor, a: list[Int32], b: list[Int32]):
    """acc (4) += a b: 16 x 16 by 16 x 8."""
    values = _multiply([acc[i] for i in range(4)], a, b)
    for i in cutlass.range_constexpr(4):
        acc[i] = values[i]


@cute.jit
def load_words(address: Int32, count: cutlass.Constexpr[int]) -> cute.Tensor:
    """2 or 4 fp32 values of shared memory."""
    found = cute.make_rmem_tensor(count, Float32)
    cute.autovec_copy(_words(address, count), found)
    return found


@cute.jit
def store_words(values: cute.Tensor, address: Int32):
    """2 or 4 fp32 values to shared memory."""
    cute.autovec_copy(values, _words(address, cute.size(values)))


def _words(address: Int32, count: int) -> cute.Tensor:
    pointer = cute.make_ptr(Float32, address, cute.AddressSpace.smem, assumed_align=4 * count)
    return cute.make_tensor(pointer, cute.make_layout(count))


@cute.jit
def load_pairs(mRow: cute.Tensor, column: Int32) -> list[Int32]:
    """Four neighbouring 16-bit elements of a row in memory, as two words."""
    words = cute.make_rmem_tensor(2, Int32)
    at = cute.recast_ptr((mRow.iterator + column).align(8), dtype=Int32)
    cute.autovec_copy(cute.make_tensor(at, cute.make_layout(2)), words)
    return [words[0], words[1]]
