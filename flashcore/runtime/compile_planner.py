"""Compile function of the planner's kernels: config in, compiled function out, no tensors."""

from __future__ import annotations

from typing import Any

from flashcore.config.planner import PlannerConfig, Slots, illegal_reason
from flashcore.pager.counters import PagerCount
from flashcore.planner.counters import Count, Stat
from flashcore.planner.work import FIELDS
from flashcore.runtime.compile import COMPILE_OPTIONS


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
    from cutlass.cute.runtime import make_fake_stream

    from flashcore.kernels.planner import Planner
    from flashcore.kernels.planner_operands import Problem

    batch = cute.sym_int()
    numbers: list[Any] = [Int64(1) if n == "seen" else Int32(1) for n in Problem._fields]
    return cute.compile(
        Planner(config),
        None if config.from_layout else _matrix(batch, cute.sym_int(), align=4),
        None if config.from_layout else _vector(batch),
        _vector(batch),
        _source() if config.from_layout else None,
        _plan(),
        _scratch(config),
        Problem(*numbers),
        Int32(1),
        make_fake_stream(use_tvm_ffi_env_stream=True),
        options=f"{COMPILE_OPTIONS} {options}".strip(),
    )


def _source() -> Any:
    import cutlass.cute as cute

    from flashcore.kernels.planner_operands import Source

    batch, entries = cute.sym_int(), cute.sym_int()
    return Source(
        mCounts=_vector(int(PagerCount.SIZE)),
        mBad=_vector(batch),
        mRowOffsets=_vector(cute.sym_int()),
        mKvLens=_vector(batch),
        mCols=_vector(entries),
        mTokenCounts=_vector(entries),
        mStarts=_vector(entries),
        mRows=_vector(entries),
    )


def _plan() -> Any:
    import cutlass.cute as cute
    from cutlass import Int64
    from cutlass.cute.runtime import make_fake_tensor

    from flashcore.kernels.planner_operands import Plan

    entries, segments = cute.sym_int(), cute.sym_int()
    gathered, items = cute.sym_int(), cute.sym_int()
    return Plan(
        mCounts=_vector(int(Count.SIZE)),
        mStats=make_fake_tensor(Int64, (int(Stat.SIZE),), (1,), assumed_align=8),
        mBad=_vector(cute.sym_int()),
        mRowOffsets=_vector(cute.sym_int()),
        mKvLens=_vector(cute.sym_int()),
        mQOffsets=_vector(cute.sym_int()),
        mCols=_vector(entries),
        mTokenCounts=_vector(entries),
        mGroups=_table(segments, FIELDS),
        mMemberOffsets=_vector(cute.sym_int()),
        mMemberRows=_vector(segments),
        mMemberStarts=_vector(segments),
        mDecisions=_table(segments, 4),
        mQTokens=_vector(gathered),
        mQPositions=_vector(gathered),
        mQIndex=_vector(cute.sym_int()),
        mWork=_table(items, FIELDS),
        mMergeOffsets=_vector(cute.sym_int()),
        mMerge=_vector(cute.sym_int()),
    )


def _scratch(config: PlannerConfig) -> Any:
    import cutlass.cute as cute
    from cutlass import Int64
    from cutlass.cute.runtime import make_fake_tensor

    from flashcore.config import planner as lines
    from flashcore.kernels.planner_operands import Scratch

    segments = cute.sym_int()
    of_entries = lines.Entries.LINES_OF_CHUNKS if config.chunks else lines.Entries.LINES
    return Scratch(
        mSlots=_table(cute.sym_int(), Slots.LINES),
        mEntries=_matrix(of_entries, cute.sym_int()),
        mSegments=_matrix(lines.Segments.LINES, segments),
        mFound=_matrix(lines.Groups.LINES, segments),
        mRows=_matrix(lines.Rows.LINES, cute.sym_int()),
        mMembers=_matrix(lines.Sort.LINES, segments),
        mClasses=_matrix(lines.Sort.LINES_OF_CLASSES, cute.sym_int()),
        mTiles=make_fake_tensor(
            Int64, (lines.Tiles.LINES, lines.SCAN_THREADS), (lines.SCAN_THREADS, 1), assumed_align=8
        ),
    )


def _vector(extent: Any) -> Any:
    from cutlass import Int32
    from cutlass.cute.runtime import make_fake_tensor

    return make_fake_tensor(Int32, (extent,), (1,), assumed_align=4)


def _table(rows: Any, columns: int) -> Any:
    """Rows that are read in 16-byte loads."""
    from cutlass import Int32
    from cutlass.cute.runtime import make_fake_tensor

    return make_fake_tensor(Int32, (rows, columns), (columns, 1), assumed_align=16)


def _matrix(rows: Any, columns: Any, align: int = 16) -> Any:
    import cutlass.cute as cute
    from cutlass import Int32
    from cutlass.cute.runtime import make_fake_tensor

    return make_fake_tensor(Int32, (rows, columns), (cute.sym_int64(), 1), assumed_align=align)
