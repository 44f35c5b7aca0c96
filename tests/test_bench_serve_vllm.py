"""The serving benchmark's checks of vLLM, as far as they go without it (the rest: tests/vllm)."""

from __future__ import annotations

import itertools
import json
import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from flashcore.bench.serve import cycles, families, vllm_engine, vllm_logits
from flashcore.bench.serve.deadline import Deadline
from flashcore.bench.serve.pool import Places, Survey
from flashcore.bench.serve.shapes import SHAPES
from flashcore.cli import bench_serve
from tests import cli_calls
from tests.serve_fakes import OPTIONS, starting
from tests.test_bench_serve_families import family_answer

VLLM = replace(OPTIONS, engine="vllm", backend="flashcore")
MODELS = Path(__file__).parent / "data" / "models"
SERVED = ["llama", "qwen3", "qwen3-moe", "gpt-oss", "gemma3", "qwen3-next", "phi4"]


@pytest.mark.parametrize(
    ("words", "backends"),
    [
        ((), "flashcore,FLASH_ATTN"),
        (("--logits",), "flashcore,FLASH_ATTN,TRITON_ATTN"),
        (("--families", "somewhere"), "flashcore,FLASH_ATTN,TRITON_ATTN"),
        (("--soak", "1"), "flashcore"),
        (("--cycles", "1"), "flashcore"),
    ],
)
def test_default_backends(words: tuple[str, ...], backends: str) -> None:
    args = cli_calls.parse(bench_serve, "--engine", "vllm", *words)
    assert bench_serve._default_backends(args) == backends


def test_engines_of_families_fit_side_by_side() -> None:
    found = families.find_families(MODELS, SERVED, "vllm")
    assert {one.name for one in found} == set(SERVED)
    for one in found:
        options = families.family_options(VLLM, one, "FLASH_ATTN")
        told = dict(options.extra)
        assert options.mem_fraction < 1 / 8
        assert told["compilation_config"]["cudagraph_capture_sizes"] == [1, families.BATCH]
        assert "mamba_ssm_dtype" not in told  # SGLang's name for it
        assert ("mamba_ssm_cache_dtype" in told) == (one.name == "qwen3-next")
    (one,) = families.find_families(MODELS, ["llama"], "vllm")
    on_cpu = families.family_options(replace(VLLM, device="cpu"), one, "CPU_ATTN")
    assert "compilation_config" not in dict(on_cpu.extra)


def test_rows_are_beside_flash_attn(tmp_path: Path) -> None:
    noise = {"FLASH_ATTN": 0.0, "TRITON_ATTN": 0.01, "flashcore": 0.02}
    result = families.run_families(
        families.find_families(MODELS, ["llama"], "vllm"),
        VLLM,
        ["flashcore", "FLASH_ATTN", "TRITON_ATTN"],
        "0.26.0",
        Survey(Places(jobs=2), Deadline(), tmp_path, start=starting(family_answer(noise))),
    )
    ours, triton = result["rows"]
    assert (ours["vllm"], ours["backend"], ours["peer"]) == ("0.26.0", "flashcore", "FLASH_ATTN")
    assert (triton["backend"], triton["peer"]) == ("TRITON_ATTN", "FLASH_ATTN")
    assert ours["mean_difference"] == pytest.approx(0.02)
    assert ours["peers_difference"] == pytest.approx(0.01)
    assert result["passed"]
    assert "FLASH_ATTN" in families.format_families(result)


def test_cycles_put_vllm_to_sleep() -> None:
    started: list[Any] = []

    def told(options: Any, command: dict[str, Any]) -> dict[str, Any]:
        if command["do"] == "start":
            started.append(options)
            return {}
        return {"tokens": [[[1, 2]]] * 3, "together": True}

    options = replace(VLLM, shape=SHAPES["tiny"])
    result = cycles.run_cycles(options, 2, deadline=Deadline(), start=starting(told))
    assert result["passed"]
    (asked,) = started
    assert dict(asked.extra) == {"enable_sleep_mode": True}
    assert (asked.checkpoint, asked.clock) == (True, False)


# Logits


class Deciding:
    """Takes the token that the last one and the length name; logits say which they came from."""

    def __init__(self, vocab: int) -> None:
        self.options = SimpleNamespace(shape=SimpleNamespace(vocab=vocab))
        self.asked: list[list[list[int]]] = []

    def next_token(self, context: list[int]) -> int:
        return (context[-1] * 7 + len(context)) % self.options.shape.vocab

    def logits(self, context: list[int], columns: list[int]) -> list[float]:
        rng = random.Random(repr(context))
        return [rng.random() + column for column in columns]

    def last_of(self, prompts: list[list[int]], samplings: list[Any]) -> list[Any]:
        self.asked.append(prompts)
        return [self._one(*pair) for pair in zip(prompts, samplings, strict=True)]

    def _one(self, prompt: list[int], sampling: Any) -> Any:
        tokens: list[int] = []
        told = []
        for _ in range(sampling.steps):
            context = prompt + tokens
            row = self.logits(context, sampling.columns)
            pairs = zip(sampling.columns, row, strict=True)
            told.append({column: SimpleNamespace(logprob=value) for column, value in pairs})
            tokens.append(self.next_token(context))
        return SimpleNamespace(outputs=[SimpleNamespace(token_ids=tokens, logprobs=told)])


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Deciding:
    def sampling(output: int, *, streamed: bool, logprob_token_ids: list[int]) -> Any:
        return SimpleNamespace(steps=output, columns=logprob_token_ids)

    monkeypatch.setattr(vllm_engine, "sampling_of", sampling)
    return Deciding(1000)


def test_columns_are_spread_over_the_vocabulary() -> None:
    assert vllm_logits.columns(5) == [0, 1, 2, 3, 4]
    many = vllm_logits.columns(128256)
    assert len(set(many)) == vllm_logits.COLUMNS
    gaps = [b - a for a, b in itertools.pairwise([*many, 128256])]
    assert max(gaps) - min(gaps) <= 1


def test_the_engine_s_own_tokens_take_one_request(engine: Deciding) -> None:
    prompts = [[1, 2], [3]]
    tokens, values = vllm_logits.record_rows(engine, prompts, 6, None)  # type: ignore[arg-type]
    assert engine.asked == [prompts]
    assert [len(taken) for taken in tokens] == [6, 6]
    assert values.shape == (2, 6, vllm_logits.COLUMNS)
    np.testing.assert_allclose(values.mean(-1), 0.0, atol=1e-4)


def test_given_tokens_are_followed_however_often_the_engine_takes_others(engine: Deciding) -> None:
    prompts = [[1, 2], [3]]
    own, _ = vllm_logits.record_rows(engine, prompts, 6, None)  # type: ignore[arg-type]
    other = [list(own[0]), [5, *own[1][1:]]]
    other[0][3] = 999
    tokens, values = vllm_logits.record_rows(engine, prompts, 6, other)  # type: ignore[arg-type]
    assert tokens == other
    wanted = vllm_logits.columns(1000)
    for row, prompt in enumerate(prompts):
        for step in range(6):
            exact = np.array(engine.logits(prompt + other[row][:step], wanted))
            np.testing.assert_allclose(values[row, step], exact - exact.mean(), atol=1e-3)
    assert all(len(batch) <= 2 for batch in engine.asked)


def test_a_soak_s_arguments_name_the_device() -> None:
    class Made(vllm_engine.VllmEngine):
        def __init__(self) -> None:
            self.options, self.arguments = replace(VLLM, device="cpu"), {"model": "/a/folder"}

    assert json.dumps(Made().about()) == '{"device": "cpu", "model": "tiny"}'
