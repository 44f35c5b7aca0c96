"""Every mode through SGLang's own batches and pools, with slots shared between requests."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sglang.srt.layers.radix_attention import AttentionType
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from flashcore.contract.counts import Stat
from flashcore.integrations.sglang.register import register
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
)

register()

MODES = {
    "extend": (ForwardMode.EXTEND, cases.extend),
    "mixed": (ForwardMode.MIXED, cases.mixed),
    "split": (ForwardMode.SPLIT_PREFILL, cases.extend),
    "decode": (ForwardMode.DECODE, cases.decode),
    "draft_extend": (ForwardMode.DRAFT_EXTEND_V2, lambda: cases.verify(5)),
    "verify_chain": (ForwardMode.TARGET_VERIFY, lambda: cases.verify(5)),
    "verify_tree": (ForwardMode.TARGET_VERIFY, lambda: cases.verify(5)),
}
# Windowed layers: shorter than a page, than the draft, and longer than most sequences.
WINDOWS = {"full": {}, "window": {"window": 40}, "pools": {"window": 100, "two_pools": True}}

# Pages of one token, of fewer than a window, and of more than one; every size without a window.
CACHES = [
    *(("full", page) for page in cases.PAGE_SIZES),
    *((windows, page) for windows in ("window", "pools") for page in (1, 64)),
]


def setup_of(mode: str, page_tokens: int, **options: Any) -> Setup:
    draft_tokens = 5 if mode in ("draft_extend", "verify_chain", "verify_tree") else 0
    return Setup(page_tokens, draft_tokens=draft_tokens, **options)


def forward_of(engine: Engine, mode: str) -> Forward:
    forward_mode, requests = MODES[mode]
    return make_forward(engine, forward_mode, requests(), tree=mode == "verify_tree")


def check(engine: Engine, forward: Forward, outs: list[torch.Tensor], **options: Any) -> None:
    wanted = expected(engine, forward, **options)
    for out, exact in zip(outs, wanted, strict=True):
        assert_close(out[: forward.tokens], exact, engine.setup.dtype)
        assert not out[forward.tokens :].any()


@pytest.mark.parametrize(("windows", "page_tokens"), CACHES)
@pytest.mark.parametrize("mode", MODES)
def test_eager(mode: str, windows: str, page_tokens: int) -> None:
    engine = make_engine(setup_of(mode, page_tokens, **WINDOWS[windows]))
    for _ in range(2):  # buffers of the first forward must not matter to the second
        forward = forward_of(engine, mode)
        engine.backend.init_forward_metadata(forward.batch)
        check(engine, forward, attend(engine, forward))
    stats = engine.backend.full.planner.stats()
    assert stats[Stat.TOKENS_UNIQUE] < stats[Stat.TOKENS_PER_SEQUENCE]


@pytest.mark.parametrize(("windows", "page_tokens"), CACHES)
@pytest.mark.parametrize("mode", ["decode", "verify_chain", "verify_tree"])
def test_graph_buffers(mode: str, windows: str, page_tokens: int) -> None:
    """Captured with one batch, replayed with two others that are padded, from the same memory.

    Once a batch is captured, only what lies in static buffers reaches the layers: so the plan is
    made again from the tables alone, after SGLang's own table has been given to others.
    """
    engine = make_engine(setup_of(mode, page_tokens, **WINDOWS[windows]))
    backend, padded = engine.backend, len(MODES[mode][1]()) + 3
    width = max(1, engine.setup.draft_tokens)
    backend.init_cuda_graph_state(padded, padded * width)
    buffers = graph_buffers(engine, padded)
    first = forward_of(engine, mode)
    view = graph_view(engine, first, padded, buffers)
    view.num_padding, view.out_cache_loc = 0, buffers.out_cache_loc
    backend.init_forward_metadata_out_graph(view, in_capture=True)
    tables = [v.tables.pages.data_ptr() for v in backend._views]
    engine_table = engine.runner.req_to_token_pool.req_to_token
    for _ in range(2):
        forward = forward_of(engine, mode)
        replay = graph_view(engine, forward, padded, buffers)
        backend.init_forward_metadata_out_graph(replay)
        assert tables == [v.tables.pages.data_ptr() for v in backend._views]
        engine_table.fill_(0)
        backend.init_forward_metadata_in_graph(replay)
        captured = pad(forward, padded * width)
        replay.out_cache_loc = buffers.out_cache_loc  # the captured batch's
        check(engine, forward, attend(engine, captured, replay))
        assert not any(row_lens[forward.batch.batch_size :].any() for row_lens in lengths(backend))


def pad(forward: Forward, tokens: int) -> Forward:
    """q, k, v with rows of NaN behind them, as a graph's buffers may hold."""

    def longer(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, x.new_full((tokens - len(x), *x.shape[1:]), float("nan"))])

    parts = [[longer(x) for x in part] for part in (forward.q, forward.k, forward.v)]
    return Forward(forward.batch, forward.slots, forward.new, *parts, tree=forward.tree)


def lengths(backend: Any) -> list[torch.Tensor]:
    return [view.tables.seq_lens for view in backend._views]


@pytest.mark.parametrize("heads", [(4, 4), (8, 1), (6, 2)])
def test_head_counts(heads: tuple[int, int]) -> None:
    """As tensor parallelism leaves them: MHA, MQA, and three query heads for each KV head."""
    engine = make_engine(Setup(16, heads=heads))
    for mode in ("extend", "decode"):
        forward = forward_of(engine, mode)
        engine.backend.init_forward_metadata(forward.batch)
        check(engine, forward, attend(engine, forward))


# Between the kernels' tile widths, as in Phi and others; V narrower than K, as in MiMo V2, with
# windowed layers in a pool of their own.
@pytest.mark.parametrize("windows", ["full", "pools"])
@pytest.mark.parametrize("dims", [(80, 80), (96, 96), (112, 112), (192, 128)])
@pytest.mark.parametrize("mode", MODES)
def test_head_dims(mode: str, dims: tuple[int, int], windows: str) -> None:
    options = WINDOWS[windows] | {"head_dim": dims[0], "v_head_dim": dims[1]}
    engine = make_engine(setup_of(mode, 16, **options))
    assert engine.backend.full.shape.v_head_dim == dims[1]
    forward = forward_of(engine, mode)
    engine.backend.init_forward_metadata(forward.batch)
    outs = attend(engine, forward)
    assert {out.shape[1] for out in outs} == {4 * dims[1]}
    check(engine, forward, outs)


def test_narrow_values_in_graph_buffers() -> None:
    """Rows that pad a graph's batch come out as zeros in a result that has V's columns."""
    engine = make_engine(setup_of("decode", 16, head_dim=24, v_head_dim=16))
    backend, forward = engine.backend, forward_of(engine, "decode")
    padded = forward.batch.batch_size + 3
    backend.init_cuda_graph_state(padded, padded)
    replay = graph_view(engine, forward, padded, graph_buffers(engine, padded))
    backend.init_forward_metadata_out_graph(replay)
    backend.init_forward_metadata_in_graph(replay)
    replay.out_cache_loc = torch.cat([replay.out_cache_loc, torch.zeros(3, dtype=torch.int64)])
    out = torch.full((padded, 4 * 16), float("nan"))
    replay._attn_output = out  # as SGLang hands it over at the breaks of a prefill graph
    (returned,) = attend(engine, pad(forward, padded), replay)
    assert returned.data_ptr() == out.data_ptr()
    check(engine, forward, [returned])


def test_logit_cap_and_sinks() -> None:
    engine = make_engine(Setup(16, window=50))
    for layer in engine.layers:
        layer.logit_cap = 3.0
    sinks = torch.randn(4, generator=engine.rng)
    for mode in ("extend", "decode"):
        forward = forward_of(engine, mode)
        engine.backend.init_forward_metadata(forward.batch)
        check(engine, forward, attend(engine, forward, sinks=sinks), sinks=sinks)


def test_encoder_only_layers_see_every_key() -> None:
    engine = make_engine(Setup(16))
    engine.layers[0].attn_type = AttentionType.ENCODER_ONLY
    forward = forward_of(engine, "extend")
    engine.backend.init_forward_metadata(forward.batch)
    check(engine, forward, attend(engine, forward))


def test_layers_that_share_keys_write_none() -> None:
    """k and v are None, or are not to be saved: the cache stays, and its keys are attended."""
    engine = make_engine(Setup(16))
    forward = forward_of(engine, "extend")
    engine.backend.init_forward_metadata(forward.batch)
    check(engine, forward, attend(engine, forward))
    before = [x.clone() for x in engine.runner.token_to_kv_pool.get_kv_buffer(0)]
    first = attend(engine, forward)
    forward.k, forward.v = [torch.randn_like(forward.k[0])], [torch.randn_like(forward.v[0])]
    check(engine, forward, attend(engine, forward, save_kv_cache=False))
    forward.k, forward.v = [None], [None]
    assert torch.equal(attend(engine, forward)[0], first[0])
    after = engine.runner.token_to_kv_pool.get_kv_buffer(0)
    for old, new in zip(before, after, strict=True):
        assert torch.equal(old.nan_to_num(), new.nan_to_num())


def test_padded_prefill_writes_where_it_is_told() -> None:
    """Prefill graphs give more rows than there are tokens, and the tensor to write to."""
    engine = make_engine(Setup(16))
    forward = forward_of(engine, "extend")
    engine.backend.init_forward_metadata(forward.batch)
    wide = pad(forward, forward.tokens + 7)
    dump = torch.zeros(7, dtype=torch.int64)
    forward.batch.out_cache_loc = torch.cat([forward.batch.out_cache_loc, dump])
    forward.batch._attn_output = torch.full((forward.tokens + 7, 64), float("nan"))
    outs = attend(engine, wide, forward.batch)
    assert outs[0].data_ptr() == forward.batch._attn_output.data_ptr()
    check(engine, forward, outs)


def test_strided_queries() -> None:
    """q is often a part of a joint projection."""
    engine = make_engine(Setup(16))
    forward = forward_of(engine, "decode")
    engine.backend.init_forward_metadata(forward.batch)
    wide = torch.randn(forward.tokens, 64 + 40)
    wide[:, :64] = forward.q[0].flatten(1)
    layer = engine.layers[0]
    out = engine.backend.forward(wide[:, :64], forward.k[0], forward.v[0], layer, forward.batch)
    check(engine, forward, [out])


def by_heads(q: torch.Tensor) -> torch.Tensor:
    return q


def transposed(q: torch.Tensor) -> torch.Tensor:
    """[1, tokens, heads, dim] whose memory is [1, heads, tokens, dim]."""
    return q.transpose(0, 1).contiguous().unsqueeze(0).permute(0, 2, 1, 3)


@pytest.mark.parametrize("given", [True, False], ids=["given_output", "own_output"])
@pytest.mark.parametrize("mode", ["extend", "decode"])
@pytest.mark.parametrize("form", [by_heads, transposed])
def test_queries_by_heads(form: Any, mode: str, given: bool) -> None:
    """As Gemma 3 gives them in SGLang 0.5.23 and 0.5.16, to a graph's output in the same form."""
    engine = make_engine(Setup(16))
    forward = forward_of(engine, mode)
    engine.backend.init_forward_metadata(forward.batch)
    q = form(forward.q[0])
    if given:
        forward.batch._attn_output = torch.full(q.shape, float("nan"))
    out = engine.backend.forward(q, forward.k[0], forward.v[0], engine.layers[0], forward.batch)
    assert out.shape == (forward.tokens, 64)
    assert not given or out.data_ptr() == forward.batch._attn_output.data_ptr()
    check(engine, forward, [out])


def test_idle() -> None:
    engine = make_engine(Setup(16))
    forward = make_forward(engine, ForwardMode.DECODE, [Request(5, 1)])
    forward.batch.forward_mode = ForwardMode.IDLE
    q = torch.zeros(0, 64)
    forward.batch.batch_size = 0
    for name in ("seq_lens", "seq_lens_cpu", "req_pool_indices", "out_cache_loc", "positions"):
        setattr(forward.batch, name, getattr(forward.batch, name)[:0])
    engine.backend.init_forward_metadata(forward.batch)
    out = engine.backend.forward(q, None, None, engine.layers[0], forward.batch)
    assert out.shape == (0, 64)


def test_int32_lengths() -> None:
    """SGLang's own kit has request indices and lengths in int32."""
    engine = make_engine(Setup(16))
    forward = forward_of(engine, "decode")
    forward.batch.seq_lens = forward.batch.seq_lens.int()
    forward.batch.req_pool_indices = forward.batch.req_pool_indices.int()
    engine.backend.init_forward_metadata(forward.batch)
    check(engine, forward, attend(engine, forward))


def test_mask_over_drafts_alone() -> None:
    """The other layout of the tree mask that SGLang has, from CPUs and from 0.5.23's buffer."""
    engine = make_engine(setup_of("verify_tree", 16))
    forward = forward_of(engine, "verify_tree")
    assert forward.tree is not None
    forward.batch.spec_info.custom_mask = torch.cat([mask.flatten() for mask in forward.tree])
    engine.backend.init_forward_metadata(forward.batch)
    check(engine, forward, attend(engine, forward))
