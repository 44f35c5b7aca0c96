"""Values that are NaN or infinite, where some rows of an item see them and others do not.

P is zero where a row does not see a key, and 0 * NaN is NaN: the product of a tile would carry such
a value to every row of the item, and so to other sequences that share the page. It is taken out of
V, and added by hand to the rows that see it, which it is the result of: x + NaN is NaN, and x + inf
is inf, as with any weight above zero.
"""

from __future__ import annotations

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Boolean, Float32, Int32, const_expr

from flashcore.sm90.config.paged import PagedConfig, rows_at_a_time
from flashcore.sm90.kernels.attention.paged import barriers
from flashcore.sm90.kernels.attention.paged.intervals import Rows, sees_key
from flashcore.sm90.kernels.attention.paged.pages import VECTOR
from flashcore.sm90.kernels.attention.parts import matmul
from flashcore.sm90.kernels.attention.parts.consumer import ROWS

TOP_BITS = -0x7FFF8000  # of both halves of a word, as an Int32


class Seen(NamedTuple):
    """Keys of a V tile: some row sees those of low .. high - 1, and every row those of all_low ..
    all_high - 1."""

    low: Int32
    high: Int32
    all_low: Int32
    all_high: Int32


@cute.jit
def clear(
    config: cutlass.Constexpr[PagedConfig],
    accO: cute.Tensor,  # what came before the tile, rescaled
    rows: Rows,
    mTree: cute.Tensor | None,
    sV: cute.Tensor,  # (tile_n, dim) of one stage, which no product has read
    seen: Seen,
    first_key: Int32,  # of the tile
    column: Int32,  # this thread's first
    thread: Int32,  # among all consumers, who come together
):
    """Make a tile of V one that can be multiplied: zero what no row sees, and see to the rest."""
    c = config
    found = clear_and_find(c, sV, seen, thread)
    cute.arch.fence_proxy("async.shared", space="cta")
    if barriers.vote_consumers(c.num_consumer_warpgroups, found) != 0:
        add_to_rows(c, matmul.acc_rows_cols(accO), rows, mTree, sV, seen, first_key, column)
        barriers.sync_consumers(c.num_consumer_warpgroups)
        take_out(c, sV, seen, thread)
        cute.arch.fence_proxy("async.shared", space="cta")
        barriers.sync_consumers(c.num_consumer_warpgroups)


@cute.jit
def by_some(seen: Seen, key: Int32) -> Boolean:
    """Some rows see the key, and maybe not all."""
    inside = key >= seen.low and key < seen.high
    return inside and (key < seen.all_low or key >= seen.all_high)


@cute.jit
def clear_and_find(
    config: cutlass.Constexpr[PagedConfig],
    sV: cute.Tensor,  # (tile_n, dim) of one stage
    seen: Seen,
    thread: Int32,  # among all consumers
) -> Boolean:
    """Zero the keys that no row sees. Has this thread met a value of `by_some` that is not finite?

    An exponent of ones, and nothing else, carries into the top bit when its lowest bit is added.
    """
    c = config
    step = const_expr(rows_at_a_time(c.v_columns, c.num_consumer_warpgroups))
    lanes = const_expr(128 * c.num_consumer_warpgroups // step)  # of a row
    exponents = const_expr(exponent_bits(sV.element_type) * 0x10001)
    lowest = const_expr(exponents & -exponents) * const_expr(0x10001)
    sVectors = cute.logical_divide(sV, (None, VECTOR))
    zero = cute.make_rmem_tensor(VECTOR, sV.element_type)
    zero.fill(0.0)
    found = Int32(0)
    for i in cutlass.range(c.tile_n // step, unroll=1):
        key = i * step + thread // lanes
        for part in cutlass.range_constexpr(c.v_columns // VECTOR // lanes):
            vector = sVectors[key, (None, thread % lanes + lanes * part)]
            if key < seen.low or key >= seen.high:
                cute.autovec_copy(zero, vector)
            elif key < seen.all_low or key >= seen.all_high:
                values = cute.make_rmem_tensor(VECTOR, sV.element_type)
                cute.autovec_copy(vector, values)
                words = cute.recast_tensor(values, Int32)
                for j in cutlass.range_constexpr(VECTOR // 2):
                    found = found | ((words[j] & exponents) + lowest)
    return (found & TOP_BITS) != 0


@cute.jit
def add_to_rows(
    config: cutlass.Constexpr[PagedConfig],
    out: cute.Tensor,  # (rows, columns) of one thread
    rows: Rows,
    mTree: cute.Tensor | None,
    sV: cute.Tensor,  # (tile_n, dim) of one stage
    seen: Seen,
    first_key: Int32,  # of the tile
    column: Int32,  # this thread's first
):
    """Add what is not finite of the keys of `by_some` to this thread's rows that see them."""
    c = config
    exponent = const_expr(exponent_bits(sV.element_type))
    sPairs = cute.logical_divide(sV, (None, 2))
    for key in cutlass.range(max(seen.low, 0), min(seen.high, c.tile_n), unroll=1):
        if by_some(seen, key):
            sees = [sees_key(c, rows, r, mTree, first_key + key) for r in range(ROWS)]
            for j in cutlass.range_constexpr(c.v_columns // 8):
                pair = cute.make_rmem_tensor(2, sV.element_type)
                cute.autovec_copy(sPairs[key, (None, 4 * j + column // 2)], pair)
                word = cute.recast_tensor(pair, Int32)[0]
                for h in cutlass.range_constexpr(2):
                    bits = const_expr(exponent << (16 * h))
                    bad = (word & bits) == bits
                    value = pair[h].to(Float32) if bad else Float32(0.0)
                    for r in cutlass.range_constexpr(ROWS):
                        out[r, 2 * j + h] = out[r, 2 * j + h] + (value if sees[r] else Float32(0.0))


@cute.jit
def take_out(
    config: cutlass.Constexpr[PagedConfig],
    sV: cute.Tensor,  # (tile_n, dim) of one stage
    seen: Seen,
    thread: Int32,  # among all consumers
):
    """Zero what is not finite of the keys of `by_some`."""
    c = config
    step = const_expr(rows_at_a_time(c.v_columns, c.num_consumer_warpgroups))
    lanes = const_expr(128 * c.num_consumer_warpgroups // step)  # of a row
    exponent = const_expr(exponent_bits(sV.element_type))
    sVectors = cute.logical_divide(sV, (None, VECTOR))
    for i in cutlass.range(c.tile_n // step, unroll=1):
        key = i * step + thread // lanes
        if by_some(seen, key):
            for part in cutlass.range_constexpr(c.v_columns // VECTOR // lanes):
                vector = sVectors[key, (None, thread % lanes + lanes * part)]
                values = cute.make_rmem_tensor(VECTOR, sV.element_type)
                cute.autovec_copy(vector, values)
                words = cute.recast_tensor(values, Int32)
                for j in cutlass.range_constexpr(VECTOR // 2):
                    word = words[j]
                    low, high = word & 0xFFFF, word & -0x10000
                    low = Int32(0) if (word & exponent) == exponent else low
                    high = Int32(0) if (word & (exponent << 16)) == exponent << 16 else high
                    words[j] = low | high
                cute.autovec_copy(values, vector)


def exponent_bits(dtype) -> int:
    """The exponent of a 16-bit float, all ones: infinite or NaN."""
    return 0x7F80 if dtype is BFloat16 else 0x7C00
