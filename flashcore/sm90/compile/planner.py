"""Compile function of the planner's kernels: config in, compiled function out, no tensors."""

from __future__ import annotations

from typing import Any

from flashcore.contract.counts import Count, PagerCount, Stat
from flashcore.contract.scratch import Slots
from flashcore.contract.work import FIELDS
from flashcore.sm90.compile.fake import compiled, matrix, table, vector
from flashcore.sm90.config.planner import PlannerConfig, illegal_reason


def compile_planner(config: PlannerConfig, options: str = "") -> Any:
    """Compile the planner for `config`; the result exports with `export_to_c`.

    Call arguments, in order: page_table and seq_lens or None twice, q_lens, then the fields of
    `kernels.planner_operands` `Source` (or None), `Plan`, `Scratch` and `Problem` as tuples, and
    the number of multiprocessors. The stream is the caller's current one.
    """
    reason = illegal_reason(config)
    if reason is not None:
        raise ValueError(reason)

    import cutlass.cute as cute
    from cutlass import Int32, Int64

    from flashcore.sm90.kernels.planner.kernel import Planner
    from flashcore.sm90.kernels.planner.operands import Problem

    batch = cute.sym_int()
    numbers: list[Any] = [Int64(1) if n == "seen" else Int32(1) for n in Problem._fields]
    from_layout = config.from_layout
    return compiled(
        Planner(config),
        None if from_layout else matrix(Int32, batch, cute.sym_int(), 4),
        None if from_layout else vector(Int32, batch),
        vector(Int32, batch),
        _source() if from_layout else None,
        _plan(),
        _scratch(config),
        Problem(*numbers),
        Int32(1),
        options=options,
    )


def _source() -> Any:
    import cutlass.cute as cute
    from cutlass import Int32

    from flashcore.sm90.kernels.planner.operands import Source

    batch, entries = cute.sym_int(), cute.sym_int()
    return Source(
        mCounts=vector(Int32, int(PagerCount.SIZE)),
        mBad=vector(Int32, batch),
        mRowOffsets=vector(Int32, cute.sym_int()),
        mKvLens=vector(Int32, batch),
        mCols=vector(Int32, entries),
        mTokenCounts=vector(Int32, entries),
        mStarts=vector(Int32, entries),
        mRows=vector(Int32, entries),
    )


def _plan() -> Any:
    import cutlass.cute as cute
    from cutlass import Int32, Int64

    from flashcore.sm90.kernels.planner.operands import Plan

    entries, segments = cute.sym_int(), cute.sym_int()
    gathered, items = cute.sym_int(), cute.sym_int()
    return Plan(
        mCounts=vector(Int32, int(Count.SIZE)),
        mStats=vector(Int64, int(Stat.SIZE)),
        mBad=vector(Int32, cute.sym_int()),
        mRowOffsets=vector(Int32, cute.sym_int()),
        mKvLens=vector(Int32, cute.sym_int()),
        mQOffsets=vector(Int32, cute.sym_int()),
        mCols=vector(Int32, entries),
        mTokenCounts=vector(Int32, entries),
        mGroups=table(Int32, segments, FIELDS),
        mMemberOffsets=vector(Int32, cute.sym_int()),
        mMemberRows=vector(Int32, segments),
        mMemberStarts=vector(Int32, segments),
        mDecisions=table(Int32, segments, 4),
        mQTokens=vector(Int32, gathered),
        mQPositions=vector(Int32, gathered),
        mQIndex=vector(Int32, cute.sym_int()),
        mWork=table(Int32, items, FIELDS),
        mMergeOffsets=vector(Int32, cute.sym_int()),
        mMerge=vector(Int32, cute.sym_int()),
    )


def _scratch(config: PlannerConfig) -> Any:
    import cutlass.cute as cute
    from cutlass import Int32, Int64

    from flashcore.contract import scratch as lines
    from flashcore.sm90.kernels.planner.operands import Scratch

    segments = cute.sym_int()
    of_entries = lines.Entries.LINES_OF_CHUNKS if config.chunks else lines.Entries.LINES
    return Scratch(
        mSlots=table(Int32, cute.sym_int(), Slots.LINES),
        mEntries=matrix(Int32, of_entries, cute.sym_int(), 16),
        mSegments=matrix(Int32, lines.Segments.LINES, segments, 16),
        mFound=matrix(Int32, lines.Groups.LINES, segments, 16),
        mRows=matrix(Int32, lines.Rows.LINES, cute.sym_int(), 16),
        mMembers=matrix(Int32, lines.Sort.LINES, segments, 16),
        mClasses=matrix(Int32, lines.Sort.LINES_OF_CLASSES, cute.sym_int(), 16),
        mTiles=table(Int64, lines.Tiles.LINES, lines.SCAN_THREADS, 8),
    )
