"""Pools of every fp8 code, to expand pages of."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import torch

from tests.fp8 import FORMATS


@dataclass(frozen=True)
class ExpandCase:
    """`picked` page ids of a pool; heads_first: it lies as [pages, heads, tokens, columns]."""

    dtype: torch.dtype
    page_tokens: int
    heads: int
    columns: int
    picked: tuple[int, ...]
    heads_first: bool = False


def cases() -> list[ExpandCase]:
    """Pages of a token and of many, rows that fill a program's and that do not, none at all."""
    sizes = ((16, 2, 64), (1, 3, 48), (128, 2, 128), (8, 1, 256), (4, 5, 16))
    picks = ((5, 0, 3), (6,), ())
    return [
        ExpandCase(dtype, *size, picked, heads_first)
        for dtype, size, picked, heads_first in product(
            FORMATS.values(), sizes, picks, (False, True)
        )
    ]


def pool_of(case: ExpandCase, device: str) -> torch.Tensor:
    """[7 pages, tokens, heads, columns], NaN and infinity among its values."""
    shape = (7, case.page_tokens, case.heads, case.columns)
    codes = torch.randint(256, shape, generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    pool = codes.to(device).view(case.dtype)
    return pool.transpose(1, 2).contiguous().transpose(1, 2) if case.heads_first else pool


def differences(actual: torch.Tensor, pool: torch.Tensor, picked: tuple[int, ...]) -> int:
    """Elements of actual [at least picked, tokens, heads, columns], expanded from `pool`, that have
    other bits, NaN for any NaN; and those past the last picked page that are not 7."""
    codes = pool.view(torch.uint8).cpu()[list(picked)]
    wanted, found = codes.view(pool.dtype).to(torch.float16), actual[: len(picked)].cpu()
    wrong = found.contiguous().view(torch.int16) != wanted.view(torch.int16)
    wrong &= ~(found.isnan() & wanted.isnan())
    return int(wrong.sum()) + int((actual[len(picked) :] != 7).sum())
