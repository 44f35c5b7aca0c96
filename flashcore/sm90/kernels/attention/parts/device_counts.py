"""What there is of a plan that was made on the device, as its counts say."""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Int32, const_expr

from flashcore.contract.counts import Count
from flashcore.sm90.config.paged import PagedConfig


@cute.jit
def plan_fits(mCounts: cute.Tensor, rows: Int32, tree_width: Int32) -> Boolean:
    """Whether q (`rows` query tokens) and the tree mask reach as far as the plan. Neither can be
    checked on the host; where they do not, nothing is computed and all results are NaN."""
    return mCounts[int(Count.TOTAL_Q)] <= rows and mCounts[int(Count.MAX_Q_LEN)] <= tree_width


@cute.jit
def count_items(config: cutlass.Constexpr[PagedConfig], m) -> Int32:
    """Work items of a launch (m: paged.operands.Operands), 0 where the plan does not fit."""
    items = m.work.shape[0]
    if const_expr(config.device_counts):
        width = m.tree_mask.shape[1] if const_expr(config.tree) else Int32(2**31 - 1)
        items = min(m.counts[int(Count.ITEMS)], items)
        items = items if plan_fits(m.counts, m.q.shape[0], width) else Int32(0)
    return items
