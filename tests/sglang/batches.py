"""Batches as SGLang makes them, with slots that requests SHARE, and what must come out of them.

SGLang's own runner mock, ForwardBatch, request table and KV pools; the reference gathers every
request's keys by slot and knows nothing of pages or plans.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from sglang.srt.layers.radix_attention import AttentionType, RadixAttention
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool
from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode
from sglang.test.kits.attention_unittest.attention_methods.dense_attention import (
    DenseAttentionCase,
    MockModelRunner,
    TinyModelConfig,
)

from flashcore.integrations.sglang.register import NAME
from tests.serving_cases import Request

PADDING = 3  # requests that a graph's batch is padded by


@dataclass(frozen=True)
class Setup:
    """A model and a cache."""

    page_tokens: int
    heads: tuple[int, int] = (4, 2)
    head_dim: int = 16
    v_head_dim: int = 0  # 0: head_dim
    dtype: torch.dtype = torch.float32
    kv_dtype: torch.dtype | None = None  # None: dtype
    device: str = "cpu"
    window: int = -1
    two_pools: bool = False  # windowed layers in a pool of their own
    draft_tokens: int = 0
    max_context: int = 512

    @property
    def v_dim(self) -> int:
        return self.v_head_dim or self.head_dim

    @property
    def cache_dtype(self) -> torch.dtype:
        return self.kv_dtype or self.dtype


@dataclass
class Engine:
    """A runner, its backend, and two layers, of which the second has the window."""

    setup: Setup
    runner: Any
    backend: Any
    layers: list[RadixAttention]
    rng: torch.Generator
    k: dict[int, torch.Tensor] = field(default_factory=dict)


def make_engine(
    setup: Setup,
    max_batch: int = 12,
    seed: int = 0,
    prepare: Callable[[Any, list[RadixAttention]], None] | None = None,
    name: str = NAME,
) -> Engine:
    """Pools full of NaN, and the backend `name` from SGLang's registry. prepare: called with runner
    and layers before the backend is made."""
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS

    s = setup
    mode = ForwardMode.TARGET_VERIFY if s.draft_tokens else ForwardMode.DECODE
    case = DenseAttentionCase(
        name="shared",
        backend=name,
        forward_mode=mode,
        num_heads=s.heads[0],
        num_kv_heads=s.heads[1],
        page_size=s.page_tokens,
        prefix_lens=(1,) * max_batch,
        extend_lens=(s.draft_tokens,) * max_batch,
        sliding_window_size=s.window if s.window >= 0 else None,
    )
    config = TinyModelConfig(
        num_heads=s.heads[0],
        num_kv_heads=s.heads[1],
        head_dim=s.head_dim,
        hidden_size=64,
        context_len=s.max_context,
        sliding_window_size=case.sliding_window_size,
    )
    config.v_head_dim = config.swa_v_head_dim = s.v_dim
    runner = MockModelRunner(
        case=case,
        model_config=config,
        dtype=s.dtype,
        device=s.device,
        max_context_len=s.max_context,
        head_dim=s.head_dim,
    )
    runner.kv_cache_dtype = s.cache_dtype
    rng = torch.Generator().manual_seed(seed)
    size = s.page_tokens * (max_batch * (s.max_context // s.page_tokens + 2))
    _make_pools(runner, setup, size, rng)
    layers = [
        RadixAttention(
            num_heads=s.heads[0],
            head_dim=s.head_dim,
            v_head_dim=s.v_dim,
            scaling=s.head_dim**-0.5,
            num_kv_heads=s.heads[1],
            layer_id=layer,
            sliding_window_size=s.window if layer else -1,
        )
        for layer in range(2 if s.window >= 0 else 1)
    ]
    runner.model = torch.nn.ModuleList(layers)
    if prepare is not None:
        prepare(runner, layers)
    return Engine(setup, runner, ATTENTION_BACKENDS[name](runner), layers, rng)


def with_scales(
    k_scale: float | None, v_scale: float | None, parameters: bool
) -> Callable[[Any, list[RadixAttention]], None]:
    """For `make_engine`: scales of an fp8 cache, other ones for each layer; as parameters, which
    SGLang has of a checkpoint, or as numbers, of --quantization-param-path."""

    def prepare(runner: Any, layers: list[RadixAttention]) -> None:
        for number, layer in enumerate(layers):
            for name, value in (("k_scale", k_scale), ("v_scale", v_scale)):
                scale: Any = None if value is None else value * (number + 1)
                if parameters:
                    tensor = torch.tensor(scale, device=runner.device)
                    scale = torch.nn.Parameter(tensor, requires_grad=False)
                delattr(layer, name)  # None, as SGLang has it, is no parameter
                setattr(layer, name, scale)

    return prepare


def _make_pools(runner: Any, s: Setup, size: int, rng: torch.Generator) -> None:
    common = {
        "page_size": s.page_tokens,
        "dtype": s.cache_dtype,
        "head_num": s.heads[1],
        "head_dim": s.head_dim,
        "v_head_dim": s.v_dim,
        "device": s.device,
        "enable_alt_stream": False,
    }
    if s.two_pools:
        pool = SWAKVPool(
            size=size,
            size_swa=size,
            swa_attention_layer_ids=[1],
            full_attention_layer_ids=[0],
            **common,
        )
        pages = size // s.page_tokens
        order = torch.cat(
            [torch.zeros(1, dtype=torch.long), torch.randperm(pages, generator=rng) + 1]
        )
        slots = order[:, None] * s.page_tokens + torch.arange(s.page_tokens)
        mapping = torch.cat([slots.flatten(), torch.tensor([-1])]).to(s.device)
        pool.register_mapping(mapping)
    else:
        pool = MHATokenToKVPool(size=size, layer_num=2, enable_memory_saver=False, **common)
    for layer in range(2):
        for buffer in pool.get_kv_buffer(layer):
            buffer.copy_(torch.full_like(buffer, float("nan"), dtype=torch.float32))
    runner.token_to_kv_pool = pool


@dataclass
class Forward:
    """One forward: SGLang's batch, and q, k, v of each layer."""

    batch: ForwardBatch
    slots: list[torch.Tensor]  # of each request, all keys
    new: list[int]
    q: list[torch.Tensor]
    k: list[torch.Tensor]
    v: list[torch.Tensor]
    tree: list[torch.Tensor] | None = None  # of each request [new, new]

    @property
    def tokens(self) -> int:
        return sum(self.new)


def make_forward(
    engine: Engine, mode: ForwardMode, requests: list[Request], tree: bool = False
) -> Forward:
    """Slots for `requests`, random keys in the cached ones, and the batch of their new tokens."""
    s, pool = engine.setup, engine.runner.token_to_kv_pool
    table = engine.runner.req_to_token_pool.req_to_token
    free = iter((torch.randperm(pool.size // s.page_tokens, generator=engine.rng) + 1).tolist())
    shared: dict[int, list[int]] = {}
    slots, rows = [], []
    order = torch.randperm(table.shape[0] - 1, generator=engine.rng) + 1
    for number, request in enumerate(requests):
        length = request.prefix + request.new
        in_common = min(request.shared, request.prefix) // s.page_tokens
        pages = shared.setdefault(request.group, [])
        pages.extend(next(free) for _ in range(in_common - len(pages)))
        own = -(-length // s.page_tokens) - in_common
        pages = [*pages[:in_common], *(next(free) for _ in range(own))]
        all_slots = torch.tensor(pages)[:, None] * s.page_tokens + torch.arange(s.page_tokens)
        slots.append(all_slots.flatten()[:length].to(s.device))
        row = int(order[number])
        rows.append(row)
        table[row] = 2**31 - 1 - s.page_tokens  # past its tokens, what was left by others
        table[row, :length] = slots[-1].int()
    _fill_cache(engine, slots, [r.prefix for r in requests])
    batch = batch_of(engine, mode, requests, slots, rows)
    forward = Forward(batch, slots, [r.new for r in requests], [], [], [])
    for layer in engine.layers:
        for kind, heads, dim in (
            ("q", layer.tp_q_head_num, layer.head_dim),
            ("k", layer.tp_k_head_num, layer.head_dim),
            ("v", layer.tp_v_head_num, layer.v_head_dim),
        ):
            values = torch.randn(forward.tokens, heads, dim, generator=engine.rng)
            getattr(forward, kind).append(values.to(s.dtype).to(s.device))
    if mode.is_target_verify():
        _add_spec_info(engine, forward, requests, tree)
    return forward


def _fill_cache(engine: Engine, slots: list[torch.Tensor], prefixes: list[int]) -> None:
    s, pool = engine.setup, engine.runner.token_to_kv_pool
    cached = torch.cat([row[:n] for row, n in zip(slots, prefixes, strict=True)]).unique()
    for layer in engine.layers:
        at = cached
        if s.two_pools and layer.sliding_window_size >= 0:
            at = pool.translate_loc_from_full_to_swa(cached)
        for buffer in pool.get_kv_buffer(layer.layer_id):
            values = torch.randn(len(at), *buffer.shape[1:], generator=engine.rng)
            buffer[at] = values.to(buffer.dtype).to(s.device)


def batch_of(
    engine: Engine,
    mode: ForwardMode,
    requests: list[Request],
    slots: list[torch.Tensor],
    rows: list[int],
) -> ForwardBatch:
    device = engine.setup.device
    new = [r.new for r in requests]
    verify = mode.is_target_verify()
    lengths = [r.prefix + (0 if verify else r.new) for r in requests]
    positions = [torch.arange(r.prefix, r.prefix + r.new) for r in requests]
    batch = ForwardBatch(
        forward_mode=mode,
        batch_size=len(requests),
        input_ids=torch.zeros(sum(new), dtype=torch.int64, device=device),
        req_pool_indices=torch.tensor(rows, dtype=torch.int64, device=device),
        seq_lens=torch.tensor(lengths, dtype=torch.int64, device=device),
        seq_lens_cpu=torch.tensor(lengths),
        out_cache_loc=torch.cat(
            [row[-n:] if n else row[:0] for row, n in zip(slots, new, strict=True)]
        ),
        seq_lens_sum=sum(lengths),
        positions=torch.cat(positions).to(device),
    )
    if mode.is_extend(include_draft_extend_v2=True) and not verify:
        batch.extend_seq_lens = torch.tensor(new, dtype=torch.int32, device=device)
        batch.extend_seq_lens_cpu = new
        batch.extend_prefix_lens_cpu = [r.prefix for r in requests]
        batch.extend_num_tokens = sum(new)
    return batch


def _add_spec_info(engine: Engine, forward: Forward, requests: list[Request], tree: bool) -> None:
    """A verify input with only what a backend reads; every draft token sees itself."""
    n = engine.setup.draft_tokens
    chain = torch.ones(n, n).tril().bool()
    masks = []
    for _ in requests:
        mask = torch.eye(n).bool()
        for i in range(1, n):  # a token sees what its parent sees
            parent = int(torch.randint(0, i, (1,), generator=engine.rng)) if tree else i - 1
            mask[i] |= mask[parent]
        assert tree or torch.equal(mask, chain)
        masks.append(mask)
    flat = [
        torch.cat([torch.ones(n, r.prefix).bool(), mask], 1).flatten()
        for r, mask in zip(requests, masks, strict=True)
    ]
    forward.tree = [mask.to(engine.setup.device) for mask in masks]
    forward.batch.spec_info = SimpleNamespace(
        draft_token_num=n,
        topk=4 if tree else 1,
        custom_mask=torch.cat(flat).to(engine.setup.device),
    )


def attend(engine: Engine, forward: Forward, fb: Any = None, **options: Any) -> list[torch.Tensor]:
    """Each layer's output [tokens, heads * dim] through the backend's own entry point."""
    fb = fb or forward.batch
    outs = []
    for number, layer in enumerate(engine.layers):
        q, k, v = forward.q[number], forward.k[number], forward.v[number]
        outs.append(engine.backend.forward(q.flatten(1), k, v, layer, fb, **options))
    return outs


def expected(engine: Engine, forward: Forward, sinks: torch.Tensor | None = None) -> list[Any]:
    """Each layer's output in float64, from the pool as it is after the forward wrote to it."""
    pool = engine.runner.token_to_kv_pool
    outs = []
    for number, layer in enumerate(engine.layers):
        k_pool, v_pool = pool.get_kv_buffer(layer.layer_id)
        rows, begin = [], 0
        for request, slots in enumerate(forward.slots):
            n = forward.new[request]
            if engine.setup.two_pools and layer.sliding_window_size >= 0:
                slots = pool.translate_loc_from_full_to_swa(slots)
            q = forward.q[number][begin : begin + n]
            tree = forward.tree[request] if forward.tree else None
            k, v = k_pool[slots].double(), v_pool[slots].double()
            if engine.setup.kv_dtype is not None:
                k, v = (x * (s or 1.0) for x, s in ((k, layer.k_scale), (v, layer.v_scale)))
            rows.append(_one(layer, q, k, v, tree, sinks))
            begin += n
        outs.append(torch.cat(rows).flatten(1))
    return outs


def _one(
    layer: RadixAttention,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    tree: torch.Tensor | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    n, length = q.shape[0], k.shape[0]
    if n == 0:
        return q[..., : v.shape[-1]].double()
    group = q.shape[1] // k.shape[1]
    q, k, v = q.double(), k.double(), v.double()
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * layer.scaling
    if layer.logit_cap:
        scores = layer.logit_cap * torch.tanh(scores / layer.logit_cap)
    position = torch.arange(length - n, length, device=q.device)[:, None]
    key = torch.arange(length, device=q.device)
    if tree is not None:  # by depth, which is the number of ancestors
        position = length - n + tree.sum(1, keepdim=True) - 1
        key = torch.cat([key[: length - n], position[:, 0]])
    seen = key <= position
    if layer.attn_type == AttentionType.ENCODER_ONLY:
        seen = torch.ones_like(seen)
    if tree is not None:
        seen = torch.ones_like(seen)
        seen[:, length - n :] = tree
    if layer.sliding_window_size >= 0:
        seen &= key >= position - layer.sliding_window_size
        if layer.attn_type != AttentionType.ENCODER_ONLY:
            seen &= key <= position
    scores = scores.masked_fill(~seen, float("-inf"))
    if sinks is not None:
        extra = sinks.double()[:, None, None].expand(-1, n, 1)
        return torch.einsum(
            "hqk,khd->qhd", torch.cat([scores, extra], 2).softmax(2)[:, :, :length], v
        )
    return torch.einsum("hqk,khd->qhd", scores.softmax(2), v)


def graph_view(engine: Engine, forward: Forward, padded: int, buffers: Any) -> SimpleNamespace:
    """The batch of a replay as SGLang 0.5.16 shows it to a backend: padded, in static buffers."""
    fb, real = forward.batch, forward.batch.batch_size
    fill = engine.backend.get_cuda_graph_seq_len_fill_value()
    width = forward.tokens // real
    buffers.req_pool_indices[:real].copy_(fb.req_pool_indices)
    buffers.req_pool_indices[real:padded] = 0
    buffers.seq_lens[:real].copy_(fb.seq_lens)
    buffers.seq_lens[real:padded] = fill
    buffers.out_cache_loc[: real * width].copy_(fb.out_cache_loc)
    buffers.out_cache_loc[real * width : padded * width] = 0
    return SimpleNamespace(
        batch_size=padded,
        forward_mode=fb.forward_mode,
        req_pool_indices=buffers.req_pool_indices[:padded],
        seq_lens=buffers.seq_lens[:padded],
        seq_lens_cpu=None,
        num_padding=padded - real,
        encoder_lens=None,
        out_cache_loc=fb.out_cache_loc,
        spec_info=fb.spec_info,
    )


def graph_buffers(engine: Engine, max_batch: int) -> SimpleNamespace:
    """What a captured graph of SGLang reads."""
    width = max(1, engine.setup.draft_tokens)
    device = engine.setup.device
    return SimpleNamespace(
        req_pool_indices=torch.zeros(max_batch, dtype=torch.int64, device=device),
        seq_lens=torch.ones(max_batch, dtype=torch.int64, device=device),
        out_cache_loc=torch.zeros(max_batch * width, dtype=torch.int64, device=device),
    )
