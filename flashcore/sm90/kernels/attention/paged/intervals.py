"""Which keys of a run a packed row sees: an interval on the run's scale, and a tree mask."""

from __future__ import annotations

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, const_expr

from flashcore.sm90.config.paged import PagedConfig
from flashcore.sm90.kernels.attention.paged.operands import Operands
from flashcore.sm90.kernels.attention.paged.work_loop import Item


class Bounds(NamedTuple):
    """Run-time window; -1 does not bind."""

    left: Int32
    right: Int32


@cute.jit
def place_in_tree(
    config: cutlass.Constexpr[PagedConfig],
    position: Int32,
    token: Int32,  # query token
    mQIndex: cute.Tensor,
    mTreePositions: cute.Tensor | None,
):
    """(Key of the tree mask's column 0, position from which the window counts) of a query.

    With a window that is its depth beyond column 0, whose own query token is the root.
    """
    index = mQIndex[token]
    first_new = position - index
    if const_expr(config.window):
        position = first_new + mTreePositions[token] - mTreePositions[token - index]
    return first_new, position


@cute.jit
def row_interval(
    config: cutlass.Constexpr[PagedConfig],
    position: Int32,
    first_new: Int32,  # key of the tree mask's column 0; read with a tree mask alone
    num_tokens: Int32,
    window: Bounds,
):
    """[low, high) of the keys that a query at `position` sees, tree mask apart.

    Compared before they are added: a bound may be any number that fits an Int32.
    """
    low, high = Int32(0), num_tokens
    if const_expr(config.causal):
        high = min(high, position + 1)
    if const_expr(config.window):
        if const_expr(not config.tree):
            if window.right >= 0 and window.right < num_tokens - 1 - position:
                high = min(high, position + window.right + 1)
        if window.left >= 0 and position > window.left:
            low = min(position - window.left, num_tokens)
        if const_expr(config.tree):
            # Drafts stand in any order, and the mask has what the window leaves of them.
            low = min(low, max(first_new, 0))
    return low, max(high, low)


@cute.jit
def measure_item(
    config: cutlass.Constexpr[PagedConfig],
    words: cute.Tensor,  # a row of the work list
    fields: cutlass.Constexpr[type],  # planner.work.Work
    mPositions: cute.Tensor,
    mTokens: cute.Tensor,
    mQIndex: cute.Tensor | None,
    mTreePositions: cute.Tensor | None,
    window: Bounds,
) -> Item:
    """The item with its tile ranges, from the positions of its query tokens. By a whole warp."""
    c = config
    row_begin, num_rows = words[int(fields.ROW_BEGIN)], words[int(fields.NUM_ROWS)]
    offset, num_tokens = words[int(fields.KV_OFFSET)], words[int(fields.NUM_TOKENS)]
    low, high, max_low, min_high = Int32(0), num_tokens, Int32(0), num_tokens
    if const_expr(c.causal or c.window or c.tree):
        token = row_begin // c.group_size + cute.arch.lane_idx()
        last = (row_begin + num_rows - 1) // c.group_size
        low, max_low, min_high, high = num_tokens, Int32(0), num_tokens, Int32(0)
        while token <= last:
            position, first_new = mPositions[token] - offset, Int32(0)
            if const_expr(c.tree):
                first_new, position = place_in_tree(
                    c, position, mTokens[token], mQIndex, mTreePositions
                )
            a, b = row_interval(c, position, first_new, num_tokens, window)
            low, max_low, high = min(low, a), max(max_low, a), max(high, b)
            if const_expr(c.tree):
                # From its sequence's first new token on, a query needs its row of the mask.
                b = min(b, max(first_new, 0))
            min_high = min(min_high, b)
            token += 32
        low = cute.arch.warp_redux_sync(low, "min")
        min_high = cute.arch.warp_redux_sync(min_high, "min")
        high = cute.arch.warp_redux_sync(high, "max")
        max_low = cute.arch.warp_redux_sync(max_low, "max")
    first = low // c.tile_n
    end = cute.ceil_div(high, c.tile_n)
    if high <= low:
        end = first
    return Item(
        valid=Int32(0),
        kv_head=words[int(fields.KV_HEAD)],
        row_begin=row_begin,
        num_rows=num_rows,
        kv_offset=offset,
        num_tokens=num_tokens,
        partial=words[int(fields.PARTIAL)],
        first=first,
        end=end,
        full_low=cute.ceil_div(max_low, c.tile_n),
        full_high=min_high // c.tile_n,
        low=low,
        high=high,
        entry=words[int(fields.ENTRY)],
        all_low=max_low if const_expr(c.window) else None,
        all_high=min_high if const_expr(c.window) else None,
    )


class Rows(NamedTuple):
    """A thread's two rows: intervals of visible keys, and what the tree mask needs."""

    low: cute.Tensor
    high: cute.Tensor
    token: cute.Tensor  # query token
    first_new: cute.Tensor  # key of the tree mask's column 0


@cute.jit
def row_intervals(
    c: cutlass.Constexpr[PagedConfig],
    m: Operands,
    item: Item,
    window: Bounds,
    thread_row: Int32,
) -> Rows:
    """Intervals of a thread's two rows."""
    low, high, token, first_new = (cute.make_rmem_tensor(2, Int32) for _ in range(4))
    for r in cutlass.range_constexpr(2):
        row = thread_row + 8 * r
        there = row < item.num_rows
        gathered = (item.row_begin + (row if there else Int32(0))) // c.group_size
        position = m.q_positions[gathered] - item.kv_offset
        token[r] = m.q_tokens[gathered]
        first_new[r] = Int32(0)
        if const_expr(c.tree):
            first_new[r], position = place_in_tree(
                c, position, token[r], m.q_index, m.tree_positions
            )
        low[r], high[r] = row_interval(c, position, first_new[r], item.num_tokens, window)
    return Rows(low, high, token, first_new)


@cute.jit
def mask_scores(
    config: cutlass.Constexpr[PagedConfig],
    scores: cute.Tensor,  # (rows, columns) of one thread
    rows: Rows,
    mTree: cute.Tensor | None,  # uint8 (token, width)
    key: Int32,  # of the thread's first column
):
    """Scores of invisible keys become -inf. Selected, not added: K past the end may be NaN."""
    for r in cutlass.range_constexpr(cute.size(scores, mode=[0])):
        low, high = rows.low[r] - key, rows.high[r] - key
        token, first_new = rows.token[r], rows.first_new[r] - key
        for c in cutlass.range_constexpr(cute.size(scores, mode=[1])):
            offset = 8 * (c // 2) + c % 2  # of column c in a WGMMA accumulator
            visible = Boolean(offset < high)
            if const_expr(config.window):
                visible = visible and offset >= low
            if const_expr(config.tree):
                # Loaded whether needed or not: a branch here would put the rows on the stack.
                new = offset - first_new
                own = new >= 0 and new < mTree.shape[1]
                allowed = mTree[token, new if own else Int32(0)] != 0
                visible = visible and (allowed or not own)
            scores[r, c] = scores[r, c] if visible else -Float32.inf


@cute.jit
def sees_key(
    config: cutlass.Constexpr[PagedConfig],
    rows: Rows,
    r: cutlass.Constexpr[int],
    mTree: cute.Tensor | None,  # uint8 (token, width)
    key: Int32,
) -> Boolean:
    """Whether one of a thread's rows sees a key: what `mask_scores` leaves of a score."""
    seen = key >= rows.low[r] and key < rows.high[r]
    if const_expr(config.tree):
        new = key - rows.first_new[r]
        own = new >= 0 and new < mTree.shape[1]
        seen = seen and (not own or mTree[rows.token[r], new if own else Int32(0)] != 0)
    return seen
