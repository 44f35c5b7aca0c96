"""The fold of chunks against attention written directly."""

from __future__ import annotations

import math

import pytest
import torch

from flashcore.reference import sequence_attention
from flashcore.reference_fold import chunked_attention, fold_chunks


def made(queries: int, keys: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((queries, 4, 8), (keys, 2, 8), (keys, 2, 8))
    return tuple(torch.randn(s, generator=generator, dtype=torch.float64) * 3 for s in shapes)


@pytest.mark.parametrize("sinks", [None, torch.tensor([-2.0, 0.0, 5.0, -math.inf])])
@pytest.mark.parametrize("softcap", [0.0, 4.0])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 40), (37, 37), (9, 33), (16, 16)])
def test_it_is_attention(queries: int, keys: int, softcap: float, sinks: torch.Tensor | None):
    q, k, v = made(queries, keys)
    rules = {"causal": True, "scale": 0.3, "softcap": softcap, "sinks": sinks}
    expected = sequence_attention(q, k, v, **rules)
    for found, wanted in zip(
        chunked_attention(q, k, v, chunk_tokens=8, **rules), expected, strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_prefill_equals_decode_bit_for_bit(dtype: torch.dtype):
    q, k, v = (x.to(dtype) for x in made(30, 30))
    rules = {"causal": True, "scale": 0.3, "chunk_tokens": 8}
    at_once = chunked_attention(q, k, v, **rules)
    for n in range(1, 31):
        one = chunked_attention(q[n - 1 : n], k[:n], v[:n], **rules)
        for found, wanted in zip(one, at_once, strict=True):
            assert torch.equal(found[0], wanted[n - 1])


def test_a_chunk_without_a_key_changes_no_bit():
    generator = torch.Generator().manual_seed(1)
    outs, lses = torch.randn(5, 3, 8, generator=generator), torch.randn(5, 3, generator=generator)
    outs[2, 0] = -0.0
    expected = fold_chunks(outs, lses)
    for place in range(6):
        empty = torch.zeros(1, 3, 8), torch.full((1, 3), -math.inf)
        parts = (
            torch.cat([x[:place], e, x[place:]]) for x, e in zip((outs, lses), empty, strict=True)
        )
        for found, wanted in zip(fold_chunks(*parts), expected, strict=True):
            assert torch.equal(found.view(torch.int32), wanted.view(torch.int32))


def test_one_chunk_is_its_own_result():
    outs, lses = torch.tensor([[1.5, -0.0, 2e-42]]), torch.tensor([3.25])
    out, lse = fold_chunks(outs[:, None], lses[:, None])
    assert torch.equal(out[0].view(torch.int32), outs[0].view(torch.int32))
    assert lse == 3.25


def test_nothing_at_all():
    out, lse = fold_chunks(torch.ones(2, 1, 4), torch.full((2, 1), -math.inf))
    assert out.eq(0).all()
    assert lse == -math.inf
    out, lse = fold_chunks(torch.ones(2, 1, 4), torch.full((2, 1), -math.inf), torch.tensor([2.0]))
    assert out.eq(0).all()
    assert lse == 2.0
