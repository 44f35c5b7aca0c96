"""Compile functions of the paged kernels: config in, compiled kernel out, no tensors."""

from __future__ import annotations

from typing import Any

from flashcore.config.paged import CombineConfig, PagedConfig, illegal_reason
from flashcore.planner.counters import Count
from flashcore.runtime.compile import COMPILE_OPTIONS


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

    import cutlass.cute as cute
    from cutlass import Float32, Int32
    from cutlass.cute.runtime import make_fake_stream

    from flashcore.kernels.paged import PagedAttention

    return cute.compile(
        PagedAttention(config),
        *_paged_tensors(config),
        Float32(1.0),
        Float32(0.0),
        Int32(-1),
        Int32(-1),
        Int32(1),
        make_fake_stream(use_tvm_ffi_env_stream=True),
        options=f"{COMPILE_OPTIONS} {options}".strip(),
    )


def _paged_tensors(config: PagedConfig) -> tuple[Any, ...]:
    """Fake tensors with the extents and strides a launch may bring."""
    import cutlass.cute as cute
    from cutlass import BFloat16, Float16, Float32, Int32, Uint8
    from cutlass.cute.runtime import make_fake_tensor

    c = config
    dtype = {"bf16": BFloat16, "fp16": Float16}[c.dtype]
    total_q, partials, heads = cute.sym_int(), cute.sym_int(), cute.sym_int()
    pages, kv_heads = cute.sym_int(), cute.sym_int()
    gathered = cute.sym_int()

    return (
        _strided(dtype, total_q, heads, c.head_dim),
        _strided(dtype, pages, c.page_tokens, kv_heads, c.head_dim),
        _strided(dtype, pages, c.page_tokens, kv_heads, c.v_head_dim),
        _strided(dtype, total_q, heads, c.v_head_dim),
        _matrix(Float32, total_q, heads, 4),
        _strided(Float32, partials, heads, c.v_head_dim),
        _matrix(Float32, partials, heads, 4),
        _vector(Int32, cute.sym_int()),
        make_fake_tensor(Int32, (cute.sym_int(), 8), (8, 1), assumed_align=16),
        _vector(Int32, gathered),
        _vector(Int32, gathered),
        _vector(Int32, cute.sym_int()) if c.tree else None,
        _matrix(Uint8, total_q, cute.sym_int(), 1) if c.tree else None,
        _vector(Int32, total_q) if c.tree and c.window else None,
        _vector(Float32, heads) if c.sinks else None,
        _vector(Int32, 2),
        _vector(Int32, int(Count.SIZE)) if c.device_counts else None,
    )


def compile_combine(config: CombineConfig, options: str = "") -> Any:
    """Compile the merge of partial results.

    Call arguments, in order: out, lse, partial_out, partial_lse, merge_offsets, merge_partials,
    sinks or None, counts or None, tree_width.
    """
    import cutlass.cute as cute
    from cutlass import BFloat16, Float16, Float32, Int32
    from cutlass.cute.runtime import make_fake_stream

    from flashcore.kernels.combine import Combine

    dtype = {"bf16": BFloat16, "fp16": Float16}[config.dtype]
    total_q, partials, heads = cute.sym_int(), cute.sym_int(), cute.sym_int()
    return cute.compile(
        Combine(config),
        _strided(dtype, total_q, heads, config.head_dim),
        _matrix(Float32, total_q, heads, 4),
        _strided(Float32, partials, heads, config.head_dim),
        _matrix(Float32, partials, heads, 4),
        _vector(Int32, cute.sym_int()),
        _vector(Int32, cute.sym_int()),
        _vector(Float32, heads) if config.sinks else None,
        _vector(Int32, int(Count.SIZE)) if config.device_counts else None,
        Int32(1),
        make_fake_stream(use_tvm_ffi_env_stream=True),
        options=f"{COMPILE_OPTIONS} {options}".strip(),
    )


def _strided(element: Any, *shape: Any) -> Any:
    """Free strides in multiples of the 8 elements that TMA and 16-byte copies need."""
    import cutlass.cute as cute
    from cutlass.cute.runtime import make_fake_tensor

    stride = [cute.sym_int64(divisibility=8) for _ in shape[:-1]]
    return make_fake_tensor(element, shape, (*stride, 1), assumed_align=16)


def _vector(element: Any, extent: Any) -> Any:
    from cutlass.cute.runtime import make_fake_tensor

    return make_fake_tensor(element, (extent,), (1,), assumed_align=4)


def _matrix(element: Any, rows: Any, columns: Any, align: int) -> Any:
    import cutlass.cute as cute
    from cutlass.cute.runtime import make_fake_tensor

    return make_fake_tensor(element, (rows, columns), (cute.sym_int64(), 1), assumed_align=align)
