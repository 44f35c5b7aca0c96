"""Attention calls under every kind of mask, beside sdpa under transformers' dense mask of the same
kind; models that are no decoders."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from transformers import masking_utils

from flashcore.integrations.transformers.attention import attention_forward
from flashcore.integrations.transformers.mask import attention_spans
from flashcore.integrations.transformers.rules import check_meanings, read_rules
from flashcore.integrations.transformers.spans import Spans
from tests.transformers.models import assert_same, random_ids, with_flashcore

Q_HEADS, KV_HEADS, HEAD_DIM = 4, 2, 16
LARGEST = 9


def new_sdpa_mask() -> bool:
    """Whether mask functions take offsets, not positions of the queries."""
    return "q_length" in inspect.signature(masking_utils.sdpa_mask).parameters


def both_masks(
    function: Callable[..., Any],
    batch: int,
    queries: int,
    keys: int,
    query_offset: int,
    key_offset: int,
    padding: torch.Tensor | None,
) -> tuple[torch.Tensor, Spans]:
    """(transformers' dense mask, ours) from the same arguments."""
    options: dict[str, Any] = {
        "kv_length": keys,
        "kv_offset": key_offset,
        "mask_function": function,
        "attention_mask": padding,
        "allow_is_causal_skip": False,
        "dtype": torch.float32,
        "config": None,
    }
    if new_sdpa_mask():
        options |= {"q_length": queries, "q_offset": query_offset, "use_vmap": False}
    else:
        options |= {"cache_position": torch.arange(query_offset, query_offset + queries)}
    return masking_utils.sdpa_mask(batch, **options), attention_spans(batch, **options)


def random_padding(rng: random.Random, batch: int, positions: int) -> torch.Tensor:
    """bool [batch, positions]: padding on a side, on both, of all, or anywhere."""
    rows = torch.zeros(batch, positions, dtype=torch.bool)
    for row in rows:
        kind = rng.choice(("none", "left", "right", "both", "all", "anywhere"))
        if kind == "anywhere":
            row[:] = torch.tensor([rng.random() < 0.7 for _ in range(positions)])
        elif kind != "all":
            begin = rng.randrange(positions) if kind in ("left", "both") else 0
            end = rng.randrange(begin, positions) + 1 if kind in ("right", "both") else positions
            row[begin:end] = True
    return rows


def random_keys(rng: random.Random, batch: int, keys: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[batch, heads, keys, dim] twice, as caches and projections lay them."""
    kind = rng.choice(("cache", "projection", "part of a cache", "neither"))
    made = []
    for _ in range(2):
        if kind == "projection":
            x = torch.randn(batch, keys, KV_HEADS, HEAD_DIM).transpose(1, 2)
        elif kind == "part of a cache":
            x = torch.randn(batch, KV_HEADS, keys + 3, HEAD_DIM)[:, :, 2 : keys + 2]
        elif kind == "neither":
            x = torch.randn(1, KV_HEADS, keys, HEAD_DIM).expand(batch, -1, -1, -1)
        else:
            x = torch.randn(batch, KV_HEADS, keys, HEAD_DIM)
        made.append(x)
    return made[0], made[1]


def random_call(rng: random.Random) -> tuple[Callable[..., Any], dict[str, Any]]:
    """A mask function, and sizes as caches have them."""
    batch, queries = rng.randint(1, 3), rng.randint(1, LARGEST)
    kind = rng.choice(("causal", "window", "both ways", "window both ways", "packed"))
    sizes = {"batch": batch, "queries": queries, "keys": queries, "query_offset": 0}
    sizes["key_offset"] = 0
    if kind == "packed":
        segments = torch.randint(0, 2, (batch, queries)).cumsum(1)
        causal = masking_utils.causal_mask_function
        packed = masking_utils.packed_sequence_mask_function(segments)
        return masking_utils.and_masks(causal, packed), {**sizes, "padding": None}
    if kind in ("causal", "window"):
        sizes["query_offset"] = rng.choice((0, rng.randint(0, LARGEST)))
        sizes["key_offset"] = rng.randint(0, sizes["query_offset"])
        filled = queries + sizes["query_offset"] - sizes["key_offset"]
        sizes["keys"] = filled + rng.choice((0, 4))  # a cache with rows to spare
        maker = masking_utils.sliding_window_causal_mask_function
        window = rng.randint(1, LARGEST)
        function = masking_utils.causal_mask_function if kind == "causal" else maker(window)
    elif kind == "window both ways" and hasattr(
        masking_utils, "sliding_window_bidirectional_mask_function"
    ):
        function = masking_utils.sliding_window_bidirectional_mask_function(rng.randint(1, 4))
    else:
        if not hasattr(masking_utils, "bidirectional_mask_function"):
            return random_call(rng)
        sizes["keys"] = rng.randint(1, LARGEST)
        function = masking_utils.bidirectional_mask_function
    positions = sizes["key_offset"] + sizes["keys"] - rng.choice((0, 0, 1))
    padding = rng.choice((None, random_padding(rng, batch, max(positions, 1))))
    return function, {**sizes, "padding": padding}


def test_random_masks_beside_sdpa() -> None:
    """Every query that is no padding and sees a key; nothing but holes in a window is refused."""
    rng = random.Random(0)
    torch.manual_seed(0)
    refused = checked = 0
    for _ in range(600):
        function, sizes = random_call(rng)
        try:
            dense, spans = both_masks(function, **sizes)
        except NotImplementedError as error:
            refused += 1
            assert "between tokens of a layer with a window" in str(error)  # noqa: PT017
            continue
        batch, queries, keys = sizes["batch"], sizes["queries"], sizes["keys"]
        dense = dense.expand(batch, 1, queries, keys)
        q = torch.randn(batch, Q_HEADS, queries, HEAD_DIM)
        k, v = random_keys(rng, batch, keys)
        sinks = rng.choice((None, torch.randn(Q_HEADS)))
        found, _ = attention_forward(torch.nn.Module(), q, k, v, spans, scaling=0.3, s_aux=sinks)
        expected = masked_attention(q, k, v, dense, 0.3, sinks)
        rows = dense.any(-1)[:, 0] & valid_queries(spans, sizes)
        torch.testing.assert_close(found[rows], expected[rows], rtol=0, atol=2e-5)
        assert torch.isfinite(found).all()
        checked += int(rows.sum())
    assert checked > 2000
    assert 0 < refused < 60


def valid_queries(spans: Spans, sizes: dict[str, Any]) -> torch.Tensor:
    """bool [batch, queries]: not padding; without a causal mask or a window none counts as that."""
    batch, queries, padding = sizes["batch"], sizes["queries"], sizes["padding"]
    if padding is None or (not spans.causal and spans.window == (-1, -1)):
        return torch.ones(batch, queries, dtype=torch.bool)
    start = sizes["query_offset"]
    found = torch.zeros(batch, start + queries, dtype=torch.bool)
    found[:, : padding.shape[1]] = padding[:, : start + queries]
    return found[:, start:]


def masked_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    allowed: torch.Tensor,
    scale: float,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """[batch, queries, heads, dim] by the plain formula."""
    k, v = (x.repeat_interleave(Q_HEADS // KV_HEADS, 1) for x in (k, v))
    scores = (q @ k.transpose(2, 3) * scale).masked_fill(~allowed, -torch.inf)
    extra = torch.full((*scores.shape[:3], 1), -torch.inf)
    if sinks is not None:
        extra[:] = sinks[None, :, None, None]
    weights = torch.cat([scores, extra], -1).softmax(-1)[..., :-1]
    return (weights @ v).transpose(1, 2)


def test_a_change_of_meaning_is_noticed() -> None:
    """A transformers whose window excluded the query itself is not registered with."""

    class Changed:
        def __getattr__(self, name: str) -> Any:
            if name == "sliding_window_causal_mask_function":
                return wider_by_one
            return getattr(masking_utils, name)

    def wider_by_one(window: int) -> Callable[..., Any]:
        made = masking_utils.sliding_window_causal_mask_function(window)
        # The captured window says one thing, and the function does another.
        cell = next(c for c in made.__closure__ if isinstance(c.cell_contents, tuple))
        overlay, causal = cell.cell_contents

        def off_by_one(b: Any, h: Any, q: Any, k: Any) -> Any:
            return overlay(b, h, q + 1, k)

        off_by_one.__module__ = overlay.__module__
        off_by_one.__qualname__ = overlay.__qualname__
        sliding_window = window
        stated = (lambda: sliding_window).__closure__
        code = off_by_one.__code__
        assert stated is not None
        assert len(code.co_freevars) == 1
        both = masking_utils.and_masks(_Named(off_by_one, {"sliding_window": window}), causal)
        return both

    check_meanings(masking_utils)
    with pytest.raises((RuntimeError, NotImplementedError)):
        check_meanings(Changed())  # type: ignore[arg-type]


class _Named:
    def __init__(self, function: Callable[..., Any], captured: dict[str, Any]) -> None:
        self.function, self.captured = function, captured

    def __call__(self, *positions: Any) -> Any:
        return self.function(*positions)


def test_functions_that_are_not_known_are_refused() -> None:
    causal = masking_utils.causal_mask_function
    for function, said in (
        (masking_utils.or_masks(causal, causal), "union of masks"),
        (masking_utils.and_masks(causal, lambda b, h, q, k: q >= k), "a function of its own"),
        (masking_utils.padding_mask_function(torch.ones(1, 3)), "padding_mask_function"),
    ):
        with pytest.raises(NotImplementedError, match=said):
            read_rules(function)


# Models that are no decoders


def encoder_options() -> dict[str, Any]:
    return {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "initializer_range": 0.25,
        "attention_probs_dropout_prob": 0.0,
        "hidden_dropout_prob": 0.0,
    }


@pytest.mark.parametrize("side", [None, "left", "right", "holes"])
def test_encoder(side: str | None) -> None:
    torch.manual_seed(0)
    config = transformers.BertConfig(**encoder_options())
    reference = transformers.BertModel._from_config(config, attn_implementation="sdpa").eval()
    if not transformers.BertModel._can_set_attn_implementation():  # code of its own in old versions
        with pytest.raises(NotImplementedError, match="computes attention by code of its own"):
            with_flashcore(reference)
        return
    ours = with_flashcore(reference)
    ids, mask = random_ids(3, 11), torch.ones(3, 11, dtype=torch.long)
    if side == "left":
        mask[0, :4] = mask[1, :10] = 0
    elif side == "right":
        mask[0, 4:] = mask[1, 1:] = 0
    elif side == "holes":
        mask[0, 4:6] = mask[2, 0] = mask[2, 3] = 0
    with torch.no_grad():
        found, expected = (x(ids, attention_mask=mask)[0] for x in (ours, reference))
    assert_same(found, expected)  # queries of padding as well
