"""Items of few rows on fp8 pages: the text of the consumer warps on the host, what is chosen, and
the machine code.

The text is run lane by lane on stages as the loads leave them (tests/emulation/few_rows.py), to see
whether fragments, swizzles, masks, peaks and the sums over the warps are put together rightly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from flashcore.planner.types import Plan
from flashcore.sm90.config import paged
from flashcore.sm90.config.paged import PagedCall, PagedConfig
from tests.cases import Batch
from tests.compare import assert_close
from tests.emulation.few_rows import Consumer, Pools, items_of
from tests.emulation.simt import Memory
from tests.fp8 import FORMATS, fp8_tensors
from tests.runtime_fixtures import needs_dsl

pytestmark = needs_dsl

HEADS = (8, 2)
K_SCALE, V_SCALE = np.float32([0.7, 1.3]), np.float32([2.0, 0.6])


@dataclass(frozen=True)
class Rule:
    window: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    sinks: bool = False
    causal: bool = True


RULES = {
    "causal": Rule(),
    "full": Rule(causal=False),
    "window": Rule((70, 0)),
    "everything": Rule((150, 1), softcap=4.0, sinks=True),
}


def config_of(rule: Rule, few_rows: int, **of_call: Any) -> PagedConfig:
    call = PagedCall(
        "fp16",
        page_tokens=of_call.pop("page_tokens", 16),
        group_size=of_call.pop("group_size", 4),
        kv_dtype=of_call.pop("kv_dtype", "e4m3"),
        causal=rule.causal,
        window=rule.window != (-1, -1),
        softcap=rule.softcap != 0,
        sinks=rule.sinks,
        head_dim=of_call.pop("head_dim", 128),
    )
    return replace(paged.choose(call, 64), few_rows=few_rows)


def batch_of(seed: int, page_tokens: int, head_dim: int, longest_q: int = 1) -> Batch:
    """Four sequences of which three begin alike, their last pages partial."""
    rng = np.random.default_rng(seed)
    common, columns = 320 // page_tokens, 640 // page_tokens
    lengths = [0, 1, *(int(n) for n in rng.integers(350, 640, 3))]
    table = rng.permutation(5 * columns).reshape(5, columns)
    table[3:, :common] = table[2, :common]
    q_lens = [1, 1, *(int(n) for n in rng.integers(1, longest_q + 1, 3))]
    return Batch(
        torch.from_numpy(table).int(), lengths, q_lens, page_tokens, 5 * columns, *HEADS,
        head_dim=head_dim, seed=seed,
    )  # fmt: skip


class Expected:
    """An item by itself in float64."""

    def __init__(self, rule: Rule, pools: Any, plan: Plan, sinks: np.ndarray):
        self.rule, self.pools, self.plan, self.sinks = rule, pools, plan, sinks

    def row(self, c: PagedConfig, item: Any, row: int) -> tuple[np.ndarray, float]:
        """(result, LSE) of a packed row."""
        packed = item.row_begin + row
        head = item.kv_head * c.group_size + packed % c.group_size
        gathered = packed // c.group_size
        position = int(self.plan.q_positions[gathered]) - item.kv_offset
        left, right = self.rule.window
        low = max(position - left, 0) if left >= 0 else 0
        high = item.num_tokens
        if self.rule.causal:
            high = min(high, position + 1)
        if right >= 0:
            high = min(high, position + right + 1)
        keys = np.arange(low, max(low, min(high, item.num_tokens)))
        pages = self.plan.cols.numpy()[item.entry + keys // c.page_tokens]
        k, v = (
            x[pages, keys % c.page_tokens, item.kv_head].astype(np.float64) for x in self.pools[1:]
        )
        q = self.pools[0][int(self.plan.q_tokens[gathered]), head].astype(np.float64)
        scores = k @ q * c.head_dim**-0.5 * K_SCALE[item.kv_head]
        if self.rule.softcap:
            scores = np.tanh(scores / self.rule.softcap) * self.rule.softcap
        with_sink = np.array([*scores, self.sinks[head]])[: None if self.adds(item) else -1]
        if not with_sink.size:
            return np.zeros(c.v_head_dim), -math.inf
        lse = float(np.logaddexp.reduce(with_sink))
        return np.exp(scores - lse) @ v * V_SCALE[item.kv_head], lse

    def adds(self, item: Any) -> bool:
        return self.rule.sinks and item.partial < 0


def run(
    batch: Batch,
    config: PagedConfig,
    rule: Rule,
    q: Any,
    codes: Any,
    num_workers: int,
    first: int = 0,
) -> list[tuple[Any, np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """(item, out, LSE, expected out, expected LSE) of each item of few rows.

    first: tiles that the CTA has had before.
    """
    plan = batch.plan(tile_m=64, num_workers=num_workers)
    consumer = Consumer(config)
    pools = Pools(q.float().numpy(), *(x.view(torch.uint8).numpy() for x in codes))
    wide = (pools.q, *(x.to(torch.float32).numpy() for x in codes))
    sinks = np.float32([-1, 0, 2, 5, -3, 1, 0.5, 3])
    tokens, heads = pools.q.shape[:2]
    partials = max(plan.num_partial_tokens, 1)
    nan = np.float32(np.nan)
    arrays: dict[str, np.ndarray] = {
        "q": pools.q, "out": np.full((tokens, heads, config.v_head_dim), nan),
        "lse": np.full((tokens, heads), nan),
        "partial_out": np.full((partials, heads, config.v_head_dim), nan),
        "partial_lse": np.full((partials, heads), nan),
        "q_tokens": plan.q_tokens.numpy(), "q_positions": plan.q_positions.numpy(),
        "sinks": sinks, "v_scale": V_SCALE,
    }  # fmt: skip
    m = SimpleNamespace(**{name: Memory.of(x) for name, x in arrays.items()})
    m.cols = plan.cols.numpy()
    m.q.element_type = "fp16"
    intervals = consumer.machine.load("attention.paged.intervals")
    softmax = consumer.machine.load("attention.parts.softmax")
    window = intervals.Bounds(*rule.window)
    expected = Expected(rule, wide, plan, sinks)
    found, tiles = [], first
    for item in items_of(consumer, plan, m, window):
        tiles += max(item.end - item.first, 0)
        if not consumer.shape.takes(config, item):
            continue
        scale = softmax.scale_of(
            config, np.float32(config.head_dim**-0.5), np.float32(rule.softcap)
        )
        factor = K_SCALE[item.kv_head]
        if rule.softcap:
            scale = scale._replace(cap_factor=scale.cap_factor * factor)
        else:
            scale = scale._replace(log2=scale.log2 * factor)
        consumer.attend(m, pools, item, window, scale, tiles)
        rows = np.arange(item.num_rows)
        packed = item.row_begin + rows
        head = item.kv_head * config.group_size + packed % config.group_size
        if item.partial < 0:
            at = plan.q_tokens.numpy()[packed // config.group_size], head
            results = arrays["out"][at], arrays["lse"][at]
        else:
            at = (
                item.partial + packed // config.group_size - item.row_begin // config.group_size,
                head,
            )
            results = arrays["partial_out"][at], arrays["partial_lse"][at]
        each = [expected.row(config, item, row) for row in rows]
        found.append((item, *results, *(np.array(x) for x in zip(*each, strict=True))))
    return found


def check(found: list[Any]) -> None:
    for item, out, lse, expected, expected_lse in found:
        assert_close(torch.from_numpy(out), torch.from_numpy(expected), torch.float16)
        seen = np.isfinite(expected_lse)
        assert np.array_equal(np.isfinite(lse), seen), item
        np.testing.assert_allclose(lse[seen], expected_lse[seen], rtol=1e-4, atol=1e-4)


# Each shape of warps, each width of the swizzle, blocks of 128 columns, pages loaded either
# way, each format, each mask.
CASES = [
    ("causal", 8, 128, 16, 2, "e4m3", 1),
    ("causal", 16, 128, 1, 4, "e5m2", 1),
    ("causal", 32, 128, 16, 8, "e4m3", 1),
    ("full", 32, 64, 16, 8, "e5m2", 1),
    ("causal", 8, 64, 16, 2, "e4m3", 9),
    ("causal", 8, 256, 16, 2, "e4m3", 1),
    ("window", 8, 128, 16, 2, "e4m3", 1),
    ("window", 16, 64, 1, 4, "e5m2", 9),
    ("everything", 16, 128, 16, 4, "e4m3", 1),
    ("everything", 8, 256, 1, 2, "e5m2", 1),
]


@pytest.mark.parametrize(
    ("rule", "few_rows", "head_dim", "page", "longest_q", "kv_dtype", "workers"), CASES
)
def test_items(
    rule: str,
    few_rows: int,
    head_dim: int,
    page: int,
    longest_q: int,
    kv_dtype: str,
    workers: int,
) -> None:
    of = RULES[rule]
    config = config_of(of, few_rows, head_dim=head_dim, page_tokens=page, kv_dtype=kv_dtype)
    batch = batch_of(head_dim + page, page, head_dim, longest_q)
    q, *codes = fp8_tensors(batch, FORMATS[kv_dtype])
    codes[0].view(torch.uint8)[:, ::5] ^= 0x20  # scores of all sizes, so that peaks move
    found = run(batch, config, of, q, codes, num_workers=workers)
    shapes = {-(-item.num_rows // 8) for item, *_ in found}
    assert {item.partial < 0 for item, *_ in found} == {True, False}
    assert few_rows // 16 < max(shapes) <= few_rows // 8
    assert max(item.end - item.first for item, *_ in found) > (2 if workers == 1 else 0)
    check(found)


@pytest.mark.parametrize("kv_dtype", FORMATS)
def test_what_is_not_finite_reaches_the_rows_that_see_it_alone(kv_dtype: str) -> None:
    """Keys that a window hides from some rows of an item and shows to others."""
    rule = RULES["window"]
    config = config_of(rule, 16, kv_dtype=kv_dtype)
    batch = batch_of(3, 16, 128, 4)
    q, k, v = fp8_tensors(batch, FORMATS[kv_dtype])
    clean = run(batch, config, rule, q, (k, v), num_workers=1)
    bad = v.clone()
    codes = {"e4m3": (0x7F, 0xFF), "e5m2": (0x7C, 0xFC, 0x7E, 0xFF)}[kv_dtype]
    for n, code in enumerate(codes):
        bad.view(torch.uint8)[:, n::4, :, 5 * n + 1] = code
    found = run(batch, config, rule, q, (k, bad), num_workers=1)
    some = 0
    for (item, out, lse, *_), (_, plain, lse_of_plain, *_), (*_, expected, _) in zip(
        found, clean, found, strict=True
    ):
        assert np.array_equal(lse, lse_of_plain)
        for got, wanted in ((np.isnan, np.isnan), (np.isposinf, np.isposinf)):
            assert np.array_equal(got(out), wanted(expected)), item
        kept = np.isfinite(expected)
        np.testing.assert_array_equal(out[kept], plain[kept])
        some += item.all_low > item.low and kept.any() and not kept.all()
    assert some


def test_an_item_has_the_same_bits_whatever_lies_beside_it() -> None:
    """Where stages begin in the ring, and in which stages the sums of the warps are put."""
    config, rule = config_of(RULES["causal"], 16), RULES["causal"]
    batch = batch_of(5, 16, 128, 4)
    q, *codes = fp8_tensors(batch, FORMATS["e4m3"])
    runs = [run(batch, config, rule, q, codes, num_workers=1, first=n) for n in range(3)]
    for one in runs[1:]:
        for (_, *results), (_, *others) in zip(runs[0], one, strict=True):
            assert all(np.array_equal(*pair) for pair in zip(results, others, strict=True))
