"""Arguments by the names that other libraries have for them: an error that says what ours are."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")
Function = TypeVar("Function", bound=Callable[..., Any])

# Default of arguments that must be given, where names that are not ours are to be told first.
MISSING: Any = None

# Ours, in functions that have it.
_OURS = {
    **dict.fromkeys(("softmax_scale", "sm_scale", "scaling"), "scale"),
    "is_causal": "causal",
    **dict.fromkeys(("logits_soft_cap", "soft_cap", "attn_logit_softcapping"), "softcap"),
    **dict.fromkeys(("s_aux", "sink", "learnable_sink"), "sinks"),
    **dict.fromkeys(("return_softmax_lse", "return_attn_probs"), "return_lse"),
    **dict.fromkeys(("block_table", "block_tables", "page_tables"), "page_table"),
    **dict.fromkeys(("k_cache", "key_cache", "paged_k_cache"), "k_pages"),
    **dict.fromkeys(("v_cache", "value_cache", "paged_v_cache"), "v_pages"),
    **dict.fromkeys(("query", "queries"), "q"),
    **dict.fromkeys(("key", "append_key", "k_new"), "k"),
    **dict.fromkeys(("value", "append_value", "v_new"), "v"),
    **dict.fromkeys(("q_lens", "qo_indptr", "query_start_loc", "cu_seqlens"), "cu_seqlens_q"),
    **dict.fromkeys(("kv_indptr", "paged_kv_indptr"), "indptr"),
    **dict.fromkeys(("kv_indices", "paged_kv_indices"), "indices"),
    **dict.fromkeys(("kv_last_page_len", "paged_kv_last_page_len"), "last_page_len"),
    **dict.fromkeys(("page_size", "block_size"), "page_tokens"),
    **dict.fromkeys(("num_heads", "num_qo_heads", "nheads"), "num_q_heads"),
    **dict.fromkeys(("num_heads_k", "nheads_k"), "num_kv_heads"),
    **dict.fromkeys(("head_dim_qk", "head_size", "headdim"), "head_dim"),
    **dict.fromkeys(("head_dim_vo", "headdim_v"), "v_head_dim"),
    **dict.fromkeys(("q_data_type", "kv_data_type", "kv_cache_dtype"), "dtype"),
    **dict.fromkeys(("slots", "out_cache_loc"), "slot_mapping"),
    "k_descale": "k_scale",
    "v_descale": "v_scale",
    **dict.fromkeys(("custom_mask", "attn_mask", "attention_mask"), "tree_mask"),
}
# Ours, where it does not mean quite the same.
_NEARLY = {
    "window_size": ("window", "window, (left, right)"),
    "sliding_window": ("window", "window, (left, right) without the query itself"),
    "window_left": ("window", "window, (left, right): window=(window_left, -1)"),
    **dict.fromkeys(
        ("cache_seqlens", "seqused_k", "context_lens", "kv_lens"),
        ("seq_lens", "seq_lens, which count the new tokens too"),
    ),
    **dict.fromkeys(
        ("kv_cache", "kv_data", "paged_kv_cache"),
        ("k_pages", "k_pages and v_pages: k_pages, v_pages = kv.unbind(1)"),
    ),
}
_FROM_CSR = "flashcore.layout_from_csr takes it, and flashcore.plan the layout"
# Where else it goes, in functions that have nothing like it.
_ELSEWHERE = {
    **dict.fromkeys(("indptr", "indices", "last_page_len"), _FROM_CSR),
    **dict.fromkeys(
        ("page_table", "seq_lens"),
        "flashcore.layout_from_page_table and flashcore.paged_attention take it",
    ),
    "max_seqlen_k": "it is not needed",
    "num_splits": "flashcore.plan decides; batch_invariant=True there cuts at fixed places",
    "deterministic": "results are; flashcore.plan(batch_invariant=True) where batches differ",
    **dict.fromkeys(
        ("batch_invariant", "tile_m", "num_workers", "share", "fold"),
        "flashcore.plan takes it; give its result as plan",
    ),
    **dict.fromkeys(("dropout_p", "dropout", "alibi_slopes"), "there is nothing like it"),
    **dict.fromkeys(("rotary_cos", "rotary_sin"), "turn q and k before the call"),
    "slot_mapping": "flashcore.append_kv takes it",
    **dict.fromkeys(
        ("k_scale", "v_scale"), "it goes with fp8 pages: flashcore.paged_attention takes it"
    ),
    **dict.fromkeys(("q_scale", "q_descale"), "q has 16 bits; multiply scale by it"),
    "tree_mask": "masks of the caller's go with paged_attention alone, as tree_mask",
}
# Functions and classes of other libraries.
_FUNCTIONS = {
    **dict.fromkeys(("flash_attn_func", "flash_attn_varlen_func"), "attention"),
    **dict.fromkeys(
        (
            "flash_attn_with_kvcache",
            "BatchDecodeWithPagedKVCacheWrapper",
            "BatchPrefillWithPagedKVCacheWrapper",
            "MultiLevelCascadeAttentionWrapper",
        ),
        "plan and paged_attention",
    ),
    "append_paged_kv_cache": "append_kv",
    "scaled_dot_product_attention": "attention",
}


def of_package(name: str) -> str:
    """What the package has in the place of a name that it does not have; empty where unknown."""
    return f"; {_FUNCTIONS[name]} here, see docs/migration.md" if name in _FUNCTIONS else ""


def unexpected(function: Callable[..., Any], given: Iterable[str]) -> TypeError:
    """What to raise for the first of the names in `given` that the function does not have."""
    own = parameters(function)
    name = next(n for n in given if n not in own)
    called = function.__qualname__.removesuffix(".__init__")
    return TypeError(f"{called}() has no argument {name}: {_advice(name, own)}")


def parameters(function: Callable[..., Any]) -> tuple[str, ...]:
    """Names of its arguments, without `self` and `**unknown`."""
    kinds = inspect.Parameter
    found = inspect.signature(function).parameters.values()
    return tuple(p.name for p in found if p.kind is not kinds.VAR_KEYWORD and p.name != "self")


def _advice(name: str, own: tuple[str, ...]) -> str:
    if name in _NEARLY and _NEARLY[name][0] in own:
        return f"here it is {_NEARLY[name][1]}"
    ours = _OURS.get(name, _NEARLY.get(name, (name,))[0])
    if ours in own:
        return f"here it is {ours}"
    if ours in _ELSEWHERE:
        return _ELSEWHERE[ours]
    close = get_close_matches(name, own, 1)
    return f"did you mean {close[0]}?" if close else f"it takes {', '.join(own)}"


def known(function: Callable[P, R]) -> Callable[P, R]:
    """`function`, which says of names that are not its own what they are here.

    It adds some tenths of a microsecond: for what is called once a batch.
    """
    own = frozenset(parameters(function))

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        if not own.issuperset(kwargs):
            raise unexpected(function, kwargs)
        return function(*args, **kwargs)

    return checked


def needs(*required: str) -> Callable[[Function], Function]:
    """Of a function whose `**unknown` takes names that are not its own, for `unexpected` to tell,
    and whose required arguments are `MISSING` by default: a signature that shows neither."""

    def with_signature(function: Function) -> Function:
        found = inspect.signature(function)
        shown = [
            p.replace(default=p.empty) if p.name in required else p
            for p in found.parameters.values()
            if p.kind is not p.VAR_KEYWORD
        ]
        function.__signature__ = found.replace(parameters=shown)  # type: ignore[attr-defined]
        return function

    return with_signature
