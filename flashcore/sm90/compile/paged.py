"""Compile function of paged attention: config in, compiled kernel out, no tensors."""

from __future__ import annotations

from typing import Any

from flashcore.contract.counts import Count
from flashcore.contract.work import FIELDS
from flashcore.sm90.compile.fake import compiled, element_of, matrix, strided, table, vector
from flashcore.sm90.config.paged import PagedConfig, illegal_reason


def compile_paged(config: PagedConfig, options: str = "") -> Any:
    """Compile paged attention for `config`; the result exports with `export_to_c`.

    Call arguments, in order: q, k_pages, v_pages, out, lse, partial_out, partial_lse, cols, work,
    q_tokens, q_positions, q_index or None, tree_mask (uint8) or None, tree_positions or None, sinks
    or None, scheduler_scratch, counts or None, softmax_scale, softcap, window_left, window_right,
    num_ctas.
    The stream is the caller's current one.
    """
    reason = illegal_reason(config)
    if reason is not None:
        raise ValueError(reason)

    from cutlass import Float32, Int32

    from flashcore.sm90.kernels.attention.paged.kernel import PagedAttention

    return compiled(
        PagedAttention(config),
        *_paged_tensors(config),
        Float32(1.0),
        Float32(0.0),
        Int32(-1),
        Int32(-1),
        Int32(1),
        options=options,
    )


def _paged_tensors(config: PagedConfig) -> tuple[Any, ...]:
    """Fake tensors with the extents and strides a launch may bring."""
    import cutlass.cute as cute
    from cutlass import Float32, Int32, Uint8

    c = config
    dtype = element_of(c.dtype)
    total_q, partials, heads = cute.sym_int(), cute.sym_int(), cute.sym_int()
    pages, kv_heads = cute.sym_int(), cute.sym_int()
    gathered = cute.sym_int()

    return (
        strided(dtype, total_q, heads, c.head_dim),
        strided(dtype, pages, c.page_tokens, kv_heads, c.head_dim),
        strided(dtype, pages, c.page_tokens, kv_heads, c.v_head_dim),
        strided(dtype, total_q, heads, c.v_head_dim),
        matrix(Float32, total_q, heads, 4),
        strided(Float32, partials, heads, c.v_head_dim),
        matrix(Float32, partials, heads, 4),
        vector(Int32, cute.sym_int()),
        table(Int32, cute.sym_int(), FIELDS),
        vector(Int32, gathered),
        vector(Int32, gathered),
        vector(Int32, cute.sym_int()) if c.tree else None,
        matrix(Uint8, total_q, cute.sym_int(), 1) if c.tree else None,
        vector(Int32, total_q) if c.tree and c.window else None,
        vector(Float32, heads) if c.sinks else None,
        vector(Int32, 2),
        vector(Int32, int(Count.SIZE)) if c.device_counts else None,
    )
