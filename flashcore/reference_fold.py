"""The specification of batch-invariant results: a query token's keys chunk by chunk, then a fold.

A sequence's keys fall into chunks of `CHUNK_TOKENS`, counted from its beginning. Of each chunk of
which the query sees a key there is a result of its own, (out, lse) as of attention over that chunk
alone, normalised. They are folded from the last chunk to the first:

    peak, total, acc = lse_last, 1, out_last
    for each chunk before it:
        top    = max(peak, lse)
        total  = total exp(peak - top) + exp(lse - top)
        acc    =   acc exp(peak - top) + exp(lse - top) out
        peak   = top
    out, lse = acc / total, peak + log(total)        (a sink joins here, as one more term of total)

A chunk of which the query sees nothing is left out: it changes no bit. Nothing else enters: neither
how many queries there are, nor what other sequences do, nor where a work item begins. On the Hopper
kernels each line is one fixed instruction a number, wherever it is executed: on partial results by
`sm90.kernels.fold_merge`, on the chunks of an item by `sm90.kernels.attention.paged.chunks`. Inside
a chunk keys are taken in tiles of one width for all page sizes and tile heights, from the last that
the query sees to the chunk's beginning.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from flashcore.contract.chunks import CHUNK_TOKENS
from flashcore.reference import sequence_attention, visible_keys


def fold_chunks(
    outs: torch.Tensor, lses: torch.Tensor, sinks: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fold the results of chunks, in their order in the sequence.

    outs: [chunks, ..., v_head_dim]. lses: [chunks, ...], -inf where no key is seen. sinks:
    broadcast to [...]. Returns out [..., v_head_dim] and lse [...]; zeros and -inf (the sink) where
    no chunk has a key.
    """
    acc = outs.new_zeros(outs.shape[1:])
    peak = torch.full(outs.shape[1:-1], -math.inf, dtype=outs.dtype, device=outs.device)
    total = torch.zeros_like(peak)
    for out, lse in zip(reversed(outs.unbind()), reversed(lses.unbind()), strict=True):
        first, seen = peak == -math.inf, lse > -math.inf
        top = torch.maximum(peak, lse)
        before, added = _exponent(peak, top), _exponent(lse, top)
        total = total * before + added
        both = acc * before[..., None] + added[..., None] * out
        both = torch.where(first[..., None], out, both)
        acc = torch.where(seen[..., None], both, acc)
        peak = top
    shrink = torch.ones_like(total)
    if sinks is not None:
        top = torch.maximum(peak, sinks.to(peak.dtype))
        shrink = _exponent(peak, top)
        total = total * shrink + _exponent(sinks.to(peak.dtype), top)
        peak = top
    factor = torch.where(total == 0, 0.0, shrink / total)
    return acc * factor[..., None], torch.where(total == 0, -math.inf, peak + total.log())


def chunked_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool,
    scale: float,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    chunk_tokens: int = CHUNK_TOKENS,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `reference.sequence_attention` computes, by chunks; shapes as there."""
    visible = visible_keys(q.shape[0], k.shape[0], causal)
    outs, lses = [], []
    for begin in range(0, k.shape[0], chunk_tokens):
        part = slice(begin, begin + chunk_tokens)
        out, lse = _chunk(q, k[part], v[part], visible[:, part], scale=scale, softcap=softcap)
        outs.append(out)
        lses.append(lse)
    return fold_chunks(torch.stack(outs), torch.stack(lses), sinks)


def _chunk(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: torch.Tensor, **rules: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each query over the keys of a chunk that it sees, of which it sees the first ones."""
    out = q.new_zeros(*q.shape[:2], v.shape[2])
    lse = q.new_full(q.shape[:2], -math.inf)
    for row, seen in enumerate(visible):
        keys = int(seen.sum())
        if keys:
            one = q[row : row + 1]
            out[row], lse[row] = (
                x[0] for x in sequence_attention(one, k[:keys], v[:keys], causal=False, **rules)
            )
    return out, lse


def _exponent(x: torch.Tensor, peak: torch.Tensor) -> torch.Tensor:
    return (x - torch.where(peak == -math.inf, 0.0, peak)).exp()
