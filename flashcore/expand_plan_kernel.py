"""The expansion of a plan made on the device, by three Triton launches; nothing is awaited.

    cols ─► first entry of each page ─► a place for it ─► cols with places; expand or convert

What `planner.expansion.expansion_of` finds on the host, but for the order of pages, which says
nothing: places are given out as programs come.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from flashcore.contract.counts import Count
from flashcore.contract.work import FIELDS, Group
from flashcore.planner import expansion
from flashcore.planner.expansion import DeviceExpansion, Way
from flashcore.planner.types import PlanTensors

_BLOCK = 1024
_PROGRAMS = 128

CONVERT = tl.constexpr(expansion.CONVERT_COST)
EXPAND = tl.constexpr(expansion.EXPAND_COST)
LAUNCH = tl.constexpr(expansion.LAUNCH_COST)
ROWS = tl.constexpr(expansion.ROWS)
CONVERTED = tl.constexpr(int(Way.CONVERTED))
EXPANDED = tl.constexpr(int(Way.EXPANDED))
NO_ROOM = tl.constexpr(int(Way.NO_ROOM))
FIELDS_ = tl.constexpr(FIELDS)
NUM_TOKENS = tl.constexpr(int(Group.NUM_TOKENS))
NUM_Q = tl.constexpr(int(Group.NUM_Q))
Q_BEGIN = tl.constexpr(int(Group.Q_BEGIN))


def plan_expansion(
    tensors: PlanTensors,
    counts: torch.Tensor,
    found: DeviceExpansion,
    scratch: torch.Tensor,
    tile_m: int,
) -> None:
    """Fill the tensors of `found` for a plan; counts: its own, which stay as they are.

    scratch: int32, an element for every page of the pool. Ids beyond, of sequences that could not
    be planned, have the first place: nothing reads it for them.
    """
    problem = found.problem
    pages, page_count, cols_of_places = found.places
    scratch.fill_(2**31 - 1)
    page_count.zero_()
    cols, num_pages, nnz = tensors.cols, scratch.numel(), int(Count.NNZ)
    programs = (min(_PROGRAMS, triton.cdiv(cols.numel(), _BLOCK)),)
    _claim[programs](cols, counts, scratch, num_pages, nnz, _BLOCK)
    _number[programs](
        *(cols, counts, scratch, num_pages),
        *(pages, page_count, pages.numel(), nnz, _BLOCK),
    )
    _place[programs](
        cols,
        counts,
        scratch,
        num_pages,
        tensors.groups,
        tensors.q_positions,
        cols_of_places,
        page_count,
        found.counts,
        found.converted_counts,
        found.outcome,
        pages.numel(),
        tile_m,
        problem.group_size,
        problem.page_tokens,
        problem.num_kv_heads * (problem.head_dim + problem.v_head_dim),
        nnz,
        int(Count.GROUPS),
        int(Count.ITEMS),
        int(Count.SIZE),
        _BLOCK,
    )


# What differs from planner to planner is not compiled in: a first request must not wait for it.
_SIZES = ["num_pages", "capacity", "tile_m", "group_size", "page_tokens", "elements"]


@triton.jit(do_not_specialize=_SIZES[:1])
def _claim(  # type: ignore[no-untyped-def]
    cols, counts, places, num_pages, NNZ: tl.constexpr, BLOCK: tl.constexpr
):
    """places[page]: its first entry."""
    entries = tl.load(counts + NNZ)
    first = tl.program_id(0) * BLOCK
    while first < entries:
        entry = first + tl.arange(0, BLOCK)
        there = entry < entries
        page = tl.load(cols + entry, mask=there, other=-1)
        there &= (page >= 0) & (page < num_pages)
        tl.atomic_min(places + page, entry, mask=there)
        first += tl.num_programs(0) * BLOCK


@triton.jit(do_not_specialize=_SIZES[:2])
def _number(  # type: ignore[no-untyped-def]
    cols,
    counts,
    places,
    num_pages,
    pages,
    page_count,
    capacity,
    NNZ: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """pages: those that an entry is the first of; places[page]: -1 - its place in them."""
    entries = tl.load(counts + NNZ)
    first = tl.program_id(0) * BLOCK
    while first < entries:
        entry = first + tl.arange(0, BLOCK)
        there = entry < entries
        page = tl.load(cols + entry, mask=there, other=-1)
        there &= (page >= 0) & (page < num_pages)
        # Of other entries' pages there is another entry, or a place, which is negative.
        own = there & (tl.load(places + page, mask=there, other=-1) == entry)
        taken = own.to(tl.int32)
        begin = tl.atomic_add(page_count, tl.sum(taken, 0))
        place = begin + tl.cumsum(taken, 0) - 1
        tl.store(pages + place, page, mask=own & (place < capacity))
        tl.store(places + page, -1 - place, mask=own)
        first += tl.num_programs(0) * BLOCK


@triton.jit(do_not_specialize=_SIZES)
def _place(  # type: ignore[no-untyped-def]
    cols,
    counts,
    places,
    num_pages,
    groups,
    q_positions,
    cols_of_places,
    page_count,
    expanded_counts,
    converted_counts,
    outcome,
    capacity,
    tile_m,
    group_size,
    page_tokens,
    elements,
    NNZ: tl.constexpr,
    GROUPS: tl.constexpr,
    ITEMS: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    entries = tl.load(counts + NNZ)
    first = tl.program_id(0) * BLOCK
    while first < entries:
        entry = first + tl.arange(0, BLOCK)
        page = tl.load(cols + entry, mask=entry < entries, other=-1)
        there = (page >= 0) & (page < num_pages)
        place = -1 - tl.load(places + page, mask=there, other=-1)
        tl.store(cols_of_places + entry, tl.minimum(place, capacity - 1), mask=entry < entries)
        first += tl.num_programs(0) * BLOCK
    if tl.program_id(0) == 0:
        distinct = tl.load(page_count)
        tokens = _block_tokens(
            groups, q_positions, tl.load(counts + GROUPS), tile_m, group_size, BLOCK
        )
        converting = CONVERT * tokens * tile_m * elements // ROWS
        pays = converting > EXPAND * distinct.to(tl.int64) * page_tokens * elements + LAUNCH
        way = tl.where(pays, tl.where(distinct <= capacity, EXPANDED, NO_ROOM), CONVERTED)
        expands = way == EXPANDED
        tl.store(outcome, way)
        tl.store(outcome + 1, distinct)
        tl.store(page_count, tl.where(expands, distinct, 0))  # nothing else is expanded
        place = tl.arange(0, SIZE)
        count = tl.load(counts + place)
        tl.store(expanded_counts + place, tl.where((place == ITEMS) & ~expands, 0, count))
        tl.store(converted_counts + place, tl.where((place == ITEMS) & expands, 0, count))


@triton.jit
def _block_tokens(  # type: ignore[no-untyped-def]
    groups, q_positions, num_groups, tile_m, group_size, BLOCK: tl.constexpr
):
    """`Reads.block_tokens`."""
    twice = tl.zeros((), tl.int64)
    first = tl.zeros((), tl.int32)
    while first < num_groups:
        group = first + tl.arange(0, BLOCK)
        there = group < num_groups
        row = groups + group * FIELDS_
        tokens = tl.load(row + NUM_TOKENS, mask=there, other=0)
        rows = tl.load(row + NUM_Q, mask=there, other=0) * group_size
        blocks = (rows + tile_m - 1) // tile_m
        begin = tl.load(row + Q_BEGIN, mask=there, other=0)
        seen = tl.load(q_positions + begin, mask=there, other=-1) + 1
        seen = tl.minimum(tl.maximum(seen, 0), tokens)
        twice += tl.sum(blocks.to(tl.int64) * (seen + tokens), 0)
        first += BLOCK
    return twice // 2
