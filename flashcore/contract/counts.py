"""What layouts and plans made on the device say of themselves, in int32 tensors.

Kernels read it instead of tensor shapes, which are capacities there.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag


class PagerCount(IntEnum):
    """Elements of DeviceLayout.counts."""

    BATCH = 0  # sequences
    NNZ = 1  # entries
    STAGED = 2  # elements of staging_ids
    FAULTS = 3  # `Fault` of any sequence
    CHANGES = 4  # of the token map; scratch of the pager
    STAMP = 5  # updates
    SIZE = 8


class Fault(IntFlag):
    """Why a sequence could not be laid out or planned; bits of `bad` and of FAULTS in `counts`."""

    LENGTH = 1  # a length below 0 or beyond the page table; a range outside the token map
    QUERY_LENGTH = 2  # a query length below 0
    PAGE = 4  # a page id out of range
    ENTRIES = 8  # more pages than max_entries, counting from the first sequence
    QUERIES = 16  # more query tokens than max_q, counting from the first sequence
    PLAN = 32  # gathered tokens or work items exceed their capacity, even with nothing shared


INVALID = -2
"""In place of a partial token: the only element of the merge list of a query token whose sequence
could not be planned. Its result is NaN."""


class Count(IntEnum):
    """Elements of DevicePlan.counts."""

    NNZ = 0  # entries of the layout
    TOTAL_Q = 1  # query tokens
    GROUPS = 2
    MEMBERS = 3
    GATHERED = 4  # gathered query tokens
    ITEMS = 5  # work items
    PARTIALS = 6  # partial tokens
    MERGE = 7  # elements of the merge lists
    FOUND = 8  # groups before folding: rows of `decisions`
    MAX_Q_LEN = 9
    FAULTS = 10  # `Fault` of any sequence
    SEGMENTS = 11  # before folding; scratch of the planner
    CLASSES = 12  # buffer that holds the sorted classes of work items; scratch of the planner
    FITS = 14  # 0: the lists do not fit, with or without sharing; scratch of the planner
    SIZE = 16


class Seen(IntEnum):
    """Elements of what a planner's kernels tell the host of faults, int32 in pinned memory. Written
    after a fault alone, and by no update cleared."""

    FAULTS = 0  # `Fault` of any sequence of any update so far
    UPDATES = 1  # that had a fault
    SEQUENCE = 2  # some sequence of the last of these with a fault
    SIZE = 4


class Stat(IntEnum):
    """Elements of DevicePlan.stats, int64; the same as in `PlanStats`. All are 0 but FAULTS where
    the whole batch was left out (`Fault.PLAN`)."""

    TOKENS_UNIQUE = 0  # in distinct pages of sequences with queries; what no plan can go below
    TOKENS_ONCE = 1  # read by this plan
    TOKENS_PER_SEQUENCE = 2  # read if every sequence with queries reads its own copy
    NUM_GROUPS = 3
    NUM_FOLDED = 4  # groups that were shared as found and were given back
    UNSHARED = 5  # 1: planned as if nothing were shared, since there was no room otherwise
    FAULTS = 6  # `Fault` of any sequence
    SIZE = 7
