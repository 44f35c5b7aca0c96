"""Expansion: a long prefill widens each distinct fp8 page once, not each tile for each row block.

    plan ─► distinct pages; entries as places among them ─► each layer: pages of fp16 in scratch ─►
    the same work list, over these places

The values are the same, and so are the tiles and all sums: results do not depend on the way. What
is decided here are integers, no tensor of them K or V.

The rule is a model of costs, in sixteenths of a byte that the SMs read from DRAM in that time:
converting an element of a tile in shared memory costs CONVERT_COST for each row block of 128 rows
that reads it (half of that with 64 rows, which read it twice as often), expanding it costs
EXPAND_COST once, and a launch LAUNCH_COST. On an H200, 13 row blocks of 128 rows pay, which
are 1664 query rows of a KV head (docs/experiments/paged.md#expanded-pages).
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

import torch

from flashcore.contract.work import Group
from flashcore.problem import Problem, Rules

CONVERT_COST = 4
"""0.09 to 0.12 ns for a token of 8 KV heads of 128: 0.21 bytes of 4190 GB/s."""

EXPAND_COST = 52
"""A byte read, two written, and what the first row block reads more of: 3.2 bytes."""

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


def may_be_worth(total_q: int, problem: Problem) -> bool:
    """Whether so many query tokens can make it worth: no page is read by more row blocks."""
    return CONVERT_COST * total_q * problem.group_size > EXPAND_COST * ROWS


def expanded_bytes(pages: int, problem: Problem) -> int:
    """Scratch for K and V of so many pages, all KV heads, 16 bits an element."""
    columns = problem.head_dim + problem.v_head_dim
    return 2 * pages * problem.page_tokens * problem.num_kv_heads * columns


class Places(NamedTuple):
    """Where pages are expanded to, int32. pages: [n] page ids, each once; the place of each is its
    index. page_count: [1] how many there are. cols: as the plan's, with places for page ids;
    entries that no work item reads have any."""

    pages: torch.Tensor
    page_count: torch.Tensor
    cols: torch.Tensor

    def to(self, device: torch.device) -> Places:
        """The same on another device."""
        return Places(*(x.to(device) for x in self))


class Expansion(NamedTuple):
    """What becomes of the fp8 pages of a plan made on the host. forced: whatever it costs. places:
    None where nothing is expanded."""

    way: Way
    problem: Problem
    reads: Reads
    forced: bool = False
    places: Places | None = None

    def serves(self, rules: Rules, total_q: int) -> bool:
        """Whether a call with these rules expands; total_q: the plan's."""
        if self.places is None:
            return False
        return self.forced or is_worth(self.reads.under(rules), self.problem)

    def to(self, device: torch.device) -> Expansion:
        """The same on another device."""
        return self._replace(places=self.places and self.places.to(device))


class DeviceExpansion(NamedTuple):
    """The same of a plan made on the device, which decides; its places are at capacity.

    scratch: fp16 [n], K and V of expanded pages. counts, converted_counts: the plan's counts, for
    attention on expanded pages and on pages as they lie; in one of them there is no work item.
    outcome: int32 [2], the `Way` of the last plan and how many distinct pages it has.
    """

    problem: Problem
    places: Places
    scratch: torch.Tensor
    counts: torch.Tensor
    converted_counts: torch.Tensor
    outcome: torch.Tensor

    @property
    def forced(self) -> bool:
        return False

    def serves(self, rules: Rules, total_q: int) -> bool:
        """Whether a call may be found to expand. A plan knows no window, so not under one."""
        return may_be_worth(total_q, self.problem) and not rules.windowed


AnyExpansion = Expansion | DeviceExpansion


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
        return Expansion(Way.REFUSED, problem, reads)
    # No distinct token is read by more row blocks than there are.
    if not forced and not is_worth(reads, problem):
        return Expansion(Way.CONVERTED, problem, reads)
    used = tables.cols[_entries_read(tables)]
    if used.numel() == 0:
        return Expansion(Way.CONVERTED, problem, reads)
    pages = torch.unique(used)
    reads = reads._replace(distinct_tokens=pages.numel() * problem.page_tokens)
    if not forced and not is_worth(reads, problem):
        return Expansion(Way.CONVERTED, problem, reads)
    size = expanded_bytes(pages.numel(), problem)
    if size > EXPANSION_BYTES:
        if forced:
            raise ValueError(
                f"expand=True: {pages.numel()} distinct pages of 16 bits take {size} bytes, at "
                f"most {EXPANSION_BYTES} may be taken; use None or False"
            )
        return Expansion(Way.NO_ROOM, problem, reads)
    places = torch.searchsorted(pages, tables.cols).clamp(max=pages.numel() - 1)
    count = torch.tensor([pages.numel()], dtype=torch.int32, device=pages.device)
    found = Places(pages.int(), count, places.int())
    return Expansion(Way.EXPANDED, problem, reads, forced, found)


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
