"""The mask function that transformers calls for `attn_implementation="flashcore"`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from flashcore.integrations.transformers.rules import Rules, read_rules
from flashcore.integrations.transformers.spans import Sizes, Spans, find_spans


# It reads masks and positions, so it runs outside of compiled graphs, as it does in generate().
@torch.compiler.disable
def attention_spans(
    batch_size: int,
    *,
    kv_length: int,
    mask_function: Callable[..., Any],
    attention_mask: torch.Tensor | None = None,
    q_length: int | None = None,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int | torch.Tensor = 0,
    cache_position: torch.Tensor | None = None,
    device: torch.device | str | None = None,
    **_: Any,
) -> Spans:
    """What the layers see, from what transformers knows of the batch.

    The arguments are those of transformers' own mask functions: `q_length` and `q_offset` since
    5.0 or so, before that `cache_position`, the positions of the queries. Others that it passes say
    how a dense mask may be made, and when it may be left out.

    Raises:
        NotImplementedError: where this is none of the masks in docs/transformers.md.
    """
    if cache_position is not None:
        q_length = len(cache_position)
        alone = q_length == kv_length and isinstance(kv_offset, int) and kv_offset == 0
        q_offset = 0 if alone else cache_position[0]
        device = cache_position.device
    assert q_length is not None
    if attention_mask is not None:
        device = attention_mask.device
        if attention_mask.dim() != 2 or len(attention_mask) != batch_size:
            raise ValueError(
                f"attention_mask must be [batch, positions] with a batch of {batch_size}, got "
                f"{tuple(attention_mask.shape)}"
            )
    sizes = Sizes(batch_size, q_length, int(kv_length), int(q_offset), int(kv_offset))
    padding = None if attention_mask is None else attention_mask.bool()
    rules = read_rules(mask_function)
    if device is None:
        device = "cpu" if rules.segments is None else rules.segments.device
    return find_spans(rules, sizes, padding, torch.device(device))


@torch.compiler.disable
def padding_spans(
    padding: torch.Tensor, queries: int, keys: int, *, causal: bool, window: int | None
) -> Spans:
    """The spans of a padding mask [batch, keys] that a model gives its layers as it is.

    Queries are the last positions. `window` counts as in flash attention's integration: so many
    keys, the query's own among them, on each side.
    """
    if padding.shape[1] != keys:
        raise ValueError(
            f"attention_mask must have a column for each of the {keys} keys, got "
            f"{tuple(padding.shape)}"
        )
    bound = -1 if window is None else window - 1
    offset = keys - queries if causal or window is not None else 0
    rules = Rules(causal=causal, left=bound, right=-1 if causal else bound)
    sizes = Sizes(len(padding), queries, keys, query_offset=offset)
    return find_spans(rules, sizes, padding.bool(), padding.device)
