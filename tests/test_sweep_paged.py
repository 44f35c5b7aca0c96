"""tools/sweep_paged.py without a GPU: its plans, checks and lines; times are made up."""

from __future__ import annotations

from typing import Any

import pytest

import flashcore
from flashcore.bench.paged_problems import PagedProblem, make_inputs
from flashcore.contract.work import Work
from flashcore.planner import build
from flashcore.reference import paged_attention_reference
from tests.bench_paged_fakes import machine
from tools import sweep_paged
from tools.sweep_paged import WHOLE, Cut, cuts, distinct, format_row, plan_by, sweep

SHAPE = {"q_heads": 4, "kv_heads": 2, "head_dim": 64, "page_tokens": 64}
PROBLEM = PagedProblem("small", 4, 1024, prefix_tokens=768, **SHAPE)


def test_runs_are_cut_as_they_are_named() -> None:
    inputs = make_inputs(PROBLEM, "cpu")
    plan = plan_by(Cut(64, shared=256, own=WHOLE), PROBLEM, inputs)
    tokens = plan.work[:, Work.NUM_TOKENS].tolist()
    assert tokens == [256] * (2 * 3 + 2 * 4)  # KV heads times splits of the prefix, own runs
    plan = plan_by(Cut(64, shared=WHOLE, own=128), PROBLEM, inputs)
    assert sorted(plan.work[:, Work.NUM_TOKENS].tolist()) == [128] * 16 + [768] * 2


def test_the_rules_are_as_they_were() -> None:
    rule = build._split_pages
    assert len(distinct(PROBLEM, make_inputs(PROBLEM, "cpu"))) > 5
    assert build._split_pages is rule
    names = [cut.name for cut in cuts(PROBLEM)]
    assert len(names) == len(set(names))
    assert "tile 64, shared 512, own -" in names
    alone = PagedProblem("alone", 1, 128, **SHAPE)
    assert [cut for cut in cuts(alone) if cut.shared != WHOLE or cut.own != WHOLE] == []


def test_all_plans_give_the_same_result() -> None:
    row = sweep(PROBLEM, machine(), rounds=2)
    assert {"rules", "no merge", "2 layers", "4 layers", "tables in L2"} <= set(row["us"])
    assert row["us"]["rules"] == pytest.approx(1000.0)
    assert row["plans"]["tile 64, shared 256, own -"]["items"] == 14
    line = format_row(row)
    assert line.startswith("small: 1000.0 (rules; ")
    assert "no merge 1000.0" in line


def test_a_wrong_result_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(inputs: Any, plan: Any) -> Any:
        factor = 1.0 if plan.work.shape[0] != 14 else 1.1
        right = sweep_paged_call(inputs, plan)
        return lambda: right() * factor

    sweep_paged_call = sweep_paged.our_call
    monkeypatch.setattr(sweep_paged, "our_call", broken)
    with pytest.raises(RuntimeError, match="from the result of the rules' plan"):
        sweep(PROBLEM, machine(), rounds=1)


def test_the_reference_agrees() -> None:
    """Splits by hand, as the torch path computes them."""
    inputs = make_inputs(PROBLEM, "cpu")
    plan = plan_by(Cut(64, shared=256, own=128), PROBLEM, inputs)
    out = sweep_paged.our_call(inputs, plan)()
    layout = flashcore.layout_from_page_table(inputs.page_table, inputs.seq_lens, page_tokens=64)
    exact = paged_attention_reference(inputs.q, inputs.k_pages, inputs.v_pages, layout, [1] * 4)[0]
    assert float(sweep_paged.relative_distance(out, exact).max()) < 1e-2
