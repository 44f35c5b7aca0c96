"""vLLM's AttentionImpl: one layer's keys and values written, and its attention."""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.attention.backend import AttentionImpl, AttentionType

from flashcore.integrations.vllm import versions
from flashcore.integrations.vllm.metadata import FlashcoreMetadata
from flashcore.integrations.vllm.support import FP8_CACHES, refusal
from flashcore.problem import KVPool


class FlashcoreImpl(AttentionImpl[FlashcoreMetadata]):
    """Attention of one layer.

    left: keys to the left of a query that it sees, -1 for all.
    """

    supports_dcp = False
    supports_pcp = False

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
    ):
        if alibi_slopes is not None:
            raise refusal("ALiBi")
        if attn_type != AttentionType.DECODER:
            raise refusal(f"{attn_type} attention")
        if kv_cache_dtype not in ("auto", "float16", "bfloat16", "float32", *FP8_CACHES):
            raise refusal(f"a KV cache in {kv_cache_dtype}", "use --kv-cache-dtype auto or fp8")
        if sinks is not None and sinks.shape != (num_heads,):
            raise refusal(f"sinks of shape {tuple(sinks.shape)} with {num_heads} heads")
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.left = -1 if sliding_window is None else sliding_window - 1
        self.window = None if self.left < 0 else (self.left, 0)
        self.softcap = float(logits_soft_cap or 0.0)
        self.sinks, self.kv_cache_dtype = sinks, kv_cache_dtype
        self.fp8 = FP8_CACHES.get(kv_cache_dtype)  # None: the model's dtype
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name
        self._pool: torch.Tensor | None = None  # whose views are kept
        self._views: tuple[torch.Tensor, torch.Tensor] | None = None

    def do_kv_cache_update(
        self,
        layer: Any,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """key, value [tokens, kv_heads, head_size] to their slots."""
        pool = KVPool(*self.views(kv_cache), *self.scales(layer))
        versions.write_cache(layer, key, value, pool, slot_mapping)

    def scales(self, layer: Any) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """What K and V in an fp8 cache are multiplied by: the layer's own tensors, which vLLM fills
        once it has loaded or computed them."""
        return (None, None) if self.fp8 is None else (layer._k_scale, layer._v_scale)

    def views(self, pool: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V [pages, tokens, kv_heads, head_size] of a cache [pages, kv_heads, tokens,
        2 * head_size]: in every row of it K and then V."""
        if pool is not self._pool or self._views is None:
            typed = pool if self.fp8 is None else pool.view(self.fp8)  # vLLM keeps bytes
            rows, dim = typed.transpose(1, 2), self.head_size
            k, v = rows[..., :dim], rows[..., dim:]
            self._views = versions.canonical_strides(k), versions.canonical_strides(v)
            self._pool = pool
        return self._views

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: FlashcoreMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """query [tokens, heads, head_size] to output of its shape; rows beyond the batch's tokens
        come out zero."""
        if output_scale is not None or output_block_scale is not None:
            raise refusal("quantised outputs")
        if attn_metadata is None:  # vLLM measures memory
            return output.zero_()
        k, v = self.views(kv_cache)
        view = attn_metadata.group.view_for(attn_metadata, k)
        k_scale, v_scale = self.scales(layer)
        view.attend(
            query,
            k,
            v,
            out=output,
            scale=self.scale,
            window=self.window,
            softcap=self.softcap,
            sinks=self.sinks,
            k_scale=k_scale,
            v_scale=v_scale,
        )
        return output
