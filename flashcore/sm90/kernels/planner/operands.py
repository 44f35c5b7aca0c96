"""The tensors and numbers that the planner's kernels share; contiguous, int32 if not said else."""

from __future__ import annotations

from typing import NamedTuple

import cutlass.cute as cute
from cutlass import Int32, Int64


class Problem(NamedTuple):
    """What does not change from update to update, in the order of the call."""

    page_tokens: Int32
    num_pages: Int32
    kv_heads: Int32
    group_size: Int32  # query heads of one KV head
    tile_m: Int32
    kv_token_cost: Int32  # `folding.Costs`
    partial_token_cost: Int32
    least_gain: Int32
    fold: Int32  # 0: groups stay as found
    num_workers: Int32  # 0 or 1: no split
    min_split_tokens: Int32  # `planner.split`
    long_split_tokens: Int32
    split_unit: Int32  # tokens; splits are multiples of it
    chunk_pages: Int32  # `planner.chunks`, where the config has chunks
    long_chunk_pages: Int32
    few_queries: Int32  # more make chunks long
    seen: Int64  # address of `contract.counts.Seen` in pinned memory of the host, 0: nowhere


class Source(NamedTuple):
    """A layout made on the device; docs as in `pager.device.DeviceLayout`."""

    mCounts: cute.Tensor  # (PagerCount.SIZE,)
    mBad: cute.Tensor  # (its max_batch,)
    mRowOffsets: cute.Tensor  # (its max_batch + 1,)
    mKvLens: cute.Tensor  # (its max_batch,)
    mCols: cute.Tensor  # (its max_entries,), at most those of the plan
    mTokenCounts: cute.Tensor  # (its max_entries,)
    mStarts: cute.Tensor  # (its max_entries,)
    mRows: cute.Tensor  # (its max_entries,)


class Plan(NamedTuple):
    """The plan, at capacity; docs as in `planner.types.Plan`."""

    mCounts: cute.Tensor  # (Count.SIZE,)
    mStats: cute.Tensor  # int64 (Stat.SIZE,)
    mBad: cute.Tensor  # (max_batch,) `Fault` of each sequence
    mRowOffsets: cute.Tensor  # (max_batch + 1,)
    mKvLens: cute.Tensor  # (max_batch,)
    mQOffsets: cute.Tensor  # (max_batch + 1,)
    mCols: cute.Tensor  # (max_entries,)
    mTokenCounts: cute.Tensor  # (max_entries,)
    mGroups: cute.Tensor  # (max_segments, 8)
    mMemberOffsets: cute.Tensor  # (max_segments + 1,)
    mMemberRows: cute.Tensor  # (max_segments,)
    mMemberStarts: cute.Tensor  # (max_segments,)
    mDecisions: cute.Tensor  # (max_segments, 4)
    mQTokens: cute.Tensor  # (max_gathered,)
    mQPositions: cute.Tensor  # (max_gathered,)
    mQIndex: cute.Tensor  # (max_q,)
    mWork: cute.Tensor  # (max_items, 8)
    mMergeOffsets: cute.Tensor  # (max_q + 1,)
    mMerge: cute.Tensor  # (max_partials + max_q,)


class Scratch(NamedTuple):
    """Lines are named in `config.planner`. All may be longer than the plan's: planners that take
    turns share them."""

    mSlots: cute.Tensor  # (num_pages, Slots.LINES)
    mEntries: cute.Tensor  # (Entries.LINES, max_entries), with chunks LINES_OF_CHUNKS
    mSegments: cute.Tensor  # (Segments.LINES, max_segments)
    mFound: cute.Tensor  # (Groups.LINES, max_segments)
    mRows: cute.Tensor  # (Rows.LINES, max_batch)
    mMembers: cute.Tensor  # (Sort.LINES, max_segments)
    mClasses: cute.Tensor  # (Sort.LINES_OF_CLASSES, 2 * max_segments)
    mTiles: cute.Tensor  # int64 (Tiles.LINES, SCAN_THREADS)
