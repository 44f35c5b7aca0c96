"""Prefill equals decode bit for bit on the torch path.

What tests/gpu/test_deterministic_gpu.py asks of the kernels, of fewer and smaller sequences.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

import flashcore
from flashcore.contract.chunks import CHUNK_TOKENS
from flashcore.reference import sequence_attention

HEADS, DIM = (4, 2), 16
LENGTHS = (2 * CHUNK_TOKENS + 70, CHUNK_TOKENS + 90, CHUNK_TOKENS, 90)
COMMON = CHUNK_TOKENS + 80  # tokens that the first two have in common
Stretch = tuple[int, int, int]  # sequence, first query token, how many


def contents(dtype: torch.dtype) -> list[list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    found = [
        [
            (torch.randn(n, heads, DIM, generator=generator) * 2).to(dtype)
            for heads in (HEADS[0], HEADS[1], HEADS[1])
        ]
        for n in LENGTHS
    ]
    for kind in (1, 2):
        found[1][kind][:COMMON] = found[0][kind][:COMMON]
    return found


def attend(
    data: list[list[torch.Tensor]],
    stretches: list[Stretch],
    page_tokens: int = 16,
    shared: bool = True,
    rules: dict[str, Any] | None = None,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """In one batch, over a pool made for it; past a sequence's end it holds NaN."""
    owned: dict[tuple[int, int], int] = {}
    tables = []
    for place, (s, begin, n) in enumerate(stretches):
        table = []
        for page in range(-(-(begin + n) // page_tokens)):
            common = s == 1 and (page + 1) * page_tokens <= COMMON
            key = (0 if common else s, page) if shared else (-1 - place, page)
            table.append(owned.setdefault(key, len(owned)))
        tables.append(table)
    pools = [torch.full((len(owned), page_tokens, HEADS[1], DIM), math.nan).to(data[0][0].dtype)
             for _ in range(2)]  # fmt: skip
    for (s, *_), table in zip(stretches, tables, strict=True):
        for page, number in enumerate(table):
            rows = slice(page * page_tokens, min((page + 1) * page_tokens, LENGTHS[s]))
            for pool, kind in zip(pools, (1, 2), strict=True):
                part = data[s][kind][rows]
                pool[number, : len(part)] = part
    width = max(map(len, tables))
    table = torch.tensor([t + [0] * (width - len(t)) for t in tables], dtype=torch.int32)
    lens = torch.tensor([begin + n for _, begin, n in stretches], dtype=torch.int32)
    layout = flashcore.layout_from_page_table(table, lens, page_tokens=page_tokens)
    plan = flashcore.plan(
        layout,
        q_lens=[n for *_, n in stretches],
        num_q_heads=HEADS[0],
        num_kv_heads=HEADS[1],
        head_dim=DIM,
        batch_invariant=True,
        **options,
    )
    q = torch.cat([data[s][0][begin : begin + n] for s, begin, n in stretches])
    return flashcore.paged_attention(q, *pools, plan, return_lse=True, **(rules or {}))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rule", ["causal", "sinks", "softcap", "window"])
def test_bits(dtype: torch.dtype, rule: str):
    rules: dict[str, Any] = {
        "causal": {},
        "sinks": {"sinks": torch.tensor([-1.0, 0.0, 3.0, 9.0])},
        "softcap": {"softcap": 8.0},
        "window": {"window": (CHUNK_TOKENS + 100, 0)},
    }[rule]
    data = contents(dtype)
    expected = [attend(data, [(s, 0, n)], rules=rules) for s, n in enumerate(LENGTHS)]
    rng = np.random.default_rng(2)
    for _ in range(12):
        stretches = []
        for _ in range(int(rng.integers(1, 6))):
            s = int(rng.integers(len(LENGTHS)))
            n = min(int(rng.choice([1, 1, 3, 40, 80])), LENGTHS[s])
            stretches.append((s, int(rng.integers(LENGTHS[s] - n + 1)), n))
        found = attend(
            data,
            stretches,
            int(rng.choice([1, 16, 64])),
            bool(rng.integers(2)),
            rules,
            fold=[True, False, "always"][int(rng.integers(3))],
            num_workers=int(rng.integers(0, 90)),
        )
        for which in range(2):
            wanted = torch.cat([expected[s][which][b : b + n] for s, b, n in stretches])
            assert torch.equal(found[which], wanted), stretches


def test_against_the_reference():
    data = contents(torch.float32)
    for s, (q, k, v) in enumerate(data):
        expected = sequence_attention(
            *(x.double() for x in (q, k, v)), causal=True, scale=DIM**-0.5
        )
        for found, wanted in zip(attend(data, [(s, 0, LENGTHS[s])]), expected, strict=True):
            torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
