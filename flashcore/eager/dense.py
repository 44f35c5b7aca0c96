"""Dense attention with torch operators: contiguous K and V, one sequence or one batch at a time."""

from __future__ import annotations

import math

import torch

from flashcore.eager.merge import apply_sinks
from flashcore.eager.run import attend_runs
from flashcore.problem import Packing, Rules


def dense_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rules: Rules,
    sinks: torch.Tensor | None,
    packing: Packing,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Shapes as in `flashcore.attention`. Returns out like q and lse [..., num_q_heads] fp32."""
    out = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
    lse = torch.full(q.shape[:-1], -math.inf, dtype=torch.float32, device=q.device)
    if q.dim() == 4:
        for b in range(q.shape[0]):
            _one_sequence(q[b], k[b], v[b], rules, out[b], lse[b])
    else:
        assert packing.cu_seqlens_q is not None
        assert packing.cu_seqlens_k is not None
        ends_q, ends_k = packing.cu_seqlens_q.tolist(), packing.cu_seqlens_k.tolist()
        for b in range(len(ends_q) - 1):
            rows, keys = slice(ends_q[b], ends_q[b + 1]), slice(ends_k[b], ends_k[b + 1])
            _one_sequence(q[rows], k[keys], v[keys], rules, out[rows], lse[rows])
    if sinks is not None:
        apply_sinks(out, lse, sinks)
    return out.to(q.dtype), lse


def _one_sequence(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rules: Rules,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    seqlen_q, num_q_heads, dim = q.shape
    seqlen_k, num_kv_heads, _ = k.shape
    if seqlen_q == 0 or seqlen_k == 0:
        return
    group = num_q_heads // num_kv_heads
    scaled = (q.float() * rules.scale).view(1, seqlen_q, num_kv_heads, group, dim)
    keys, values = k.transpose(0, 1), v.transpose(0, 1)
    positions = torch.arange(seqlen_q, device=q.device)[None] + (seqlen_k - seqlen_q)
    result, logs = attend_runs(
        scaled,
        positions,
        seqlen_k,
        lambda begin, end: [(keys[:, begin:end], values[:, begin:end])],
        rules,
        dim,
    )
    out.copy_(result[0].flatten(1, 2))
    lse.copy_(logs[0].flatten(1, 2))
