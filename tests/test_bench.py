"""The benchmark's bookkeeping, on the CPU with providers that stand in for the kernels."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from flashcore.bench.dense import run_dense
from flashcore.bench.problems import DenseProblem, dense_problems
from flashcore.bench.providers import Provider, UnsupportedError, dense_providers
from flashcore.bench.report import format_table, plot, summarise
from flashcore.bench.timing import Contestant, shuffled, time_interleaved
from flashcore.cli import bench as bench_command
from tests import cli_calls
from tests.cli_calls import assert_refused

SMALL = DenseProblem(2, 2, 1, 40, 16, True, "bf16")


def provider(name: str, kernel: str, factor: float = 1.0) -> Provider:
    def prepare(problem: DenseProblem, q: Any, k: Any, v: Any) -> Any:
        if problem.head_dim > 64:
            raise UnsupportedError(f"head_dim {problem.head_dim} is too large")
        qt, kt, vt = (t.transpose(1, 2).float() for t in (q, k, v))

        def call() -> torch.Tensor:
            out = scaled_dot_product_attention(
                qt, kt, vt, is_causal=problem.causal, enable_gqa=True
            )
            return out.transpose(1, 2) * factor

        return call

    return Provider(name, kernel, "1.0", prepare)


def run(providers: list[Provider], times: dict[str, float], problems=(SMALL,)) -> dict[str, Any]:
    return run_dense(
        problems,
        providers,
        rounds=4,
        sample_ms=10,
        device="cpu",
        elapsed_ms=lambda contestant, calls: times[contestant.name] * calls,
    )


def test_the_twelve_problems() -> None:
    problems = dense_problems("bf16")
    assert len({p.name for p in problems}) == 12
    assert sum(p.causal for p in problems) == 6
    assert {p.head_dim for p in problems} == {64, 128, 256}


def test_flops_follow_the_usual_convention() -> None:
    full = DenseProblem(16, 16, 16, 2048, 128, False, "bf16")
    assert full.flops == 4 * 16 * 16 * 2048 * 2048 * 128
    assert DenseProblem(16, 16, 16, 2048, 128, True, "bf16").flops == full.flops / 2


def test_rows_have_the_promised_fields() -> None:
    result = run([provider("flashcore", "flashcore"), provider("fa3_fwd", "fa3")], TIMES)
    row = result["rows"][0]
    promised = "batch heads kv_heads seqlen head_dim causal dtype kernel ms tflops"
    assert set(promised.split()) <= set(row)
    assert row["ms"] == 1.0
    assert row["tflops"] == pytest.approx(SMALL.flops / 1e-3 / 1e12)
    assert row["calls_per_round"] == 10
    json.dumps(result)


TIMES = {"flashcore": 1.0, "fa3_fwd": 1.1, "sgl_kernel": 0.9, "cudnn": 2.0}


def test_ratio_is_to_the_fastest_build_of_a_peer() -> None:
    providers = [
        provider("flashcore", "flashcore"),
        provider("fa3_fwd", "fa3"),
        provider("sgl_kernel", "fa3"),
        provider("cudnn", "cudnn"),
    ]
    result = run(providers, TIMES)
    (problem,) = result["summary"]["bf16"]["problems"]
    assert problem["best_peer"] == "fa3"
    assert problem["speed_over"] == {"fa3": 0.9, "cudnn": 2.0, "best_peer": 0.9}
    assert result["summary"]["bf16"]["geometric_mean_speed_over"]["cudnn"] == pytest.approx(2.0)
    assert "0.900" in format_table({**result, "device": "d", "date": "today"})


def test_error_is_measured_against_float64() -> None:
    result = run([provider("flashcore", "flashcore"), provider("fa3_fwd", "fa3", 1.5)], TIMES)
    ours, wrong = result["rows"]
    assert ours["relative_error"] < 1e-6
    assert wrong["relative_error"] == pytest.approx(0.5, abs=1e-5)


def test_unsupported_problem_is_noted_and_the_rest_runs() -> None:
    large = DenseProblem(1, 1, 1, 16, 128, False, "bf16")

    def anything(problem: DenseProblem, q: Any, k: Any, v: Any) -> Any:
        return lambda: q

    providers = [provider("fa3_fwd", "fa3"), Provider("flashcore", "flashcore", "1", anything)]
    result = run(providers, TIMES, (large,))
    assert [row["kernel"] for row in result["rows"]] == ["flashcore"]
    assert result["skipped"] == [f"fa3_fwd on {large.name}: head_dim 128 is too large"]


def test_nothing_runs_a_problem() -> None:
    large = DenseProblem(1, 1, 1, 16, 128, False, "bf16")
    result = run([provider("fa3_fwd", "fa3")], TIMES, (large,))
    assert result["rows"] == []
    assert result["summary"] == {}


def test_turns_are_interleaved_and_shuffled() -> None:
    order: list[str] = []

    def elapsed(contestant: Contestant, calls: int) -> float:
        order.append(contestant.name)
        return 1.0 * calls

    contestants = [Contestant(name, lambda: None, nullcontext) for name in "abc"]
    timings = time_interleaved(contestants, rounds=30, sample_ms=1, elapsed_ms=elapsed)
    turns = order[6:]  # after two warm-up samples of each
    rounds = [turns[i : i + 3] for i in range(0, 90, 3)]
    assert all(sorted(names) == list("abc") for names in rounds)
    assert len(set(map(tuple, rounds))) == 6  # everyone comes after everyone
    assert rounds == list(shuffled("abc", 30))  # and does so in every run
    assert timings["a"].rounds == 30


def test_median_ignores_an_outlier() -> None:
    samples = iter([1.0, 1.0] + [1.0] * 9 + [100.0])
    contestant = Contestant("a", lambda: None, nullcontext)
    timing = time_interleaved(
        [contestant], rounds=10, sample_ms=0.1, elapsed_ms=lambda c, n: next(samples)
    )["a"]
    assert (timing.median_ms, timing.p10_ms) == (1.0, 1.0)


def test_plot_is_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    result = run([provider("flashcore", "flashcore"), provider("fa3_fwd", "fa3")], TIMES)
    plot({**result, "device": "a GPU", "date": "2026-01-01T00:00:00"}, tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_summary_of_no_peer_is_empty() -> None:
    rows = run([provider("flashcore", "flashcore")], TIMES)["rows"]
    assert summarise(rows)["bf16"]["problems"] == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="the message for a machine without a GPU")
def test_absent_peers_are_named_with_a_reason() -> None:
    found, missing = dense_providers()
    assert {p.name for p in found} | set(missing) == {
        "flashcore",
        "fa3_fwd",
        "sgl_kernel",
        "fa4",
        "cudnn",
        "fa2",
    }
    assert all(missing.values())
    assert "flashcore" in missing


def parse(*words: str) -> Any:
    return cli_calls.parse(bench_command, "dense", *words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--only", "S77"), "no problem has 'S77' in its name"),
        (("--json", "/dev/null/all.json"), "/dev/null/all.json: /dev/null is no folder"),
        ((), "torch sees no CUDA device"),
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


def test_result_is_redrawn_without_a_gpu(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    measured = run([provider("flashcore", "flashcore"), provider("fa3_fwd", "fa3")], TIMES)
    about = {"device": "a GPU", "driver": "1", "commit": "abc", "date": "2026-01-01T00:00:00"}
    (tmp_path / "r.json").write_text(json.dumps({**about, **measured}))
    words = ("--from-json", str(tmp_path / "r.json"), "--plot", str(tmp_path / "r.png"))
    assert bench_command.run(parse(*words)) == 0
    assert "B2 H2/1 S40 D16 causal bf16" in capsys.readouterr().out
    assert (tmp_path / "r.png").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [("{}", "it has no commit, date, device"), ("[1", "Expecting"), (None, "No such file")],
)
def test_result_that_cannot_be_read_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str | None, message: str
) -> None:
    path = tmp_path / "r.json"
    if text is not None:
        path.write_text(text)
    assert bench_command.run(parse("--from-json", str(path))) == 2
    said = capsys.readouterr().err
    assert str(path) in said
    assert message in said


@pytest.mark.parametrize("words", [("--rounds", "0"), ("--dtype", "fp8"), ("--sample-ms", "x")])
def test_bad_options_exit_with_usage(words: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse(*words)
    assert stopped.value.code == 2
