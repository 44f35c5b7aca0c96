"""Attention with plans made on a Hopper GPU: against the host's plan and the float64 reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch

import flashcore
from flashcore.contract.counts import Fault, Stat
from flashcore.reference import paged_attention_reference
from flashcore.sm90.available import available
from flashcore.sm90.config.merge import MergeConfig
from flashcore.sm90.launch import paged as launch_paged
from tests.cases import Batch, small_scale
from tests.compare import assert_close
from tests.device_plan_cases import inputs, planner_for
from tests.gpu.test_device_plan_gpu import ROWS, padded, random_batch
from tests.gpu.test_paged_gpu import batch_of, rules

pytestmark = pytest.mark.skipif(
    not available("cuda")[0], reason=f"no Hopper GPU: {available('cuda')[1]}"
)

MAX_Q = 640
Results = tuple[torch.Tensor, torch.Tensor]


def capacities(batch: Batch) -> flashcore.Capacities:
    return flashcore.Capacities(
        len(batch.kv_lens) + 3, batch.page_table.numel() + 1, MAX_Q, 20_000, 20_000
    )


def on_gpu(options: dict[str, Any]) -> dict[str, Any]:
    return {n: x.cuda() if isinstance(x, torch.Tensor) else x for n, x in options.items()}


def same_merge(warps: int, heads: int = 1) -> Any:
    """Both plans' merges with one number of warps a row, which decides the order of their sums;
    on the device a warp takes so many heads of a token, which decides nothing."""

    def host(dtype: str, head_dim: int, sinks: bool, *sizes: int) -> MergeConfig:
        return MergeConfig(dtype, head_dim, sinks, warps)

    def device(dtype: str, head_dim: int, sinks: bool, *sizes: int) -> MergeConfig:
        return MergeConfig(dtype, head_dim, sinks, warps, heads, device_counts=True)

    return mock.patch.multiple(launch_paged, choose_merge=host, choose_device_merge=device)


def attend(
    tensors: tuple[torch.Tensor, ...], plan: Any, options: dict[str, Any], extra_rows: int = 0
) -> Results:
    """Results with the last `extra_rows` rows of q made of NaN."""
    q, k, v = (t.cuda() for t in tensors)
    q = torch.cat([q, q.new_full((extra_rows, *q.shape[1:]), float("nan"))])
    options = on_gpu(options)
    if "tree_mask" in options:
        extra = options["tree_mask"].new_zeros(extra_rows, options["tree_mask"].shape[1])
        options["tree_mask"] = torch.cat([options["tree_mask"], extra])
    return flashcore.paged_attention(q, k, v, plan, return_lse=True, **options)


def check(
    batch: Batch,
    dtype: torch.dtype,
    rule: str,
    warps: int,
    heads: int = 1,
    **plan_options: Any,
) -> None:
    """As with the host's plan bit by bit, and near the reference; idle rows are empty."""
    options, tensors = rules(batch, rule), batch.tensors(dtype)
    total = tensors[0].shape[0]
    with small_scale(), same_merge(warps, heads):
        planner = planner_for(batch, capacities(batch), "cuda", **plan_options)
        plan = planner.update(*inputs(batch, "cuda"))
        plan.partial_out.fill_(float("nan"))
        out, lse = attend(tensors, plan, options, extra_rows=MAX_Q + 5 - total)
        host = batch._plan(**plan_options).to("cuda")
        host_out, host_lse = attend(tensors, host, options)
    assert torch.equal(out[:total], host_out)
    assert torch.equal(lse[:total], host_lse)
    expected, expected_lse = paged_attention_reference(
        *tensors, batch.layout, batch.q_lens, **options
    )
    assert_close(out[:total].cpu(), expected, dtype)
    finite = torch.isfinite(expected_lse)
    torch.testing.assert_close(
        lse[:total].cpu()[finite].double(), expected_lse[finite], rtol=2e-3, atol=2e-3
    )
    assert not out[total:].any()
    sinks = options.get("sinks", torch.full((batch.num_q_heads,), -torch.inf))
    assert torch.allclose(lse[total:].cpu(), sinks.expand(lse.shape[0] - total, -1), atol=1e-5)
    assert planner.plan.faults() == Fault(0)


# Every rule with one and with eight warps that share a merge list, and with one for several heads:
# 3 of 8, and 8 of 8.
@pytest.mark.parametrize(("warps", "heads"), [(1, 1), (8, 1), (1, 3), (1, 8)])
@pytest.mark.parametrize(
    "rule", ["causal", "full", "window", "softcap_sinks", "tree", "everything"]
)
def test_rules(rule: str, warps: int, heads: int) -> None:
    batch = batch_of(1, 16, (8, 2), 128, 9, 7)
    check(batch, torch.bfloat16, rule, warps, heads, tile_m=64, num_workers=13)


# Head dims, both tile heights and dtypes; rows gathered, small and large pages.
@pytest.mark.parametrize(
    ("head_dim", "dtype", "page_tokens", "heads", "tile_m"),
    [
        (64, torch.bfloat16, 16, (8, 2), 64),
        (64, torch.float16, 32, (4, 4), 128),
        (128, torch.float16, 32, (4, 4), 64),
        (128, torch.bfloat16, 128, (8, 2), 64),
        (256, torch.bfloat16, 32, (5, 1), 64),
        (128, torch.bfloat16, 1, (8, 2), 64),
        (64, torch.float16, 4, (4, 4), 128),
        (256, torch.bfloat16, 8, (8, 2), 64),
    ],
)
def test_shapes(
    head_dim: int, dtype: torch.dtype, page_tokens: int, heads: tuple[int, int], tile_m: int
) -> None:
    batch = batch_of(3, page_tokens, heads, head_dim, 70, 5)
    check(batch, dtype, "causal", 8, tile_m=tile_m, num_workers=40)


def captured(step: Callable[[], Results]) -> tuple[Callable[[], None], Results]:
    """A step as a graph, and the tensors that a replay writes."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    return graph.replay, results


def test_plan_and_attention_in_one_graph() -> None:
    """Other page tables, lengths, sharing and numbers of sequences at each replay; two layers."""
    odd = [padded(random_batch(seed), ROWS) for seed in range(1, 17, 2)]
    contents = [batch.tensors(torch.bfloat16) for batch in odd]
    with small_scale(), same_merge(8):
        planner = planner_for(
            odd[0], flashcore.Capacities(ROWS, 2560, 256, 12_000, 12_000), "cuda", num_workers=40
        )
        buffers = inputs(odd[0], "cuda")
        pages = [t.cuda() for t in contents[0][1:]]
        layers = [torch.empty(256, 8, 64, dtype=torch.bfloat16, device="cuda") for _ in range(2)]

        def step() -> Results:
            plan = planner.update(*buffers)
            outs = [flashcore.paged_attention(q, *pages, plan) for q in layers]
            return outs[0], outs[1]

        replay, outs = captured(step)
        for _ in range(2):
            for batch, (q, k, v) in zip(odd, contents, strict=True):
                for buffer, value in zip(
                    (*buffers, *pages), (*inputs(batch, "cpu"), k, v), strict=True
                ):
                    buffer.copy_(value)
                queries = (q, q.flip(0))
                for layer, rows in zip(layers, queries, strict=True):
                    layer.fill_(float("nan"))
                    layer[: len(q)] = rows.cuda()
                for out in outs:
                    out.fill_(float("nan"))
                replay()
                plan = batch._plan(num_workers=40, tile_m=64).to("cuda")
                for out, rows in zip(outs, queries, strict=True):
                    expected = flashcore.paged_attention(rows.cuda(), *pages, plan)
                    assert torch.equal(out[: len(q)], expected)
                    assert not out[len(q) :].any()


def test_faults_concern_their_sequences_alone() -> None:
    for seed in (1, 3, 5, 7):
        batch = random_batch(seed)
        bad = [b for b, n in enumerate(batch.kv_lens) if n and b % 3 == 0]
        damaged = replace(batch, page_table=batch.page_table.clone())
        for b in bad:
            damaged.page_table[b, (batch.kv_lens[b] - 1) // batch.page_tokens] = batch.num_pages
        q, k, v = batch.tensors(torch.bfloat16)
        expected, expected_lse = paged_attention_reference(q, k, v, batch.layout, batch.q_lens)
        row = torch.repeat_interleave(torch.tensor(batch.q_lens))
        spoilt = torch.isin(row, torch.tensor(bad, dtype=torch.long))
        planner = planner_for(batch, flashcore.Capacities(ROWS, 2560, 256), "cuda")
        plan = planner.update(*inputs(damaged, "cuda"))
        out, lse = (t.cpu() for t in attend((q, k, v), plan, {}))
        assert_close(out[~spoilt], expected[~spoilt], torch.bfloat16)
        assert torch.equal(lse[~spoilt].isfinite(), expected_lse[~spoilt].isfinite())
        assert out[spoilt].isnan().all()
        assert lse[spoilt].isnan().all()
        assert planner.plan.faults() == (Fault.PAGE if bad else Fault(0))


@pytest.mark.parametrize("short", ["plan", "q", "tree"])
def test_what_does_not_fit_is_all_nan(short: str) -> None:
    """Nothing is read or written out of bounds: q and out lie at the end of poisoned buffers."""
    batch = batch_of(2, 16, (8, 2), 128, 9, 7)
    q, k, v = batch.tensors(torch.bfloat16)
    options = on_gpu(rules(batch, "tree"))
    items = 3 if short == "plan" else 0
    planner = planner_for(
        batch, replace(capacities(batch), max_items=items), "cuda", num_workers=40
    )
    plan = planner.update(*inputs(batch, "cuda"))
    rows = len(q) - 3 if short == "q" else len(q)
    mask = options["tree_mask"][:rows, : 2 if short == "tree" else None].contiguous()
    guarded = torch.full((len(q) + 64, 8, 128), 7.0, dtype=torch.bfloat16, device="cuda")
    out, lse = flashcore.paged_attention(
        q[:rows].cuda(), k.cuda(), v.cuda(), plan, tree_mask=mask, out=guarded[:rows],
        return_lse=True,
    )  # fmt: skip
    assert out.isnan().all()
    assert lse.isnan().all()
    assert (guarded[rows:] == 7.0).all()
    assert planner.plan.faults() == (Fault.PLAN if short == "plan" else Fault(0))


def test_out_and_no_waiting() -> None:
    batch = batch_of(6, 16, (8, 2), 128, 4, 12)
    q, k, v = (t.cuda() for t in batch.tensors(torch.bfloat16))
    planner = planner_for(batch, capacities(batch), "cuda")
    values = inputs(batch, "cuda")
    expected = flashcore.paged_attention(q, k, v, planner.update(*values))
    out, stats = torch.empty_like(q), torch.zeros_like(planner.stats(), device="cpu").pin_memory()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(500_000_000)
        returned = flashcore.paged_attention(q, k, v, planner.update(*values), out=out)
        stats.copy_(planner.stats(), non_blocking=True)
        assert not torch.cuda.current_stream().query()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert returned is out
    assert torch.equal(out, expected)
    host = batch._plan().to("cuda")
    assert stats[Stat.TOKENS_UNIQUE] == host.stats().tokens_unique > 0
    into = torch.empty_like(q)
    assert flashcore.paged_attention(q, k, v, host, out=into) is into
    assert torch.equal(into, flashcore.paged_attention(q, k, v, host))


def test_same_bits_every_time() -> None:
    batch = batch_of(5, 16, (8, 2), 128, 4, 12)
    with small_scale():
        planner = planner_for(batch, capacities(batch), "cuda", num_workers=132)
        first = attend(batch.tensors(torch.bfloat16), planner.update(*inputs(batch, "cuda")), {})
        for _ in range(50):
            plan = planner.update(*inputs(batch, "cuda"))
            again = attend(batch.tensors(torch.bfloat16), plan, {})
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
