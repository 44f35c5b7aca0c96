"""tools/sweep_gather.py without a GPU: its schedules, checks and lines; times are made up."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from flashcore.bench.paged_providers import our_call
from flashcore.sm90.config.paged import PagedCall, choose, illegal_reason
from flashcore.sm90.launch import paged as launch
from tests.bench_paged_fakes import SHARED, machine, ours
from tools import sweep_gather
from tools.sweep_gather import RULES, SCHEDULES, changed, chosen_with, format_row, problems, sweep

CALL = PagedCall("bf16", 128, 1, 4)
NAMES = list(SCHEDULES)


def test_all_schedules_can_run_and_keep_the_tiles() -> None:
    for problem in problems():
        rules = choose(CALL._replace(page_tokens=problem.page_tokens), 64)
        for name, changes in SCHEDULES.items():
            config = changed(rules, changes)
            assert illegal_reason(config) is None, name
            assert (config.tile_m, config.tile_n) == (rules.tile_m, rules.tile_n)
            assert (config == rules) == (name == RULES)


def test_a_launch_takes_the_schedule() -> None:
    config = chosen_with({"stages": 2})(CALL, 64)
    assert config == replace(choose(CALL, 64), stages=2)


def test_rows_and_lines() -> None:
    before = launch._choose
    row = sweep(SHARED, machine(), 2, NAMES, [ours(name="fa3")])
    assert launch._choose is before
    assert list(row["us"]) == [*NAMES, "fa3"]
    assert row["missing"] == {}
    lines = format_row(row).splitlines()
    assert lines[0] == "shared"
    assert lines[2].split() == ["2", "stages", "1000.0", "(1000.0", "to", "1000.0)", "1.000"]


def test_a_peer_that_fails_is_named() -> None:
    def broken(*_: Any) -> Any:
        raise ValueError("no such kernel")

    row = sweep(SHARED, machine(), 1, [RULES], [replace(ours(name="fa3"), prepare=broken)])
    assert list(row["us"]) == [RULES]
    assert format_row(row).splitlines()[-1] == "  fa3 is missing: ValueError: no such kernel"


def test_a_wrong_peer_is_an_error() -> None:
    with pytest.raises(RuntimeError, match=r"fa3: .* from the rules' result"):
        sweep(SHARED, machine(), 1, [RULES], [ours(1.1, "fa3")])


def test_other_bits_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def drifting(inputs: Any, plan: Any) -> Any:
        right = our_call(inputs, plan)
        calls.append(right)
        factor = 1.0 + 0.01 * (len(calls) == 2)
        return lambda: right() * factor

    monkeypatch.setattr(sweep_gather, "our_call", drifting)
    with pytest.raises(RuntimeError, match="2 stages: other bits"):
        sweep(SHARED, machine(), 1, NAMES, [])
