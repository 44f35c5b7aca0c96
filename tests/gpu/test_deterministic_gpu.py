"""Prefill equals decode bit for bit on a Hopper GPU: each query token's bits, however it comes.

Sequences have contents by position; a batch asks for any stretch of any of them. What is expected
of a token is what it got when its sequence was prefilled at once, alone. `differences` counts
elements of outputs and LSEs that are other bits: 0 in every batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

import flashcore
from flashcore.contract.chunks import CHUNK_TOKENS, tallest_tile
from flashcore.reference import sequence_attention
from flashcore.sm90.available import available
from tests.compare import assert_close

pytestmark = pytest.mark.skipif(
    not available("cuda")[0], reason=f"no Hopper GPU: {available('cuda')[1]}"
)

HEADS = (8, 2)
BF16, FP16 = torch.bfloat16, torch.float16
BATCHES = 84  # of each of six kinds of kernels: more than 500 together
PAGES = (1, 16, 64)
LENGTHS = (5003, 4096, 3 * CHUNK_TOKENS + 1, 2 * CHUNK_TOKENS, CHUNK_TOKENS, 1500, 700, 1)
COMMON = (0, 2 * CHUNK_TOKENS + 300, 2 * CHUNK_TOKENS + 300, 0, 0, 1100, 0, 0)
"""Tokens that a sequence has in common with the first one (the second and third with it too)."""


@dataclass
class Pool:
    """Pages of all sequences, in any order, those of a common prefix once or for each."""

    k: torch.Tensor
    v: torch.Tensor
    tables: list[list[int]]


@dataclass
class Contents:
    """q, k and v of every position of every sequence."""

    q: list[torch.Tensor]
    k: list[torch.Tensor]
    v: list[torch.Tensor]

    def pool(self, page_tokens: int, shared: bool, rng: np.random.Generator) -> Pool:
        tables: list[list[int]] = []
        starts, count = [], 0  # of each sequence: its first page that is not shared
        for s, length in enumerate(LENGTHS):
            table = list(tables[0][: COMMON[s] // page_tokens]) if shared and s else []
            starts.append((len(table), count))
            own = -(-length // page_tokens) - len(table)
            tables.append(table + list(range(count, count + own)))
            count += own
        ids = torch.from_numpy(rng.permutation(count + 8))  # eight belong to nobody
        shape = (len(ids), page_tokens, *self.k[0].shape[1:])
        # What lies past a sequence's end is NaN.
        k, v = (torch.full(shape, math.nan, dtype=x[0].dtype) for x in (self.k, self.v))
        for pages, source in ((k, self.k), (v, self.v)):
            for x, (page, number) in zip(source, starts, strict=True):
                rows = x[page * page_tokens :].cpu()
                own = torch.full((-len(rows) % page_tokens, *rows.shape[1:]), math.nan)
                own = torch.cat([rows, own.to(rows.dtype)]).unflatten(0, (-1, page_tokens))
                pages[ids[number : number + len(own)]] = own
        return Pool(k.cuda(), v.cuda(), [[int(ids[p]) for p in t] for t in tables])


def contents(dtype: torch.dtype, head_dim: int, seed: int = 0) -> Contents:
    generator = torch.Generator("cpu").manual_seed(seed)
    found = Contents([], [], [])
    for s, length in enumerate(LENGTHS):
        for kind, heads in (("q", HEADS[0]), ("k", HEADS[1]), ("v", HEADS[1])):
            made = torch.randn(length, heads, head_dim, generator=generator)
            made[::97] *= 6  # now and then a peak far above the others
            made = made.to(dtype).cuda()
            if kind != "q" and COMMON[s]:
                made[: COMMON[s]] = getattr(found, kind)[0][: COMMON[s]]
            getattr(found, kind).append(made)
    return found


Stretch = tuple[int, int, int]  # sequence, first query token, how many


def attend(
    data: Contents, pool: Pool, stretches: list[Stretch], plan: Any, **rules: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    q = torch.cat([data.q[s][begin : begin + n] for s, begin, n in stretches])
    out, lse = flashcore.paged_attention(q, pool.k, pool.v, plan, return_lse=True, **rules)
    return out, lse


def tables_of(pool: Pool, stretches: list[Stretch], page_tokens: int) -> tuple[torch.Tensor, ...]:
    kv_lens = [begin + n for _, begin, n in stretches]
    columns = -(-max(kv_lens) // page_tokens)
    table = torch.zeros(len(stretches), columns, dtype=torch.int32)
    for row, (s, _, _) in enumerate(stretches):
        used = pool.tables[s][: -(-kv_lens[row] // page_tokens)]
        table[row, : len(used)] = torch.tensor(used)
    lens = (torch.tensor(x, dtype=torch.int32) for x in (kv_lens, [n for *_, n in stretches]))
    return tuple(x.cuda() for x in (table, *lens))


def host_plan(
    pool: Pool, stretches: list[Stretch], head_dim: int, page_tokens: int, **options: Any
) -> flashcore.Plan:
    table, kv_lens, q_lens = tables_of(pool, stretches, page_tokens)
    layout = flashcore.layout_from_page_table(table, kv_lens, page_tokens=page_tokens)
    return flashcore.plan(
        layout,
        q_lens=q_lens,
        num_q_heads=HEADS[0],
        num_kv_heads=HEADS[1],
        head_dim=head_dim,
        batch_invariant=True,
        **options,
    )


def prefilled_alone(
    data: Contents, pool: Pool, head_dim: int, page_tokens: int, **rules: Any
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Outputs and LSEs of all tokens of every sequence."""
    found = []
    for s, length in enumerate(LENGTHS):
        whole = [(s, 0, length)]
        plan = host_plan(pool, whole, head_dim, page_tokens)
        found.append(attend(data, pool, whole, plan, **rules))
    return found


def stretches_of(rng: np.random.Generator) -> list[Stretch]:
    """Decode, verify and prefill side by side, sequences alone or many, some twice."""
    alone = rng.random() < 0.25
    found = []
    for _ in range(1 if alone else int(rng.integers(1, 20))):
        s = int(rng.integers(len(LENGTHS)))
        length = LENGTHS[s]
        kind = int(rng.integers(6))
        n = (1, 1, int(rng.integers(2, 9)), int(rng.integers(20, 70)), int(rng.integers(65, 600)))[
            min(kind, 4)
        ]
        n = min(n if kind < 5 or not alone else length, length)
        begin = int(rng.integers(0, length - n + 1))
        if rng.random() < 0.3:  # where chunks begin and end
            edge = CHUNK_TOKENS * int(rng.integers(0, length // CHUNK_TOKENS + 1))
            begin = min(max(edge - int(rng.integers(0, n + 1)), 0), length - n)
        found.append((s, begin, n))
    return found


def differences(
    found: tuple[torch.Tensor, torch.Tensor],
    expected: list[tuple[torch.Tensor, torch.Tensor]],
    stretches: list[Stretch],
) -> int:
    count = 0
    for which in range(2):
        wanted = torch.cat([expected[s][which][b : b + n] for s, b, n in stretches])
        integer = torch.int16 if which == 0 else torch.int32
        count += int((found[which].view(integer) != wanted.view(integer)).sum())
    return count


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_bits(dtype: torch.dtype, head_dim: int, record_property: Any) -> None:
    rng = np.random.default_rng(head_dim)
    data = contents(dtype, head_dim)
    pools = {
        (page, shared): data.pool(page, shared, rng) for page in PAGES for shared in (True, False)
    }
    expected = prefilled_alone(data, pools[64, True], head_dim, 64)
    for s in (0, 5, 7):
        rows = slice(max(LENGTHS[s] - 9, 0), LENGTHS[s])
        q, k, v = (x[s].double() for x in (data.q, data.k, data.v))
        out, lse = sequence_attention(q[rows], k, v, causal=True, scale=head_dim**-0.5)
        assert_close(expected[s][0][rows].cpu(), out.cpu(), dtype)
        torch.testing.assert_close(expected[s][1][rows].double(), lse, rtol=2e-3, atol=2e-3)
    heights = (64, 128) if tallest_tile(head_dim) == 128 else (64,)
    bad = []
    for number in range(BATCHES):
        page, shared = PAGES[int(rng.integers(3))], bool(rng.random() < 0.6)
        stretches = stretches_of(rng)
        options: dict[str, Any] = {
            "fold": [True, False, "always"][int(rng.integers(3))],
            "share": bool(rng.random() < 0.8),
            "num_workers": int(rng.integers(0, 600)),
            "tile_m": [None, *heights][int(rng.integers(1 + len(heights)))],
        }
        pool = pools[page, shared]
        plan = host_plan(pool, stretches, head_dim, page, **options)
        count = differences(attend(data, pool, stretches, plan), expected, stretches)
        if count:
            bad.append((number, count, page, shared, options, stretches))
    record_property("differences", sum(count for _, count, *_ in bad))
    assert not bad, f"{len(bad)} of {BATCHES} batches differ; the first: {bad[0]}"


@pytest.mark.parametrize("page_tokens", [1, 64])
def test_planned_on_the_device_and_replayed(page_tokens: int) -> None:
    """One captured graph of an update and an attention call, for batches of every kind."""
    rng = np.random.default_rng(3)
    data = contents(BF16, 128)
    pool = data.pool(page_tokens, True, rng)
    expected = prefilled_alone(data, pool, 128, page_tokens)
    rows, tokens, columns = 20, 4096, -(-max(LENGTHS) // page_tokens)
    planner = flashcore.DevicePlanner(
        flashcore.Capacities(rows, rows * columns, tokens, 40_000, 30_000),
        num_pages=len(pool.k),
        num_q_heads=HEADS[0],
        num_kv_heads=HEADS[1],
        head_dim=128,
        page_tokens=page_tokens,
        batch_invariant=True,
        device="cuda",
    )
    table = torch.zeros(rows, columns, dtype=torch.int32, device="cuda")
    kv_lens, q_lens = (torch.zeros(rows, dtype=torch.int32, device="cuda") for _ in range(2))
    q = torch.zeros(tokens, HEADS[0], 128, dtype=BF16, device="cuda")

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        plan = planner.update(table, kv_lens, q_lens)
        return flashcore.paged_attention(q, pool.k, pool.v, plan, return_lse=True)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    for _ in range(30):
        stretches = stretches_of(rng)
        while sum(n for *_, n in stretches) > tokens:
            stretches.pop()
        if not stretches:
            continue
        tables, lens, new = tables_of(pool, stretches, page_tokens)
        table.zero_()
        kv_lens.zero_()
        q_lens.zero_()
        table[: len(tables), : tables.shape[1]] = tables
        kv_lens[: len(lens)], q_lens[: len(new)] = lens, new
        asked = torch.cat([data.q[s][begin : begin + n] for s, begin, n in stretches])
        q[: len(asked)] = asked
        graph.replay()
        assert planner.plan.faults() == flashcore.Fault(0)
        found = results[0][: len(asked)], results[1][: len(asked)]
        assert differences(found, expected, stretches) == 0


@pytest.mark.parametrize("rule", ["softcap_sinks", "window"])
def test_rules(rule: str) -> None:
    rng = np.random.default_rng(5)
    data = contents(BF16, 128)
    pool = data.pool(16, True, rng)
    rules: dict[str, Any] = {
        "softcap_sinks": {
            "softcap": 20.0,
            "sinks": torch.linspace(-3, 9, HEADS[0], device="cuda"),
        },
        "window": {"window": (1500, 0)},
    }[rule]
    expected = prefilled_alone(data, pool, 128, 16, **rules)
    for _ in range(40):
        stretches = stretches_of(rng)
        plan = host_plan(pool, stretches, 128, 16)
        assert differences(attend(data, pool, stretches, plan, **rules), expected, stretches) == 0


def test_token_by_token() -> None:
    """Every token of a sequence decoded by itself, 256 positions at a time."""
    data = contents(BF16, 128)
    pool = data.pool(64, True, np.random.default_rng(6))
    expected = prefilled_alone(data, pool, 128, 64)
    for begin in range(0, LENGTHS[0], 256):
        stretches = [(0, p, 1) for p in range(begin, min(begin + 256, LENGTHS[0]))]
        plan = host_plan(pool, stretches, 128, 64)
        assert differences(attend(data, pool, stretches, plan), expected, stretches) == 0
