"""vLLM's batch specifications for attention backends, with blocks that the sequences share.

Lengths and shapes are those of vLLM's own tests of its backends; there no two sequences have a
block in common, here every batch has some.
"""

from __future__ import annotations

from dataclasses import replace

from tests.serving_cases import Request
from tests.vllm.batches import Setup

# Name: lengths of sequences with their new tokens, and how many of them are new.
SPECIFICATIONS: dict[str, tuple[list[int], list[int]]] = {
    "small_decode": ([32, 40], [1, 1]),
    "small_prefill": ([32, 40], [8, 8]),
    "mixed_small": ([32, 40, 48, 56], [1, 1, 5, 5]),
    "medium_decode": ([128, 256, 512, 1024] * 2, [1] * 8),
    "medium_prefill": ([256, 512, 1024, 2048], [16] * 4),
    "mixed_medium": ([512, 1024, 2048] * 2, [1, 1, 1, 7, 7, 7]),
    "large_decode": ([2048] * 32, [1] * 32),
    "large_prefill": ([4096] * 8, [32] * 8),
    "mixed_large": ([1024, 2048, 4096] * 2, [1, 1, 1, 32, 32, 32]),
    "single_decode": ([1024] * 2, [1] * 2),  # a second sequence, since one shares with nobody
    "single_prefill": ([1024] * 2, [64] * 2),
    "drafts": ([35, 43], [3, 3]),
}
# Those with windows, those with heads as on one of several GPUs, and the rest.
WINDOWED = (
    *("small_decode", "small_prefill", "mixed_medium"),
    *("large_decode", "large_prefill", "mixed_large"),
)
SMALL = ("small_decode", "small_prefill", "mixed_small")
WINDOW = 2047
LLAMA, PHI = (32, 8), (16, 4)  # Llama 3 8B, Phi-tiny-MoE: heads of 128
RANKS = (1, 2, 4)
HEADS = {ranks: (LLAMA[0] // ranks, LLAMA[1] // ranks) for ranks in RANKS}
PHI_HEADS = {ranks: (PHI[0] // ranks, PHI[1] // ranks) for ranks in RANKS}


def requests(name: str) -> list[Request]:
    """A batch: every other sequence shares its whole prefix, the others half of it."""
    pairs = zip(*SPECIFICATIONS[name], strict=True)
    return [
        Request(length - new, new, shared=(length - new) // (1 + place % 2))
        for place, (length, new) in enumerate(pairs)
    ]


def server(setup: Setup) -> Setup:
    """With room for the largest of these batches."""
    return replace(setup, layers=1, max_batch=33, max_context=4096, max_tokens=512)
