"""The text of the chunked kernels, run on the host: any work list gives a query token's bits.

What the DSL and ptxas make of that text and how the GPU rounds is not tested here: no more than
that chunks, masks, fold, stores and merge are put together as they should be.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

import flashcore
from flashcore.contract.counts import INVALID
from flashcore.contract.work import DIRECT
from flashcore.planner import chunks
from flashcore.reference import sequence_attention
from flashcore.reference_fold import fold_chunks
from flashcore.sm90.config.merge import MergeConfig
from flashcore.sm90.config.paged import PagedCall, choose
from tests.emulation.chunked_attention import Pools, Rule, attend, merge_partials
from tests.emulation.simt import Memory

CHUNK = 256
HEADS = (4, 2)
LENGTHS = (610, 545, CHUNK, 2 * CHUNK + 1, 33)
COMMON = 530  # tokens that the first two have in common
Stretch = tuple[int, int, int]  # sequence, first query token, how many
RULES = {
    "causal": Rule(),
    "window": Rule((300, 0)),
    "softcap_sinks": Rule(softcap=9.0, sinks=np.float32([-2, 0, 3, 9])),
}


@dataclass
class World:
    """q, k, v of every position of every sequence, in 16 bits."""

    dtype: str
    dim: int
    rule: str = "causal"

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.dim)
        kind = {"bf16": torch.bfloat16, "fp16": torch.float16}[self.dtype]
        self.data = []
        for length in LENGTHS:
            rows = [torch.randn(length, h, self.dim, generator=generator) for h in (4, 2, 2)]
            rows[1][::57] *= 5  # now and then a peak far above the others
            self.data.append([x.to(kind).float().numpy() for x in rows])
        for kind_ in (1, 2):
            self.data[1][kind_][:COMMON] = self.data[0][kind_][:COMMON]

    def plan(
        self, stretches: list[Stretch], page: int, tile: int, shared: bool = True, **options: Any
    ) -> tuple[flashcore.Plan, Pools]:
        owned: dict[tuple[int, int], int] = {}
        tables = []
        for place, (s, begin, n) in enumerate(stretches):
            table = []
            for number in range(-(-(begin + n) // page)):
                common = s == 1 and (number + 1) * page <= COMMON
                key = (0 if common else s, number) if shared else (-1 - place, number)
                table.append(owned.setdefault(key, len(owned)))
            tables.append(table)
        k, v = (np.full((len(owned), page, 2, self.dim), np.nan, np.float32) for _ in range(2))
        for (s, *_), table in zip(stretches, tables, strict=True):
            for number, place in enumerate(table):
                rows = slice(number * page, min((number + 1) * page, LENGTHS[s]))
                for pool, kind in ((k, 1), (v, 2)):
                    part = self.data[s][kind][rows]
                    pool[place, : len(part)] = part
        width = max(map(len, tables))
        table = torch.tensor([t + [0] * (width - len(t)) for t in tables], dtype=torch.int32)
        lens = torch.tensor([begin + n for _, begin, n in stretches], dtype=torch.int32)
        with mock.patch.object(chunks, "CHUNK_TOKENS", CHUNK):
            plan = flashcore.plan(
                flashcore.layout_from_page_table(table, lens, page_tokens=page),
                q_lens=[n for *_, n in stretches], num_q_heads=4, num_kv_heads=2,
                head_dim=self.dim, batch_invariant=True, tile_m=tile, **options,
            )  # fmt: skip
        q = np.concatenate([self.data[s][0][begin : begin + n] for s, begin, n in stretches])
        return plan, Pools(q, k, v)

    def attend(
        self, stretches: list[Stretch], page: int = 16, tile: int = 64, warps: int = 1, **o: Any
    ) -> tuple[np.ndarray, np.ndarray, list[Any]]:
        plan, pools = self.plan(stretches, page, tile, **o)
        rule = RULES[self.rule]
        call = PagedCall(
            self.dtype, self.dim, page, 2, chunked=True, window=rule.window[0] >= 0,
            softcap=rule.softcap > 0, sinks=rule.sinks is not None,
        )  # fmt: skip
        merge = MergeConfig(self.dtype, self.dim, call.sinks, warps, fixed_order=True)
        return attend(plan, pools, choose(call, tile), merge, CHUNK, rule)


def same(a: np.ndarray, b: np.ndarray) -> bool:
    return np.array_equal(a.view(np.int32), b.view(np.int32))


@pytest.mark.parametrize(
    ("dtype", "dim", "rule"),
    [
        ("bf16", 64, "causal"),
        ("fp16", 128, "causal"),
        ("bf16", 64, "window"),
        ("bf16", 64, "softcap_sinks"),
    ],
)
def test_bits(dtype: str, dim: int, rule: str) -> None:
    world = World(dtype, dim, rule)
    expected = [world.attend([(s, 0, n)], tile=64)[:2] for s, n in enumerate(LENGTHS)]
    options = RULES[rule]
    for s in (0, 2, 4):
        q, k, v = (torch.from_numpy(x).double() for x in world.data[s])
        sinks = None if options.sinks is None else torch.from_numpy(options.sinks)
        window = options.window if options.window[0] >= 0 else None
        out, lse = sequence_attention(
            q, k, v, causal=True, scale=dim**-0.5, window=window, softcap=options.softcap,
            sinks=sinks,
        )  # fmt: skip
        np.testing.assert_allclose(expected[s][0], out.numpy(), rtol=0.02, atol=0.02)
        np.testing.assert_allclose(expected[s][1], lse.numpy(), rtol=1e-3, atol=1e-3)
    rng = np.random.default_rng(dim)
    for number in range(7):
        stretches = []
        for _ in range(int(rng.integers(1, 6))):
            s = int(rng.integers(len(LENGTHS)))
            n = min(int(rng.choice([1, 1, 1, 5, 30, 66, 140])), LENGTHS[s])
            begin = int(rng.integers(LENGTHS[s] - n + 1))
            if rng.random() < 0.4:
                edge = CHUNK * int(rng.integers(LENGTHS[s] // CHUNK + 1))
                begin = min(max(edge - int(rng.integers(n + 1)), 0), LENGTHS[s] - n)
            stretches.append((s, begin, n))
        out, lse, _ = world.attend(
            stretches,
            page=int(rng.choice([1, 16, 64])),
            tile=int(rng.choice([64, 128])),
            warps=1 if number % 2 else 8,
            shared=bool(rng.random() < 0.7),
            fold=[True, False, "always"][int(rng.integers(3))],
            num_workers=int(rng.integers(0, 90)),
        )
        for which, found in enumerate((out, lse)):
            wanted = np.concatenate([expected[s][which][b : b + n] for s, b, n in stretches])
            assert same(found, wanted), stretches


def test_every_tile_is_done_once_and_every_chunk_begins_anew() -> None:
    world = World("bf16", 64)
    plan, _ = world.plan([(0, 400, 200)], 16, 128)
    assert plan.merge_partials.tolist() == [DIRECT] * 200
    *_, log = world.attend([(0, 400, 200)], tile=128)
    tiles = CHUNK // 128
    for place, (tile, masked, first) in enumerate(log):
        begins = place == 0 or log[place - 1][0] == 0 or tile % tiles == tiles - 1
        assert first == begins
        assert masked or not first
        assert begins == (place == 0) or log[place - 1][0] in (0, tile + 1)


def test_the_emulation_finds_a_fold_that_is_wrong() -> None:
    """Such as one with the chunk's weight in the place of the total's."""
    from tests.emulation import chunked_attention

    world = World("bf16", 64)
    (expected, *_), (right, *_) = (world.attend([(0, 500, n)]) for n in (1, 70))
    assert same(expected[0], right[0])
    machine = chunked_attention.attention_machine(
        choose(PagedCall("bf16", 64, 16, 2, chunked=True), 64), CHUNK
    )
    fold = machine.load("attention.parts.fold")
    whole = fold.factors

    def swapped(*arguments: Any) -> Any:
        peak, total, before, added = whole(*arguments)
        return peak, total, added, before

    with mock.patch.object(fold, "factors", swapped):
        wrong, *_ = world.attend([(0, 500, 70)])
    assert not same(expected[0], wrong[0])


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize(
    ("warps", "heads", "on_device"),
    [(1, 1, False), (8, 1, False), (1, 1, True), (8, 1, True), (1, 8, True)],
)
def test_merges_of_all_lengths(warps: int, heads: int, on_device: bool, dim: int) -> None:
    """Lists of none, of 1 to 70, of one that is written already; chunks that nobody sees."""
    lengths, num_heads = [0, 1, 2, 3, 31, 32, 33, 70, 1, 1], 3
    generator = torch.Generator().manual_seed(1)
    count = sum(lengths)
    partial_out = torch.randn(count, num_heads, dim, generator=generator)
    partial_lse = torch.randn(count, num_heads, generator=generator) * 4
    hidden = torch.rand(count, num_heads, generator=generator) < 0.2
    partial_out[hidden], partial_lse[hidden] = 0.0, -math.inf
    order = torch.randperm(count, generator=generator).int()
    offsets = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    order[-1] = DIRECT
    order[-2] = INVALID if on_device else DIRECT
    shape = (len(lengths), num_heads)
    out, lse = np.full((*shape, dim), 7, np.float32), np.full(shape, 7, np.float32)
    m = {"out": out, "lse": lse, "partial_out": partial_out, "partial_lse": partial_lse}
    plan: Any = mock.Mock(merge_offsets=offsets, merge_partials=order)
    tensors: Any = mock.Mock(
        spec_set=list(m), **{name: Memory.of(np.asarray(x)) for name, x in m.items()}
    )
    config = MergeConfig("bf16", dim, False, warps, heads, on_device, fixed_order=True)
    merge_partials(plan, tensors, config, shape)
    for token in range(len(lengths) - 2):
        own = order[offsets[token] : offsets[token + 1]].long()
        expected, expected_lse = fold_chunks(partial_out[own], partial_lse[own])
        expected = expected.bfloat16().float().numpy()
        np.testing.assert_allclose(out[token], expected, rtol=0.01, atol=1e-6)
        np.testing.assert_allclose(lse[token], expected_lse.numpy(), rtol=1e-5, atol=1e-5)
    assert (out[-1] == 7).all(), "a direct result is left alone"
    assert (lse[-1] == 7).all()
    assert (np.isnan(out[-2]) if on_device else out[-2] == 7).all()
    assert (np.isnan(lse[-2]) if on_device else lse[-2] == 7).all()
