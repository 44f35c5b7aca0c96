"""A Triton kernel that reads and does next to nothing else. Importing it needs Triton."""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl

SHAPES = ((132 * 4, 8192, 8), (132 * 8, 4096, 8), (132 * 16, 4096, 4), (132 * 2, 16384, 16))
"""(programs, words a step, warps)"""


@triton.jit  # type: ignore[untyped-decorator]
def _read(words, out, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    found = tl.zeros([BLOCK], dtype=tl.int32)
    step = tl.num_programs(0).to(tl.int64) * BLOCK
    begin = tl.program_id(0).to(tl.int64) * BLOCK
    while begin < count:
        place = begin + tl.arange(0, BLOCK)
        found ^= tl.load(words + place, mask=place < count, other=0)
        begin += step
    tl.store(out + tl.program_id(0), tl.sum(found, 0))


def reader(words: torch.Tensor, shape: tuple[int, int, int]) -> Callable[[], torch.Tensor]:
    """A call that reads all of `words` (int32) once."""
    programs, block, warps = shape
    out = torch.empty(programs, dtype=torch.int32, device=words.device)

    def call() -> torch.Tensor:
        _read[(programs,)](words, out, words.numel(), BLOCK=block, num_warps=warps)
        return out

    return call
