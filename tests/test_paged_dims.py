"""Head dims between the tile widths, V narrower than K: configurations, plans, launches, code."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

import flashcore
from flashcore import ops
from flashcore.contract.operands import Paged
from flashcore.dispatch import Path as DevicePath
from flashcore.jit.cache import KernelCache
from flashcore.jit.folder import default_folder
from flashcore.jit.gates import check_kernel
from flashcore.jit.kernel import Kernel
from flashcore.jit.target import detect_target
from flashcore.planner import split
from flashcore.planner.device_plan import workspace_elements
from flashcore.planner.folding import Costs
from flashcore.problem import Problem
from flashcore.reference import paged_attention_reference
from flashcore.sm90.config import paged, paged_schedule
from flashcore.sm90.config.merge import MergeConfig
from flashcore.sm90.config.paged import PagedCall
from flashcore.sm90.families import MERGE, PAGED
from flashcore.sm90.launch import paged as launch_paged
from tests.cases import Batch
from tests.compare import assert_close
from tests.pretend_gpu import no_gpu, pretend
from tests.runtime_fixtures import needs_disassembler, needs_dsl

DIMS = range(8, 257, 8)
SMEM_OF_SM = 233_472


# ---------------------------------------------------------------- configurations


# What was measured stays as it was measured: tile_n, stages, CTAs of an SM.
@pytest.mark.parametrize(
    ("head_dim", "page_tokens", "tile_m", "expected"),
    [
        (64, 64, 64, (128, 2, 2)),
        (64, 64, 128, (128, 4, 1)),
        (64, 1, 64, (128, 3, 2)),
        (64, 1, 128, (128, 4, 1)),
        (128, 64, 64, (64, 2, 2)),
        (128, 64, 128, (128, 2, 1)),
        (128, 1, 64, (64, 3, 2)),
        (128, 1, 128, (128, 3, 1)),
        (256, 64, 64, (64, 2, 1)),
        (256, 64, 128, (64, 2, 1)),
        (256, 1, 64, (64, 3, 1)),
        (256, 1, 128, (64, 2, 1)),
    ],
)
def test_measured_configurations(
    head_dim: int, page_tokens: int, tile_m: int, expected: tuple[int, int, int]
) -> None:
    c = paged.choose(PagedCall("bf16", head_dim, page_tokens, 4), tile_m)
    assert (c.tile_n, c.stages, c.ctas_per_sm) == expected
    assert (c.k_columns, c.v_columns, c.k_steps) == (head_dim, head_dim, head_dim // 16)
    assert c == paged.choose(
        PagedCall("bf16", head_dim, page_tokens, 4, v_head_dim=head_dim), tile_m
    )


@pytest.mark.parametrize("page_tokens", [1, 64])
@pytest.mark.parametrize("tile_m", [64, 128])
def test_every_pair_of_dims_has_a_kernel(page_tokens: int, tile_m: int) -> None:
    for head_dim in DIMS:
        for v_head_dim in range(8, head_dim + 1, 8):
            c = paged.choose(
                PagedCall("bf16", head_dim, page_tokens, 4, v_head_dim=v_head_dim), tile_m
            )
            assert paged.illegal_reason(c) is None
            assert head_dim <= c.k_columns < head_dim + 64
            assert v_head_dim <= c.v_columns < v_head_dim + 64
            assert head_dim <= 16 * c.k_steps <= c.k_columns
            assert c.ctas_per_sm * (c.smem_bytes + 1024) <= SMEM_OF_SM
            assert c.ctas_per_sm == paged_schedule.ctas_per_sm(head_dim, tile_m, v_head_dim)
            # Columns past 32 x n, which a thread would store in vain, and vectors in whole passes.
            for columns, warpgroups, rows in (
                (c.k_columns, 1, 64),
                (c.v_columns, c.num_consumer_warpgroups, c.tile_n),
            ):
                at_a_time = paged.rows_at_a_time(columns, warpgroups)
                assert rows % at_a_time == 0
                assert columns // 8 % (128 * warpgroups // at_a_time) == 0


def test_what_is_on_its_way_is_counted_without_padding() -> None:
    """As near to the measured 128 KB of an SM as whole stages come, where they fit."""
    for head_dim in range(72, 257, 8):
        for tile_m in (64, 128):
            c = paged.choose(PagedCall("bf16", head_dim, 64, 4), tile_m)
            stage = 4 * c.ctas_per_sm * c.tile_n * head_dim
            larger = replace(c, stages=c.stages + 1)
            off = abs(c.stages * stage - (128 << 10))
            assert 2 * off <= stage or paged.illegal_reason(larger) is not None


@pytest.mark.parametrize(
    ("head_dim", "v_head_dim", "message"),
    [
        (100, None, "head_dim must be a multiple of 8 from 8 to 256, got 100"),
        (4, None, "head_dim must be a multiple of 8 from 8 to 256, got 4"),
        (264, None, "head_dim must be a multiple of 8 from 8 to 256, got 264"),
        (128, 100, "v_head_dim must be a multiple of 8 from 8 to 256, got 100"),
        (128, 192, r"v_head_dim must be at most head_dim \(128\), got 192"),
    ],
)
def test_what_has_no_kernel_is_named(
    recorder: Recorder,
    monkeypatch: pytest.MonkeyPatch,
    head_dim: int,
    v_head_dim: int | None,
    message: str,
) -> None:
    """By the choice, by the planner of a GPU before it allocates, and by the launch."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match=message):
        paged.choose(PagedCall("bf16", head_dim, 64, 4, v_head_dim or 0), 64)
    with pytest.raises(ValueError, match=message):
        flashcore.DevicePlanner(
            flashcore.Capacities(4, 64, 4),
            num_pages=16,
            num_q_heads=8,
            num_kv_heads=2,
            head_dim=head_dim,
            v_head_dim=v_head_dim,
            device="cuda",
        )
    if v_head_dim is None or v_head_dim <= head_dim:
        given = arguments(head_dim, v_head_dim or head_dim)
        with pytest.raises(ValueError, match=message):
            flashcore.paged_attention(**given)
    assert recorder.calls == []


# ---------------------------------------------------------------- plans


def test_costs_are_of_both_dims() -> None:
    costs = Costs.of(Problem(16, 4, 192, 128, page_tokens=16))
    assert costs.kv_token == 5 * 4 * (192 + 128) * 2
    assert costs.partial_token == split.COST_UNIT * 2 * 16 * (4 * 128 + 4)
    assert Costs.of(Problem(16, 4, 128, 128, page_tokens=16)).partial_token == costs.partial_token


def test_plan_knows_both_dims() -> None:
    batch = small_batch(24, 16)
    plan = batch.plan(fold=False)
    assert (plan.head_dim, plan.v_head_dim) == (24, 16)
    assert "head_dim=24/16" in repr(plan)
    assert "head_dim=24," in repr(small_batch(24, 24).plan())
    stats = plan.stats()
    assert stats.bytes_once(torch.bfloat16) == stats.tokens_once * 2 * (24 + 16) * 2
    assert stats.bytes_partial() == 2 * plan.num_partial_tokens * 8 * (4 * 16 + 4) > 0
    assert plan.to("cpu").v_head_dim == 16
    with pytest.raises(ValueError, match=r"v_head_dim must be at most head_dim \(24\), got 32"):
        small_batch(24, 32).plan()
    with pytest.raises(TypeError, match="v_head_dim must be an int, got float"):
        small_batch(24, 8.0).plan()  # type: ignore[arg-type]


def test_workspace_of_a_device_plan_holds_rows_of_v() -> None:
    buffer = torch.zeros(11 * 8 * (16 + 1) + 3)
    options = {"num_q_heads": 8, "num_kv_heads": 2, "head_dim": 24, "v_head_dim": 16}
    planner = flashcore.DevicePlanner(
        flashcore.Capacities(6, 40, 24), num_pages=30, device="cpu", workspace=buffer, **options
    )
    assert planner.capacities.max_partials == 11
    assert planner.plan.partial_out.shape == (11, 8, 16)
    assert planner.plan.partial_lse.shape == (11, 8)
    assert planner.workspace_bytes == 4 * workspace_elements(11, 8, 16) == 4 * 11 * 8 * 17
    assert planner.trimmed(0).v_head_dim == planner.plan.v_head_dim == 16
    assert "head_dim=24/16" in repr(planner.plan)


# ---------------------------------------------------------------- torch path


def small_batch(head_dim: int, v_head_dim: int) -> Batch:
    """Decode, prefill and verify on one prefix of three pages."""
    table = torch.arange(4 * 8).view(4, 8).int()
    table[:, :3] = table[0, :3]
    shape = {"head_dim": head_dim, "v_head_dim": v_head_dim}
    return Batch(table, [100, 128, 70, 81], [1, 40, 6, 1], 16, 32, 8, 2, **shape)


@pytest.mark.parametrize("rule", ["causal", "tree", "window", "sinks"])
def test_narrow_values(rule: str) -> None:
    """NaN in the columns of a wider pool that are not V's, and in `out`."""
    batch = small_batch(24, 16)
    q, k, v = batch.tensors()
    options: dict[str, Any] = {
        "causal": {},
        "tree": {"tree_mask": batch.tree_mask()},
        "window": {"window": (9, 0)},
        "sinks": {"sinks": torch.randn(8)},
    }[rule]
    wide = torch.full((*v.shape[:3], 40), torch.nan)
    wide[..., 24:] = v
    plan, out = batch.plan(fold=False), torch.full((len(q), 8, 16), torch.nan)
    assert plan.num_partial_tokens > 0
    expected, lse = paged_attention_reference(q, k, v, batch.layout, batch.q_lens, **options)
    assert expected.shape == (len(q), 8, 16)
    returned, found = flashcore.paged_attention(
        q, k, wide[..., 24:], plan, out=out, return_lse=True, **options
    )
    assert returned is out
    assert_close(out, expected, torch.float32)
    assert_close(found, lse, torch.float32)


def test_values_do_not_depend_on_their_neighbours() -> None:
    """A column of V decides one column of the result: fewer columns are a part of all."""
    batch = small_batch(24, 24)
    q, k, v = batch.tensors()
    whole = flashcore.paged_attention(q, k, v, batch.plan())
    part = flashcore.paged_attention(q, k, v[..., :16], small_batch(24, 16).plan())
    torch.testing.assert_close(part, whole[..., :16])


def test_compile_and_export_know_the_shape() -> None:
    batch = small_batch(24, 16)
    q, k, v = batch.tensors()
    plan = batch.plan()
    compiled = torch.compile(
        lambda q: flashcore.paged_attention(q, k, v, plan) + 1, fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(q), flashcore.paged_attention(q, k, v, plan) + 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"v_pages": (32, 16, 2, 24)}, r"v_pages must have .* v_head_dim\] = \[any, 16, 2, 16\]"),
        ({"k_pages": (32, 16, 2, 16)}, r"k_pages must have .* head_dim\] = \[any, 16, 2, 24\]"),
        ({"out": (48, 8, 24)}, r"out must have \[total_q, num_q_heads, v_head_dim\] \(48, 8, 16\)"),
        ({"q": (48, 8, 16)}, r"q must have the plan's .* = \(48, 8, 24\)"),
    ],
)
def test_shapes_are_told_apart(change: dict[str, tuple[int, ...]], message: str) -> None:
    batch = small_batch(24, 16)
    q, k, v = batch.tensors()
    given: dict[str, Any] = {"q": q, "k_pages": k, "v_pages": v, "plan": batch.plan()}
    given |= {name: torch.zeros(shape) for name, shape in change.items()}
    with pytest.raises(ValueError, match=message):
        flashcore.paged_attention(**given)


# ---------------------------------------------------------------- launches


class Recorder:
    """Takes the place of the compiled kernels."""

    def __init__(self) -> None:
        self.configs: list[Any] = []
        self.calls: list[tuple[Any, ...]] = []

    def function(self, config: Any) -> Any:
        self.configs.append(config)
        return lambda *arguments: self.calls.append(arguments)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """CPU tensors pass for tensors of a Hopper GPU of 132 SMs."""
    recorder = Recorder()
    scratch = torch.zeros(2, dtype=torch.int32)
    monkeypatch.setattr(launch_paged, "_function", recorder.function)
    monkeypatch.setattr(launch_paged, "sm_count", lambda device: 132)
    monkeypatch.setattr(launch_paged, "scheduler_scratch", lambda index: scratch)
    monkeypatch.setattr(launch_paged, "lasting_stream", lambda index: 0)
    monkeypatch.setattr(ops, "device_path", lambda device: DevicePath("hopper", ""))
    return recorder


def arguments(head_dim: int, v_head_dim: int, page_tokens: int = 64) -> dict[str, Any]:
    """Two sequences that decode, with a prefix that they share and one page of their own."""
    table = torch.tensor([[*range(40), 40], [*range(40), 41]], dtype=torch.int32)
    lengths = torch.full((2,), page_tokens * 41 - page_tokens // 2)
    plan = flashcore.plan(
        flashcore.layout_from_page_table(table, lengths, page_tokens=page_tokens),
        num_q_heads=8,
        num_kv_heads=2,
        head_dim=head_dim,
        v_head_dim=v_head_dim,
        page_tokens=page_tokens,
        tile_m=64,
        fold=False,
    )
    pool = (42, page_tokens, 2)
    k, v = (torch.zeros(*pool, d, dtype=torch.bfloat16) for d in (head_dim, v_head_dim))
    q = torch.zeros(2, 8, head_dim, dtype=torch.bfloat16)
    return {"q": q, "k_pages": k, "v_pages": v, "plan": plan}


@pytest.mark.parametrize("dims", [(80, 80), (192, 128)])
def test_launch_has_both_dims(recorder: Recorder, dims: tuple[int, int]) -> None:
    given = arguments(*dims)
    out, lse = flashcore.paged_attention(**given, return_lse=True)
    attention, merge = recorder.configs
    assert (attention.head_dim, attention.v_head_dim) == dims
    assert isinstance(merge, MergeConfig)
    assert merge.head_dim == dims[1]
    assert out.shape == (2, 8, dims[1])
    assert recorder.calls[0][5].shape == (given["plan"].num_partial_tokens, 8, dims[1])
    assert recorder.calls[0][-5] == 1.0 / math.sqrt(dims[0])
    assert lse.shape == (2, 8)
    into = torch.zeros_like(out)
    assert flashcore.paged_attention(**given, out=into) is into


@needs_dsl
@no_gpu
@pytest.mark.parametrize(
    ("dims", "page_tokens", "fp8"),
    [((80, 80), 1, False), ((192, 128), 64, False), ((80, 80), 1, True), ((192, 128), 64, True)],
)
def test_compiled_functions_take_what_the_launch_passes(
    recorder: Recorder, dims: tuple[int, int], page_tokens: int, fp8: bool
) -> None:
    """They check their arguments before they ask for a driver, which is not there; a remembered
    launch relies on it that rows of other widths are refused."""
    given = arguments(*dims, page_tokens)
    if fp8:
        given |= {name: given[name].to(torch.float8_e4m3fn) for name in ("k_pages", "v_pages")}
        given |= {"k_scale": torch.ones(()), "v_scale": torch.ones(4)[::2]}
    flashcore.paged_attention(**given)
    cache = KernelCache.open()
    for family, config, call in zip((PAGED, MERGE), recorder.configs, recorder.calls, strict=True):
        compiled = cache.function(Kernel(family, config))
        with pytest.raises(RuntimeError, match="InsufficientDriver"):
            compiled(*pretend(call))
        rows = (0, 1, 2, 3, 5) if family is PAGED else (0, 2)
        for place in rows:
            wrong = list(call)
            wrong[place] = torch.cat([wrong[place], wrong[place][..., :8]], -1)
            with pytest.raises((ValueError, TypeError)):
                compiled(*pretend(tuple(wrong)))
        if family is PAGED and fp8:
            scale = list(Paged._fields).index("k_scale")
            for wrong_scale in (call[scale].double(), torch.ones(3), None):
                with pytest.raises((ValueError, TypeError)):
                    compiled(*pretend((*call[:scale], wrong_scale, *call[scale + 1 :])))


# ---------------------------------------------------------------- compiled code


# Every tile width, by boxes and by gathered rows, with rules; among `shipped_kernels` are more.
@needs_dsl
@needs_disassembler
@pytest.mark.parametrize(
    ("dims", "page_tokens", "tile_m", "rules"),
    [
        ((8, 8), 1, 128, ()),
        ((72, 72), 64, 128, ()),
        ((96, 96), 1, 128, ("window", "softcap", "sinks")),
        ((120, 120), 64, 128, ("tree",)),
        ((192, 128), 64, 128, ("window", "sinks")),
        ((192, 192), 1, 128, ("tree", "window", "softcap", "sinks")),
        ((200, 200), 64, 64, ("tree",)),
        ((248, 248), 1, 128, ()),
        ((256, 64), 16, 64, ()),
    ],
)
def test_padded_kernels_pass_the_gates(
    dims: tuple[int, int], page_tokens: int, tile_m: int, rules: tuple[str, ...]
) -> None:
    features = dict.fromkeys(rules, True)
    config = paged.choose(
        PagedCall("bf16", dims[0], page_tokens, 4, v_head_dim=dims[1], **features), tile_m
    )
    verdict = check_kernel(Kernel(PAGED, config), default_folder(), detect_target())
    assert verdict.violations == []
    assert verdict.resources is not None
    # The tile of the end, masked ones, plain ones, and masked ones again below a window; each with
    # the PV of a tile before it, and at the end the last one's.
    copies = 4 if config.window else 3
    products = copies * (config.k_steps + config.tile_n // 16)
    assert verdict.resources.count("HGMMA") == products


@needs_dsl
@needs_disassembler
@pytest.mark.parametrize("head_dim", [8, 80, 200])
@pytest.mark.parametrize("warps", [1, 8])
def test_padded_merges_pass_the_gates(head_dim: int, warps: int) -> None:
    config = MergeConfig("bf16", head_dim, warps_per_row=warps, device_counts=True)
    assert check_kernel(Kernel(MERGE, config), default_folder(), detect_target()).violations == []


@needs_dsl
def test_lanes_of_a_merge_have_every_column_once() -> None:
    from flashcore.sm90.kernels.merge import LANES, Merge

    for dim in DIMS:
        merge = Merge(MergeConfig("bf16", dim))
        assert merge.columns * merge.lanes == dim
        assert merge.lanes <= LANES
        assert merge.columns in (2, 4, 8)  # whole vectors of fp32 and of 16 bits
