"""The paged launch with a stand-in for the compiled kernels: which run, with which buffers."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch

import flashcore
from flashcore import ops
from flashcore.dispatch import Path
from flashcore.jit.cache import KernelCache
from flashcore.jit.kernel import Kernel
from flashcore.sm90.launch import paged as launch_paged
from tests.pretend_gpu import no_gpu, pretend
from tests.runtime_fixtures import needs_dsl

HEADS, KV_HEADS, DIM, PAGE = 8, 2, 128, 64


class Recorder:
    """Takes the place of the disk cache and of every function in it."""

    def __init__(self) -> None:
        self.kernels: list[Kernel] = []
        self.calls: list[tuple[str, tuple[Any, ...]]] = []

    def function(self, kernel: Kernel) -> Any:
        self.kernels.append(kernel)
        return lambda *arguments: self.calls.append((kernel.family.name, arguments))


class CheckedPaged(Recorder):
    """Calls the compiled functions with CPU tensors that pass for a GPU's."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = KernelCache.open()

    def function(self, kernel: Kernel) -> Any:
        compiled = self.cache.function(kernel)

        def call(*arguments: Any) -> None:
            self.calls.append((kernel.family.name, arguments))
            compiled(*pretend(arguments))

        return call


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """CPU tensors pass for tensors of a GPU with 132 SMs."""
    recorder = Recorder()
    monkeypatch.setattr(ops, "device_path", lambda device: Path("hopper", ""))
    monkeypatch.setattr(launch_paged, "shared_cache", lambda: recorder)
    monkeypatch.setattr(launch_paged, "_functions", {})
    monkeypatch.setattr(launch_paged, "sm_count", lambda device: 132)
    monkeypatch.setattr(launch_paged, "scheduler_scratch", lambda index: "scratch")
    monkeypatch.setattr(launch_paged, "lasting_stream", lambda index: 0)
    return recorder


def arguments(prefix_pages: int, batch: int = 2) -> dict[str, Any]:
    """Sequences that decode, with a common prefix of so many pages and two pages of their own."""
    own = [[prefix_pages + 2 * b, prefix_pages + 2 * b + 1] for b in range(batch)]
    table = torch.tensor([[*range(prefix_pages), *pages] for pages in own], dtype=torch.int32)
    lengths = torch.full((batch,), PAGE * (prefix_pages + 2) - 9)
    plan = flashcore.plan(
        flashcore.layout_from_page_table(table, lengths, page_tokens=PAGE),
        q_lens=[1] * batch,
        num_q_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=DIM,
        page_tokens=PAGE,
    )
    q = torch.zeros(batch, HEADS, DIM, dtype=torch.bfloat16)
    pages = torch.zeros(prefix_pages + 2 * batch, PAGE, KV_HEADS, DIM, dtype=torch.bfloat16)
    return {"q": q, "k_pages": pages, "v_pages": pages.clone(), "plan": plan}


def attend(prefix_pages: int, batch: int = 2, **options: Any) -> Any:
    given = arguments(prefix_pages, batch)
    return given["plan"], flashcore.paged_attention(**given, **options)


def test_partial_results_are_merged_from_where_they_were_written(recorder: Recorder) -> None:
    plan, (out, lse) = attend(64, return_lse=True)
    (first, attention), (second, merge) = recorder.calls
    assert (first, second) == ("paged", "merge")
    assert attention[3] is merge[0] is out
    assert attention[4] is merge[1] is lse
    assert attention[5] is merge[2]
    assert attention[6] is merge[3]
    assert plan.num_partial_tokens > 0
    assert attention[5].shape == (plan.num_partial_tokens, HEADS, DIM)
    assert attention[6].shape == (plan.num_partial_tokens, HEADS)
    assert attention[5].dtype == attention[6].dtype == lse.dtype == torch.float32


def test_nothing_partial_makes_no_buffer_and_no_merge(recorder: Recorder) -> None:
    for _ in range(2):
        plan, _ = attend(0, batch=200)
        assert (plan.num_partial_tokens, plan.needs_merge) == (0, False)
    (first, before), (second, after) = recorder.calls
    assert first == second == "paged"
    assert before[5].shape == (1, HEADS, DIM)  # an address to hand over, no more
    assert before[5] is after[5]
    assert before[6] is after[6]
    assert before[3] is not after[3]


def test_a_choice_is_made_once(recorder: Recorder) -> None:
    for batch in (2, 3, 2):
        attend(64, batch=batch)
    assert [kernel.family.name for kernel in recorder.kernels] == ["paged", "merge"]


def test_options_choose_another_kernel(recorder: Recorder) -> None:
    attend(64)
    attend(64, window=(100, -1))
    attend(64, softcap=3.0, sinks=torch.zeros(HEADS))
    configs = [k.config for k in recorder.kernels if k.family.name == "paged"]
    assert [(c.window, c.softcap, c.sinks) for c in configs] == [
        (False, False, False),
        (True, False, False),
        (False, True, True),
    ]


# ---------------------------------------------------------------- calls that skip the checks


def fresh(given: dict[str, Any]) -> dict[str, Any]:
    """The same plan with other tensors."""
    return {name: x.clone() if isinstance(x, torch.Tensor) else x for name, x in given.items()}


def test_a_remembered_call_is_the_same_call(recorder: Recorder) -> None:
    given = arguments(64)
    sinks = torch.zeros(HEADS, dtype=torch.bfloat16)
    options: dict[str, Any] = {"softcap": 3.0, "window": (500, -1), "sinks": sinks}
    for _ in range(2):
        now = fresh(given)
        out, lse = flashcore.paged_attention(**now, **options, return_lse=True)
        (_, attention), (_, merge) = recorder.calls[-2:]
        assert attention[:5] == (now["q"], now["k_pages"], now["v_pages"], out, lse)
        assert merge[:2] == (out, lse)
        assert torch.equal(attention[14], sinks.float())
    (_, before), _, (_, after), _ = recorder.calls
    assert len(given["plan"].launches) == 1
    assert before[5:12] == after[5:12]  # partial results too: nobody reads them later
    assert before[17:] == after[17:]
    assert before[3] is not after[3]
    assert before[4] is not after[4]  # a returned LSE is the caller's


def test_buffers_are_kept_for_a_stream_and_a_thread(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = arguments(64)
    used = []
    # No stream: while a graph is captured.
    for stream, thread in ((0, 1), (0, 1), (0, 2), (5, 1), (None, 1), (None, 1)):
        monkeypatch.setattr(launch_paged, "lasting_stream", lambda index, s=stream: s)
        monkeypatch.setattr(launch_paged, "get_ident", lambda t=thread: t)
        flashcore.paged_attention(**given)
        used.append(recorder.calls[-1][1][2])
    first, again, other_thread, other_stream, graph, other_graph = used
    assert first is again
    assert len({id(x) for x in (first, other_thread, other_stream, graph, other_graph)}) == 5


@pytest.mark.parametrize(("limit", "place"), [("_MAX_KEPT_PARTIALS", 5), ("_MAX_KEPT_LSE", 4)])
def test_large_buffers_are_not_kept(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch, limit: str, place: int
) -> None:
    given = arguments(64)
    for _ in range(2):
        flashcore.paged_attention(**given)
    assert recorder.calls[0][1][place] is recorder.calls[2][1][place]
    monkeypatch.setattr(launch_paged, limit, 8)
    given = arguments(64)
    for _ in range(2):
        flashcore.paged_attention(**given)
    assert recorder.calls[4][1][place] is not recorder.calls[6][1][place]


def test_a_plan_remembers_a_bounded_number_of_launches(recorder: Recorder) -> None:
    given = arguments(64)
    for i in range(200):  # as prefills of so many lengths would on a device plan
        flashcore.paged_attention(**given, scale=1.0 + i)
    assert 0 < len(given["plan"].launches) <= 64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k_pages": [1.0]}, "k_pages must be a torch.Tensor"),
        ({"k_pages": torch.zeros(67, PAGE, KV_HEADS, DIM).bfloat16()}, "at least 68 pages"),
        ({"q": torch.zeros(3, HEADS, DIM).bfloat16()}, "q must have the plan's"),
        ({"q": torch.zeros(2, HEADS, DIM)}, "k_pages must have the dtype of q"),
        ({"scale": float("inf")}, "scale must be finite"),
        ({"softcap": -1.0}, "softcap must be finite"),
        ({"window": (1, -2)}, "window right must be an int"),
        ({"sinks": torch.zeros(3)}, "sinks must have one logit per query head"),
        ({"tree_mask": torch.zeros(2, 5).int()}, "tree_mask must have dtype bool"),
        ({"tree_mask": torch.zeros(3, 5).bool()}, "tree_mask must be"),
        ({"out": torch.zeros(3, HEADS, DIM).bfloat16()}, "out must have the shape of q"),
        (
            {"q": torch.zeros(2, HEADS, DIM).bfloat16().requires_grad_()},
            "q requires a gradient",
        ),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_checks_stay_after_a_good_call(
    recorder: Recorder, change: dict[str, Any], message: str
) -> None:
    given = arguments(64)
    flashcore.paged_attention(**given)
    flashcore.paged_attention(**given, tree_mask=torch.ones(2, 5, dtype=torch.bool))
    with pytest.raises((TypeError, ValueError), match=message):
        flashcore.paged_attention(**{**given, **change})
    assert len(recorder.calls) == 4


def test_an_option_that_can_change_is_read_each_time(recorder: Recorder) -> None:
    given = arguments(0)
    scale = torch.tensor(0.25)
    for expected in (0.25, 0.5):
        scale.fill_(expected)
        flashcore.paged_attention(**given, scale=scale)
        assert recorder.calls[-1][1][-5] == expected


def test_repaired_strides_are_repaired_each_time(recorder: Recorder) -> None:
    given = arguments(0, batch=1)
    given["q"] = given["q"].as_strided(given["q"].shape, (1, DIM, 1))
    for _ in range(2):
        flashcore.paged_attention(**given)
        assert recorder.calls[-1][1][0].stride(0) % 8 == 0
    assert not given["plan"].launches


def test_calls_on_the_cpu_are_not_remembered() -> None:
    plan, _ = attend(0)
    assert not plan.launches


def test_a_copied_plan_remembers_nothing(recorder: Recorder) -> None:
    plan, _ = attend(64)
    assert len(plan.launches) == 1
    for copied in (plan.to("cpu"), copy.deepcopy(plan), pickle.loads(pickle.dumps(plan))):
        assert not copied.launches
        assert torch.equal(copied.work, plan.work)


@needs_dsl
@no_gpu
def test_what_a_remembered_call_leaves_to_the_compiled_function(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It refuses each of these before it would launch; the error is then the checks' own."""
    checked = CheckedPaged()
    monkeypatch.setattr(launch_paged, "shared_cache", lambda: checked)
    scratch = torch.zeros(2, dtype=torch.int32)
    monkeypatch.setattr(launch_paged, "scheduler_scratch", lambda index: scratch)
    given = arguments(64)
    out = torch.zeros_like(given["q"])
    for outputs in ({}, {"out": out}):
        for _ in range(2):
            with pytest.raises(RuntimeError, match="InsufficientDriver"):
                flashcore.paged_attention(**given, **outputs)
    assert len(checked.calls) == 6  # a second call: as remembered, then after the checks

    def like(*shape: int) -> torch.Tensor:
        return torch.zeros(*shape, dtype=torch.bfloat16)

    pages = (68, PAGE, KV_HEADS)
    bad: list[tuple[dict[str, Any], str]] = [
        ({"v_pages": [1.0]}, "v_pages must be a torch.Tensor"),
        ({"v_pages": torch.zeros(*pages, DIM)}, "v_pages must have the dtype of q"),
        ({"k_pages": torch.zeros(*pages, DIM).half()}, "k_pages must have the dtype of q"),
        ({"v_pages": like(67, PAGE, KV_HEADS, DIM)}, "v_pages must have at least 68 pages"),
        ({"v_pages": like(68, 32, KV_HEADS, DIM)}, "v_pages must have the plan's"),
        ({"v_pages": like(68, PAGE, DIM)}, "v_pages must have 4 dimensions"),
        ({"q": like(2, HEADS, 2 * DIM)[..., ::2]}, "q must have a contiguous last axis"),
        ({"v_pages": like(*pages, 2 * DIM)[..., ::2]}, "v_pages must have a contiguous last axis"),
        ({"k_pages": like(*pages, 132)[..., :DIM]}, "k_pages has stride 132"),
        ({"v_pages": like(*pages, 136)[..., 4:132]}, "v_pages must start at an address divisible"),
        ({"v_pages": like(*pages, DIM).to("meta")}, "v_pages must be on the device"),
        ({"out": like(2, HEADS, DIM).half()}, "out must have dtype bfloat16"),
        ({"out": like(3, HEADS, DIM)}, "out must have the shape of q"),
        ({"out": like(2, HEADS, 2 * DIM)[..., ::2]}, "out must have a contiguous last axis"),
        ({"out": like(2, HEADS, 132)[..., :DIM]}, "out has stride 132"),
        ({"out": like(2, HEADS, DIM).to("meta")}, "out must be on the device"),
    ]
    for change, message in bad:
        with pytest.raises((TypeError, ValueError), match=message):
            flashcore.paged_attention(**{**given, **change})
    assert len(given["plan"].launches) == 2


@needs_dsl
@no_gpu
def test_what_a_remembered_call_on_fp8_pages_leaves_to_it(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scales above all, of which the launch's key has the shapes alone."""
    checked = CheckedPaged()
    monkeypatch.setattr(launch_paged, "shared_cache", lambda: checked)
    scratch = torch.zeros(2, dtype=torch.int32)
    monkeypatch.setattr(launch_paged, "scheduler_scratch", lambda index: scratch)
    given = arguments(64)
    for name in ("k_pages", "v_pages"):
        given[name] = given[name].to(torch.float8_e4m3fn)
    scales = {"k_scale": torch.tensor(0.5), "v_scale": torch.ones(KV_HEADS)}
    for _ in range(2):
        with pytest.raises(RuntimeError, match="InsufficientDriver"):
            flashcore.paged_attention(**given, **scales)
    assert len(checked.calls) == 3  # the second one: as remembered, then after the checks
    attention = checked.calls[-1][1]
    assert any(x is scales["v_scale"] for x in attention)
    bad: list[tuple[dict[str, Any], str]] = [
        ({"k_scale": scales["k_scale"].double()}, "k_scale must be a float32 tensor"),
        ({"k_scale": scales["k_scale"].to("meta")}, "k_scale must be on the device of q"),
        ({"k_scale": 0.5}, "k_scale must be None or a float32 tensor"),
        ({"v_scale": torch.ones(3)}, r"v_scale must be .* got shape \(3,\)"),
        ({"v_scale": torch.ones(KV_HEADS).half()}, "v_scale must be .* got float16"),
        ({"v_pages": given["v_pages"].view(torch.float8_e5m2)}, "v_pages must have the dtype of k"),
        (
            {"v_pages": given["v_pages"].to(torch.bfloat16)},
            "v_pages must have the dtype of k_pages",
        ),
        (
            {"k_pages": given["k_pages"].to(torch.bfloat16)},
            "v_pages must have the dtype of k_pages",
        ),
        ({"k_pages": given["k_pages"].view(torch.uint8)}, "k_pages has dtype uint8"),
    ]
    for change, message in bad:
        with pytest.raises((TypeError, ValueError), match=message):
            flashcore.paged_attention(**{**given, **scales, **change})
    assert len(given["plan"].launches) == 1
