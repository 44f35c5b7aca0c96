"""Split-KV: how KV runs are cut so that all workers end together. Pure integer arithmetic, for
numbers and for tensors alike, no torch; the kernels of the planner do the same.

Measured with the Hopper kernels over ten decode batches (docs/experiments/paged.md): every split
more is a partial result more and a pause of its consumers, so as few as balance allows.
"""

from __future__ import annotations

from typing import Any

Int = Any  # int, or an integer tensor

COST_UNIT = 16
"""Costs are counted in sixteenths of a token that is read from DRAM."""

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


def token_cost(blocks: Int) -> Int:
    """Cost of a token to all row blocks of its run together, in 1 / COST_UNIT tokens.

    One block reads it from DRAM, 16 / 16; each of the others from L2, 5 / 16.
    """
    return 11 + 5 * blocks


def run_cost(tokens: Int, blocks: Int) -> Int:
    """Cost of one work item over a whole run: the blocks share what a token costs."""
    return tokens * token_cost(blocks) // blocks


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


def split_pages(pages: Int, blocks: Int, share: int, page_tokens: int) -> Int:
    """Pages of a split of a run that has `pages` of them and is read by `blocks` row blocks.

    All splits of a run but the last are as long. A quarter of a share more is no split more.
    """
    unit = -(-TILE_TOKENS // page_tokens)  # pages
    tokens = share * blocks // token_cost(blocks)
    length = (tokens // (unit * page_tokens) + 1) * unit
    splits = (4 * pages + 3 * length - 1) // (4 * length)
    splits = splits + (splits < 1) * 1
    per_split = -(-pages // splits)
    return -(-per_split // unit) * unit
