"""Why the planner shares a group or gives it back: what host and kernels write in decisions."""

from __future__ import annotations

from enum import IntEnum


class Reason(IntEnum):
    """Why a group stands as it is; column REASON of Plan.decisions."""

    PRIVATE = 0  # one member: nothing to share
    KEPT = 1  # shared, and cheaper than reading it again for each child
    FOLDED = 2  # shared, but its partial results would cost more than reading it again
    KEPT_LAST = 3  # shared and small, but some member ends with it
    KEPT_PARTIAL_PAGE = 4  # shared and small, but its last page is not full
    KEPT_BRANCHING = 5  # shared and small, but a following run is also reached another way
    KEPT_ALL = 6  # shared; folding was switched off
