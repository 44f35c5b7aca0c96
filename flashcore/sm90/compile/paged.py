"""Compile function of paged attention: config in, compiled kernel out, no tensors."""

from __future__ import annotations

from typing import Any

from flashcore.contract.counts import Count
from flashcore.contract.operands import Paged
from flashcore.contract.work import FIELDS
from flashcore.sm90.compile.fake import (
    any_stride,
    compiled,
    element_of,
    matrix,
    strided,
    table,
    vector,
)
from flashcore.sm90.config.paged import PagedConfig, illegal_reason


def compile_paged(config: PagedConfig, options: str = "") -> Any:
    """Compile paged attention for `config`; the result exports with `export_to_c` and is called
    with `contract.operands.Paged`, one by one, on the caller's current stream. ValueError where
    `config` cannot run."""
    reason = illegal_reason(config)
    if reason is not None:
        raise ValueError(reason)

    from flashcore.sm90.kernels.attention.paged.kernel import PagedAttention

    return compiled(PagedAttention(config), *_operands(config), options=options)


def _operands(config: PagedConfig) -> Paged:
    """Fake tensors with the extents and strides a launch may bring."""
    import cutlass.cute as cute
    from cutlass import Float32, Int32, Uint8

    c = config
    dtype = element_of(c.dtype)
    of_pages = Uint8 if c.kv_dtype else element_of("fp16") if c.expanded else dtype
    total_q, partials, heads = cute.sym_int(), cute.sym_int(), cute.sym_int()
    pages, kv_heads = cute.sym_int(), cute.sym_int()
    gathered = cute.sym_int()
    return Paged(
        q=strided(dtype, total_q, heads, c.head_dim),
        k_pages=strided(of_pages, pages, c.page_tokens, kv_heads, c.head_dim),
        v_pages=strided(of_pages, pages, c.page_tokens, kv_heads, c.v_head_dim),
        out=strided(dtype, total_q, heads, c.v_head_dim),
        lse=matrix(Float32, total_q, heads, 4),
        partial_out=strided(Float32, partials, heads, c.v_head_dim),
        partial_lse=matrix(Float32, partials, heads, 4),
        cols=vector(Int32, cute.sym_int()),
        work=table(Int32, cute.sym_int(), FIELDS),
        q_tokens=vector(Int32, gathered),
        q_positions=vector(Int32, gathered),
        q_index=vector(Int32, cute.sym_int()) if c.tree else None,
        tree_mask=matrix(Uint8, total_q, cute.sym_int(), 1) if c.tree else None,
        tree_positions=vector(Int32, total_q) if c.tree and c.window else None,
        sinks=vector(Float32, heads) if c.sinks else None,
        k_scale=any_stride(Float32, kv_heads) if c.scaled else None,
        v_scale=any_stride(Float32, kv_heads) if c.scaled else None,
        counter=vector(Int32, 2),
        counts=vector(Int32, int(Count.SIZE)) if c.device_counts else None,
        softmax_scale=Float32(1.0),
        softcap=Float32(0.0),
        window_left=Int32(-1),
        window_right=Int32(-1),
        num_ctas=Int32(1),
    )
