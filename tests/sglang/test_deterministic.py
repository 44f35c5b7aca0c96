"""Deterministic inference: names in SGLang's lists, refusals, the bits on the torch path."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from sglang.srt import server_args
from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from flashcore.contract.chunks import CHUNK_TOKENS
from flashcore.integrations.sglang.register import NAME, register
from flashcore.serving.shapes import NotServed
from tests.serving_cases import Request
from tests.sglang import families
from tests.sglang.batches import Engine, Setup, attend, make_engine, make_forward
from tests.sglang.deterministic_cases import deterministic, stretch
from tests.sglang.families import arguments, resolved

register()

LENGTH = CHUNK_TOKENS + 300


def engine_of(setup: Setup | None = None, **options: Any) -> Engine:
    setup = setup or Setup(16, max_context=2048)
    return make_engine(setup, max_batch=4, prepare=deterministic(**options))


def test_names_are_in_both_lists_once() -> None:
    register()
    for names in (
        server_args.DETERMINISTIC_ATTENTION_BACKEND_CHOICES,
        server_args.RADIX_SUPPORTED_DETERMINISTIC_ATTENTION_BACKEND,
    ):
        assert names.count(NAME) == 1


@pytest.mark.parametrize(
    "options", [{"enable_deterministic_inference": True}, {"rl_on_policy_target": "fsdp"}]
)
def test_arguments_keep_backend_and_prefix_cache(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    families.without_a_gpu(monkeypatch)
    args = arguments("llama", **options)
    assert resolved(args, "attention_backend") == NAME
    assert resolved(args, "enable_deterministic_inference")
    assert not resolved(args, "disable_radix_cache")
    assert resolved(args, "page_size") == 64


def test_start_up_line(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        engine_of()
    assert any("deterministic" in r.getMessage() for r in caplog.records)


def test_the_trainer_s_bits_are_not_promised(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        engine_of(rl_on_policy_target="fsdp")
    assert any("trainer's attention is another kernel" in r.getMessage() for r in caplog.records)


REFUSED: dict[str, tuple[dict[str, Any], Setup, str]] = {
    "prefill": ({"prefill_attention_backend": "fa3"}, Setup(16), "fa3 for prefill"),
    "decode": ({"decode_attention_backend": "fa3"}, Setup(16), "fa3 for decode"),
    "tree": (
        {"speculative_algorithm": "EAGLE", "speculative_eagle_topk": 4},
        Setup(16, draft_tokens=4),
        "trees of drafts",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_at_start(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options, setup, words = REFUSED[case]
    runner = make_engine(setup).runner
    if case == "tree":
        from flashcore.integrations.sglang import deterministic as module

        monkeypatch.setattr(module, "drafts_are_trees", lambda runner: True)
    deterministic(**options)(runner, None)
    with pytest.raises(NotServed, match=words):
        ATTENTION_BACKENDS[NAME](runner)


def test_prefill_in_any_chunks_and_decode_have_the_same_bits() -> None:
    engine = engine_of()
    requests = [Request(0, LENGTH), Request(CHUNK_TOKENS, 3, shared=CHUNK_TOKENS), Request(40, 1)]
    whole = make_forward(engine, ForwardMode.EXTEND, requests)
    engine.backend.init_forward_metadata(whole.batch)
    expected = attend(engine, whole)[0][:LENGTH]
    assert engine.backend.full.plan.batch_invariant
    for chunk in (LENGTH, 256, 70, 64, 1):
        places = range(0, LENGTH, chunk)
        if chunk == 1:
            places = [0, 1, 63, 500, *range(CHUNK_TOKENS - 2, CHUNK_TOKENS + 3), LENGTH - 1]
        for begin in places:
            n = min(chunk, LENGTH - begin)
            found = stretch(engine, whole, begin, n)[0]
            assert torch.equal(found, expected[begin : begin + n]), (chunk, begin)


@pytest.mark.parametrize("two_pools", [False, True])
def test_windows_count_chunks_from_the_beginning(two_pools: bool) -> None:
    """What SGLang has given back of the pages before a window is page 0, which holds anything."""
    window = 150
    setup = Setup(16, max_context=2048, window=window, two_pools=two_pools)
    engine = engine_of(setup)
    whole = make_forward(engine, ForwardMode.EXTEND, [Request(0, LENGTH), Request(9, 1)])
    engine.backend.init_forward_metadata(whole.batch)
    expected = [out[:LENGTH] for out in attend(engine, whole)]
    mapping = getattr(engine.runner.token_to_kv_pool, "full_to_swa_index_mapping", None)
    for begin, n in ((0, 70), (900, 300), (1000, 64), (1023, 1), (1024, 1), (LENGTH - 1, 1)):
        if mapping is not None:
            mapping[whole.slots[0][: max(0, begin - window) // 16 * 16]] = 0
        for layer, found in enumerate(stretch(engine, whole, begin, n)):
            assert torch.equal(found, expected[layer][begin : begin + n]), (layer, begin)
