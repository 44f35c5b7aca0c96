"""Compile function of the merge of partial results: config in, compiled kernel out, no tensors."""

from __future__ import annotations

from typing import Any

from flashcore.contract.counts import Count
from flashcore.contract.operands import Merge
from flashcore.sm90.compile.fake import compiled, element_of, matrix, strided, vector
from flashcore.sm90.config.merge import MergeConfig


def compile_merge(config: MergeConfig, options: str = "") -> Any:
    """Compile the merge of partial results; called with `contract.operands.Merge`, one by one, on
    the caller's current stream."""
    import cutlass.cute as cute
    from cutlass import Float32, Int32

    from flashcore.sm90.kernels.fold_merge import FoldMerge
    from flashcore.sm90.kernels.merge import Merge as MergeKernel

    dtype = element_of(config.dtype)
    total_q, partials, heads = cute.sym_int(), cute.sym_int(), cute.sym_int()
    operands = Merge(
        out=strided(dtype, total_q, heads, config.head_dim),
        lse=matrix(Float32, total_q, heads, 4),
        partial_out=strided(Float32, partials, heads, config.head_dim),
        partial_lse=matrix(Float32, partials, heads, 4),
        merge_offsets=vector(Int32, cute.sym_int()),
        merge_partials=vector(Int32, cute.sym_int()),
        sinks=vector(Float32, heads) if config.sinks else None,
        counts=vector(Int32, int(Count.SIZE)) if config.device_counts else None,
        tree_width=Int32(1),
    )
    kernel = FoldMerge(config) if config.fixed_order else MergeKernel(config)
    return compiled(kernel, *operands, options=options)
