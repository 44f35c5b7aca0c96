"""fp8 pages expanded before attention on a Hopper GPU: bit for bit what the converting kernel makes
of them, by plans of the host and of the device. Rows that no sequence reads hold NaN codes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import flashcore
from flashcore.planner import expansion
from flashcore.planner.expansion import Way
from flashcore.problem import KVPool, Problem
from flashcore.sm90.available import available
from flashcore.sm90.device_planner import DevicePlanner
from flashcore.sm90.expansion_scratch import ExpansionScratch
from tests.cases import Batch
from tests.expand_cases import ExpandCase, cases, differences, pools_of, targets_of
from tests.expansion_cases import ABSURD, assert_expansion, at_capacity, plans, room
from tests.fp8 import FORMATS, fp8_tensors, in_fp16, scales
from tests.gpu.test_batch_invariant_gpu import family
from tests.gpu.test_device_attention_gpu import on_gpu
from tests.gpu.test_fp8_gpu import attend
from tests.gpu.test_paged_dims_gpu import batch_with
from tests.gpu.test_paged_gpu import batch_of

pytestmark = pytest.mark.skipif(
    not available("cuda")[0], reason=f"no Hopper GPU: {available('cuda')[1]}"
)

BF16, FP16 = torch.bfloat16, torch.float16


def assert_same_bits(
    batch: Batch, fp8: str, rule: str, kind: str, dtype: torch.dtype, **options: Any
) -> None:
    """With the scales of `tests.fp8.scales`."""
    q, k, v = (x.cuda() for x in fp8_tensors(batch, FORMATS[fp8], dtype))
    pool = KVPool(k, v, **on_gpu(scales(batch, kind)))
    with in_fp16():
        expanded, converted = (
            attend(batch, q, pool, rule, itemsize=1, expand=way, **options) for way in (True, False)
        )
    for name, a, b in zip(("out", "lse"), expanded, converted, strict=True):
        differs = (a != b) & ~(a.isnan() & b.isnan())
        assert not differs.any(), f"{name}: {int(differs.sum())} of {a.numel()} differ"


# ---------------------------------------------------------------- the copy


@pytest.mark.parametrize("case", cases(), ids=str)
def test_every_code_is_itself(case: ExpandCase) -> None:
    from flashcore.expand_kernel import expand

    pools = pools_of(case, "cuda")
    pages = torch.tensor([*case.picked, 99], dtype=torch.int32, device="cuda")
    count = torch.tensor([len(case.picked)], dtype=torch.int32, device="cuda")
    for _ in range(2):  # the second time as remembered
        targets = targets_of(pools, 4)
        expand(pools, pages, count, targets)
        for target, pool in zip(targets, pools, strict=True):
            assert differences(target.cpu(), pool.cpu(), case.picked) == 0


def test_pools_beyond_two_to_the_31_elements() -> None:
    from flashcore.expand_kernel import expand

    pool = torch.zeros(20_000, 128, 8, 128, dtype=torch.uint8, device="cuda")
    pool[-1] = torch.randint(256, pool.shape[1:], device="cuda").to(torch.uint8)
    narrow = pool.view(torch.float8_e5m2)
    pages = torch.tensor([19_999, 3], dtype=torch.int32, device="cuda")
    targets = targets_of((narrow, narrow), 2)
    expand((narrow, narrow), pages, torch.tensor([2], dtype=torch.int32, device="cuda"), targets)
    picked = pool[[19_999, 3]].cpu().view(narrow.dtype)
    for target in targets:
        assert differences(target.cpu(), picked, (0, 1)) == 0


# ---------------------------------------------------------------- plans of the host


@pytest.mark.parametrize("tile_m", [64, 128])
@pytest.mark.parametrize(
    "rule", ["causal", "full", "window", "softcap_sinks", "tree", "everything"]
)
def test_rules(rule: str, tile_m: int) -> None:
    batch = batch_of(1, 32, (8, 2), 128, 40, 7)
    assert_same_bits(batch, "e4m3", rule, "heads", BF16, tile_m=tile_m, num_workers=13)


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("fp8", FORMATS)
@pytest.mark.parametrize("kind", ["none", "one", "mixed"])
def test_scales(fp8: str, kind: str, dtype: torch.dtype) -> None:
    assert_same_bits(batch_of(3, 64, (8, 2), 128, 60, 6), fp8, "causal", kind, dtype, tile_m=128)


# Boxes and gathered rows, every tile width, padded and not, V narrower than K.
@pytest.mark.parametrize("page_tokens", [1, 8, 16, 128])
@pytest.mark.parametrize("dims", [(64, 64), (80, 80), (128, 128), (192, 128), (256, 256)])
def test_dims(dims: tuple[int, int], page_tokens: int) -> None:
    batch = batch_with(dims, page_tokens, 40)
    assert_same_bits(batch, "e4m3", "causal", "heads", BF16, tile_m=128, num_workers=13)


@pytest.mark.parametrize("page_tokens", [64, 1])
def test_batch_invariant_plans(page_tokens: int) -> None:
    batch = family(12, page_tokens, 128, 40)
    assert_same_bits(batch, "e4m3", "causal", "heads", BF16, batch_invariant=True, tile_m=128)


def test_strides_of_a_cache_of_one_tensor() -> None:
    """K and V side by side in a row, heads outside of tokens, as vLLM has them."""
    batch = batch_of(7, 16, (8, 2), 128, 40, 6)
    q, k, v = (x.cuda() for x in fp8_tensors(batch, FORMATS["e4m3"]))
    both = torch.cat([k.view(torch.uint8), v.view(torch.uint8)], -1).transpose(1, 2).contiguous()
    rows = both.view(k.dtype).transpose(1, 2)
    options: dict[str, Any] = {"itemsize": 1, "expand": True, "tile_m": 64}
    expected = attend(batch, q, KVPool(k, v), "causal", **options)
    got = attend(batch, q, KVPool(rows[..., :128], rows[..., 128:]), "causal", **options)
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


def test_layers_after_each_other_and_in_a_graph() -> None:
    batch = batch_of(9, 64, (8, 2), 128, 60, 6)
    layers = [
        [x.cuda() for x in fp8_tensors(replace(batch, seed=seed), FORMATS["e4m3"], BF16)]
        for seed in (1, 2, 3)
    ]
    ways = {
        expand: batch.plan(itemsize=1, expand=expand, tile_m=64).to("cuda")
        for expand in (True, False)
    }
    scale = torch.ones((), device="cuda")

    def run(expand: bool) -> list[torch.Tensor]:
        return [
            flashcore.paged_attention(*layer, ways[expand], k_scale=scale, v_scale=scale)
            for layer in layers
        ]

    with in_fp16():
        expected = run(False)
    for _ in range(2):  # the second time as remembered
        assert all(torch.equal(a, b) for a, b in zip(run(True), expected, strict=True))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run(True)
    for _ in range(3):
        for out in got:
            out.zero_()
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


# ---------------------------------------------------------------- plans of the device


def test_the_device_finds_what_the_host_finds() -> None:
    from flashcore.expand_plan_kernel import plan_expansion

    for plan in plans():
        pages = expansion.EXPANSION_BYTES // expansion.expanded_bytes(1, plan.problem)
        tensors, counts = at_capacity(plan, "cuda")
        filled = room(plan, pages, "cuda")
        scratch = torch.full((plan.num_pages,), ABSURD, dtype=torch.int32, device="cuda")
        for _ in range(20):
            plan_expansion(tensors, counts, filled, scratch, plan.tile_m)
            assert_expansion(filled, plan, counts)


HEADS, KV_HEADS, DIM, PAGE = 16, 2, 128, 64


def planner_of(expanding: ExpansionScratch | None, pages: int, **options: Any) -> DevicePlanner:
    return DevicePlanner(
        flashcore.Capacities(64, max_entries=4096, max_q=4096),
        num_pages=pages,
        num_q_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=DIM,
        page_tokens=PAGE,
        itemsize=1,
        tile_m=128,
        expansion=expanding,
        **options,
    )


def batch_on_gpu(kv_lens: list[int], q_lens: list[int], shared: int, pages: int) -> Any:
    """Tables of sequences with so many pages in common; absurd ids past each."""
    widest = max(-(-n // PAGE) for n in kv_lens)
    ids = torch.randperm(pages, generator=torch.Generator().manual_seed(4)).int()
    table, used = torch.full((len(kv_lens), widest), 2_147_480_000, dtype=torch.int32), shared
    for row, length in enumerate(kv_lens):
        count = -(-length // PAGE)
        own = max(count - shared, 0)
        table[row, :count] = torch.cat([ids[:shared], ids[used : used + own]])[:count]
        used += own
    lengths = (torch.tensor(n, dtype=torch.int32).cuda() for n in (kv_lens, q_lens))
    return (table.cuda(), *lengths)


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_planned_on_the_device(batch_invariant: bool) -> None:
    """A long prefill is expanded, a longer one and a decode are not, by one graph."""
    pages, generator = 400, torch.Generator("cuda").manual_seed(5)
    k, v = (
        torch.empty(pages, PAGE, KV_HEADS, DIM, device="cuda").normal_(generator=generator)
        for _ in range(2)
    )
    pool = [x.to(torch.float8_e4m3fn) for x in (k, v)]
    q = torch.empty(2048, HEADS, DIM, device="cuda").normal_(generator=generator).to(BF16)
    per_page = expansion.expanded_bytes(1, Problem(HEADS, KV_HEADS, DIM, DIM, PAGE, 1))
    scratch = ExpansionScratch(200 * per_page, num_pages=pages)
    expanding = planner_of(scratch, pages, batch_invariant=batch_invariant)
    converting = planner_of(None, pages, batch_invariant=batch_invariant)
    assert expanding.plan.expansion is not None
    cases = {
        Way.EXPANDED: batch_on_gpu([8192, 4096], [1024, 1024], 20, pages),
        Way.NO_ROOM: batch_on_gpu([16_384, 4096], [1024, 1024], 5, pages),
        Way.CONVERTED: batch_on_gpu([4096, 9000], [1, 1], 20, pages),
    }
    scales = {"k_scale": torch.tensor(0.5, device="cuda"), "v_scale": torch.rand(2).cuda() + 0.5}
    static = [torch.zeros(2, 256, dtype=torch.int32, device="cuda")]
    static += [torch.zeros(2, dtype=torch.int32, device="cuda") for _ in range(2)]

    def fill(case: Any) -> None:
        for there, given in zip(static, case, strict=True):
            there.zero_()
            there[..., : given.shape[-1]] = given

    def run(planner: DevicePlanner) -> Any:
        plan = planner.update(*static)
        return flashcore.paged_attention(q, *pool, plan, return_lse=True, **scales)

    fill(cases[Way.EXPANDED])
    run(expanding)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(expanding)
    for way, case in [*cases.items(), *cases.items()]:
        fill(case)
        expected = run(converting)
        eager = run(expanding)
        assert expanding.plan.faults() == 0
        assert expanding.plan.expansion.outcome.tolist()[0] == way
        for a, b in zip(eager, expected, strict=True):
            assert torch.equal(a, b), way
        graph.replay()
        for a, b in zip(captured, expected, strict=True):
            assert torch.equal(a, b), way
