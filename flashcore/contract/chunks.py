"""The chunks in which a batch-invariant plan's sequences are taken, for planner and kernels."""

CHUNK_TOKENS = 1024
"""Of two kinds of cost (docs/experiments/planner.md#batch-invariant-plans): shorter ones write more
partial results (512 tokens for 64 sequences of 32 heads: as many bytes as the chunk's K and V),
longer ones leave workers idle (2048: two items a worker at 1 x 131072)."""
