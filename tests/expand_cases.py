"""Pools of every fp8 code, to expand pages of."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import torch

from tests.fp8 import FORMATS


@dataclass(frozen=True)
class ExpandCase:
    """`picked` page ids of pools, that of V with so many fewer columns; heads_first: they lie as
    [pages, heads, tokens, columns]."""

    dtype: torch.dtype
    page_tokens: int
    heads: int
    columns: int
    picked: tuple[int, ...]
    heads_first: bool = False
    fewer: int = 0


def cases() -> list[ExpandCase]:
    """Pages of a token and of many, rows that fill a program's and that do not, none at all."""
    sizes = ((16, 2, 64), (1, 3, 48), (128, 2, 128), (8, 1, 256), (4, 5, 16))
    picks = ((5, 0, 3), (6,), ())
    return [
        ExpandCase(dtype, *size, picked, heads_first, fewer=16 * heads_first * (size[2] > 16))
        for dtype, size, picked, heads_first in product(
            FORMATS.values(), sizes, picks, (False, True)
        )
    ]


def pools_of(case: ExpandCase, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V [7 pages, tokens, heads, columns], NaN and infinity among their values."""
    generator, found = torch.Generator().manual_seed(1), []
    for columns in (case.columns, case.columns - case.fewer):
        shape = (7, case.page_tokens, case.heads, columns)
        codes = torch.randint(256, shape, generator=generator).to(torch.uint8)
        pool = codes.to(device).view(case.dtype)
        if case.heads_first:
            pool = pool.transpose(1, 2).contiguous().transpose(1, 2)
        found.append(pool)
    return found[0], found[1]


def targets_of(
    pools: tuple[torch.Tensor, torch.Tensor], pages: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Room for so many pages of each, full of sevens."""
    k, v = (
        torch.full((pages, p.shape[2], p.shape[1], p.shape[3]), 7.0, device=p.device)
        .to(torch.float16)
        .transpose(1, 2)
        for p in pools
    )
    return k, v


def differences(actual: torch.Tensor, pool: torch.Tensor, picked: tuple[int, ...]) -> int:
    """Elements of actual [at least picked, tokens, heads, columns], expanded from `pool`, that have
    other bits, NaN for any NaN; and those past the last picked page that are not 7."""
    codes = pool.view(torch.uint8).cpu()[list(picked)]
    wanted, found = codes.view(pool.dtype).to(torch.float16), actual[: len(picked)].cpu()
    wrong = found.contiguous().view(torch.int16) != wanted.view(torch.int16)
    wrong &= ~(found.isnan() & wanted.isnan())
    return int(wrong.sum()) + int((actual[len(picked) :] != 7).sum())
