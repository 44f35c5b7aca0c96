"""The paged kernels on a Hopper GPU against the float64 reference, on hostile batches."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from flashcore.problem import Extras, KVPool, Rules
from flashcore.reference import paged_attention_reference
from flashcore.sm90.available import available
from flashcore.sm90.launch.paged import paged_attention
from tests.cases import Batch, hide_unused, prefix_tree
from tests.compare import assert_close

pytestmark = pytest.mark.skipif(
    not available("cuda")[0], reason=f"no Hopper GPU: {available('cuda')[1]}"
)


def batch_of(
    seed: int, page_tokens: int, heads: tuple[int, int], head_dim: int, longest_q: int, batch: int
) -> Batch:
    """A prefix tree over few hundred pages with zero lengths and partial last pages."""
    rng = np.random.default_rng(seed)
    columns = max(2, 900 // page_tokens)
    kv_lens = [int(rng.integers(0, columns * page_tokens + 1)) for _ in range(batch)]
    kv_lens[0] = 0
    table = prefix_tree(rng, batch, columns, 4 * columns, [n // page_tokens for n in kv_lens])
    hide_unused(table, kv_lens, page_tokens)
    q_lens = [int(rng.integers(0, longest_q + 1)) for _ in range(batch)]
    q_lens[0] = 1
    return Batch(
        torch.from_numpy(table).int(),
        kv_lens,
        q_lens,
        page_tokens,
        4 * columns,
        *heads,
        head_dim=head_dim,
        seed=seed,
    )


def rules(batch: Batch, name: str) -> dict[str, Any]:
    rng = torch.Generator().manual_seed(batch.seed + 2)
    sinks = torch.randn(batch.num_q_heads, generator=rng)
    return {
        "causal": {},
        "full": {"causal": False, "scale": 0.3},
        "window": {"window": (100, 0)},
        "softcap_sinks": {"softcap": 5.0, "sinks": sinks},
        "window_softcap_sinks": {"window": (100, 0), "softcap": 5.0, "sinks": sinks},
        "tree": {"tree_mask": batch.tree_mask()},
        "everything": {
            "tree_mask": batch.tree_mask(),
            "window": (200, 2),
            "softcap": 9.0,
            "sinks": sinks,
        },
    }[name]


def run(batch: Batch, dtype: torch.dtype, options: dict[str, Any], **plan_options: Any):
    q, k, v = (x.cuda() for x in batch.tensors(dtype))
    return launch_on(batch, q, k, v, options, **plan_options)


def launch_on(batch: Batch, q: Any, k: Any, v: Any, options: dict[str, Any], **plan_options: Any):
    plan = batch.plan(**plan_options).to("cuda")
    options = {n: x.cuda() if isinstance(x, torch.Tensor) else x for n, x in options.items()}
    extras = Extras(**{n: options.pop(n) for n in Extras._fields if n in options})
    rules = Rules.of(**{"scale": batch.head_dim**-0.5, "causal": True, **options})
    return paged_attention(q, KVPool(k, v), plan.planned, rules, extras)


def check(batch: Batch, dtype: torch.dtype, rule: str, **plan_options: Any) -> None:
    options = rules(batch, rule)
    q, k, v = batch.tensors(dtype)
    expected = paged_attention_reference(q, k, v, batch.layout, batch.q_lens, **options)
    out, lse = run(batch, dtype, options, **plan_options)
    assert_close(out.cpu(), expected[0], dtype)
    finite = torch.isfinite(expected[1])
    assert torch.equal(torch.isfinite(lse.cpu()), finite)
    torch.testing.assert_close(
        lse.cpu()[finite].double(), expected[1][finite], rtol=2e-3, atol=2e-3
    )


# Every rule on both tile heights; page 32 needs several boxes a tile.
@pytest.mark.parametrize("tile_m", [64, 128])
@pytest.mark.parametrize(
    "rule", ["causal", "full", "window", "softcap_sinks", "tree", "everything"]
)
def test_rules(rule: str, tile_m: int) -> None:
    batch = batch_of(1, 32, (8, 2), 128, 9, 7)
    check(batch, torch.bfloat16, rule, tile_m=tile_m, num_workers=13)


# Every page size: one box a tile, several, and rows gathered one by one; decode, and with new
# tokens enough for several M tiles.
@pytest.mark.parametrize("longest_q", [1, 40])
@pytest.mark.parametrize("page_tokens", [1, 2, 4, 8, 16, 32, 64, 128])
def test_page_sizes(page_tokens: int, longest_q: int) -> None:
    batch = batch_of(2, page_tokens, (8, 2), 128, longest_q, 6)
    check(batch, torch.bfloat16, "causal", tile_m=64)


# Every rule and head dim where rows are gathered, on both tile heights.
@pytest.mark.parametrize("tile_m", [64, 128])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize(
    "rule", ["causal", "full", "window", "softcap_sinks", "tree", "everything"]
)
def test_gathered_rows(rule: str, head_dim: int, tile_m: int) -> None:
    page_tokens, dtype = (1, torch.bfloat16) if tile_m == 64 else (4, torch.float16)
    batch = batch_of(6, page_tokens, (8, 2), head_dim, 9, 7)
    check(batch, dtype, rule, tile_m=tile_m, num_workers=13)


# Several items for each CTA, of 1 to 14 tiles: warps that take turns at tiles keep their turn
# from item to item.
@pytest.mark.parametrize("tile_m", [64, 128])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_gathered_items_in_a_row(head_dim: int, tile_m: int) -> None:
    batch = batch_of(7, 1, (8, 8), head_dim, 1, 150)
    options = {"tile_m": tile_m, "share": False, "num_workers": 100}
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    assert len(batch.plan(**options).work) > 2 * sms
    check(batch, torch.bfloat16, "causal", **options)


# Head dims with both tile heights, odd head ratios, both dtypes.
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("heads", [(8, 2), (5, 1), (4, 4)])
@pytest.mark.parametrize("tile_m", [64, 128])
def test_shapes(head_dim: int, heads: tuple[int, int], tile_m: int) -> None:
    dtype = torch.float16 if heads == (4, 4) else torch.bfloat16
    check(batch_of(3, 32, heads, head_dim, 70, 5), dtype, "causal", tile_m=tile_m, num_workers=5)


@pytest.mark.parametrize("options", [{"fold": False}, {"share": False}, {"num_workers": 400}])
def test_plans(options: dict[str, Any]) -> None:
    check(batch_of(4, 32, (32, 8), 128, 1, 24), torch.bfloat16, "causal", tile_m=64, **options)


# K and V of one allocation, K rows of all heads side by side, V in the order of the heads.
@pytest.mark.parametrize("page_tokens", [1, 16, 32])
def test_strides(page_tokens: int) -> None:
    batch = batch_of(7, page_tokens, (8, 2), 128, 3, 6)
    q, k, v = (x.cuda() for x in batch.tensors(torch.bfloat16))
    expected = launch_on(batch, q, k, v, {}, tile_m=64)
    pool = torch.full((batch.num_pages, 2, page_tokens, 3, 128), torch.nan).to(q)
    pool[:, 0, :, :2] = k
    by_head = torch.full((batch.num_pages, 2, page_tokens, 136), torch.nan).to(q)
    by_head[..., :128] = v.transpose(1, 2)
    got = launch_on(batch, q, pool[:, 0, :, :2], by_head[..., :128].transpose(1, 2), {}, tile_m=64)
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


@pytest.mark.parametrize("page_tokens", [1, 8])
def test_pool_beyond_two_to_the_31_elements(page_tokens: int) -> None:
    batch = batch_of(8, page_tokens, (8, 8), 256, 1, 3)
    q, k, v = (x.cuda() for x in batch.tensors(torch.bfloat16))
    expected = launch_on(batch, q, k, v, {}, tile_m=64)
    first = 2**31 // k[0].numel()
    far = [torch.empty(first + len(x), *x.shape[1:], dtype=x.dtype, device="cuda") for x in (k, v)]
    for pool, x in zip(far, (k, v), strict=True):
        pool[first:] = x
    batch.layout.cols.add_(first)
    got = launch_on(batch, q, *far, {}, tile_m=64)
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


@pytest.mark.parametrize("page_tokens", [1, 32])
def test_same_bits_every_time(page_tokens: int) -> None:
    batch = batch_of(5, page_tokens, (8, 2), 128, 4, 12)
    first = run(batch, torch.bfloat16, {}, tile_m=64, num_workers=132)
    for _ in range(100):
        again = run(batch, torch.bfloat16, {}, tile_m=64, num_workers=132)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
