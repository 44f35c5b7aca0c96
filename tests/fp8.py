"""Batches on fp8 pages: what they hold, their scales, and NaN codes where nobody may look."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import torch

from flashcore.sm90.config.paged import PagedConfig
from tests.cases import Batch

FORMATS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


def fp8_tensors(
    batch: Batch, pages: torch.dtype, dtype: torch.dtype = torch.float16
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `Batch.tensors`: q in `dtype`; K and V in `pages`, whose NaN poison has both signs."""
    q, k, v = batch.tensors(dtype)
    stored = []
    for x in (k, v):
        codes = x.to(pages).view(torch.uint8)
        stored.append(torch.where(x.isnan(), 0xFF, codes).to(torch.uint8).view(pages))
    return q, stored[0], stored[1]


def scales(batch: Batch, kind: str) -> dict[str, Any]:
    """Keyword arguments: none, one for all heads, one for each, one of each kind."""
    g = torch.Generator().manual_seed(batch.seed + 3)
    heads = batch.num_kv_heads
    return {
        "none": {},
        "one": {"k_scale": torch.tensor(0.37), "v_scale": torch.tensor(2.9)},
        "heads": {
            "k_scale": torch.rand(heads, generator=g) + 0.25,
            "v_scale": torch.rand(heads, generator=g) * 5 + 0.1,
        },
        "mixed": {"v_scale": torch.rand(2 * heads, generator=g)[::2] + 0.1},
    }[kind]


@contextmanager
def chosen(**changes: Any) -> Iterator[None]:
    """Attention kernels of fp8 pages with these fields of their configurations; few_rows at most
    where they serve few rows at all."""
    from flashcore.sm90.launch import paged

    def choose(*call: Any) -> Any:
        return changed(paged.choose(*call), **changes)

    with mock.patch.object(paged, "_choose", choose):
        yield


def changed(config: PagedConfig, **changes: Any) -> PagedConfig:
    if not config.kv_dtype:
        return config
    few_rows = min(changes.pop("few_rows", config.few_rows), config.few_rows)
    return replace(config, few_rows=few_rows, **changes)


def in_fp16() -> AbstractContextManager[None]:
    """All items through stages of fp16, those of few rows too: sums are those of fp16 pages."""
    return chosen(few_rows=0)
