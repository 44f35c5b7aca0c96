"""VLLM_BATCH_INVARIANT=1 on the torch path: prefill at once, in chunks, and decode are the same."""

from __future__ import annotations

import pytest
import torch

from flashcore.contract.chunks import CHUNK_TOKENS
from flashcore.integrations.vllm import versions
from tests.serving_cases import Request
from tests.vllm import batches
from tests.vllm.batches import Engine, Forward, Setup, attend, make_engine, make_forward

LENGTH, PAGE_TOKENS = CHUNK_TOKENS + 300, 16


def stretch(engine: Engine, whole: Forward, begin: int, n: int) -> torch.Tensor:
    """n tokens of the first request alone, over the cache as `whole` left it."""
    request, blocks = Request(begin, n), whole.blocks[0][0][: -(-(begin + n) // PAGE_TOKENS)]
    row = batches._freed(engine.setup, engine.groups[0].window, request, blocks)
    forward = Forward([request], [batches._common(engine, [request], [row], 0, 0)], [[blocks]])
    for kind in ("q", "k", "v"):
        setattr(forward, kind, [x[begin : begin + n] for x in getattr(whole, kind)])
    return attend(engine, forward)[0]


@pytest.mark.parametrize("window", [None, 150])
def test_prefill_in_any_chunks_and_decode_have_the_same_bits(
    window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(versions, "batch_invariant", lambda: True)
    sizes = {"max_batch": 4, "max_context": 2048, "max_tokens": 2048}
    setup = Setup(PAGE_TOKENS, layers=1, windows=(window,), **sizes)
    engine = make_engine(setup)
    requests = [Request(0, LENGTH), Request(CHUNK_TOKENS, 3, shared=CHUNK_TOKENS), Request(40, 1)]
    whole = make_forward(engine, requests)
    expected = attend(engine, whole)[0][:LENGTH]
    for chunk in (LENGTH, 256, 70, 64, 1):
        places = range(0, LENGTH, chunk)
        if chunk == 1:
            places = [0, 1, 63, 500, *range(CHUNK_TOKENS - 2, CHUNK_TOKENS + 3), LENGTH - 1]
        for begin in places:
            n = min(chunk, LENGTH - begin)
            found = stretch(engine, whole, begin, n)
            assert torch.equal(found, expected[begin : begin + n]), (chunk, begin)
