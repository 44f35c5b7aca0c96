"""Every model family of tests/data/models: SGLang's own classes, pools and wrappers, on the CPU."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.layers.attention.hybrid_linear_attn_backend import HybridLinearAttnBackend
from sglang.srt.layers.attention.tbo_backend import TboAttnBackend
from sglang.srt.mem_cache.memory_pool import HybridLinearKVPool
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.model_executor.forward_context import (
    ForwardContext,
    forward_context,
    get_req_to_token_pool,
    get_token_to_kv_pool,
)

from flashcore.integrations.sglang.register import register
from flashcore.serving.shapes import NotServed
from tests.compare import assert_close
from tests.serving_cases import Request
from tests.sglang import families
from tests.sglang.batches import expected, make_forward
from tests.sglang.families import Family

register()

HYBRID = {"falcon-h1", "granite-4-h", "lfm2", "nemotron-h", "qwen3-next", "qwen3.5"}
TWO_POOLS = {"gpt-oss", "mimo-v2"}
SINKS = {"gpt-oss": (False, True), "mimo-v2": (True,)}  # layers with: full and windowed; windowed
WINDOWS = {
    "exaone4": 4095,
    "gemma2": 4095,
    "gemma3": 1023,
    "gpt-oss": 127,
    "mimo-v2": 128,
    "olmo3": 4095,
}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Family]]:
    """Every family's model, made once."""
    with pytest.MonkeyPatch.context() as patch:
        families.without_a_gpu(patch)
        with families.one_rank(tmp_path_factory.mktemp("groups")):
            yield {name: families.load(name) for name in families.NAMES}


REQUESTS = {
    ForwardMode.EXTEND: [Request(256, 9, shared=256), Request(256, 70, shared=256), Request(0, 3)],
    ForwardMode.DECODE: [
        Request(256, 1, shared=256),
        Request(300, 1, shared=256),
        Request(0, 1),
        Request(129, 1),
    ],
}


@pytest.mark.parametrize("name", families.NAMES)
def test_forwards(loaded: dict[str, Family], name: str) -> None:
    """Metadata, K/V writes and attention of a layer of each kind, with its own heads and window.

    Gradients are on, as in models whose forward SGLang does not run without them.
    """
    engine = families.make_engine(loaded[name])
    assert engine.backend.model.window == WINDOWS.get(name, -1)
    pool = engine.runner.token_to_kv_pool
    assert isinstance(pool, HybridLinearKVPool) == (name in HYBRID)
    assert isinstance(pool, SWAKVPool) == (name in TWO_POOLS)
    for mode, requests in REQUESTS.items():
        forward = make_forward(engine, mode, requests)
        engine.backend.init_forward_metadata(forward.batch)
        for number, layer in enumerate(engine.layers):
            windowed = layer.sliding_window_size >= 0
            sinks = None
            if windowed in SINKS.get(name, ()):
                sinks = torch.nn.Parameter(torch.randn(layer.tp_q_head_num, generator=engine.rng))
            q, k, v = (x[number].requires_grad_() for x in (forward.q, forward.k, forward.v))
            out = engine.backend.forward(q.flatten(1), k, v, layer, forward.batch, sinks=sinks)
            assert not out.requires_grad
            with torch.no_grad():
                wanted = expected(engine, forward, sinks)[number]
            assert_close(out, wanted, torch.float32)
    assert not any(buffer.requires_grad for buffer in pool.get_kv_buffer(engine.layers[0].layer_id))


# Families whose modules have kernels for a GPU alone before or after attention.
GPU_ONLY = {"qwen3.5", "minimax-m2"}


@pytest.mark.parametrize("name", sorted(set(families.NAMES) - GPU_ONLY))
def test_modules_of_the_model(loaded: dict[str, Family], name: str) -> None:
    """The model's own attention modules, in whatever form and type they hand over q, k and v."""
    engine = families.make_engine(loaded[name])
    called: list[tuple[torch.Tensor, torch.Tensor]] = []
    forward_of_backend = engine.backend.forward

    def noting(q: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        out = forward_of_backend(q, *args, **kwargs)
        called.append((q.detach(), out))
        return out

    engine.backend.forward = noting
    for number, layer in enumerate(engine.layers):
        module = families.materialise(loaded[name].model, layer, engine.rng)
        sinks = getattr(module, "sinks", getattr(module, "attention_sink_bias", None))
        for mode, requests in REQUESTS.items():
            forward = make_forward(engine, mode, requests)
            engine.backend.init_forward_metadata(forward.batch)
            with forward_context(ForwardContext(attn_backend=engine.backend)):
                run_module(module, layer, forward, loaded[name], engine.rng)
            (q, out), called[:] = called[-1], []
            forward.q[number] = q.reshape(forward.tokens, layer.tp_q_head_num, layer.head_dim)
            with torch.no_grad():
                wanted = expected(engine, forward, sinks)[number]
            assert_close(out, wanted, torch.float32)


def run_module(module: Any, layer: Any, forward: Any, family: Family, rng: Any) -> None:
    """One forward on random hidden states."""
    run = getattr(module, "self_attention", module.forward)
    hidden = torch.randn(forward.tokens, family.config.hidden_size, generator=rng)
    inputs = {
        "positions": forward.batch.positions,
        "hidden_states": hidden,
        "forward_batch": forward.batch,
        "position_embeddings": tuple(torch.rand(2, 1, forward.tokens, layer.head_dim)),
    }
    run(**{name: inputs[name] for name in inspect.signature(run).parameters if name in inputs})


def test_every_layer_of_a_family_is_seen(loaded: dict[str, Family]) -> None:
    """Model.of looks at SGLang's own layers, of which hybrids have few."""
    counts = {name: len(loaded[name].layers) for name in sorted(HYBRID)}
    assert counts == {
        "falcon-h1": 3,
        "granite-4-h": 1,
        "lfm2": 1,
        "nemotron-h": 1,
        "qwen3-next": 1,
        "qwen3.5": 1,
    }
    for name in HYBRID - {"falcon-h1"}:
        assert loaded[name].layers[0].layer_id > 0  # which its pool calls 0


@pytest.mark.parametrize("name", sorted(HYBRID))
def test_behind_the_hybrid_wrapper(loaded: dict[str, Family], name: str) -> None:
    """SGLang's wrapper reads attributes of the backend it wraps, and sends it some layers."""
    engine = families.make_engine(loaded[name])
    wrapper = HybridLinearAttnBackend(
        engine.backend, LinearStandIn(), [layer.layer_id for layer in engine.layers]
    )
    assert wrapper.data_type == torch.float32
    with forward_context(ForwardContext(attn_backend=wrapper)):
        assert get_token_to_kv_pool() is engine.runner.token_to_kv_pool
        assert get_req_to_token_pool() is engine.runner.req_to_token_pool
    for mode, requests in REQUESTS.items():
        forward = make_forward(engine, mode, requests)
        wrapper.init_forward_metadata(forward.batch)
        layer, q = engine.layers[0], forward.q[0].flatten(1)
        out = wrapper.forward(
            q=q, k=forward.k[0], v=forward.v[0], layer=layer, forward_batch=forward.batch
        )
        assert_close(out, expected(engine, forward)[0], torch.float32)


class LinearStandIn:
    """The linear layers' side, which has no kernels on a CPU."""

    needs_cpu_seq_lens = False
    extend_dummy_seqs_capped_by_req_pool = False

    def supports_prefill_graph_extend(self) -> bool:
        """Of prefill graphs."""
        return False

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Nothing."""


def test_behind_the_two_batch_wrapper(loaded: dict[str, Family]) -> None:
    engine = families.make_engine(loaded["llama"])
    wrapper = TboAttnBackend(primary=engine.backend, children=[])
    assert wrapper.req_to_token_pool is engine.runner.req_to_token_pool
    assert wrapper.token_to_kv_pool is engine.runner.token_to_kv_pool


def test_layers_marked_bidirectional_run_causally(
    loaded: dict[str, Family], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with fa3 (SGLang 0.5.16 marks all of Gemma 3): test_forwards has the values. A model that
    has images is told of; one that wants both directions for its prompts is refused."""
    from sglang.srt.layers.radix_attention import AttentionType

    family = loaded["gemma3"]
    for layer in family.layers:
        monkeypatch.setattr(layer, "attn_type", AttentionType.DECODER_BIDIRECTIONAL)
    monkeypatch.setattr(family.config, "is_multimodal", True)
    with caplog.at_level(logging.WARNING):
        families.make_engine(family)
    assert sum("image tokens attend causally" in r.getMessage() for r in caplog.records) == 1
    text = SimpleNamespace(use_bidirectional_attention=True)
    monkeypatch.setattr(family.config, "hf_text_config", text)
    with pytest.raises(NotServed, match="bidirectional attention between prompt tokens"):
        families.make_engine(family)


def test_encoder_layers_with_a_window_are_refused(
    loaded: dict[str, Family], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their window has two sides, and the kernels' has one."""
    from sglang.srt.layers.radix_attention import AttentionType

    for layer in loaded["gemma2"].layers:
        monkeypatch.setattr(layer, "attn_type", AttentionType.ENCODER_ONLY)
    with pytest.raises(NotServed, match="encoder layers with a sliding window"):
        families.make_engine(loaded["gemma2"])
