"""Launch the paged kernels on torch tensors: the hot path of `flashcore.paged_attention` on Hopper.

    plan's tensors ─► attention over the work list ─► partial results ─► merge ─► out, lse

Two launches on torch's current stream (one where no result is partial), no synchronisation, so
calls can be captured in a CUDA graph. Arguments are taken as already checked (flashcore.validate).
"""

from __future__ import annotations

from functools import lru_cache

import torch

from flashcore.config.paged import (
    CombineConfig,
    PagedConfig,
    choose,
    choose_combine,
    choose_device_combine,
)
from flashcore.runtime.cache import shared_cache
from flashcore.runtime.kernel import COMBINE, PAGED, Kernel
from flashcore.runtime.launch import DTYPE_NAMES, scheduler_scratch, sm_count, tma_ready
from flashcore.runtime.load import CompiledFunction

_ANY_WIDTH = 2**31 - 1

_functions: dict[PagedConfig | CombineConfig, CompiledFunction] = {}
_choose = lru_cache(maxsize=1024)(choose)  # a choice costs the host as much as a launch


def paged_attention(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    cols: torch.Tensor,
    work: torch.Tensor,
    q_tokens: torch.Tensor,
    q_positions: torch.Tensor,
    q_index: torch.Tensor,
    merge_offsets: torch.Tensor,
    merge_partials: torch.Tensor,
    num_partial_tokens: int,
    needs_merge: bool,
    tile_m: int,
    *,
    causal: bool,
    scale: float,
    window_left: int,
    window_right: int,
    softcap: float,
    sinks: torch.Tensor | None,
    tree_mask: torch.Tensor | None,
    counts: torch.Tensor | None = None,
    workspace: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Shapes as in `flashcore.paged_attention` and `Plan`: (out like q, lse [total_q,
    num_q_heads]).

    counts: of a plan made on the device, whose tensors are at capacity. workspace: fp32
    [num_partial_tokens, num_q_heads, head_dim], the same without the last axis, and a
    `scheduler_scratch` of its own. out: to write the result to. Both are made where not given.

    Raises NotImplementedError for a dtype, ValueError for a head_dim, page size or stride that the
    kernels cannot take.
    """
    q, k_pages, v_pages = (
        tma_ready(name, x) for name, x in (("q", q), ("k_pages", k_pages), ("v_pages", v_pages))
    )
    if q.dtype not in DTYPE_NAMES:
        raise NotImplementedError(f"q has dtype {q.dtype}; the Hopper kernel takes bf16 and fp16")
    total_q, heads, dim = q.shape
    page_tokens, kv_heads = k_pages.shape[1], k_pages.shape[2]
    dtype = DTYPE_NAMES[q.dtype]
    config = _choose(
        dtype,
        dim,
        page_tokens,
        heads // kv_heads,
        tile_m,
        causal=causal,
        window=window_left >= 0 or window_right >= 0,
        softcap=softcap > 0,
        sinks=sinks is not None,
        tree=tree_mask is not None,
        device_counts=counts is not None,
    )
    if out is None:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
    else:
        out = tma_ready("out", out)
    lse = q.new_empty((total_q, heads), dtype=torch.float32)
    if total_q == 0:
        return out, lse
    if workspace is not None:
        partial_out, partial_lse, scratch = workspace
    else:
        scratch = scheduler_scratch(q.device.index)
        if num_partial_tokens:
            partial_out = lse.new_empty((num_partial_tokens, heads, dim))
            partial_lse = lse.new_empty((num_partial_tokens, heads))
        else:
            partial_out, partial_lse = _no_partials(q.device, heads, dim)
    if sinks is not None:
        sinks = sinks.float()
    num_items = work.shape[0]
    if num_items:
        _function(config)(
            q,
            k_pages,
            v_pages,
            out,
            lse,
            partial_out,
            partial_lse,
            cols,
            work,
            q_tokens,
            q_positions,
            q_index if config.tree else None,
            None if tree_mask is None else tree_mask.view(torch.uint8),
            sinks,
            scratch,
            counts,
            scale,
            softcap,
            window_left,
            window_right,
            min(num_items, config.ctas_per_sm * sm_count(q.device)),
        )
    if needs_merge:
        entries = merge_partials.numel()
        if entries == 0:  # query tokens without keys: their zeros are written by the merge
            merge_partials = merge_offsets
        if counts is None:
            merge = choose_combine(dtype, dim, sinks is not None, entries, total_q)
        else:
            merge = choose_device_combine(dtype, dim, sinks is not None, total_q * heads)
        _function(merge)(
            out,
            lse,
            partial_out,
            partial_lse,
            merge_offsets,
            merge_partials,
            sinks,
            counts,
            _ANY_WIDTH if tree_mask is None else tree_mask.shape[1],
        )
    return out, lse


@lru_cache(maxsize=64)
def _no_partials(device: torch.device, heads: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One partial token that nobody touches: an empty tensor has no address to hand over."""
    partial_out = torch.empty((1, heads, dim), dtype=torch.float32, device=device)
    return partial_out, torch.empty((1, heads), dtype=torch.float32, device=device)


def _function(config: PagedConfig | CombineConfig) -> CompiledFunction:
    """The compiled function of `config`, compiled now if no process has done so before."""
    found = _functions.get(config)
    if found is None:
        family = PAGED if isinstance(config, PagedConfig) else COMBINE
        found = _functions[config] = shared_cache().function(Kernel(family, config))
    return found
