"""vLLM's metadata of a forward, and its builder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)

from flashcore.integrations.vllm.groups import Group
from flashcore.integrations.vllm.support import refusal


@dataclass(eq=False)
class FlashcoreMetadata(AttentionMetadata):
    """A batch, as all layers of a group see it; tensors are vLLM's own.

    num_reqs: sequences, padding included. num_actual_tokens: query tokens, padding included.
    query_start_loc: int32 [num_reqs + 1]. seq_lens: int32 [num_reqs]. block_table: int32
    [num_reqs, any]. planned_in: whether its plan was made in a CUDA graph; None: not yet.
    """

    group: Group
    num_reqs: int
    num_actual_tokens: int
    max_query_len: int
    max_seq_len: int
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    slot_mapping: torch.Tensor
    planned_in: bool | None = None


class FlashcoreMetadataBuilder(AttentionMetadataBuilder[FlashcoreMetadata]):
    """Names what a plan is made of; the first layer of a forward makes it."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH
    reorder_batch_threshold: int | None = None
    supports_update_block_table: bool = False

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device
    ):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.group = Group(vllm_config, kv_cache_spec, layer_names, device)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> FlashcoreMetadata:
        """Before every forward, one that replays a CUDA graph too. The device's lengths count: the
        host has bounds of them alone."""
        return self._build(common_attn_metadata, in_capture=False)

    def build_for_cudagraph_capture(
        self, common_attn_metadata: CommonAttentionMetadata
    ) -> FlashcoreMetadata:
        return self._build(common_attn_metadata, in_capture=True)

    def use_cascade_attention(self, *_: Any, **__: Any) -> bool:
        """The plan finds what is shared by itself."""
        return False

    def _build(self, common: CommonAttentionMetadata, in_capture: bool) -> FlashcoreMetadata:
        _check(common)
        metadata = FlashcoreMetadata(
            group=self.group,
            num_reqs=common.num_reqs,
            num_actual_tokens=common.num_actual_tokens,
            max_query_len=common.max_query_len,
            max_seq_len=common.max_seq_len,
            query_start_loc=common.query_start_loc,
            seq_lens=common.seq_lens,
            block_table=common.block_table_tensor,
            slot_mapping=common.slot_mapping,
        )
        self.group.begin(metadata, in_capture)
        return metadata


def _check(common: CommonAttentionMetadata) -> None:
    """Raise NotServed for masks that vLLM does not ask its backends about at the start."""
    if common.causal is not True:
        raise refusal("attention in both directions")
    if getattr(common, "mm_req_doc_ranges", None):
        raise refusal("prompt tokens of images that see each other")
