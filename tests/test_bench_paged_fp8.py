"""The paged benchmark on fp8 pages, without a GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from flashcore.bench import paged_providers
from flashcore.bench.paged_problems import PagedProblem, make_inputs
from flashcore.bench.paged_providers import (
    OURS,
    OURS_BF16,
    WAYS,
    WRONG,
    WRONG_IN_FP8,
    PagedProvider,
    _prepare_widened,
)
from flashcore.bench.paged_report import format_table, summarise
from tests.bench_paged_fakes import PREFILL, SHARED, complete, measured, ours


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("problem", [SHARED, PREFILL])
def test_fp8_pages_are_half_the_bytes_and_the_same_values(
    problem: PagedProblem, dtype: torch.dtype
) -> None:
    fp8 = replace(problem, kv_dtype=dtype)
    inputs = make_inputs(fp8, "cpu")
    assert inputs.k_pages.dtype == inputs.v_pages.dtype == dtype
    assert 2 * fp8.token_bytes == problem.token_bytes
    wide = PagedProvider(OURS_BF16, "1.0", _prepare_widened)
    result = measured(ours(), wide, problem=fp8)
    of = {row["kernel"]: row for row in result["rows"]}
    assert of[OURS]["bound_ms"] == of[OURS_BF16]["bound_ms"]
    assert {row["kv_dtype"] for row in of.values()} == {str(dtype).removeprefix("torch.")}
    assert of[OURS_BF16]["largest_distance_from_flashcore"] < 1e-2
    (line,) = summarise(result["rows"])
    assert line["time_over_bf16"] == 1.0
    assert line["best_peer"] is None
    assert "flashcore bf16" in format_table(complete(result))


def test_both_ways_of_prefill_stand_beside_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paged_providers, "_flashcore", ours)
    both = [paged_providers._one_way(name) for name in WAYS]
    fp8 = replace(PREFILL, kv_dtype=torch.float8_e4m3fn)
    result = measured(ours(), *both, problem=fp8)
    assert [row["kernel"] for row in result["rows"]] == [OURS, *WAYS]
    assert {row["largest_distance_from_flashcore"] for row in result["rows"][1:]} == {0.0}
    assert summarise(result["rows"])[0]["best_peer"] is None, "they are no peers"
    table = format_table(complete(result))
    assert "converting" in table
    assert "expanding" in table
    decode = measured(*both, problem=replace(SHARED, kv_dtype=torch.float8_e4m3fn))
    assert decode["rows"] == []
    assert all("it is timed in prefill" in text for text in decode["skipped"])


def test_a_kernel_that_rounds_to_fp8_is_another_class() -> None:
    fp8 = replace(SHARED, kv_dtype=torch.float8_e4m3fn)
    peer = replace(ours(1.05, "fa3"), wrong=WRONG_IN_FP8)
    assert [row["kernel"] for row in measured(ours(), peer, problem=fp8)["rows"]] == [OURS, "fa3"]
    strict = measured(ours(), replace(peer, wrong=WRONG), problem=fp8)
    assert "relative error" in strict["skipped"][0]
