"""What is not served is refused at the start, with the reason and the option that helps."""

from __future__ import annotations

import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.platforms.interface import DeviceCapability
from vllm.v1.attention.backend import AttentionType
from vllm.v1.kv_cache_interface import ChunkedLocalAttentionSpec, MLAAttentionSpec

from flashcore.integrations.vllm.backend import FlashcoreBackend
from flashcore.integrations.vllm.groups import Group
from flashcore.integrations.vllm.impl import FlashcoreImpl
from flashcore.serving.shapes import NotServed
from tests import serving_cases as cases
from tests.vllm.batches import Setup, make_config, make_engine, make_forward

SERVED: dict[str, Any] = {
    "head_size": 128,
    "dtype": torch.bfloat16,
    "kv_cache_dtype": "auto",
    "block_size": 64,
    "use_mla": False,
    "has_sink": True,
    "use_sparse": False,
    "use_mm_prefix": False,
    "use_per_head_quant_scales": False,
    "device_capability": DeviceCapability(9, 0),
    "attn_type": AttentionType.DECODER,
    "has_sliding_window": True,
    "use_batch_invariant": True,
    "use_kv_connector": True,
}


@pytest.mark.parametrize(
    "change",
    [
        {},
        *({"head_size": size} for size in (64, 80, 96, 192, 256)),
        {"dtype": torch.float16},
        {"kv_cache_dtype": "bfloat16"},
        *({"kv_cache_dtype": name} for name in ("fp8", "fp8_e4m3", "fp8_e5m2")),
        {"kv_cache_dtype": "fp8", "dtype": torch.float16, "use_per_head_quant_scales": True},
        *({"block_size": size} for size in (None, 16, 32, 128, 528)),
    ],
    ids=str,
)
def test_served(change: dict[str, Any]) -> None:
    assert FlashcoreBackend.validate_configuration(**{**SERVED, **change}) == []


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"head_size": 512}, "head_dim must be a multiple of 8 from 8 to 256, got 512"),
        ({"head_size": 100}, "head_dim must be a multiple of 8"),
        *(
            ({"kv_cache_dtype": name}, f"or in fp8, fp8_e4m3, fp8_e5m2, got {name}")
            for name in ("fp8_per_token_head", "nvfp4", "fp8_ds_mla", "int8_per_token_head")
        ),
        (
            {"kv_cache_dtype": "fp8", "dtype": torch.float32},
            "an fp8 KV cache with models in 16 bits, got torch.float32",
        ),
        (
            {"kv_cache_dtype": "fp8_e5m2", "head_size": 72},
            "an fp8 KV cache with a head_dim in multiples of 16, got 72",
        ),
        ({"kv_cache_dtype": "float16"}, "KV cache in the model's dtype or in fp8, .* got float16"),
        ({"block_size": 24}, "blocks of 16, 32, 64, 128, got 24"),
        ({"device_capability": DeviceCapability(8, 0)}, r"9.0\), this one has 8.0"),
        ({"device_capability": DeviceCapability(10, 0)}, r"9.0\), this one has 10.0"),
        ({"use_mla": True}, "MLA not supported"),
        ({"use_sparse": True}, "sparse not supported"),
        ({"use_mm_prefix": True}, "partial multimodal"),
        ({"attn_type": AttentionType.ENCODER_ONLY}, "not supported"),
        ({"attn_type": AttentionType.ENCODER_DECODER}, "not supported"),
        ({"use_non_causal": True}, "non-causal"),
        ({"use_pcp": True}, "PCP"),
    ],
    ids=str,
)
def test_refused_by_vllm_s_validation(change: dict[str, Any], reason: str) -> None:
    reasons = FlashcoreBackend.validate_configuration(**{**SERVED, **change})
    assert any(re.search(reason, told) for told in reasons), reasons


def test_fp32_is_refused_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    reasons = FlashcoreBackend.validate_configuration(**{**SERVED, "dtype": torch.float32})
    assert any("bfloat16 and float16, got torch.float32" in told for told in reasons)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"alibi_slopes": [0.5] * 4}, "ALiBi"),
        ({"attn_type": AttentionType.ENCODER}, "(?i)encoder attention"),
        ({"kv_cache_dtype": "nvfp4"}, "a KV cache in nvfp4; use --kv-cache-dtype auto or fp8"),
        ({"kv_cache_dtype": "fp8_inc"}, "a KV cache in fp8_inc; use --kv-cache-dtype auto"),
        ({"sinks": torch.zeros(3)}, r"sinks of shape \(3,\) with 4 heads"),
    ],
    ids=str,
)
def test_layers_are_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(NotServed, match=reason):
        FlashcoreImpl(4, 16, 0.25, 2, **options)


SHAPE: dict[str, Any] = {
    "block_size": 64,
    "num_kv_heads": 2,
    "head_size": 16,
    "dtype": torch.float32,
}


def set_parallel(name: str, value: Any) -> Any:
    def change(config: Any) -> None:
        setattr(config.parallel_config, name, value)

    return change


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (set_parallel("decode_context_parallel_size", 2), "context parallelism"),
        (set_parallel("prefill_context_parallel_size", 2), "context parallelism"),
        (set_parallel("enable_dbo", True), "dual batch overlap; leave out --enable-dbo"),
        (
            lambda config: setattr(config.cache_config, "kv_sharing_fast_prefill", True),
            "fast prefill",
        ),
        (
            lambda config: setattr(config.model_config, "rswa_window", 64),
            "reference sliding windows",
        ),
        (
            lambda config: setattr(config.model_config, "dtype", torch.bfloat16),
            r"KV cache of torch.float32 with a model in torch.bfloat16",
        ),
    ],
)
def test_servers_are_refused(change: Any, reason: str) -> None:
    config = make_config(Setup(64))
    change(config)
    with pytest.raises(NotServed, match=reason):
        make_engine(Setup(64), config=config)


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (ChunkedLocalAttentionSpec(**SHAPE, attention_chunk_size=64), "ChunkedLocalAttentionSpec"),
        (MLAAttentionSpec(**{**SHAPE, "num_kv_heads": 1}), "MLAAttentionSpec"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_caches_are_refused(spec: Any, reason: str) -> None:
    with pytest.raises(NotServed, match=reason):
        Group(make_config(Setup(64)), spec, [], torch.device("cpu"))


def test_masks_that_see_ahead_are_refused() -> None:
    engine = make_engine(Setup(64))
    common = make_forward(engine, cases.decode()).common[0]
    builder = engine.groups[0].builder
    with pytest.raises(NotServed, match="both directions"):
        builder.build(0, common.replace(causal=False))
    with pytest.raises(NotServed, match="images"):
        builder.build(0, common.replace(mm_req_doc_ranges={0: [(0, 4)]}))


def test_quantised_outputs_are_refused() -> None:
    impl, q = FlashcoreImpl(4, 16, 0.25, 2), torch.zeros(1, 4, 16)
    with pytest.raises(NotServed, match="quantised outputs"):
        impl.forward(SimpleNamespace(), q, q, q, q, None, q, output_scale=torch.ones(1))


def test_more_sequences_than_the_server_has_are_told() -> None:
    engine = make_engine(replace(Setup(16), max_batch=4))
    engine.groups[0].builder.group.limits = replace(engine.groups[0].builder.group.limits, batch=3)
    forward = make_forward(engine, cases.decode()[4:])
    metadata = engine.groups[0].builder.build(0, forward.common[0])
    layer, pool = engine.groups[0].layers[0], engine.groups[0].pools[0]
    with pytest.raises(RuntimeError, match="4 sequences in a batch are more than --max-num-seqs 3"):
        layer.impl.forward(
            layer, *(x[0] for x in (forward.q, forward.k, forward.v)), pool, metadata, forward.q[0]
        )
