"""Split-KV: how KV runs are cut so that all workers end together. Pure arithmetic, no torch."""

from __future__ import annotations

MIN_SPLIT_TOKENS = 512
"""Shorter splits write more partial bytes than the balance wins back: at 512 tokens of one head a
partial result of head_dim 128 is 0.4 % of the KV bytes of the split (one query row)."""

ITEMS_PER_WORKER = 2
"""Work items per worker aimed at. Measured with the Hopper kernels over ten decode batches: 2 beats
3 and 4 in most (64 x 8192 with 90 % shared: 1.44, 1.50, 1.56 times the bound), since every split
more is a partial result more, and the longest items go first."""

TILE_TOKENS = 128
"""Splits are whole N tiles, so that only the last split of a run has a tile that is not full."""


def split_tokens(total_item_tokens: int, num_workers: int, page_tokens: int) -> int:
    """Tokens per split, a multiple of page_tokens; 0 for no split.

    total_item_tokens: KV tokens of all work items together, before any split.
    num_workers: CTAs that run at the same time; 0 or 1 means nothing to balance.
    """
    if num_workers <= 1:
        return 0
    share = -(-total_item_tokens // (num_workers * ITEMS_PER_WORKER))
    unit = page_tokens * -(-TILE_TOKENS // page_tokens)
    return -(-max(share, MIN_SPLIT_TOKENS) // unit) * unit
