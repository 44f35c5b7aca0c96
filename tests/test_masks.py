"""Masks that are right for each row: windows in trees, values that not every row sees, bounds near
the end of the integers, strided sinks and masks."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import flashcore
from flashcore.eager import run
from flashcore.reference import (
    attention_reference,
    paged_attention_reference,
    sequence_attention,
    visible_keys,
)
from tests import oracle
from tests.cases import Batch, batches
from tests.compare import assert_close
from tests.mask_cases import (
    Drafts,
    finite_part,
    same_with_nan,
    spoil,
    staggered_batch,
    step_by_step,
    verify_batch,
)
from tests.test_paged_attention import shared_batch

# ---------------------------------------------------------------- a window in a tree


@pytest.mark.parametrize("left", [1, 3, 127])
@pytest.mark.parametrize("positions", [False, True])
def test_tree_window_is_that_of_each_path(left: int, positions: bool) -> None:
    batch = verify_batch(16, (8, 2), 16, [300, 9, 140], 8)
    drafts = Drafts(batch, left)
    tensors = batch.tensors()
    options: dict[str, Any] = {"window": (left, 0), "tree_mask": drafts.mask}
    if positions:
        options["tree_positions"] = drafts.positions
    expected, expected_lse = step_by_step(batch, drafts, tensors, left)
    exact, exact_lse = paged_attention_reference(*tensors, batch.layout, batch.q_lens, **options)
    torch.testing.assert_close(exact, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(exact_lse, expected_lse, rtol=1e-9, atol=1e-12)
    plan = batch.plan(num_workers=5)
    out, lse = flashcore.paged_attention(*tensors, plan, return_lse=True, **options)
    assert_close(out, expected, torch.float32)
    assert_close(lse, expected_lse, torch.float32)


@settings(max_examples=80, deadline=None)
@given(batches(), st.sampled_from([0, 1, 2, 5, 40]), st.booleans(), st.booleans())
def test_positions_that_are_given_decide(batch: Batch, left: int, share: bool, chunks: bool):
    """They need not be what the mask says; random masks and positions, all rules of the plan."""
    batch.q_lens = [min(n, m) for n, m in zip(batch.q_lens, batch.kv_lens, strict=True)]
    tensors, mask = batch.tensors(), batch.tree_mask()
    rng = np.random.default_rng(batch.seed)
    depth = [[0, *rng.integers(0, mask.shape[1], n - 1)] for n in batch.q_lens if n]
    based = [np.array(own) + rng.integers(0, 100) for own in depth]
    positions = torch.from_numpy(np.concatenate([*based, np.zeros(0)])).int()
    options: dict[str, Any] = {"window": (left, 0), "tree_mask": mask, "tree_positions": positions}
    expected = paged_attention_reference(*tensors, batch.layout, batch.q_lens, **options)
    before = run.KEYS_PER_CHUNK
    try:
        run.KEYS_PER_CHUNK = 3 if chunks else before
        out = flashcore.paged_attention(*tensors, batch.plan(share=share), **options)
    finally:
        run.KEYS_PER_CHUNK = before
    assert_close(out, expected[0], torch.float32)


def test_positions_against_the_oracle() -> None:
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((n, h, 8)) for n, h in ((6, 4), (15, 2), (15, 2)))
    mask, positions = rng.random((6, 7)) < 0.6, np.array([90, 91, 91, 92, 95, 90])
    for left in (-1, 0, 1, 2, 4, 9):
        for stands in (None, positions):
            expected = oracle.attention(
                q, k, v, scale=0.4, causal=True, window=(left, 0), tree_mask=mask,
                tree_positions=stands,
            )  # fmt: skip
            out = sequence_attention(
                *map(torch.from_numpy, (q, k, v)),
                causal=True,
                scale=0.4,
                window=(left, 0),
                tree_mask=torch.from_numpy(mask),
                tree_positions=None if stands is None else torch.from_numpy(stands),
            )
            np.testing.assert_allclose(out[0].numpy(), expected[0], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("left", [0, 2, 5, 127])
def test_a_chain_is_what_a_causal_window_is(left: int) -> None:
    batch = verify_batch(4, (8, 2), 16, [150, 9, 40], 6)
    tensors, plan = batch.tensors(), batch.plan(num_workers=3)
    chain = torch.ones(6, 6).tril().bool().repeat(3, 1)
    index = torch.arange(6).int().repeat(3)
    expected = flashcore.paged_attention(*tensors, plan, window=(left, 0))
    for extra in ({}, {"tree_positions": index + 17}):
        out = flashcore.paged_attention(*tensors, plan, window=(left, 0), tree_mask=chain, **extra)
        assert torch.equal(out, expected)
    assert torch.equal(
        visible_keys(6, 30, True, (left, 0), chain[:6]), visible_keys(6, 30, True, (left, 0))
    )


def test_columns_of_other_sequences_mean_nothing() -> None:
    """A mask may be wider than a sequence is long; what stands there is no ancestor."""
    batch = verify_batch(4, (2, 1), 8, [60, 30], 3)
    batch.q_lens = [5, 2]
    tensors, plan = batch.tensors(), None
    q = torch.randn(7, 2, 8)
    plan = batch.plan()
    mask = torch.ones(5, 5).tril().bool()
    mask = torch.cat([mask, mask[:2]])
    expected = flashcore.paged_attention(
        q, *tensors[1:], plan, window=(3, 0), tree_mask=mask.clone()
    )
    mask[5:, 2:] = True
    out = flashcore.paged_attention(q, *tensors[1:], plan, window=(3, 0), tree_mask=mask)
    assert torch.equal(out, expected)


def positions_of(batch: Batch) -> torch.Tensor:
    return torch.cat([torch.arange(n) for n in batch.q_lens]).int()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda x: x.long(), TypeError, "tree_positions must have dtype int32"),
        (lambda x: x[:-1], ValueError, r"tree_positions must be \[total_q\] = \[48\], got \(47,\)"),
        (lambda x: x[None], ValueError, "tree_positions must have 1 dimensions"),
        (
            lambda x: x + (x == 7).int() * 50,
            ValueError,
            "must be 0 to 39 .* token, got 57",
        ),
        (
            lambda x: x - (x == 7).int() * 9,
            ValueError,
            "must be 0 to 39 .* token, got -2",
        ),
        (lambda x: x.to("meta"), ValueError, "tree_positions must be on the device of q"),
    ],
)
def test_tree_positions_are_checked(change: Any, error: type[Exception], message: str) -> None:
    batch = shared_batch()
    mask = torch.ones(48, 40, dtype=torch.bool)
    with pytest.raises(error, match=message):
        flashcore.paged_attention(
            *batch.tensors(),
            batch.plan(),
            tree_mask=mask,
            tree_positions=change(positions_of(batch)),
        )


def test_tree_positions_need_a_tree() -> None:
    batch = shared_batch()
    with pytest.raises(ValueError, match="tree_positions go with a tree_mask"):
        flashcore.paged_attention(
            *batch.tensors(), batch.plan(), tree_positions=positions_of(batch)
        )


# ---------------------------------------------------------------- values that not every row sees


# Decode, where rows of several sequences share pages, and several new tokens of each.
@pytest.mark.parametrize("q_len", [1, 4])
@pytest.mark.parametrize("page_tokens", [1, 16])
@pytest.mark.parametrize("share", [True, False])
def test_a_value_outside_a_window_has_no_say(q_len: int, page_tokens: int, share: bool) -> None:
    window = 20
    batch = staggered_batch(page_tokens, (4, 2), 8, window, q_len)
    q, k, v = batch.tensors()
    plan = batch.plan(fold=False, share=share)
    assert (plan.stats().num_shared_groups > 0) is share
    clean = paged_attention_reference(q, k, v, batch.layout, batch.q_lens, window=(window, 0))
    spoil(batch, v, window)
    expected, lse = paged_attention_reference(
        q, k, v, batch.layout, batch.q_lens, window=(window, 0)
    )
    assert torch.equal(lse, clean[1])
    bad = ~torch.isfinite(expected)
    assert bad.any()
    assert not bad.flatten(1).any(1).all()
    torch.testing.assert_close(expected[~bad], clean[0][~bad], rtol=1e-12, atol=1e-12)
    out = flashcore.paged_attention(q, k, v, plan, window=(window, 0))
    same_with_nan(out, expected)
    assert_close(finite_part(out, expected), finite_part(expected, expected), torch.float32)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("rule", ["causal", "window", "tree"])
def test_reference_of_what_is_not_finite_is_the_loop(value: float, rule: str) -> None:
    rng = np.random.default_rng(1)
    q, k, v = (rng.standard_normal((n, h, 4)) for n, h in ((5, 2), (12, 2), (12, 2)))
    for key, head, dim in ((3, 0, 1), (9, 1, 2), (10, 0, 0)):
        v[key, head, dim] = value
    k[8, 0, 1] = np.nan
    options: dict[str, Any] = {
        "causal": {},
        "window": {"window": (2, 0)},
        "tree": {"window": (3, 0), "tree_mask": rng.random((5, 5)) < 0.5},
    }[rule]
    expected = oracle.attention(q, k, v, scale=0.4, causal=True, **options)
    if "tree_mask" in options:
        options["tree_mask"] = torch.from_numpy(options["tree_mask"])
    out, lse = sequence_attention(
        *map(torch.from_numpy, (q, k, v)), causal=True, scale=0.4, **options
    )
    np.testing.assert_allclose(out.numpy(), expected[0], rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(lse.numpy(), expected[1], rtol=1e-12)


def test_dense_values_outside_a_window_have_no_say() -> None:
    q, k, v = (torch.randn(1, 40, 2, 8) for _ in range(3))
    v[0, 20, 0, 3], v[0, 25, 1, 0] = torch.nan, torch.inf
    for options in ({"causal": True}, {"window": (5, 0)}, {"window": (3, 2)}):
        expected, _ = attention_reference(q, k, v, **options)
        out = flashcore.attention(q, k, v, **options)
        same_with_nan(out, expected)
        assert_close(finite_part(out, expected), finite_part(expected, expected), torch.float32)


# ---------------------------------------------------------------- bounds near the integer limit


@pytest.mark.parametrize("bound", [2**31 - 2, 2**31 - 1, 2**31, 2**32 - 1, sys.maxsize, 10**30])
def test_a_bound_beyond_every_key_does_not_bind(bound: int) -> None:
    batch = shared_batch()
    q, k, v = batch.tensors()
    x = torch.randn(1, 9, 2, 8)
    for window, same in (
        ((-1, bound), (-1, -1)),
        ((bound, bound), (-1, -1)),
        ((4, bound), (4, -1)),
    ):
        for causal in (False, True):
            expected = paged_attention_reference(
                q, k, v, batch.layout, batch.q_lens, window=same, causal=causal
            )[0]
            assert torch.equal(
                paged_attention_reference(
                    q, k, v, batch.layout, batch.q_lens, window=window, causal=causal
                )[0],
                expected,
            )
            out = flashcore.paged_attention(q, k, v, batch.plan(), window=window, causal=causal)
            assert_close(out, expected, torch.float32)
            out = flashcore.attention(x, x, x, window=window, causal=causal)
            assert torch.equal(out, flashcore.attention(x, x, x, window=same, causal=causal))
