"""Modes of operation of the engine: compiled forwards, padded and empty batches, late masks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.model_executor.forward_context import ForwardContext, forward_context

from flashcore.integrations.sglang.register import NAME, register
from flashcore.integrations.sglang.speculation import sequences_of_mask
from tests import serving_cases as cases
from tests.compare import assert_close
from tests.sglang.batches import (
    PADDING,
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


class Model(torch.nn.Module):
    """As a model calls its attention layers: projections around each, in one forward."""

    def __init__(self, engine: Engine):
        super().__init__()
        self.layers = torch.nn.ModuleList(engine.layers)
        s = engine.setup
        self.q_width, self.kv_width = s.heads[0] * s.head_dim, s.heads[1] * s.head_dim
        self.before = torch.nn.Linear(64, self.q_width + 2 * self.kv_width)

    def forward(self, x: torch.Tensor, forward_batch: Any) -> torch.Tensor:
        for layer in self.layers:
            q, k, v = self.before(x).split([self.q_width, self.kv_width, self.kv_width], -1)
            x = x + layer(q, k, v, forward_batch)
        return x


@pytest.mark.parametrize("windows", [{}, {"window": 40}, {"window": 100, "two_pools": True}])
def test_torch_compile(windows: dict[str, Any]) -> None:
    """One graph, without breaks, and the results of the uncompiled forward; as SGLang compiles the
    forward of a captured decode batch."""
    engine = make_engine(Setup(16, **windows))
    backend, batch = engine.backend, len(cases.decode())
    backend.init_cuda_graph_state(batch, batch)
    buffers = graph_buffers(engine, batch)
    model = Model(engine).eval()
    compiled = torch.compile(
        torch.no_grad()(model.forward), dynamic=False, fullgraph=True, backend="aot_eager"
    )
    for _ in range(2):
        forward = make_forward(engine, ForwardMode.DECODE, cases.decode())
        replay = graph_view(engine, forward, batch, buffers)
        replay.out_cache_loc = buffers.out_cache_loc
        backend.init_forward_metadata_out_graph(replay)
        backend.init_forward_metadata_in_graph(replay)
        x = torch.randn(batch, 64)
        with forward_context(ForwardContext(attn_backend=backend)):
            exact = torch.no_grad()(model.forward)(x, replay)
            keys = [pool.clone() for pool in engine.runner.token_to_kv_pool.get_kv_buffer(0)]
            for pool in engine.runner.token_to_kv_pool.get_kv_buffer(0):
                pool[forward.batch.out_cache_loc] = float("nan")  # the call writes them itself
            found = compiled(x, replay)
        assert torch.isfinite(exact).all()
        torch.testing.assert_close(found, exact)
        for pool, was in zip(engine.runner.token_to_kv_pool.get_kv_buffer(0), keys, strict=True):
            torch.testing.assert_close(pool, was, equal_nan=True)


def test_torch_compile_of_a_layer_that_came_later() -> None:
    """The operator finds layers by number: around one without, the compiler breaks its graph."""
    engine = make_engine(Setup(16))
    model = Model(engine).eval()
    del engine.layers[0]._flashcore_number
    forward = make_forward(engine, ForwardMode.DECODE, cases.decode())
    engine.backend.init_forward_metadata(forward.batch)
    x = torch.randn(forward.tokens, 64)
    with forward_context(ForwardContext(attn_backend=engine.backend)):
        exact = torch.no_grad()(model.forward)(x, forward.batch)
        found = torch.compile(torch.no_grad()(model.forward), backend="aot_eager")(x, forward.batch)
    torch.testing.assert_close(found, exact)


def pad_batch(engine: Engine, forward: Forward, padded: int, keep_original: bool) -> None:
    """As `ForwardBatch.prepare_mlp_sync_batch` pads an eager batch for the other ranks."""
    fb, real = forward.batch, forward.batch.batch_size
    if keep_original:
        fb._original_batch_size = real
    width = forward.tokens // real
    fb.batch_size = padded
    if fb.spec_info is not None:
        fb.spec_info.is_draft_input = lambda: False
    runner = SimpleNamespace(attn_backend=engine.backend)
    fb._pad_inputs_to_size(runner, padded * width, padded)
    assert len(fb.seq_lens) == len(fb.req_pool_indices) == padded
    for kind in ("q", "k", "v"):
        for number, x in enumerate(getattr(forward, kind)):
            rows = x.new_zeros((padded - real) * width, *x.shape[1:])
            getattr(forward, kind)[number] = torch.cat([x, rows])


def check(engine: Engine, forward: Forward, outs: list[torch.Tensor]) -> None:
    short = Forward(
        forward.batch, forward.slots, forward.new, forward.q, forward.k, forward.v, forward.tree
    )
    for out, exact in zip(outs, expected(engine, short), strict=True):
        assert_close(out[: forward.tokens], exact, engine.setup.dtype)


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("layout", ["chain", "tree", "tree_of_drafts"])
def test_verify_padded_for_other_ranks(layout: str, told: bool) -> None:
    """3 requests padded to 5 without a graph: the mask has 3 (sglang#24233, #26016)."""
    engine = make_engine(Setup(16, draft_tokens=5))
    requests = cases.verify(5)[:3]
    forward = make_forward(engine, ForwardMode.TARGET_VERIFY, requests, tree=layout != "chain")
    if layout == "tree_of_drafts":
        assert forward.tree is not None
        forward.batch.spec_info.custom_mask = torch.cat([m.flatten() for m in forward.tree])
    pad_batch(engine, forward, 5, told)
    engine.backend.init_forward_metadata(forward.batch)
    outs = attend(engine, forward)
    check(engine, forward, outs)
    if told or layout != "chain":
        assert not outs[0][forward.tokens :].any()


@pytest.mark.parametrize("padded", [9, 12, 40])
def test_decode_padded_for_other_ranks(padded: int) -> None:
    """To more than the pool of requests holds, too: the others' tokens decide."""
    engine = make_engine(Setup(16))
    forward = make_forward(engine, ForwardMode.DECODE, cases.decode())
    pad_batch(engine, forward, padded, True)
    engine.backend.init_forward_metadata(forward.batch)
    assert len(engine.backend.full.tables.q_lens) == len(cases.decode())
    outs = attend(engine, forward)
    check(engine, forward, outs)
    assert not outs[0][forward.tokens :].any()


def test_mask_sizes_tell_the_sequences() -> None:
    lengths = [30, 7, 12, 1, 1]
    for real in range(6):
        full = 4 * (sum(lengths[:real]) + 4 * real)
        assert sequences_of_mask(full, lengths, 4) == real
        assert sequences_of_mask(16 * real, lengths, 4) == real
    # A buffer for more keys than there are is for all.
    assert sequences_of_mask(100_000, lengths, 4) == 5


def empty(forward: Forward) -> None:
    fb = forward.batch
    fb.batch_size = 0
    for name in ("seq_lens", "seq_lens_cpu", "req_pool_indices", "out_cache_loc", "positions"):
        setattr(fb, name, getattr(fb, name)[:0])
    if fb.extend_seq_lens is not None:
        fb.extend_seq_lens, fb.extend_seq_lens_cpu = fb.extend_seq_lens[:0], []
    if fb.spec_info is not None:
        fb.spec_info.custom_mask = fb.spec_info.custom_mask[:0]
    forward.q, forward.k, forward.v = (
        [x[:0] for x in p] for p in (forward.q, forward.k, forward.v)
    )


@pytest.mark.parametrize("windows", [{}, {"window": 100, "two_pools": True}])
@pytest.mark.parametrize("mode", ["EXTEND", "DECODE", "TARGET_VERIFY", "DRAFT_EXTEND_V2"])
def test_empty_batches(mode: str, windows: dict[str, Any]) -> None:
    """No request, in a mode that is not idle (sglang#34474, #39899)."""
    drafts = 5 if mode in ("TARGET_VERIFY", "DRAFT_EXTEND_V2") else 0
    engine = make_engine(Setup(16, draft_tokens=drafts, **windows))
    forward = make_forward(engine, getattr(ForwardMode, mode), [Request(5, drafts or 1)], tree=True)
    empty(forward)
    engine.backend.init_forward_metadata(forward.batch)
    for out in attend(engine, forward):
        assert out.shape == (0, 64)


def test_extend_of_no_token() -> None:
    """A request whose tokens are all cached: nothing to compute; beside others too."""
    engine = make_engine(Setup(16))
    for requests in ([Request(40, 0)], [Request(40, 0), Request(30, 5), Request(16, 0)]):
        forward = make_forward(engine, ForwardMode.EXTEND, requests)
        engine.backend.init_forward_metadata(forward.batch)
        outs = attend(engine, forward)
        assert outs[0].shape == (forward.tokens, 64)
        check(engine, forward, outs)


@pytest.mark.parametrize("mode", ["IDLE", "EXTEND"])
def test_idle_ranks_give_zeros(mode: str) -> None:
    """A rank without requests beside others that have: padded rows, or a made-up request."""
    engine = make_engine(Setup(16))
    forward = make_forward(engine, ForwardMode.EXTEND, [Request(0, 6)])
    forward.batch.forward_mode = getattr(ForwardMode, mode)
    forward.batch._original_batch_size = 0
    forward.batch.req_pool_indices = torch.zeros(1, dtype=torch.int64)
    forward.batch.out_cache_loc = torch.zeros(6, dtype=torch.int64)
    engine.backend.init_forward_metadata(forward.batch)
    pools = engine.runner.token_to_kv_pool.get_kv_buffer(0)
    before = [x.clone() for x in pools]
    out = attend(engine, forward)[0]
    assert out.shape == (6, 64)
    assert not out.any()
    for pool, was in zip(pools, before, strict=True):
        assert torch.equal(pool.isnan(), was.isnan())  # nothing written


@pytest.mark.parametrize("owner", ["worker", "backend"])
def test_draft_mask_filled_after_the_batch_was_taken(owner: str) -> None:
    """The overlap plan stream of SGLang 0.5.16 (sglang#28034): it takes the batch into the graph's
    buffers while the drafts are made, and tells when the mask is final."""
    engine = make_engine(Setup(16, draft_tokens=5))
    backend = engine.backend
    requests = cases.verify(5)
    padded = len(requests) + PADDING
    backend.init_cuda_graph_state(max(padded, 12), max(padded, 12) * 5)
    forward = make_forward(engine, ForwardMode.TARGET_VERIFY, requests, tree=True)
    spec = forward.batch.spec_info
    final = spec.custom_mask
    buffer = backend._masks.draft_mask if owner == "backend" else torch.zeros_like(final)
    if owner == "backend" and backend.verify_mask is not None:  # 0.5.23: over the drafts alone
        assert forward.tree is not None
        final = torch.cat([mask.flatten() for mask in forward.tree])
    spec.custom_mask = buffer
    buffer.zero_()
    replay = graph_view(engine, forward, padded, graph_buffers(engine, padded))
    backend.init_forward_metadata_out_graph(replay)
    stale = backend._tree.clone()
    buffer[: final.numel()].copy_(final)
    backend.update_verify_buffers_to_fill_after_draft(spec, padded)
    backend.init_forward_metadata_in_graph(replay)
    assert not torch.equal(stale, backend._tree)
    check(engine, forward, attend(engine, forward, replay))


def test_final_mask_of_an_eager_batch_is_read_when_it_is_taken() -> None:
    """SGLang plans it after the drafts; a graph's batch before it must not be written again."""
    engine = make_engine(Setup(16, draft_tokens=5))
    forward = make_forward(engine, ForwardMode.TARGET_VERIFY, cases.verify(5), tree=True)
    engine.backend.init_forward_metadata(forward.batch)
    tree = engine.backend._tree.clone()
    other = SimpleNamespace(custom_mask=torch.zeros_like(forward.batch.spec_info.custom_mask))
    engine.backend.update_verify_buffers_to_fill_after_draft(other, None)
    assert torch.equal(tree, engine.backend._tree)


def test_draft_mask_holds_every_batch_that_may_be_written_to_it() -> None:
    """0.5.16 writes masks of any batch that runs, graph or not; 0.5.23 asks what fits."""
    engine = make_engine(Setup(16, draft_tokens=5))
    backend = engine.backend
    backend.init_cuda_graph_state(4, 20)  # of the 12 requests that can run
    if backend.verify_mask is not None:
        assert backend.verify_mask.fits(4)
        assert not backend.verify_mask.fits(5)
        return
    assert backend.get_verify_buffers_to_fill_after_draft() == [None, None]
    backend.init_cuda_graph_state(12, 60)
    mask, _ = backend.get_verify_buffers_to_fill_after_draft()
    assert mask.numel() == 12 * 5 * (512 + 5)


READERS = {
    "extend": ("EXTEND", cases.extend),
    "mixed": ("MIXED", cases.mixed),
    "decode": ("DECODE", cases.decode),
    "verify": ("TARGET_VERIFY", lambda: cases.verify(5)),
}


@pytest.mark.parametrize("windows", [{}, {"window": 40}, {"window": 100, "two_pools": True}])
@pytest.mark.parametrize("mode", READERS)
def test_shared_reads_end_before_the_layers(mode: str, windows: dict[str, Any]) -> None:
    """After the metadata, request rows and the map between pools may be given to others: what
    SGLang 0.5.23 is told (`shared_read_ends`) is what the backend does, in every eager forward."""
    name, requests = READERS[mode]
    drafts = 5 if mode == "verify" else 0
    engine = make_engine(Setup(16, draft_tokens=drafts, **windows))
    forward = make_forward(engine, getattr(ForwardMode, name), requests(), tree=True)
    engine.backend.init_forward_metadata(forward.batch)
    pool = engine.runner.token_to_kv_pool
    engine.runner.req_to_token_pool.req_to_token.fill_(0)
    mapping = getattr(pool, "full_to_swa_index_mapping", None)
    if mapping is not None:
        kept = mapping.clone()
        mapping.fill_(0)
    outs = attend(engine, forward)
    if mapping is not None:
        mapping.copy_(kept)
    check(engine, forward, outs)
    if hasattr(engine.backend, "resolve_prefill_shared_read_ends"):
        from sglang.srt.layers.attention.base_attn_backend import SharedReadEnds

        assert engine.backend.shared_read_ends(forward.batch.forward_mode) is (
            SharedReadEnds.PRE_REPLAY
        )


@pytest.mark.parametrize("windows", [{}, {"window": 100, "two_pools": True}])
@pytest.mark.parametrize("mode", ["decode", "verify"])
def test_two_batch_overlap_replays_halves(mode: str, windows: dict[str, Any]) -> None:
    """SGLang's wrapper splits a replayed batch between two backends of its own, without a word of
    which rows pad it; each half then runs its own layers."""
    from sglang.srt.layers.attention.tbo_backend import TboAttnBackend

    drafts = 5 if mode == "verify" else 0
    engine = make_engine(Setup(16, draft_tokens=drafts, **windows))
    overlap = TboAttnBackend.init_new(lambda: ATTENTION_BACKENDS[NAME](engine.runner))
    requests = cases.verify(5) if mode == "verify" else cases.decode()[:5]
    name = "TARGET_VERIFY" if mode == "verify" else "DECODE"
    width, padded = max(1, drafts), 6
    buffers = graph_buffers(engine, padded)
    overlap.init_cuda_graph_state(padded, padded * width)
    for _ in range(2):
        forward = make_forward(engine, getattr(ForwardMode, name), requests)
        replay = graph_view(engine, forward, padded, buffers)
        replay.seq_lens_cpu, replay.max_seq_len_override = replay.seq_lens.clone(), None
        replay.out_cache_loc = buffers.out_cache_loc
        if mode == "verify":
            replay.spec_info = verify_input(forward)
        overlap.init_forward_metadata_out_graph(replay)
        halves = []
        for child, begin, end in zip(overlap.children, (0, 3), (3, 6), strict=True):
            child.init_forward_metadata_in_graph(replay)
            rows = slice(begin * width, end * width)
            parts = [
                [long(x, padded * width)[rows] for x in p]
                for p in (forward.q, forward.k, forward.v)
            ]
            half = Forward(forward.batch, [], [], *parts)
            engine.backend = child
            fb = SimpleNamespace(
                forward_mode=replay.forward_mode, out_cache_loc=replay.out_cache_loc[rows]
            )
            halves.append(attend(engine, half, fb))
        check(engine, forward, [torch.cat(pair) for pair in zip(*halves, strict=True)])


def long(x: torch.Tensor, rows: int) -> torch.Tensor:
    return torch.cat([x, x.new_zeros(rows - len(x), *x.shape[1:])])


def verify_input(forward: Forward) -> Any:
    """SGLang's own, which it splits; a chain."""
    from sglang.srt.speculative.eagle_info import EagleVerifyInput

    fb = forward.batch
    return EagleVerifyInput(
        draft_token=torch.zeros(forward.tokens, dtype=torch.int64),
        custom_mask=fb.spec_info.custom_mask,
        positions=fb.positions,
        retrieve_index=None,
        retrieve_next_token=None,
        retrieve_next_sibling=None,
        retrieve_cum_len=None,
        spec_steps=4,
        topk=1,
        draft_token_num=5,
        capture_hidden_mode=None,
        seq_lens_sum=int(fb.seq_lens_cpu.sum()),
        seq_lens_cpu=fb.seq_lens_cpu,
    )


@pytest.mark.parametrize("mode", ["extend", "decode"])
def test_pipeline_rank_with_windowed_layers_alone(mode: str) -> None:
    """Layers that begin elsewhere, all of one kind, as a rank of a pipeline may hold them."""

    def later(runner: Any, layers: list[Any]) -> None:
        runner.model = torch.nn.ModuleList(layers[1:])

    engine = make_engine(Setup(16, window=40), prepare=later)
    assert engine.backend.full is None
    name, requests = READERS[mode]
    forward = make_forward(engine, getattr(ForwardMode, name), requests())
    engine.backend.init_forward_metadata(forward.batch)
    engine.layers = engine.layers[1:]
    for kind in ("q", "k", "v"):
        setattr(forward, kind, getattr(forward, kind)[1:])
    check(engine, forward, attend(engine, forward))
    line = engine.backend.describe()
    assert "window 40" in line
    assert "full attention" not in line


@pytest.mark.parametrize("windows", [{}, {"window": 100, "two_pools": True}])
@pytest.mark.parametrize("mode", ["decode", "verify"])
def test_after_memory_was_given_back(mode: str, windows: dict[str, Any]) -> None:
    """Release and resume (--enable-memory-saver): pools and request rows hold anything, the
    reserved row too, and what was not given back is used again as it is."""
    name, requests = READERS[mode]
    drafts = 5 if mode == "verify" else 0
    engine = make_engine(Setup(16, draft_tokens=drafts, **windows))
    backend, width = engine.backend, max(1, drafts)
    padded = len(requests()) + PADDING
    backend.init_cuda_graph_state(padded, padded * width)
    buffers = graph_buffers(engine, padded)
    for cycle in range(3):
        table = engine.runner.req_to_token_pool.req_to_token
        table.fill_(2**31 - 1 - 16 - cycle)
        for layer in engine.layers:
            for pool in engine.runner.token_to_kv_pool.get_kv_buffer(layer.layer_id):
                pool.fill_(float("nan"))
        forward = make_forward(engine, getattr(ForwardMode, name), requests(), tree=True)
        replay = graph_view(engine, forward, padded, buffers)
        backend.init_forward_metadata_out_graph(replay)
        backend.init_forward_metadata_in_graph(replay)
        rows = padded * width
        inputs = (forward.q, forward.k, forward.v)
        replay.out_cache_loc = buffers.out_cache_loc
        wide = Forward(forward.batch, [], [], *([long(x, rows) for x in part] for part in inputs))
        check(engine, forward, attend(engine, wide, replay))
