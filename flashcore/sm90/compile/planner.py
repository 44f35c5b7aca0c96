"""Compile function of the planner's kernels: config in, compiled function out, no tensors."""

from __future__ import annotations

from typing import Any

from flashcore.contract.counts import Count, Stat
from flashcore.contract.operands import Planner as Operands
from flashcore.contract.operands import (
    PlannerMemory,
    PlannerProblem,
    PlannerResult,
    PlannerSource,
)
from flashcore.contract.scratch import Slots
from flashcore.contract.work import FIELDS
from flashcore.sm90.compile.fake import compiled, matrix, table, vector
from flashcore.sm90.compile.layout import layout_tensors
from flashcore.sm90.config.planner import PlannerConfig, illegal_reason


def compile_planner(config: PlannerConfig, options: str = "") -> Any:
    """Compile the planner for `config`; the result exports with `export_to_c` and is called with
    `contract.operands.Planner`, one by one, on the caller's current stream. ValueError where
    `config` cannot run."""
    reason = illegal_reason(config)
    if reason is not None:
        raise ValueError(reason)

    import cutlass.cute as cute
    from cutlass import Int32, Int64

    from flashcore.sm90.kernels.planner.kernel import Planner
    from flashcore.sm90.kernels.planner.small import SmallPlanner

    batch = cute.sym_int()
    from_layout = config.from_layout
    numbers: dict[str, Any] = {name: Int32(1) for name in PlannerProblem._fields}
    numbers["seen"] = Int64(1)  # an address
    operands = Operands(
        page_table=None if from_layout else matrix(Int32, batch, cute.sym_int(), 4),
        seq_lens=None if from_layout else vector(Int32, batch),
        q_lens=vector(Int32, batch),
        source=_source() if from_layout else None,
        plan=_plan(),
        scratch=_scratch(config),
        problem=PlannerProblem(**numbers),
        num_sms=Int32(1),
    )
    planner = SmallPlanner(config) if config.small else Planner(config)
    return compiled(planner, *operands, options=options)


def _source() -> PlannerSource:
    layout = layout_tensors()._asdict()
    return PlannerSource(**{name: layout[name] for name in PlannerSource._fields})


def _plan() -> PlannerResult:
    import cutlass.cute as cute
    from cutlass import Int32, Int64

    entries, segments = cute.sym_int(), cute.sym_int()
    gathered, items = cute.sym_int(), cute.sym_int()
    return PlannerResult(
        counts=vector(Int32, int(Count.SIZE)),
        stats=vector(Int64, int(Stat.SIZE)),
        bad=vector(Int32, cute.sym_int()),
        row_offsets=vector(Int32, cute.sym_int()),
        kv_lens=vector(Int32, cute.sym_int()),
        q_offsets=vector(Int32, cute.sym_int()),
        cols=vector(Int32, entries),
        token_counts=vector(Int32, entries),
        groups=table(Int32, segments, FIELDS),
        member_offsets=vector(Int32, cute.sym_int()),
        member_rows=vector(Int32, segments),
        member_starts=vector(Int32, segments),
        decisions=table(Int32, segments, 4),
        q_tokens=vector(Int32, gathered),
        q_positions=vector(Int32, gathered),
        q_index=vector(Int32, cute.sym_int()),
        work=table(Int32, items, FIELDS),
        merge_offsets=vector(Int32, cute.sym_int()),
        merge_partials=vector(Int32, cute.sym_int()),
    )


def _scratch(config: PlannerConfig) -> PlannerMemory:
    import cutlass.cute as cute
    from cutlass import Int32, Int64

    from flashcore.contract import scratch as lines

    segments = cute.sym_int()
    of_entries = lines.Entries.LINES_OF_CHUNKS if config.chunks else lines.Entries.LINES
    return PlannerMemory(
        slots=table(Int32, cute.sym_int(), Slots.LINES),
        entries=matrix(Int32, of_entries, cute.sym_int(), 16),
        segments=matrix(Int32, lines.Segments.LINES, segments, 16),
        found=matrix(Int32, lines.Groups.LINES, segments, 16),
        rows=matrix(Int32, lines.Rows.LINES, cute.sym_int(), 16),
        members=matrix(Int32, lines.Sort.LINES, segments, 16),
        classes=matrix(Int32, lines.Sort.LINES_OF_CLASSES, cute.sym_int(), 16),
        tiles=table(Int64, lines.Tiles.LINES, lines.SCAN_THREADS, 8),
    )
