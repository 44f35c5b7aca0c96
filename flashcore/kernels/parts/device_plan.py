"""What there is of a plan that was made on the device, as its counts say."""

from __future__ import annotations

import cutlass.cute as cute
from cutlass import Boolean, Int32

from flashcore.planner.counters import Count


@cute.jit
def plan_fits(mCounts: cute.Tensor, rows: Int32, tree_width: Int32) -> Boolean:
    """Whether q (`rows` query tokens) and the tree mask reach as far as the plan. Neither can be
    checked on the host; where they do not, nothing is computed and all results are NaN."""
    return mCounts[int(Count.TOTAL_Q)] <= rows and mCounts[int(Count.MAX_Q_LEN)] <= tree_width


@cute.jit
def count_items(mCounts: cute.Tensor, mWork: cute.Tensor, rows: Int32, tree_width: Int32) -> Int32:
    """Work items of the list, 0 where the plan does not fit."""
    items = min(mCounts[int(Count.ITEMS)], mWork.shape[0])
    return items if plan_fits(mCounts, rows, tree_width) else Int32(0)
