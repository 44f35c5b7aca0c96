"""Greedy generation gives the tokens that transformers' own attention gives, in fp32."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel
from transformers.masking_utils import create_masks_for_generate

from tests.transformers.models import (
    ARCHITECTURES,
    VOCABULARY,
    cache_argument,
    logits,
    models,
    new_cache,
    padded,
    random_ids,
)

NEW_TOKENS = 9  # beyond a window of 5


def generated(model: PreTrainedModel, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.generate(
            ids,
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            pad_token_id=0,
            **{"do_sample": False, **options},
        )


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_left_padded_batch(name: str) -> None:
    reference, ours = models(name)
    ids, mask = random_ids(3, 8), padded((8, 3, 1), 8, "left")
    found = generated(ours, ids, attention_mask=mask)
    assert found.shape == (3, 8 + NEW_TOKENS)
    assert len(found.unique()) > VOCABULARY // 6  # not one token over and over
    assert torch.equal(found, generated(reference, ids, attention_mask=mask))


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "mistral"])
@pytest.mark.parametrize("lengths", [(8, 3), (8, 8), (8,)])
def test_static_cache(name: str, lengths: tuple[int, ...]) -> None:
    reference, ours = models(name)
    ids, mask = random_ids(len(lengths), 8), padded(lengths, 8, "left")
    found, expected = (
        generated(x, ids, attention_mask=mask, cache_implementation="static")
        for x in (ours, reference)
    )
    assert torch.equal(found, expected)
    assert torch.equal(found, generated(ours, ids, attention_mask=mask))


def test_beams() -> None:
    """The rows of a cache change places between steps."""
    reference, ours = models("qwen3")
    ids, mask = random_ids(2, 6), padded((6, 4), 6, "left")
    found, expected = (
        generated(x, ids, attention_mask=mask, num_beams=3) for x in (ours, reference)
    )
    assert torch.equal(found, expected)


def test_assisted_generation() -> None:
    """Several tokens are checked at once, and a cache is cut to those that were right."""
    reference, ours = models("llama")
    ids = random_ids(1, 6)
    found = generated(ours, ids, assistant_model=models("qwen3")[1], num_assistant_tokens=3)
    assert torch.equal(found, generated(reference, ids))


def _masks(model: PreTrainedModel, cache: Any, mask: torch.Tensor, start: int) -> Any:
    """As `generate` makes them, before a compiled forward."""
    batch, end = mask.shape
    names = inspect.signature(create_masks_for_generate).parameters
    every = {
        "config": model.config,
        "attention_mask": mask,
        "cache": cache,
        "past_key_values": cache,
        "cache_position": torch.arange(start, end),
        "inputs_embeds": torch.empty(batch, end - start, 0),
        "input_embeds": torch.empty(batch, end - start, 0),
    }
    return create_masks_for_generate(**{name: x for name, x in every.items() if name in names})


@pytest.mark.parametrize("lengths", [(6, 4, 1), (6, 6, 6)], ids=["padded", "full"])
def test_compiled_decode_on_a_static_cache(lengths: tuple[int, ...]) -> None:
    """One graph without a break, made once: a step changes no shape and no constant."""
    _, ours = models("llama")
    mask = padded(lengths, 6, "left")
    ids = random_ids(3, 6)
    torch._dynamo.reset()
    compiled = torch.compile(ours.forward, backend="aot_eager", fullgraph=True)
    cache = new_cache(ours, "static", 16)
    tokens, start, forward = ids, 0, ours.forward
    with torch.no_grad():
        for step in range(4):
            end = mask.shape[1]
            options = {cache_argument(ours): cache}
            if cache_argument(ours) != "cache":
                options["cache_position"] = torch.arange(start, end)
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, start:].contiguous()
            masks = _masks(ours, cache, mask, start)
            with torch.compiler.set_stance("fail_on_recompile" if step > 1 else "default"):
                last = forward(
                    tokens, attention_mask=masks, position_ids=positions, **options
                ).logits[:, -1]
            expected = logits(ours, ids, attention_mask=mask)[:, -1]
            torch.testing.assert_close(last, expected, rtol=0, atol=1e-4)
            tokens, start, forward = last.argmax(-1, keepdim=True), end, compiled
            ids = torch.cat([ids, tokens], 1)
            mask = torch.cat([mask, torch.ones_like(tokens)], 1)


def test_compiled_model() -> None:
    """A model compiled as a whole: the mask is made between two graphs."""
    reference, ours = models("mistral")
    torch._dynamo.reset()
    compiled = torch.compile(ours, backend="eager")
    ids, mask = random_ids(3, 9), padded((9, 4, 1), 9, "left")
    with torch.no_grad():
        found = compiled(ids, attention_mask=mask, use_cache=False).logits
    expected = logits(reference, ids, attention_mask=mask)
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=0, atol=1e-4)
