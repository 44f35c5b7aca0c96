"""Masks that are right for each row, on a Hopper GPU: windows in draft trees against decoding every
path step by step, values that not every row sees, bounds and strides."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

import flashcore
from flashcore.reference import attention_reference, paged_attention_reference
from flashcore.sm90.available import available
from tests.cases import Batch, small_scale
from tests.compare import assert_close
from tests.device_plan_cases import inputs, planner_for
from tests.mask_cases import (
    Drafts,
    finite_part,
    same_with_nan,
    spoil,
    staggered_batch,
    step_by_step,
    strided,
    verify_batch,
)

pytestmark = pytest.mark.skipif(
    not available("cuda")[0], reason=f"no Hopper GPU: {available('cuda')[1]}"
)

BF16 = torch.bfloat16
DRAFTS = 8


def on_gpu(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [x.cuda() for x in tensors]


# gpt-oss's heads and window, and windows shorter than the tree is deep. The first page size is
# loaded by boxes, the second gathered.
@pytest.mark.parametrize("page_tokens", [64, 1])
@pytest.mark.parametrize("left", [1, 3, 127])
def test_tree_window_is_that_of_each_path(page_tokens: int, left: int) -> None:
    batch = verify_batch(page_tokens, (64, 8), 64, [401, 300, 260, DRAFTS + 2], DRAFTS)
    drafts, tensors = Drafts(batch, left), batch.tensors(BF16)
    sinks = torch.linspace(-2, 2, 64)
    q, k, v = on_gpu(*tensors)
    mask, positions, on_device = on_gpu(drafts.mask, drafts.positions, sinks)
    options: dict[str, Any] = {"window": (left, 0), "sinks": on_device, "return_lse": True}
    host = batch.plan(tile_m=64, num_workers=13).to("cuda")
    with small_scale():
        room = flashcore.Capacities(9, 4096, 200)
        planner = planner_for(batch, room, "cuda", tile_m=64, num_workers=13)
        # What a larger batch leaves in the planner's tensors means nothing to this one.
        other = verify_batch(page_tokens, (64, 8), 64, [401, 300, 260, 250, 240, 230], 11)
        planner.update(
            other.page_table.clamp(max=batch.num_pages - 1).cuda(), *inputs(other, "cuda")[1:]
        )
        made = planner.update(*inputs(batch, "cuda"))
    results = [
        flashcore.paged_attention(q, k, v, plan, tree_mask=mask, tree_positions=given, **options)
        for plan in (host, made)
        for given in (None, positions, positions - 7)
    ]
    padding = mask.new_ones(5, mask.shape[1])
    padded = flashcore.paged_attention(
        torch.cat([q, q[:5]]), k, v, made, tree_mask=torch.cat([mask, padding]), **options
    )
    expected, expected_lse = step_by_step(batch, drafts, tensors, left, sinks)
    for out, lse in results:
        assert_close(out.cpu(), expected, BF16)
        torch.testing.assert_close(lse.cpu().double(), expected_lse, rtol=2e-3, atol=2e-3)
        assert torch.equal(out, results[0][0])
    assert torch.equal(padded[0][: len(q)], results[0][0])
    assert not padded[0][len(q) :].any()


# Other kernels, which visit the same tiles and round alike: the same bits.
@pytest.mark.parametrize("left", [3, 127])
def test_a_chain_is_a_causal_window(left: int) -> None:
    batch = verify_batch(64, (64, 8), 64, [401, 300, 260, DRAFTS + 2], DRAFTS)
    q, k, v = on_gpu(*batch.tensors(BF16))
    chain = torch.ones(DRAFTS, DRAFTS).tril().bool().repeat(4, 1).cuda()
    plan, sinks = batch.plan(tile_m=64).to("cuda"), torch.zeros(64, device="cuda")
    options: dict[str, Any] = {"window": (left, 0), "sinks": sinks}
    expected = flashcore.paged_attention(q, k, v, plan, **options)
    out = flashcore.paged_attention(q, k, v, plan, tree_mask=chain, **options)
    assert torch.equal(out, expected)


# One and two warpgroups, boxes and gathered rows, every head dim. Stages of 64 and of 128 keys.
SPOILT = [
    (1, (8, 2), 128, 64), (16, (8, 2), 128, 64), (64, (8, 2), 128, 64), (128, (8, 2), 128, 64),
    (1, (64, 8), 64, 128), (64, (64, 8), 64, 128), (64, (4, 2), 256, 64),
]  # fmt: skip


@pytest.mark.parametrize("q_len", [1, 4])
@pytest.mark.parametrize(("page_tokens", "heads", "head_dim", "tile_m"), SPOILT)
def test_a_value_outside_a_window_has_no_say(
    page_tokens: int, heads: tuple[int, int], head_dim: int, tile_m: int, q_len: int
) -> None:
    """Not a bit of what a row does not see; and what it sees is what the reference says."""
    for window in (150, 23):
        batch = staggered_batch(page_tokens, heads, head_dim, window, q_len)
        q, k, v = batch.tensors(BF16)
        spoilt = v.clone()
        spoil(batch, spoilt, window)
        options: dict[str, Any] = {"tile_m": tile_m, "fold": False}
        for shared in (True, False):
            plan = batch.plan(**options, share=shared).to("cuda")
            clean, out = (
                flashcore.paged_attention(*on_gpu(q, k, x), plan, window=(window, 0)).cpu()
                for x in (v, spoilt)
            )
            expected, _ = paged_attention_reference(
                q, k, spoilt, batch.layout, batch.q_lens, window=(window, 0)
            )
            assert (plan.stats().num_shared_groups > 0) is shared
            assert not torch.isfinite(expected).all()
            same_with_nan(out, expected)
            assert torch.equal(finite_part(out, expected), finite_part(clean, expected))
            assert_close(finite_part(out, expected), finite_part(expected, expected), BF16)


@pytest.mark.parametrize("page_tokens", [64, 1])
def test_a_draft_outside_a_path_has_no_say(page_tokens: int) -> None:
    batch = verify_batch(page_tokens, (64, 8), 64, [401, 300, 260, DRAFTS + 2], DRAFTS)
    drafts, sinks = Drafts(batch, 2), torch.zeros(64)
    q, k, v = batch.tensors(BF16)
    for row, (draft, value) in enumerate(((3, torch.nan), (1, torch.inf), (7, -torch.inf))):
        page, slot = divmod(batch.kv_lens[row] - DRAFTS + draft, page_tokens)
        v[int(batch.page_table[row, page]), slot, row, 5 * row] = value
    options: dict[str, Any] = {"window": (30, 0)}
    plan = batch.plan(tile_m=64).to("cuda")
    out = flashcore.paged_attention(
        *on_gpu(q, k, v), plan, tree_mask=drafts.mask.cuda(), sinks=sinks.cuda(), **options
    ).cpu()
    expected, _ = paged_attention_reference(
        q, k, v, batch.layout, batch.q_lens, tree_mask=drafts.mask, sinks=sinks, **options
    )
    same_with_nan(out, expected)
    assert_close(finite_part(out, expected), finite_part(expected, expected), BF16)


def plain_batch() -> Batch:
    return verify_batch(64, (8, 2), 128, [401, 300, 260], 1)


@pytest.mark.parametrize("bound", [2**31 - 2, 2**31 - 1, sys.maxsize])
def test_a_bound_beyond_every_key_does_not_bind(bound: int) -> None:
    batch = plain_batch()
    q, k, v = batch.tensors(BF16)
    plan = batch.plan(tile_m=64).to("cuda")
    for window in ((-1, bound), (bound, -1), (bound, bound)):
        out = flashcore.paged_attention(*on_gpu(q, k, v), plan, window=window)
        expected, _ = paged_attention_reference(q, k, v, batch.layout, batch.q_lens)
        assert_close(out.cpu(), expected, BF16)
    q, k, v = (torch.randn(1, 300, 2, 64, dtype=BF16) for _ in range(3))
    for window in ((-1, bound), (bound, 5)):
        out = flashcore.attention(*on_gpu(q, k, v), window=window)
        same = tuple(-1 if x == bound else x for x in window)
        expected, _ = attention_reference(q, k, v, window=same)
        assert_close(out.cpu(), expected, BF16)


def test_sinks_and_masks_in_any_strides() -> None:
    batch = verify_batch(64, (64, 8), 64, [401, 300, 260, DRAFTS + 2], DRAFTS)
    q, k, v = on_gpu(*batch.tensors(BF16))
    plan = batch.plan(tile_m=64).to("cuda")
    mask = Drafts(batch, 4, extra_columns=0).mask.cuda()
    turned = mask.T.contiguous().T
    for left in (2, 127):
        for sinks in strided(torch.linspace(-2, 2, 64)):
            sinks = sinks.cuda() if sinks.stride(0) == 0 else _as_strided_on_gpu(sinks)
            plain = {"sinks": sinks.float().contiguous(), "tree_mask": mask, "window": (left, 0)}
            expected = flashcore.paged_attention(q, k, v, plan, **plain)
            for given in (mask, turned):
                out = flashcore.paged_attention(
                    q, k, v, plan, sinks=sinks, tree_mask=given, window=(left, 0)
                )
                assert torch.equal(out, expected)
    x = torch.randn(1, 200, 8, 64, dtype=BF16, device="cuda")
    logits = torch.linspace(-2, 2, 16, device="cuda")
    expected = flashcore.attention(x, x, x, sinks=logits[::2].contiguous())
    assert torch.equal(flashcore.attention(x, x, x, sinks=logits[::2]), expected)
    one = logits[3:4].expand(8)
    expected = flashcore.attention(x, x, x, sinks=one.contiguous())
    assert torch.equal(flashcore.attention(x, x, x, sinks=one), expected)


def _as_strided_on_gpu(x: torch.Tensor) -> torch.Tensor:
    """A copy on the GPU that keeps x's stride, which `.cuda()` does not."""
    wide = torch.zeros(len(x), x.stride(0), dtype=x.dtype, device="cuda")
    wide[:, 0] = x.cuda()
    return wide[:, 0]
