"""What a layout made on the device says of itself, in an int32 tensor. Needs neither torch nor DSL.

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
