"""What a server can ask of its plans, and the memory that plans for it take.

    server's limits ─► Limits ─► Room of each kind of layer ─► bytes, within the budget or refused

All of it is taken when the server starts: nothing is allocated while it serves.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from flashcore import validate
from flashcore.config.paged import PAGE_TOKENS
from flashcore.config.planner import ROW_CAPACITIES
from flashcore.planner.device_plan import (
    Capacities,
    most_queries,
    planned_bytes,
    workspace_elements,
)
from flashcore.planner.scratch import PlannerScratch
from flashcore.sglang.support import Model, NotServed, Shape, parallel_ranks

BUDGET = 32
"""Plans may take one part in so many of the GPU's memory."""

ENVIRONMENT = "FLASHCORE_PLAN_MIB"
"""Environment variable with another budget, in MiB."""

_MOST_ENTRIES = validate.INT32_MAX // 8
_MOST_SEQUENCES = ROW_CAPACITIES[-1]


@dataclass(frozen=True)
class Limits:
    """The most that a forward of this server can have.

    batch: sequences, padding included. tokens: of one sequence. queries: new tokens of all
    sequences. graph_batch: sequences of a captured graph. step: what batches are padded to a
    multiple of.
    """

    batch: int
    tokens: int
    queries: int
    graph_batch: int
    step: int = 2

    @staticmethod
    def of(runner: Any, model: Model) -> Limits:
        """As SGLang's scheduler and runners bound them.

        Sequences: one for each row of the request pool. Data parallelism and two-batch overlap pad
        graphs to a multiple of twice the ranks that share attention, and eager batches to less.
        """
        tokens = int(runner.req_to_token_pool.req_to_token.shape[1])
        step = padding_step(runner)
        batch = _padded(int(runner.req_to_token_pool.size) * _rows_of_request(runner), step)
        config = getattr(runner.server_args, "cuda_graph_config", None)
        graphs = getattr(getattr(config, "decode", None), "bs", None) or [batch]
        return Limits(
            batch=batch,
            tokens=tokens,
            queries=_padded(_prefill_tokens(runner, tokens), step)
            + batch * max(1, model.draft_tokens),
            graph_batch=min(batch, max(graphs)),
            step=step,
        )


def padding_step(runner: Any) -> int:
    """Of what SGLang may pad batches of sequences, and new tokens, to a multiple."""
    return 2 * max(1, int(parallel_ranks(runner).attn_tp_size))


def _padded(count: int, step: int) -> int:
    return -(-count // step) * step


def _rows_of_request(runner: Any) -> int:
    """A draft worker that drafts by trees from the target's cache has a row for each branch."""
    frozen = getattr(getattr(runner, "spec_algorithm", None), "is_frozen_kv_mtp", None)
    if not runner.is_draft_worker or frozen is None or not frozen():
        return 1
    return max(1, int(_setting(runner, "speculative_eagle_topk", "get_spec") or 1))


def _prefill_tokens(runner: Any, tokens: int) -> int:
    """New tokens of a prefill: a chunk, or where prompts are not cut the first prompt whatever its
    length, or shorter ones up to max_prefill_tokens. Decode steps mixed in are not counted.

    With dynamic chunks (pipeline parallelism) a chunk may grow; prefill graphs have sizes of their
    own.
    """
    chunk = int(_setting(runner, "chunked_prefill_size") or 0)
    most = int(_setting(runner, "max_prefill_tokens") or 0)
    if chunk <= 0:
        chunk = max(most, tokens)
    elif _setting(runner, "enable_dynamic_chunking"):
        chunk = max(most, math.ceil(1.25 * chunk))
    config = getattr(runner.server_args, "cuda_graph_config", None)
    graphs = getattr(getattr(config, "prefill", None), "bs", None) or [0]
    return max(chunk, *map(int, graphs))


def _setting(runner: Any, name: str, context: str = "get_schedule") -> Any:
    """A setting of the server as it was resolved: in a context since SGLang 0.5.23."""
    from sglang.srt import runtime_context

    get = getattr(runtime_context, context, None)
    bag = None if get is None else get()
    found = getattr(bag, name, None)
    return getattr(runner.server_args, name, None) if found is None else found


@dataclass(frozen=True)
class Room:
    """What the plans of one kind of layer have room for. entries: pages of all sequences."""

    batch: int
    entries: int
    queries: int

    def holds(self, batch: int, entries: int, queries: int) -> bool:
        """Whether a forward fits."""
        return batch <= self.batch and entries <= self.entries and queries <= self.queries


def width(limits: Limits, page_tokens: int, window: int, queries: int) -> int:
    """Pages that a sequence can have: with a window, of its last tokens alone."""
    pages = -(-limits.tokens // page_tokens)
    if window < 0:
        return pages
    return min(pages, -(-(window + queries) // page_tokens) + 1)


def windowed_entries(page_tokens: int, window: int, batch: int, queries: int) -> int:
    """Pages of all sequences that a window leaves: each has its window before its new tokens, and
    up to a page more on either side."""
    return (queries + batch * (window + 2 * page_tokens - 2)) // page_tokens


def room_of(limits: Limits, page_tokens: int, window: int) -> Room:
    """Room for every forward: all sequences of full length, or by tokens where a window cuts."""
    entries = limits.batch * width(limits, page_tokens, -1, 0)
    if window >= 0:
        kept = windowed_entries(page_tokens, window, limits.batch, limits.queries)
        entries = min(entries, kept)
    return Room(limits.batch, entries, limits.queries)


def capacities(room: Room, shape: Shape, workspace: int) -> Capacities:
    """Of a planner for decode, verify and prefill. workspace: its fp32 elements.

    Pages that requests share lie before all that they do not share, so the sets of sequences that
    use one page form a tree: it has fewer than two groups for each sequence, and few segments. A
    batch whose tree is deeper than 64 on average is planned without sharing.
    """
    segments = min(room.entries, 64 * room.batch + 1024)
    groups = min(room.entries, 4 * room.batch + 1024)
    gathered = segments + 8 * room.queries
    items = groups + -(-gathered * (shape.num_q_heads // shape.num_kv_heads) // 64)
    return Capacities(
        max_batch=room.batch,
        max_entries=room.entries,
        max_q=room.queries,
        max_gathered=gathered,
        max_partials=workspace // workspace_elements(1, shape.num_q_heads, shape.v_head_dim),
        max_items=shape.num_kv_heads * items + 4096,
        max_segments=segments,
    )


@dataclass(frozen=True)
class Kind:
    """One kind of layer: its shape, its window (-1: none) and the slots of its pool."""

    shape: Shape
    window: int
    slots: int


def table_elements(limits: Limits, page_tokens: int, window: int) -> int:
    """Of the page tables of eager forwards."""
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
    total += PlannerScratch.bytes_of(batch, entries, segments, pages)
    for kind in kinds:
        room = room_of(limits, page_tokens, kind.window)
        total += planned_bytes(capacities(room, kind.shape, workspace))
        columns = width(limits, page_tokens, kind.window, max(1, draft_tokens))
        tables = table_elements(limits, page_tokens, kind.window)
        total += 4 * (tables + limits.graph_batch * columns)
    return total


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


def check(model: Model, limits: Limits, kinds: list[Kind], workspace: int) -> int:
    """The bytes that plans take; NotServed where they exceed the budget or what kernels count."""
    if limits.batch > _MOST_SEQUENCES:
        raise NotServed(
            f"{limits.batch} sequences at once (at most {_MOST_SEQUENCES})",
            f"use --max-running-requests {_MOST_SEQUENCES} or fewer",
        )
    if limits.queries > most_queries(limits.batch):
        raise NotServed(
            f"{limits.queries} new tokens at once (at most {most_queries(limits.batch)})",
            "use --chunked-prefill-size 8192",
        )
    most = budget(model.device)

    def taken(limits: Limits, page_tokens: int = model.page_tokens) -> int:
        return bytes_of(limits, page_tokens, model.draft_tokens, kinds, workspace)

    def fits(limits: Limits, page_tokens: int = model.page_tokens) -> bool:
        return _counted(limits, page_tokens, kinds) and taken(limits, page_tokens) <= most

    if fits(limits):
        return taken(limits)
    ways = _ways_out(model, limits, fits)
    if _counted(limits, model.page_tokens, kinds):
        ways.append(f"set {ENVIRONMENT}={math.ceil(taken(limits) / 2**20)}")
    room = f" (at most {most / 2**20:.0f})" if most < math.inf else ""
    raise NotServed(
        f"{limits.batch} sequences of {limits.tokens} tokens in pages of {model.page_tokens}, "
        f"whose plans would take {taken(limits) / 2**20:.0f} MiB{room}",
        "use " + " or ".join(ways or ["--attention-backend fa3"]),
    )


def _counted(limits: Limits, page_tokens: int, kinds: list[Kind]) -> bool:
    """Whether all numbers are within what the planner's kernels count."""
    return all(
        room_of(limits, page_tokens, kind.window).entries <= _MOST_ENTRIES
        and table_elements(limits, page_tokens, kind.window) <= validate.INT32_MAX
        for kind in kinds
    )


def _ways_out(model: Model, limits: Limits, fits: Callable[..., bool]) -> list[str]:
    """One option each that makes the plans fit, where there is one."""
    ways = []
    for page_tokens in sorted(PAGE_TOKENS):
        if page_tokens > model.page_tokens and fits(limits, page_tokens):
            ways.append(f"--page-size {page_tokens}")
            break
    requests = _largest(limits.batch, lambda n: fits(_of_batch(limits, n)))
    requests -= requests % math.lcm(limits.step, 64 if requests >= 64 else 1)
    if requests:
        ways.append(f"--max-running-requests {requests}")
    tokens = _largest(limits.tokens, lambda n: fits(replace(limits, tokens=n)))
    if tokens > 1024:
        ways.append(f"--context-length {tokens - tokens % 1024}")
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
