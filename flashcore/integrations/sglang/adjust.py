"""What the plugin decides while SGLang resolves a server's arguments.

SGLang knows its own backends by name: some models name those that they allow, page sizes and draft
backends have defaults that depend on the name. Here is what each means for `flashcore`, as
functions of SGLang's view of the arguments (its ResolvedView); hooks.py puts them into its steps.
What the operator gave is never changed. docs/sglang.md lists every place and its decision.
"""

from __future__ import annotations

import logging
from typing import Any

from flashcore.integrations.sglang.names import NAME
from flashcore.integrations.sglang.support import check_config, refusal

logger = logging.getLogger(__name__)

BACKEND_FIELDS = ("attention_backend", "prefill_attention_backend", "decode_attention_backend")

# Models that name the backends they allow, fa3 among them, and whose attention is served.
NAMES_BACKENDS = frozenset(
    {
        "GptOssForCausalLM",
        "Exaone4ForCausalLM",
        "ExaoneMoEForCausalLM",
        "ExaoneMoeForCausalLM",  # the same from 0.5.23
    }
)

# Models that are refused by name, since their layers are known only when the weights are loaded.
NOT_SERVED = {
    **dict.fromkeys(
        ("Llama4ForCausalLM", "Llama4ForConditionalGeneration"),
        ("chunked local attention (Llama 4)", "use --attention-backend fa3"),
    ),
    **dict.fromkeys(
        (
            "Gemma4ForCausalLM",
            "Gemma4ForConditionalGeneration",
            "Gemma4UnifiedForConditionalGeneration",
        ),
        ("head_dim 512 (Gemma 4)", "use --attention-backend triton"),
    ),
    **dict.fromkeys(
        ("InklingForConditionalGeneration", "InklingForConditionalGenerationMTP"),
        ("biases by distance (Inkling)", "use --attention-backend triton"),
    ),
}

KV_CACHE_DTYPES = ("auto", "bf16", "bfloat16", "fp8_e4m3", "fp8_e5m2")

DRAFT_MODELS = frozenset({"EAGLE", "EAGLE3", "NEXTN", "STANDALONE", "DFLASH", "DSPARK"})
TREES = frozenset({"EAGLE", "EAGLE3", "NEXTN", "STANDALONE"})
DRAFT_BACKEND = "fa3"

PAGE_TOKENS = 64  # what TMA copies at a time
SPARSE_PAGE_TOKENS = 128  # blocks of MiniMax-M3's sparse layers; SGLang's page for fa3 there


def chosen(view: Any) -> bool:
    """Whether prefill or decode goes to this backend."""
    return NAME in backends_of(view)


def backends_of(view: Any) -> tuple[str | None, str | None]:
    """Names for prefill and for decode."""
    name = view.attention_backend
    return view.prefill_attention_backend or name, view.decode_attention_backend or name


def check_model(config: Any) -> None:
    """Raise NotServed for a model that can be told by its configuration, before it is loaded."""
    architecture = architecture_of(config)
    if architecture in NOT_SERVED:
        raise refusal(*NOT_SERVED[architecture])
    check_config(config)


def check_arguments(view: Any) -> None:
    """Raise NotServed for what needs no look at the model."""
    if view.kv_cache_dtype not in KV_CACHE_DTYPES:
        raise refusal(
            f"--kv-cache-dtype {view.kv_cache_dtype}",
            "use --kv-cache-dtype auto, fp8_e4m3 or fp8_e5m2, or --attention-backend triton",
        )


def architecture_of(config: Any) -> str:
    """Name of the model's class in SGLang; empty where the configuration has none."""
    return next(iter(getattr(config.hf_config, "architectures", None) or ()), "")


def default_page_size(view: Any, architecture: str, chunk_tokens: int | None) -> dict[str, int]:
    """The page size where none is given; empty: SGLang's own default, one token.

    chunk_tokens: of a linear-attention layer's scan, None in models without.
    """
    if view.page_size is not None or not chosen(view):
        return {}
    tokens = SPARSE_PAGE_TOKENS if architecture.startswith("MiniMaxM3") else PAGE_TOKENS
    reason = _against_pages(view, tokens, chunk_tokens)
    if reason:
        logger.info("flashcore: page size stays at SGLang's default: %s", reason)
        return {}
    logger.info("flashcore: --page-size %d, since none is given", tokens)
    return {"page_size": tokens}


def _against_pages(view: Any, tokens: int, chunk_tokens: int | None) -> str:
    """What forbids pages of so many tokens, in words."""
    if view.uses_mamba_radix_cache:
        if view.mamba_radix_cache_strategy not in ("extra_buffer", "extra_buffer_lazy"):
            return "this model's prefix cache (--mamba-radix-cache-strategy no_buffer) has no pages"
        if view.mamba_track_interval % tokens:
            return f"--mamba-track-interval {view.mamba_track_interval} is no multiple of {tokens}"
        if chunk_tokens and max(chunk_tokens, tokens) % min(chunk_tokens, tokens):
            return f"the model's chunks of {chunk_tokens} tokens are no multiple of {tokens}"
    breadth = getattr(view, "speculative_ngram_max_bfs_breadth", None) or 1
    if algorithm_of(view) == "NGRAM" and breadth > 1:
        return "SGLang keeps n-gram trees to pages of one token"
    chunk = view.chunked_prefill_size
    if chunk is not None and chunk > 0 and chunk % tokens:
        return f"--chunked-prefill-size {chunk} is no multiple of {tokens}"
    if view.disaggregation_mode not in (None, "null"):
        return "both sides of a disaggregated server need the same --page-size: give it to both"
    return ""


def algorithm_of(view: Any) -> str:
    """Of speculative decoding, in capitals; empty without."""
    return str(view.speculative_algorithm or "").upper()


def default_draft_backend(view: Any) -> dict[str, str]:
    """The draft model's backend where none is named; SGLang would take the target's name for it."""
    named = view.speculative_draft_attention_backend
    if named == NAME and algorithm_of(view):
        raise refusal(
            "the draft model's attention",
            f"use --speculative-draft-attention-backend {DRAFT_BACKEND}",
        )
    if named is not None or not chosen(view) or algorithm_of(view) not in DRAFT_MODELS:
        return {}
    logger.info(
        "flashcore: --speculative-draft-attention-backend %s, since none is named", DRAFT_BACKEND
    )
    return {"speculative_draft_attention_backend": DRAFT_BACKEND}


def counted(view: Any) -> dict[str, str]:
    """The fields that name this backend, with the name that SGLang's lists know."""
    return {field: "fa3" for field in BACKEND_FIELDS if getattr(view, field) == NAME}
