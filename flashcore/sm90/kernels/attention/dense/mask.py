"""Which keys a query row sees: block ranges of a tile, and the mask of one score block."""

from __future__ import annotations

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr

from flashcore.sm90.config.dense import DenseConfig


class View(NamedTuple):
    """Where a thread's scores lie in its sequence, and what a row may see."""

    row: Int32  # the thread's first (packed) row; its second is 8 below
    column: Int32  # its first column of a block
    seqlen_q: Int32
    seqlen_k: Int32
    window_left: Int32
    window_right: Int32


@cute.jit
def key_blocks(
    config: cutlass.Constexpr[DenseConfig],
    first_row: Int32,  # packed
    rows: cutlass.Constexpr[int],
    seqlen_q: Int32,
    seqlen_k: Int32,
    window_left: Int32,
    window_right: Int32,
):
    """Blocks of keys that some rows visit, from the last to the first.

    Returns (low, high, full_high, full_low): blocks low..high-1 hold a visible key. Of these,
    full_high..high-1 and low..full_low-1 need a mask and full_low..full_high-1 do not; the tail
    of the sequence is not counted, as the caller always masks block high-1.
    """
    low = Int32(0)
    high = cute.ceil_div(seqlen_k, config.tile_n)
    full_high, full_low = high, low
    if const_expr(config.causal or config.local):
        shift = seqlen_k - seqlen_q
        first = first_row // config.pack_gqa + shift
        last = min((first_row + rows - 1) // config.pack_gqa, seqlen_q - 1) + shift
        right = Int32(0)
        if const_expr(config.local):
            right = window_right
            if window_right < 0:
                right = seqlen_q + seqlen_k  # beyond every key
            if window_left >= 0:
                low = max(first - window_left, 0) // config.tile_n
                full_low = cute.ceil_div(max(last - window_left, 0), config.tile_n)
        high = min(high, cute.ceil_div(max(last + right + 1, 0), config.tile_n))
        full_high = max(first + right + 1, 0) // config.tile_n
    return low, high, full_high, full_low


@cute.jit
def mask_scores(
    config: cutlass.Constexpr[DenseConfig],
    scores: cute.Tensor,  # (rows, columns) of one thread
    view: View,
    n: Int32,  # block of keys
):
    """Scores of invisible keys become -inf. Selected, not added: K beyond the end may be NaN."""
    shift = view.seqlen_k - view.seqlen_q
    column = n * config.tile_n + view.column
    for r in cutlass.range_constexpr(cute.size(scores, mode=[0])):
        end = view.seqlen_k
        start = Int32(0)
        if const_expr(config.causal or config.local):
            position = (view.row + 8 * r) // config.pack_gqa + shift
            if const_expr(config.causal):
                end = min(end, position + 1)
            else:
                if view.window_right >= 0:
                    end = min(end, position + view.window_right + 1)
                if view.window_left >= 0:
                    start = position - view.window_left
        end -= column
        start -= column
        for c in cutlass.range_constexpr(cute.size(scores, mode=[1])):
            offset = 8 * (c // 2) + c % 2  # of column c in a WGMMA accumulator
            visible = offset < end
            if const_expr(config.local):
                visible = visible and offset >= start
            scores[r, c] = scores[r, c] if visible else -Float32.inf
