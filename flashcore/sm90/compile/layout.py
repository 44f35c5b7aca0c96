"""Stand-ins for a layout made on the device, which the pager fills and the planner may read."""

from __future__ import annotations

from flashcore.contract.counts import PagerCount
from flashcore.contract.operands import PagerResult
from flashcore.sm90.compile.fake import vector


def layout_tensors() -> PagerResult:
    """Each of any capacity."""
    import cutlass.cute as cute
    from cutlass import Int32

    batch, entries = cute.sym_int(), cute.sym_int()
    return PagerResult(
        counts=vector(Int32, int(PagerCount.SIZE)),
        bad=vector(Int32, batch),
        row_offsets=vector(Int32, cute.sym_int()),
        kv_lens=vector(Int32, batch),
        cols=vector(Int32, entries),
        token_counts=vector(Int32, entries),
        starts=vector(Int32, entries),
        rows=vector(Int32, entries),
        staging_ids=vector(Int32, entries),
    )
