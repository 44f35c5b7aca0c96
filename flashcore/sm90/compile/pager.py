"""Compile function of the pager's kernels: config in, compiled function out, no tensors."""

from __future__ import annotations

from typing import Any

from flashcore.contract.operands import Pager as Operands
from flashcore.contract.operands import PagerBatch, PagerMemory
from flashcore.contract.scratch import SCAN_THREADS
from flashcore.contract.scratch import PagerRanges as Ranges
from flashcore.contract.scratch import PagerTiles as Tiles
from flashcore.sm90.compile.fake import compiled, matrix, table, vector
from flashcore.sm90.compile.layout import layout_tensors
from flashcore.sm90.config.pager import PagerConfig, illegal_reason


def compile_pager(config: PagerConfig, options: str = "") -> Any:
    """Compile the pager for `config`; the result exports with `export_to_c` and is called with
    `contract.operands.Pager`, one by one, on the caller's current stream. ValueError where `config`
    cannot run."""
    reason = illegal_reason(config)
    if reason is not None:
        raise ValueError(reason)

    from cutlass import Int32

    from flashcore.sm90.kernels.pager import Pager

    operands = Operands(
        **_batch(config)._asdict(),
        layout=layout_tensors(),
        scratch=_scratch(),
        page_tokens=Int32(1),
        num_pages=Int32(1),
        num_sms=Int32(1),
    )
    return compiled(Pager(config), *operands, options=options)


def _batch(config: PagerConfig) -> PagerBatch:
    import cutlass.cute as cute
    from cutlass import Int32, Uint8

    batch = cute.sym_int()
    page_table = matrix(Int32, batch, cute.sym_int(), 4)
    element = {"none": None, "bytes": Uint8, "words": Int32}[config.bitmap]
    return PagerBatch(
        pages=vector(Int32, cute.sym_int()) if config.tokens else page_table,
        begins=vector(Int32, batch) if config.tokens else None,
        ends=vector(Int32, batch),
        resident=None if element is None else vector(element, cute.sym_int()),
    )


def _scratch() -> PagerMemory:
    import cutlass.cute as cute
    from cutlass import Int32, Int64

    tokens, batch = cute.sym_int(), cute.sym_int()
    return PagerMemory(
        changes=vector(Int32, tokens),
        pieces=vector(Int32, tokens),
        ranges=matrix(Int32, Ranges.LINES, batch, 4),
        slots=vector(Int64, cute.sym_int()),
        tiles=table(Int64, Tiles.LINES, SCAN_THREADS, 8),
    )
