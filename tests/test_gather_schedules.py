"""How many gathered rows a warp waits for at a time: what is legal, and what is compiled."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from flashcore.jit.folder import default_folder
from flashcore.jit.gates import check_kernel
from flashcore.jit.kernel import Kernel
from flashcore.jit.target import detect_target
from flashcore.sm90.config.paged import PagedCall, choose, illegal_reason
from flashcore.sm90.families import PAGED
from tests.runtime_fixtures import needs_disassembler, needs_dsl

GATHERED = choose(PagedCall("bf16", 128, 1, 4), 64)


@pytest.mark.parametrize("rows", [0, 16, 48, 64, 128])
def test_whole_groups_of_rows_are_legal(rows: int) -> None:
    assert illegal_reason(replace(GATHERED, rows_in_flight=rows)) is None


@pytest.mark.parametrize(
    ("call", "rows"),
    [
        (PagedCall("bf16", 128, 1, 4), 8),
        (PagedCall("bf16", 128, 1, 4), -16),
        (PagedCall("bf16", 128, 64, 4), 16),  # boxes
        (PagedCall("bf16", 128, 1, 4, kv_dtype="e4m3"), 16),
    ],
)
def test_other_rows_are_not(call: PagedCall, rows: int) -> None:
    config = choose(call, 64)
    assert illegal_reason(config) is None
    assert f"rows_in_flight {rows}" in str(illegal_reason(replace(config, rows_in_flight=rows)))


@needs_dsl
@needs_disassembler
@pytest.mark.parametrize(
    "changes",
    [{"rows_in_flight": 48}, {"rows_in_flight": 32, "stages": 2}, {"fetch_whole_rows": False}],
    ids=str,
)
def test_schedules_pass_the_gates(changes: dict[str, Any]) -> None:
    rules, other = (
        check_kernel(Kernel(PAGED, config), default_folder(), detect_target())
        for config in (GATHERED, replace(GATHERED, **changes))
    )
    assert other.violations == []
    assert rules.resources is not None
    assert other.resources is not None
    # What a warp waits for beside its last copies and, of a consumer, its queries'.
    waits = [found.count("DEPBAR.LE") for found in (rules.resources, other.resources)]
    assert (waits[1] > waits[0]) == ("rows_in_flight" in changes)
    fetch = "LDGSTS.E.BYPASS.LTC256B.128"
    assert rules.resources.count(fetch) > 0
    assert (other.resources.count(fetch) == 0) == ("fetch_whole_rows" in changes)
