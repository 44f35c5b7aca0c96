"""Memory that is used again from call to call on the CPU.

Fresh memory costs a page fault per 4 KiB: in a decode step whose work is one pass over the KV cache
that was a third of the time. GPUs have a caching allocator, and streams that must not share.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

KEPT_BYTES = 8 << 20
"""What is kept per purpose and thread; more is asked for anew."""


Buffers = dict[tuple[str, torch.dtype], torch.Tensor]
"""By purpose and dtype."""


class _Kept(threading.local):
    def __init__(self) -> None:
        self.buffers: Buffers = {}
        self.lent: list[Buffers] = []


_kept = _Kept()


def own_buffers(count: int) -> list[Buffers]:
    """Of this thread, to be lent to others that work for it."""
    _kept.lent += [{} for _ in range(count - len(_kept.lent))]
    return _kept.lent[:count]


@contextmanager
def use_buffers(buffers: Buffers) -> Iterator[None]:
    """Instead of this thread's own."""
    before, _kept.buffers = _kept.buffers, buffers
    try:
        yield
    finally:
        _kept.buffers = before


def scratch(purpose: str, shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
    """Uninitialised memory, good until the next call for the same purpose on this thread."""
    count = math.prod(shape)
    if like.device.type != "cpu" or count * like.element_size() > KEPT_BYTES:
        return like.new_empty(shape)
    key = (purpose, like.dtype)
    kept = _kept.buffers.get(key)
    if kept is None or kept.numel() < count:
        with torch.inference_mode(False):  # a tensor made in that mode could not be used outside it
            kept = torch.empty(KEPT_BYTES // like.element_size(), dtype=like.dtype)
        _kept.buffers[key] = kept
    return kept[:count].view(shape)
