"""The serving benchmark's command line, comparison of logits, and soak."""

from __future__ import annotations

import argparse
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flashcore.bench import machine
from flashcore.bench.serve import engine as engine_module
from flashcore.bench.serve import soak as soak_module
from flashcore.bench.serve.logits import compare, comparison_prompts, format_comparison
from flashcore.bench.serve.shapes import SHAPES
from flashcore.cli import bench_serve
from tests import cli_calls
from tests.cli_calls import assert_refused
from tests.serve_fakes import result_of

VOCAB = 1000


# Command line


def parse(*words: str) -> argparse.Namespace:
    return cli_calls.parse(bench_serve, *words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--json", "/dev/null/all.json"), "/dev/null/all.json: /dev/null is no folder"),
        (("--log-dir", "/dev/null"), "--log-dir /dev/null: /dev/null is no folder"),
        (("--backends", "fa3,,x"), "an empty name"),
        ((), "SGLang is not installed"),
        (("--engine", "vllm"), "vLLM is not installed: pip install 'flashcore-attention[vllm]'"),
        (("--engine", "vllm", "--soak", "1"), "vLLM is not installed"),
    ],
)
def test_refusals(
    words: tuple[str, ...],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert_refused(bench_serve, parse(*words), message, capsys)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--workloads", "shared-16k,shared-16k"), "names one of them twice"),
        (("--workloads", "64y3"), "unknown workload '64y3'"),
        (("--model-shape", "gpt"), "--model-shape gpt: neither a config.json nor one of llama"),
        (("--model-shape", "tiny"), "workload shared-16k: 17024 tokens a sequence, the limit of"),
        (("--workloads", "gpt/1x1+1:9"), "--model-shape gpt"),
        (("--layers", "33"), "--layers must be 1 to 32 for llama-3.1-8b, got 33"),
        (("--small", "--workloads", "x"), "unknown workload 'x'"),
        (("--base-gpu", "-1"), "--base-gpu must be at least 0, got -1"),
        (("--dp-attention", "--tp", "2"), "--tp 2 must be a multiple of --dp 1, and that above 1"),
        (("--dp-attention", "--tp", "3", "--dp", "2"), "--tp 3 must be a multiple of --dp 2"),
        (("--kv-cache-dtype", "fp8_e5m2"), "SGLang runs triton in the place of fa3"),
        (("--kv-cache-dtype", "auto,fp8_e4m3", "--logits"), "takes one dtype where engines are"),
        (("--only", "llama"), "--only goes with --families or --modes"),
        (("--modes", "--resume"), "--resume goes with --families or --modes, and --log-dir"),
        (("--hicache", "direct"), "--hicache goes with --soak"),
        (("--soak", "1", "--hicache", "x"), "--hicache x: 'x' is not one of kernel, direct"),
        (("--engine", "vllm", "--modes"), "--modes goes with --engine sglang"),
        (
            ("--engine", "vllm", "--soak", "1", "--hicache", "direct"),
            "--hicache goes with --engine sglang",
        ),
        (("--engine", "vllm", "--families", ".", "--gpus", "2"), "--gpus must be 1 with --engine"),
        (("--soak", "0"), "--soak must be more than 0 minutes, got 0"),
        (("--deadline", "9"), "--deadline goes with --small, --families, --modes or --cycles"),
        (("--logits", "--deadline", "9"), "--deadline does not go with --logits"),
        (("--soak", "1", "--deadline", "9"), "--deadline does not go with --soak"),
    ],
)
def test_values_that_make_no_sense(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bench_serve.run(parse(*words))


@pytest.mark.parametrize(
    "words",
    [
        ("--mem-fraction", "1.5"),
        ("--kv-cache-dtype", "fp8"),
        ("--kv-cache-dtype", "auto,auto"),
        ("--repeats", "0"),
        ("--engine-args", "[1]"),
        ("--engine-args", "{"),
        ("--soak", "1", "--logits"),
        ("--small", "--modes"),
        ("--deadline", "0"),
        ("--cycles", "0"),
    ],
)
def test_bad_options_exit_with_usage(words: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse(*words)
    assert stopped.value.code == 2


def test_no_gpu_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert_refused(bench_serve, parse(), "torch sees no CUDA device", capsys)


@pytest.mark.parametrize(
    ("words", "needed"),
    [
        ((), 1),
        (("--base-gpu", "1"), 1),
        (("--tp", "2"), 2),
        (("--tp", "2", "--pp", "2"), 4),
        (("--dp", "3"), 3),
        (("--tp", "4", "--dp", "2", "--dp-attention"), 4),
        (("--modes", "--gpus", "2"), 2),
        (("--families", "somewhere", "--gpus", "4"), 4),
        (("--cycles", "2", "--tp", "2"), 2),
    ],
)
def test_too_few_gpus_are_refused(
    words: tuple[str, ...],
    needed: int,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    args = parse(*words)
    there = args.base_gpu + needed - 1
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: there)
    told = f"it takes {needed} GPUs from number {args.base_gpu} on, there are {there}"
    assert_refused(bench_serve, args, told, capsys)


def test_options_reach_the_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    from flashcore.bench.serve.engine import server_arguments

    words = ("--tp", "4", "--dp", "2", "--dp-attention", "--base-gpu", "1", "--kv-pool", "4096")
    words = (*words, "--kv-cache-dtype", "fp8_e4m3")
    options = bench_serve._options(parse(*words), "fa3", SHAPES["tiny"], "fp8_e4m3")
    assert (options.gpus, options.max_total_tokens) == (4, 4096)
    known = {"cuda_graph_bs", "cuda_graph_max_bs", "disable_prefill_cuda_graph"}
    monkeypatch.setattr(engine_module, "_server_fields", lambda: known)
    arguments = server_arguments(options, "/m")
    wanted = {"tp_size": 4, "dp_size": 2, "enable_dp_attention": True, "base_gpu_id": 1}
    wanted["kv_cache_dtype"] = "fp8_e4m3"
    assert wanted.items() <= arguments.items()
    assert "pp_size" not in arguments
    assert "nccl_port" not in arguments  # one for each copy of the model, by SGLang itself
    known.add("nccl_port")
    plain = server_arguments(bench_serve._options(parse(), "fa3", SHAPES["tiny"], "auto"), "/m")
    assert "kv_cache_dtype" not in plain
    assert plain["nccl_port"] == 20000 + os.getpid() % 10000


@pytest.mark.parametrize(
    ("words", "backends"),
    [
        ((), "flashcore,fa3"),
        (("--small",), "flashcore,fa3"),
        (("--modes",), "flashcore,fa3"),
        (("--families", "x"), "flashcore,fa3,triton"),
        (("--logits",), "flashcore,fa3,triton"),
        (("--soak", "1"), "flashcore"),
        (("--cycles", "1"), "flashcore"),
    ],
)
def test_backends_by_what_is_asked(words: tuple[str, ...], backends: str) -> None:
    assert bench_serve._default_backends(parse(*words)) == backends


def test_a_check_writes_its_result_as_it_goes_and_at_the_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from flashcore.bench.serve import families

    (tmp_path / "models" / "tiny").mkdir(parents=True)
    config = {**SHAPES["tiny"].config(), "model_type": "other"}
    (tmp_path / "models" / "tiny" / "config.json").write_text(json.dumps(config))
    written: list[int] = []

    def run_families(found: Any, base: Any, backends: Any, sglang: str, survey: Any) -> Any:
        assert (survey.places.gpus, survey.places.jobs) == (1, 3)
        assert survey.log_dir.is_dir()
        row = {"family": found[0].name, "backend": "flashcore", "peer": None, "error": "x"}
        survey.keep({"rows": [row], "passed": False})
        written.append(len(json.loads((tmp_path / "out.json").read_text())["rows"]))
        return {"rows": [row, row], "passed": False}

    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr(families, "run_families", run_families)
    words = ["--families", str(tmp_path / "models"), "--device", "cpu", "--jobs", "3"]
    assert bench_serve.run(parse(*words, "--json", str(tmp_path / "out.json"))) == 1
    assert written == [1]
    result = json.loads((tmp_path / "out.json").read_text())
    assert len(result["rows"]) == 2
    assert {"device", "driver", "versions", "commit", "date", "command"} <= set(result)
    assert "FAILED" in capsys.readouterr().out


def test_small_steps_write_as_they_go_and_print_their_ratios(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from flashcore.bench.serve import turns

    def run_turns(workloads: Any, options: Any, plan: Any, **how: Any) -> dict[str, Any]:
        assert (plan.repeats, plan.starts) == (15, 3)
        assert [one.backend for one in options] == ["flashcore", "fa3"]
        rows = result_of([one.name for one in workloads], ["flashcore", "fa3"])["rows"]
        ratio = {"step_ms": {"median": 0.4, "low": 0.4, "high": 0.4, "pairs": 16}}
        rows = [{**row, "over_fa3": ratio} for row in rows]
        measured = {"rows": rows, "skipped": [], "engines": []}
        how["after"]("4x16+8:40: done")
        how["keep"](measured)
        assert json.loads((tmp_path / "out.json").read_text())["rows"] == rows
        return measured

    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr(turns, "run_turns", run_turns)
    words = ["--small", "--workloads", "4x16+8:40", "--device", "cpu", "--starts", "3"]
    assert bench_serve.run(parse(*words, "--json", str(tmp_path / "out.json"))) == 0
    printed = capsys.readouterr()
    assert "0.400 (0.400 to 0.400)" in printed.out
    assert "4x16+8:40: done" in printed.err
    result = json.loads((tmp_path / "out.json").read_text())
    assert {"device", "driver", "commit", "date", "rows", "summary", "skipped"} <= set(result)
    assert result["clocks"] == {"before": {}, "during": []}
    again = ["--from-json", str(tmp_path / "out.json")]
    assert bench_serve.run(parse(*again)) == 0


def test_results_are_redrawn_and_joined(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    first = result_of(["4x16+8:40", "5x16+8:40"], ["flashcore", "fa3"])
    second = result_of(["5x16+8:40", "llama-3.2-1b/6x16+8:40"], ["fa3"])
    for name, result in (("a", first), ("b", second)):
        (tmp_path / name).write_text(json.dumps(result))
    words = ["--from-json", str(tmp_path / "a"), str(tmp_path / "b")]
    words += ["--json", str(tmp_path / "c"), "--plot", str(tmp_path / "c.png")]
    assert bench_serve.run(parse(*words)) == 0
    joined = json.loads((tmp_path / "c").read_text())
    assert [(row["workload"], row["backend"]) for row in joined["rows"]] == [
        ("4x16+8:40", "flashcore"),
        ("4x16+8:40", "fa3"),
        ("5x16+8:40", "fa3"),
        ("llama-3.2-1b/6x16+8:40", "fa3"),
    ]
    assert len(joined["engines"]) == 4
    printed = capsys.readouterr().out
    assert "4x16+8:40" in printed
    assert "KV cache" not in printed
    narrow = {**first, "rows": [{**row, "kv_cache_dtype": "fp8_e4m3"} for row in first["rows"]]}
    (tmp_path / "narrow").write_text(json.dumps(narrow))
    assert bench_serve.run(parse("--from-json", str(tmp_path / "narrow"))) == 0
    assert capsys.readouterr().out.splitlines()[0].endswith(", KV cache fp8_e4m3")
    other = {**second, "device": "another GPU"}
    (tmp_path / "b").write_text(json.dumps(other))
    with pytest.raises(ValueError, match="results of different devices"):
        bench_serve.run(parse(*words))


@pytest.mark.parametrize(
    ("text", "message"), [("{}", "it has no commit, date, device"), ("[1", "Expecting")]
)
def test_result_that_cannot_be_read_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    path = tmp_path / "r.json"
    path.write_text(text)
    assert_refused(bench_serve, parse("--from-json", str(path)), message, capsys)


# Logits and soak


def test_logits_within_and_beyond_the_spread_of_the_peers() -> None:
    rng = np.random.default_rng(0)
    truth = rng.normal(size=(3, 4, 50))
    noisy = {
        name: truth + scale * rng.normal(size=truth.shape)
        for name, scale in (("fa3", 0.010), ("triton", 0.010), ("flashcore", 0.005))
    }
    result = compare(noisy)
    assert result["passed"]
    assert set(result["pairs"]) == {"fa3 - triton", "fa3 - flashcore", "triton - flashcore"}
    assert result["median"]["spread_of_peers"] == pytest.approx(0.014, rel=0.1)
    worse = {**noisy, "flashcore": truth + 0.05 * rng.normal(size=truth.shape)}
    assert not compare(worse)["passed"]
    one_bad_row = noisy["flashcore"].copy()
    one_bad_row[1, 2] = rng.normal(size=50)
    assert not compare({**noisy, "flashcore": one_bad_row})["passed"]
    assert "FAILED" in format_comparison(compare({**noisy, "flashcore": one_bad_row}))


def test_logits_that_are_not_finite_fail_even_alone() -> None:
    values = np.ones((1, 2, 3))
    assert compare({"fa3": values})["passed"]
    values[0, 1, 2] = math.nan
    assert not compare({"fa3": values})["passed"]


def test_prompts_of_the_comparison_share_and_do_not_share() -> None:
    prompts = comparison_prompts(32000)
    assert prompts == comparison_prompts(32000)
    assert len({tuple(prompt[:1024]) for prompt in prompts if len(prompt) == 1124}) == 1
    assert len({len(prompt) for prompt in prompts}) == 5
    assert min(len(prompt) for prompt in prompts) == 1


def test_traffic_stays_within_the_limit_and_repeats_for_a_seed() -> None:
    longest = 4094
    runs = []
    for _ in range(2):
        traffic = soak_module.Traffic(VOCAB, longest, seed=5)
        drawn = []
        for number in range(300):
            if number % 7 == 0:
                traffic.renew_prefix()
            kind, prompts, output = traffic.draw()
            assert all(len(p) >= 1 and len(p) + output <= longest for p in prompts)
            assert all(10 <= token < VOCAB for p in prompts for token in p)
            traffic.answered(prompts[0], [11] * output)
            drawn.append((kind, prompts, output))
        runs.append(drawn)
        _, ((prompt), *_), output = traffic.longest()
        assert len(prompt) + output == longest
    assert runs[0] == runs[1]
    assert {kind for kind, _, _ in runs[0]} == {"shared", "samples", "unrelated", "turn"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, None),
        ({"reason": "abort"}, "it ended with 'abort'"),
        ({"tokens": [1]}, "1 tokens instead of 2"),
        ({"logprobs": [-1.0, math.nan]}, "not finite"),
        ({"logprobs": [-1.0]}, "missing"),
        ({"tokens": [1, 99]}, "outside the vocabulary"),
    ],
)
def test_faults_of_an_answer(changes: dict[str, Any], message: str | None) -> None:
    answer = {"reason": "length", "logprobs": [-1.0, -2.0], "tokens": [1, 2], **changes}
    found = soak_module.fault(**answer, output=2, vocab=50)
    assert (found is None) if message is None else (found is not None and message in found)


def test_drift_ends_with_the_first_token_that_differs() -> None:
    expected = [(-1.0, 5), (-2.0, 6), (-3.0, 7)]
    assert soak_module.canary_drift(expected, expected) == 0
    found = [(-1.1, 5), (-2.2, 9), (-9.0, 8)]
    assert soak_module.canary_drift(expected, found) == pytest.approx(0.2)
    assert soak_module.canary_drift(expected, [(math.nan, 5), *expected[1:]]) == math.inf


def soaked(**changes: Any) -> dict[str, Any]:
    steady = [(5.0 * n, 900.0 if n > 3 else 500.0, 60000.0) for n in range(16)]
    result = {
        "errors": [],
        "requests": {"shared": 5, "aborted": 1},
        "tokens": 9,
        "canary_drift": 0.1,
        "memory": steady,
        "arguments": {"device": "cuda"},
    }
    return soak_module.judged({**result, **changes})


def test_soak_tells_where_it_stands() -> None:
    record = soak_module.Record(tokens=7, memory=[(120.0, 900.4, 5000.0)])
    record.requests.update(["shared", "canary"])
    told = "soak: 2 min, 2 requests, 7 tokens, 900 MiB on the host, 5000.0 on the GPU, "
    assert record.line() == told + "0 errors"
    record.errors.append("boom")
    assert record.line() == told + "1 errors; the last: boom"


def test_memory_is_that_of_the_engines_processes() -> None:
    assert soak_module.memory_of([7, 9], "7, 100\n8, 50\n9, 20\n9, 3\n") == 123
    assert soak_module.memory_of([7], "8, 50\n") is None
    assert soak_module.memory_of([7], "7, [N/A]\nNo running processes found\n") is None


def test_soak_passes_when_nothing_grows_after_the_start() -> None:
    result = soaked()
    assert (result["passed"], result["host_growth_mib"], result["device_growth_mib"]) == (
        True,
        0,
        0,
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"errors": ["boom"]}, "boom"),
        ({"canary_drift": 0.6}, "drifted by 0.600"),
        ({"canary_drift": math.nan}, "drifted"),
        ({"memory": [(n, 100.0 * n, 1.0) for n in range(16)]}, "host memory grew by 800 MiB"),
        ({"memory": [(n, 1.0, 20.0 * n) for n in range(16)]}, "GPU memory grew by 160 MiB"),
        ({"memory": [(0.0, 1.0, 1.0), (5.0, 1.0, None)]}, "could not be read 1 times"),
        ({"requests": {"shared": 5}}, "none aborted"),
        ({"tokens": 0}, "no request was answered"),
    ],
)
def test_soak_fails(changes: dict[str, Any], message: str) -> None:
    result = soaked(**changes)
    assert not result["passed"]
    assert message in " ".join(result["failures"])


@pytest.mark.parametrize(
    ("visible", "asked"),
    [(None, "1"), ("", "1"), ("3, 5", "5"), ("4", "1"), ("GPU-a,GPU-b", "GPU-b")],
)
def test_clocks_are_those_of_the_visible_gpu(
    visible: str | None, asked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[tuple[str, ...]] = []

    def output(*command: str) -> str:
        commands.append(command)
        return "1980, 1980, 2619, [N/A], 40"

    monkeypatch.setattr(machine, "_output", output)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    clocks = machine.read_clocks(1)
    assert commands[0][-1] == f"--id={asked}"
    assert clocks["temperature_c"] == 40
    assert "power_w" not in clocks
