"""What a server can ask of its plans, and the memory that plans for it take.

    server's limits ─► Limits ─► Room of each kind of layer ─► bytes, within the budget or refused

All of it is taken when the server starts: nothing is allocated while it serves.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from flashcore import validate
from flashcore.planner import chunks
from flashcore.planner.device_plan import (
    Capacities,
    most_queries,
    planned_bytes,
    workspace_elements,
)
from flashcore.problem import Problem
from flashcore.serving.shapes import Limits, Model, NotServed, Options, Shape
from flashcore.sm90.config.paged import PAGE_TOKENS
from flashcore.sm90.config.planner import ROW_CAPACITIES
from flashcore.sm90.planner_scratch import PlannerScratch

BUDGET = 32
"""Plans may take one part in so many of the GPU's memory."""

ENVIRONMENT = "FLASHCORE_PLAN_MIB"
"""Environment variable with another budget, in MiB."""

_MOST_ENTRIES = validate.INT32_MAX // 8
_MOST_SEQUENCES = ROW_CAPACITIES[-1]


@dataclass(frozen=True)
class Room:
    """What the plans of one kind of layer have room for. entries: pages of all sequences. chunks:
    plans are batch-invariant."""

    batch: int
    entries: int
    queries: int
    chunks: bool = False

    def holds(self, batch: int, entries: int, queries: int) -> bool:
        """Whether a forward fits."""
        return batch <= self.batch and entries <= self.entries and queries <= self.queries


def width(limits: Limits, page_tokens: int, window: int, queries: int) -> int:
    """Pages that a sequence can have: with a window, of its last tokens alone."""
    pages = -(-limits.tokens // page_tokens)
    if window < 0:
        return pages
    return min(pages, -(-(window + queries) // page_tokens) + alignment(limits, page_tokens))


def alignment(limits: Limits, page_tokens: int) -> int:
    """Pages of which a windowed table leaves out a multiple: chunks count from the beginning of a
    sequence, whatever a window leaves of it."""
    return chunks.lengths(page_tokens)[0] if limits.batch_invariant else 1


def windowed_entries(
    page_tokens: int, window: int, batch: int, queries: int, align: int = 1
) -> int:
    """Pages of all sequences that a window leaves: each has its window before its new tokens, and
    up to a page more on either side. align: as `alignment` has it."""
    entries = (queries + batch * (window + 2 * page_tokens - 2)) // page_tokens
    return entries + batch * (align - 1)


def room_of(limits: Limits, page_tokens: int, window: int) -> Room:
    """Room for every forward: all sequences of full length, or by tokens where a window cuts."""
    entries = limits.batch * width(limits, page_tokens, -1, 0)
    if window >= 0:
        align = alignment(limits, page_tokens)
        kept = windowed_entries(page_tokens, window, limits.batch, limits.queries, align)
        entries = min(entries, kept)
    return Room(limits.batch, entries, limits.queries, limits.batch_invariant)


def capacities(room: Room, shape: Shape, workspace: int) -> Capacities:
    """Of a planner for decode, verify and prefill. workspace: its fp32 elements.

    Pages that requests share lie before all that they do not share, so the sets of sequences that
    use one page form a tree: it has fewer than two groups for each sequence, and few segments. A
    batch whose tree is deeper than 64 on average is planned without sharing. Batch-invariant plans
    may have work items for each of their partial results; where those outgrow the workspace, runs
    are not cut.
    """
    segments = min(room.entries, 64 * room.batch + 1024)
    groups = min(room.entries, 4 * room.batch + 1024)
    gathered = segments + 8 * room.queries
    partials = workspace // workspace_elements(1, shape.num_q_heads, shape.v_head_dim)
    items = groups + -(-gathered * (shape.num_q_heads // shape.num_kv_heads) // 64)
    if room.chunks:
        items += partials
    return Capacities(
        max_batch=room.batch,
        max_entries=room.entries,
        max_q=room.queries,
        max_gathered=gathered,
        max_partials=partials,
        max_items=shape.num_kv_heads * items + 4096,
        max_segments=segments,
    )


@dataclass(frozen=True)
class Kind:
    """One kind of layer: its shape, its window (-1: none) and the slots of its pool. in_place:
    plans are made from the engine's own page tables."""

    shape: Shape
    window: int
    slots: int
    in_place: bool = False

    def problem(self, model: Model) -> Problem:
        """Of its attention calls."""
        shape = self.shape
        return Problem(
            *(shape.num_q_heads, shape.num_kv_heads, shape.head_dim, shape.v_head_dim),
            *(model.page_tokens, model.cache_dtype.itemsize),
        )


def table_elements(limits: Limits, page_tokens: int, window: int, in_place: bool = False) -> int:
    """Of the page tables of eager forwards."""
    if in_place:
        return 0
    return limits.batch * width(limits, page_tokens, window, limits.queries)


def scratch_sizes(limits: Limits, page_tokens: int, kinds: list[Kind]) -> tuple[int, ...]:
    """Arguments of the `PlannerScratch` that plans of all kinds share."""
    sizes = []
    for kind in kinds:
        room = room_of(limits, page_tokens, kind.window)
        c = capacities(room, kind.shape, 0)
        sizes.append((c.max_batch, c.max_entries, c.max_segments, kind.slots // page_tokens))
    return tuple(map(max, zip(*sizes, strict=True)))


def bytes_of(
    limits: Limits, page_tokens: int, draft_tokens: int, kinds: list[Kind], workspace: int
) -> int:
    """Everything that plans take on the GPU, of `workspace` fp32 elements and with graphs."""
    total = 4 * workspace
    batch, entries, segments, pages = scratch_sizes(limits, page_tokens, kinds)
    total += PlannerScratch.bytes_of(batch, entries, segments, pages, limits.batch_invariant)
    return total + sum(
        kind_bytes(limits, page_tokens, draft_tokens, kind, workspace) for kind in kinds
    )


def kind_bytes(
    limits: Limits, page_tokens: int, draft_tokens: int, kind: Kind, workspace: int
) -> int:
    """What one kind of layer takes by itself: plan and tables, without what kinds share."""
    room = room_of(limits, page_tokens, kind.window)
    columns = width(limits, page_tokens, kind.window, max(1, draft_tokens))
    tables = table_elements(limits, page_tokens, kind.window, kind.in_place)
    planned = planned_bytes(capacities(room, kind.shape, workspace))
    return planned + 4 * (tables + limits.graph_batch * columns)


def budget(device: torch.device) -> float:
    """Bytes that plans may take on a device; no limit where it is no GPU."""
    told = os.environ.get(ENVIRONMENT)
    if told is not None:
        if not told.isdecimal() or not int(told):
            raise ValueError(f"{ENVIRONMENT} must be a number of MiB, got {told!r}")
        return int(told) * 2**20
    if device.type != "cuda":
        return math.inf
    return torch.cuda.get_device_properties(device).total_memory / BUDGET


def check(model: Model, limits: Limits, kinds: list[Kind], workspace: int, options: Options) -> int:
    """The bytes that plans take; NotServed where they exceed the budget or what kernels count."""
    if limits.batch > _MOST_SEQUENCES:
        raise NotServed(
            f"{limits.batch} sequences at once (at most {_MOST_SEQUENCES})",
            f"use {options.batch} {_MOST_SEQUENCES} or fewer",
        )
    if limits.queries > most_queries(limits.batch):
        raise NotServed(
            f"{limits.queries} new tokens at once (at most {most_queries(limits.batch)})",
            f"use {options.queries} 8192",
        )
    most = budget(model.device)

    def taken(limits: Limits, page_tokens: int = model.page_tokens) -> int:
        return bytes_of(limits, page_tokens, model.draft_tokens, kinds, workspace)

    def fits(limits: Limits, page_tokens: int = model.page_tokens) -> bool:
        return _counted(limits, page_tokens, kinds) and taken(limits, page_tokens) <= most

    if fits(limits):
        return taken(limits)
    ways = _ways_out(model, limits, fits, options)
    if _counted(limits, model.page_tokens, kinds):
        ways.append(f"set {ENVIRONMENT}={math.ceil(taken(limits) / 2**20)}")
    room = f" (at most {most / 2**20:.0f})" if most < math.inf else ""
    raise NotServed(
        f"{limits.batch} sequences of {limits.tokens} tokens in pages of {model.page_tokens}, "
        f"whose plans would take {taken(limits) / 2**20:.0f} MiB{room}",
        "use " + " or ".join(ways or [options.elsewhere]),
    )


def _counted(limits: Limits, page_tokens: int, kinds: list[Kind]) -> bool:
    """Whether all numbers are within what the planner's kernels count."""
    return all(
        room_of(limits, page_tokens, kind.window).entries <= _MOST_ENTRIES
        and table_elements(limits, page_tokens, kind.window) <= validate.INT32_MAX
        for kind in kinds
    )


def _ways_out(
    model: Model, limits: Limits, fits: Callable[..., bool], options: Options
) -> list[str]:
    """One option each that makes the plans fit, where there is one."""
    ways = []
    for page_tokens in sorted(PAGE_TOKENS):
        if page_tokens > model.page_tokens and fits(limits, page_tokens):
            ways.append(f"{options.page_tokens} {page_tokens}")
            break
    requests = _largest(limits.batch, lambda n: fits(_of_batch(limits, n)))
    requests -= requests % math.lcm(limits.step, 64 if requests >= 64 else 1)
    if requests:
        ways.append(f"{options.batch} {requests}")
    tokens = _largest(limits.tokens, lambda n: fits(replace(limits, tokens=n)))
    if tokens > 1024:
        ways.append(f"{options.tokens} {tokens - tokens % 1024}")
    return ways


def _of_batch(limits: Limits, batch: int) -> Limits:
    return replace(limits, batch=batch, graph_batch=min(limits.graph_batch, batch))


def _largest(most: int, fits: Callable[[int], bool]) -> int:
    """The largest number up to `most` that fits, where smaller ones fit too; 0 if none does."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
