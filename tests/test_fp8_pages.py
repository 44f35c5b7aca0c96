"""Paged attention over fp8 pages with torch operators: against the reference and the oracle."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import flashcore
from flashcore.reference import paged_attention_reference
from tests import oracle
from tests.cases import Batch, batches
from tests.compare import assert_close, assert_lse_close
from tests.fp8 import FORMATS, fp8_tensors, scales
from tests.test_layout import rows_of
from tests.test_one_off import tables
from tests.test_paged_attention import REGIMES, rules, shared_batch

KINDS = ["none", "one", "heads", "mixed"]
PAGES = st.sampled_from(list(FORMATS.values()))
QUERIES = st.sampled_from([torch.bfloat16, torch.float16])


@settings(max_examples=150, deadline=None)
@given(batches(), st.sampled_from(REGIMES), st.sampled_from(KINDS), PAGES, QUERIES)
def test_against_reference(
    batch: Batch, regime: str, kind: str, pages: torch.dtype, dtype: torch.dtype
) -> None:
    q, k, v = fp8_tensors(batch, pages, dtype)
    options = rules(batch, regime) | scales(batch, kind)
    expected = paged_attention_reference(q, k, v, batch.layout, batch.q_lens, **options)
    out, lse = flashcore.paged_attention(q, k, v, batch.plan(), return_lse=True, **options)
    assert out.dtype == dtype
    assert_close(out, expected[0], dtype)
    assert_lse_close(lse, expected[1])


@settings(max_examples=40, deadline=None)
@given(batches(max_batch=3), st.sampled_from(["softcap", "sinks"]), PAGES)
def test_the_reference_against_the_oracle(batch: Batch, regime: str, pages: torch.dtype) -> None:
    """On K and V dequantised before: the scale of K counts before the softcap, and in the LSE."""
    q, k, v = fp8_tensors(batch, pages)
    given_scales = scales(batch, "heads")
    options = rules(batch, regime)
    out, lse = paged_attention_reference(
        q, k, v, batch.layout, batch.q_lens, **options, **given_scales
    )
    k, v = (
        x.double() * given_scales[name].double()[:, None]
        for x, name in ((k, "k_scale"), (v, "v_scale"))
    )
    sinks = options.get("sinks")
    rows, first = rows_of(batch.layout), 0
    for row, n in enumerate(batch.q_lens):
        own = slice(first, first + n)
        first += n
        ids = [(page, slot) for page, count in rows[row] for slot in range(count)]

        def take(pages: torch.Tensor, ids: Any = ids) -> np.ndarray:
            rows = [pages[page, slot].tolist() for page, slot in ids]
            return np.array(rows).reshape(len(ids), *pages.shape[2:])

        expected = oracle.attention(
            q[own].double().numpy(),
            take(k),
            take(v),
            scale=1 / math.sqrt(batch.head_dim),
            causal=True,
            softcap=options.get("softcap", 0.0),
            sinks=None if sinks is None else sinks.numpy(),
        )
        assert_close(out[own], torch.from_numpy(expected[0]), torch.float32)
        assert_close(lse[own], torch.from_numpy(expected[1]), torch.float32)


@settings(max_examples=40, deadline=None)
@given(batches().filter(lambda batch: not batch.ragged), st.sampled_from(KINDS), PAGES)
def test_planned_inside(batch: Batch, kind: str, pages: torch.dtype) -> None:
    q, k, v = fp8_tensors(batch, pages)
    options = scales(batch, kind)
    expected = paged_attention_reference(q, k, v, batch.layout, batch.q_lens, **options)
    out = flashcore.paged_attention(q, k, v, **tables(batch), **options)
    assert_close(out, expected[0], torch.float16)


@settings(max_examples=30, deadline=None)
@given(batches(ragged=False), st.sampled_from(REGIMES), st.sampled_from(KINDS), PAGES)
def test_batch_invariant_plans(batch: Batch, regime: str, kind: str, pages: torch.dtype) -> None:
    q, k, v = fp8_tensors(batch, pages)
    options = rules(batch, regime) | scales(batch, kind)
    expected = paged_attention_reference(q, k, v, batch.layout, batch.q_lens, **options)
    plan = batch.plan(batch_invariant=True)
    out, lse = flashcore.paged_attention(q, k, v, plan, return_lse=True, **options)
    assert_close(out, expected[0], torch.float16)
    assert_lse_close(lse, expected[1])


@pytest.mark.parametrize("pages", FORMATS.values())
def test_power_of_two_scales_are_the_dequantised_pages_bit_for_bit(pages: torch.dtype) -> None:
    batch = shared_batch()
    q, k, v = fp8_tensors(batch, pages)
    plan = batch.plan()
    out, lse = flashcore.paged_attention(
        *(q, k, v, plan), k_scale=torch.tensor(0.25), v_scale=torch.tensor(2.0), return_lse=True
    )
    k, v = k.half() * 0.25, v.half() * 2
    expected = flashcore.paged_attention(q, k, v, plan, return_lse=True)
    assert torch.equal(out, expected[0])
    assert torch.equal(lse, expected[1])


def test_every_code_is_read() -> None:
    """One key a sequence, each of a page's rows: the result is the row itself, NaN and inf too."""
    for pages in FORMATS.values():
        codes = torch.arange(256).to(torch.uint8).view(pages).reshape(16, 16, 1, 1)
        v = codes.expand(-1, -1, -1, 8).contiguous()
        k = torch.zeros_like(v, dtype=torch.float32).to(pages)
        layout = flashcore.layout_from_page_table(
            torch.arange(16)[:, None], torch.full((16,), 16), page_tokens=16
        )
        plan = flashcore.plan(
            layout, q_lens=[16] * 16, num_q_heads=1, num_kv_heads=1, head_dim=8, dtype=pages
        )
        assert plan.problem.itemsize == 1
        q = torch.zeros(256, 1, 8, dtype=torch.float16)
        out = flashcore.paged_attention(q, k, v, plan, window=(0, 0))
        expected = v.flatten(0, 1).half()
        assert torch.equal(out.nan_to_num(nan=1234.0), expected.nan_to_num(nan=1234.0))


# ---------------------------------------------------------------- refusals


def call(**changes: Any) -> torch.Tensor:
    batch = shared_batch()
    q, k, v = fp8_tensors(batch, torch.float8_e4m3fn)
    arguments = {"q": q, "k_pages": k, "v_pages": v, "plan": batch.plan(), **changes}
    return flashcore.paged_attention(**arguments)


def pages_of(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {name: torch.zeros(32, 16, 2, 64).to(dtype) for name in ("k_pages", "v_pages")}


TAKEN = r"a float32 tensor of shape \(\) or \[num_kv_heads\] = \[2\]"
EACH = "a scale for each sequence or page is not taken"
FP8 = torch.zeros(48, 8, 64).to(torch.float8_e4m3fn)


@pytest.mark.parametrize("name", ["k_scale", "v_scale"])
@pytest.mark.parametrize(
    ("scale", "error", "message"),
    [
        (1.0, TypeError, f" must be None or {TAKEN}, got float"),
        ([1.0, 1.0], TypeError, f" must be None or {TAKEN}, got list"),
        (torch.tensor(1.0).double(), TypeError, f" must be {TAKEN}, got float64"),
        (torch.tensor(1), TypeError, f" must be {TAKEN}, got int64"),
        (torch.ones(2).bfloat16(), TypeError, f" must be {TAKEN}, got bfloat16"),
        (torch.ones(1), ValueError, rf" must be {TAKEN}, got shape \(1,\)"),
        (torch.ones(8), ValueError, rf" must be {TAKEN}, got shape \(8,\)"),
        (torch.ones(4), ValueError, rf" must be {TAKEN}, got shape \(4,\); {EACH}"),
        (torch.ones(4, 2), ValueError, rf" must be {TAKEN}, got shape \(4, 2\); {EACH}"),
        (torch.ones(2, device="meta"), ValueError, r" must be on the device of q \(cpu\)"),
        (torch.ones(2, requires_grad=True), ValueError, " requires a gradient"),
    ],
    ids=str,
)
def test_scales_that_are_not_taken(
    name: str, scale: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^{name}{message}"):
        call(**{name: scale})


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"q": FP8}, TypeError, "q must have dtype float32, bfloat16, float16, got float8_e4m3fn"),
        (
            {"q": torch.zeros(48, 8, 64)},
            TypeError,
            "q must be bfloat16 or float16 with k_pages of float8_e4m3fn, got float32",
        ),
        (
            {"v_pages": torch.zeros(32, 16, 2, 64).to(torch.float8_e5m2)},
            TypeError,
            r"v_pages must have the dtype of k_pages \(torch\.float8_e4m3fn\), got",
        ),
        (
            {"v_pages": torch.zeros(32, 16, 2, 64).half()},
            TypeError,
            "v_pages must have the dtype of k_pages",
        ),
        (
            pages_of(torch.uint8),
            TypeError,
            r"k_pages has dtype uint8, .*k_pages\.view\(torch\.float8_e4m3fn\).* 4 bits are not",
        ),
        (
            pages_of(torch.float8_e4m3fnuz),
            TypeError,
            "k_pages must have dtype .*float8_e4m3fn, float8_e5m2, got float8_e4m3fnuz",
        ),
        (
            {**pages_of(torch.float16), "k_scale": torch.tensor(1.0)},
            ValueError,
            r"k_scale goes with fp8 pages .* got k_pages of float16",
        ),
    ],
)
def test_what_does_not_fit_is_named(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        call(**changes)


@pytest.mark.skipif(not hasattr(torch, "float4_e2m1fn_x2"), reason="no such dtype in this torch")
def test_four_bits_are_refused() -> None:
    fp4 = torch.zeros(32, 16, 2, 64, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    with pytest.raises(TypeError, match=r"k_pages must have dtype .*float8_e5m2, got float4"):
        call(k_pages=fp4, v_pages=fp4)


def test_names_of_other_libraries() -> None:
    with pytest.raises(TypeError, match="no argument k_descale: here it is k_scale"):
        call(k_descale=torch.tensor(1.0))
    with pytest.raises(TypeError, match="no argument q_descale: q has 16 bits; multiply scale by"):
        call(q_descale=torch.tensor(1.0))
    q = torch.zeros(1, 2, 2, 8)
    with pytest.raises(TypeError, match=r"k_scale: .*flashcore\.paged_attention takes it"):
        flashcore.attention(q, q, q, k_scale=torch.tensor(1.0))
