"""One kind of layer (full attention, or a sliding window) in one forward: its tables and plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from flashcore.planner.folding import Fold
from flashcore.sglang import page_tables, planners
from flashcore.sglang.page_tables import PageTables, Slots
from flashcore.sglang.planners import KernelPlanner, Planner, TorchPlanner
from flashcore.sglang.support import Model, NotServed, Shape


@dataclass(frozen=True)
class Need:
    """What a forward asks of its planners. tokens: of all sequences together, if the host knows
    them; else None."""

    batch: int
    queries: int
    tokens: int | None


class View:
    """Page tables and plans of one kind of layer.

    Decode and verify have one planner, whose buffers every captured graph uses; prefill has
    planners of its own, made when first needed and larger when a batch outgrows them.
    """

    def __init__(
        self,
        model: Model,
        shape: Shape,
        *,
        window: int,
        num_pages: int,
        max_batch: int,
        max_tokens: int,
        workspace: torch.Tensor | None,
        translation: torch.Tensor | None = None,
    ):
        """window: -1 for full attention. num_pages: of this kind's pool. max_batch: requests that
        run at most. max_tokens: columns of req_to_token. translation: to this kind's pool."""
        self.model, self.shape, self.window = model, shape, window
        self.num_pages, self.max_batch = num_pages, max_batch
        self.max_pages = -(-max_tokens // model.page_tokens)
        self.translation, self._workspace = translation, workspace
        self._static: PageTables | None = None
        self._prefill: dict[tuple[int, Fold], Planner] = {}
        self.decode = self._planner(
            planners.decode_tile(),
            True,
            max_batch,
            self.decode_entries,
            max_batch * max(1, model.draft_tokens),
        )
        self.planner: Planner = self.decode
        self.tables = PageTables.empty(0, 0, model.device)
        self.plan: Any = None

    def allocate_graph_tables(self, max_batch: int) -> None:
        """Tables that captured graphs read, for batches up to `max_batch`."""
        width = self._width(max(1, self.model.draft_tokens))
        self._static = PageTables.empty(max_batch, width, self.model.device)

    @property
    def bytes(self) -> int:
        """Memory that is kept: tables of graphs and planners, the shared workspace not counted."""
        tables = 0 if self._static is None else 4 * self._static.pages.numel()
        return tables + sum(p.bytes for p in (self.decode, *self._prefill.values()))

    def take(self, slots: Slots, need: Need, *, decode: bool, graph: bool) -> None:
        """Read the batch's slots into tables. graph: into those of captured graphs."""
        self.planner = self._choose(need, decode)
        if graph:
            if self._static is None:
                raise RuntimeError("init_cuda_graph_state was not called before a graph's forward")
            self.tables = self._static.rows(need.batch)
        else:
            width = self._width(need.queries if not decode else max(1, self.model.draft_tokens))
            self.tables = PageTables.empty(need.batch, width, self.model.device)
        page_tables.fill(self.tables, slots, self.model.page_tokens, self.window, self.translation)

    def make_plan(self) -> None:
        """Plan the batch taken last."""
        self.plan = self.planner.plan(self.tables)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **rules: Any) -> None:
        """q [tokens, heads, dim] against pools [slots, heads, dim], that of v with its own dim."""
        pages = (-1, self.model.page_tokens, self.shape.num_kv_heads)
        k, v = k.view(*pages, self.shape.head_dim), v.view(*pages, self.shape.v_head_dim)
        self.planner.attend(self.plan, q, k, v, **rules)

    def _width(self, queries: int) -> int:
        """Columns that a sequence can fill: with a window, of its last tokens alone."""
        if self.window < 0:
            return self.max_pages
        return min(self.max_pages, -(-(self.window + queries) // self.model.page_tokens) + 1)

    @property
    def decode_entries(self) -> int:
        """Pages of a decode batch: all that can be, up to a limit that grows with the pool."""
        most = self.max_batch * self._width(max(1, self.model.draft_tokens))
        return min(most, max(planners.PLAN_ENTRIES, 4 * self.num_pages))

    def _choose(self, need: Need, decode: bool) -> Planner:
        entries = 0
        if need.tokens is not None and self.window < 0:
            entries = need.tokens // self.model.page_tokens + need.batch
        if decode:
            if not self.decode.holds(need.batch, entries, need.queries):
                raise NotServed(
                    f"a decode batch of {need.batch} sequences on {entries} pages with "
                    f"{need.queries} new tokens",
                    "lower --max-running-requests or raise --page-size",
                )
            return self.decode
        tile = planners.prefill_tile(need.queries, max(need.batch, 1), self.shape)
        kind = tile, planners.prefill_fold(need.queries, tile)
        found = self._prefill.get(kind)
        if need.tokens is None or self.window >= 0:
            entries = need.batch * self._width(need.queries)
        if found is None or not found.holds(need.batch, entries, need.queries):
            # Room for twice as much: batches that grow step by step make few planners.
            found = self._prefill[kind] = self._planner(
                *kind,
                max(2 * need.batch, 64),
                max(2 * entries, 1 << 14),
                max(2 * need.queries, 1 << 13),
            )
        return found

    def _planner(
        self, tile_m: int, fold: Fold, max_batch: int, max_entries: int, max_q: int
    ) -> Planner:
        if self._workspace is None:
            return TorchPlanner(self.shape, self.model.page_tokens, tile_m, fold)
        return KernelPlanner(
            self.shape,
            self.model.page_tokens,
            tile_m,
            fold,
            max_batch=max_batch,
            max_entries=max_entries,
            max_q=max_q,
            num_pages=self.num_pages,
            itemsize=self.model.dtype.itemsize,
            workspace=self._workspace,
        )
