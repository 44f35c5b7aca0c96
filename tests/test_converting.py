"""Nothing is read too early or overwritten between pages of fp8 and products, whatever waits."""

from __future__ import annotations

from dataclasses import replace
from random import Random
from typing import Any

import pytest

from flashcore.sm90.config import paged
from flashcore.sm90.config.paged import PagedCall, PagedConfig
from tests.emulation.converting import Kernel


def faults(config: PagedConfig, seed: int, careless: bool = False) -> list[str]:
    random = Random(seed)
    items = [random.choice([1, 1, 2, 3, 5, 14]) for _ in range(12)]
    few = [random.random() < 0.5 for _ in items] if config.few_rows else None
    return Kernel(
        items,
        random,
        warps=config.converting_warps,
        parts=config.converted_parts,
        stages=config.stages,
        wide_stages=config.product_stages,
        load_time=random.choice([0.1, 1, 20]),
        convert_time=random.choice([0.1, 1, 10]),
        softmax_time=random.choice([0.1, 1, 10, 50]),
        few=few,
        careless=careless,
    ).run()


def config(**changes: Any) -> PagedConfig:
    return replace(paged.choose(PagedCall("bf16", 128, 64, 4, kv_dtype="e4m3"), 64), **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"few_rows": 16},
        {"few_rows": 16, "stages": 2},
        {"few_rows": 16, "stages": 4, "wide_k_stages": 1, "wide_v_stages": 1},
        {"few_rows": 16, "converted_rows": 32},
        {"stages": 2},
        {"converting_warps": 1},
        {"converted_rows": 64},
        {"converted_rows": 16},
        {"wide_v_stages": 2, "stages": 3},
    ],
    ids=str,
)
def test_whatever_waits(changes: dict[str, Any]) -> None:
    chosen = config(**changes)
    assert paged.illegal_reason(chosen) is None
    assert [seed for seed in range(60) if faults(chosen, seed)] == []


def test_gathered_rows_are_converted_in_the_same_order() -> None:
    rows = paged.choose(PagedCall("bf16", 128, 1, 4, kv_dtype="e4m3"), 64)
    boxes = config()
    for name in ("converting_warps", "converted_rows", "stages", "product_stages"):
        assert getattr(rows, name) == getattr(boxes, name)


def test_a_warp_that_passes_over_tiles_takes_one_phase_for_another() -> None:
    """Three warps that took parts in turn did, where consumers were slow (tree masks)."""
    three = config(converting_warps=3)
    assert "each takes the same parts" in str(paged.illegal_reason(three))
    assert any("while its stage is read" in " ".join(faults(three, seed)) for seed in range(60))


def test_warps_wait_for_what_they_do_not_convert() -> None:
    """One that went on to the next item would find its stage full, with the tile before it."""
    mixed = config(few_rows=16)
    assert any("before it is there" in " ".join(faults(mixed, n, True)) for n in range(60))
