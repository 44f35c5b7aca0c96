"""Split-KV: how KV runs are cut so that all workers end together. Pure integer arithmetic, for
numbers and for tensors alike, no torch; the kernels of the planner do the same.

Measured with the Hopper kernels over ten decode batches (docs/experiments/paged.md): every split
more is a partial result more and a pause of its consumers, so as few as balance allows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

Int = Any  # int, or an integer tensor

COST_UNIT = 16
"""Costs are counted in sixteenths of a token that is read from DRAM."""

BLOCK_COST = 8
"""Of products and softmax of a token with a block of 64 rows, however many of them are there; of
128 rows it is twice that. An SM's share of the DRAM and 62 % of its products, on an H200; 6 on an
H100, where reading takes longer."""

TILE_TOKENS = 128
"""Splits are whole N tiles, so that only the last split of a run has a tile that is not full."""

MIN_SPLIT_TOKENS = 512
"""Shorter splits write more partial bytes than the balance wins back: at 512 tokens of one head a
partial result of head_dim 128 is 0.4 % of the KV bytes of the split (one query row)."""

SHORT_SPLIT_TOKENS = TILE_TOKENS - 1
"""In place of it where a tile for each worker is more than there is to read, which makes splits of
one tile: most SMs would idle, and what one item reads after its first tile is waited for."""

LONG_SPLIT_TOKENS = 5120
"""Where all items are longer than this, up to twice as many are made: the last ones to end leave
less of the DRAM idle."""

LONGEST_FIRST = 2
"""Items of runs with several row blocks count twice in the order of the work list: the blocks but
one are fed from L2, and run best beside items that wait for DRAM."""


PAIRED_DIMS = ((192, 128), (256, 64))
"""(head_dim, v_head_dim) up to which two CTAs of 64 rows share an SM. Beyond, no item runs beside
another that waits, and more and shorter ones cost more than they balance: 64 x (8192 + 512), 16/2
heads of 256, took 46 us with 184 items, 53 with 232."""


FULL_ROWS = 128
"""Packed query rows of each member of a run, above which the run fills its tiles: a prefill's. Long
items with full tiles hide their own waits, and beside decode they compute while it reads: in such a
batch only reading counts. 60 sequences of 4096 beside 2048 new tokens of 4096 took 389 us with
tiles of 128 rows, 409 with 64."""


class Costs(NamedTuple):
    """What a token costs in a batch: `reads` is 1 where its reading decides, 0 where what is
    computed does, of which DRAM is waited for by nobody. block: of one row block, `block_cost`, 0
    where computing does not count."""

    reads: int
    block: int


def block_cost(tile_m: int, head_dim: int, v_head_dim: int) -> int:
    """Of a token with a whole tile of rows, in 1 / COST_UNIT tokens; 0 where it is not counted."""
    paired = any(head_dim <= most and v_head_dim <= v_most for most, v_most in PAIRED_DIMS)
    return BLOCK_COST * tile_m // 64 if paired else 0


def costs_of(tokens: Int, in_blocks: Int, block: int) -> Costs:
    """Of a batch. tokens: of all its runs; in_blocks: the same, each times its run's row blocks;
    block: `block_cost`, 0 if a run `fills_tiles`."""
    return Costs(int(COST_UNIT * tokens >= block * in_blocks), block)


def fills_tiles(rows: Int, members: Int) -> Any:
    """Whether a run is a prefill's. rows: packed query rows of all its members."""
    return rows > FULL_ROWS * members


def read_cost(blocks: Int, tokens: Int = 1) -> Int:
    """Of reading a token for all row blocks of its run together, in 1 / COST_UNIT tokens.

    One block reads it from DRAM, 16 / 16; each of the others from L2, 5 / 16. Of several tokens:
    blocks are those of all of them.
    """
    return 11 * tokens + 5 * blocks


def token_cost(blocks: Int, costs: Costs) -> Int:
    """Of a token to all row blocks of its run together: the longer of reading and computing."""
    read, computed = costs.reads * read_cost(blocks), costs.block * blocks
    return read + (computed > read) * (computed - read)


def run_cost(tokens: Int, blocks: Int, costs: Costs) -> Int:
    """Cost of one work item over a whole run: the blocks share what a token costs."""
    return tokens * token_cost(blocks, costs) // blocks


def split_share(total_cost: int, costliest: int, cheapest: int, num_workers: int) -> int:
    """Cost of a split, in 1 / COST_UNIT tokens; 0 for no split.

    total_cost: of all work items before any split. costliest, cheapest: of them.
    num_workers: CTAs that run at the same time; 0 or 1 means nothing to balance.
    """
    if num_workers <= 1 or 4 * costliest * num_workers <= 5 * total_cost:
        return 0  # no item is much longer than a worker's share of all
    if costliest == cheapest:  # then one split for each worker is balance
        share = -(-total_cost // num_workers)
    else:
        two = -(-total_cost // (2 * num_workers))
        four = -(-total_cost // (4 * num_workers))
        share = max(min(two, COST_UNIT * LONG_SPLIT_TOKENS), four)
    few = total_cost < COST_UNIT * TILE_TOKENS * num_workers
    least = min(MIN_SPLIT_TOKENS, SHORT_SPLIT_TOKENS) if few else MIN_SPLIT_TOKENS
    return max(share, COST_UNIT * least)


def split_pages(pages: Int, blocks: Int, share: int, page_tokens: int, costs: Costs) -> Int:
    """Pages of a split of a run that has `pages` of them and is read by `blocks` row blocks.

    All splits of a run but the last are as long. A quarter of a share more is no split more.
    """
    unit = -(-TILE_TOKENS // page_tokens)  # pages
    tokens = share * blocks // token_cost(blocks, costs)
    length = (tokens // (unit * page_tokens) + 1) * unit
    splits = (4 * pages + 3 * length - 1) // (4 * length)
    splits = splits + (splits < 1) * 1
    per_split = -(-pages // splits)
    return -(-per_split // unit) * unit
