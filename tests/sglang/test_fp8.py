"""fp8 KV caches: SGLang's pools and scales, our store, and attention over what it has written."""

from __future__ import annotations

import logging

import pytest
import torch
from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
from sglang.srt.mem_cache.kv_cache_dtype import configure_kv_cache_dtype
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from flashcore.append import stored
from flashcore.integrations.sglang.layers import kv_scales
from flashcore.integrations.sglang.register import NAME, register
from flashcore.serving import kernels
from flashcore.serving.shapes import NotServed
from flashcore.sm90.families import PAGED
from tests import fake_kernels
from tests import serving_cases as cases
from tests.fp8 import FORMATS
from tests.sglang.batches import (
    Engine,
    Forward,
    Setup,
    attend,
    graph_buffers,
    graph_view,
    make_engine,
    make_forward,
    with_scales,
)
from tests.sglang.families import arguments, resolved, without_a_gpu
from tests.sglang.test_modes import MODES, WINDOWS, check, forward_of, pad, setup_of

register()

SCALES = {
    "none": with_scales(None, None, parameters=False),
    "parameters": with_scales(0.37, 2.5, parameters=True),
    "numbers": with_scales(0.37, 2.5, parameters=False),
}


def engine_of(mode: str, pages: str, windows: str, kind: str, page_tokens: int = 16) -> Engine:
    setup = setup_of(mode, page_tokens, dtype=torch.bfloat16, **WINDOWS[windows])
    setup = Setup(**{**vars(setup), "kv_dtype": FORMATS[pages]})
    return make_engine(setup, prepare=SCALES[kind])


def check_stored(engine: Engine, forward: Forward) -> None:
    """The new tokens' K and V, scaled and rounded once, in the slots of each layer's pool."""
    pool, loc = engine.runner.token_to_kv_pool, forward.batch.out_cache_loc
    for number, layer in enumerate(engine.layers):
        slots = loc
        if engine.setup.two_pools and layer.sliding_window_size >= 0:
            slots = pool.translate_loc_from_full_to_swa(loc)
        for new, buffer, scale in zip(
            (forward.k[number], forward.v[number]),
            pool.get_kv_buffer(layer.layer_id),
            (layer.k_scale, layer.v_scale),
            strict=True,
        ):
            scale = None if scale is None else torch.as_tensor(scale)
            wanted = stored(new, buffer.dtype, scale)
            assert torch.equal(buffer[slots].float(), wanted.float())


@pytest.mark.parametrize("kind", SCALES)
@pytest.mark.parametrize("pages", FORMATS)
@pytest.mark.parametrize("windows", WINDOWS)
@pytest.mark.parametrize("mode", MODES)
def test_eager(mode: str, windows: str, pages: str, kind: str) -> None:
    engine = engine_of(mode, pages, windows, kind)
    for _ in range(2):
        forward = forward_of(engine, mode)
        engine.backend.init_forward_metadata(forward.batch)
        before = [x.clone() for x in (*forward.k, *forward.v)]
        outs = attend(engine, forward)
        assert all(map(torch.equal, before, (*forward.k, *forward.v))), "SGLang's store divides"
        check_stored(engine, forward)
        check(engine, forward, outs)


@pytest.mark.parametrize("windows", WINDOWS)
@pytest.mark.parametrize("mode", ["decode", "verify_tree"])
def test_graph_buffers(mode: str, windows: str) -> None:
    """A padded replay: rows that pad write to the dump of slot 0, NaN and all, and nobody reads."""
    engine = engine_of(mode, "e4m3", windows, "parameters")
    backend, padded = engine.backend, len(MODES[mode][1]()) + 3
    width = max(1, engine.setup.draft_tokens)
    backend.init_cuda_graph_state(padded, padded * width)
    buffers = graph_buffers(engine, padded)
    forward = forward_of(engine, mode)
    replay = graph_view(engine, forward, padded, buffers)
    backend.init_forward_metadata_out_graph(replay)
    backend.init_forward_metadata_in_graph(replay)
    replay.out_cache_loc = buffers.out_cache_loc
    check(engine, forward, attend(engine, pad(forward, padded * width), replay))
    check_stored(engine, forward)


def test_compiled_forward() -> None:
    """Store and attention are one operator to torch.compile, which does not look into it."""
    engine = engine_of("decode", "e4m3", "full", "parameters")
    forward = forward_of(engine, "decode")
    engine.backend.init_forward_metadata(forward.batch)
    outs = torch.compile(attend, fullgraph=True, dynamic=False, backend="aot_eager")(
        engine, forward
    )
    check_stored(engine, forward)
    check(engine, forward, outs)


def test_large_values_are_not_nan() -> None:
    """SGLang's own store casts without saturating, which is NaN for these on a GPU."""
    engine = engine_of("decode", "e4m3", "full", "none")
    forward = forward_of(engine, "decode")
    forward.v[0] *= 1e4
    engine.backend.init_forward_metadata(forward.batch)
    outs = attend(engine, forward)
    check_stored(engine, forward)
    assert outs[0].isfinite().all()
    values = engine.runner.token_to_kv_pool.get_kv_buffer(0)[1][forward.batch.out_cache_loc]
    assert float(values.float().max()) == 448.0


def test_cross_layer_sharing_writes_nothing() -> None:
    """Layers without K and V of their own read what another has written."""
    engine = engine_of("decode", "e4m3", "full", "parameters")
    forward = forward_of(engine, "decode")
    engine.backend.init_forward_metadata(forward.batch)
    first = attend(engine, forward)
    layer, q = engine.layers[0], forward.q[0].flatten(1)
    again = engine.backend.forward(q, None, None, layer, forward.batch)
    assert torch.equal(again, first[0])


def test_a_parameter_counts_where_it_lies() -> None:
    """What is loaded into it later counts, in graphs that have been captured too."""
    engine = engine_of("decode", "e4m3", "full", "parameters")
    layer = engine.layers[0]
    k_scale, v_scale = engine.backend._scales_of(layer)
    assert k_scale.data_ptr() == layer.k_scale.data_ptr()
    layer.v_scale.copy_(torch.tensor(7.0))
    assert float(v_scale) == 7.0
    forward = forward_of(engine, "decode")
    engine.backend.init_forward_metadata(forward.batch)
    check(engine, forward, attend(engine, forward))


def test_scales_are_made_once() -> None:
    """Numbers become tensors of the device when the server starts, not in a forward or a graph."""
    engine = engine_of("decode", "e5m2", "window", "numbers")
    made = [engine.backend._scales_of(layer) for layer in engine.layers]
    assert all(x.shape == () and x.dtype == torch.float32 for pair in made for x in pair)
    forward = forward_of(engine, "decode")
    engine.backend.init_forward_metadata(forward.batch)
    attend(engine, forward)
    again = [engine.backend._scales_of(layer) for layer in engine.layers]
    assert all(a is b for x, y in zip(made, again, strict=True) for a, b in zip(x, y, strict=True))
    assert float(made[1][0]) == pytest.approx(2 * 0.37)


@pytest.mark.parametrize(
    ("scale", "words"),
    [
        (torch.tensor(-1.0), "k_scale -1.0 of layer 0"),
        (torch.tensor(float("nan")), "k_scale nan of layer 0"),
        (torch.zeros(2), r"k_scale \[0.0, 0.0\] of layer 0"),
        (torch.ones(3), r"k_scale of shape \(3,\) in layer 0"),
    ],
    ids=str,
)
def test_scales_that_are_refused_at_start(scale: torch.Tensor, words: str) -> None:
    engine = engine_of("decode", "e4m3", "full", "none")
    engine.layers[0].k_scale = scale
    with pytest.raises(NotServed, match=rf"{words}; use a checkpoint"):
        ATTENTION_BACKENDS[NAME](engine.runner)


def test_one_for_each_head() -> None:
    engine = engine_of("decode", "e4m3", "full", "none")
    engine.layers[0].k_scale = torch.ones(2) * 3
    k_scale, v_scale = kv_scales(engine.layers[0], torch.device("cpu"))
    assert k_scale is not None
    assert k_scale.tolist() == [3.0, 3.0]
    assert v_scale is None


def test_scales_of_a_16_bit_cache_are_not_used() -> None:
    """A checkpoint's quantisation method gives scales whatever the cache is."""
    setup = setup_of("decode", 16, dtype=torch.bfloat16)
    engine = make_engine(setup, prepare=SCALES["parameters"])
    forward = forward_of(engine, "decode")
    engine.backend.init_forward_metadata(forward.batch)
    check(engine, forward, attend(engine, forward))


def test_start_up_line(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        engine_of("decode", "e5m2", "full", "none")
    line = next(r.getMessage() for r in caplog.records if r.getMessage().startswith("flashcore"))
    assert "bfloat16 on a KV cache in float8_e5m2, page size 16" in line


def test_pages_count_as_half() -> None:
    engine = engine_of("decode", "e4m3", "full", "none")
    forward = forward_of(engine, "decode")
    engine.backend.init_forward_metadata(forward.batch)
    assert engine.backend.full.plan.problem.itemsize == 1


@pytest.mark.parametrize("pages", FORMATS)
@pytest.mark.parametrize("windows", WINDOWS)
def test_every_kernel_is_there_at_start(
    pages: str, windows: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fakes = fake_kernels.install(monkeypatch)
    setup = Setup(
        16,
        heads=(8, 2),
        head_dim=64,
        dtype=torch.bfloat16,
        kv_dtype=FORMATS[pages],
        **WINDOWS[windows],
    )
    engine = make_engine(setup, prepare=SCALES["parameters"])
    found = {(k.config.kv_dtype, k.config.expanded) for k in fakes.loaded if k.family is PAGED}
    expanded = {("", True)} if engine.backend.full is not None else set()
    assert found == {(pages, False)} | expanded
    assert set(fakes.compiled) == set(fakes.loaded) == set(fakes.calls)
    known = set(fakes.loaded)
    for mode, requests in ((ForwardMode.DECODE, cases.decode), (ForwardMode.EXTEND, cases.extend)):
        forward = make_forward(engine, mode, requests())
        engine.backend.init_forward_metadata(forward.batch)
        attend(engine, forward)
    assert set(fakes.loaded) == known


def test_what_no_kernel_takes_is_refused_at_start(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_kernels.install(monkeypatch)

    def none(*_: object) -> None:
        raise ValueError("no kernel for that")

    monkeypatch.setattr(kernels, "kernels_for", none)
    message = r"these layers \(no kernel for that\); use a KV cache in the model's dtype"
    with pytest.raises(NotServed, match=message):
        engine_of("decode", "e4m3", "full", "none")


# ---------------------------------------------------------------- the command line


@pytest.mark.parametrize("dtype", ["fp8_e4m3", "fp8_e5m2"])
def test_arguments(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Our name stays where SGLang sends fa3's fp8_e5m2 to triton."""
    without_a_gpu(monkeypatch)
    args = arguments("llama", kv_cache_dtype=dtype)
    assert resolved(args, "attention_backend") == "flashcore"
    assert resolved(args, "kv_cache_dtype") == dtype
    assert resolved(args, "page_size") == 64


def test_auto_is_what_the_checkpoint_says() -> None:
    """SGLang's own resolution gives the backend a dtype that it serves."""

    class Model(torch.nn.Module):
        class quant_config:
            kv_cache_quant_algo = "FP8"

    name, dtype = configure_kv_cache_dtype(
        server_args_kv_cache_dtype="auto",
        model=Model(),
        model_dtype=torch.bfloat16,
        is_draft_worker=False,
        is_dflash=False,
        speculative_draft_attention_backend="fa3",
    )
    assert (name, dtype) == ("fp8_e4m3", torch.float8_e4m3fn)
