"""Uninitialised tensors on the current device at the least cost to the host."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch


class Buffer(NamedTuple):
    """The arguments of an `Allocate`."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype


Allocate = Callable[[tuple[int, ...], tuple[int, ...], torch.dtype], torch.Tensor]


def allocator(device: torch.device) -> Allocate:
    """Makes uninitialised tensors on `device`, which must be the current one when it is called.

    torch.empty spends half of its time in the dispatcher. Where torch has the function that the
    code of its compiler calls instead, with the same allocator behind it, that one is taken.
    """
    guards = getattr(getattr(torch._C, "_dynamo", None), "guards", None)
    direct: Allocate | None = getattr(guards, f"_empty_strided_{device.type}", None)
    if direct is not None:
        return direct

    def dispatched(
        shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype
    ) -> torch.Tensor:
        return torch.empty_strided(shape, strides, dtype=dtype, device=device)

    return dispatched


def contiguous(shape: Sequence[int], dtype: torch.dtype) -> Buffer:
    """A contiguous buffer of this shape."""
    strides = []
    step = 1
    for extent in reversed(shape):
        strides.append(step)
        step *= max(extent, 1)
    return Buffer(tuple(shape), tuple(reversed(strides)), dtype)
