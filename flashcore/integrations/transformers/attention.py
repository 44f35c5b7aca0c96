"""The attention function that transformers calls for `attn_implementation="flashcore"`."""

from __future__ import annotations

from typing import Any

import torch

from flashcore.api import attention
from flashcore.integrations.transformers.mask import padding_spans
from flashcore.integrations.transformers.spans import Spans

_LARGEST_HEAD_DIM = 256
_HEAD_DIM_MULTIPLE = 8  # columns are added up to it, for the kernels' loads of 16 bytes

# Arguments of some models' attention that change its result in ways that are not flashcore's.
_REFUSED = {
    "position_bias": "a bias on the scores",
    "head_mask": "a factor per head",
    "indices": "a choice of keys for each query",
    "block_indices": "a choice of blocks of keys for each query",
    "sinks": "sinks with values",
    "block_table": "transformers' continuous batching",
    "read_index": "transformers' continuous batching",
    "write_index": "transformers' continuous batching",
}


def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Spans | torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    cu_seq_lens_k: torch.Tensor | None = None,
    max_length_q: int | torch.Tensor | None = None,
    output_attentions: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """One layer's attention, as transformers' attention functions have it.

    Args:
        query: [batch, num_q_heads, queries, head_dim]; key, value: [batch, num_kv_heads, keys,
            head_dim], value with fewer columns where a model has them.
        attention_mask: from `attention_spans`; a 2D padding mask [batch, keys]; or None, where all
            keys are seen, up to the query's own if causal.
        scaling: of the scores, 1 / sqrt(head_dim) by default.
        is_causal: without `Spans`, the module's own if None.
        sliding_window: without `Spans`, which state the window of their layer.
        s_aux: sinks, [num_q_heads].
        cu_seq_lens_q, cu_seq_lens_k: ends of packed sequences, 0 first.

    Returns:
        ([batch, queries, num_q_heads, v_head_dim], None). Rows of padding are zeros.

    Raises:
        NotImplementedError, ValueError, TypeError: naming the argument and what to use instead.
    """
    _refuse(query, key, value, s_aux, dropout, output_attentions, kwargs)
    queries, keys = query.shape[2], key.shape[2]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if isinstance(attention_mask, Spans):
        spans = attention_mask
        _check_agreement(spans, query, key, is_causal, sliding_window)
    elif attention_mask is not None:
        if attention_mask.dim() != 2:
            raise NotImplementedError(
                f"attention_mask: a mask of {attention_mask.dim()} dimensions, "
                f"{tuple(attention_mask.shape)}, made by the caller or the model; "
                "attn_implementation='flashcore' takes padding masks [batch, positions], packed "
                "sequences (position_ids or cu_seq_lens_q) and no mask; use "
                "attn_implementation='sdpa'"
            )
        spans = padding_spans(attention_mask, queries, keys, causal=causal, window=sliding_window)
    else:
        spans = None
    if spans is not None:
        causal, window = spans.causal, spans.window
    else:
        window = (-1, -1) if sliding_window is None else (sliding_window - 1, sliding_window - 1)
    options: dict[str, Any] = {
        "causal": causal,
        "scale": float(query.shape[-1] ** -0.5 if scaling is None else scaling),
        "window": None if window == (-1, -1) else window,
        "softcap": softcap or 0.0,
        "sinks": s_aux,
    }
    v_head_dim = value.shape[-1]
    query, key, value = _same_columns(*_autocast(query, key, value))
    if cu_seq_lens_q is not None or cu_seq_lens_k is not None:
        if cu_seq_lens_q is None or cu_seq_lens_k is None:
            raise ValueError("cu_seq_lens_q and cu_seq_lens_k go together, got one of them")
        if spans is not None and not spans.all_rows:
            raise ValueError("attention_mask has padding, which cu_seq_lens_q leaves no room for")
        out = _packed(query, key, value, cu_seq_lens_q, cu_seq_lens_k, max_length_q, options)
    elif spans is None or (spans.all_rows and spans.cu_seqlens_k is None):
        if spans is None and causal and 1 < queries != keys:
            raise NotImplementedError(
                f"attention_mask is None for {queries} causal queries on {keys} keys, which does "
                "not say where the queries stand; use attn_implementation='sdpa'"
            )
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        # One query sees all keys, whatever the alignment, and needs no mask of its own.
        out = attention(q, k, v, **options)
    elif spans.k_rows is not None:
        out = _gathered(query, key, value, spans, options)
    elif spans.k_ends is not None:
        out = _runs(query, key, value, spans, options)
    else:
        ends_q, ends_k = spans.cu_seqlens_q, spans.cu_seqlens_k
        assert ends_q is not None
        assert ends_k is not None
        out = _packed(query, key, value, ends_q, ends_k, None, options)
    return out[..., :v_head_dim], None


def _refuse(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sinks: torch.Tensor | None,
    dropout: float,
    output_attentions: bool | None,
    kwargs: dict[str, Any],
) -> None:
    """One error for what cannot be computed here."""
    if torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (query, key, value, sinks)
    ):
        raise NotImplementedError(
            "attn_implementation='flashcore' has no backward pass: call the model under "
            "torch.inference_mode() or torch.no_grad(), or train with attn_implementation='sdpa'"
        )
    if dropout:
        raise NotImplementedError(
            f"dropout={dropout}: attn_implementation='flashcore' has none; call model.eval()"
        )
    if output_attentions:
        raise NotImplementedError(
            "output_attentions: attn_implementation='flashcore' never holds the attention weights; "
            "use attn_implementation='eager'"
        )
    for name, what in _REFUSED.items():
        if kwargs.get(name) is not None:
            raise NotImplementedError(
                f"{name}: attn_implementation='flashcore' does not serve {what}; use "
                "attn_implementation='sdpa'"
            )
    if type(kwargs.get("cache")).__name__ == "PagedAttentionCache":
        raise NotImplementedError(
            "cache: attn_implementation='flashcore' does not serve transformers' continuous "
            "batching; use attn_implementation='sdpa'"
        )
    head_dim = max(query.shape[-1], value.shape[-1])
    if head_dim > _LARGEST_HEAD_DIM:
        raise NotImplementedError(
            f"head_dim is {head_dim}: attn_implementation='flashcore' takes up to "
            f"{_LARGEST_HEAD_DIM}; use attn_implementation='sdpa'"
        )


def _check_agreement(
    spans: Spans,
    query: torch.Tensor,
    key: torch.Tensor,
    is_causal: bool | None,
    sliding_window: int | None,
) -> None:
    """The mask was made for this call, and what the layer says beside it is not another mask."""
    batch, queries, keys = spans.sizes
    found = (query.shape[0], query.shape[2], key.shape[2])
    if found[1:] != (queries, keys) or (found[0] != batch and not spans.all_rows):
        raise ValueError(
            f"attention_mask is for batch, queries and keys {spans.sizes}, the layer has {found}"
        )
    if is_causal is not None and is_causal != spans.causal and queries > 1:
        raise ValueError(
            f"is_causal is {is_causal}, and the attention mask is "
            f"{'causal' if spans.causal else 'not causal'}; use attn_implementation='sdpa'"
        )
    if (
        sliding_window is not None
        and spans.causal
        and keys > sliding_window
        and spans.left != sliding_window - 1
    ):
        raise ValueError(
            f"sliding_window is {sliding_window} in a layer whose attention mask has no such "
            "window; use attn_implementation='sdpa'"
        )


def _autocast(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """In the dtype of torch.autocast where it is on, as torch does for its own attention."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    return tuple(x.to(torch.get_autocast_dtype(device)) for x in tensors)


def _same_columns(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """With columns of zeros up to one head_dim, which change neither scores nor other columns."""
    widest = max(x.shape[-1] for x in tensors)
    columns = -(-widest // _HEAD_DIM_MULTIPLE) * _HEAD_DIM_MULTIPLE
    return tuple(
        x if x.shape[-1] == columns else torch.nn.functional.pad(x, (0, columns - x.shape[-1]))
        for x in tensors
    )


def _packed(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    ends_q: torch.Tensor,
    ends_k: torch.Tensor,
    longest: int | torch.Tensor | None,
    options: dict[str, Any],
) -> torch.Tensor:
    """Sequences one behind the other in the rows of the batch, themselves taken one by one."""
    batch, _, queries, _ = query.shape
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    out: torch.Tensor = attention(
        q,
        k,
        v,
        cu_seqlens_q=ends_q.int(),
        cu_seqlens_k=ends_k.int(),
        max_seqlen_q=longest if isinstance(longest, int) else None,
        **options,
    )
    return out.view(batch, queries, *out.shape[1:])


def _gathered(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    spans: Spans,
    options: dict[str, Any],
) -> torch.Tensor:
    """The rows that take part, copied one behind the other, and put back; zeros elsewhere."""
    assert spans.q_rows is not None
    assert spans.k_rows is not None
    (q_row, q_position), (k_row, k_position) = spans.q_rows, spans.k_rows
    found = attention(
        query[q_row, :, q_position],
        key[k_row, :, k_position],
        value[k_row, :, k_position],
        cu_seqlens_q=spans.cu_seqlens_q,
        cu_seqlens_k=spans.cu_seqlens_k,
        max_seqlen_q=query.shape[2],
        **options,
    )
    out = torch.zeros_like(query.transpose(1, 2), memory_format=torch.contiguous_format)
    out[q_row, q_position] = found
    return out


def _runs(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    spans: Spans,
    options: dict[str, Any],
) -> torch.Tensor:
    """One run of rows per sequence: the rows lie where they are, and those of no run are sequences
    without queries or without keys."""
    assert spans.k_ends is not None
    batch, _, queries, _ = query.shape
    (k, rows), (v, v_rows) = _in_rows(key), _in_rows(value)
    if v_rows != rows:
        rows = key.shape[2]
        k, v = (x.transpose(1, 2).flatten(0, 1) for x in (key, value))
    starts = rows * torch.arange(batch, dtype=torch.int32, device=query.device)[:, None]
    last = (starts + rows).clamp(max=len(k))
    ends = torch.cat([starts + spans.k_ends, last], dim=1).flatten()
    out: torch.Tensor = attention(
        query.transpose(1, 2).flatten(0, 1),
        k,
        v,
        cu_seqlens_q=spans.cu_seqlens_q,
        cu_seqlens_k=torch.nn.functional.pad(ends, (1, 0)),
        max_seqlen_q=queries,
        **options,
    )
    return out.view(batch, queries, *out.shape[1:])


def _in_rows(keys: torch.Tensor) -> tuple[torch.Tensor, int]:
    """[batch, heads, rows, dim] as [all rows, heads, dim], and how many rows lie from one sequence
    to the next.

    A cache is not copied for it. Where a head's rows lie together, as in transformers' caches, the
    sequences are as far apart as all their heads' rows, and no sequence is said to have the rows
    between.
    """
    batch, heads, rows, dim = keys.shape
    of_batch, of_head, of_row, of_column = keys.stride()
    if batch == 1:
        return keys[0].transpose(0, 1), rows
    if of_column != 1 or of_row < 1 or of_batch % of_row or of_batch < rows * of_row:
        return keys.transpose(1, 2).flatten(0, 1), rows
    apart = of_batch // of_row
    total = (batch - 1) * apart + rows
    return keys.as_strided((total, heads, dim), (of_row, of_head, 1)), apart
