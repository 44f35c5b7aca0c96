"""Head dims between the tile widths, and V narrower than K, on a Hopper GPU against the reference.

Nothing past a row's own columns may be read or written: q, K and V lie in wider tensors of NaN, and
the result in one whose other columns must stay as they are. Shared memory is full of NaN, too.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import flashcore
from flashcore.contract.counts import Count, Fault
from flashcore.reference import paged_attention_reference
from flashcore.sm90.available import available
from tests.cases import Batch, small_scale
from tests.compare import assert_close
from tests.device_plan_cases import inputs, planner_for
from tests.gpu.test_device_attention_gpu import capacities, on_gpu
from tests.gpu.test_paged_gpu import batch_of, rules

pytestmark = pytest.mark.skipif(
    not available("cuda")[0], reason=f"no Hopper GPU: {available('cuda')[1]}"
)

BF16, FP16 = torch.bfloat16, torch.float16
GUARD = 7.0

# (head_dim, v_head_dim, page_tokens, tile_m, rule). A kernel each, so not every combination: every
# tile width by boxes and by gathered rows, padded by 8 (half a product) and by more, both heights,
# every rule somewhere. 256/64 takes all the shared memory that two CTAs have.
KERNELS = [
    (8, 8, 1, 64, "causal"),
    (40, 40, 16, 64, "causal"),
    (72, 72, 64, 64, "window"),
    (72, 72, 1, 128, "causal"),
    (80, 80, 64, 64, "causal"),
    (80, 80, 1, 64, "everything"),
    (80, 80, 16, 128, "causal"),
    (96, 96, 64, 128, "causal"),
    (96, 96, 1, 64, "softcap_sinks"),
    (112, 112, 64, 64, "everything"),
    (112, 112, 1, 64, "causal"),
    (120, 120, 16, 64, "softcap_sinks"),
    (192, 192, 64, 128, "tree"),
    (192, 192, 1, 64, "window"),
    (200, 200, 16, 64, "causal"),
    (248, 248, 1, 128, "causal"),
    (192, 128, 64, 64, "window"),
    (192, 128, 1, 64, "causal"),
    (192, 128, 16, 128, "everything"),
    (128, 64, 64, 64, "causal"),
    (128, 64, 1, 128, "tree"),
    (256, 64, 16, 64, "full"),
]


def batch_with(dims: tuple[int, int], page_tokens: int, longest_q: int, seed: int = 11) -> Batch:
    batch = batch_of(seed, page_tokens, (8, 2), dims[0], longest_q, 7)
    return replace(batch, v_head_dim=dims[1])


def widened(rows: torch.Tensor) -> torch.Tensor:
    """The same rows on the GPU, in a tensor with eight more columns, of NaN."""
    dim = rows.shape[-1]
    wide = torch.full((*rows.shape[:-1], dim + 8), torch.nan, dtype=rows.dtype, device="cuda")
    wide[..., :dim] = rows.cuda()
    return wide[..., :dim]


def leave_nan_in_shared_memory() -> None:
    """On every SM, for the next kernel: what it does not write itself, it may find."""
    x = torch.full((1, 2048, 17, 256), torch.nan, dtype=BF16, device="cuda")
    flashcore.attention(x, x, x)


def check(
    batch: Batch, dtype: torch.dtype, rule: str, plan: Any, tensors: tuple[torch.Tensor, ...]
) -> None:
    options = rules(batch, rule)
    expected, expected_lse = paged_attention_reference(
        *tensors, batch.layout, batch.q_lens, **options
    )
    q, k, v = (widened(x) for x in tensors)
    v_dim = v.shape[-1]
    results = []
    for _ in range(2):
        room = torch.full((*q.shape[:2], v_dim + 8), GUARD, dtype=dtype, device="cuda")
        out = room[..., :v_dim].fill_(torch.nan)
        leave_nan_in_shared_memory()
        returned, lse = flashcore.paged_attention(
            q, k, v, plan, out=out, return_lse=True, **on_gpu(options)
        )
        assert returned is out
        assert (room[..., v_dim:] == GUARD).all()
        results.append((out.clone(), lse))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    out, lse = (x.cpu() for x in results[0])
    assert_close(out, expected, dtype)
    finite = torch.isfinite(expected_lse)
    assert torch.equal(torch.isfinite(lse), finite)
    torch.testing.assert_close(lse[finite].double(), expected_lse[finite], rtol=2e-3, atol=2e-3)


# Decode, and new tokens enough for several row blocks; runs that are split, so that results merge.
@pytest.mark.parametrize("longest_q", [1, 40])
@pytest.mark.parametrize(("head_dim", "v_head_dim", "page_tokens", "tile_m", "rule"), KERNELS)
def test_dims(
    head_dim: int, v_head_dim: int, page_tokens: int, tile_m: int, rule: str, longest_q: int
) -> None:
    batch = batch_with((head_dim, v_head_dim), page_tokens, longest_q)
    # 112 query tokens on pages of one token, few of which go together, have 40,120 partial results.
    room = replace(capacities(batch), max_gathered=50_000, max_partials=50_000)
    with small_scale():
        planner = planner_for(batch, room, "cuda", tile_m=tile_m, num_workers=13)
        plan = planner.update(*inputs(batch, "cuda"))
    plan.partial_out.fill_(torch.nan)
    check(batch, BF16, rule, plan, batch.tensors(BF16))
    assert int(plan.counts[Count.PARTIALS]) > 0
    assert plan.faults() == Fault(0)


# Plans of the host, whose kernels know their counts, in the other dtype.
@pytest.mark.parametrize(("dims", "page_tokens"), [((80, 80), 1), ((192, 128), 64)])
def test_plans_of_the_host(dims: tuple[int, int], page_tokens: int) -> None:
    batch = batch_with(dims, page_tokens, 9)
    plan = batch.plan(tile_m=64, num_workers=13).to("cuda")
    assert plan.num_partial_tokens > 0
    check(batch, FP16, "causal", plan, batch.tensors(FP16))


@pytest.mark.parametrize("page_tokens", [1, 64])
def test_nothing_is_left_over_from_another_item(page_tokens: int) -> None:
    """Many items in turn on each CTA: what pads their tiles stays zero when stages are used again,
    and after rows of V that nobody sees were cleared."""
    batch = batch_of(7, page_tokens, (8, 2), 80, 1, 400)
    plan = batch.plan(tile_m=64, share=False, num_workers=100).to("cuda")
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    assert len(plan.work) > 2 * sms
    check(batch, FP16, "causal", plan, batch.tensors(FP16))


def test_one_plan_serves_its_own_dims_only() -> None:
    batch = batch_with((192, 128), 64, 1)
    q, k, v = (x.cuda() for x in batch.tensors(FP16))
    plan = batch.plan(tile_m=64).to("cuda")
    first = flashcore.paged_attention(q, k, v, plan)
    with pytest.raises(ValueError, match=r"v_pages must have the plan's .* v_head_dim\] = .* 128"):
        flashcore.paged_attention(q, k, k, plan)
    assert torch.equal(first, flashcore.paged_attention(q, k, v, plan))
