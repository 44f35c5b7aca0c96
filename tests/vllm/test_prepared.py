"""On the kernels' path: what is taken, compiled and launched before the first forward, and that no
forward asks for more."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from flashcore.integrations.vllm import memory, versions
from flashcore.planner.device_plan import Capacities
from flashcore.serving import capacity, planners
from flashcore.serving.shapes import NotServed
from flashcore.sm90.families import MERGE, PAGED, PLANNER
from tests import fake_kernels
from tests import serving_cases as cases
from tests.fake_kernels import FakeKernels
from tests.serving_cases import Request
from tests.vllm.batches import Engine, Setup, attend, make_engine, make_forward
from tests.vllm.conftest import Log

FORWARDS: dict[str, Callable[[], list[Request]]] = {
    "decode of one": lambda: [Request(70, 1)],
    "decode": cases.decode,
    "prefill of few": lambda: [Request(130, 1), Request(0, 2)],
    "prefill": cases.extend,
    "prefill of many tokens": lambda: [Request(0, 300)] * 2,
    "mixed": cases.mixed,
    "nothing": lambda: [],
}
SETUPS: dict[str, dict[str, Any]] = {
    "plain": {},
    "hybrid": {"windows": (None, 40, 40)},
    "window alone": {"windows": (128,)},
    "windows in a group of full attention": {"second": 40},
    "sinks": {"windows": (None, 128), "sinks": True},
    "softcap": {"softcap": 30.0},
    "drafts": {"drafts": 4},
}


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> FakeKernels:
    return fake_kernels.install(monkeypatch)


@pytest.fixture(params=[False, True], ids=["", "invariant"])
def invariant(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(versions, "batch_invariant", lambda: request.param)
    return bool(request.param)


def make(**options: Any) -> Engine:
    return make_engine(Setup(16, heads=(8, 2), head_dim=64, dtype=torch.bfloat16, **options))


def view_of(engine: Engine, group: int = 0) -> Any:
    return engine.groups[group].builder.group.view


@pytest.mark.parametrize("setup", SETUPS)
def test_no_forward_asks_for_a_kernel_that_is_not_there(
    setup: str, fakes: FakeKernels, invariant: bool
) -> None:
    engine = make(**SETUPS[setup])
    assert not fakes.loaded, "a builder's constructor runs in the pool that sleep mode discards"
    nothing = make_forward(engine, [], padded=4, padded_tokens=4)
    engine.groups[0].builder.build(0, nothing.common[0])
    assert {k.family for k in fakes.loaded} == {PAGED, MERGE, PLANNER}
    assert set(fakes.compiled) == set(fakes.loaded), "compiled and never launched, or the reverse"
    assert set(fakes.loaded) == set(fakes.calls), "loaded and never launched"
    known = set(fakes.loaded)
    fakes.calls.clear()
    for requests in FORWARDS.values():
        attend(engine, make_forward(engine, requests()))
    if "drafts" in SETUPS[setup]:
        attend(engine, make_forward(engine, cases.verify(5), padded=6, padded_tokens=30))
    assert set(fakes.loaded) == known
    assert {kernel.family for kernel in fakes.calls} == {PAGED, MERGE, PLANNER}


def test_constructors_allocate_nothing(fakes: FakeKernels, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[int, ...]] = []
    for name in ("zeros", "empty", "ones", "full", "arange", "tensor"):
        inner = getattr(torch, name)

        def note(*args: Any, inner: Any = inner, **options: Any) -> Any:
            made.append(args)
            return inner(*args, **options)

        monkeypatch.setattr(torch, name, note)
    from flashcore.integrations.vllm.groups import Group

    engine = make(windows=(None, 40))
    before = len(made)
    for group in engine.groups:
        spec, names = group.builder.kv_cache_spec, group.builder.layer_names
        Group(engine.config, spec, names, torch.device("cpu"))
    assert made[before:] == []


def test_a_forward_is_planned_once_and_again_in_its_graph(
    fakes: FakeKernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM runs a graph's forward once before it captures it, in V1 with the same metadata."""
    engine = make()
    forward = make_forward(engine, cases.decode())
    attend(engine, forward)
    group = engine.groups[0].builder.group
    plans: list[int] = []
    inner = view_of(engine).make_plan
    monkeypatch.setattr(view_of(engine), "make_plan", lambda: (plans.append(1), inner()))
    metadata = engine.groups[0].builder.build_for_cudagraph_capture(forward.common[0])
    pool = torch.zeros(1)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    for in_graph in (False, False, True, True):
        cuda = type("Pool", (), {"is_cuda": in_graph, "shape": pool.shape})()
        group.view_for(metadata, cuda)
    assert len(plans) == 2


def test_tables_lengths_and_starts_are_read_where_they_are(fakes: FakeKernels) -> None:
    """What a captured graph reads must have vLLM's addresses."""
    engine = make()
    forward = make_forward(engine, cases.decode())
    attend(engine, forward)
    common, tables = forward.common[0], view_of(engine).tables
    assert tables.pages.data_ptr() == common.block_table_tensor.data_ptr()
    assert tables.seq_lens.data_ptr() == common.seq_lens.data_ptr()
    first = tables.q_lens.data_ptr()
    attend(engine, make_forward(engine, cases.mixed()))
    assert view_of(engine).tables.q_lens.data_ptr() == first


@pytest.mark.parametrize("setup", ["plain", "hybrid"])
def test_the_bytes_that_are_told_are_the_bytes_that_are_taken(
    setup: str, fakes: FakeKernels, invariant: bool, log: Log
) -> None:
    engine = make(**SETUPS[setup])
    attend(engine, make_forward(engine, cases.decode()))
    held = engine.groups[0].builder.group.memory
    views = [group.builder.group.view for group in engine.groups]
    assert held.workspace is not None
    scratch = views[0]._memory.scratch
    assert all(view._memory.scratch is scratch for view in views)
    taken = held.workspace.nbytes + sum(part.nbytes for part in scratch.memory)
    for view in views:
        largest = max(view._prefill.values(), key=lambda planner: planner._planner.bytes)
        taken += largest._planner.bytes + view._eager.pages.nbytes
    assert held._bytes == taken
    assert f"buffers {taken / 2**20:.0f} MiB" in "".join(log.messages)
    assert ("batch-invariant" in "".join(log.messages)) == invariant


def test_graphs_and_eager_forwards_outgrow_nothing(fakes: FakeKernels) -> None:
    """The most that vLLM schedules: no buffer is allocated anew, which graphs would not notice."""
    engine = make(windows=(None, 40), max_batch=4, max_context=512, max_tokens=256)
    attend(engine, make_forward(engine, cases.decode()[:1]))
    kept = [(view_of(engine, n)._eager, view_of(engine, n).decode) for n in range(2)]
    for requests in ([Request(448, 64)] * 4, [Request(511, 1)] * 4, [Request(0, 253)] * 1):
        attend(engine, make_forward(engine, requests, padded_tokens=256))
    assert kept == [(view_of(engine, n)._eager, view_of(engine, n)._eager_decode) for n in range(2)]


def test_plans_that_take_too_much_are_refused(
    fakes: FakeKernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(capacity.ENVIRONMENT, "100")
    with pytest.raises(NotServed, match=r"would take \d+ MiB \(at most 100\).*FLASHCORE_PLAN_MIB="):
        make()


def test_groups_that_together_take_too_much_are_refused(
    fakes: FakeKernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(capacity.ENVIRONMENT, "131")
    engine = make(windows=(None, *range(33, 49)), max_batch=256, layers=1)
    with pytest.raises(NotServed, match="17 groups of layers whose plans would take"):
        attend(engine, make_forward(engine, cases.decode()))


@pytest.mark.parametrize(
    "requests",
    [
        [Request(2000, 64, shared=2000)] * 8,
        [Request(2000 + n, 64) for n in range(8)],
        [Request(1500, 65, shared=1500)] * 7 + [Request(2047, 1)],
        [Request(2047, 1, shared=2032)] * 8,
        [Request(1024 * (n % 2), 60, shared=1024) for n in range(8)],
        [Request(0, 512)],
    ],
    ids=str,
)
def test_batch_invariant_plans_fit(
    requests: list[Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut and shared."""
    monkeypatch.setattr(versions, "batch_invariant", lambda: True)
    setup = Setup(16, max_batch=8, max_context=2112, max_tokens=512, layers=1)
    engine = make_engine(setup)
    attend(engine, make_forward(engine, requests))
    view = view_of(engine)
    plan = view.plan
    assert plan.batch_invariant
    workspace = planners.WORKSPACE_BYTES // 4
    c: Capacities = capacity.capacities(view.room, view.shape, workspace)
    assert plan.num_partial_tokens <= c.max_partials
    assert plan.work.shape[0] <= c.max_items
    assert plan.groups.shape[0] <= c.max_segments
    assert plan.member_rows.numel() <= c.max_segments
    assert plan.q_tokens.numel() <= c.max_gathered


def test_engines_do_not_share_memory() -> None:
    one, other = make_engine(Setup(16)), make_engine(Setup(16))
    held = [engine.groups[0].builder.group.memory for engine in (one, other)]
    assert held[0] is not held[1]
    assert memory.memory_of(one.config) is held[0]


def test_a_second_start_in_one_process_begins_anew(fakes: FakeKernels) -> None:
    """vLLM's V1 runner measures graphs with a small cache first, and makes builders again."""
    engine = make()
    attend(engine, make_forward(engine, cases.decode()))
    config = engine.config
    config.compilation_config.static_forward_context.clear()
    held = engine.groups[0].builder.group.memory
    again = make_engine(engine.setup, config=config)
    attend(again, make_forward(again, cases.decode()))
    assert view_of(again) is not view_of(engine)
    assert again.groups[0].builder.group.memory is held
    assert view_of(again)._memory.workspace is view_of(engine)._memory.workspace
