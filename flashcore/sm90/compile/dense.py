"""Compile function of dense attention: config in, compiled kernel out, no tensors."""

from __future__ import annotations

from typing import Any

from flashcore.contract.operands import Dense
from flashcore.sm90.compile.fake import compiled, element_of, vector
from flashcore.sm90.config.dense import DenseConfig, illegal_reason


def compile_dense(config: DenseConfig, options: str = "") -> Any:
    """Compile dense attention for `config`; the result exports with `export_to_c` and is called
    with `contract.operands.Dense`, one by one, on the caller's current stream. ValueError where
    `config` cannot run."""
    reason = illegal_reason(config)
    if reason is not None:
        raise ValueError(reason)

    from flashcore.sm90.kernels.attention.dense.kernel import DenseAttention

    return compiled(DenseAttention(config), *_operands(config), options=options)


def _operands(config: DenseConfig) -> Dense:
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
    return Dense(
        q=packed_or_not(seqlen_q, heads),
        k=packed_or_not(seqlen_k, kv_heads),
        v=packed_or_not(seqlen_k, kv_heads),
        out=packed_or_not(seqlen_q, heads),
        lse=lse,
        cu_seqlens_q=vector(Int32, bounds) if config.varlen else None,
        cu_seqlens_k=vector(Int32, bounds) if config.varlen else None,
        sinks=vector(Float32, heads) if config.sinks else None,
        counter=vector(Int32, 2) if config.dynamic else None,
        softmax_scale=Float32(1.0),
        softcap=Float32(0.0),
        window_left=Int32(-1),
        window_right=Int32(-1),
        max_seqlen_q=Int32(1),
        num_ctas=Int32(1),
    )
