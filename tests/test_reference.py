"""The specification against torch's scaled_dot_product_attention and against a loop in numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from flashcore import layout_from_page_table
from flashcore.reference import (
    attention_reference,
    paged_attention_reference,
    sequence_attention,
    visible_keys,
)
from tests import oracle


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Regimes: MHA, GQA and MQA; equal lengths and both kinds of unequal ones; one key.
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (5, 1)])
@pytest.mark.parametrize("lengths", [(7, 7), (3, 11), (11, 3), (4, 1)])
@pytest.mark.parametrize("causal", [False, True])
def test_against_sdpa(heads, lengths, causal):
    q, k, v = (
        normal(2, n, h, 16, seed=s)
        for s, (n, h) in enumerate(
            [(lengths[0], heads[0]), (lengths[1], heads[1]), (lengths[1], heads[1])]
        )
    )
    out, lse = attention_reference(q, k, v, causal=causal)
    mask = visible_keys(*lengths, causal)
    expected = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, enable_gqa=True
    ).transpose(1, 2)
    seen = mask.any(1)
    torch.testing.assert_close(out[:, seen], expected[:, seen], rtol=1e-12, atol=1e-12)
    assert bool((out[:, ~seen] == 0).all())
    assert bool((lse[:, ~seen] == -math.inf).all())


def test_sdpa_is_causal_uses_the_same_alignment_for_equal_lengths():
    q, k, v = (normal(1, 9, 2, 8, seed=s) for s in range(3))
    out, _ = attention_reference(q, k, v, causal=True, scale=0.3)
    args = (x.transpose(1, 2) for x in (q, k, v))
    expected = F.scaled_dot_product_attention(*args, is_causal=True, scale=0.3).transpose(1, 2)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("window", [(-1, -1), (2, 0), (0, 3), (4, -1), (-1, 1)])
@pytest.mark.parametrize("options", ["plain", "softcap", "sinks", "tree"])
def test_every_rule_against_a_loop(window, options):
    n, m = 5, 12
    q, k, v = normal(n, 4, 8), normal(m, 2, 8, seed=1), normal(m, 2, 8, seed=2)
    rng = np.random.default_rng(0)
    extra = {
        "plain": {},
        "softcap": {"softcap": 1.5},
        "sinks": {"sinks": torch.tensor([0.5, -1.0, 3.0, 0.0], dtype=torch.float64)},
        "tree": {"tree_mask": torch.from_numpy(rng.random((n, n + 2)) < 0.5)},
    }[options]
    out, lse = sequence_attention(q, k, v, causal=True, scale=0.4, window=window, **extra)
    plain = {name: x.numpy() if isinstance(x, torch.Tensor) else x for name, x in extra.items()}
    expected = oracle.attention(
        q.numpy(), k.numpy(), v.numpy(), scale=0.4, causal=True, window=window, **plain
    )
    np.testing.assert_allclose(out.numpy(), expected[0], rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(lse.numpy(), expected[1], rtol=1e-12)


def test_packed_equals_batched():
    q, k, v = normal(3, 5, 4, 8), normal(3, 7, 2, 8, seed=1), normal(3, 7, 2, 8, seed=2)
    batched = attention_reference(q, k, v, causal=True)
    ends_q, ends_k = torch.tensor([0, 5, 10, 15]), torch.tensor([0, 7, 14, 21])
    packed = attention_reference(
        q.flatten(0, 1),
        k.flatten(0, 1),
        v.flatten(0, 1),
        causal=True,
        cu_seqlens_q=ends_q,
        cu_seqlens_k=ends_k,
    )
    for a, b in zip(batched, packed, strict=True):
        assert torch.equal(a.flatten(0, 1), b)


def test_keys_that_nobody_may_see_have_no_influence():
    q, k, v = normal(3, 2, 8), normal(9, 2, 8, seed=1), normal(9, 2, 8, seed=2)
    expected = sequence_attention(q, k, v, causal=True, scale=0.4, window=(2, 0))
    k[:4], v[:4] = math.nan, math.inf
    for a, b in zip(
        sequence_attention(q, k, v, causal=True, scale=0.4, window=(2, 0)), expected, strict=True
    ):
        assert torch.equal(a, b)


def test_query_lengths_may_be_a_tensor():
    """Its elements are tensors, and adding them up in place would move slices already taken."""
    pages, table = normal(8, 4, 2, 16), torch.arange(8, dtype=torch.int32).view(2, 4)
    layout = layout_from_page_table(table, torch.tensor([13, 9]), page_tokens=4)
    q = normal(5, 4, 16, seed=1)
    expected = paged_attention_reference(q, pages, -pages, layout, [2, 3])
    found = paged_attention_reference(q, pages, -pages, layout, torch.tensor([2, 3]))
    assert all(map(torch.equal, found, expected))
