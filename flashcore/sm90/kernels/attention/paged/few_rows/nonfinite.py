"""Values of V that are NaN or infinite, where a window lets some rows see them and others not.

As in paged/nonfinite.py: taken out of the product, and added by hand to the rows that see them. By
hand is by products too, of ones where a value is not finite and of ones where a row sees its key.
"""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float16, Float32, Int32, const_expr

from flashcore.sm90.kernels.attention.paged.few_rows.shape import Shape, Warp, sees
from flashcore.sm90.kernels.attention.parts import matmul, warp_products

LOWEST = 0x01010101  # bit of each byte
EXPONENT = {"e4m3": 0x7F7F7F7F, "e5m2": 0x7C7C7C7C}  # all ones, and of e4m3 the mantissa too
ONE = {"e4m3": 0x38, "e5m2": 0x3C}


@cute.jit
def flags(word: Int32, kv_dtype: cutlass.Constexpr[str]) -> Int32:
    """1 in each byte that is not finite: what is all ones carries into the sign."""
    exponent = const_expr(EXPONENT[kv_dtype])
    step = const_expr(exponent & -exponent & 0x7F)
    return (((word & exponent) + step * LOWEST) >> 7) & LOWEST


@cute.jit
def bytes_of(word: Int32, kv_dtype: cutlass.Constexpr[str]) -> Int32:
    """All bits of the bytes that are not finite."""
    return flags(word, kv_dtype) * 255


@cute.jit
def signed(
    word: Int32, kv_dtype: cutlass.Constexpr[str], negative: cutlass.Constexpr[bool]
) -> Int32:
    """The code of 1 in each byte that is NaN, or infinite with this sign."""
    bad = flags(word, kv_dtype)
    if const_expr(kv_dtype == "e5m2"):
        nan = (word | (word >> 1)) & LOWEST
        sign = (word >> 7) & LOWEST
        if const_expr(not negative):
            sign = sign ^ LOWEST
        bad = bad & (nan | sign)
    return bad * const_expr(ONE[kv_dtype])


@cute.jit
def found(shape: cutlass.Constexpr[Shape], at: Int32, selectors: cute.Tensor) -> Boolean:
    """Whether any value of this warp's keys that some row sees is not finite."""
    c = const_expr(shape.config)
    any_of = Int32(0)
    for kb in cutlass.range_constexpr(shape.key_blocks):
        for pair in cutlass.range_constexpr(shape.v_chunks // 2):
            words = warp_products.load_matrices(shape.v.address(at, kb, pair), True)
            for i in cutlass.range_constexpr(4):
                word = warp_products.permute_bytes(words[i], selectors[i % 2, kb])
                any_of = any_of | flags(word, c.kv_dtype)
    return cute.arch.vote_any_sync(any_of != 0)


@cute.jit
def add_by_hand(
    shape: cutlass.Constexpr[Shape], warp: Warp, at: Int32, selectors: cute.Tensor, key: Int32
):  # fmt: skip
    """x + inf is inf and x + NaN is NaN, in the rows that see such a value. key: the lane's first
    of the scores."""
    c = const_expr(shape.config)
    for kb in cutlass.range_constexpr(shape.key_blocks):
        seen = cute.make_rmem_tensor((2, shape.blocks), Int32)
        for b in cutlass.range_constexpr(shape.blocks):
            for h in cutlass.range_constexpr(2):
                ones = []
                for e in cutlass.range_constexpr(2):
                    sees_it = sees(c.window, warp, 2 * b + e, key + (16 * kb + 8 * h))
                    ones.append(Float32(1.0) if sees_it else Float32(0.0))
                pair = matmul.pack_pair(ones[0], ones[1], Float16)
                seen[h, b] = warp_products.transpose(pair)
        for pair in cutlass.range_constexpr(shape.v_chunks // 2):
            loaded = warp_products.load_matrices(shape.v.address(at, kb, pair), True)
            for negative in cutlass.range_constexpr(2):
                words = []
                for i in cutlass.range_constexpr(4):
                    word = warp_products.permute_bytes(loaded[i], selectors[i % 2, kb])
                    words.append(signed(word, c.kv_dtype, negative == 1))
                wide = warp_products.widen(words, c.kv_dtype)
                infinity = const_expr(-Float32.inf if negative == 1 else Float32.inf)
                for h in cutlass.range_constexpr(2):
                    a = [wide[4 * h + i] for i in range(4)]
                    for b in cutlass.range_constexpr(shape.blocks):
                        count = cute.make_rmem_tensor(4, Float32)
                        count.fill(0.0)
                        warp_products.multiply(count, a, [seen[0, b], seen[1, b]])
                        for i in cutlass.range_constexpr(4):
                            added = Float32(infinity) if count[i] > 0.0 else Float32(0.0)
                            chunk = const_expr(2 * pair + h)
                            warp.out[i, chunk, b] = warp.out[i, chunk, b] + added
