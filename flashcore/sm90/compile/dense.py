"""Compile function of dense attention: config in, compiled kernel out, no tensors."""

from __future__ import annotations

from typing import Any

from flashcore.sm90.compile.fake import compiled, element_of, vector
from flashcore.sm90.config.dense import DenseConfig, illegal_reason


def compile_dense(config: DenseConfig, options: str = "") -> Any:
    """Compile dense attention for `config`; the result exports with `export_to_c`.

    Call arguments, in order: q, k, v, out, lse or None, cu_seqlens_q or None, cu_seqlens_k or
    None, sinks or None, scheduler_scratch or None, softmax_scale, softcap, window_left,
    window_right, max_seqlen_q, num_ctas. The stream is the caller's current one.
    """
    reason = illegal_reason(config)
    if reason is not None:
        raise ValueError(reason)

    from cutlass import Float32, Int32

    from flashcore.sm90.kernels.attention.dense.kernel import DenseAttention

    return compiled(
        DenseAttention(config),
        *_dense_tensors(config),
        Float32(1.0),
        Float32(0.0),
        Int32(-1),
        Int32(-1),
        Int32(1),
        Int32(1),
        options=options,
    )


def _dense_tensors(config: DenseConfig) -> tuple[Any, ...]:
    """Fake tensors with the extents and strides a launch may bring."""
    import cutlass.cute as cute
    from cutlass import Float32, Int32
    from cutlass.cute.runtime import make_fake_tensor

    dtype = element_of(config.dtype)
    batch = cute.sym_int()
    heads = cute.sym_int(divisibility=config.pack_gqa)
    kv_heads = cute.sym_int()
    dim = cute.sym_int(divisibility=8)
    seqlen_q, seqlen_k = cute.sym_int(), cute.sym_int()

    def packed_or_not(rows: Any, num_heads: Any) -> Any:
        # 8 elements are the 16 bytes TMA and the stores need.
        leading = (rows,) if config.varlen else (batch, rows)
        stride: tuple[Any, ...] = (
            *(cute.sym_int64(divisibility=8) for _ in range(len(leading) + 1)),
            1,
        )
        return make_fake_tensor(dtype, (*leading, num_heads, dim), stride, assumed_align=16)

    lse = None
    if config.return_lse:
        shape = (seqlen_q, heads) if config.varlen else (batch, seqlen_q, heads)
        stride: tuple[Any, ...] = (*(cute.sym_int64() for _ in range(len(shape) - 1)), 1)
        lse = make_fake_tensor(Float32, shape, stride, assumed_align=4)
    bounds = cute.sym_int()
    return (
        packed_or_not(seqlen_q, heads),
        packed_or_not(seqlen_k, kv_heads),
        packed_or_not(seqlen_k, kv_heads),
        packed_or_not(seqlen_q, heads),
        lse,
        vector(Int32, bounds) if config.varlen else None,
        vector(Int32, bounds) if config.varlen else None,
        vector(Float32, heads) if config.sinks else None,
        vector(Int32, 2) if config.dynamic else None,
    )
