"""The plan of a forward: by kernels on Hopper, with torch operators elsewhere; one interface.

    page tables ─► plan ─► every layer's attention

A planner keeps its buffers, so a plan is good until the next one is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

import flashcore
from flashcore.contract.chunks import tallest_tile
from flashcore.contract.counts import Seen, Stat
from flashcore.planner.folding import Fold
from flashcore.serving import capacity
from flashcore.serving.capacity import Room
from flashcore.serving.page_tables import PageTables
from flashcore.serving.shapes import Model, Shape
from flashcore.sm90.config.dense import WARPGROUP_ROWS
from flashcore.sm90.expansion_scratch import ExpansionScratch
from flashcore.sm90.planner_scratch import PlannerScratch

WORKSPACE_BYTES = 128 << 20
"""Partial results of one attention call: 8128 query tokens of 32 heads of 128, which is a prefix
tree 27 groups deep under each of 256 sequences."""

PARTIALS_OF_SHARING = 2
"""Partial results of each new token of a prefill that shares: of the common prefix, of the rest."""


@dataclass(frozen=True, eq=False)
class Memory:
    """What planners share. workspace: of partial results, fp32; None where torch operators plan.
    scratch: of planners that take turns. expansion: of fp8 pages in long prefills."""

    workspace: torch.Tensor | None
    scratch: PlannerScratch | None
    expansion: ExpansionScratch | None = None


class Planner(Protocol):
    """Plans one kind of layer."""

    tile_m: int
    room: Room

    def variant(self, tile_m: int, fold: Fold, queries: int, expand: bool = False) -> Planner:
        """A planner over the same memory, for up to so many new tokens: a plan of either is good
        until one of them makes the next. expand: calls may expand fp8 pages, where there is room
        for it."""
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

    def outcome(self) -> torch.Tensor | None:
        """int32 [2]: the `Way` of the last plan's fp8 pages and how many distinct ones it has, on
        its device; None where plans expand none."""
        ...

    @property
    def seen(self) -> Sequence[int]:
        """`contract.counts.Seen` of all plans that are done; the same object always."""
        ...


class TorchPlanner:
    """`flashcore.plan` on any device. It waits for the device, so no CUDA graph can hold it."""

    seen = (0,) * Seen.SIZE

    def __init__(
        self,
        shape: Shape,
        page_tokens: int,
        tile_m: int,
        fold: Fold,
        room: Room,
        batch_invariant: bool = False,
        itemsize: int = 2,
    ):
        self.shape, self.page_tokens, self.tile_m, self.fold = shape, page_tokens, tile_m, fold
        self.room, self.batch_invariant, self.itemsize = room, batch_invariant, itemsize
        self._stats = torch.zeros(Stat.SIZE, dtype=torch.int64)

    def variant(self, tile_m: int, fold: Fold, queries: int, expand: bool = False) -> TorchPlanner:
        kept = self.batch_invariant, self.itemsize
        room = replace(self.room, queries=queries)
        return TorchPlanner(self.shape, self.page_tokens, tile_m, fold, room, *kept)

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
            v_head_dim=self.shape.v_head_dim,
            page_tokens=self.page_tokens,
            tile_m=self.tile_m,
            fold=self.fold,
            batch_invariant=self.batch_invariant,
            itemsize=self.itemsize,
            expand=False,  # torch operators never do
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
        out = q.new_empty(*q.shape[:-1], self.shape.v_head_dim) if out is None else out
        out[:planned].copy_(result)
        out[planned:].zero_()
        return out

    def stats(self) -> torch.Tensor:
        return self._stats

    def outcome(self) -> torch.Tensor | None:
        return None


class KernelPlanner:
    """`flashcore.DevicePlanner`: nothing is awaited, buffers stay where they are."""

    def __init__(self, planner: flashcore.DevicePlanner, room: Room):
        self._planner, self.room, self.tile_m = planner, room, planner.plan.tile_m
        self.seen: Sequence[int] = planner.seen

    @staticmethod
    def of(
        model: Model,
        shape: Shape,
        room: Room,
        num_pages: int,
        memory: Memory,
        expand: bool,
    ) -> KernelPlanner:
        """With tensors for `room`, and scratch of its own if the memory has none. expand: variants
        may expand fp8 pages."""
        assert memory.workspace is not None
        workspace = memory.workspace
        planner = flashcore.DevicePlanner(
            capacity.capacities(room, shape, workspace.numel()),
            num_pages=num_pages,
            num_q_heads=shape.num_q_heads,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            v_head_dim=shape.v_head_dim,
            page_tokens=model.page_tokens,
            itemsize=model.cache_dtype.itemsize,
            tile_m=decode_tile(),
            batch_invariant=room.chunks,
            device=workspace.device,
            workspace=workspace,
            scratch=memory.scratch,
            expansion=memory.expansion if expand else None,
        )
        return KernelPlanner(planner, room)

    def variant(self, tile_m: int, fold: Fold, queries: int, expand: bool = False) -> KernelPlanner:
        planner = self._planner.variant(tile_m=tile_m, fold=fold, max_q=queries, expand=expand)
        return KernelPlanner(planner, replace(self.room, queries=queries))

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
        # Whatever the program prefers elsewhere: only kernels read a plan made by kernels.
        out: torch.Tensor = flashcore.paged_attention(q, k, v, plan, impl="auto", **rules)
        return out

    def stats(self) -> torch.Tensor:
        return self._planner.stats()

    def outcome(self) -> torch.Tensor | None:
        expansion = self._planner.plan.expansion
        return None if expansion is None else expansion.outcome


def workspace_for(model: Model, max_q: int) -> int:
    """fp32 elements for the partial results of every planner: their attention calls never overlap.

    At least twelve partial results for each of `max_q` query tokens, and those of the splits.
    """
    elements = WORKSPACE_BYTES // 4
    for shape in model.shapes:
        row = shape.num_q_heads * (shape.v_head_dim + 1)
        # `planner.device_plan.fill_defaults`, for two CTAs of 64 rows an SM or one of 128.
        splits = 5 * multiprocessors(model.device) * 128
        elements = max(elements, 12 * max_q * row + splits * (shape.v_head_dim + 1))
    return elements


def on_kernels(device: torch.device) -> bool:
    """Whether the Hopper kernels plan and attend there; `support` has checked that they can."""
    return device.type == "cuda"


def multiprocessors(device: torch.device) -> int:
    """Of a CUDA device."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def decode_tile() -> int:
    """Query rows of a work item in decode and verify: a sequence by itself has few."""
    return WARPGROUP_ROWS


def prefill_tile(queries: int, batch: int, shape: Shape, batch_invariant: bool = False) -> int:
    """128 where the sequences' own rows fill it, which halves the reads of K and V; else 64."""
    rows = queries * (shape.num_q_heads // shape.num_kv_heads)
    return prefill_tiles(shape, batch_invariant)[-1 if rows >= 96 * batch else 0]


def prefill_tiles(shape: Shape, batch_invariant: bool = False) -> tuple[int, ...]:
    """What `prefill_tile` chooses from, the lowest first: those that there are kernels of."""
    if batch_invariant and tallest_tile(shape.v_head_dim) == WARPGROUP_ROWS:
        return (WARPGROUP_ROWS,)
    return WARPGROUP_ROWS, 2 * WARPGROUP_ROWS


def prefill_fold(queries: int, shape: Shape, room: int | None) -> Fold:
    """What sharing costs decides, group by group, where `room` holds its partial results.

    room: fp32 elements of the workspace, None for as many as are needed. The rule counts row blocks
    (docs/kernels/planner.md#folding): sequences whose own rows fill their tiles share nothing,
    whatever they have in common; those with fewer rows share, which halves their work or better.
    Where room is short every exact group is given back at once, as the plan would after counting.
    """
    if room is None:
        return True
    row = shape.num_q_heads * (shape.v_head_dim + 1)
    return True if PARTIALS_OF_SHARING * queries * row <= room else "always"


def prefill_kinds(shape: Shape, batch_invariant: bool = False) -> list[tuple[int, Fold]]:
    """Every tile and folding that `prefill_tile` and `prefill_fold` choose."""
    folds: tuple[Fold, ...] = (True, "always")
    return [(tile, fold) for tile in prefill_tiles(shape, batch_invariant) for fold in folds]
