"""Compile function of the pager's kernels: config in, compiled function out, no tensors."""

from __future__ import annotations

from typing import Any

from flashcore.config.pager import PagerConfig, Ranges, Tiles, illegal_reason
from flashcore.config.planner import SCAN_THREADS
from flashcore.pager.counters import PagerCount
from flashcore.runtime.compile import COMPILE_OPTIONS


def compile_pager(config: PagerConfig, options: str = "") -> Any:
    """Compile the pager for `config`; the result exports with `export_to_c`.

    Call arguments, in order: the fields of `kernels.pager.Batch`, those of `Layout` and of
    `Scratch` as two tuples, page_tokens, num_pages, and the number of multiprocessors. The stream
    is the caller's current one.
    """
    reason = illegal_reason(config)
    if reason is not None:
        raise ValueError(reason)

    import cutlass.cute as cute
    from cutlass import Int32
    from cutlass.cute.runtime import make_fake_stream

    from flashcore.kernels.pager import Pager

    return cute.compile(
        Pager(config),
        *_batch(config),
        _layout(),
        _scratch(),
        Int32(1),
        Int32(1),
        Int32(1),
        make_fake_stream(use_tvm_ffi_env_stream=True),
        options=f"{COMPILE_OPTIONS} {options}".strip(),
    )


def _batch(config: PagerConfig) -> Any:
    import cutlass.cute as cute
    from cutlass import Int32, Uint8
    from cutlass.cute.runtime import make_fake_tensor

    from flashcore.kernels.pager import Batch

    batch = cute.sym_int()
    table = make_fake_tensor(Int32, (batch, cute.sym_int()), (cute.sym_int64(), 1), assumed_align=4)
    element = {"none": None, "bytes": Uint8, "words": Int32}[config.bitmap]
    return Batch(
        mPages=_vector(Int32, cute.sym_int()) if config.tokens else table,
        mBegins=_vector(Int32, batch) if config.tokens else None,
        mEnds=_vector(Int32, batch),
        mResident=None if element is None else _vector(element, cute.sym_int()),
    )


def _layout() -> Any:
    import cutlass.cute as cute
    from cutlass import Int32

    from flashcore.kernels.pager import Layout

    batch, entries = cute.sym_int(), cute.sym_int()
    return Layout(
        mCounts=_vector(Int32, int(PagerCount.SIZE)),
        mBad=_vector(Int32, batch),
        mRowOffsets=_vector(Int32, cute.sym_int()),
        mKvLens=_vector(Int32, batch),
        mCols=_vector(Int32, entries),
        mTokenCounts=_vector(Int32, entries),
        mStarts=_vector(Int32, entries),
        mRows=_vector(Int32, entries),
        mStaging=_vector(Int32, entries),
    )


def _scratch() -> Any:
    import cutlass.cute as cute
    from cutlass import Int32, Int64
    from cutlass.cute.runtime import make_fake_tensor

    from flashcore.kernels.pager import Scratch

    tokens, batch = cute.sym_int(), cute.sym_int()
    return Scratch(
        mChanges=_vector(Int32, tokens),
        mPieces=_vector(Int32, tokens),
        mRanges=make_fake_tensor(
            Int32, (Ranges.LINES, batch), (cute.sym_int64(), 1), assumed_align=4
        ),
        mSlots=_vector(Int64, cute.sym_int()),
        mTiles=make_fake_tensor(
            Int64, (Tiles.LINES, SCAN_THREADS), (SCAN_THREADS, 1), assumed_align=8
        ),
    )


def _vector(element: Any, extent: Any) -> Any:
    from cutlass.cute.runtime import make_fake_tensor

    return make_fake_tensor(element, (extent,), (1,), assumed_align=element.width // 8)
