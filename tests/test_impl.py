"""Torch operators on a CUDA device only where they are asked for: by a call, or by the program."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import flashcore
from flashcore import api, dispatch, ops
from flashcore.cli import replay
from flashcore.cli.main import main
from flashcore.jit.kernel import Kernel
from flashcore.remembered import Remembered
from flashcore.serving import warmup
from flashcore.serving.capacity import Room
from flashcore.serving.kernels import Kind, Variant, wanted
from flashcore.serving.planners import KernelPlanner
from flashcore.serving.shapes import Model, Shape
from flashcore.sm90 import available, device_planner
from flashcore.sm90.launch import dense as launch
from flashcore.sm90.launch import paged as launch_paged
from flashcore.sm90.launch import planner as launch_planner
from tests.test_paged_attention import shared_batch

WHY = "A100 has compute capability 8.0"
Call = Callable[..., torch.Tensor]


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The program's choice is read anew, and no launch is remembered."""
    monkeypatch.delenv(dispatch.VARIABLE, raising=False)
    monkeypatch.setattr(api, "_dense_launches", Remembered(4096))
    dispatch._wanted_by_program.cache_clear()
    dispatch.device_path.cache_clear()
    yield
    dispatch._wanted_by_program.cache_clear()
    dispatch.device_path.cache_clear()


@pytest.fixture
def on_a100(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU tensors pass for those of a CUDA device without kernels."""
    monkeypatch.setattr(available, "available", lambda device: (False, WHY))
    there = dispatch.device_path(torch.device("cuda", 0))
    monkeypatch.setattr(ops, "device_path", lambda device: there)


def dense(**options: Any) -> torch.Tensor:
    x = torch.arange(2 * 5 * 4 * 16).view(2, 5, 4, 16) / 640
    return flashcore.attention(x, x, x, causal=True, **options)


def paged(**options: Any) -> torch.Tensor:
    batch = shared_batch()
    return flashcore.paged_attention(*batch.tensors(), batch.plan(), **options)


def compiled(call: Call) -> Call:
    """The call in a graph of torch.compile."""
    batch = shared_batch()
    q, k, v = batch.tensors()
    plan = batch.plan()

    def run(**options: Any) -> torch.Tensor:
        if call is dense:
            layer = lambda x: flashcore.attention(x, x, x, causal=True, **options)  # noqa: E731
            x = torch.arange(2 * 5 * 4 * 16).view(2, 5, 4, 16) / 640
        else:
            layer = lambda x: flashcore.paged_attention(x, k, v, plan, **options)  # noqa: E731
            x = q
        return torch.compile(layer, fullgraph=True, backend="aot_eager")(x)

    return run


calls = pytest.mark.parametrize(
    "call",
    [dense, paged, compiled(dense), compiled(paged)],
    ids=["dense", "paged", "dense compiled", "paged compiled"],
)


@calls
@pytest.mark.usefixtures("on_a100")
def test_a_cuda_device_without_kernels_is_an_error_with_both_ways_out(call: Call) -> None:
    for options in ({}, {"impl": "auto"}):
        with pytest.raises(NotImplementedError) as caught:
            call(**options)
        said = str(caught.value)
        for part in ("no kernels for cpu", WHY, "impl='eager'", "FLASHCORE_IMPL=eager"):
            assert part in said


@calls
def test_torch_operators_where_a_call_asks_for_them(
    call: Call, request: pytest.FixtureRequest
) -> None:
    expected = call()
    request.getfixturevalue("on_a100")
    assert torch.equal(call(impl="eager"), expected)


@calls
def test_torch_operators_where_the_program_asks_for_them(
    call: Call, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = call()
    request.getfixturevalue("on_a100")
    monkeypatch.setenv(dispatch.VARIABLE, "eager")
    dispatch._wanted_by_program.cache_clear()
    assert torch.equal(call(), expected)
    with pytest.raises(NotImplementedError, match="no kernels for cpu"):
        call(impl="auto")


@calls
@pytest.mark.parametrize("impl", ["hopper", "", True, ["eager"]])
def test_an_unknown_impl_is_named(call: Call, impl: Any) -> None:
    with pytest.raises(Exception, match="impl must be 'auto' or 'eager', got") as caught:
        call(impl=impl)
    # A compiler wraps what a call raises while it is traced.
    assert isinstance(caught.value, (ValueError, torch._dynamo.exc.TorchDynamoException))


@calls
def test_an_unknown_value_of_the_variable_is_named(
    call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(dispatch.VARIABLE, "torch")
    for _ in range(2):
        with pytest.raises(
            ValueError, match="FLASHCORE_IMPL must be 'auto' or 'eager', got 'torch'"
        ):
            call()


def test_an_empty_variable_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.VARIABLE, "")
    assert dispatch.wanted(None) == "auto"


def test_a_remembered_launch_serves_its_own_impl_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels first, then torch operators for the same tensors, and back."""
    launched = []

    class Cache:
        def function(self, kernel: Any) -> Callable[..., None]:
            return lambda *arguments: launched.append(arguments)

    monkeypatch.setattr(ops, "device_path", lambda device: dispatch.Path("hopper", ""))
    monkeypatch.setattr(launch, "shared_cache", Cache)
    monkeypatch.setattr(launch, "_plans", Remembered(16))
    monkeypatch.setattr(launch, "sm_count", lambda device: 132)
    monkeypatch.setattr(launch, "scheduler_scratch", lambda index: None)
    monkeypatch.setattr(launch, "current_device", lambda: None)
    q, k, v = (torch.randn(1, 16, 2, 64).bfloat16() for _ in range(3))
    on_cpu = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2).float() for x in (q, k, v))
    ).transpose(1, 2)
    for impl, kernels in (
        *((None, 1), (None, 2), ("eager", 2), ("eager", 2)),
        *((None, 3), ("auto", 4), ("eager", 4)),
    ):
        out = flashcore.attention(q, k, v, impl=impl)
        assert len(launched) == kernels
        if impl == "eager":
            torch.testing.assert_close(out.float(), on_cpu, rtol=2e-2, atol=2e-2)


def test_a_device_plan_cannot_be_run_by_torch_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    planner = flashcore.DevicePlanner(
        flashcore.Capacities(1, 8, 1),
        num_pages=8,
        num_q_heads=8,
        num_kv_heads=2,
        head_dim=64,
        page_tokens=16,
        device="cpu",
    )
    q, pool = torch.zeros(1, 8, 64), torch.zeros(8, 16, 2, 64)
    monkeypatch.setattr(ops, "device_path", lambda device: dispatch.Path("hopper", ""))
    with pytest.raises(NotImplementedError, match=r"DevicePlan, .* asked for .*flashcore\.plan"):
        flashcore.paged_attention(q, pool, pool, planner.plan, impl="eager")
    monkeypatch.setattr(ops, "device_path", lambda device: dispatch.Path("none", WHY))
    with pytest.raises(NotImplementedError, match=f"DevicePlan, .*{WHY}"):
        flashcore.paged_attention(q, pool, pool, planner.plan)


def test_an_engine_s_plans_are_read_by_kernels_whatever_the_program_asks_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They are made by kernels; the program may still have torch operators for its own calls."""
    launched: list[str] = []

    class Cache:
        def function(self, kernel: Kernel) -> Callable[..., None]:
            return lambda *arguments: launched.append(kernel.family.name)

    for module in (launch_paged, launch_planner):
        monkeypatch.setattr(module, "shared_cache", Cache)
        monkeypatch.setattr(module, "_functions", {})
    for module in (launch_paged, device_planner):
        monkeypatch.setattr(module, "sm_count", lambda device: 132)
    for module in (ops, device_planner):
        monkeypatch.setattr(module, "device_path", lambda device: dispatch.Path("hopper", ""))
    monkeypatch.setattr(launch_paged, "lasting_stream", lambda index: 0)
    monkeypatch.setenv(dispatch.VARIABLE, "eager")
    model = Model(Shape(8, 2, 64), None, -1, 16, 0, torch.bfloat16, torch.device("cpu"))
    kind = Kind(Shape(8, 2, 64), False, (Variant(),))
    pool = torch.zeros(8 * 16, 2, 64, dtype=torch.bfloat16)
    cache = warmup.Cache(pool, pool.clone(), torch.zeros(1, 1).int(), None, -1, torch.zeros(10**6))
    warmup.run_all(model, kind, cache, wanted(model, [kind], 4, False), False)
    assert launched.count("planner") > 0
    assert launched.count("paged") == launched.count("merge") > 0
    launched.clear()
    device_plan = flashcore.DevicePlanner(
        flashcore.Capacities(1, 8, 1),
        num_pages=8,
        num_q_heads=8,
        num_kv_heads=2,
        head_dim=64,
        page_tokens=16,
        device="cpu",
    )
    q, pages = torch.zeros(1, 8, 64, dtype=torch.bfloat16), pool.view(8, 16, 2, 64)
    planner = KernelPlanner(device_plan, Room(1, 8, 1))
    planner.attend(device_plan.plan, q, pages, pages.clone(), causal=True)
    assert launched == ["paged", "merge"]


def test_a_cpu_is_served_by_torch_operators_without_a_word(
    recwarn: pytest.WarningsRecorder,
) -> None:
    assert torch.equal(dense(), dense(impl="auto"))
    assert torch.equal(paged(), paged(impl="eager"))
    assert not recwarn.list


# ---------------------------------------------------------------- the command line


@pytest.fixture
def with_an_a100(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch sees one CUDA device, without kernels."""
    monkeypatch.setattr(available, "available", lambda device: (False, WHY))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A100")


@pytest.mark.usefixtures("with_an_a100")
def test_info_tells_the_ways_out(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert f"no kernels: {WHY}" in out
    assert "impl='eager' or FLASHCORE_IMPL=eager" in out
    monkeypatch.setenv(dispatch.VARIABLE, "eager")
    dispatch._wanted_by_program.cache_clear()
    assert main(["info", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["impl"] == "eager"
    assert report["devices"][1]["path"] == "none"


@pytest.mark.usefixtures("with_an_a100")
def test_the_demo_takes_a_device_that_runs_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    from flashcore.cli import demo

    assert demo._default_device() == "cpu"
    monkeypatch.setenv(dispatch.VARIABLE, "eager")
    dispatch._wanted_by_program.cache_clear()
    assert demo._default_device() == "cuda"
    assert not demo._by_kernels("cuda")


def test_the_demo_takes_what_kernels_take(monkeypatch: pytest.MonkeyPatch) -> None:
    from flashcore.cli import demo

    monkeypatch.setattr(available, "available", lambda device: (True, ""))
    assert demo._default_device() == "cuda"
    assert demo._by_kernels("cuda")
    assert not demo._by_kernels("cpu")


@pytest.mark.usefixtures("with_an_a100")
def test_the_replay_finds_out_before_the_long_work(tmp_path: Any) -> None:
    parser = replay.argparse.ArgumentParser()
    replay.add_arguments(parser)
    trace = str(tmp_path / "trace.jsonl")
    args = parser.parse_args([trace, "--device", "cuda", "--attention"])
    with pytest.raises(ValueError, match=f"times kernels, which do not run here: {WHY}"):
        replay._check_outputs(args)


@pytest.mark.usefixtures("on_a100")
def test_a_command_says_it_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--sequences", "3", "--tokens", "96", "--page-tokens", "16", "--rounds", "1"]
    assert main(["demo", *small, "--device", "cpu"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("flashcore demo: flashcore has no kernels for cpu")
    assert said.count("\n") == 1
