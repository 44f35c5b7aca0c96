"""Compile functions: config in, compiled kernel out, no tensors, so they run without a GPU."""

from __future__ import annotations

from typing import Any

from flashcore.config.dense import DenseConfig, illegal_reason

COMPILE_OPTIONS = "--enable-tvm-ffi --opt-level 3"


def compile_dense(config: DenseConfig, options: str = "") -> Any:
    """Compile dense attention for `config`; the result exports with `export_to_c`.

    Call arguments, in order: q, k, v, out, lse or None, cu_seqlens_q or None, cu_seqlens_k or
    None, sinks or None, scheduler_scratch or None, softmax_scale, softcap, window_left,
    window_right, max_seqlen_q, num_ctas. The stream is the caller's current one.
    """
    reason = illegal_reason(config)
    if reason is not None:
        raise ValueError(reason)

    import cutlass.cute as cute
    from cutlass import Float32, Int32
    from cutlass.cute.runtime import make_fake_stream

    from flashcore.kernels.dense import DenseAttention

    return cute.compile(
        DenseAttention(config),
        *_dense_tensors(config),
        Float32(1.0),
        Float32(0.0),
        Int32(-1),
        Int32(-1),
        Int32(1),
        Int32(1),
        make_fake_stream(use_tvm_ffi_env_stream=True),
        options=f"{COMPILE_OPTIONS} {options}".strip(),
    )


def _dense_tensors(config: DenseConfig) -> tuple[Any, ...]:
    """Fake tensors with the extents and strides a launch may bring."""
    import cutlass.cute as cute
    from cutlass import BFloat16, Float16, Float32, Int32
    from cutlass.cute.runtime import make_fake_tensor

    dtype = {"bf16": BFloat16, "fp16": Float16}[config.dtype]
    batch = cute.sym_int()
    heads = cute.sym_int(divisibility=config.pack_gqa)
    kv_heads = cute.sym_int()
    dim = cute.sym_int(divisibility=8)
    seqlen_q, seqlen_k = cute.sym_int(), cute.sym_int()

    def strided(rows: Any, num_heads: Any) -> Any:
        # 8 elements are the 16 bytes TMA and the stores need.
        leading = (rows,) if config.varlen else (batch, rows)
        stride: tuple[Any, ...] = (
            *(cute.sym_int64(divisibility=8) for _ in range(len(leading) + 1)),
            1,
        )
        return make_fake_tensor(dtype, (*leading, num_heads, dim), stride, assumed_align=16)

    def vector(element: Any, extent: Any) -> Any:
        return make_fake_tensor(element, (extent,), (1,), assumed_align=4)

    lse = None
    if config.return_lse:
        shape = (seqlen_q, heads) if config.varlen else (batch, seqlen_q, heads)
        stride: tuple[Any, ...] = (*(cute.sym_int64() for _ in range(len(shape) - 1)), 1)
        lse = make_fake_tensor(Float32, shape, stride, assumed_align=4)
    bounds = cute.sym_int()
    return (
        strided(seqlen_q, heads),
        strided(seqlen_k, kv_heads),
        strided(seqlen_k, kv_heads),
        strided(seqlen_q, heads),
        lse,
        vector(Int32, bounds) if config.varlen else None,
        vector(Int32, bounds) if config.varlen else None,
        vector(Float32, heads) if config.sinks else None,
        vector(Int32, 2) if config.dynamic else None,
    )
