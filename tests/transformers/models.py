"""Small models with random weights, as transformers computes them and through flashcore."""

from __future__ import annotations

import copy
import functools
import inspect
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import DynamicCache, PreTrainedModel, StaticCache

from flashcore.integrations.transformers import NAME

VOCABULARY = 61
WINDOW = 5

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
    # Scores of a few units: with the usual range attention is next to an average.
    "initializer_range": 0.25,
}


@dataclass(frozen=True)
class Architecture:
    """Model and configuration class by name, what differs from `_COMMON`, and whose attention is
    taken for the truth."""

    model: str
    options: dict[str, Any]
    reference: str = "sdpa"


ARCHITECTURES = {
    "llama": Architecture("Llama", {"head_dim": 16}),
    "qwen3": Architecture("Qwen3", {"head_dim": 24, "tie_word_embeddings": True}),
    # transformers' sdpa has no soft cap and no sinks: these two are compared with eager attention.
    "gemma2": Architecture(
        "Gemma2",
        {
            "head_dim": 16,
            "query_pre_attn_scalar": 24,
            "sliding_window": WINDOW,
            "attn_logit_softcapping": 3.0,
        },
        reference="eager",
    ),
    "gpt_oss": Architecture(
        "GptOss",
        {
            "head_dim": 16,
            "sliding_window": WINDOW,
            "num_local_experts": 2,
            "num_experts_per_tok": 2,  # all: none is chosen by a rounding
        },
        reference="eager",
    ),
    "mistral": Architecture("Mistral", {"head_dim": 16, "sliding_window": WINDOW}),
    # head_dim 12: no multiple of 8, so columns are added.
    "phi3": Architecture("Phi3", {"sliding_window": None}),
    # Values with fewer columns than keys.
    "deepseek_v3": Architecture(
        "DeepseekV3",
        {
            "num_key_value_heads": 4,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 8,
            "v_head_dim": 16,
            "first_k_dense_replace": 2,
            "n_routed_experts": 2,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
        },
    ),
}
WINDOWED = ("gemma2", "gpt_oss", "mistral")


@functools.cache
def models(name: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    """(transformers' own, flashcore's) in fp32, with the same weights."""
    chosen = ARCHITECTURES[name]
    config = getattr(transformers, f"{chosen.model}Config")(**{**_COMMON, **chosen.options})
    torch.manual_seed(0)
    cls = getattr(transformers, f"{chosen.model}ForCausalLM")
    reference = cls._from_config(config, attn_implementation=chosen.reference).eval()
    for parameter_name, parameter in reference.named_parameters():
        if parameter_name.endswith("sinks"):
            torch.nn.init.normal_(parameter)
    return reference, with_flashcore(reference)


def with_flashcore(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of the model with attn_implementation="flashcore"."""
    cls = type(model)
    made = cls._from_config(copy.deepcopy(model.config), attn_implementation=NAME)
    made.load_state_dict(model.state_dict())
    assert made.config._attn_implementation == NAME
    return made.to(next(model.parameters()).dtype).eval()


def random_ids(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCABULARY, (batch, length), generator=generator)


def logits(model: PreTrainedModel, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False, **options).logits.float()


def cache_argument(model: PreTrainedModel) -> str:
    """What the model's forward calls its cache."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def new_cache(model: PreTrainedModel, kind: str, length: int) -> Any:
    config = model.config
    if kind == "static":
        return StaticCache(config=config, max_cache_len=length)
    return DynamicCache(config=config)


def logits_in_chunks(
    model: PreTrainedModel,
    ids: torch.Tensor,
    chunks: tuple[int, ...],
    kind: str,
    mask: torch.Tensor | None = None,
    length: int = 32,
    poison: bool = False,
) -> torch.Tensor:
    """The logits of all tokens, prefilled chunk by chunk into a cache of `kind`.

    poison: rows of a static cache that are not filled yet are NaN.
    """
    cache = new_cache(model, kind, length)
    found, start = [], 0
    with torch.no_grad():
        for size in chunks:
            end = start + size
            options = {cache_argument(model): cache, "use_cache": True}
            if "cache_position" in inspect.signature(model.forward).parameters:
                options["cache_position"] = torch.arange(start, end)
            if mask is not None:
                options["attention_mask"] = mask[:, :end]
                positions = (mask[:, :end].cumsum(1) - 1).clamp(min=0)
                options["position_ids"] = positions[:, start:]
            found.append(model(ids[:, start:end], **options).logits.float())
            start = end
            for layer in cache.layers if poison else ():
                layer.keys[:, :, end:] = layer.values[:, :, end:] = torch.nan
    return torch.cat(found, 1)


def assert_same(
    found: torch.Tensor, expected: torch.Tensor, mask: torch.Tensor | None = None
) -> None:
    """Equal for the tokens that the mask does not call padding, in fp32."""
    if mask is not None:
        found, expected = found[mask.bool()], expected[mask.bool()]
    assert found.numel()
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))


def padded(lengths: tuple[int, ...], longest: int, side: str) -> torch.Tensor:
    """int64 [batch, longest]: 1 for so many tokens of each row, opposite the padding."""
    positions = torch.arange(longest)[None]
    counts = torch.tensor(lengths)[:, None]
    valid = positions >= longest - counts if side == "left" else positions < counts
    return valid.long()
