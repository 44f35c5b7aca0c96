"""Batch-invariant plans on a Hopper GPU: a sequence's bits, alone and in every company."""

from __future__ import annotations

from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

import flashcore
from flashcore.contract.counts import Fault
from flashcore.contract.work import Work
from flashcore.planner import chunks
from flashcore.reference import paged_attention_reference
from flashcore.sm90.available import available
from flashcore.sm90.config.merge import MergeConfig
from flashcore.sm90.device_planner import DevicePlanner
from flashcore.sm90.launch import paged as launch_paged
from tests.cases import Batch, hide_unused, picked, prefix_tree
from tests.compare import assert_close
from tests.device_plan_cases import always_a_chain, assert_same_plan, inputs, planner_for
from tests.gpu.test_paged_gpu import rules

pytestmark = pytest.mark.skipif(
    not available("cuda")[0], reason=f"no Hopper GPU: {available('cuda')[1]}"
)

Results = tuple[torch.Tensor, torch.Tensor]
CHUNK = chunks.CHUNK_TOKENS
BF16, FP16 = torch.bfloat16, torch.float16


def family(
    seed: int,
    page_tokens: int,
    head_dim: int,
    longest_q: int = 1,
    heads: tuple[int, int] = (8, 2),
    sequences: int = 10,
    tokens: int = 3 * CHUNK + 200,
) -> Batch:
    """Sequences with whole chunks in common, with pages in common at other places, with none.

    Their first four begin with the same two chunks and a bit; the others are those of a prefix
    tree. One has no tokens, one is a chunk to the token, one is all that another begins with.
    """
    rng = np.random.default_rng(seed)
    columns = -(-tokens // page_tokens)
    kv_lens = [int(rng.integers(2 * CHUNK + 300, tokens)) for _ in range(4)]
    kv_lens += [0, CHUNK, 2 * CHUNK]
    kv_lens += [int(rng.integers(1, tokens)) for _ in range(sequences - len(kv_lens))]
    full = [n // page_tokens for n in kv_lens]
    table = prefix_tree(rng, sequences, columns, 8 * columns, full)
    common = (2 * CHUNK + 256) // page_tokens
    table[1:4, :common] = table[0, :common]
    table[5:7, :common] = table[0, :common]
    hide_unused(table, kv_lens, page_tokens)
    q_lens = [int(rng.integers(1, longest_q + 1)) for _ in range(sequences)]
    return Batch(
        torch.from_numpy(table).int(),
        kv_lens,
        q_lens,
        page_tokens,
        8 * columns,
        *heads,
        head_dim=head_dim,
        seed=seed,
    )


def slices(batch: Batch, rows: list[int]) -> torch.Tensor:
    """Query tokens of these sequences, one after another."""
    ends = np.cumsum([0, *batch.q_lens])
    return torch.tensor([t for row in rows for t in range(ends[row], ends[row + 1])]).long()


def attend(
    batch: Batch,
    rows: list[int],
    tensors: tuple[torch.Tensor, ...],
    options: dict[str, Any],
    **plan_options: Any,
) -> list[Results]:
    """Output and LSE of each of these sequences, computed in one batch."""
    chosen = picked(batch, rows)
    q, k, v = tensors
    tokens = slices(batch, rows)
    options = dict(options)
    if "tree_mask" in options:
        options["tree_mask"] = options["tree_mask"][tokens]
    options = {n: x.cuda() if isinstance(x, torch.Tensor) else x for n, x in options.items()}
    plan = chosen.plan(batch_invariant=True, **plan_options).to("cuda")
    results = flashcore.paged_attention(
        q[tokens].cuda(), k.cuda(), v.cuda(), plan, return_lse=True, **options
    )
    out, lse = (x.cpu().split(chosen.q_lens) for x in results)
    return list(zip(out, lse, strict=True))


def assert_same_bits(found: list[Results], expected: list[Results], rows: list[int]) -> None:
    for place, (a, row) in enumerate(zip(found, rows, strict=True)):
        for name, x, y in zip(("out", "lse"), a, expected[row], strict=True):
            assert torch.equal(x, y), (
                f"{name} of sequence {row} at {place}: {(x != y).sum()} of {x.numel()} differ, "
                f"by {(x.double() - y.double()).abs().nan_to_num().max():.1e}"
            )


def without_sharing(batch: Batch, tensors: tuple[torch.Tensor, ...]) -> tuple[Batch, Any]:
    """The same sequences, each with copies of its pages."""
    q, k, v = tensors
    cols = batch.layout.cols.long()
    copies = picked(batch, list(range(len(batch.q_lens))))
    copies.num_pages = len(cols)
    copies.layout = batch.layout._replace(cols=torch.arange(len(cols), dtype=torch.int32))
    return copies, (q, k[cols], v[cols])


def check(batch: Batch, dtype: torch.dtype, rule: str) -> None:
    """Alone, in company, in other company; near the reference."""
    options, tensors = rules(batch, rule), batch.tensors(dtype)
    everyone = list(range(len(batch.q_lens)))
    single = [attend(batch, [row], tensors, options)[0] for row in everyone]
    expected, expected_lse = paged_attention_reference(
        *tensors, batch.layout, batch.q_lens, **options
    )
    assert_close(torch.cat([out for out, _ in single]), expected, dtype)
    lse, finite = torch.cat([lse for _, lse in single]), torch.isfinite(expected_lse)
    assert torch.equal(torch.isfinite(lse), finite)
    torch.testing.assert_close(lse[finite].double(), expected_lse[finite], rtol=2e-3, atol=2e-3)

    plan = batch.plan(batch_invariant=True, fold=False)
    fan_out = plan.member_offsets.diff()[plan.work[:, Work.GROUP].long()]
    assert fan_out.max() >= 4
    assert fan_out.min() == 1
    for company in (
        {"fold": False},
        {"fold": True, "num_workers": 400},
        {"fold": "always", "num_workers": 1},
        {"share": False},
    ):
        assert_same_bits(attend(batch, everyone, tensors, options, **company), single, everyone)
    backwards = everyone[::-1]
    assert_same_bits(attend(batch, backwards, tensors, options, fold=False), single, backwards)
    copies = without_sharing(batch, tensors)
    alike = [*everyone, *everyone[:5]]
    assert_same_bits(attend(copies[0], alike, copies[1], options, fold=False), single, alike)


# Decode in every kernel: pages gathered by rows, several boxes a tile, one.
@pytest.mark.parametrize("page_tokens", [1, 16, 64, 128])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_decode(dtype: torch.dtype, head_dim: int, page_tokens: int) -> None:
    check(family(1, page_tokens, head_dim), dtype, "causal")


# Decode, verify and prefill side by side, in long chunks and short ones, over several row blocks.
@pytest.mark.parametrize("page_tokens", [1, 16, 128])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_several_queries(head_dim: int, page_tokens: int) -> None:
    batch = family(2, page_tokens, head_dim, longest_q=9)
    batch.q_lens[1], batch.q_lens[3], batch.q_lens[7] = 150, 40, 70
    check(batch, BF16, "causal")


@pytest.mark.parametrize("longest_q", [1, 30])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("rule", ["full", "window", "softcap_sinks", "tree", "everything"])
def test_rules(rule: str, head_dim: int, longest_q: int) -> None:
    check(family(3, 64, head_dim, longest_q), BF16, rule)


# A head to each KV head, many to one, and a number that does not divide a tile.
@pytest.mark.parametrize("heads", [(4, 4), (16, 1), (5, 1)])
def test_heads(heads: tuple[int, int]) -> None:
    check(family(4, 64, 128, longest_q=7, heads=heads), BF16, "causal")


@pytest.mark.parametrize("page_tokens", [1, 64])
@pytest.mark.parametrize("rule", ["causal", "window", "softcap_sinks"])
def test_random_company(rule: str, page_tokens: int) -> None:
    """64 batches of sequences drawn from 24, some twice, with one prefill or none."""
    batch = family(5, page_tokens, 128, longest_q=4, sequences=24)
    batch.q_lens[9] = 300
    options, tensors = rules(batch, rule), batch.tensors(BF16)
    single = [attend(batch, [row], tensors, options)[0] for row in range(24)]
    rng = np.random.default_rng(6)
    for _ in range(64):
        rows = rng.integers(0, 24, int(rng.integers(1, 40))).tolist()
        company = {
            "fold": [True, False, "always"][int(rng.integers(3))],
            "share": bool(rng.random() < 0.9),
            "num_workers": int(rng.integers(1, 600)),
        }
        assert_same_bits(attend(batch, rows, tensors, options, **company), single, rows)


# Lists of up to 80 partial results: three turns of 32, and a rest.
@pytest.mark.parametrize("rule", ["causal", "softcap_sinks"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_any_number_of_warps_merges_to_the_same_bits(
    dtype: torch.dtype, head_dim: int, rule: str
) -> None:
    with mock.patch.object(chunks, "CHUNK_TOKENS", 128):
        batch = family(7, 16, head_dim, tokens=80 * 128)
        options, tensors = rules(batch, rule), batch.tensors(dtype)
        rows = list(range(len(batch.q_lens)))
        found = []
        for warps in (1, 8):

            def merge(
                dtype: str, head_dim: int, sinks: bool, *_: Any, warps: int = warps
            ) -> MergeConfig:
                return MergeConfig(dtype, head_dim, sinks, warps, fixed_order=True)

            with mock.patch.object(launch_paged, "choose_merge", merge):
                found.append(attend(batch, rows, tensors, options))
    assert_same_bits(found[1], found[0], rows)
    expected = paged_attention_reference(*tensors, batch.layout, batch.q_lens, **options)
    assert_close(torch.cat([out for out, _ in found[0]]), expected[0], dtype)


# Plans made by kernels, for batches of other lengths, order and sharing each time.
@pytest.mark.parametrize("rule", ["causal", "softcap_sinks"])
def test_planned_on_the_device(rule: str) -> None:
    """The same plan as the host's, the same bits as alone, with more rows of q than tokens."""
    batch = family(9, 16, 128, longest_q=4, sequences=24)
    batch.q_lens[9] = 300
    options, tensors = rules(batch, rule), batch.tensors(BF16)
    single = [attend(batch, [row], tensors, options)[0] for row in range(24)]
    q, k, v = tensors
    capacities = flashcore.Capacities(40, 40 * batch.page_table.shape[1], 4000, 60_000, 20_000)
    planner = planner_for(batch, capacities, "cuda", batch_invariant=True, fold=False)
    on_gpu = {n: x.cuda() if isinstance(x, torch.Tensor) else x for n, x in options.items()}
    rng = np.random.default_rng(6)
    padding = torch.zeros(4000, *q.shape[1:], dtype=q.dtype)
    for _ in range(16):
        rows = rng.integers(0, 24, int(rng.integers(1, 40))).tolist()
        chosen, tokens = picked(batch, rows), slices(batch, rows)
        chosen.page_table = batch.page_table[rows]
        plan = planner.update(*inputs(chosen, "cuda"))
        assert plan.faults() == Fault(0)
        found = planner.trimmed(len(rows)).to("cpu")
        expected = chosen.plan(batch_invariant=True, fold=False, tile_m=64)  # as the planner
        assert_same_plan(found, expected)
        rows_of_q = torch.cat([q[tokens], padding[len(tokens) :]])
        out, lse = flashcore.paged_attention(
            rows_of_q.cuda(), k.cuda(), v.cuda(), plan, return_lse=True, **on_gpu
        )
        results = (x[: len(tokens)].cpu().split(chosen.q_lens) for x in (out, lse))
        assert_same_bits(list(zip(*results, strict=True)), single, rows)


@pytest.mark.parametrize("page_tokens", [16, 128])
def test_planned_by_either_kernels(page_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few query tokens: one kernel for all steps, in shared memory or not, and the chain."""
    batch = family(10, page_tokens, 128, longest_q=4, sequences=24)
    capacities = flashcore.Capacities(40, 40 * batch.page_table.shape[1], 200)
    planner = planner_for(batch, capacities, "cuda", batch_invariant=True, fold=False)
    rng = np.random.default_rng(7)
    for number in range(24):
        if number == 16:
            monkeypatch.setattr(DevicePlanner, "_config", always_a_chain)
        chosen = picked(batch, rows := rng.integers(0, 24, int(rng.integers(1, 40))).tolist())
        chosen.page_table = batch.page_table[rows]
        planner.update(*inputs(chosen, "cuda"))
        expected = chosen.plan(batch_invariant=True, fold=False, tile_m=64)  # as the planner
        assert_same_plan(planner.trimmed(len(rows)).to("cpu"), expected)


def test_same_bits_every_time() -> None:
    batch = family(8, 16, 128, longest_q=4)
    tensors, rows = batch.tensors(BF16), list(range(len(batch.q_lens)))
    first = attend(batch, rows, tensors, {})
    for _ in range(50):
        assert_same_bits(attend(batch, rows, tensors, {}), first, rows)
