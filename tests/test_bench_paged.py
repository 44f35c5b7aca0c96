"""The paged benchmark without a GPU: its workloads, bounds and reports; times are made up."""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import flashcore
from flashcore.bench import dram, random_sharing
from flashcore.bench.graphs import time_graphs
from flashcore.bench.paged import Machine, add_bounds, run_paged
from flashcore.bench.paged_accuracy import Sample
from flashcore.bench.paged_problems import (
    Batch,
    PagedInputs,
    PagedProblem,
    make_batch,
    make_inputs,
    paged_problems,
)
from flashcore.bench.paged_providers import PagedProvider, our_call, paged_providers, plan_of
from flashcore.bench.paged_report import format_table, plot, summarise
from flashcore.cli import bench as bench_command
from flashcore.reference import paged_attention_reference
from tests import cli_calls
from tests.bench_paged_fakes import (
    PREFILL,
    SHARED,
    SMALL,
    TREE,
    CpuGraph,
    complete,
    machine,
    measured,
    ours,
)
from tests.cli_calls import assert_refused

NAMES = [problem.name for problem in paged_problems()]


def test_the_workloads_of_the_table() -> None:
    assert len(set(NAMES)) == len(NAMES)
    unique = {p.name: make_batch(p).unique_tokens * p.token_bytes for p in paged_problems()}
    # Milliseconds at 3.05 TB/s, as the project's plan states them.
    stated = {
        "8x131072-70": 0.426,
        "8x65536-70-mha": 0.849,
        "16x32768-50": 0.353,
        "32x8192-30": 0.247,
        "32x8192-70": 0.108,
        "64x8192-90": 0.066,
        "256x4096-90": 0.138,
        "32x8192-0-page128": 0.355,
        "32x8192-0-page1": 0.355,
        "64x2048-0-64heads": 0.177,
        "1x131072-0": 0.177,
    }
    for name, bound in stated.items():
        assert unique[name] / 3.05e9 == pytest.approx(bound, rel=0.02), name


def test_ragged_lengths_reach_both_ends() -> None:
    ragged = next(p for p in paged_problems() if p.tree is not None)
    batch = make_batch(ragged)
    assert (int(batch.seq_lens.min()), int(batch.seq_lens.max())) == (1, 32768)
    assert batch.seq_lens.numel() == 128
    assert len(batch.levels) == 3
    assert 0.5 < batch.reuse < 0.7


@pytest.mark.parametrize("problem", [SHARED, TREE, PREFILL], ids=lambda p: p.name)
def test_unique_tokens_are_what_the_plan_cannot_go_below(problem: PagedProblem) -> None:
    batch = make_batch(problem)
    layout = flashcore.layout_from_page_table(
        batch.page_table, batch.seq_lens, page_tokens=problem.page_tokens
    )
    plan = flashcore.plan(
        layout, num_q_heads=4, num_kv_heads=2, head_dim=64, page_tokens=problem.page_tokens
    )
    assert plan.stats().tokens_unique == batch.unique_tokens
    assert int(batch.page_table.max()) < batch.num_pages


@pytest.mark.parametrize("problem", [SHARED, TREE, PREFILL], ids=lambda p: p.name)
def test_levels_hold_every_page_of_every_sequence_once(problem: PagedProblem) -> None:
    batch = make_batch(problem)
    for row in range(problem.sequences):
        pages, tokens = [], 0
        for level in batch.levels:
            (request,) = [
                r
                for r in range(level.last_page_tokens.numel())
                if level.q_offsets[r] <= row * problem.q_len < level.q_offsets[r + 1]
            ]
            own = level.pages[level.page_offsets[request] : level.page_offsets[request + 1]]
            pages += own.tolist()
            if own.numel():
                tokens += (own.numel() - 1) * problem.page_tokens
                tokens += int(level.last_page_tokens[request])
        length = int(batch.seq_lens[row])
        assert tokens == length
        assert pages == batch.page_table[row, : -(-length // problem.page_tokens)].tolist()
    assert all(int(level.q_offsets[-1]) == problem.total_q for level in batch.levels)


def test_the_tree_shares_on_every_level() -> None:
    requests = [level.last_page_tokens for level in make_batch(TREE).levels]
    assert int((requests[0] > 0).sum()) == 1
    assert int((requests[1] > 0).sum()) == 3
    assert requests[2].numel() == 24


@pytest.mark.parametrize("problem", [SHARED, TREE, PREFILL], ids=lambda p: p.name)
def test_sample_is_the_reference(problem: PagedProblem) -> None:
    inputs = make_inputs(problem, "cpu")
    layout = flashcore.layout_from_page_table(
        inputs.page_table, inputs.seq_lens, page_tokens=problem.page_tokens
    )
    out = paged_attention_reference(
        inputs.q, inputs.k_pages, inputs.v_pages, layout, [problem.q_len] * problem.sequences
    )[0]
    sample = Sample(problem, inputs)
    assert sample.errors(out)[1] < 1e-9
    assert sample.errors(out * 1.5)[0] == pytest.approx(0.5)


def test_rows_have_the_promised_fields() -> None:
    problem = PagedProblem("enough to share", 12, 2560, prefix_tokens=2368, **SMALL)
    result = measured(ours(), ours(name="fa3", share=False), problem=problem)
    row = result["rows"][0]
    promised = "workload sequences tokens reuse q_heads kv_heads head_dim page_tokens kernel ms "
    promised += "bound_ms ratio_to_bound"
    assert set(promised.split()) <= set(row)
    unique = (2368 + 12 * 192) * 2 * 2 * 64 * 2
    assert row["unique_kv_bytes"] == unique
    assert row["bound_ms"] == pytest.approx(unique / 1e9 * 1e3)
    assert row["ratio_to_bound"] == pytest.approx(1.0 / row["bound_ms"])
    assert row["ratio_to_fastest_read"] == pytest.approx(2.0 / row["bound_ms"])
    assert row["reuse"] == pytest.approx(1 - 4672 / (12 * 2560))
    assert row["same_bits_on_repeats"]
    assert row["relative_error"] < 3e-3
    assert 0 < row["relative_distance_with_sharing_ignored"] < 2 * row["relative_error"]
    assert row["plan"]["shared_groups"] == 1
    assert [r["kernel"] for r in result["rows"]] == ["flashcore", "fa3"]
    json.dumps(result)


def test_prefill_has_flops() -> None:
    row = measured(ours(), problem=PREFILL)["rows"][0]
    pairs = 2 * (32 * 64 + 32 * 33 // 2)
    assert row["tflops"] == pytest.approx(4 * pairs * 4 * 64 / 1e-3 / 1e12)


def test_a_prefill_is_timed_after_itself() -> None:
    events: list[str] = []

    def watched(name: str) -> PagedProvider:
        def prepare(problem: PagedProblem, inputs: PagedInputs) -> Callable[[], torch.Tensor]:
            call = our_call(inputs, plan_of(problem, inputs))

            def run() -> torch.Tensor:
                events.append(name)
                return call()

            return run

        return PagedProvider(name, "1", prepare)

    def start(graph: Any) -> Callable[[], float]:
        events.append("timed")
        return lambda: 1.0

    stand_in = Machine("cpu", CpuGraph, start, dict)  # type: ignore[arg-type]
    result = run_paged([PREFILL], [watched("fa3"), watched("fa4")], stand_in, rounds=99)
    assert {row["rounds"] for row in result["rows"]} == {15}
    text = " ".join(events)
    assert text.count("timed") == 2 * 16
    assert text.count("fa3 fa3 fa3 timed") == text.count("fa4 fa4 fa4 timed") == 16


def test_wrong_and_failing_peers_are_noted_and_not_timed() -> None:
    def fail(problem: PagedProblem, inputs: PagedInputs) -> Any:
        raise RuntimeError("no such page size\nmore")

    result = measured(ours(), ours(1.03, "fa3"), PagedProvider("fa4", "1", fail))
    assert [row["kernel"] for row in result["rows"]] == ["flashcore"]
    wrong, failed = result["skipped"]
    assert wrong.startswith("fa3 on shared: WrongResultError: relative error 0.03")
    assert failed == "fa4 on shared: RuntimeError: no such page size"


def test_a_peer_wrong_outside_the_sample_is_found() -> None:
    many = PagedProblem("many", 40, 32, **SMALL)

    def prepare(problem: PagedProblem, inputs: PagedInputs) -> Callable[[], torch.Tensor]:
        call = our_call(inputs, plan_of(problem, inputs))

        def spoilt() -> torch.Tensor:
            out = call()
            out[1] *= 1.1
            return out

        return spoilt

    result = measured(ours(), PagedProvider("fa3", "1", prepare), problem=many)
    assert "relative distance 0.1 from flashcore" in result["skipped"][0]


def test_nan_is_wrong() -> None:
    result = measured(ours(float("nan"), "fa3"))
    assert result["rows"] == []
    assert "relative error nan" in result["skipped"][0]


def test_our_own_wrong_result_is_not_timed() -> None:
    assert measured(ours(1.1))["rows"] == []


def test_turns_are_interleaved_shuffled_and_the_first_round_is_dropped() -> None:
    order: list[str] = []

    def start(graph: Any) -> Callable[[], float]:
        order.append(graph)
        number = float(len(order))
        return lambda: number

    timings = time_graphs({name: name for name in "abc"}, rounds=31, start=start)
    rounds = ["".join(order[at : at + 3]) for at in range(0, 96, 3)]
    assert all(sorted(turn) == ["a", "b", "c"] for turn in rounds)
    assert {pair for turn in rounds for pair in (turn[:2], turn[1:])} == {
        *("ab", "ba", "ac", "ca", "bc", "cb")
    }
    assert timings["a"].rounds == 31
    turns = [number + 1 for number, name in enumerate(order) if name == "a"][1:]
    assert timings["a"].median_ms == sorted(turns)[15]


def test_summary_table_and_plot(tmp_path: Path) -> None:
    times = iter([2.0, 3.0] * 4)
    result = run_paged(
        [SHARED], [ours(), ours(name="fa3")], machine(lambda graph: next(times)), rounds=1
    )
    add_bounds(result["rows"], 1e9, 2e9)
    result["rows"][0]["dram_read_bytes"] = 110592
    (line,) = summarise(result["rows"])
    by_kernel = {row["kernel"]: row["ms"] for row in result["rows"]}
    assert line["best_peer"] == "fa3"
    assert line["speed_over_fa3"] == by_kernel["fa3"] / by_kernel["flashcore"] != 1.0
    extra = {
        "plan": [{"sequences": 256, "pages": 64, "us": 33.1}],
        "random": {"batches": 9, "median": 0.9, "worst": 1.04, "worst_batch": "w", "above_1_05": 0},
    }
    text = format_table({**complete(result), **extra})
    for words in ("1.125 x unique KV bytes", "256 x 64 pages", "worst 1.040 (w)", "same bits"):
        assert words in text
    pytest.importorskip("matplotlib")
    plot(complete(result), tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_ours_alone_has_no_ratio_to_peers() -> None:
    (line,) = summarise(measured(ours())["rows"])
    assert line["best_peer"] is line["speed_over_fa3"] is line["speed_over_best_peer"] is None
    assert summarise(measured(ours(name="fa3"))["rows"]) == []


def test_random_batches_cover_the_corners() -> None:
    batches = random_sharing.random_batches(200)
    fans = [batch.fan_out for batch in batches]
    assert (min(fans), max(fans)) == (1, 256)
    assert len(set(fans)) > 50
    for batch in batches:
        assert 1 <= batch.shared_pages * batch.page_tokens <= min(batch.lengths)
        assert len(batch.lengths) == batch.fan_out
    assert any(b.fan_out == 256 and b.shared_pages == 1 for b in batches)
    alike = [b for b in batches if set(b.lengths) == {b.shared_pages * b.page_tokens}]
    assert any(b.fan_out == 256 for b in alike)
    assert batches == random_sharing.random_batches(200)


def test_random_batches_are_timed_against_sharing_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random_sharing, "_MOST_TOKENS", 2048)
    monkeypatch.setattr(random_sharing, "_LONGEST", 512)
    batch = random_sharing.RandomBatch(3, 2, (256, 300, 400), 128)
    pool = random_sharing._pool("cpu", [batch])
    problem, inputs = random_sharing._inputs(batch, pool, 0)
    assert inputs.batch.unique_tokens == 256 + 44 + 144
    assert plan_of(problem, inputs).stats().tokens_unique == inputs.batch.unique_tokens
    monkeypatch.setattr(random_sharing, "random_batches", lambda count, seed: [batch])
    shared_groups: dict[Any, int] = {}

    def remembered(inputs: PagedInputs, plan: flashcore.Plan) -> Callable[[], torch.Tensor]:
        call = our_call(inputs, plan)
        shared_groups[call] = plan.stats().num_shared_groups
        return call

    monkeypatch.setattr(random_sharing, "our_call", remembered)
    times = machine(lambda graph: 2.0 if shared_groups[graph.call] else 3.0)
    found = random_sharing.run_random(1, times, rounds=1)
    assert sorted(shared_groups.values()) == [0, 1]
    assert found["worst"] == found["median"] == pytest.approx(2 / 3)
    assert (found["above_1"], found["above_1_05"]) == (0, 0)


NCU = """==PROF== Connected
"ID","Process ID","Kernel Name","dram__bytes_read.sum"
"","","","byte"
"0","7","spin_kernel(long)","64"
"1","7","kernel_paged","1,000"
"2","7","combine","24"
"3","7","at::spin_kernel(long)","64"
"4","7","flash::fwd<a, b>","3000"
"""


def test_bytes_are_summed_between_markers() -> None:
    assert dram.sums_between_markers(NCU, 2) == [1024, 3000]
    with pytest.raises(dram.CountError, match="2 calls, 3 ran"):
        dram.sums_between_markers(NCU, 3)


def test_without_ncu_no_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dram.shutil, "which", lambda name: None)
    with pytest.raises(dram.CountError, match="ncu is not on the PATH"):
        dram.count_bytes(["a"], ["b"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="the message for a machine without a GPU")
def test_absent_peers_are_named_with_a_reason() -> None:
    for fp8, names in (
        (False, "flashcore fa3 fa4 flashinfer flashinfer_fa3 cascade_fa2 cascade_fa3"),
        (
            True,
            "flashcore flashcore_bf16 flashcore_converting flashcore_expanding fa3 flashinfer "
            "flashinfer_xqa",
        ),
    ):
        found, missing = paged_providers(fp8=fp8)
        assert {p.name for p in found} | set(missing) == set(names.split())
        assert all(missing.values())


def parse(*words: str) -> argparse.Namespace:
    return cli_calls.parse(bench_command, "paged", *words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--workload", "9x9"), "no workload has '9x9' in its name; there are 8x131072-70, "),
        (("--plot", "/dev/null/all.png"), "/dev/null/all.png: /dev/null is no folder"),
        ((), "torch sees no CUDA device"),
        (("--random", "3", "--kv-dtype", "e4m3"), "--random has batches of bf16 alone"),
    ],
)
def test_refusals(
    words: tuple[str, ...],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert_refused(bench_command, parse(*words), message, capsys)


def test_unknown_kernel_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    said = "unknown kernel 'fa9'; there are cascade_fa2,"
    assert_refused(bench_command, parse("--kernels", "fa3,fa9"), said, capsys)


@pytest.mark.parametrize("words", [("--random", "0"), ("--flush", "no"), ("--rounds", "x")])
def test_bad_options_exit_with_usage(words: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse(*words)
    assert stopped.value.code == 2


def test_result_is_redrawn_without_a_gpu(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = complete(measured(ours(), ours(name="fa3")))
    (tmp_path / "r.json").write_text(json.dumps(result))
    assert bench_command.run(parse("--from-json", str(tmp_path / "r.json"))) == 0
    out = capsys.readouterr().out
    assert "bound: unique KV bytes / 1 GB/s (torch.sum of bf16; fastest read 2, a loop)" in out
    (tmp_path / "r.json").write_text("{}")
    assert bench_command.run(parse("--from-json", str(tmp_path / "r.json"))) == 2
    assert "it has no commit, date" in capsys.readouterr().err


def test_batch_of_one_sequence_shares_nothing() -> None:
    batch: Batch = make_batch(PagedProblem("one", 1, 100, **SMALL))
    assert (batch.levels, batch.reuse, batch.unique_tokens) == ([], 0.0, 100)


def test_one_reason_is_told_once() -> None:
    def fail(problem: PagedProblem, inputs: PagedInputs) -> Any:
        raise RuntimeError("not here")

    result = run_paged([SHARED, PREFILL], [PagedProvider("fa4", "1", fail)], machine(), rounds=1)
    assert result["skipped"] == ["fa4 on shared, prefill: RuntimeError: not here"]


def test_readme_table_is_of_the_rows() -> None:
    path = Path(__file__).parent.parent / "benchmarks" / "report.py"
    spec = importlib.util.spec_from_file_location("report", path)
    report = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    spec.loader.exec_module(report)  # type: ignore[union-attr]
    times = iter([2.0, 3.0, 5.0] * 4)
    providers = [ours(), ours(name="fa3"), ours(name="cascade_fa2")]
    result = run_paged([SHARED], providers, machine(lambda graph: next(times)), rounds=1)
    by_kernel = {row["kernel"]: row["ms"] for row in result["rows"]}
    add_bounds(result["rows"], 1e9, 2e9)
    about = {"versions": {"torch": "2"}, "command": "flashcore bench paged"}
    head = report.paged_table({**complete(result), **about}).splitlines()[0]
    assert "FA4" not in head  # which did not run
    text = report.paged_table({**complete(result), **about})
    cells = [cell.strip() for cell in text.splitlines()[2].split("|")[1:-1]]
    assert cells[0] == "3 x 128, 4/2 heads, pages of 16"
    assert cells[1] == "50%"
    assert cells[3:6] == [f"{by_kernel[k]:.3f}" for k in ("fa3", "cascade_fa2", "flashcore")]
    unique_ms = (96 + 3 * 32) * 2 * 2 * 64 * 2 / 1e6
    assert cells[6:8] == [f"{by_kernel['flashcore'] * k / unique_ms:.3f}" for k in (1, 2)]
    best = min(by_kernel["fa3"], by_kernel["cascade_fa2"])
    assert cells[-1] == f"{best / by_kernel['flashcore']:.3f}"
    assert "KV bytes / 1 GB/s, streamed in the same run by torch.sum of bf16; x read: by" in text
    assert "2 GB/s, a loop" in text
