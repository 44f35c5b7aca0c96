"""Calls with a plan made on the device, without one: arguments of the launch, bad input."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import flashcore
from flashcore import ops
from flashcore.dispatch import Path
from flashcore.jit.cache import KernelCache
from flashcore.jit.kernel import Kernel
from flashcore.planner.device_plan import fill_defaults
from flashcore.serving import warmup
from flashcore.sm90.config import merge
from flashcore.sm90.config.merge import MergeConfig
from flashcore.sm90.config.paged import PagedConfig
from flashcore.sm90.families import MERGE, PAGED
from flashcore.sm90.launch import paged as launch_paged
from tests.pretend_gpu import no_gpu, pretend
from tests.runtime_fixtures import needs_dsl

HEADS, KV_HEADS, DIM, PAGE_TOKENS, PAGES, MAX_Q = 8, 2, 64, 16, 30, 24


def planner(**options: Any) -> flashcore.DevicePlanner:
    capacities = options.pop("capacities", flashcore.Capacities(6, 40, MAX_Q))
    return flashcore.DevicePlanner(
        capacities,
        num_pages=PAGES,
        num_q_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=DIM,
        page_tokens=PAGE_TOKENS,
        device="cpu",
        **options,
    )


def arguments(rows: int = 10) -> dict[str, Any]:
    pages = torch.zeros(PAGES, PAGE_TOKENS, KV_HEADS, DIM, dtype=torch.bfloat16)
    q = torch.zeros(rows, HEADS, DIM, dtype=torch.bfloat16)
    return {"q": q, "k_pages": pages, "v_pages": pages.clone(), "plan": planner().plan}


class Recorder:
    """Takes the place of the compiled kernels."""

    def __init__(self) -> None:
        self.configs: list[PagedConfig | MergeConfig] = []
        self.calls: list[tuple[Any, ...]] = []

    def function(self, config: PagedConfig | MergeConfig) -> Any:
        self.configs.append(config)
        return lambda *arguments: self.calls.append(arguments)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """CPU tensors pass for tensors of a Hopper GPU of 132 SMs."""
    recorder = Recorder()
    monkeypatch.setattr(launch_paged, "_function", recorder.function)
    monkeypatch.setattr(launch_paged, "sm_count", lambda device: 132)
    monkeypatch.setattr(launch_paged, "scheduler_scratch", lambda index: pytest.fail("not its own"))
    monkeypatch.setattr(launch_paged, "lasting_stream", lambda index: 0)
    monkeypatch.setattr(ops, "device_path", lambda device: Path("hopper", ""))
    return recorder


# q of all sizes: fewer rows than the plan may have query tokens, and more.
@pytest.mark.parametrize("rows", [1, MAX_Q, MAX_Q + 9])
def test_launch_takes_counts_and_workspace_from_the_plan(recorder: Recorder, rows: int) -> None:
    given = arguments(rows)
    plan, q = given["plan"], given["q"]
    out, lse = flashcore.paged_attention(**given, return_lse=True, scale=0.125)
    attention, merge = recorder.calls
    assert attention[:3] == (q, given["k_pages"], given["v_pages"])
    assert attention[3] is out
    assert attention[4] is lse
    assert attention[5] is plan.partial_out
    assert attention[6] is plan.partial_lse
    assert attention[7:11] == (plan.cols, plan.work, plan.q_tokens, plan.q_positions)
    # q_index, tree mask and positions, sinks, scales
    assert attention[11:17] == (None,) * 6
    assert attention[17] is plan.counter
    assert attention[18] is plan.counts
    assert attention[19:] == (0.125, 0.0, -1, -1, min(2 * 132, plan.work.shape[0]))
    assert merge[:7] == (
        *(out, lse, plan.partial_out, plan.partial_lse),
        *(plan.merge_offsets, plan.merge_partials, None),
    )
    assert merge[7] is plan.counts
    assert merge[8] == 2**31 - 1
    assert all(config.device_counts for config in recorder.configs)
    assert (out.shape, lse.shape) == (q.shape, q.shape[:2])


def test_merge_is_told_the_width_of_the_tree_mask(recorder: Recorder) -> None:
    mask = torch.ones(10, 5, dtype=torch.bool)
    flashcore.paged_attention(**arguments(), tree_mask=mask)
    assert recorder.calls[0][11] is not None
    assert recorder.calls[0][12].shape == mask.shape
    assert recorder.calls[1][8] == 5


def test_drafts_stand_where_the_mask_says(recorder: Recorder) -> None:
    mask = torch.ones(10, 4).tril().bool()
    flashcore.paged_attention(**arguments(), tree_mask=mask, window=(9, 0))
    assert (recorder.configs[0].tree, recorder.configs[0].window) == (True, True)
    assert recorder.calls[0][13].shape == (10,)
    assert recorder.calls[0][13].dtype == torch.int32


def test_result_goes_where_it_is_wanted(recorder: Recorder) -> None:
    given = arguments()
    out = torch.zeros_like(given["q"])
    assert flashcore.paged_attention(**given, out=out) is out
    assert recorder.calls[0][3] is out
    assert recorder.calls[1][0] is out


def test_no_rows_launch_nothing(recorder: Recorder) -> None:
    assert flashcore.paged_attention(**arguments(0)).shape == (0, HEADS, DIM)
    assert recorder.calls == []


def test_out_of_the_host_plan() -> None:
    layout = flashcore.layout_from_page_table(
        torch.arange(4).int().view(2, 2), torch.tensor([20, 32]).int(), page_tokens=PAGE_TOKENS
    )
    options = {"num_q_heads": HEADS, "num_kv_heads": KV_HEADS, "head_dim": DIM}
    plan = flashcore.plan(layout, page_tokens=PAGE_TOKENS, **options)
    q, k = torch.randn(2, HEADS, DIM), torch.randn(4, PAGE_TOKENS, KV_HEADS, DIM)
    out = torch.full_like(q, float("nan"))
    assert flashcore.paged_attention(q, k, k, plan, out=out) is out
    assert torch.equal(out, flashcore.paged_attention(q, k, k, plan))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.zeros(3, 4, DIM, dtype=torch.bfloat16)}, "q must have the plan's"),
        (
            {"k_pages": torch.zeros(29, PAGE_TOKENS, KV_HEADS, DIM, dtype=torch.bfloat16)},
            "k_pages must have at least 30 pages",
        ),
        (
            {"tree_mask": torch.ones(9, 4, dtype=torch.bool)},
            r"tree_mask must be .* \[10, >= 1\], got \(9, 4\)",
        ),
        (
            {"out": torch.zeros(9, HEADS, DIM, dtype=torch.bfloat16)},
            r"out must have the shape of q \(10, 8, 64\), got \(9, 8, 64\)",
        ),
    ],
)
def test_what_is_wrong_is_named(recorder: Recorder, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        flashcore.paged_attention(**{**arguments(), **changes})
    assert recorder.calls == []


def test_out_has_the_dtype_of_q(recorder: Recorder) -> None:
    with pytest.raises(TypeError, match="out must have dtype bfloat16, got float32"):
        flashcore.paged_attention(**arguments(), out=torch.zeros(10, HEADS, DIM))


def test_other_devices_are_refused() -> None:
    with pytest.raises(NotImplementedError, match="only the Hopper kernels read: cpu"):
        flashcore.paged_attention(**arguments())
    lens = torch.zeros(1, dtype=torch.int32)
    with pytest.raises(NotImplementedError, match="plans with Hopper kernels: cpu"):
        planner().update(torch.zeros(1, 1, dtype=torch.int32), lens, lens)


def test_tracing_is_refused() -> None:
    given = arguments()

    def call(q: torch.Tensor) -> torch.Tensor:
        return flashcore.paged_attention(**{**given, "q": q})

    with pytest.raises(Exception, match="cannot trace"):
        torch.compile(call, backend="eager", fullgraph=True)(given["q"])


# ---------------------------------------------------------------- workspace


def test_default_workspace_holds_what_ordinary_batches_need() -> None:
    """256 decode sequences in a prefix tree of depth eight, and splits for 264 workers of 64 rows
    of 32 heads."""
    c = fill_defaults(flashcore.Capacities(256, 65536, 256), 32, 8, 64, 264)
    assert c.max_partials == 8 * 256 + 5 * 264 * 64 // 32
    # Never more than there may be gathered tokens, beside the splits.
    c = fill_defaults(flashcore.Capacities(4, 8, 4, max_gathered=10), 32, 8, 64, 0)
    assert c.max_partials == 10
    c = fill_defaults(flashcore.Capacities(64, 65536, 3024), 32, 8, 64, 0)
    assert c.max_partials == 8 * 1024 + 2 * 2000


def test_workspace_is_shared_on_request() -> None:
    buffer = torch.zeros(11 * HEADS * (DIM + 1) + 3)
    first, second = planner(workspace=buffer), planner(workspace=buffer)
    for one in (first, second):
        assert one.capacities.max_partials == 11
        assert one.plan.partial_out.shape == (11, HEADS, DIM)
        assert one.plan.partial_out.data_ptr() == buffer.data_ptr()
        assert one.plan.partial_lse.shape == (11, HEADS)
    assert first.workspace_bytes == 4 * 11 * HEADS * (DIM + 1)
    assert first.plan.counter is not second.plan.counter


@pytest.mark.parametrize(
    ("workspace", "error", "message"),
    [
        (torch.zeros(HEADS * (DIM + 1) * 5 - 1), ValueError, "workspace must have at least 2600"),
        (torch.zeros(9999).half(), TypeError, "workspace must have dtype float32, got float16"),
        (torch.zeros(9999)[1:], ValueError, "address divisible by 16"),
        (torch.zeros(99, 99), ValueError, "workspace must have 1 dimensions"),
    ],
)
def test_workspace_is_checked(
    workspace: torch.Tensor, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        planner(capacities=flashcore.Capacities(6, 40, MAX_Q, max_partials=5), workspace=workspace)


def test_merge_shares_lists_where_rows_are_few() -> None:
    few = merge.choose_device_merge("bf16", 128, False, merge.FEW_ROWS)
    some = merge.choose_device_merge("bf16", 128, True, merge.FEW_ROWS + 1)
    many = merge.choose_device_merge("bf16", 128, False, merge.MANY_ROWS + 1)
    assert (few.warps_per_row, few.sinks, few.device_counts) == (8, False, True)
    assert (some.warps_per_row, some.heads_per_warp, some.sinks) == (1, 1, True)
    assert (many.warps_per_row, many.heads_per_warp) == (1, merge.HEADS_PER_WARP)


def test_each_merge_has_its_size() -> None:
    for heads in (1, 5, 32, 96):
        chosen = [
            merge.choose_device_merge("bf16", 128, False, count * heads)
            for count in warmup._token_counts(heads)
        ]
        assert len(set(chosen)) == len(merge.MERGE_SIZES)


# ---------------------------------------------------------------- the real functions


@needs_dsl
@no_gpu
@pytest.mark.parametrize("tree", [False, True])
def test_compiled_functions_take_what_the_launch_passes(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch, tree: bool
) -> None:
    """The functions check their arguments before they ask for a driver, which is not there."""
    cache = KernelCache.open()
    mask = torch.ones(10, 5, dtype=torch.bool) if tree else None
    flashcore.paged_attention(**arguments(), tree_mask=mask)
    assert len(recorder.calls) == 2
    for family, config, call in zip((PAGED, MERGE), recorder.configs, recorder.calls, strict=True):
        compiled = cache.function(Kernel(family, config))
        with pytest.raises(RuntimeError, match="InsufficientDriver"):
            compiled(*pretend(call))
