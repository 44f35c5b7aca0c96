"""Dense attention with torch operators against the reference."""

from __future__ import annotations

import math

import pytest
import torch

import flashcore
from flashcore.reference import attention_reference
from tests.compare import assert_close

RULES = {
    "full": {},
    "causal": {"causal": True},
    "window": {"window": (3, 2)},
    "causal_window": {"causal": True, "window": (4, -1)},
    "softcap": {"softcap": 1.5, "causal": True},
    "sinks": {"sinks": torch.tensor([1.0, -2.0, 0.0, 5.0])},
    "scale": {"scale": 0.05},
}


def tensors(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=rng).to(dtype) for shape in shapes]


# Lengths: equal, more keys, more queries than keys (rows that see nothing), one query, no keys.
@pytest.mark.parametrize("lengths", [(17, 17), (5, 33), (33, 5), (1, 40), (4, 0), (0, 4)])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("rule", RULES)
def test_batched(lengths, kv_heads, rule):
    q, k, v = tensors((2, lengths[0], 4, 24), *[(2, lengths[1], kv_heads, 24)] * 2)
    expected = attention_reference(q, k, v, **RULES[rule])
    out, lse = flashcore.attention(q, k, v, return_lse=True, **RULES[rule])
    assert_close(out, expected[0], torch.float32)
    assert_close(lse, expected[1], torch.float32)
    assert torch.equal(flashcore.attention(q, k, v, **RULES[rule]), out)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_packed(rule, dtype):
    """Packed sequences, some without queries or keys; NaN stands beyond the last one's end."""
    ends_q = torch.tensor([0, 5, 5, 9, 9, 16], dtype=torch.int32)
    ends_k = torch.tensor([0, 7, 10, 10, 21, 30], dtype=torch.int32)
    q, k, v = tensors((16, 4, 32), (40, 2, 32), (40, 2, 32), dtype=dtype)
    k[30:], v[30:] = math.nan, math.nan
    options = {"cu_seqlens_q": ends_q, "cu_seqlens_k": ends_k, **RULES[rule]}
    expected = attention_reference(q, k[:30], v[:30], **options)
    out, lse = flashcore.attention(q, k[:30], v[:30], return_lse=True, max_seqlen_q=7, **options)
    assert_close(out, expected[0], dtype)
    assert_close(lse, expected[1], torch.float32)


def call(**changes):
    q, k, v = tensors((2, 6, 4, 16), (2, 8, 2, 16), (2, 8, 2, 16))
    return flashcore.attention(**{"q": q, "k": k, "v": v, **changes})


def packed(**changes):
    q, k, v = tensors((6, 4, 16), (8, 2, 16), (8, 2, 16))
    ends_q, ends_k = torch.tensor([0, 2, 6]).int(), torch.tensor([0, 8, 8]).int()
    options = {"cu_seqlens_q": ends_q, "cu_seqlens_k": ends_k, **changes}
    return flashcore.attention(q, k, v, **options)


@pytest.mark.parametrize(
    ("function", "changes", "error", "message"),
    [
        (call, {"q": torch.zeros(2, 6, 3, 16)}, ValueError, "num_q_heads must be a multiple of"),
        (call, {"q": torch.zeros(2, 6, 4, 8)}, ValueError, r"k must have the head_dim of q \(8"),
        (call, {"q": torch.zeros(3, 6, 4, 16)}, ValueError, r"k must have the batch size of q \(3"),
        (call, {"q": torch.zeros(6, 16)}, ValueError, "q must have 3 or 4 dimensions"),
        (call, {"v": torch.zeros(2, 7, 2, 16)}, ValueError, "v must have the shape of k"),
        (call, {"v": torch.zeros(2, 8, 2, 16).half()}, TypeError, "v must have the dtype of q"),
        (call, {"q": [1]}, TypeError, r"q must be a torch\.Tensor, got list"),
        (call, {"cu_seqlens_q": torch.zeros(2).int()}, ValueError, "cu_seqlens_q and cu_seqlens_k"),
        (packed, {"cu_seqlens_k": None}, ValueError, "cu_seqlens_q and cu_seqlens_k are needed"),
        (packed, {"cu_seqlens_q": torch.tensor([0, 2, 6])}, TypeError, "must have dtype int32"),
        (packed, {"cu_seqlens_q": torch.tensor([0, 2, 5]).int()}, ValueError, "from 0 to 6"),
        (packed, {"cu_seqlens_q": torch.tensor([0, 7, 6]).int()}, ValueError, "must not decrease"),
        (packed, {"cu_seqlens_k": torch.tensor([0, 8]).int()}, ValueError, r"cu_seqlens_q \(3\)"),
        (packed, {"max_seqlen_q": 3}, ValueError, r"at least the longest .* \(4\), got 3"),
    ],
)
def test_attention_names_what_is_wrong(function, changes, error, message):
    with pytest.raises(error, match=message):
        function(**changes)
