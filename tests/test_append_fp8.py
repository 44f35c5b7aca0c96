"""New K and V into fp8 pages: scaled, saturated and rounded, against plain arithmetic in Python."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import flashcore
from tests.append_cases import (
    FP8,
    Case,
    cases,
    expected,
    pool,
    scales_of,
    slots_of,
    values,
)
from tests.append_cases import differences as differing

MOST = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}


def codes(dtype: torch.dtype) -> list[float]:
    """Every finite value of the format, ascending."""
    found = torch.arange(256).to(torch.uint8).view(dtype).double()
    return sorted(set(found[found.isfinite()].tolist()))


def nearest(x: float, among: list[float]) -> float:
    """Rounded to the nearest, ties to the even code, beyond the largest to it."""
    if math.isnan(x):
        return x
    x = min(max(x, among[0]), among[-1])
    distance = min(abs(x - c) for c in among)
    closest = [c for c in among if abs(x - c) == distance]
    if len(closest) == 1:
        return closest[0]
    step = abs(closest[1] - closest[0])
    return next(c for c in closest if (c / step) % 2 == 0)


@pytest.mark.parametrize("dtype", FP8)
@pytest.mark.parametrize("scale", ["none", "one", "heads", "mixed"])
def test_against_python(dtype: torch.dtype, scale: str) -> None:
    case = Case(torch.float32, dtype, scale=scale, tokens=4)
    k, v = values(case, "cpu")
    pages, slots, scales = pool(case, "cpu"), torch.tensor([3, -1, 17, 60]), scales_of(case, "cpu")
    flashcore.append_kv(k, v, *pages, slot_mapping=slots, **scales)
    among = codes(dtype)
    assert among[-1] == MOST[dtype]
    for new, stored, name in ((k, pages[0], "k_scale"), (v, pages[1], "v_scale")):
        each = scales.get(name, torch.tensor(1.0)).expand(case.heads)
        for token, slot in enumerate(slots.tolist()):
            if slot < 0:
                continue
            got = stored[slot // 16, slot % 16].float()
            divided = (new[token] / each[:, None]).double()
            for value, x in zip(got.flatten().tolist(), divided.flatten().tolist(), strict=True):
                wanted = nearest(x, among)
                assert value == wanted or (math.isnan(value) and math.isnan(wanted)), (x, value)


@pytest.mark.parametrize("dtype", FP8)
@pytest.mark.parametrize("of", [torch.float32, torch.bfloat16, torch.float16])
def test_nothing_finite_becomes_nan_or_infinite(dtype: torch.dtype, of: torch.dtype) -> None:
    """Infinity becomes the largest value too; a NaN alone stays what it is."""
    largest = torch.finfo(of).max
    x = torch.tensor([largest, -largest, math.inf, -math.inf, MOST[dtype] * 1.07, math.nan])
    k = x.to(of).view(1, 1, 6)
    pages = torch.zeros(1, 1, 1, 6).to(dtype), torch.zeros(1, 1, 1, 6).to(dtype)
    tiny = torch.tensor(1e-30)
    flashcore.append_kv(k, k, *pages, slot_mapping=torch.tensor([0]), k_scale=tiny)
    for stored in pages:
        most = MOST[dtype]
        assert stored.flatten()[:5].tolist() == [most, -most, most, -most, most]
        assert stored.flatten()[5].isnan()


@pytest.mark.parametrize("case", cases(), ids=str)
def test_every_case_on_the_cpu(case: Case) -> None:
    """Nothing but the slots is written, whatever the strides; the scales are taken as given."""
    k, v = values(case, "cpu")
    pages, scales = pool(case, "cpu"), scales_of(case, "cpu")
    slots = slots_of(case, pages[0].shape[0] * case.page_tokens, "cpu")
    wanted = expected(k, v, pages, slots, scales)
    flashcore.append_kv(k, v, *pages, slot_mapping=slots, **scales)
    for actual, right in zip(pages, wanted, strict=True):
        assert differing(actual, right) == []


def test_what_is_appended_is_what_attention_reads() -> None:
    """The same scales in both: K and V come back within half a step of the format."""
    table, lens = torch.tensor([[0, 1], [2, 3]]), torch.tensor([9, 9])
    new = torch.randn(18, 2, 16, generator=torch.Generator().manual_seed(0)) * 1e-3
    pages = [torch.zeros(4, 8, 2, 16).to(torch.float8_e4m3fn) for _ in range(2)]
    scales = {"k_scale": torch.tensor([1e-5, 2e-5]), "v_scale": torch.tensor(1e-5)}
    tables = {"page_table": table, "seq_lens": lens}
    flashcore.append_kv(new, new, *pages, **tables, q_lens=[9, 9], **scales)
    q = torch.zeros(2, 4, 16, dtype=torch.bfloat16)
    out = flashcore.paged_attention(q, *pages, **tables, window=(0, 0), **scales)
    own = new[[8, 17]].repeat_interleave(2, 1)
    torch.testing.assert_close(out.float(), own, rtol=2**-4 + 2**-8, atol=1e-7)


def test_under_a_compiler() -> None:
    case = Case(torch.bfloat16, torch.float8_e4m3fn, scale="heads")
    k, v = values(case, "cpu")
    pages, scales = pool(case, "cpu"), scales_of(case, "cpu")
    slots = slots_of(case, pages[0].shape[0] * case.page_tokens, "cpu")
    wanted = expected(k, v, pages, slots, scales)
    append = torch.compile(flashcore.append_kv, fullgraph=True, backend="aot_eager")
    append(k, v, *pages, slot_mapping=slots, **scales)
    for actual, right in zip(pages, wanted, strict=True):
        assert differing(actual, right) == []


def call(**changes: Any) -> None:
    case = Case(torch.bfloat16, torch.float8_e4m3fn, tokens=2)
    (k, v), (k_pages, v_pages) = values(case, "cpu"), pool(case, "cpu")
    arguments = {"k": k, "v": v, "k_pages": k_pages, "v_pages": v_pages}
    flashcore.append_kv(**{**arguments, "slot_mapping": torch.tensor([1, 2]), **changes})


PAGES = torch.zeros(4, 16, 2, 64)
OTHERS = {"k_pages": PAGES.half(), "v_pages": PAGES.half()}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"k_scale": 0.5}, TypeError, "k_scale must be None or a float32 tensor .* got float"),
        ({"v_scale": torch.ones(1)}, ValueError, r"v_scale must be .* got shape \(1,\)"),
        ({"v_scale": torch.ones(2).half()}, TypeError, "v_scale must be .* got float16"),
        ({"k_scale": torch.ones(2, device="meta")}, ValueError, "k_scale must be on the device of"),
        ({"k_scale": torch.ones(2), **OTHERS}, ValueError, "k_scale goes with fp8 pages"),
        ({"v_pages": PAGES.half()}, TypeError, "v_pages must have the dtype of k_pages"),
        ({"k": PAGES[0, :2].to(torch.float8_e5m2)}, TypeError, "k must have dtype float32,"),
        (
            {"k_pages": PAGES.to(torch.uint8), "v_pages": PAGES.to(torch.uint8)},
            TypeError,
            "k_pages has dtype uint8",
        ),
    ],
    ids=str,
)
def test_refusals(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}"):
        call(**changes)
