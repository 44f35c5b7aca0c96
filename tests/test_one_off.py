"""`paged_attention` that plans inside: against the reference, and what it refuses."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import flashcore
from flashcore.reference import paged_attention_reference
from tests.cases import Batch, batches
from tests.compare import assert_close, assert_lse_close
from tests.test_paged_attention import REGIMES, rules

INTS = st.sampled_from([torch.int32, torch.int64])


def tables(batch: Batch, dtype: torch.dtype = torch.int32) -> dict[str, torch.Tensor]:
    return {
        "page_table": batch.page_table.to(dtype),
        "seq_lens": torch.tensor(batch.kv_lens, dtype=dtype),
        "cu_seqlens_q": torch.tensor([0, *batch.q_lens]).cumsum(0).to(dtype),
    }


@settings(max_examples=100, deadline=None)
@given(batches().filter(lambda batch: not batch.ragged), st.sampled_from(REGIMES), INTS)
def test_against_reference(batch: Batch, regime: str, dtype: torch.dtype) -> None:
    q, k, v = batch.tensors()
    options = rules(batch, regime)
    expected = paged_attention_reference(q, k, v, batch.layout, batch.q_lens, **options)
    out, lse = flashcore.paged_attention(
        q, k, v, **tables(batch, dtype), return_lse=True, **options
    )
    assert_close(out, expected[0], torch.float32)
    assert_lse_close(lse, expected[1])


def small() -> tuple[dict[str, Any], dict[str, Any]]:
    """Two sequences with a common page, of which the second has two new tokens: a call's tensors
    and its tables."""
    g = torch.Generator().manual_seed(0)
    pages = torch.randn(4, 4, 2, 8, generator=g)
    values = torch.randn(4, 4, 2, 6, generator=g)
    call = {"q": torch.randn(3, 4, 8, generator=g), "k_pages": pages, "v_pages": values}
    return call, {
        "page_table": torch.tensor([[0, 1, 2], [0, 1, 3]]),
        "seq_lens": torch.tensor([9, 10]),
        "cu_seqlens_q": torch.tensor([0, 1, 3]),
    }


def test_it_is_a_plan_s_result() -> None:
    """Also into `out`, with values narrower than keys, and one query each by default."""
    call, given_tables = small()
    layout = flashcore.layout_from_page_table(
        given_tables["page_table"], given_tables["seq_lens"], page_tokens=4
    )
    heads = {"num_q_heads": 4, "num_kv_heads": 2, "head_dim": 8, "v_head_dim": 6}
    options = {"dtype": torch.float32, **heads}
    expected = flashcore.paged_attention(
        **call, plan=flashcore.plan(layout, q_lens=[1, 2], **options)
    )
    out = torch.empty(3, 4, 6)
    assert flashcore.paged_attention(**call, **given_tables, out=out) is out
    assert torch.equal(out, expected)
    call["q"] = call["q"][:2]
    del given_tables["cu_seqlens_q"]
    expected = flashcore.paged_attention(**call, plan=flashcore.plan(layout, **options))
    assert torch.equal(flashcore.paged_attention(**call, **given_tables), expected)


def test_a_batch_of_no_sequences() -> None:
    call, given_tables = small()
    call["q"] = call["q"][:0]
    empty = {"page_table": given_tables["page_table"][:0], "seq_lens": torch.zeros(0).long()}
    assert flashcore.paged_attention(**call, **empty).shape == (0, 4, 6)


@pytest.mark.parametrize("name", ["page_table", "seq_lens", "cu_seqlens_q"])
def test_tables_beside_a_plan_are_refused(name: str) -> None:
    """They would be passed over."""
    call, given_tables = small()
    layout = flashcore.layout_from_page_table(
        given_tables["page_table"], given_tables["seq_lens"], page_tokens=4
    )
    heads = {"num_q_heads": 4, "num_kv_heads": 2, "head_dim": 8, "v_head_dim": 6}
    plan = flashcore.plan(layout, q_lens=[1, 2], **heads)
    with pytest.raises(ValueError, match=f"^{name} goes without a plan"):
        flashcore.paged_attention(**call, plan=plan, **{name: given_tables[name]})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"page_table": None}, "needs a plan, or page_table and seq_lens"),
        ({"seq_lens": None}, "needs a plan, or page_table and seq_lens"),
        ({"cu_seqlens_q": None}, "q must have a row for each of the 2 rows of page_table"),
        ({"cu_seqlens_q": torch.tensor([0, 1, 2])}, r"must end with the rows of q \(3\), got 2"),
        ({"cu_seqlens_q": torch.tensor([1, 2, 3])}, "cu_seqlens_q must begin with 0, got 1"),
        ({"cu_seqlens_q": torch.tensor([0, 3])}, "one element more than rows of page_table"),
        ({"cu_seqlens_q": torch.tensor([0, 4, 3])}, "cu_seqlens_q must not decrease"),
        ({"seq_lens": torch.tensor([9, 13])}, r"seq_lens\[1\] = 13 is beyond page_table"),
        ({"seq_lens": torch.tensor([9, 1])}, "more than the 1 KV tokens"),
        ({"page_table": torch.tensor([[0, 1, 2], [0, 1, 4]])}, "below num_pages = 4"),
        ({"q": torch.randn(3, 3, 8)}, r"q must have heads in a multiple of k_pages' \(2\)"),
        ({"q": torch.randn(3, 4, 16)}, r"and its head_dim \(8\)"),
        ({"q": torch.randn(3, 0, 8)}, "q must have heads"),
        ({"v_pages": torch.randn(4, 4, 2, 9)}, "v_pages must have .* at most its columns"),
        ({"v_pages": torch.randn(3, 4, 2, 8)}, "v_pages must have the pages"),
        ({"k_pages": torch.randn(4, 0, 2, 8)}, "k_pages must have at least one token a page"),
        ({"k_pages": torch.randn(4, 4, 0, 8)}, "k_pages must have at least one token a page"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], message: str) -> None:
    call, given_tables = small()
    with pytest.raises(ValueError, match=message):
        flashcore.paged_attention(**{**call, **given_tables, **change})


def test_under_a_compiler_it_says_what_to_do() -> None:
    call, given_tables = small()
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = {name: mode.from_tensor(x) for name, x in copy.copy(call).items()}
        with pytest.raises(NotImplementedError, match=r"page_table: .* flashcore\.plan"):
            flashcore.paged_attention(**fake, **given_tables)
