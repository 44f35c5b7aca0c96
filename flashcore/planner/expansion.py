"""Expansion: a long prefill widens each distinct fp8 page once, not each tile for each row block.

    plan ─► distinct pages; entries as places among them ─► each layer: pages of fp16 in scratch ─►
    the same work list, over these places

The values are the same, and so are the tiles and all sums: results do not depend on the way. What
is decided here are integers, no tensor of them K or V.

The rule is a model of costs, in sixteenths of a byte that the SMs read from DRAM in that time:
converting an element of a tile in shared memory costs CONVERT_COST for each row block of 128 rows
that reads it (half of that with 64 rows, which read it twice as often), expanding it costs
EXPAND_COST once, and a launch LAUNCH_COST.
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

import torch

from flashcore.contract.work import Group
from flashcore.problem import Problem, Rules

CONVERT_COST = 5
EXPAND_COST = 16 * 4
"""A byte read, two written, then two read by the first row block where it would have read one."""

LAUNCH_COST = 16 * (10 << 20)
"""3 us."""

EXPANSION_BYTES = 512 << 20
"""Of scratch at most, for a call."""

ROWS = 128
"""Of a row block in CONVERT_COST."""


class Way(IntEnum):
    """What becomes of a plan's fp8 pages."""

    CONVERTED = 0  # tile by tile in the attention kernel: few row blocks read them
    EXPANDED = 1  # each distinct page once, before it
    NO_ROOM = 2  # converted, since expanded pages would take more than EXPANSION_BYTES
    REFUSED = 3  # converted, since the plan was made with expand=False


WAY_TEXT = {
    Way.CONVERTED: "converted tile by tile: few row blocks read a page",
    Way.EXPANDED: "expanded once for each call",
    Way.NO_ROOM: "converted tile by tile: expanded they would take more than the scratch may",
    Way.REFUSED: "converted tile by tile: expand was False",
}


class Reads(NamedTuple):
    """What a plan reads. block_tokens: KV tokens of each row block, as a causal mask leaves them,
    of all. blocks: row blocks. tile_m, group_size: of the plan. distinct_tokens: of all distinct
    pages, full."""

    block_tokens: int
    blocks: int
    tile_m: int
    group_size: int
    distinct_tokens: int

    def under(self, rules: Rules) -> Reads:
        """What a window leaves of it, at most."""
        if rules.window_left < 0:
            return self
        right = 0 if rules.causal else rules.window_right
        if right < 0:
            return self
        of_block = rules.window_left + 1 + right + -(-self.tile_m // self.group_size)
        return self._replace(block_tokens=min(self.block_tokens, self.blocks * of_block))


def is_worth(reads: Reads, problem: Problem) -> bool:
    """Whether expanding costs less than converting."""
    elements = problem.num_kv_heads * (problem.head_dim + problem.v_head_dim)
    converting = CONVERT_COST * reads.block_tokens * reads.tile_m * elements // ROWS
    return converting > EXPAND_COST * reads.distinct_tokens * elements + LAUNCH_COST


def expanded_bytes(pages: int, problem: Problem) -> int:
    """Scratch for K and V of so many pages, all KV heads, 16 bits an element."""
    columns = problem.head_dim + problem.v_head_dim
    return 2 * pages * problem.page_tokens * problem.num_kv_heads * columns


class Expansion(NamedTuple):
    """The way of a plan's fp8 pages and, where it is to expand them, int32 tensors.

    pages: [num_pages] page ids, each once. count: [1] num_pages. cols: as the plan's, with places
    in `pages`; entries that no work item reads have any.
    forced: whatever it costs.
    """

    way: Way
    reads: Reads
    forced: bool = False
    pages: torch.Tensor | None = None
    count: torch.Tensor | None = None
    cols: torch.Tensor | None = None

    def serves(self, rules: Rules, problem: Problem) -> bool:
        """Whether a call with these rules expands."""
        if self.way is not Way.EXPANDED:
            return False
        return self.forced or is_worth(self.reads.under(rules), problem)

    def to(self, device: torch.device) -> Expansion:
        tensors = ("pages", "count", "cols")
        moved = {name: getattr(self, name) for name in tensors}
        return self._replace(**{n: x if x is None else x.to(device) for n, x in moved.items()})


class Tables(NamedTuple):
    """Of a plan: what its expansion follows from."""

    cols: torch.Tensor
    groups: torch.Tensor
    q_positions: torch.Tensor


def expansion_of(
    tables: Tables, problem: Problem, tile_m: int, expand: bool | None
) -> Expansion | None:
    """The way of a plan's pages, None where they are not of fp8. expand: as in `flashcore.plan`.

    Raises ValueError where it is True and cannot be.
    """
    if problem.itemsize != 1:
        if expand:
            raise ValueError(
                "expand=True is for fp8 pages: plan with their dtype or with itemsize=1, got "
                f"itemsize {problem.itemsize}"
            )
        return None
    reads = _reads(tables, problem, tile_m)
    forced = expand is True
    if expand is False:
        return Expansion(Way.REFUSED, reads)
    # No distinct token is read by more row blocks than there are.
    if not forced and not is_worth(reads, problem):
        return Expansion(Way.CONVERTED, reads)
    used = tables.cols[_entries_read(tables)]
    if used.numel() == 0:
        return Expansion(Way.CONVERTED, reads)
    pages = torch.unique(used)
    reads = reads._replace(distinct_tokens=pages.numel() * problem.page_tokens)
    if not forced and not is_worth(reads, problem):
        return Expansion(Way.CONVERTED, reads)
    size = expanded_bytes(pages.numel(), problem)
    if size > EXPANSION_BYTES:
        if forced:
            raise ValueError(
                f"expand=True: {pages.numel()} distinct pages of 16 bits take {size} bytes, at "
                f"most {EXPANSION_BYTES} may be taken; use None or False"
            )
        return Expansion(Way.NO_ROOM, reads)
    places = torch.searchsorted(pages, tables.cols).clamp(max=pages.numel() - 1)
    count = torch.tensor([pages.numel()], dtype=torch.int32, device=pages.device)
    return Expansion(Way.EXPANDED, reads, forced, pages.int(), count, places.int())


def _reads(tables: Tables, problem: Problem, tile_m: int) -> Reads:
    """With the fewest distinct tokens there may be: those of the longest run."""
    groups = tables.groups.long()
    if groups.shape[0] == 0:
        return Reads(0, 0, tile_m, problem.group_size, 0)
    tokens = groups[:, Group.NUM_TOKENS]
    rows = groups[:, Group.NUM_Q] * problem.group_size
    blocks = (rows + tile_m - 1) // tile_m
    # The first row sees so many, the last one all; what lies between grows evenly.
    first = tables.q_positions.long()[groups[:, Group.Q_BEGIN]] + 1
    seen = torch.minimum(first.clamp(min=0), tokens)
    twice = blocks * (seen + tokens)
    found = torch.stack([twice.sum(), blocks.sum(), tokens.max()]).tolist()
    return Reads(found[0] // 2, found[1], tile_m, problem.group_size, found[2])


def _entries_read(tables: Tables) -> torch.Tensor:
    """bool [entries]: which some group reads."""
    groups = tables.groups.long()
    edges = torch.zeros(tables.cols.numel() + 1, dtype=torch.long, device=groups.device)
    ones = torch.ones_like(groups[:, 0])
    begin = groups[:, Group.ENTRY]
    edges.index_add_(0, begin, ones)
    edges.index_add_(0, begin + groups[:, Group.NUM_ENTRIES], -ones)
    return edges[:-1].cumsum(0) > 0
