"""Items of few rows on fp8 pages on a Hopper GPU, against the float64 reference and beside the same
items in stages of fp16. Rows that no sequence reads hold NaN codes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import flashcore
from flashcore.contract.counts import Fault
from flashcore.contract.work import Work
from flashcore.problem import KVPool
from flashcore.reference import paged_attention_reference
from flashcore.sm90.available import available
from tests.cases import ABSURD_PAGE, Batch, small_scale
from tests.compare import assert_close, relative_error
from tests.device_plan_cases import inputs, planner_for
from tests.fp8 import FORMATS, chosen, fp8_tensors, in_fp16, scales
from tests.gpu.test_device_attention_gpu import capacities, on_gpu
from tests.gpu.test_fp8_gpu import attend, check
from tests.gpu.test_paged_gpu import batch_of, rules

pytestmark = pytest.mark.skipif(
    not available("cuda")[0], reason=f"no Hopper GPU: {available('cuda')[1]}"
)

BF16, FP16 = torch.bfloat16, torch.float16
LIMIT = {BF16: 2e-3, FP16: 4e-4}  # of the relative error, where values of V are about 1


def rows_of(batch: Batch, **plan: Any) -> list[int]:
    """Packed rows of each item."""
    rows: list[int] = batch.plan(**plan).work[:, int(Work.NUM_ROWS)].tolist()
    return rows


# The smallest first: what else fails fails here, too.
@pytest.mark.parametrize("fp8", FORMATS)
@pytest.mark.parametrize("page_tokens", [64, 1, 2, 4, 8, 16, 32, 128])
def test_decode(fp8: str, page_tokens: int) -> None:
    batch = batch_of(1, page_tokens, (8, 2), 128, 1, 5)
    assert min(rows_of(batch, tile_m=64)) == 4
    q, k, v = fp8_tensors(batch, FORMATS[fp8], FP16)
    out, lse = attend(batch, q.cuda(), KVPool(k.cuda(), v.cuda()), "causal", tile_m=64)
    expected, expected_lse = paged_attention_reference(q, k, v, batch.layout, batch.q_lens)
    assert_close(out.cpu(), expected, FP16)
    assert relative_error(out.cpu(), expected) <= LIMIT[FP16]
    seen = torch.isfinite(expected_lse)
    torch.testing.assert_close(lse.cpu()[seen].double(), expected_lse[seen], rtol=1e-4, atol=1e-4)


# Groups of 1 to 32 heads, and some query tokens: every number of rows up to 32 and beyond.
@pytest.mark.parametrize("longest_q", [1, 6])
@pytest.mark.parametrize("heads", [(2, 2), (8, 2), (7, 1), (16, 2), (24, 2), (32, 2), (64, 2)])
def test_groups(heads: tuple[int, int], longest_q: int) -> None:
    batch = batch_of(2, 64, heads, 128, longest_q, 9)
    check(batch, "e4m3", "causal", "heads", BF16, tile_m=64, num_workers=13)


@pytest.mark.parametrize("few_rows", [8, 16, 32])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("page_tokens", [64, 1])
def test_shapes(few_rows: int, head_dim: int, page_tokens: int) -> None:
    batch = batch_of(4, page_tokens, (8, 2), head_dim, 9, 12)
    with chosen(few_rows=few_rows):
        check(batch, "e4m3", "causal", "one", BF16, tile_m=64, num_workers=13)


@pytest.mark.parametrize("rule", ["full", "window", "softcap_sinks", "window_softcap_sinks"])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("page_tokens", [32, 1])
def test_rules(rule: str, head_dim: int, page_tokens: int) -> None:
    for longest_q in (1, 5):
        batch = batch_of(5 + longest_q, page_tokens, (8, 2), head_dim, longest_q, 9)
        check(batch, "e5m2", rule, "heads", BF16, tile_m=64, num_workers=13)


# Many items for each CTA, of 1 to 14 tiles and of 1 to 64 rows: rings are left and taken up again.
@pytest.mark.parametrize(("page_tokens", "share"), [(64, True), (64, False), (1, False)])
@pytest.mark.parametrize("longest_q", [1, 70])
def test_both_kinds_of_items_in_a_row(page_tokens: int, share: bool, longest_q: int) -> None:
    batch = batch_of(7, page_tokens, (8, 8), 128, longest_q, 150)
    options: dict[str, Any] = {"tile_m": 64, "share": share, "num_workers": 100}
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    rows = rows_of(batch, **options)
    assert len(rows) > 2 * sms
    assert longest_q == 1 or min(rows) <= 8 < 32 < max(rows)
    q, k, v = (x.cuda() for x in fp8_tensors(batch, FORMATS["e4m3"], BF16))
    got = attend(batch, q, KVPool(k, v), "causal", **options)
    with in_fp16():
        expected = attend(batch, q, KVPool(k, v), "causal", **options)
    assert_close(got[0].cpu(), expected[0].cpu().double(), BF16)
    seen = torch.isfinite(expected[1])
    assert torch.equal(torch.isfinite(got[1]), seen)
    torch.testing.assert_close(got[1][seen], expected[1][seen], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("page_tokens", [64, 1])
def test_sequences_of_a_token(page_tokens: int) -> None:
    lengths = [1, 0, 1, page_tokens, page_tokens + 1, 1]
    table = torch.arange(2 * len(lengths)).view(len(lengths), 2).int()
    batch = Batch(table, lengths, [1] * 6, page_tokens, 12, 8, 2, head_dim=128, seed=3)
    check(batch, "e4m3", "causal", "heads", BF16, tile_m=64)


@pytest.mark.parametrize("rule", ["causal", "window"])
@pytest.mark.parametrize("page_tokens", [64, 1])
def test_planned_on_the_device(page_tokens: int, rule: str) -> None:
    batch = batch_of(6, page_tokens, (8, 2), 128, 3, 9)
    q, k, v = (x.cuda() for x in fp8_tensors(batch, FORMATS["e4m3"], BF16))
    room = replace(capacities(batch), max_gathered=50_000, max_partials=50_000)
    with small_scale():
        planner = planner_for(batch, room, "cuda", num_workers=13, tile_m=64)
        plan = planner.update(*inputs(batch, "cuda"))
    assert plan.faults() == Fault(0)
    options, factors = rules(batch, rule), scales(batch, "heads")
    out = flashcore.paged_attention(q, k, v, plan, **on_gpu(options), **on_gpu(factors))
    expected, _ = paged_attention_reference(
        *fp8_tensors(batch, FORMATS["e4m3"], BF16), batch.layout, batch.q_lens, **options, **factors
    )
    assert_close(out.cpu(), expected, BF16)


@pytest.mark.parametrize("fp8", FORMATS)
def test_what_is_not_finite_reaches_the_rows_that_see_it_alone(fp8: str) -> None:
    """A run that two sequences share, of which the window of the longer one hides a part."""
    lengths = [160, 210]
    table = torch.tensor([[*range(10), *4 * [ABSURD_PAGE]], [*range(14)]]).int()
    batch = Batch(table, lengths, [1, 1], 16, 14, 4, 2, head_dim=128, seed=5)
    assert max(rows_of(batch, tile_m=64, num_workers=1)) == 4
    q, k, v = (x.cuda() for x in fp8_tensors(batch, FORMATS[fp8], FP16))
    clean = attend(batch, q, KVPool(k, v), "window", tile_m=64, num_workers=1)
    for code in {"e4m3": (0x7F, 0xFF), "e5m2": (0x7C, 0xFC, 0x7F)}[fp8]:
        bad = v.clone()
        bad.view(torch.uint8)[6, 3, 1, 17] = code  # key 99: the first sequence's alone
        out, lse = attend(batch, q, KVPool(k, bad), "window", tile_m=64, num_workers=1)
        assert torch.equal(lse, clean[1])
        assert torch.equal(out[1], clean[0][1])
        value = bad[6, 3, 1, 17].float()
        hit = torch.zeros_like(out[0], dtype=torch.bool)
        hit[2:, 17] = True
        assert torch.equal(out[0][~hit], clean[0][0][~hit])
        expected = torch.full_like(out[0][hit], float(value))
        torch.testing.assert_close(out[0][hit], expected, equal_nan=True)


@pytest.mark.parametrize("page_tokens", [1, 64])
def test_same_bits_every_time(page_tokens: int) -> None:
    batch = batch_of(5, page_tokens, (8, 2), 128, 4, 12)
    q, k, v = (x.cuda() for x in fp8_tensors(batch, FORMATS["e4m3"], BF16))
    assert np.ptp(rows_of(batch, tile_m=64, num_workers=132)) > 8
    plan = {"tile_m": 64, "num_workers": 132}
    first = attend(batch, q, KVPool(k, v), "causal", **plan)
    for _ in range(100):
        again = attend(batch, q, KVPool(k, v), "causal", **plan)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
