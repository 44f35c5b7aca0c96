"""The SGLang backend on a Hopper GPU: every mode, slots shared between requests, real CUDA graphs.

Needs SGLang. The same batches run on the CPU in tests/sglang.
"""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("sglang")
from flashcore.sm90.available import available
from tests.fp8 import FORMATS
from tests.gpu.launched import FP8_QUERIES

pytestmark = pytest.mark.skipif(
    not available("cuda")[0], reason=f"no Hopper GPU: {available('cuda')[1]}"
)
if available("cuda")[0]:
    from sglang.srt.model_executor.forward_batch_info import ForwardMode
    from sglang.srt.model_executor.forward_context import ForwardContext, forward_context

    from flashcore.contract.counts import Seen, Stat
    from flashcore.integrations.sglang.register import register
    from flashcore.jit.cache import shared_cache
    from flashcore.serving import page_table_kernel
    from flashcore.serving.capacity import ENVIRONMENT
    from flashcore.serving.shapes import NotServed
    from tests import serving_cases as cases
    from tests.compare import assert_close
    from tests.sglang.batches import (
        Engine,
        Forward,
        Request,
        Setup,
        attend,
        expected,
        graph_buffers,
        graph_view,
        make_engine,
        make_forward,
        with_scales,
    )

    register()

DRAFTS = 5
MODES = {
    "extend": ("EXTEND", "extend"),
    "mixed": ("MIXED", "mixed"),
    "decode": ("DECODE", "decode"),
    "draft_extend": ("DRAFT_EXTEND_V2", "verify"),
    "verify_chain": ("TARGET_VERIFY", "verify"),
    "verify_tree": ("TARGET_VERIFY", "verify"),
}
WINDOWS: dict[str, dict[str, Any]] = {
    "full": {},
    "window": {"window": 40},
    "pools": {"window": 100, "two_pools": True},
}


def setup_of(mode: str, page_tokens: int, dtype: torch.dtype, head_dim: int, **options: Any) -> Any:
    drafts = DRAFTS if MODES[mode][1] == "verify" else 0
    return Setup(
        page_tokens,
        heads=(8, 2),
        head_dim=head_dim,
        dtype=dtype,
        device="cuda",
        draft_tokens=drafts,
        **options,
    )


def forward_of(engine: Engine, mode: str, drop: int = 0) -> Forward:
    forward_mode, requests = MODES[mode]
    make = getattr(cases, requests)
    rows = make(DRAFTS) if requests == "verify" else make()
    return make_forward(
        engine, getattr(ForwardMode, forward_mode), rows[drop:], tree=mode == "verify_tree"
    )


def check(engine: Engine, forward: Forward, outs: list[torch.Tensor]) -> None:
    for out, exact in zip(outs, expected(engine, forward), strict=True):
        assert_close(out[: forward.tokens], exact, engine.setup.dtype)
        assert not out[forward.tokens :].any()


@pytest.mark.parametrize("page_tokens", [1, 16, 64, 128])
@pytest.mark.parametrize("windows", WINDOWS)
@pytest.mark.parametrize("mode", MODES)
def test_eager(mode: str, windows: str, page_tokens: int) -> None:
    engine = make_engine(setup_of(mode, page_tokens, torch.bfloat16, 128, **WINDOWS[windows]))
    for _ in range(2):
        forward = forward_of(engine, mode)
        engine.backend.init_forward_metadata(forward.batch)
        check(engine, forward, attend(engine, forward))
    stats = engine.backend.full.planner.stats().tolist()
    assert stats[Stat.FAULTS] == 0
    assert stats[Stat.TOKENS_UNIQUE] < stats[Stat.TOKENS_PER_SEQUENCE]


# The other kernels, once each where sharing matters most.
@pytest.mark.parametrize("head_dim", [64, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", ["extend", "decode", "verify_tree"])
def test_head_dims_and_dtypes(mode: str, dtype: torch.dtype, head_dim: int) -> None:
    engine = make_engine(setup_of(mode, 64, dtype, head_dim))
    forward = forward_of(engine, mode)
    engine.backend.init_forward_metadata(forward.batch)
    check(engine, forward, attend(engine, forward))


@pytest.mark.parametrize("mode", ["extend", "decode"])
def test_forward_with_gradients_on(mode: str) -> None:
    """As SGLang runs Starcoder2; sinks are a parameter of the model."""
    engine = make_engine(setup_of(mode, 64, torch.bfloat16, 64, **WINDOWS["pools"]))
    forward = forward_of(engine, mode)
    for values in (forward.q, forward.k, forward.v):
        for value in values:
            value.requires_grad_()
    sinks = torch.nn.Parameter(torch.randn(8, device="cuda", dtype=torch.bfloat16))
    engine.backend.init_forward_metadata(forward.batch)
    outs = attend(engine, forward, sinks=sinks)
    assert not any(out.requires_grad for out in outs)
    with torch.no_grad():
        wanted = expected(engine, forward, sinks)
    for out, exact in zip(outs, wanted, strict=True):
        assert_close(out, exact, torch.bfloat16)


# Between the kernels' tile widths, and V narrower than K.
@pytest.mark.parametrize("dims", [(80, 80), (112, 112), (192, 128)])
@pytest.mark.parametrize("mode", ["extend", "decode"])
def test_padded_head_dims(mode: str, dims: tuple[int, int]) -> None:
    engine = make_engine(setup_of(mode, 64, torch.bfloat16, dims[0], v_head_dim=dims[1]))
    forward = forward_of(engine, mode)
    engine.backend.init_forward_metadata(forward.batch)
    check(engine, forward, attend(engine, forward))


@pytest.mark.parametrize("page_tokens", [1, 64])
@pytest.mark.parametrize("windows", WINDOWS)
@pytest.mark.parametrize("mode", ["decode", "verify_chain", "verify_tree"])
def test_graph(mode: str, windows: str, page_tokens: int) -> None:
    """Two graphs of two batch sizes that share every buffer, replayed in turn with new batches."""
    check_graphs(setup_of(mode, page_tokens, torch.bfloat16, 128, **WINDOWS[windows]), mode)


def test_graph_with_narrow_values() -> None:
    check_graphs(setup_of("decode", 64, torch.bfloat16, 192, v_head_dim=128), "decode")


def check_graphs(setup: Any, mode: str, prepare: Any = None) -> None:
    engine = make_engine(setup, prepare=prepare)
    first = forward_of(engine, mode)
    sizes = (first.batch.batch_size, first.batch.batch_size + 3)
    width = max(1, engine.setup.draft_tokens)
    engine.backend.init_cuda_graph_state(sizes[1], sizes[1] * width)
    buffers = graph_buffers(engine, sizes[1])
    inputs = static_inputs(engine, sizes[1] * width)
    graphs = {size: capture(engine, first, size, width, buffers, inputs) for size in sizes}
    for size, drop in ((sizes[1], 0), (sizes[0], 0), (sizes[1], 1), (sizes[0], 2)):
        forward = forward_of(engine, mode, drop)
        engine.backend.init_forward_metadata_out_graph(graph_view(engine, forward, size, buffers))
        # SGLang gives the rows of finished requests to others once the graph is launched.
        engine.runner.req_to_token_pool.req_to_token.fill_(0)
        for kind in ("q", "k", "v"):
            for static, value in zip(inputs[kind], getattr(forward, kind), strict=True):
                static.fill_(float("nan"))
                static[: len(value)].copy_(value)
        graph, outs = graphs[size]
        graph.replay()
        check(engine, forward, outs)


def setup_of_fp8(mode: str, windows: str, pages: str) -> Any:
    setup = setup_of(mode, 64, FP8_QUERIES[pages], 128, **WINDOWS[windows])
    return replace(setup, kv_dtype=FORMATS[pages])


@pytest.mark.parametrize("pages", FORMATS)
@pytest.mark.parametrize("windows", WINDOWS)
@pytest.mark.parametrize("mode", MODES)
def test_fp8(mode: str, windows: str, pages: str) -> None:
    """Store and attention with scales that are no powers of two; with and without parameters."""
    for prepare in (with_scales(0.37, 2.5, parameters=True), None):
        engine = make_engine(setup_of_fp8(mode, windows, pages), prepare=prepare)
        forward = forward_of(engine, mode)
        engine.backend.init_forward_metadata(forward.batch)
        check(engine, forward, attend(engine, forward))
        assert engine.backend.full.planner.stats().tolist()[Stat.FAULTS] == 0


@pytest.mark.parametrize("windows", WINDOWS)
def test_fp8_in_a_graph(windows: str) -> None:
    prepare = with_scales(0.37, 2.5, parameters=True)
    check_graphs(setup_of_fp8("decode", windows, "e4m3"), "decode", prepare)


@pytest.mark.parametrize("windows", WINDOWS)
@pytest.mark.parametrize("mode", ["extend", "decode", "verify_tree"])
def test_tables_hold_garbage(mode: str, windows: str) -> None:
    """Nobody reads past a sequence's pages, so that tables need never be cleared."""
    engine = make_engine(setup_of(mode, 16, torch.bfloat16, 128, **WINDOWS[windows]))
    for value in (2**31 - 1, -1):
        for view in engine.backend._views:
            view._eager.pages.fill_(value)
            view._eager.lengths.fill_(value)
        forward = forward_of(engine, mode)
        engine.backend.init_forward_metadata(forward.batch)
        check(engine, forward, attend(engine, forward))
    for view in engine.backend._views:
        assert view.planner.seen[Seen.UPDATES] == 0


def test_a_fault_in_a_graph_is_told_at_once(caplog: pytest.LogCaptureFixture) -> None:
    """Of the windowed view, in one replay of many; before the log interval."""
    engine = make_engine(setup_of("decode", 16, torch.bfloat16, 128, window=40))
    backend = engine.backend
    first = forward_of(engine, "decode")
    size = first.batch.batch_size
    backend.init_cuda_graph_state(size, size)
    buffers, static = graph_buffers(engine, size), static_inputs(engine, size)
    for kind in ("q", "k", "v"):
        for buffer, value in zip(static[kind], getattr(first, kind), strict=True):
            buffer.copy_(value)
    graph, outs = capture(engine, first, size, 1, buffers, static)
    told = []
    with caplog.at_level(logging.ERROR):
        for step in range(12):
            backend.init_forward_metadata_out_graph(graph_view(engine, first, size, buffers))
            if step == 5:
                backend.windowed.tables.pages[2, 0] = 2**30
            graph.replay()
            torch.cuda.synchronize()
            broken = torch.isnan(outs[1]).any(1)
            assert broken.tolist() == [step == 5 and b == 2 for b in range(size)]
            assert not torch.isnan(outs[0]).any()
            told.append(len(caplog.records))
    assert told == [0] * 6 + [1] * 6  # by the forward after it
    line = caplog.records[0].getMessage()
    for part in ("decode, window 40", "page", "in 1 forwards", "last sequence 2"):
        assert part in line


def test_too_much_is_refused_at_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """By what the GPU has, or by what the variable says; nothing has been allocated then."""
    monkeypatch.setenv(ENVIRONMENT, "130")
    before = torch.cuda.memory_allocated()
    with pytest.raises(NotServed, match=rf"MiB \(at most 130\); use .*{ENVIRONMENT}=\d+"):
        make_engine(setup_of("decode", 16, torch.bfloat16, 128))
    assert torch.cuda.memory_allocated() - before < 64 << 20  # the caches of the test itself


def static_inputs(engine: Engine, tokens: int) -> dict[str, list[torch.Tensor]]:
    s = engine.setup
    return {
        kind: [torch.zeros(tokens, heads, dim, dtype=s.dtype, device="cuda") for _ in engine.layers]
        for kind, heads, dim in (
            ("q", s.heads[0], s.head_dim),
            ("k", s.heads[1], s.head_dim),
            ("v", s.heads[1], s.v_dim),
        )
    }


def capture(
    engine: Engine, first: Forward, size: int, width: int, buffers: Any, inputs: Any
) -> tuple[torch.cuda.CUDAGraph, list[torch.Tensor]]:
    """As SGLang's decode graph runner does it: two runs on a side stream, then the graph."""
    backend = engine.backend
    view = graph_view(engine, first, first.batch.batch_size, buffers)
    view.batch_size, view.num_padding = size, 0
    view.req_pool_indices, view.seq_lens = buffers.req_pool_indices[:size], buffers.seq_lens[:size]
    buffers.req_pool_indices.zero_()
    buffers.seq_lens.fill_(backend.get_cuda_graph_seq_len_fill_value())
    view.out_cache_loc = buffers.out_cache_loc[: size * width]
    rows = {kind: [x[: size * width] for x in parts] for kind, parts in inputs.items()}
    static = Forward(first.batch, [], [], rows["q"], rows["k"], rows["v"])

    def run() -> list[torch.Tensor]:
        backend.init_forward_metadata_in_graph(view)
        return attend(engine, static, view)

    backend.init_forward_metadata_out_graph(view, in_capture=True)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(side):
        run()
        run()
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph, stream=side):
        outs = run()
    return graph, outs


@pytest.mark.parametrize("windows", WINDOWS)
@pytest.mark.parametrize("drafts", [0, DRAFTS])
def test_first_forwards_wait_for_nothing(
    drafts: int, windows: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first forward of each kind loads no kernel and compiles none, and takes what the second
    takes, but for the planner of its kind, which is made."""
    monkeypatch.setattr(
        "flashcore.integrations.sglang.backend.drafts_are_trees", lambda runner: drafts > 0
    )
    options = {**WINDOWS[windows], "draft_tokens": drafts}
    engine = make_engine(
        Setup(64, heads=(8, 2), head_dim=128, dtype=torch.bfloat16, device="cuda", **options)
    )
    loaded = set(shared_cache().loaded)
    filled = set(page_table_kernel._compiled)
    for mode in MODES:
        if (MODES[mode][1] == "verify") != (drafts > 0):
            continue
        times = []
        for _ in range(2):
            forward = forward_of(engine, mode)
            torch.cuda.synchronize()
            started = time.perf_counter()
            engine.backend.init_forward_metadata(forward.batch)
            attend(engine, forward, save_kv_cache=False)
            torch.cuda.synchronize()
            times.append(time.perf_counter() - started)
        assert times[0] < times[1] + 50e-3, mode
    assert set(shared_cache().loaded) == loaded
    assert set(page_table_kernel._compiled) == filled


def test_halves_of_a_batch_compile_nothing() -> None:
    """Two-batch overlap hands over slices that begin at any element."""
    engine = make_engine(setup_of("decode", 64, torch.bfloat16, 128))
    filled = set(page_table_kernel._compiled)
    fill = page_table_kernel._fill
    variants = sum(len(cache[0]) for cache in fill.device_caches.values())
    for drop in (0, 1, 3):
        forward = forward_of(engine, "decode", drop)
        fb = forward.batch
        for name in ("req_pool_indices", "seq_lens"):
            value = getattr(fb, name)
            setattr(fb, name, torch.cat([value[:1], value])[1:])
            assert getattr(fb, name).data_ptr() % 16
        engine.backend.init_forward_metadata(fb)
        check(engine, forward, attend(engine, forward))
    assert set(page_table_kernel._compiled) == filled
    assert sum(len(cache[0]) for cache in fill.device_caches.values()) == variants


@pytest.mark.parametrize("windows", WINDOWS)
def test_compiled_forward_in_a_graph(windows: str) -> None:
    """As SGLang does it with --enable-torch-compile: the compiled forward is captured."""
    engine = make_engine(setup_of("decode", 64, torch.bfloat16, 128, **WINDOWS[windows]))
    backend = engine.backend
    first = forward_of(engine, "decode")
    size = first.batch.batch_size
    backend.init_cuda_graph_state(size, size)
    buffers = graph_buffers(engine, size)
    inputs = static_inputs(engine, size)

    def layers(fb: Any) -> list[torch.Tensor]:
        parts = (inputs["q"], inputs["k"], inputs["v"])
        rows = zip(engine.layers, *parts, strict=True)
        return [layer(2 * q.flatten(1) / 2, k, v, fb) for layer, q, k, v in rows]

    compiled = torch.compile(torch.no_grad()(layers), dynamic=False, fullgraph=True)
    view = graph_view(engine, first, size, buffers)
    view.out_cache_loc = buffers.out_cache_loc
    backend.init_forward_metadata_out_graph(view, in_capture=True)

    def run() -> list[torch.Tensor]:
        backend.init_forward_metadata_in_graph(view)
        with forward_context(ForwardContext(attn_backend=backend)):
            return compiled(view)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        outs = run()
    for _ in range(2):
        forward = forward_of(engine, "decode")
        backend.init_forward_metadata_out_graph(graph_view(engine, forward, size, buffers))
        engine.runner.req_to_token_pool.req_to_token.fill_(0)
        for kind in ("q", "k", "v"):
            for static, value in zip(inputs[kind], getattr(forward, kind), strict=True):
                static.copy_(value)
        graph.replay()
        check(engine, forward, outs)


@pytest.mark.parametrize("windows", WINDOWS)
@pytest.mark.parametrize("mode", ["EXTEND", "DECODE"])
def test_batches_without_tokens(mode: str, windows: str) -> None:
    """No request, and a request with nothing new: empty results, and the next forward is right."""
    engine = make_engine(setup_of("decode", 64, torch.bfloat16, 128, **WINDOWS[windows]))
    for requests in ([], [Request(200, 0)] if mode == "EXTEND" else []):
        forward = make_forward(engine, getattr(ForwardMode, mode), requests or [Request(9, 1)])
        if not requests:
            forward.batch.batch_size = 0
            forward.q, forward.k, forward.v = (
                [x[:0] for x in part] for part in (forward.q, forward.k, forward.v)
            )
        engine.backend.init_forward_metadata(forward.batch)
        for out in attend(engine, forward):
            assert out.shape[0] == 0
        forward = forward_of(engine, "decode")
        engine.backend.init_forward_metadata(forward.batch)
        check(engine, forward, attend(engine, forward))
