"""Attention on fp8 pages on a Hopper GPU: bit for bit the fp16 kernel on what the pages hold, where
items of few rows are not by themselves (test_few_rows_gpu.py), and against the float64 reference.
Rows that no sequence reads hold NaN codes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import flashcore
from flashcore.contract.counts import Fault
from flashcore.problem import Extras, KVPool, Rules
from flashcore.reference import paged_attention_reference
from flashcore.sm90.available import available
from flashcore.sm90.launch.paged import paged_attention
from tests.cases import Batch, small_scale
from tests.compare import assert_close, assert_lse_close
from tests.device_plan_cases import inputs, planner_for
from tests.fp8 import FORMATS, fp8_tensors, in_fp16, scales
from tests.gpu.test_batch_invariant_gpu import family
from tests.gpu.test_device_attention_gpu import capacities, on_gpu
from tests.gpu.test_paged_dims_gpu import batch_with
from tests.gpu.test_paged_gpu import batch_of, rules

pytestmark = pytest.mark.skipif(
    not available("cuda")[0], reason=f"no Hopper GPU: {available('cuda')[1]}"
)

BF16, FP16 = torch.bfloat16, torch.float16
K_SCALE, V_SCALE = 0.5, 4.0  # powers of two, by which fp16 is multiplied exactly


def attend(batch: Batch, q: Any, kv: KVPool, rule: str, **plan_options: Any):
    """(out, lse) of these tensors, all of them on the GPU."""
    plan = batch.plan(**plan_options).to("cuda")
    options = on_gpu(rules(batch, rule))
    extras = Extras(**{n: options.pop(n) for n in Extras._fields if n in options})
    of_scores = Rules.of(**{"scale": batch.head_dim**-0.5, "causal": True, **options})
    return paged_attention(q, kv, plan.planned, of_scores, extras)


def assert_same_bits(batch: Batch, fp8: str, rule: str, **plan_options: Any) -> None:
    """As the fp16 kernel on the pages in fp16, with scales that are powers of two."""
    q, k, v = (x.cuda() for x in fp8_tensors(batch, FORMATS[fp8]))
    factors = [torch.tensor(x, device="cuda") for x in (K_SCALE, V_SCALE)]
    with in_fp16():
        got = attend(batch, q, KVPool(k, v, *factors), rule, **plan_options)
    wide = KVPool(k.to(FP16) * K_SCALE, v.to(FP16) * V_SCALE)
    expected = attend(batch, q, wide, rule, **plan_options)
    for name, a, b in zip(("out", "lse"), got, expected, strict=True):
        differs = (a != b) & ~(a.isnan() & b.isnan())
        assert not differs.any(), f"{name}: {int(differs.sum())} of {a.numel()} differ"


def check(batch: Batch, fp8: str, rule: str, kind: str, dtype: torch.dtype, **plan: Any) -> None:
    """Against the reference, with the scales of `tests.fp8.scales`."""
    q, k, v = fp8_tensors(batch, FORMATS[fp8], dtype)
    factors = scales(batch, kind)
    expected = paged_attention_reference(
        q, k, v, batch.layout, batch.q_lens, **rules(batch, rule), **factors
    )
    pool = KVPool(k.cuda(), v.cuda(), **on_gpu(factors))
    out, lse = attend(batch, q.cuda(), pool, rule, **plan)
    assert_close(out.cpu(), expected[0], dtype)
    finite = torch.isfinite(expected[1])
    assert torch.equal(torch.isfinite(lse.cpu()), finite)
    torch.testing.assert_close(
        lse.cpu()[finite].double(), expected[1][finite], rtol=2e-3, atol=2e-3
    )


# The smallest first: what else fails fails here, too.
@pytest.mark.parametrize("fp8", FORMATS)
@pytest.mark.parametrize("page_tokens", [64, 1])
def test_decode(fp8: str, page_tokens: int) -> None:
    assert_same_bits(batch_of(1, page_tokens, (8, 2), 128, 1, 5), fp8, "causal", tile_m=64)


@pytest.mark.parametrize("tile_m", [64, 128])
@pytest.mark.parametrize(
    "rule", ["causal", "full", "window", "softcap_sinks", "tree", "everything"]
)
def test_rules(rule: str, tile_m: int) -> None:
    batch = batch_of(1, 32, (8, 2), 128, 9, 7)
    assert_same_bits(batch, "e4m3", rule, tile_m=tile_m, num_workers=13)


@pytest.mark.parametrize("longest_q", [1, 40])
@pytest.mark.parametrize("page_tokens", [1, 2, 4, 8, 16, 32, 64, 128])
def test_page_sizes(page_tokens: int, longest_q: int) -> None:
    batch = batch_of(2, page_tokens, (8, 2), 128, longest_q, 6)
    assert_same_bits(batch, "e4m3", "causal", tile_m=64)


# Every tile width and height, by boxes and by gathered rows, padded and not, V narrower than K.
DIMS = [
    ((64, 64), 64, 64, "everything"),
    ((64, 64), 64, 128, "causal"),
    ((64, 64), 1, 64, "causal"),
    ((64, 64), 1, 128, "causal"),
    ((80, 80), 64, 64, "causal"),
    ((80, 80), 1, 64, "window"),
    ((96, 96), 64, 64, "tree"),
    ((96, 96), 1, 64, "causal"),
    ((112, 112), 16, 128, "causal"),
    ((112, 112), 1, 64, "causal"),
    ((192, 128), 64, 64, "softcap_sinks"),
    ((192, 128), 1, 64, "causal"),
    ((192, 192), 64, 128, "causal"),
    ((128, 64), 64, 64, "causal"),
    ((256, 256), 64, 64, "window"),
    ((256, 256), 64, 128, "causal"),
    ((256, 256), 1, 64, "causal"),
    ((256, 256), 4, 128, "causal"),
]


@pytest.mark.parametrize("longest_q", [1, 40])
@pytest.mark.parametrize(("dims", "page_tokens", "tile_m", "rule"), DIMS)
def test_dims(
    dims: tuple[int, int], page_tokens: int, tile_m: int, rule: str, longest_q: int
) -> None:
    batch = batch_with(dims, page_tokens, longest_q)
    assert_same_bits(batch, "e4m3", rule, tile_m=tile_m, num_workers=13)


# Many items for each CTA, of 1 to 14 tiles: parts of tiles are taken in turn across items.
@pytest.mark.parametrize("page_tokens", [64, 1])
@pytest.mark.parametrize("tile_m", [64, 128])
def test_items_in_a_row(page_tokens: int, tile_m: int) -> None:
    batch = batch_of(7, page_tokens, (8, 8), 128, 1, 150)
    options = {"tile_m": tile_m, "share": False, "num_workers": 100}
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    assert len(batch.plan(**options).work) > 2 * sms
    assert_same_bits(batch, "e4m3", "causal", **options)


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("kind", ["none", "one", "heads", "mixed"])
@pytest.mark.parametrize("fp8", FORMATS)
def test_scales(fp8: str, kind: str, dtype: torch.dtype) -> None:
    check(batch_of(3, 64, (8, 2), 128, 5, 6), fp8, "causal", kind, dtype, tile_m=64)


@pytest.mark.parametrize("rule", ["softcap_sinks", "everything"])
def test_scales_under_rules(rule: str) -> None:
    batch = batch_of(4, 64, (8, 2), 128, 9, 6)
    check(batch, "e4m3", rule, "heads", BF16, tile_m=64, num_workers=13)


@pytest.mark.parametrize("page_tokens", [64, 1])
@pytest.mark.parametrize("longest_q", [1, 40])
def test_batch_invariant_plans(page_tokens: int, longest_q: int) -> None:
    batch = family(12, page_tokens, 128, longest_q)
    assert_same_bits(batch, "e4m3", "causal", batch_invariant=True, tile_m=64)


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_planned_on_the_device(batch_invariant: bool) -> None:
    batch = batch_with((128, 128), 64, 5)
    q, k, v = (x.cuda() for x in fp8_tensors(batch, FORMATS["e4m3"], BF16))
    room = replace(capacities(batch), max_gathered=50_000, max_partials=50_000)
    options: dict[str, Any] = {"tile_m": 64, "batch_invariant": batch_invariant}
    with small_scale():
        planner = planner_for(batch, room, "cuda", num_workers=13, **options)
        plan = planner.update(*inputs(batch, "cuda"))
    assert plan.faults() == Fault(0)
    factors = on_gpu(scales(batch, "heads"))
    out, lse = flashcore.paged_attention(q, k, v, plan, return_lse=True, **factors)
    expected, expected_lse = paged_attention_reference(
        *fp8_tensors(batch, FORMATS["e4m3"], BF16),
        batch.layout,
        batch.q_lens,
        **scales(batch, "heads"),
    )
    assert_close(out.cpu(), expected, BF16)
    finite = torch.isfinite(expected_lse)
    assert torch.equal(torch.isfinite(lse.cpu()), finite)


# K and V of one allocation, rows of all heads side by side, V in the order of the heads.
@pytest.mark.parametrize("page_tokens", [1, 64])
def test_strides(page_tokens: int) -> None:
    batch = batch_of(7, page_tokens, (8, 2), 128, 3, 6)
    q, k, v = (x.cuda() for x in fp8_tensors(batch, FORMATS["e4m3"]))
    expected = attend(batch, q, KVPool(k, v), "causal", tile_m=64)
    nan = torch.full((batch.num_pages, 2, page_tokens, 3, 128), 0x7F, dtype=torch.uint8)
    pool = nan.cuda().view(k.dtype)
    pool[:, 0, :, :2] = k
    by_head = torch.full((batch.num_pages, 2, page_tokens, 144), 0x7F, dtype=torch.uint8)
    by_head = by_head.cuda().view(k.dtype)
    by_head[..., :128] = v.transpose(1, 2)
    apart = KVPool(pool[:, 0, :, :2], by_head[..., :128].transpose(1, 2))
    got = attend(batch, q, apart, "causal", tile_m=64)
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


def test_a_graph_reads_the_scales_at_each_replay() -> None:
    batch = batch_of(9, 64, (8, 2), 128, 1, 6)
    q, k, v = (x.cuda() for x in fp8_tensors(batch, FORMATS["e4m3"], BF16))
    plan = batch.plan(tile_m=64).to("cuda")
    k_scale, v_scale = torch.ones((), device="cuda"), torch.ones(2, device="cuda")
    factors = {"k_scale": k_scale, "v_scale": v_scale}
    flashcore.paged_attention(q, k, v, plan, **factors)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = flashcore.paged_attention(q, k, v, plan, return_lse=True, **factors)
    for one, other in ((1.0, 1.0), (0.3, 2.5)):
        k_scale.fill_(one)
        v_scale.copy_(torch.tensor([other, 2 * other]))
        graph.replay()
        expected = flashcore.paged_attention(q, k, v, plan, return_lse=True, **factors)
        assert torch.equal(out, expected[0])
        assert torch.equal(lse, expected[1])
    none = flashcore.paged_attention(q, k, v, plan)
    ones = flashcore.paged_attention(q, k, v, plan, k_scale=torch.ones(2, device="cuda"))
    assert torch.equal(none, ones)


def test_queries_beyond_fp16_become_its_largest() -> None:
    batch = batch_of(9, 64, (8, 2), 128, 1, 6)
    q, k, v = fp8_tensors(batch, FORMATS["e4m3"], BF16)
    clamped = q.to(FP16)
    q[0, 0, 0], q[1, 1, 1] = 1e30, -1e30
    clamped[0, 0, 0], clamped[1, 1, 1] = 65504.0, -65504.0
    pool = KVPool(k.cuda(), v.cuda())
    got, expected = (attend(batch, x.cuda(), pool, "causal", tile_m=64) for x in (q, clamped))
    assert_close(got[0].cpu(), expected[0].cpu().double(), BF16)
    assert_lse_close(got[1].cpu(), expected[1].cpu())


@pytest.mark.parametrize("page_tokens", [1, 64])
def test_same_bits_every_time(page_tokens: int) -> None:
    batch = batch_of(5, page_tokens, (8, 2), 128, 4, 12)
    q, k, v = (x.cuda() for x in fp8_tensors(batch, FORMATS["e4m3"], BF16))
    plan = {"tile_m": 64, "num_workers": 132}
    first = attend(batch, q, KVPool(k, v), "causal", **plan)
    for _ in range(100):
        again = attend(batch, q, KVPool(k, v), "causal", **plan)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
