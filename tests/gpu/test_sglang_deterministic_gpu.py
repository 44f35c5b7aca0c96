"""SGLang's deterministic inference on a Hopper GPU: prefill, chunks and decode of one sequence.

Needs SGLang. The same on the CPU, and what is refused, in tests/sglang/test_deterministic.py.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("sglang")
from flashcore.contract.chunks import CHUNK_TOKENS
from flashcore.sm90.available import available

pytestmark = pytest.mark.skipif(
    not available("cuda")[0], reason=f"no Hopper GPU: {available('cuda')[1]}"
)
if available("cuda")[0]:
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    from flashcore.contract.counts import Stat
    from flashcore.integrations.sglang.register import register
    from tests.serving_cases import Request
    from tests.sglang.batches import Setup, attend, make_engine, make_forward
    from tests.sglang.deterministic_cases import deterministic, stretch

    register()

LENGTH = 4 * CHUNK_TOKENS + 700


@pytest.mark.parametrize("window", [-1, 1500])
@pytest.mark.parametrize("page_tokens", [1, 64])
def test_prefill_chunks_and_decode(page_tokens: int, window: int) -> None:
    setup = Setup(
        page_tokens, heads=(8, 2), head_dim=128, dtype=torch.bfloat16, device="cuda",
        max_context=8192, window=window, two_pools=window >= 0,
    )  # fmt: skip
    engine = make_engine(setup, max_batch=8, prepare=deterministic())
    requests = [
        Request(0, LENGTH),
        Request(3 * CHUNK_TOKENS, 3, shared=3 * CHUNK_TOKENS),
        Request(3 * CHUNK_TOKENS + 9, 1, shared=3 * CHUNK_TOKENS),
        Request(40, 1),
    ]
    whole = make_forward(engine, ForwardMode.EXTEND, requests)
    engine.backend.init_forward_metadata(whole.batch)
    expected = [out[:LENGTH] for out in attend(engine, whole)]
    assert all(torch.isfinite(out).all() for out in expected)
    stats = engine.backend.full.planner.stats().tolist()
    assert stats[Stat.FAULTS] == 0
    assert stats[Stat.UNSHARED] == 0
    differences = 0
    for chunk in (LENGTH, 2048, 256, 70, 64, 1):
        places = range(0, LENGTH, chunk)
        if chunk == 1:
            edges = (n * CHUNK_TOKENS + d for n in range(1, 5) for d in (-1, 0, 1))
            places = [0, 1, 63, 500, *edges, LENGTH - 1]
        for begin in places:
            n = min(chunk, LENGTH - begin)
            for found, out in zip(stretch(engine, whole, begin, n), expected, strict=True):
                differences += int((found != out[begin : begin + n]).sum())
    assert differences == 0
