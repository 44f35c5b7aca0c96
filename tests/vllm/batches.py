"""Batches as vLLM makes them, with blocks that requests SHARE, and what must come out of them.

vLLM's own Attention layers, cache specifications and CommonAttentionMetadata; the caches are laid
out as vLLM lays them out. The reference gathers every request's keys by block and knows nothing of
plans.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.utils.torch_utils import STR_DTYPE_TO_TORCH_DTYPE
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec, get_kv_quant_mode

from flashcore.integrations.vllm.backend import FlashcoreBackend
from flashcore.integrations.vllm.support import FP8_CACHES
from flashcore.reference import sequence_attention
from tests.serving_cases import Request

STALE = 2**31 - 1  # what stands in a block table past a row's last block


@dataclass(frozen=True)
class Setup:
    """A model and a server. windows: of each group of layers, as vLLM counts them; None: full
    attention. second: of the second layer of a group with full attention, as where vLLM's hybrid
    cache manager is off. layout: of the caches. gap: elements between blocks that are nobody's."""

    page_tokens: int = 16
    heads: tuple[int, int] = (4, 2)
    head_dim: int = 16
    dtype: torch.dtype = torch.float32
    kv_cache: str = "auto"  # or an fp8 one, as vLLM calls it
    windows: tuple[int | None, ...] = (None,)
    second: int | None = None
    softcap: float = 0.0
    sinks: bool = False
    layers: int = 2  # of each group
    drafts: int = 0
    device: str = "cpu"
    layout: str = "NHD"
    gap: int = 0
    max_batch: int = 12
    max_context: int = 512
    max_tokens: int = 512


@dataclass
class GroupOfLayers:
    """Layers of one builder, and their caches."""

    window: int | None
    layers: list[Any]
    pools: list[torch.Tensor]
    builder: Any


@dataclass
class Engine:
    """What a model runner has of an engine."""

    setup: Setup
    config: Any
    groups: list[GroupOfLayers]
    rng: torch.Generator


def make_config(s: Setup) -> Any:
    """A VllmConfig without a model to look at: of the model, what the backend reads."""
    config = VllmConfig()
    config.cache_config.block_size = s.page_tokens
    config.cache_config.cache_dtype = s.kv_cache
    config.scheduler_config.max_num_seqs = s.max_batch
    config.scheduler_config.max_num_batched_tokens = s.max_tokens
    config.model_config = SimpleNamespace(
        dtype=s.dtype,
        max_model_len=s.max_context,
        rswa_window=None,
        is_mm_prefix_lm=False,
        get_num_attention_heads=lambda parallel: s.heads[0],
    )
    if s.drafts:
        config.speculative_config = SimpleNamespace(num_speculative_tokens=s.drafts)
    return config


def make_engine(s: Setup, seed: int = 0, config: Any = None, bind: bool = True) -> Engine:
    """Caches full of NaN. bind: the layers know theirs before the first forward."""
    rng = torch.Generator().manual_seed(seed)
    config = config or make_config(s)
    groups = []
    with set_current_vllm_config(config):
        torch.set_default_dtype(s.dtype)
        try:
            for number, window in enumerate(s.windows):
                groups.append(_make_group(s, config, number, window, rng, bind))
        finally:
            torch.set_default_dtype(torch.float32)
    return Engine(s, config, groups, rng)


def _make_group(
    s: Setup, config: Any, number: int, window: int | None, rng: torch.Generator, bind: bool
) -> GroupOfLayers:
    layers = []
    for layer in range(s.layers):
        options: dict[str, Any] = {}
        if s.sinks:
            sinks = torch.randn(s.heads[0], generator=rng)
            options["sinks"] = sinks.to(s.dtype).to(s.device)
        layers.append(
            Attention(
                s.heads[0],
                s.head_dim,
                s.head_dim**-0.5,
                s.heads[1],
                cache_config=config.cache_config,
                logits_soft_cap=s.softcap or None,
                per_layer_sliding_window=_window(s, window, layer),
                prefix=f"model.layers.{number * s.layers + layer}.attn",
                attn_backend=FlashcoreBackend,
                **options,
            ).to(s.device)
        )
    shape = {
        "block_size": s.page_tokens,
        "num_kv_heads": s.heads[1],
        "head_size": s.head_dim,
        "dtype": s.dtype if s.kv_cache == "auto" else STR_DTYPE_TO_TORCH_DTYPE[s.kv_cache],
        "kv_quant_mode": get_kv_quant_mode(s.kv_cache),
    }
    spec = FullAttentionSpec(**shape)
    if window is not None:
        spec = SlidingWindowSpec(**shape, sliding_window=window)
    builder = FlashcoreBackend.get_builder_cls()(
        spec, [layer.layer_name for layer in layers], config, torch.device(s.device)
    )
    pools = [make_pool(s) for _ in layers]
    if bind:
        for layer, pool in zip(layers, pools, strict=True):
            layer.kv_cache = pool
    return GroupOfLayers(window, layers, pools, builder)


def _window(s: Setup, of_group: int | None, layer: int) -> int | None:
    """Of one layer of a group."""
    return s.second if layer == 1 and of_group is None else of_group


def make_pool(s: Setup) -> torch.Tensor:
    """A cache [blocks, kv_heads, tokens, 2 * head_dim] in the layout's order, of NaN."""
    blocks = s.max_batch * (s.max_context // s.page_tokens + 2)
    inner = (s.page_tokens, s.heads[1]) if s.layout == "NHD" else (s.heads[1], s.page_tokens)
    row = s.page_tokens * s.heads[1] * 2 * s.head_dim
    memory = torch.full((blocks, row + s.gap), float("nan"), dtype=s.dtype, device=s.device)
    if s.kv_cache != "auto":
        memory = torch.full_like(memory, 0xFF, dtype=torch.uint8)  # NaN in both formats
    pool = memory[:, :row].unflatten(1, (*inner, 2 * s.head_dim))
    return pool.transpose(1, 2) if s.layout == "NHD" else pool


def typed(s: Setup, pool: torch.Tensor) -> torch.Tensor:
    """A cache as what its bytes are."""
    return pool if s.kv_cache == "auto" else pool.view(FP8_CACHES[s.kv_cache])


@dataclass
class Forward:
    """One forward: what vLLM says of it to each group, and q, k, v of each layer."""

    requests: list[Request]
    common: list[CommonAttentionMetadata]
    blocks: list[list[list[int]]]  # by group and request, those before a window too
    q: list[torch.Tensor] = field(default_factory=list)
    k: list[torch.Tensor] = field(default_factory=list)
    v: list[torch.Tensor] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return sum(r.new for r in self.requests)


def make_forward(
    engine: Engine, requests: list[Request], padded: int = 0, padded_tokens: int = 0
) -> Forward:
    """Blocks for `requests` in every group, random keys in the cached ones, and what vLLM says.

    padded: rows of the batch, more than there are requests, as a captured graph has them.
    padded_tokens: of q, k and v.
    """
    forward = Forward(requests, [], [])
    for group in engine.groups:
        blocks = _blocks(engine, requests)
        forward.blocks.append(blocks)
        rows = [
            _freed(engine.setup, group.window, r, b) for r, b in zip(requests, blocks, strict=True)
        ]
        _fill_cache(engine, group, requests, rows)
        forward.common.append(_common(engine, requests, rows, padded, padded_tokens))
    s, tokens = engine.setup, max(forward.tokens, padded_tokens)
    for _ in range(len(engine.groups) * s.layers):
        for kind, heads in (("q", s.heads[0]), ("k", s.heads[1]), ("v", s.heads[1])):
            values = torch.randn(tokens, heads, s.head_dim, generator=engine.rng)
            getattr(forward, kind).append(values.to(s.dtype).to(s.device))
    return forward


def _blocks(engine: Engine, requests: list[Request]) -> list[list[int]]:
    s = engine.setup
    count = engine.groups[0].pools[0].shape[0]
    free = iter(
        (torch.randperm(count - 1, generator=engine.rng) + 1).tolist()
    )  # 0 is the null block
    groups: dict[int, list[int]] = {}
    blocks = []
    for r in requests:
        common = min(r.shared, r.prefix) // s.page_tokens
        group = groups.setdefault(r.group, [])
        group.extend(next(free) for _ in range(common - len(group)))
        own = -(-(r.prefix + r.new) // s.page_tokens) - common
        blocks.append([*group[:common], *(next(free) for _ in range(own))])
    return blocks


def _freed(s: Setup, window: int | None, r: Request, blocks: list[int]) -> list[int]:
    """The row of a block table: blocks that no query of this forward sees are the null block."""
    if window is None:
        return blocks
    gone = max(0, r.prefix - window + 1) // s.page_tokens
    return [0] * gone + blocks[gone:]


def _fill_cache(
    engine: Engine, group: GroupOfLayers, requests: list[Request], rows: list[list[int]]
) -> None:
    s = engine.setup
    for r, row in zip(requests, rows, strict=True):
        for position in range(0, r.prefix, s.page_tokens):
            block = row[position // s.page_tokens]
            if block:
                count = min(s.page_tokens, r.prefix - position)
                for pool in group.pools:
                    values = torch.randn(s.heads[1], count, 2 * s.head_dim, generator=engine.rng)
                    typed(s, pool)[block, :, :count] = values.to(typed(s, pool).dtype).to(s.device)


def _common(
    engine: Engine, requests: list[Request], rows: list[list[int]], padded: int, padded_tokens: int
) -> CommonAttentionMetadata:
    s, batch = engine.setup, max(len(requests), padded)
    width = s.max_context // s.page_tokens + 2
    table = torch.zeros(batch, width, dtype=torch.int32)
    lengths, starts, slots = torch.zeros(batch, dtype=torch.int32), [0], []
    for number, (r, row) in enumerate(zip(requests, rows, strict=True)):
        table[number] = STALE
        table[number, : len(row)] = torch.tensor(row, dtype=torch.int32)
        lengths[number] = r.prefix + r.new
        starts.append(starts[-1] + r.new)
        for position in range(r.prefix, r.prefix + r.new):
            slots.append(row[position // s.page_tokens] * s.page_tokens + position % s.page_tokens)
    starts += [starts[-1]] * (batch - len(requests))
    tokens = max(starts[-1], padded_tokens)
    slots += [-1] * (tokens - len(slots))
    begin = torch.tensor(starts, dtype=torch.int32)
    return CommonAttentionMetadata(
        query_start_loc=begin.to(s.device),
        query_start_loc_cpu=begin.clone(),
        seq_lens=lengths.to(s.device),
        num_reqs=batch,
        num_actual_tokens=tokens,
        max_query_len=max([r.new for r in requests], default=0),
        max_seq_len=s.max_context,  # a bound
        block_table_tensor=table.to(s.device),
        slot_mapping=torch.tensor(slots, dtype=torch.int64, device=s.device),
    )


def attend(engine: Engine, forward: Forward) -> list[torch.Tensor]:
    """Each layer's output, as vLLM's Attention calls its implementation."""
    outs = [torch.full_like(q, float("nan")) for q in forward.q]
    metadata = [
        group.builder.build(0, common)
        for group, common in zip(engine.groups, forward.common, strict=True)
    ]
    run_layers(engine, forward, metadata, outs)
    return outs


def run_layers(
    engine: Engine, forward: Forward, metadata: list[Any], outs: list[torch.Tensor]
) -> None:
    """Every layer, with metadata of its group."""
    place = 0
    for number, group in enumerate(engine.groups):
        for layer, pool in zip(group.layers, group.pools, strict=True):
            q, k, v = (getattr(forward, kind)[place] for kind in "qkv")
            slots = forward.common[number].slot_mapping
            layer.impl.do_kv_cache_update(layer, k, v, pool, slots)
            layer.impl.forward(layer, q, k, v, pool, metadata[number], outs[place])
            place += 1


def expected(engine: Engine, forward: Forward) -> list[torch.Tensor]:
    """Each layer's output in float64, from the cache as it is after the forward wrote to it."""
    s, outs = engine.setup, []
    for number, group in enumerate(engine.groups):
        for place, (layer, pool) in enumerate(zip(group.layers, group.pools, strict=True)):
            rows, begin = [], 0
            q = forward.q[len(outs)]
            window = _window(s, group.window, place)
            for r, blocks in zip(forward.requests, forward.blocks[number], strict=True):
                row = _freed(s, group.window, r, blocks)
                keys = (
                    typed(s, pool)[torch.tensor(row, dtype=torch.long, device=s.device)]
                    .transpose(1, 2)
                    .flatten(0, 1)
                )
                keys = keys[: r.prefix + r.new].double()
                k, v = keys.split(s.head_dim, -1)
                if s.kv_cache != "auto":
                    k, v = k * _by_head(layer._k_scale), v * _by_head(layer._v_scale)
                out, _ = sequence_attention(
                    q[begin : begin + r.new].double(),
                    k,
                    v,
                    causal=True,
                    scale=s.head_dim**-0.5,
                    window=None if window is None else (window - 1, 0),
                    softcap=s.softcap,
                    sinks=layer.impl.sinks,
                )
                rows.append(out)
                begin += r.new
            rows.append(torch.zeros_like(q[begin:], dtype=torch.float64))
            outs.append(torch.cat(rows))
    return outs


def _by_head(scale: torch.Tensor) -> torch.Tensor:
    """To multiply [tokens, heads, dim] by."""
    return scale.double().reshape(-1, 1)
