"""`flashcore bench serve --deterministic` without an engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flashcore.bench.serve import deterministic
from flashcore.bench.serve.deadline import Deadline
from flashcore.bench.serve.deterministic import (
    ACROSS,
    MODES,
    SETTINGS,
    bits,
    engine_options,
    format_deterministic,
    run_bits,
    summarise_cost,
)
from flashcore.bench.serve.engine import EngineOptions
from flashcore.bench.serve.pool import Places, Survey
from flashcore.bench.serve.shapes import SHAPES
from flashcore.bench.serve.worker import options_from
from tests.serve_fakes import OPTIONS, AskedWorker

Prompt = Sequence[int]


class Engine:
    """Answers that follow from the prompt alone; `spoil` makes them follow from something else."""

    def __init__(self, spoil: str = ""):
        self.options = SimpleNamespace(shape=replace(SHAPES["tiny"], context=6000))
        self.spoil, self.cache, self.asked = spoil, set(), []

    def flush(self) -> None:
        self.cache.clear()

    def logprob(self, text: Prompt) -> float:
        return -(hash(tuple(text)) % 1000003) / 1e6

    def answers(
        self, prompts: Sequence[list[int]], output: int, *, prompt: bool = False
    ) -> list[dict[str, Any]]:
        self.asked.append([len(p) for p in prompts])
        found = []
        for text in prompts:
            cached = tuple(text) in self.cache
            tokens, logs = [], []
            for _ in range(output):
                tokens.append(sum(text[-3:]) % 97 + 10)
                text = [*text, tokens[-1]]
                logs.append(self.logprob(text))
            wrong = {
                "single": len(prompts) == deterministic.COPIES,
                "radix_cache": cached and len(prompts) == 1,
                "prefix": len(prompts) == 1 + len(deterministic.PREFIXES) and len(text) < 600,
            }.get(self.spoil, False)
            if wrong:
                logs[3] += 1e-9
            whole = [self.logprob(text[: n + 1]) for n in range(1, len(text) - output)]
            if self.spoil == "p_vs_d":
                whole[-1] += 1e-9
            found.append(
                {"tokens": tokens, "output": logs, "prompt": whole if prompt else [],
                 "cached": 64 * cached}
            )  # fmt: skip
        self.cache.update(tuple(p) for p in prompts)
        return found


@pytest.mark.parametrize("spoil", ["", *MODES])
def test_bits_are_counted_by_mode(spoil: str) -> None:
    engine = Engine(spoil)
    found = bits(engine)
    assert found["kv"] == deterministic.DOCUMENT
    assert found["cached"] > 0
    assert set(found["differences"]) == set(found["compared"]) == set(MODES)
    assert {mode for mode, count in found["differences"].items() if count} == {spoil} - {""}
    assert max(map(max, engine.asked)) == deterministic.DOCUMENT + deterministic.OUTPUT
    assert all(count > 0 for count in found["compared"].values())


def test_an_answer_that_is_too_short_differs() -> None:
    assert deterministic._different(([1, 2], [0.5, 0.25]), ([1], [0.5])) == 2
    assert deterministic._different(([1, 2], [0.5, 0.25]), ([1, 3], [0.5, 0.5])) == 2


def survey(tmp_path: Path, answer: Any) -> Survey:
    def start(options: EngineOptions, log: Any) -> Any:
        return AskedWorker(options, log, answer)

    return Survey(Places(1, 2, 0), Deadline(None), tmp_path, start=start)


def told(options: EngineOptions, command: dict[str, Any]) -> dict[str, Any]:
    assert options.deterministic
    if command == {"do": "start"}:
        return {}
    assert command == {"do": "bits"}
    count = int(options.backend == "fa3")
    outputs = [[[1, 2], [0.5, 0.25]]]
    if options.page_size == 1 and options.backend == "fa3":
        outputs = [[[1, 2], [0.5, 0.125]]]
    modes = dict.fromkeys(MODES, 0)
    return {
        "kv": 5123,
        "differences": {**modes, "p_vs_d": count},
        "compared": dict.fromkeys(MODES, 16),
        "cached": 64,
        "outputs": outputs,
    }


def test_a_row_for_each_setting_and_mode(tmp_path: Path) -> None:
    result = run_bits(OPTIONS, ["flashcore", "fa3"], survey(tmp_path, told))
    settings = len(SETTINGS["sglang"])
    assert len(result["bits"]) == 2 * (settings * len(MODES) + settings - 1)
    assert result["passed"]
    of_peer = [row for row in result["bits"] if row["backend"] == "fa3" and row["differences"]]
    assert {row["mode"] for row in of_peer} == {"p_vs_d", ACROSS}
    text = format_deterministic(result)
    assert text.endswith("passed")
    assert "prefix cache off" in text


def test_one_difference_of_ours_fails(tmp_path: Path) -> None:
    def wrong(options: EngineOptions, command: dict[str, Any]) -> dict[str, Any]:
        answer = told(options, command)
        if answer and options.chunked_prefill == 256:
            answer["outputs"] = [[[1, 2], [0.5, 0.0]]]
        return answer

    result = run_bits(OPTIONS, ["flashcore"], survey(tmp_path, wrong))
    assert not result["passed"]
    assert format_deterministic(result).endswith("FAILED")


def test_an_engine_that_does_not_start_fails(tmp_path: Path) -> None:
    def broken(options: EngineOptions, command: dict[str, Any]) -> dict[str, Any]:
        raise RuntimeError("out of memory")

    result = run_bits(OPTIONS, ["flashcore"], survey(tmp_path, broken))
    assert not result["passed"]
    assert "did not run: RuntimeError: out of memory" in format_deterministic(result)


@pytest.mark.parametrize("engine", ["sglang", "vllm"])
def test_engines_are_deterministic_in_their_own_way(engine: str) -> None:
    base = replace(OPTIONS, engine=engine, device="cuda")
    for setting in SETTINGS[engine]:
        options = engine_options(base, "flashcore", setting)
        assert options.deterministic
        assert options.page_size == setting.page
        assert (options.environment == {"VLLM_BATCH_INVARIANT": "1"}) == (engine == "vllm")
        assert bool(options.extra) == (not setting.radix)
        assert options_from(asdict(options)) == options
    assert {s.chunk for s in SETTINGS[engine]} == {256, 8192}


def test_cost_by_workload() -> None:
    def row(backend: str, deterministic: bool, speed: float) -> dict[str, Any]:
        return {
            "workload": "w", "backend": backend, "deterministic": deterministic,
            "tokens_per_s": speed,
        }  # fmt: skip

    rows = [row("flashcore", True, 80.0), row("fa3", True, 40.0), row("fa3", False, 64.0)]
    (entry,) = summarise_cost(rows)
    assert entry["flashcore_deterministic_over"] == {"fa3, deterministic": 2.0, "fa3": 1.25}
    text = format_deterministic({"bits": [], "passed": False, "summary": [entry]})
    assert "w: flashcore, deterministic, over fa3, deterministic 2.00, fa3 1.25" in text
