"""Launches on expanded fp8 pages, with stand-ins for kernels: which run, and what they get."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch

import flashcore
from flashcore.planner.expansion import Way
from flashcore.sm90.expansion_scratch import ExpansionScratch
from flashcore.sm90.launch import expand as launch_expand
from tests.test_runtime_launch_paged import Recorder, recorder  # noqa: F401

HEADS, KV_HEADS, DIM, PAGE, TOKENS = 8, 2, 128, 64, 256
E4M3 = torch.float8_e4m3fn


@pytest.fixture
def expanding(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Triton is here, and its kernel is torch; the pools that it was given."""
    pools: list[torch.Tensor] = []

    def expand(kv: Any, pages: Any, count: Any, targets: Any) -> None:
        pools.extend(kv)
        ids = pages[: int(count)].long()
        for pool, target in zip(kv, targets, strict=True):
            target[: int(count)] = pool.view(torch.uint8)[ids].view(pool.dtype).to(target.dtype)

    module = ModuleType("flashcore.expand_kernel")
    module.expand = expand  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flashcore.expand_kernel", module)
    monkeypatch.setattr(launch_expand, "_missing", lambda: None)
    return pools


def prefill(expand: bool | None, queries: int = 64) -> dict[str, Any]:
    """Two sequences with a common page and three of their own, pages of fp8."""
    table = torch.tensor([[7, 1, 2, 3], [7, 4, 6, 0]], dtype=torch.int32)
    lengths = torch.full((2,), TOKENS)
    plan = flashcore.plan(
        flashcore.layout_from_page_table(table, lengths, page_tokens=PAGE),
        q_lens=[queries] * 2,
        num_q_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=DIM,
        page_tokens=PAGE,
        itemsize=1,
        tile_m=64,
        expand=expand,
    )
    q = torch.zeros(2 * queries, HEADS, DIM, dtype=torch.bfloat16)
    k, v = (torch.randn(8, PAGE, KV_HEADS, DIM).to(E4M3) for _ in range(2))
    scales = {"k_scale": torch.tensor(0.5), "v_scale": torch.ones(KV_HEADS)}
    return {"q": q, "k_pages": k, "v_pages": v, "plan": plan, **scales}


def wide(pool: torch.Tensor, given: dict[str, Any]) -> torch.Tensor:
    """What expanded pages must hold."""
    return pool.view(torch.uint8)[given["plan"].expansion.places.pages.long()].view(E4M3).half()


def test_attention_runs_on_expanded_pages_alone(
    recorder: Recorder,  # noqa: F811
    expanding: list[torch.Tensor],
) -> None:
    given = prefill(True)
    flashcore.paged_attention(**given)
    assert [name for name, _ in recorder.calls] == ["paged", "merge"][: len(recorder.calls)]
    (config,) = {k.config for k in recorder.kernels if k.family.name == "paged"}
    assert (config.expanded, config.kv_dtype, config.dtype) == (True, "", "bf16")
    _, k, v, *_ = attention = recorder.calls[0][1]
    assert torch.equal(k, wide(given["k_pages"], given))
    assert torch.equal(v, wide(given["v_pages"], given))
    assert any(x is given["plan"].expansion.places.cols for x in attention)
    assert not any(x is given["plan"].cols for x in attention)
    assert any(x is given["v_scale"] for x in attention)
    assert [x is y for x, y in zip(expanding, (given["k_pages"], given["v_pages"]), strict=True)]


def test_a_call_expands_anew_what_its_pages_hold(
    recorder: Recorder,  # noqa: F811
    expanding: list[torch.Tensor],
) -> None:
    """The next layer's, by the launch that is remembered."""
    given = prefill(True)
    flashcore.paged_attention(**given)
    other = {name: torch.randn(8, PAGE, KV_HEADS, DIM).to(E4M3) for name in ("k_pages", "v_pages")}
    flashcore.paged_attention(**{**given, **other})
    assert len(given["plan"].launches) == 1
    calls = [arguments for name, arguments in recorder.calls if name == "paged"]
    assert torch.equal(calls[1][1], wide(other["k_pages"], given))
    assert len(expanding) == 4


def test_without_it_the_kernel_converts(
    recorder: Recorder,  # noqa: F811
    expanding: list[torch.Tensor],
) -> None:
    for expand, queries in ((False, 64), (None, 1)):
        given = prefill(expand, queries)
        assert given["plan"].expansion.way is not Way.EXPANDED
        flashcore.paged_attention(**given)
    assert {k.config.kv_dtype for k in recorder.kernels if k.family.name == "paged"} == {"e4m3"}
    assert not expanding


def test_pages_of_16_bits_are_left_alone(
    recorder: Recorder,  # noqa: F811
    expanding: list[torch.Tensor],
) -> None:
    given = prefill(True)
    pools = {name: given[name].to(torch.bfloat16) for name in ("k_pages", "v_pages")}
    pools |= {"k_scale": None, "v_scale": None}
    flashcore.paged_attention(**{**given, **pools})
    assert not expanding
    assert recorder.calls[0][1][1] is pools["k_pages"]


def test_checks_stay_after_a_good_call(
    recorder: Recorder,  # noqa: F811
    expanding: list[torch.Tensor],
) -> None:
    """Of all that the compiled function does not see."""
    given = prefill(True)
    flashcore.paged_attention(**given)
    fp8 = given["v_pages"]
    bad: list[tuple[Any, str]] = [
        ([1.0], "v_pages must be a torch.Tensor"),
        (fp8.view(torch.float8_e5m2), "v_pages must have the dtype of k_pages"),
        (fp8.to(torch.bfloat16), "v_pages must have the dtype of k_pages"),
        (fp8[:7], "v_pages must have at least 8 pages"),
        (fp8[:, :32], "v_pages must have the plan's"),
        (fp8.view(torch.uint8).repeat(1, 1, 1, 2).view(E4M3)[..., ::2], "contiguous last axis"),
        (fp8.to("meta"), "v_pages must be on the device"),
    ]
    for v_pages, message in bad:
        with pytest.raises((TypeError, ValueError), match=message):
            flashcore.paged_attention(**{**given, "v_pages": v_pages})
    assert len(expanding) == 2
    more = torch.cat([fp8, fp8])  # a larger pool is no mistake
    flashcore.paged_attention(**{**given, "v_pages": more})
    paged = [arguments for name, arguments in recorder.calls if name == "paged"]
    assert torch.equal(paged[-1][2], wide(more, given))


def test_without_triton_pages_are_converted_and_it_is_told_once(
    recorder: Recorder,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(launch_expand.triton_compiler, "missing", lambda: "Triton is not here")
    launch_expand._missing.cache_clear()
    try:
        with pytest.raises(NotImplementedError, match=r"expand=True: .*and Triton is not here"):
            flashcore.paged_attention(**prefill(True))
        for _ in range(2):
            given = prefill(True)
            chosen = given["plan"].expansion._replace(forced=False)
            object.__setattr__(given["plan"], "expansion", chosen)
            monkeypatch.setattr("flashcore.planner.expansion.is_worth", lambda *_: True)
            flashcore.paged_attention(**given)
    finally:
        launch_expand._missing.cache_clear()
    assert {k.config.kv_dtype for k in recorder.kernels if k.family.name == "paged"} == {"e4m3"}
    assert [x.levelname for x in caplog.records] == ["WARNING"]


# ---------------------------------------------------------------- plans made on the device


def device_planner(scratch: Any = None, **options: Any) -> flashcore.DevicePlanner:
    return flashcore.DevicePlanner(
        flashcore.Capacities(4, max_entries=64, max_q=2048),
        num_pages=8,
        num_q_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=DIM,
        page_tokens=PAGE,
        **{"itemsize": 1, "device": "cpu", "expansion": scratch, **options},
    )


def test_where_the_device_decides_both_are_launched(
    recorder: Recorder,  # noqa: F811
    expanding: list[torch.Tensor],
) -> None:
    """One after the other, with counts of their own, and one merge by the plan's."""
    scratch = ExpansionScratch(1 << 20, num_pages=8, device="cpu")
    plan = device_planner(scratch).plan
    given = {**prefill(True), "plan": plan, "q": torch.zeros(512, HEADS, DIM, dtype=torch.bfloat16)}
    flashcore.paged_attention(**given)
    assert [name for name, _ in recorder.calls] == ["paged", "paged", "merge"]
    first, second, merge = (arguments for _, arguments in recorder.calls)
    assert first[1].data_ptr() == scratch.pages.data_ptr()
    assert first[2].data_ptr() > scratch.pages.data_ptr()
    assert second[1].data_ptr() == given["k_pages"].data_ptr()
    found = plan.expansion
    assert found is not None
    for arguments, wanted, other in (
        (first, found.counts, found.converted_counts),
        (second, found.converted_counts, found.counts),
    ):
        assert any(x is wanted for x in arguments)
        assert not any(x is other for x in arguments)
    assert any(x is found.places.cols for x in first)
    assert any(x is plan.cols for x in second)
    assert any(x is plan.counts for x in merge)
    assert first[3] is second[3] is merge[0]


@pytest.mark.parametrize("options", [{"window": (100, 0)}, {"rows": 64}, {"variant": True}])
def test_what_cannot_pay_is_converted_alone(
    recorder: Recorder,  # noqa: F811
    expanding: list[torch.Tensor],
    options: dict[str, Any],
) -> None:
    planner = device_planner(ExpansionScratch(1 << 20, num_pages=8, device="cpu"))
    if options.pop("variant", False):
        planner = planner.variant(expand=False)
        assert planner.plan.expansion is None
    rows = options.pop("rows", 512)
    q = torch.zeros(rows, HEADS, DIM, dtype=torch.bfloat16)
    flashcore.paged_attention(**{**prefill(True), "plan": planner.plan, "q": q}, **options)
    assert [name for name, _ in recorder.calls] == ["paged", "merge"]
    assert any(x is planner.plan.counts for x in recorder.calls[0][1])
    assert not expanding


def test_what_a_planner_refuses() -> None:
    scratch = ExpansionScratch(1 << 20, num_pages=8, device="cpu")
    with pytest.raises(TypeError, match="expansion must be an ExpansionScratch, got int"):
        device_planner(1)
    with pytest.raises(ValueError, match="expansion is for fp8 pages, of itemsize 1, got 2"):
        device_planner(scratch, itemsize=2)
