"""The SGLang backend on a Hopper GPU: every mode, slots shared between requests, real CUDA graphs.

Needs SGLang. The same batches run on the CPU in tests/sglang.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("sglang")
from flashcore.runtime import launch

pytestmark = pytest.mark.skipif(
    not launch.available("cuda")[0], reason=f"no Hopper GPU: {launch.available('cuda')[1]}"
)
if launch.available("cuda")[0]:
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    from flashcore.planner.counters import Stat
    from flashcore.sglang.register import register
    from tests.compare import assert_close
    from tests.sglang import cases
    from tests.sglang.batches import (
        Engine,
        Forward,
        Setup,
        attend,
        expected,
        graph_buffers,
        graph_view,
        make_engine,
        make_forward,
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


def check_graphs(setup: Any, mode: str) -> None:
    engine = make_engine(setup)
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
