"""The chunks in which a batch-invariant plan's sequences are taken, for planner and kernels."""

CHUNK_TOKENS = 1024
"""Of two kinds of cost (docs/experiments/planner.md#batch-invariant-plans): shorter ones write more
partial results (512 tokens for 64 sequences of 32 heads: as many bytes as the chunk's K and V),
longer ones leave workers idle (2048: two items a worker at 1 x 131072)."""

TILE_M = 64
"""Packed rows of a tile where `tallest_tile` is no more."""


def tallest_tile(v_head_dim: int) -> int:
    """Packed rows of a tile at most: the running total of an item of several chunks has its place
    beside Q, K and V in shared memory."""
    return 2 * TILE_M if v_head_dim <= 128 else TILE_M
