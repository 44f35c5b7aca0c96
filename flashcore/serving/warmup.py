"""Everything that a forward can need, loaded and launched once before the server serves.

A kernel's first launch loads its module, Triton compiles for each kind of argument, torch loads its
own kernels one by one: hundreds of milliseconds of a first request. Here each runs on a batch of
nothing, in planners of their own that are gone afterwards.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

import flashcore
from flashcore.jit.kernel import Kernel
from flashcore.planner.expansion import may_be_worth
from flashcore.serving import kernels, page_tables
from flashcore.serving.kernels import Kind, Variant
from flashcore.serving.page_tables import PageTables, Slots
from flashcore.serving.planners import prefill_tiles
from flashcore.serving.shapes import Model, Shape
from flashcore.sm90.config import merge
from flashcore.sm90.config.planner import SMALL_QUERIES, PlannerConfig
from flashcore.sm90.expansion_scratch import ExpansionScratch
from flashcore.sm90.families import PAGED, PLANNER

logger = logging.getLogger(__name__)

_ENTRIES = 64  # of a planner for nothing


@dataclass(frozen=True, eq=False)
class Cache:
    """What a kind of layer reads, and where its partial results go.

    k, v: a layer's pools [slots, heads, dim] or [pages, tokens, heads, dim]. req_to_token, pages:
    as in `page_tables.Slots`. translation: of slots, to this pool's, if any. window: -1 for none.
    workspace: fp32, of all planners. batch_invariant: plans are. scales: k_scale and v_scale of
    the layer, where its cache is fp8. appended: fp8 caches are written by `flashcore.append_kv`.
    expansion: where long prefills expand fp8 pages.
    """

    k: torch.Tensor
    v: torch.Tensor
    req_to_token: torch.Tensor
    translation: torch.Tensor | None
    window: int
    workspace: torch.Tensor
    pages: bool = False
    batch_invariant: bool = False
    scales: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)
    appended: bool = False
    expansion: ExpansionScratch | None = None

    def views(self, model: Model, shape: Shape) -> tuple[torch.Tensor, torch.Tensor]:
        """k and v [pages, tokens, heads, dim]."""
        if self.k.ndim == 4:
            return self.k, self.v
        pages = (-1, model.page_tokens, shape.num_kv_heads)
        return self.k.view(*pages, shape.head_dim), self.v.view(*pages, shape.v_head_dim)


@contextmanager
def compiled(needed: list[Kernel], device: torch.device) -> Iterator[None]:
    """Compile `needed`; within, launch them by `run_all`. How long it took is told in the log."""
    kernels.prepare(needed)
    started = time.monotonic()
    yield
    if device.type == "cuda":
        torch.cuda.synchronize()  # what a kernel has against this machine is told here
    seconds = time.monotonic() - started
    logger.info("flashcore attention: %d kernels launched once in %.1f s", len(needed), seconds)


def run_all(model: Model, kind: Kind, cache: Cache, wanted: list[Kernel], tree: bool) -> None:
    """Launch every kernel that layers of `kind` can ask for; `wanted` as by `kernels.wanted`.

    tree: verify forwards have tree masks.
    """
    planners = [kernel.config for kernel in wanted if kernel.family is PLANNER]
    tables = _fill_tables(model, cache, max(1, model.draft_tokens))
    for config in planners:
        _planner(model, kind, cache, 64, config).update(
            tables.pages, tables.seq_lens, tables.q_lens
        )
    tiles = {k.config.tile_m for k in wanted if k.family is PAGED and not k.config.expanded}
    if cache.expansion is not None and cache.window < 0:
        _expand(model, kind, cache, tables, planners[0])
    for tile_m in sorted(tiles):
        plan = _planner(model, kind, cache, tile_m, planners[0]).update(
            tables.pages, tables.seq_lens, tables.q_lens
        )
        for variant in kind.variants:
            for with_tree in (False, True) if tree and tile_m == min(tiles) else (False,):
                for count in _token_counts(kind.shape.num_q_heads):
                    _attend(model, kind, cache, plan, variant, count, with_tree)
    if model.fp8 and cache.appended:
        _append(model, kind, cache)
    if tree:
        _tree_masks(model)
    if cache.translation is not None:
        slots = torch.zeros(1, dtype=torch.int64, device=model.device)
        torch.take(cache.translation, slots, out=cache.translation[slots])  # eager, and in a graph


def _token_counts(heads: int) -> list[int]:
    """Query tokens whose results each kernel of `choose_device_merge` merges once."""
    return [-(-rows // heads) for rows in merge.MERGE_SIZES]


def _expand(
    model: Model, kind: Kind, cache: Cache, tables: PageTables, config: PlannerConfig
) -> None:
    """A plan and calls that may expand, and find that they need not."""
    tile_m = max(prefill_tiles(kind.shape, cache.batch_invariant))
    planner = _planner(model, kind, cache, tile_m, config, cache.expansion)
    plan = planner.update(tables.pages, tables.seq_lens, tables.q_lens)
    count = 1
    while not may_be_worth(count, plan.problem):
        count *= 2
    for variant in kind.variants:
        _attend(model, kind, cache, plan, variant, count, with_tree=False)


def _planner(
    model: Model,
    kind: Kind,
    cache: Cache,
    tile_m: int,
    config: PlannerConfig,
    expansion: ExpansionScratch | None = None,
) -> flashcore.DevicePlanner:
    """One that takes the kernels of `config` for a sequence."""
    shape = kind.shape
    max_q = SMALL_QUERIES if config.small else SMALL_QUERIES + 1
    return flashcore.DevicePlanner(
        flashcore.Capacities(config.row_capacity, max_entries=_ENTRIES, max_q=max_q),
        num_pages=1,
        num_q_heads=shape.num_q_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        v_head_dim=shape.v_head_dim,
        page_tokens=model.page_tokens,
        itemsize=model.cache_dtype.itemsize,
        tile_m=tile_m,
        num_workers=1,
        device=model.device,
        workspace=cache.workspace,
        batch_invariant=cache.batch_invariant,
        expansion=expansion,
    )


def _fill_tables(model: Model, cache: Cache, width: int) -> PageTables:
    """Tables of one sequence that is not there, by each way of filling them."""
    one = torch.ones(1, dtype=torch.int64, device=model.device)
    tables = PageTables.empty(1, width, model.device)
    for new in (1, one.int()):
        slots = Slots(cache.req_to_token, one - 1, one, new, 0, 0, cache.pages)
        page_tables.fill(tables, slots, model.page_tokens, cache.window, cache.translation)
    return tables


def _attend(
    model: Model,
    kind: Kind,
    cache: Cache,
    plan: Any,
    variant: Variant,
    count: int,
    with_tree: bool,
) -> None:
    shape, device = kind.shape, model.device
    q = torch.zeros(count, shape.num_q_heads, shape.head_dim, dtype=model.dtype, device=device)
    k, v = cache.views(model, shape)
    drafts = max(1, model.draft_tokens)
    sinks = torch.zeros(shape.num_q_heads, dtype=model.dtype, device=device)
    mask = torch.ones(count, drafts, dtype=torch.bool, device=device)
    positions = with_tree and cache.window >= 0
    flashcore.paged_attention(
        q,
        k,
        v,
        plan,
        causal=variant.causal,
        window=(cache.window, 0) if cache.window >= 0 else None,
        softcap=1.0 if variant.softcap else 0.0,
        sinks=sinks if variant.sinks else None,
        tree_mask=mask if with_tree else None,
        tree_positions=torch.ones(count, dtype=torch.int32, device=device) if positions else None,
        k_scale=cache.scales[0],
        v_scale=cache.scales[1],
        out=q.new_empty(count, shape.num_q_heads, shape.v_head_dim),
        impl="auto",
    )


def _append(model: Model, kind: Kind, cache: Cache) -> None:
    """A token that goes nowhere."""
    k_pages, v_pages = cache.views(model, kind.shape)
    k, v = (
        torch.zeros(1, *pages.shape[2:], dtype=model.dtype, device=model.device)
        for pages in (k_pages, v_pages)
    )
    slots = torch.full((1,), -1, dtype=torch.int64, device=model.device)
    k_scale, v_scale = cache.scales
    flashcore.append_kv(
        k, v, k_pages, v_pages, slot_mapping=slots, k_scale=k_scale, v_scale=v_scale
    )


def _tree_masks(model: Model) -> None:
    """One sequence and one that pads, with a mask over the drafts and one over all keys."""
    n, device = max(1, model.draft_tokens), model.device
    lengths = torch.ones(1, dtype=torch.int64, device=device)
    out = torch.empty(2 * n, n, dtype=torch.bool, device=device)
    for full in (False, True):
        mask = torch.ones(n * (n + full), dtype=torch.bool, device=device)
        page_tables.tree_mask(out, mask, lengths, n, full)
    torch.sum(out, 1, dtype=torch.int32, out=torch.empty(2 * n, dtype=torch.int32, device=device))
