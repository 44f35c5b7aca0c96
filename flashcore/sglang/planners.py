"""The plan of a forward: by kernels on Hopper, with torch operators elsewhere; one interface.

    page tables ─► plan ─► every layer's attention

A planner keeps its buffers, so a plan is good until the next one is made.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch

import flashcore
from flashcore.config.dense import WARPGROUP_ROWS
from flashcore.planner.counters import Stat
from flashcore.planner.folding import Fold
from flashcore.sglang.page_tables import PageTables
from flashcore.sglang.support import Model, Shape

WORKSPACE_BYTES = 128 << 20
"""Partial results of one attention call: 8128 query tokens of 32 heads of 128, which is a prefix
tree 27 groups deep under each of 256 sequences."""

PLAN_ENTRIES = 1 << 19
"""Pages of all sequences that a plan has room for, where as many can occur: 33 million tokens in
pages of 64. An entry takes about 250 bytes."""


SHARING_QUERIES = 512
"""New tokens of a prefill up to which sequences share runs: room for partial results is certain."""


class Planner(Protocol):
    """Plans one kind of layer."""

    tile_m: int

    def holds(self, batch: int, entries: int, queries: int) -> bool:
        """Is there room for a batch with so many sequences, pages and new tokens?"""
        ...

    def plan(self, tables: PageTables) -> Any:
        """Plan the batch. Waits for nothing where it may stand in a CUDA graph."""
        ...

    def attend(
        self, plan: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **rules: Any
    ) -> torch.Tensor:
        """`flashcore.paged_attention`; q may have rows beyond the plan's, which come out zero."""
        ...

    def stats(self) -> torch.Tensor:
        """int64 [Stat.SIZE] of the last plan, on its device."""
        ...

    @property
    def bytes(self) -> int:
        """Memory that it keeps, the shared workspace not counted."""
        ...


class TorchPlanner:
    """`flashcore.plan` on any device. It waits for the device, so no CUDA graph can hold it."""

    def __init__(self, shape: Shape, page_tokens: int, tile_m: int, fold: Fold):
        self.shape, self.page_tokens, self.tile_m, self.fold = shape, page_tokens, tile_m, fold
        self.bytes = 0
        self._stats = torch.zeros(Stat.SIZE, dtype=torch.int64)

    def holds(self, batch: int, entries: int, queries: int) -> bool:
        return True

    def plan(self, tables: PageTables) -> flashcore.Plan:
        layout = flashcore.layout_from_page_table(
            tables.pages, tables.seq_lens, page_tokens=self.page_tokens
        )
        plan = flashcore.plan(
            layout,
            q_lens=tables.q_lens,
            num_q_heads=self.shape.num_q_heads,
            num_kv_heads=self.shape.num_kv_heads,
            head_dim=self.shape.head_dim,
            page_tokens=self.page_tokens,
            tile_m=self.tile_m,
            fold=self.fold,
        )
        found = plan.stats()
        self._stats[Stat.TOKENS_UNIQUE] = found.tokens_unique
        self._stats[Stat.TOKENS_ONCE] = found.tokens_once
        self._stats[Stat.TOKENS_PER_SEQUENCE] = found.tokens_per_sequence
        self._stats[Stat.NUM_GROUPS] = found.num_groups
        self._stats[Stat.NUM_FOLDED] = found.num_folded
        return plan

    def attend(
        self,
        plan: flashcore.Plan,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        **rules: Any,
    ) -> torch.Tensor:
        planned, out = plan.total_q, rules.pop("out", None)
        for name in ("tree_mask", "tree_positions"):
            if rules.get(name) is not None:
                rules[name] = rules[name][:planned]
        result = flashcore.paged_attention(q[:planned], k, v, plan, **rules)
        out = torch.empty_like(q) if out is None else out
        out[:planned].copy_(result)
        out[planned:].zero_()
        return out

    def stats(self) -> torch.Tensor:
        return self._stats


class KernelPlanner:
    """`flashcore.DevicePlanner`: nothing is awaited, buffers stay where they are."""

    def __init__(
        self,
        shape: Shape,
        page_tokens: int,
        tile_m: int,
        fold: Fold,
        *,
        max_batch: int,
        max_entries: int,
        max_q: int,
        num_pages: int,
        itemsize: int,
        workspace: torch.Tensor,
    ):
        self.tile_m = tile_m
        group_size = shape.num_q_heads // shape.num_kv_heads
        # Pages that requests share lie before all that they do not share, so the sets of sequences
        # that use one page form a tree: it has fewer than two groups for each sequence.
        groups = min(max_entries, 4 * max_batch + 1024)
        gathered = min(max_entries, 64 * max_batch) + 8 * max_q
        items = groups + -(-gathered * group_size // tile_m)
        before = torch.cuda.memory_allocated(workspace.device)
        self._planner = flashcore.DevicePlanner(
            flashcore.Capacities(
                max_batch=max_batch,
                max_entries=max_entries,
                max_q=max_q,
                max_gathered=gathered,
                max_items=shape.num_kv_heads * items + 4096,
            ),
            num_pages=num_pages,
            num_q_heads=shape.num_q_heads,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            page_tokens=page_tokens,
            itemsize=itemsize,
            tile_m=tile_m,
            fold=fold,
            device=workspace.device,
            workspace=workspace,
        )
        self.bytes = torch.cuda.memory_allocated(workspace.device) - before

    def holds(self, batch: int, entries: int, queries: int) -> bool:
        c = self._planner.capacities
        return batch <= c.max_batch and entries <= c.max_entries and queries <= c.max_q

    def plan(self, tables: PageTables) -> flashcore.DevicePlan:
        return self._planner.update(tables.pages, tables.seq_lens, tables.q_lens)

    def attend(
        self,
        plan: flashcore.DevicePlan,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        **rules: Any,
    ) -> torch.Tensor:
        out: torch.Tensor = flashcore.paged_attention(q, k, v, plan, **rules)
        return out

    def stats(self) -> torch.Tensor:
        return self._planner.stats()


def workspace_for(model: Model, max_q: int) -> torch.Tensor:
    """Where the partial results of every planner go: their attention calls never overlap.

    At least twelve partial results for each of `max_q` query tokens, and those of the splits.
    """
    elements = WORKSPACE_BYTES // 4
    for shape in model.shapes:
        row = shape.num_q_heads * (shape.head_dim + 1)
        # `planner.device_plan.fill_defaults`, for two CTAs of 64 rows an SM or one of 128.
        splits = 5 * multiprocessors(model.device) * 128
        elements = max(elements, 12 * max_q * row + splits * (shape.head_dim + 1))
    return torch.empty(elements, dtype=torch.float32, device=model.device)


def multiprocessors(device: torch.device) -> int:
    """Of a CUDA device."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def decode_tile() -> int:
    """Query rows of a work item in decode and verify: a sequence by itself has few."""
    return WARPGROUP_ROWS


def prefill_tile(queries: int, batch: int, shape: Shape) -> int:
    """128 where the sequences' own rows fill it, which halves the reads of K and V; else 64."""
    rows = queries * (shape.num_q_heads // shape.num_kv_heads)
    return 2 * WARPGROUP_ROWS if rows >= 96 * batch else WARPGROUP_ROWS


def prefill_fold(queries: int, tile_m: int) -> Fold:
    """Sequences that fill tiles by themselves share nothing; nor do more query tokens than there
    is room for partial results of."""
    return "always" if tile_m > WARPGROUP_ROWS or queries > SHARING_QUERIES else True
