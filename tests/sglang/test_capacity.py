"""What a server can ask is there when it starts, or refused then; nothing is allocated later, and
no fault is lost."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from flashcore.contract.counts import Fault, Seen
from flashcore.contract.scratch import Slots as PageSlots
from flashcore.integrations.sglang import limits as limits_module
from flashcore.integrations.sglang.limits import limits_of
from flashcore.integrations.sglang.register import register
from flashcore.integrations.sglang.support import OPTIONS
from flashcore.serving import capacity
from flashcore.serving.capacity import Kind
from flashcore.serving.counters import FaultLog
from flashcore.serving.planners import Memory
from flashcore.serving.shapes import Limits, Model, NotServed, Shape
from flashcore.serving.views import Need, View
from flashcore.sm90.planner_scratch import PlannerScratch
from tests import fake_kernels
from tests import serving_cases as cases
from tests.sglang.batches import (
    Engine,
    Request,
    Setup,
    attend,
    expected,
    graph_buffers,
    graph_view,
    make_engine,
    make_forward,
)
from tests.sglang.test_modes import CACHES, MODES, WINDOWS, check, forward_of, setup_of

register()

LLAMA = Shape(32, 8, 128)
H100 = 80 * 2**30
GARBAGE = 2**31 - 1


def model_of(page_tokens: int = 64, **options: Any) -> Model:
    base = Model(
        full=LLAMA, windowed=None, window=-1, page_tokens=page_tokens, draft_tokens=0,
        dtype=torch.bfloat16, device=torch.device("cpu"),
    )  # fmt: skip
    return replace(base, **options)


def llama(page_tokens: int, batch: int, tokens: int, chunk: int = 8192) -> tuple[Any, ...]:
    """A model, a server's limits on it, and its one kind of layer in a cache of 60 GB."""
    limits = Limits(batch, tokens, chunk + batch, min(batch, 512))
    return model_of(page_tokens), limits, [Kind(LLAMA, -1, 440_000)]


def bytes_of(model: Model, limits: Limits, kinds: list[Kind]) -> int:
    return capacity.bytes_of(limits, model.page_tokens, model.draft_tokens, kinds, 32 << 20)


# ---------------------------------------------------------------- memory


def test_defaults_take_little() -> None:
    """131072 tokens, 4096 requests, pages of 64: 8.4 million pages."""
    model, limits, kinds = llama(64, 4096, 131_072 + 4)
    assert capacity.room_of(limits, 64, -1).entries == 4096 * 2049
    assert bytes_of(model, limits, kinds) < 600 * 2**20


@pytest.mark.parametrize(
    ("page_tokens", "batch", "tokens"),
    [(1, 128, 16384 + 512 + 4), (1, 1024, 32_768 + 4), (16, 512, 131_072), (128, 40_000, 32_768)],
)
def test_what_an_h100_holds(page_tokens: int, batch: int, tokens: int) -> None:
    model, limits, kinds = llama(page_tokens, batch, tokens)
    assert bytes_of(model, limits, kinds) < H100 / capacity.BUDGET


def test_windowed_room_is_by_tokens() -> None:
    """1000 prompts of 8 tokens in pages of 1, behind a window of 127: 4 GiB where each sequence has
    room for every new token."""
    limits = Limits(1000, 131_072, 8192 + 1000, 512)
    kinds = [Kind(Shape(64, 8, 64), 127, 440_000)]
    room = capacity.room_of(limits, 1, 127)
    assert room.holds(1000, capacity.windowed_entries(1, 127, 1000, 8000), 8000)
    assert room.entries < 150_000
    assert bytes_of(model_of(1), limits, kinds) - 4 * (32 << 20) < 120 * 2**20


@pytest.mark.parametrize("page_tokens", [1, 16, 64])
@pytest.mark.parametrize("window", [0, 1, 15, 127, 4096])
def test_no_sequence_has_more_windowed_pages(page_tokens: int, window: int) -> None:
    """Against what the tables leave out: pages before all keys of the first new token."""
    for new in (1, 5, 8, 130):
        for length in range(new, new + 3 * page_tokens + window + 2):
            first = max(length - new - window, 0) // page_tokens
            pages = -(-(length - first * page_tokens) // page_tokens)
            assert pages <= capacity.windowed_entries(page_tokens, window, 1, new)
            limits = Limits(1, 10**6, new, 1)
            assert pages <= capacity.width(limits, page_tokens, window, new)


def test_told_bytes_are_those_of_the_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_kernels.install(monkeypatch)
    setup = Setup(16, heads=(8, 2), head_dim=64, dtype=torch.bfloat16, window=100, two_pools=True)
    backend = make_engine(setup).backend
    backend.init_cuda_graph_state(12, 12)
    tensors: dict[int, torch.Tensor] = {}

    def collect(thing: Any) -> None:
        for name, value in vars(thing).items():
            if isinstance(value, torch.Tensor) and not name.startswith("partial_"):
                tensors[value.data_ptr()] = value

    for view in backend._views:
        planner = view.decode._planner
        base = view._prefill[64, True]._planner
        scratch = SimpleNamespace(**planner.scratch.memory._asdict())
        for thing in (scratch, base.plan, view._eager, view._static):
            collect(thing)
    collect(SimpleNamespace(workspace=backend._workspace))
    taken = sum(t.numel() * t.element_size() for t in tensors.values())
    assert abs(taken - backend._plan_bytes) < 4096, taken  # lengths and counters


SMALL_GPU = 24 * 2**20 + 4 * (32 << 20)


@pytest.mark.parametrize("page_tokens", [1, 64])
def test_too_much_is_refused_at_start_with_a_way_out(
    page_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(capacity, "budget", lambda device: SMALL_GPU)
    model, limits, kinds = llama(page_tokens, 4096, 131_072)
    with pytest.raises(NotServed) as raised:
        capacity.check(model, limits, kinds, 32 << 20, OPTIONS)
    text = str(raised.value)
    assert "\n" not in text
    assert f"pages of {page_tokens}" in text
    told = bytes_of(model, limits, kinds)
    assert f"would take {told / 2**20:.0f} MiB (at most 152)" in text
    requests = int(re.search(r"--max-running-requests (\d+)", text).group(1))  # type: ignore[union-attr]
    fewer = replace(limits, batch=requests, graph_batch=min(requests, 512))
    assert capacity.check(model, fewer, kinds, 32 << 20, OPTIONS) <= SMALL_GPU
    found = re.search(r"--context-length (\d+)", text)
    if found:
        shorter = replace(limits, tokens=int(found.group(1)))
        assert capacity.check(model, shorter, kinds, 32 << 20, OPTIONS) <= SMALL_GPU
    monkeypatch.undo()
    if page_tokens == 1:  # more entries than kernels count: no budget helps
        assert capacity.ENVIRONMENT not in text
        return
    need = int(re.search(rf"{capacity.ENVIRONMENT}=(\d+)", text).group(1))  # type: ignore[union-attr]
    monkeypatch.setenv(capacity.ENVIRONMENT, str(need))
    assert capacity.check(model, limits, kinds, 32 << 20, OPTIONS) == told
    monkeypatch.setenv(capacity.ENVIRONMENT, str(need - 1))
    with pytest.raises(NotServed):
        capacity.check(model, limits, kinds, 32 << 20, OPTIONS)
    monkeypatch.setenv(capacity.ENVIRONMENT, "4G")
    with pytest.raises(ValueError, match=f"{capacity.ENVIRONMENT} must be a number of MiB, got"):
        capacity.check(model, limits, kinds, 32 << 20, OPTIONS)


def test_larger_pages_are_offered_where_they_help(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capacity, "budget", lambda device: H100 / capacity.BUDGET)
    model, limits, kinds = llama(1, 4096, 131_072)
    with pytest.raises(NotServed, match=r"use --page-size 8 or --max-running-requests \d+ or") as e:
        capacity.check(model, limits, kinds, 32 << 20, OPTIONS)
    model = replace(model, page_tokens=8)
    assert capacity.check(model, limits, kinds, 32 << 20, OPTIONS) < H100 / capacity.BUDGET
    assert "--context-length" in str(e.value)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (Limits(70_000, 64, 8192, 512), "70000 sequences at once .*--max-running-requests 57344"),
        (Limits(4096, 64, 2**21, 512), "new tokens at once .*use --chunked-prefill-size"),
        (Limits(57_344, 131_072, 8192, 512), "would take .* MiB; use --page-size 32 or --max-run"),
    ],
)
def test_what_kernels_cannot_count_is_refused(limits: Limits, message: str) -> None:
    with pytest.raises(NotServed, match=message):
        capacity.check(model_of(1), limits, [Kind(LLAMA, -1, 1000)], 32 << 20, OPTIONS)


# ---------------------------------------------------------------- what can be asked


def runner_of(**changes: Any) -> Any:
    """A runner with a pool of 100 requests of 1000 tokens, and settings of its server."""
    ranks = SimpleNamespace(attn_tp_size=changes.pop("attn_tp_size", 1))
    draft = changes.pop("is_draft_worker", False)
    algorithm = SimpleNamespace(is_frozen_kv_mtp=lambda: changes.pop("frozen", False))
    return SimpleNamespace(
        req_to_token_pool=SimpleNamespace(size=100, req_to_token=torch.empty(101, 1000)),
        ps=ranks,
        is_draft_worker=draft,
        spec_algorithm=algorithm,
        server_args=SimpleNamespace(**changes),
    )


def config(decode: list[int] | None = None, prefill: list[int] | None = None) -> Any:
    return SimpleNamespace(decode=SimpleNamespace(bs=decode), prefill=SimpleNamespace(bs=prefill))


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"chunked_prefill_size": 512}, (100, 512)),
        ({"chunked_prefill_size": 512, "attn_tp_size": 8}, (112, 512)),
        # Prompts that are not cut: the first one whatever its length, or several shorter ones.
        ({"chunked_prefill_size": -1, "max_prefill_tokens": 400}, (100, 1000)),
        ({"chunked_prefill_size": -1, "max_prefill_tokens": 4000}, (100, 4000)),
        ({"chunked_prefill_size": None, "max_prefill_tokens": None}, (100, 1000)),
        ({"chunked_prefill_size": 512, "cuda_graph_config": config(None, [128, 640])}, (100, 640)),
        (
            {
                "chunked_prefill_size": 512,
                "max_prefill_tokens": 600,
                "enable_dynamic_chunking": True,
            },
            (100, 640),
        ),
        (
            {
                "chunked_prefill_size": 512,
                "is_draft_worker": True,
                "frozen": True,
                "speculative_eagle_topk": 4,
            },
            (400, 512),
        ),
    ],
)
def test_limits_are_the_schedulers(
    changes: dict[str, Any], found: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        limits_module, "_setting", lambda runner, name, *_: getattr(runner.server_args, name, None)
    )
    for draft_tokens in (0, 5):
        model = model_of(draft_tokens=draft_tokens)
        limits = limits_of(runner_of(**changes), model)
        assert limits.batch == found[0]
        assert limits.queries == found[1] + limits.batch * max(1, draft_tokens)
        assert limits.tokens == 1000


def test_graphs_are_counted_as_they_are_captured() -> None:
    assert limits_of(runner_of(cuda_graph_config=config([1, 2, 64])), model_of()).graph_batch == 64
    assert limits_of(runner_of(cuda_graph_config=config([1, 512])), model_of()).graph_batch == 100
    assert limits_of(runner_of(), model_of()).graph_batch == 100


def test_settings_are_read_where_this_sglang_has_them() -> None:
    engine = make_engine(Setup(16))  # SGLang's mock cuts no prompts
    assert limits_module._setting(engine.runner, "chunked_prefill_size") == -1
    assert engine.backend.full.limits.queries >= engine.setup.max_context


@pytest.mark.parametrize("on_kernels", [False, True])
@pytest.mark.parametrize("mode", ["decode", "verify_chain"])
def test_batches_padded_beyond_the_pool(
    mode: str, on_kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """10 requests on ranks of which four share attention: graphs of 12, and with two-batch overlap
    of 16."""
    options: dict[str, Any] = {}
    if on_kernels:
        fake_kernels.install(monkeypatch)
        options = {"heads": (8, 2), "head_dim": 64, "dtype": torch.bfloat16}

    def ranks(runner: Any, layers: Any) -> None:
        from flashcore.integrations.sglang import limits as module

        monkeypatch.setattr(
            module, "parallel_ranks", lambda runner: SimpleNamespace(attn_tp_size=4)
        )

    engine = make_engine(setup_of(mode, 16, **options), max_batch=10, prepare=ranks)
    width = max(1, engine.setup.draft_tokens)
    engine.backend.init_cuda_graph_state(16, 16 * width)
    buffers = graph_buffers(engine, 16)
    for padded in (12, 16):
        view = graph_view(engine, forward_of(engine, mode), padded, buffers)
        engine.backend.init_forward_metadata_out_graph(view, in_capture=True)
        engine.backend.init_forward_metadata_in_graph(view)
    with pytest.raises(NotServed, match=r"CUDA graphs of 18 sequences .*--cuda-graph-max-bs 16"):
        engine.backend.full._rows(Need(18, 18, None))


def view_of(
    page_tokens: int, limits: Limits, window: int = -1, slots: int = 440_001, **options: Any
) -> View:
    """A view of layers of 32/8 heads of 128, on the path of kernels."""
    model = model_of(page_tokens, **options)
    kind = Kind(LLAMA, window, slots)
    scratch = PlannerScratch(*capacity.scratch_sizes(limits, page_tokens, [kind]), device="cpu")
    memory = Memory(torch.empty(8 << 20), scratch)
    return View(
        model, LLAMA, window=window, num_pages=slots // page_tokens, limits=limits, memory=memory
    )


def test_much_sharing_with_pages_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """128 sequences of 16384 shared and 512 own tokens: 2.16 million entries, 5 times the pool."""
    fake_kernels.install(monkeypatch)
    view = view_of(1, Limits(128, 16_384 + 512 + 8, 8192 + 128, 128))
    view.allocate_graph_tables(128)
    assert view._rows(Need(128, 128, None)).pages.shape == (128, 16_384 + 512 + 8)
    tokens = 128 * (16_384 + 512)
    for told in (tokens, None):
        assert view._choose(Need(128, 128, told), True) is view.decode
    assert view.decode._planner.capacities.max_entries >= tokens


def test_prefill_of_many_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_kernels.install(monkeypatch)
    view = view_of(64, Limits(40_000, 200, 40_000 + 8192, 512))
    for batch in (16_385, 40_000):
        found = view._choose(Need(batch, batch, None), False)
        assert found in view._prefill.values()


# ---------------------------------------------------------------- nothing while serving


def forwards(engine: Engine) -> list[Callable[[], Any]]:
    modes = [m for m in MODES if ("verify" in m or "draft" in m) == bool(engine.setup.draft_tokens)]
    return [lambda mode=mode: forward_of(engine, mode) for mode in modes]  # type: ignore[misc]


@pytest.mark.parametrize(("windows", "page_tokens"), CACHES)
@pytest.mark.parametrize("draft_tokens", [0, 5])
def test_buffers_hold_garbage_and_stay_where_they_are(
    windows: str, page_tokens: int, draft_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tables are never cleared: what is past a sequence's pages is not read, and stays."""
    engine = make_engine(Setup(page_tokens, draft_tokens=draft_tokens, **WINDOWS[windows]))
    for name in ("_make", "_tables", "_grow"):
        monkeypatch.setattr(View, name, None)  # nothing is made any more
    at = [view._eager.pages.data_ptr() for view in engine.backend._views]
    for make in forwards(engine):
        for view in engine.backend._views:
            view._eager.pages.fill_(GARBAGE)
            view._eager.lengths.fill_(GARBAGE)
        forward = make()
        engine.backend.init_forward_metadata(forward.batch)
        check(engine, forward, attend(engine, forward))
        for view in engine.backend._views:
            pages, lens = view.tables.pages, view.tables.seq_lens
            used = -(-lens // page_tokens)
            past = torch.arange(pages.shape[1]) >= used[:, None]
            assert (pages[past] == GARBAGE).all()
            assert (pages[~past] != GARBAGE).all()
    assert at == [view._eager.pages.data_ptr() for view in engine.backend._views]


def test_graph_tables_hold_garbage() -> None:
    engine = make_engine(Setup(16, window=40))
    engine.backend.init_cuda_graph_state(12, 12)
    buffers = graph_buffers(engine, 12)
    for view in engine.backend._views:
        view._static.pages.fill_(GARBAGE)
    forward = forward_of(engine, "decode")
    replay = graph_view(engine, forward, 12, buffers)
    engine.backend.init_forward_metadata_out_graph(replay)
    engine.backend.init_forward_metadata_in_graph(replay)
    for view, out in zip(engine.backend._views, expected(engine, forward), strict=True):
        assert view.plan.total_q == forward.tokens
        assert len(out) == forward.tokens


@pytest.mark.parametrize("mode", ["decode", "extend"])
def test_more_than_was_planned_for_is_served_and_told(
    mode: str, caplog: pytest.LogCaptureFixture
) -> None:
    engine = make_engine(Setup(16, window=40))
    small = Limits(2, 64, 8, 2)
    for view in engine.backend._views:
        view.limits = replace(view.limits, batch=2, queries=8)
        view.room = capacity.room_of(small, 16, view.window)
        view.__dict__["_eager"] = view._tables(view.limits)
        made = view._make(view.room, view._memory)
        view.decode = view._eager_decode = view._decode_planner(made)
        view._prefill = view._prefill_planners(made)
    graphs = engine.backend.full.decode
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            forward = forward_of(engine, mode)
            engine.backend.init_forward_metadata(forward.batch)
            check(engine, forward, attend(engine, forward))
    told = [r.getMessage() for r in caplog.records if "more than was planned" in r.getMessage()]
    assert len(told) == 2  # once a view
    assert f"{forward.batch.batch_size} sequences with {forward.tokens} new tokens" in told[0]
    assert engine.backend.full.decode is graphs


# ---------------------------------------------------------------- faults


def had(planner: Any, fault: Fault, sequence: int) -> None:
    """What a planner's kernels do."""
    seen = planner._planner._seen
    seen[Seen.SEQUENCE] = sequence
    seen[Seen.UPDATES] += 1
    seen[Seen.FAULTS] |= int(fault)


def test_the_first_fault_is_told_at_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Of whichever view and mode, in any of the steps between two looks; and none twice."""
    fake_kernels.install(monkeypatch)
    setup = Setup(16, heads=(8, 2), head_dim=64, dtype=torch.bfloat16, window=40)
    engine = make_engine(setup)
    backend = engine.backend
    backend._faults = FaultLog(backend._views, interval=4)

    def step(requests: list[Request], mode: ForwardMode = ForwardMode.DECODE) -> list[str]:
        caplog.clear()
        forward = make_forward(engine, mode, requests)
        backend.init_forward_metadata(forward.batch)
        return [r.getMessage() for r in caplog.records if r.levelno == logging.ERROR]

    with caplog.at_level(logging.ERROR):
        assert step(cases.decode()) == []  # step 1
        had(backend.windowed.planner, Fault.PAGE, 3)
        (line,) = step(cases.decode())
        assert "flashcore decode, window 40" in line
        assert "page; in 1 forwards, last sequence 3" in line
        # The same again, in several steps: told at the interval, with how often.
        had(backend.windowed.planner, Fault.PAGE, 1)
        assert step(cases.decode()) == []
        had(backend.windowed.planner, Fault.PAGE, 2)
        (line,) = step(cases.decode())
        assert "in 2 forwards, last sequence 2" in line
        # Another kind, and another mode: at once again.
        step(cases.extend(), ForwardMode.EXTEND)
        had(backend.full.planner, Fault.LENGTH, 0)
        (line,) = step(cases.decode())
        assert "prefill, full attention" in line
        assert "length; in 1 forwards" in line
        for _ in range(8):
            assert step(cases.decode()) == []


def test_other_ranks_tell_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fake_kernels.install(monkeypatch)
    setup = Setup(16, heads=(8, 2), head_dim=64, dtype=torch.bfloat16)
    backend = make_engine(setup).backend
    log = FaultLog(backend._views, interval=1, quiet=True)
    had(backend.full.decode, Fault.PAGE, 0)
    log.look()
    assert not caplog.records


# ---------------------------------------------------------------- memory given back


def test_views_share_what_must_be_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    """One scratch for all planners, and no other state of theirs outlives a plan."""
    fake_kernels.install(monkeypatch)
    setup = Setup(16, heads=(8, 2), head_dim=64, dtype=torch.bfloat16, window=40)
    backend = make_engine(setup).backend
    planners = [p for view in backend._views for p in (view.decode, *view._prefill.values())]
    scratch = {id(planner._planner.scratch) for planner in planners}
    assert len(scratch) == 1
    slots = planners[0]._planner.scratch.memory.slots
    slots.fill_(7)
    planners[-1]._planner.reset()
    assert slots[0].tolist() == [2**31 - 1, 0, 0, 0]
    assert len(slots[0]) == PageSlots.LINES
