"""Names that other libraries have for our arguments: an error says what they are here."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import flashcore
from flashcore import names

FLASH_ATTN = {
    "attention": {
        "softmax_scale": "scale",
        "window_size": "window",
        "return_attn_probs": "return_lse",
        "s_aux": "sinks",
        "query": "q",
        "key": "k",
        "value": "v",
        "cu_seqlens": "cu_seqlens_q",
        "is_causal": "causal",
        "max_seqlen_k": "not needed",
        "dropout_p": "nothing like it",
        "alibi_slopes": "nothing like it",
        "deterministic": "batch_invariant",
        "attn_mask": "tree_mask",
        "block_table": "paged_attention",
        "casual": "causal",
        "no_such_thing": "it takes q, k, v, causal",
    },
    "paged_attention": {
        "k_cache": "k_pages",
        "v_cache": "v_pages",
        "cache_seqlens": "seq_lens, which count the new tokens too",
        "block_table": "page_table",
        "softmax_scale": "scale",
        "window_size": "window",
        "num_splits": "batch_invariant",
        "rotary_cos": "before the call",
        "q_lens": "cu_seqlens_q",
        "tile_m": "flashcore.plan",
        "batch_invariant": "flashcore.plan",
        # FlashInfer's
        "sm_scale": "scale",
        "logits_soft_cap": "softcap",
        "window_left": r"window=\(window_left, -1\)",
        "paged_kv_cache": r"kv\.unbind\(1\)",
        "qo_indptr": "cu_seqlens_q",
        "indptr": "layout_from_csr",
        "custom_mask": "tree_mask",
    },
    "plan": {
        "qo_indptr": "cu_seqlens_q",
        "page_size": "page_tokens",
        "num_qo_heads": "num_q_heads",
        "head_dim_qk": "head_dim",
        "head_dim_vo": "v_head_dim",
        "kv_data_type": "dtype",
        "indptr": "layout_from_csr",
        "last_page_len": "layout_from_csr",
        "block_table": "layout_from_page_table",
        "cache_seqlens": "layout_from_page_table",
    },
    "layout_from_csr": {
        "paged_kv_indptr": "indptr",
        "kv_indices": "indices",
        "paged_kv_last_page_len": "last_page_len",
        "page_size": "page_tokens",
        "page_table": "layout_from_page_table",
    },
    "layout_from_page_table": {
        "block_tables": "page_table",
        "context_lens": "seq_lens",
        "block_size": "page_tokens",
        "indptr": "layout_from_csr",
    },
    "build_layout": {"page_size": "page_tokens", "num_page": "num_pages"},
    "append_kv": {
        "append_key": "k",
        "v_new": "v",
        "k_cache": "k_pages",
        "value_cache": "v_pages",
        "block_table": "page_table",
        "cache_seqlens": "seq_lens",
        "out_cache_loc": "slot_mapping",
        "cu_seqlens": "cu_seqlens_q",
    },
    "DevicePlanner": {"page_size": "page_tokens", "num_heads": "num_q_heads"},
    "DevicePager": {"block_size": "page_tokens"},
}
CASES = [(function, *pair) for function, pairs in FLASH_ATTN.items() for pair in pairs.items()]


@pytest.mark.parametrize(("name", "given", "told"), CASES)
def test_ours_is_told(name: str, given: str, told: str) -> None:
    """Whatever else is missing: nothing but the name is given."""
    function: Callable[..., Any] = getattr(flashcore, name)
    with pytest.raises(TypeError, match=rf"^{name}\(\) has no argument {given}: .*{told}"):
        function(**{given: None})


@pytest.mark.parametrize("name", FLASH_ATTN)
def test_what_the_table_promises_is_there(name: str) -> None:
    """Every name that it gives for another one is an argument somewhere, and none of its own names
    is taken for another's."""
    own = set(names.parameters(getattr(flashcore, name)))
    assert own
    assert not own & (names._OURS.keys() | names._NEARLY.keys()) - {"q_lens"}


def test_ours_are_arguments() -> None:
    every = {p for name in FLASH_ATTN for p in names.parameters(getattr(flashcore, name))}
    assert {*names._OURS.values(), *(ours for ours, _ in names._NEARLY.values())} <= every


@pytest.mark.parametrize("name", ["attention", "paged_attention"])
def test_signatures_show_neither_what_is_unknown_nor_what_is_missing(name: str) -> None:
    found = inspect.signature(getattr(flashcore, name)).parameters
    needed = [p for p, x in found.items() if x.kind is x.POSITIONAL_OR_KEYWORD][:3]
    assert all(found[p].default is inspect.Parameter.empty for p in needed)
    assert all(x.kind is not x.VAR_KEYWORD for x in found.values())


@pytest.mark.parametrize("name", ["attention", "paged_attention"])
def test_what_is_missing_is_named(name: str) -> None:
    with pytest.raises(
        (TypeError, ValueError), match=r"^(q must be a torch.Tensor|paged_attention needs)"
    ):
        getattr(flashcore, name)()


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("flash_attn_func", "attention here"),
        ("flash_attn_with_kvcache", "plan and paged_attention here"),
        ("BatchDecodeWithPagedKVCacheWrapper", "docs/migration.md"),
        ("append_paged_kv_cache", "append_kv here"),
        ("no_such_thing", "'no_such_thing'$"),
    ],
)
def test_functions_of_other_libraries(name: str, told: str) -> None:
    with pytest.raises(AttributeError, match=told):
        getattr(flashcore, name)


def test_every_name_of_the_migration_page_is_told() -> None:
    """Arguments and functions of other libraries in the first column of its tables."""
    page = (Path(__file__).parents[1] / "docs/migration.md").read_text()
    told = {*names._OURS, *names._NEARLY, *names._ELSEWHERE, *names._FUNCTIONS}
    own = {p for name in FLASH_ATTN for p in names.parameters(getattr(flashcore, name))}
    found = []
    for line in page.splitlines():
        for code in re.findall(r"`([^`]*)`", line.split("|")[1] if line.startswith("|") else ""):
            found += re.findall(r"(\w+)=", code) + re.findall(r"^(\w+)(?=\(|$)", code)
    assert len(found) > 30
    assert set(found) - told - own == {"run"}  # a method of what was told
