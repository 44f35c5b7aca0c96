"""The specification: attention written directly, one sequence and one formula at a time.

Slow on purpose. Everything else in the library is tested against these functions, and they are
tested against torch's scaled_dot_product_attention. They compute in float64 unless told otherwise.

For query i of a sequence with `seqlen_q` queries and `seqlen_k` keys, its position is
p = i + seqlen_k - seqlen_q: the queries are the last tokens of the sequence. Key j is visible iff
    causal:     j <= p
    window:     p - left <= j <= p + right                    (a bound of -1 does not bind)
    tree_mask:  j belongs to the sequence's cached part (j < seqlen_k - seqlen_q),
                or tree_mask[i, j - (seqlen_k - seqlen_q)]    (takes the place of causal, and of the
                window's right bound)
Under a tree mask the new tokens stand at their depth in the tree, not at their index, and the
window's left bound counts from there: the position of new token i, as a query and as a key, is
seqlen_k - seqlen_q + depth(i), with depth(i) = tree_positions[i] - tree_positions[0]: the first new
token is the root, right after the cached ones. Positions that are not given are the number of the
sequence's new tokens that a token's row of the mask allows, so that its depth is the number of its
ancestors where rows hold all of these and the token itself, as those of draft trees do.

With these s = scale * q . k, softcapped as softcap * tanh(s / softcap) where softcap > 0,
    out = sum_j exp(s_j - lse) v_j,    lse = log(sum_j exp(s_j) [+ exp(sink)]).
A query that sees no key gives zeros and an lse of -inf (its sink where there is one). What stands
in a key or value has no influence on a query that does not see it, be it NaN.

K and V are what the pages hold; of fp8 pages that times k_scale and v_scale, one or one for each KV
head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from flashcore.pager.csr import Layout

Window = tuple[int, int]


def sequence_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool,
    scale: float,
    window: Window | None = None,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    tree_mask: torch.Tensor | None = None,
    tree_positions: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One sequence: q [seqlen_q, num_q_heads, head_dim], k [seqlen_k, num_kv_heads, head_dim], v
    [seqlen_k, num_kv_heads, v_head_dim].

    tree_mask: bool [seqlen_q, at least seqlen_q]. tree_positions: int [seqlen_q]. Returns out
    [seqlen_q, num_q_heads, v_head_dim]
        and lse [seqlen_q, num_q_heads].
    """
    group = q.shape[1] // k.shape[1]
    lengths = q.shape[0], k.shape[0]
    visible = visible_keys(*lengths, causal, window, tree_mask, tree_positions).to(q.device)
    seen = visible.any(0)[:, None, None]
    k = torch.where(seen, k, 0).repeat_interleave(group, 1)
    v = torch.where(seen, v, 0).repeat_interleave(group, 1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible, -math.inf)
    terms = scores
    if sinks is not None:
        sink = sinks.to(scores.dtype)[:, None, None].expand(-1, q.shape[0], 1)
        terms = torch.cat([scores, sink], 2)
    lse = torch.logsumexp(terms, 2)
    # exp(-inf - -inf) is not a number; a query with an empty sum has no weights at all.
    weights = torch.exp(scores - torch.where(lse == -math.inf, 0.0, lse)[:, :, None])
    finite = torch.isfinite(v)
    out = torch.einsum("hqk,khd->qhd", weights, torch.where(finite, v, 0))
    # 0 * NaN is not 0: such values go only to the queries that see them.
    for j in (~finite).flatten(1).any(1).nonzero().flatten().tolist():
        rows = visible[:, j]
        out[rows] += torch.where(finite[j], 0, v[j] * weights[:, rows, j].T[:, :, None])
    return out, lse.T


def visible_keys(
    seqlen_q: int,
    seqlen_k: int,
    causal: bool,
    window: Window | None = None,
    tree_mask: torch.Tensor | None = None,
    tree_positions: torch.Tensor | None = None,
) -> torch.Tensor:
    """bool [seqlen_q, seqlen_k], by the rules at the head of this file."""
    cached = seqlen_k - seqlen_q
    left, right = (-1, -1) if window is None else window
    position = torch.arange(seqlen_q) + cached
    key = torch.arange(seqlen_k)
    visible = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool)
    if tree_mask is not None:
        among_new = tree_mask.cpu()[:seqlen_q, :seqlen_q]
        new = (key - cached).clamp(0, max(seqlen_q - 1, 0))
        visible &= (key < cached) | among_new[:, new]
        stands = among_new.sum(1) if tree_positions is None else tree_positions.cpu().long()
        position = cached + stands - stands[:1]
        if seqlen_q:
            key = torch.where(key < cached, key, position[new])
    elif causal:
        visible &= key <= position[:, None]
    beyond = position[:, None] - key  # how far a query is beyond a key
    # Differences are compared, so that no bound is too large but for the type.
    if left >= 0:
        visible &= beyond <= min(left, 2**62)
    if right >= 0 and tree_mask is None:
        visible &= -beyond <= min(right, 2**62)
    return visible


def attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    window: Window | None = None,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `flashcore.attention` means; arguments as there. Returns (out, lse) in `dtype`."""
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    if q.dim() == 4:
        bounds: list[tuple[Any, Any]] = [(b, b) for b in range(q.shape[0])]
    else:
        assert cu_seqlens_q is not None
        assert cu_seqlens_k is not None
        ends_q, ends_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
        bounds = [
            (slice(ends_q[b], ends_q[b + 1]), slice(ends_k[b], ends_k[b + 1]))
            for b in range(len(ends_q) - 1)
        ]
    out, lse = torch.zeros_like(q), torch.full(q.shape[:-1], -math.inf, dtype=dtype).to(q.device)
    for rows, keys in bounds:
        out[rows], lse[rows] = sequence_attention(
            q[rows],
            k[keys],
            v[keys],
            causal=causal,
            scale=scale,
            window=window,
            softcap=softcap,
            sinks=sinks,
        )
    return out, lse


def paged_attention_reference(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    layout: Layout,
    q_lens: Sequence[int],
    *,
    scale: float | None = None,
    causal: bool = True,
    window: Window | None = None,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    tree_mask: torch.Tensor | None = None,
    tree_positions: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `flashcore.paged_attention` means, from the layout itself: no groups, no plan.

    Arguments as there, with `layout` and `q_lens` in place of the plan. Returns (out, lse) in
    `dtype`.
    """
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    out = torch.zeros(*q.shape[:-1], v_pages.shape[-1], dtype=dtype, device=q.device)
    lse = torch.full(q.shape[:-1], -math.inf, dtype=dtype, device=q.device)
    row_offsets = layout.row_offsets.tolist()
    first = 0
    for row, q_len in enumerate(map(int, q_lens)):
        entries = range(row_offsets[row], row_offsets[row + 1])
        chosen = [(int(layout.cols[e]), int(layout.token_counts[e])) for e in entries]
        tokens = slice(first, first + q_len)
        first += q_len
        if not chosen or not q_len:
            if sinks is not None:
                lse[tokens] = sinks.to(dtype)
            continue
        k = torch.cat([k_pages[page, :count] for page, count in chosen])
        v = torch.cat([v_pages[page, :count] for page, count in chosen])
        out[tokens], lse[tokens] = sequence_attention(
            q[tokens].to(dtype),
            _scaled(k.to(dtype), k_scale),
            _scaled(v.to(dtype), v_scale),
            causal=causal,
            scale=scale,
            window=window,
            softcap=softcap,
            sinks=sinks,
            tree_mask=None if tree_mask is None else tree_mask[tokens],
            tree_positions=None if tree_positions is None else tree_positions[tokens],
        )
    return out, lse


def _scaled(x: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """[tokens, num_kv_heads, columns], times one scale or one for each head."""
    return x if scale is None else x * scale.to(x.dtype).expand(x.shape[1])[:, None]
