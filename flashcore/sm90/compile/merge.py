"""Compile function of the merge of partial results: config in, compiled kernel out, no tensors."""

from __future__ import annotations

from typing import Any

from flashcore.contract.counts import Count
from flashcore.sm90.compile.fake import compiled, element_of, matrix, strided, vector
from flashcore.sm90.config.paged import MergeConfig


def compile_merge(config: MergeConfig, options: str = "") -> Any:
    """Compile the merge of partial results.

    Call arguments, in order: out, lse, partial_out, partial_lse, merge_offsets, merge_partials,
    sinks or None, counts or None, tree_width.
    """
    import cutlass.cute as cute
    from cutlass import Float32, Int32

    from flashcore.sm90.kernels.merge import Merge

    dtype = element_of(config.dtype)
    total_q, partials, heads = cute.sym_int(), cute.sym_int(), cute.sym_int()
    return compiled(
        Merge(config),
        strided(dtype, total_q, heads, config.head_dim),
        matrix(Float32, total_q, heads, 4),
        strided(Float32, partials, heads, config.head_dim),
        matrix(Float32, partials, heads, 4),
        vector(Int32, cute.sym_int()),
        vector(Int32, cute.sym_int()),
        vector(Float32, heads) if config.sinks else None,
        vector(Int32, int(Count.SIZE)) if config.device_counts else None,
        Int32(1),
        options=options,
    )
