"""One kind of layer (full attention, or a sliding window) in one forward: its tables and plan."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from flashcore.planner.folding import Fold
from flashcore.serving import capacity, page_tables, planners
from flashcore.serving.capacity import Room
from flashcore.serving.page_tables import PageTables, Slots
from flashcore.serving.planners import KernelPlanner, Memory, Planner, TorchPlanner
from flashcore.serving.shapes import Limits, Model, NotServed, Shape

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Need:
    """What a forward asks of its planners. tokens: of all sequences together, if the host knows
    them; else None."""

    batch: int
    queries: int
    tokens: int | None


class View:
    """Page tables and plans of one kind of layer, for every forward within a server's limits.

    One set of tensors holds the plan of whatever forward is the latest: decode and verify, whose
    graphs have their addresses, and every kind of prefill.
    """

    def __init__(
        self,
        model: Model,
        shape: Shape,
        *,
        window: int,
        num_pages: int,
        limits: Limits,
        memory: Memory,
        translation: torch.Tensor | None = None,
        in_place: bool = False,
    ):
        """window: -1 for full attention. num_pages: of this kind's pool. translation: to this
        kind's pool. in_place: plans are made from the engine's tables (`take_tables`) alone."""
        self.model, self.shape, self.window, self.in_place = model, shape, window, in_place
        self.num_pages, self.limits, self._memory = num_pages, limits, memory
        self.translation = translation
        self._align = capacity.alignment(limits, model.page_tokens)
        self.room = capacity.room_of(limits, model.page_tokens, window)
        self._static: PageTables | None = None
        self._static_rows: dict[int, PageTables] = {}  # of them, by batch
        self._eager = self._tables(limits)
        made = self._make(self.room, memory)
        self.decode = self._decode_planner(made)
        self._eager_decode = self.decode  # another one if forwards outgrow the room
        self._prefill = self._prefill_planners(made)
        self.planner: Planner = self.decode
        self.seen = self._all_seen()
        self.tables = self._eager.shaped(0, 0)
        self.plan: Any = None

    def allocate_graph_tables(self, max_batch: int) -> None:
        """Tables that captured graphs read, for batches up to `max_batch`. Eager forwards have
        others: SGLang may fill these on a stream of their own, while such a forward still runs."""
        columns = self._width(self.limits, max(1, self.model.draft_tokens))
        self._static = PageTables.empty(max_batch, columns, self.model.device)
        self._static_rows = {}

    def _all_seen(self) -> list[tuple[str, Sequence[int]]]:
        """What each planner, by what it plans, has seen of faults."""
        name = "verify" if self.model.draft_tokens else "decode"
        decode = dict.fromkeys([self.decode, self._eager_decode])
        return [
            *((name, planner.seen) for planner in decode),
            *(("prefill", planner.seen) for planner in self._prefill.values()),
        ]

    def take(self, slots: Slots, need: Need, *, decode: bool, graph: bool) -> None:
        """Read the batch's slots into tables. graph: into those of captured graphs."""
        if graph:
            self.planner, self.tables = self.decode, self._rows(need)
        else:
            self.planner = self._choose(need, decode)
            queries = max(1, self.model.draft_tokens) if decode else need.queries
            self.tables = self._eager.shaped(need.batch, self._width(self.limits, queries))
        page_tables.fill(
            self.tables,
            slots,
            self.model.page_tokens,
            self.window,
            self.translation,
            self._align,
        )

    def take_tables(self, tables: PageTables, need: Need, *, decode: bool) -> None:
        """Take the tables that the engine keeps, to be read where they are."""
        self.planner, self.tables = self._choose(need, decode), tables

    def make_plan(self) -> None:
        """Plan the batch taken last."""
        self.plan = self.planner.plan(self.tables)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **rules: Any) -> None:
        """q [tokens, heads, dim] against pools [slots, heads, dim], that of v with its own dim, or
        [pages, tokens, heads, dim]."""
        self.planner.attend(self.plan, q, *self.pages(k, v), **rules)

    def pages(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Pools as pages [pages, tokens, heads, dim]."""
        if k.ndim == 4:
            return k, v
        shape = (-1, self.model.page_tokens, self.shape.num_kv_heads)
        return k.view(*shape, self.shape.head_dim), v.view(*shape, self.shape.v_head_dim)

    def _rows(self, need: Need) -> PageTables:
        """The graphs' tables of a batch. What does not fit is refused as its graph is captured."""
        found = self._static_rows.get(need.batch)
        if found is None:
            if self._static is None:
                raise RuntimeError("init_cuda_graph_state was not called before a graph's forward")
            if not self.decode.room.holds(need.batch, self._entries(need), need.queries):
                raise NotServed(
                    f"CUDA graphs of {need.batch} sequences with {need.queries} new tokens",
                    f"use --cuda-graph-max-bs {self.limits.batch}",
                )
            found = self._static_rows[need.batch] = self._static.rows(need.batch)
        return found

    def _width(self, limits: Limits, queries: int) -> int:
        """Columns that a sequence can fill."""
        return capacity.width(limits, self.model.page_tokens, self.window, queries)

    def _entries(self, need: Need) -> int:
        """Pages of all sequences, at most."""
        pages, most = self.model.page_tokens, need.batch * self._width(self.limits, need.queries)
        if self.window >= 0:
            kept = capacity.windowed_entries(
                pages, self.window, need.batch, need.queries, self._align
            )
            return min(most, kept)
        return most if need.tokens is None else min(most, need.tokens // pages + need.batch)

    def _choose(self, need: Need, decode: bool) -> Planner:
        planner, entries = self._planner_for(need, decode), self._entries(need)
        if planner.room.holds(need.batch, entries, need.queries):
            return planner
        self._grow(need, entries)
        return self._planner_for(need, decode)

    def _planner_for(self, need: Need, decode: bool) -> Planner:
        if decode:
            return self._eager_decode
        tile = planners.prefill_tile(
            need.queries, max(need.batch, 1), self.shape, self.limits.batch_invariant
        )
        workspace = self._memory.workspace
        room = None if workspace is None else workspace.numel()
        return self._prefill[tile, planners.prefill_fold(need.queries, self.shape, room)]

    def _grow(self, need: Need, entries: int) -> None:
        """Room for a forward beyond all that the server was taken to be able to ask. Graphs keep
        what they have captured."""
        room, limits = self.room, self.limits
        batch, entries, queries = (
            most if wanted <= most else 2 * wanted
            for most, wanted in (
                (room.batch, need.batch),
                (room.entries, entries),
                (room.queries, need.queries),
            )
        )
        self.room = Room(batch, entries, queries, room.chunks)
        self.limits = replace(limits, batch=self.room.batch, queries=self.room.queries)
        logger.warning(
            "flashcore attention: %d sequences with %d new tokens are more than was planned for "
            "(%d and %d): buffers are allocated anew",
            *(need.batch, need.queries, room.batch, room.queries),
        )
        self._eager = self._tables(self.limits)
        made = self._make(self.room, replace(self._memory, scratch=None))
        self._eager_decode = self._decode_planner(made)
        self._prefill = self._prefill_planners(made)
        self.seen = [*self.seen, *self._all_seen()[1:]]  # what the old ones saw is not lost

    def _tables(self, limits: Limits) -> page_tables.Buffer:
        elements = capacity.table_elements(
            limits, self.model.page_tokens, self.window, self.in_place
        )
        return page_tables.Buffer(elements, limits.batch, self.model.device)

    def _make(self, room: Room, memory: Memory) -> Planner:
        if memory.workspace is None:
            tile = planners.decode_tile()
            return TorchPlanner(
                self.shape,
                self.model.page_tokens,
                tile,
                True,
                room,
                self.limits.batch_invariant,
                self.model.cache_dtype.itemsize,
            )
        return KernelPlanner.of(
            self.model,
            self.shape,
            room,
            self.num_pages,
            memory,
            expand=self.model.fp8 and self.window < 0,  # a window would not be known to the device
        )

    def _decode_planner(self, made: Planner) -> Planner:
        queries = made.room.batch * max(1, self.model.draft_tokens)
        return made.variant(planners.decode_tile(), True, min(queries, made.room.queries))

    def _prefill_planners(self, made: Planner) -> dict[tuple[int, Fold], Planner]:
        kinds = planners.prefill_kinds(self.shape, self.limits.batch_invariant)
        tallest = max(tile for tile, _ in kinds)
        return {
            (tile, fold): made.variant(tile, fold, made.room.queries, expand=tile == tallest)
            for tile, fold in kinds
        }
