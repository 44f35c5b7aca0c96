"""vLLM's AttentionBackend: what is served, asked of it before a model is loaded."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from vllm.v1.attention.backend import AttentionBackend, AttentionType

from flashcore.integrations.vllm import versions
from flashcore.integrations.vllm.support import FP8_CACHES
from flashcore.kv_checks import QUERY_DTYPES
from flashcore.sm90.config.paged import NARROW_DIM_STEP, PAGE_TOKENS, unserved_dims

BLOCK_SIZES = [tokens for tokens in sorted(PAGE_TOKENS) if tokens >= 16]
PREFERRED_BLOCK_SIZE = 64  # what TMA copies at a time; vLLM's own default is 16


class FlashcoreBackend(AttentionBackend):
    """Decoder attention over vLLM's paged KV cache, on Hopper GPUs.

    K and V of a token lie side by side in one row of the cache, which the kernels read by strides.
    """

    forward_includes_kv_cache_update = False
    supported_kv_cache_dtypes: ClassVar[list[Any]] = [*("auto", "float16", "bfloat16", *FP8_CACHES)]

    @staticmethod
    def get_name() -> str:
        return versions.backend_name()

    @staticmethod
    def get_impl_cls() -> type:
        from flashcore.integrations.vllm.impl import FlashcoreImpl

        return FlashcoreImpl

    @staticmethod
    def get_builder_cls() -> type:
        from flashcore.integrations.vllm.metadata import FlashcoreMetadataBuilder

        return FlashcoreMetadataBuilder

    # The cache

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[Any]:
        return list(BLOCK_SIZES)

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int) -> int:
        return PREFERRED_BLOCK_SIZE

    @staticmethod
    def get_kv_cache_shape(
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_size: int,
        cache_dtype_str: str = "auto",
    ) -> tuple[int, ...]:
        return num_blocks, num_kv_heads, block_size, 2 * head_size

    @staticmethod
    def get_kv_cache_stride_order(include_num_layers_dimension: bool = False) -> tuple[int, ...]:
        return versions.layout_order(include_num_layers_dimension)

    # What is served

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        return not unserved_dims(head_size, head_size)

    @classmethod
    def supports_dtype(cls, dtype: torch.dtype) -> bool:
        served: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16)
        if not torch.cuda.is_available():  # torch operators; for tests, not for serving
            served = (*served, torch.float32)
        return dtype in served

    @classmethod
    def supports_compute_capability(cls, capability: Any) -> bool:
        return (int(capability.major), int(capability.minor)) == (9, 0)

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def supports_sink(cls) -> bool:
        return True

    @classmethod
    def supports_per_head_quant_scales(cls) -> bool:
        return True

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        return True

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        return attn_type == str(AttentionType.DECODER.value)

    @classmethod
    def supports_combination(
        cls,
        head_size: int,
        dtype: torch.dtype,
        kv_cache_dtype: Any,
        block_size: int | None,
        use_mla: bool,
        has_sink: bool,
        use_sparse: bool,
        use_mm_prefix: bool,
        device_capability: Any,
    ) -> str | None:
        """In words what of this is not served; vLLM's own words name no limit."""
        limits = []
        if device_capability is not None and not cls.supports_compute_capability(device_capability):
            limits.append(
                "flashcore's kernels are for Hopper GPUs (compute capability 9.0), this one has "
                f"{device_capability.major}.{device_capability.minor}"
            )
        if not cls.supports_head_size(head_size):
            limits.append(f"flashcore: {unserved_dims(head_size, head_size)}")
        if not cls.supports_dtype(dtype):
            limits.append(f"flashcore serves bfloat16 and float16, got {dtype}")
        named = kv_cache_dtype in ("float16", "bfloat16")
        other = named and getattr(torch, kv_cache_dtype) != dtype
        if other or not cls.supports_kv_cache_dtype(kv_cache_dtype):
            limits.append(
                f"flashcore serves a KV cache in the model's dtype or in {', '.join(FP8_CACHES)}, "
                f"got {kv_cache_dtype}"
            )
        elif kv_cache_dtype in FP8_CACHES and dtype not in QUERY_DTYPES:
            limits.append(f"flashcore serves an fp8 KV cache with models in 16 bits, got {dtype}")
        elif kv_cache_dtype in FP8_CACHES and head_size % NARROW_DIM_STEP:
            limits.append(
                f"flashcore serves an fp8 KV cache with a head_dim in multiples of "
                f"{NARROW_DIM_STEP}, got {head_size}"
            )
        if not cls.supports_block_size(block_size):
            sizes = ", ".join(map(str, BLOCK_SIZES))
            limits.append(f"flashcore serves multiples of blocks of {sizes}, got {block_size}")
        return "; ".join(limits) or None
