"""Paged attention with torch operators against the oracle and the reference, on hostile batches."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import flashcore
from flashcore.eager import run
from flashcore.reference import paged_attention_reference
from tests import oracle
from tests.cases import Batch, batches
from tests.compare import assert_close, assert_lse_close, relative_error
from tests.test_layout import rows_of


def rules(batch: Batch, name: str) -> dict:
    """Keyword arguments of one regime; names say which code they reach."""
    rng = torch.Generator().manual_seed(batch.seed + 2)
    return {
        "causal": {},
        "full": {"causal": False, "scale": 0.7},
        "window": {"window": (3, 0)},
        "window_both": {"window": (2, 1), "causal": False},
        "softcap": {"softcap": 2.0},
        "sinks": {"sinks": torch.randn(batch.num_q_heads, generator=rng)},
        "tree": {"tree_mask": batch.tree_mask()},
        "everything": {
            "tree_mask": batch.tree_mask(),
            "window": (6, 2),
            "softcap": 5.0,
            "sinks": torch.randn(batch.num_q_heads, generator=rng),
        },
    }[name]


REGIMES = [
    "causal", "full", "window", "window_both", "softcap", "sinks", "tree", "everything"
]  # fmt: skip


@settings(max_examples=250, deadline=None)
@given(batches(), st.sampled_from(REGIMES), st.booleans(), st.booleans(), st.sampled_from([0, 5]))
def test_against_reference(batch: Batch, regime: str, fold: bool, share: bool, workers: int):
    q, k, v = batch.tensors()
    plan = batch.plan(fold=fold, share=share, num_workers=workers)
    options = rules(batch, regime)
    expected = paged_attention_reference(q, k, v, batch.layout, batch.q_lens, **options)
    out, lse = flashcore.paged_attention(q, k, v, plan, return_lse=True, **options)
    assert out.dtype == q.dtype
    assert lse.dtype == torch.float32
    assert_close(out, expected[0], torch.float32)
    assert_lse_close(lse, expected[1])


@settings(max_examples=60, deadline=None)
@given(batches(max_batch=3), st.sampled_from(REGIMES))
def test_against_oracle(batch: Batch, regime: str):
    q, k, v = batch.tensors()
    options = rules(batch, regime)
    out, lse = flashcore.paged_attention(q, k, v, batch.plan(), return_lse=True, **options)
    tree, sinks = options.get("tree_mask"), options.get("sinks")
    rows = rows_of(batch.layout)
    first = 0
    for row, (length, n) in enumerate(zip(batch.kv_lens, batch.q_lens, strict=True)):
        own = slice(first, first + n)
        first += n
        ids = [(page, slot) for page, count in rows[row] for slot in range(count)]
        assert len(ids) == length

        def take(pages, ids=ids):
            rows = [pages[page, slot].tolist() for page, slot in ids]
            return np.array(rows).reshape(len(ids), *pages.shape[2:])

        expected = oracle.attention(
            q[own].double().numpy(),
            take(k),
            take(v),
            scale=options.get("scale", 1 / math.sqrt(batch.head_dim)),
            causal=options.get("causal", True),
            window=options.get("window", (-1, -1)),
            softcap=options.get("softcap", 0.0),
            sinks=None if sinks is None else sinks.numpy(),
            tree_mask=None if tree is None else tree[own].numpy(),
        )
        assert_close(out[own], torch.from_numpy(expected[0]), torch.float32)
        assert_close(lse[own], torch.from_numpy(expected[1]), torch.float32)


@settings(max_examples=60, deadline=None)
@given(batches(), st.sampled_from([1, 3, 16]), st.sampled_from([1, 7, 64]))
def test_chunks_change_nothing(batch: Batch, keys: int, scores: int):
    """Long runs are taken in pieces; here every run is long."""
    q, k, v = batch.tensors()
    options = rules(batch, "everything")
    expected = paged_attention_reference(q, k, v, batch.layout, batch.q_lens, **options)
    before = run.KEYS_PER_CHUNK, run.SCORES_PER_CHUNK
    try:
        run.KEYS_PER_CHUNK, run.SCORES_PER_CHUNK = keys, scores
        out, lse = flashcore.paged_attention(q, k, v, batch.plan(), return_lse=True, **options)
    finally:
        run.KEYS_PER_CHUNK, run.SCORES_PER_CHUNK = before
    assert_close(out, expected[0], torch.float32)
    assert_close(lse, expected[1], torch.float32)


def shared_batch(dtype_seed: int = 0) -> Batch:
    """Decode, chunked prefill and verify beside each other on one prefix of three pages."""
    table = torch.arange(4 * 8).view(4, 8).int()
    table[:, :3] = table[0, :3]
    return Batch(table, [100, 128, 70, 81], [1, 40, 6, 1], 16, 32, 8, 2, 64, seed=dtype_seed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_good_as_torch(dtype):
    """Within twice the error of scaled_dot_product_attention on the same rounded inputs."""
    batch = shared_batch()
    q, k, v = batch.tensors(dtype, poison=False)
    expected, _ = paged_attention_reference(q, k, v, batch.layout, batch.q_lens)
    theirs = torch.empty_like(q)
    first = 0
    for row, (length, n) in enumerate(zip(batch.kv_lens, batch.q_lens, strict=True)):
        pages = batch.page_table[row, : -(-length // 16)].long()
        keys, values = (x[pages].flatten(0, 1)[:length].transpose(0, 1)[None] for x in (k, v))
        mask = torch.arange(length) <= torch.arange(n)[:, None] + length - n
        own = slice(first, first + n)
        theirs[own] = F.scaled_dot_product_attention(
            q[own].transpose(0, 1)[None], keys, values, attn_mask=mask, enable_gqa=True
        )[0].transpose(0, 1)
        first += n
    out = flashcore.paged_attention(q, k, v, batch.plan())
    assert out.dtype == dtype
    assert relative_error(out, expected) <= 2 * relative_error(theirs, expected)
    assert_close(out, expected, dtype)


def test_either_page_order_and_any_strides():
    batch = shared_batch()
    q, k, v = batch.tensors()
    expected = flashcore.paged_attention(q, k, v, batch.plan())
    heads_first = k.transpose(1, 2).contiguous().transpose(1, 2)
    both = torch.stack([v, v], 1)[:, 0]  # K and V interleaved in one pool
    wide = torch.cat([q, q], -1)[..., : q.shape[-1]]
    assert not both.is_contiguous()
    assert not wide.is_contiguous()
    assert torch.equal(flashcore.paged_attention(wide, heads_first, both, batch.plan()), expected)


def test_same_bits_every_time():
    batch = shared_batch()
    q, k, v = batch.tensors()
    plan = batch.plan(num_workers=4)
    first = flashcore.paged_attention(q, k, v, plan, return_lse=True)
    for _ in range(5):
        again = flashcore.paged_attention(q, k, v, plan, return_lse=True)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_poison_has_teeth():
    """The reference itself turns NaN when it reads one row too many, so the poison can be felt."""
    batch = shared_batch()
    q, k, v = batch.tensors()
    longer = flashcore.layout_from_page_table(
        batch.page_table, torch.tensor([101, 128, 70, 81]), page_tokens=16
    )
    out, _ = paged_attention_reference(q, k, v, longer, batch.q_lens)
    assert bool(torch.isnan(out).any())


def call(**changes):
    batch = shared_batch()
    q, k, v = batch.tensors()
    arguments = {"q": q, "k_pages": k, "v_pages": v, "plan": batch.plan(), **changes}
    return flashcore.paged_attention(**arguments)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"q": torch.zeros(48, 8, 64, dtype=torch.int32)}, TypeError, "q must have dtype float32,"),
        ({"q": torch.zeros(48, 8, 64).bfloat16()}, TypeError, "k_pages must have the dtype of q"),
        ({"q": torch.zeros(47, 8, 64)}, ValueError, r"q must have the plan's .* \(48, 8, 64\)"),
        ({"q": torch.zeros(48, 8, 32)}, ValueError, r"head_dim\] = \(48, 8, 64\), got \(48, 8, 32"),
        ({"q": torch.zeros(48, 8, 64, 1)}, ValueError, "q must have 3 dimensions"),
        ({"q": torch.zeros(48, 64, 8).transpose(1, 2)}, ValueError, "q must have a contiguous"),
        ({"q": torch.zeros(48, 8, 64, device="meta")}, ValueError, "must be on the device of q"),
        ({"k_pages": torch.zeros(32, 8, 2, 64)}, ValueError, r"\[any, 16, 2, 64\], got \(32, 8"),
        ({"v_pages": torch.zeros(32, 16, 4, 64)}, ValueError, "v_pages must have the plan's"),
        ({"v_pages": torch.zeros(29, 16, 2, 64)}, ValueError, "v_pages must have at least 30"),
        (
            {"plan": 3},
            TypeError,
            r"plan must be a flashcore\.Plan or a flashcore\.DevicePlan, got int",
        ),
        (
            {"plan": None},
            ValueError,
            "paged_attention needs a plan, or page_table and seq_lens",
        ),
        ({"scale": math.inf}, ValueError, "scale must be finite and above 0, got inf"),
        ({"scale": 0.0}, ValueError, "scale must be finite and above 0, got 0"),
        ({"softcap": -1.0}, ValueError, r"softcap must be finite and at least 0"),
        ({"window": 4}, TypeError, r"window must be None or \(left, right\), got 4"),
        ({"window": (4, -2)}, ValueError, "window right must be an int of at least -1"),
        ({"sinks": torch.zeros(7)}, ValueError, r"sinks must have one logit per query head \(8\)"),
        ({"tree_mask": torch.ones(48, 39, dtype=torch.bool)}, ValueError, r"\[48, >= 40\]"),
        ({"tree_mask": torch.ones(48, 40)}, TypeError, "tree_mask must have dtype bool"),
        (
            {"q": torch.zeros(48, 8, 64, requires_grad=True)},
            ValueError,
            "q requires a gradient; flashcore computes the forward pass only",
        ),
    ],
)
def test_paged_attention_names_what_is_wrong(changes, error, message):
    with pytest.raises(error, match=message):
        call(**changes)
