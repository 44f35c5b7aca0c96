"""The one definition of what host and device exchange: the rows of the group table and the work
list.

Both are int32 tensors of eight columns, 32 bytes a row, so that a row is two 16-byte loads. Nothing
here needs torch or the DSL; kernels, planner and tests take the column numbers from these enums.

Words used:
    entry           index into Layout.cols; the pages of a run are consecutive entries, and all of
                    them but the last hold page_tokens tokens.
    gathered token  index into Plan.q_tokens: the query tokens of a group's members, member after
                    member. Gathered token i is query token q_tokens[i].
    packed row      gathered token * g + head within the GQA group (g = q heads / KV heads); query
                    head = KV head * g + packed row % g. Rows of one KV head fill M tiles densely.
    partial token   index into the partial results [num_partial_tokens, num_q_heads, head_dim];
                    one for each (gathered token, split).
"""

from __future__ import annotations

from enum import IntEnum

FIELDS = 8
DIRECT = -1
"""In place of a partial token: the only result of its query tokens, written to the output."""


class Group(IntEnum):
    """Columns of Plan.groups: one row per group, in the order of their first use."""

    ENTRY = 0  # first entry of the KV run
    NUM_ENTRIES = 1  # pages of the run, at least 1
    NUM_TOKENS = 2  # tokens of the run, at least 1
    Q_BEGIN = 3  # first gathered token
    NUM_Q = 4  # gathered tokens: the sum of the members' q_len, at least 1
    SPLIT_ENTRIES = 5  # pages per split; the last split may have fewer
    NUM_SPLITS = 6  # at least 1
    PARTIAL = 7  # first partial token (split-major: split * NUM_Q + token), or DIRECT


class Work(IntEnum):
    """Columns of Plan.work: one row per work item, longest KV run first."""

    KV_HEAD = 0  # KV head, 0 .. num_kv_heads - 1
    ROW_BEGIN = 1  # first packed row
    NUM_ROWS = 2  # packed rows of this item, 1 .. tile_m; they may begin inside a token's heads
    ENTRY = 3  # first entry of this split
    NUM_TOKENS = 4  # KV tokens of this split, at least 1
    KV_OFFSET = 5  # tokens of the run before this split: the split's place on the q_positions scale
    PARTIAL = 6  # partial token of ROW_BEGIN's token, or DIRECT
    GROUP = 7  # row of Plan.groups
