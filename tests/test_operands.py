"""Operands of compiled functions, in kernels and in launches as `contract.operands` has them."""

from __future__ import annotations

import ast
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch

import flashcore
from flashcore.contract import operands
from flashcore.planner import chunks, split
from flashcore.planner.folding import Costs
from flashcore.problem import Extras, KVPool, Packing, Rules
from flashcore.sm90.launch import dense, paged
from tests.recorded_launches import SMS, Recorder, install

KERNELS = Path(__file__).parents[1] / "flashcore" / "sm90" / "kernels"

# ---------------------------------------------------------------- signatures


@pytest.mark.parametrize(
    ("file", "called"),
    [
        ("attention/dense/kernel.py", operands.Dense),
        ("attention/paged/kernel.py", operands.Paged),
        ("merge.py", operands.Merge),
        ("planner/kernel.py", operands.Planner),
        ("pager.py", operands.Pager),
    ],
)
def test_a_kernel_takes_its_operands_in_order(file: str, called: Any) -> None:
    functions = [
        node
        for node in ast.walk(ast.parse((KERNELS / file).read_text()))
        if isinstance(node, ast.FunctionDef) and node.name == "__call__"
    ]
    (function,) = functions
    names = [argument.arg for argument in function.args.args]
    assert names == ["self", *called._fields, "stream"]


def test_a_layout_is_a_source_of_plans() -> None:
    assert set(operands.PlannerSource._fields) < set(operands.PagerResult._fields)
    assert operands.Pager._fields[: len(operands.PagerBatch._fields)] == operands.PagerBatch._fields


# ---------------------------------------------------------------- launches


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    return install(monkeypatch)


def same(found: Any, expected: Any) -> bool:
    """The same object, a view of the same elements, an equal number, or a tuple of such."""
    if isinstance(expected, tuple):
        matches = isinstance(found, tuple) and len(found) == len(expected)
        return matches and all(map(same, found, expected))
    if isinstance(expected, torch.Tensor):
        return (
            isinstance(found, torch.Tensor)
            and (found.data_ptr(), found.dtype) == (expected.data_ptr(), expected.dtype)
            and (found.shape, found.stride()) == (expected.shape, expected.stride())
        )
    return found is expected or (isinstance(found, (int, float)) and found == expected)


def assert_call(found: tuple[Any, ...], expected: Any) -> None:
    """Each operand in its place, and no two of them, or of a tuple of them, could be swapped."""
    named = expected._asdict()
    assert len(found) == len(named)
    assert [n for n, x in zip(named, found, strict=True) if not same(x, named[n])] == []
    for one, other in combinations(named, 2):
        if named[one] is not None or named[other] is not None:
            assert not same(named[one], named[other]), f"{one} could be {other}"
    for value in named.values():
        if hasattr(value, "_fields"):
            assert_call(value, value)


def rows(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape, dtype=torch.bfloat16)


def test_dense(recorder: Recorder) -> None:
    q, k, v = rows(9000, 8, 64), rows(9001, 2, 64), rows(9001, 2, 64)
    ends = [torch.tensor([0, 4000, n], dtype=torch.int32) for n in (9000, 9001)]
    sinks = torch.zeros(8)
    packing = Packing(*ends, max_seqlen_q=6000)
    out, lse = dense.dense_attention(q, k, v, Rules(0.3, False, 9, 4, 5.0), sinks, packing, True)
    expected = operands.Dense(
        q=q,
        k=k,
        v=v,
        out=out,
        lse=lse,
        cu_seqlens_q=ends[0],
        cu_seqlens_k=ends[1],
        sinks=sinks,
        counter="counter",
        softmax_scale=0.3,
        softcap=5.0,
        window_left=9,
        window_right=4,
        max_seqlen_q=6000,
        num_ctas=SMS,
    )
    assert_call(recorder.calls["dense"], expected)


def device_planner_of(**changes: Any) -> flashcore.DevicePlanner:
    options: dict[str, Any] = {"page_tokens": 16, "tile_m": 128, "batch_invariant": True}
    return flashcore.DevicePlanner(
        flashcore.Capacities(max_batch=5, max_entries=300, max_q=20),
        num_pages=33,
        num_q_heads=12,
        num_kv_heads=2,
        head_dim=64,
        num_workers=77,
        device="cpu",
        **{**options, **changes},
    )


@pytest.mark.parametrize(("tree", "fp8"), [(True, False), (False, False), (True, True)])
def test_paged_and_merge(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch, tree: bool, fp8: bool
) -> None:
    plan = device_planner_of().plan
    q, k, v, out = rows(20, 12, 64), rows(33, 16, 2, 64), rows(33, 16, 2, 64), rows(20, 12, 64)
    sinks = torch.zeros(12)
    mask, positions = torch.ones(20, 7, dtype=torch.bool), torch.arange(20, dtype=torch.int32)
    monkeypatch.setattr(paged, "by_depth", lambda *_: (mask, positions))
    extras = Extras(sinks, mask, positions) if tree else Extras(sinks)
    rules = Rules(0.3, not tree, 9, 4, 5.0)
    pool = KVPool(k, v)
    if fp8:
        k, v = k.to(torch.float8_e5m2), v.to(torch.float8_e5m2)
        pool = KVPool(k, v, torch.tensor(0.5), torch.tensor([1.0, 2.0, 3.0])[::2])
    _, lse = paged.paged_attention(q, pool, plan.planned, rules, extras, out)
    expected = operands.Paged(
        q=q,
        k_pages=k.view(torch.uint8) if fp8 else k,
        v_pages=v.view(torch.uint8) if fp8 else v,
        out=out,
        lse=lse,
        partial_out=plan.partial_out,
        partial_lse=plan.partial_lse,
        cols=plan.cols,
        work=plan.work,
        q_tokens=plan.q_tokens,
        q_positions=plan.q_positions,
        q_index=plan.q_index if tree else None,
        tree_mask=mask.view(torch.uint8) if tree else None,
        tree_positions=positions if tree else None,
        sinks=sinks,
        k_scale=None if pool.k_scale is None else pool.k_scale.expand(2),
        v_scale=pool.v_scale,
        counter=plan.counter,
        counts=plan.counts,
        softmax_scale=0.3,
        softcap=5.0,
        window_left=9,
        window_right=-1 if tree else 4,
        num_ctas=SMS,
    )
    if tree:
        assert_call(recorder.calls["paged"], expected)
    else:
        assert same(recorder.calls["paged"], tuple(expected))
    merge = operands.Merge(
        out=out,
        lse=lse,
        partial_out=plan.partial_out,
        partial_lse=plan.partial_lse,
        merge_offsets=plan.merge_offsets,
        merge_partials=plan.merge_partials,
        sinks=sinks,
        counts=plan.counts,
        tree_width=7 if tree else 2**31 - 1,
    )
    assert_call(recorder.calls["merge"], merge)


def test_planner(recorder: Recorder) -> None:
    made = device_planner_of(page_tokens=4, tile_m=100)
    short, long = chunks.lengths(4)
    costs = Costs.of(made.plan.problem)
    problem = operands.PlannerProblem(
        page_tokens=4,
        num_pages=33,
        kv_heads=2,
        group_size=6,
        tile_m=100,
        kv_token_cost=costs.kv_token,
        partial_token_cost=costs.partial_token,
        least_gain=costs.least_gain,
        fold=1,
        num_workers=77,
        min_split_tokens=split.MIN_SPLIT_TOKENS,
        long_split_tokens=split.LONG_SPLIT_TOKENS,
        split_unit=split.TILE_TOKENS,
        block_cost=split.block_cost(100, *made.plan.problem.dims),
        chunk_pages=short,
        long_chunk_pages=long,
        few_queries=chunks.FEW_QUERIES,
        seen=made._seen.data_ptr(),
    )
    table = torch.zeros(5, 7, dtype=torch.int32)
    lens, q_lens = (torch.ones(5, dtype=torch.int32) for _ in range(2))
    made.update(table, lens, q_lens)
    plan = operands.PlannerResult(*(getattr(made.plan, n) for n in operands.PlannerResult._fields))
    expected = operands.Planner(
        page_table=table,
        seq_lens=lens,
        q_lens=q_lens,
        source=None,
        plan=plan,
        scratch=made.scratch.memory,
        problem=problem,
        num_sms=SMS,
    )
    assert_call(recorder.calls["planner"], expected)


def test_planner_of_a_layout(recorder: Recorder) -> None:
    made = device_planner_of(batch_invariant=False)
    layout = device_pager_of().layout
    q_lens = torch.ones(5, dtype=torch.int32)
    made.update_from_layout(layout, q_lens)
    found = operands.Planner(*recorder.calls["planner"])
    assert found[:2] == (None, None)
    assert found.q_lens is q_lens
    source = [getattr(layout, name) for name in operands.PlannerSource._fields]
    assert_call(found.source, operands.PlannerSource(*source))


def device_pager_of() -> flashcore.DevicePager:
    return flashcore.DevicePager(
        max_batch=5, max_entries=300, num_pages=33, max_tokens=70, page_tokens=16, device="cpu"
    )


def test_pager(recorder: Recorder) -> None:
    made = device_pager_of()
    pages, resident = torch.zeros(70, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    begins, ends = (torch.zeros(5, dtype=torch.int32) for _ in range(2))
    made.update(pages, begins, ends, resident)
    layout = [getattr(made.layout, name) for name in operands.PagerResult._fields]
    expected = operands.Pager(
        pages=pages,
        begins=begins,
        ends=ends,
        resident=resident,
        layout=operands.PagerResult(*layout),
        scratch=made._scratch,
        page_tokens=16,
        num_pages=33,
        num_sms=SMS,
    )
    assert_call(recorder.calls["pager"], expected)
