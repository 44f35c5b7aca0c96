"""Compile function of the pager's kernels: config in, compiled function out, no tensors."""

from __future__ import annotations

from typing import Any

from flashcore.contract.counts import PagerCount
from flashcore.contract.scratch import SCAN_THREADS
from flashcore.contract.scratch import PagerRanges as Ranges
from flashcore.contract.scratch import PagerTiles as Tiles
from flashcore.sm90.compile.fake import compiled, matrix, table, vector
from flashcore.sm90.config.pager import PagerConfig, illegal_reason


def compile_pager(config: PagerConfig, options: str = "") -> Any:
    """Compile the pager for `config`; the result exports with `export_to_c`.

    Call arguments, in order: the fields of `kernels.pager.Batch`, those of `Layout` and of
    `Scratch` as two tuples, page_tokens, num_pages, and the number of multiprocessors. The stream
    is the caller's current one.
    """
    reason = illegal_reason(config)
    if reason is not None:
        raise ValueError(reason)

    from cutlass import Int32

    from flashcore.sm90.kernels.pager import Pager

    numbers = Int32(1), Int32(1), Int32(1)
    return compiled(
        Pager(config), *_batch(config), _layout(), _scratch(), *numbers, options=options
    )


def _batch(config: PagerConfig) -> Any:
    import cutlass.cute as cute
    from cutlass import Int32, Uint8

    from flashcore.sm90.kernels.pager import Batch

    batch = cute.sym_int()
    page_table = matrix(Int32, batch, cute.sym_int(), 4)
    element = {"none": None, "bytes": Uint8, "words": Int32}[config.bitmap]
    return Batch(
        mPages=vector(Int32, cute.sym_int()) if config.tokens else page_table,
        mBegins=vector(Int32, batch) if config.tokens else None,
        mEnds=vector(Int32, batch),
        mResident=None if element is None else vector(element, cute.sym_int()),
    )


def _layout() -> Any:
    import cutlass.cute as cute
    from cutlass import Int32

    from flashcore.sm90.kernels.pager import Layout

    batch, entries = cute.sym_int(), cute.sym_int()
    return Layout(
        mCounts=vector(Int32, int(PagerCount.SIZE)),
        mBad=vector(Int32, batch),
        mRowOffsets=vector(Int32, cute.sym_int()),
        mKvLens=vector(Int32, batch),
        mCols=vector(Int32, entries),
        mTokenCounts=vector(Int32, entries),
        mStarts=vector(Int32, entries),
        mRows=vector(Int32, entries),
        mStaging=vector(Int32, entries),
    )


def _scratch() -> Any:
    import cutlass.cute as cute
    from cutlass import Int32, Int64

    from flashcore.sm90.kernels.pager import Scratch

    tokens, batch = cute.sym_int(), cute.sym_int()
    return Scratch(
        mChanges=vector(Int32, tokens),
        mPieces=vector(Int32, tokens),
        mRanges=matrix(Int32, Ranges.LINES, batch, 4),
        mSlots=vector(Int64, cute.sym_int()),
        mTiles=table(Int64, Tiles.LINES, SCAN_THREADS, 8),
    )
