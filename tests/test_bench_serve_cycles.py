"""Cycles of released memory and updated weights, and soaks with a hierarchical cache."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest

from flashcore.bench.serve import cycles, hicache
from flashcore.bench.serve import soak as soak_module
from flashcore.bench.serve.clock import EXTEND, Clock, Writer
from flashcore.bench.serve.deadline import Deadline
from flashcore.bench.serve.engine import EngineOptions, _problem
from flashcore.bench.serve.shapes import SHAPES
from flashcore.bench.serve.suite import WorkerError
from tests.serve_fakes import OPTIONS, starting
from tests.test_bench_serve_cli import soaked

CPU = replace(OPTIONS, backend="flashcore", device="cpu", chunked_prefill=64)


# One cycle


class CycledEngine:
    """Answers a prompt with its last token and its length; notes what is done to it."""

    def __init__(self, folder: Path, *, together_at: int = 1) -> None:
        self.options = CPU
        self.clock: Clock | None = Clock(folder / "clock")
        self._writer = Writer(folder / "clock")
        self.loop = asyncio.new_event_loop()
        self.done: list[str] = []
        self.problem = ""
        self.long_prompts: set[tuple[int, ...]] = set()
        self._together_at = together_at  # the attempt at which prompts are one batch
        self._attempts = 0
        self._waiting = 0
        self._paused = asyncio.Event()
        self._paused.set()

    def flush(self) -> None:
        self.done.append("flush")

    def release(self, number: int) -> None:
        self.done.append(f"release {number}")

    def resume(self) -> None:
        self.done.append("resume")

    def renew_weights(self, number: int) -> str:
        self.done.append(f"weights {number}")
        return self.problem

    async def pause(self) -> None:
        self.done.append("pause")
        self._paused.clear()

    async def go_on(self) -> None:
        self.done.append("go on")
        self._paused.set()

    async def follow(self, prompt: list[int], output: int) -> AsyncIterator[dict[str, Any]]:
        if output == 1:
            assert tuple(prompt) not in self.long_prompts  # it would be cached
            self.long_prompts.add(tuple(prompt))
            self._attempts += 1
            yield {"tokens": [1]}
            return
        if self.clock is None:  # requests that come while it is paused wait
            await self._paused.wait()
        self._waiting += 1
        if self._waiting == 8:
            whole = self._attempts >= self._together_at
            for part in (8,) if whole else (1, 7):
                self._writer.step(part, EXTEND)
            self._waiting = 0
        await asyncio.sleep(0)
        yield {"tokens": [prompt[-1]]}
        await asyncio.sleep(0.01)
        await self._paused.wait()
        yield {"tokens": [prompt[-1], len(prompt)] * (output // 2)}


def test_a_cycle_gives_memory_back_and_weights_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cycles, "_PAUSED_S", 0.02)
    engine = CycledEngine(tmp_path)
    first: Any = cycles.cycle(engine, 0)  # type: ignore[arg-type]
    assert engine.done == ["flush", "pause", "go on"]
    engine.done.clear()
    now: Any = cycles.cycle(engine, 1)  # type: ignore[arg-type]
    given_back = ["flush", "release 1", "resume", "weights 1"]
    assert engine.done == [*given_back, "flush", "pause", "go on"]
    assert first["together"]
    assert len(first["tokens"]) == 3
    assert len(first["tokens"][0]) == 8
    assert len(first["tokens"][0][0]) == cycles.OUTPUT
    assert cycles.same_tokens(first["tokens"], now["tokens"])["passed"]


def test_without_a_clock_prompts_are_held_until_all_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cycles, "_PAUSED_S", 0.02)
    engine = CycledEngine(tmp_path)
    engine.clock = None
    found = cycles.cycle(engine, 0)  # type: ignore[arg-type]
    assert found["together"]
    assert len(found["tokens"]) == 3
    held = ["pause", "go on"]
    assert engine.done == ["flush", *held, *held, *held, "pause", "go on"]
    assert engine.long_prompts == set()


def test_prompts_are_sent_again_until_they_are_one_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cycles, "_PAUSED_S", 0.0)
    engine = CycledEngine(tmp_path, together_at=3)
    assert cycles.cycle(engine, 0)["together"]  # type: ignore[arg-type]
    assert engine.done.count("flush") == 3  # each attempt from an empty cache
    never = CycledEngine(tmp_path, together_at=10**6)
    assert not cycles.cycle(never, 0)["together"]  # type: ignore[arg-type]


def test_weights_that_are_refused_end_it(tmp_path: Path) -> None:
    engine = CycledEngine(tmp_path)
    engine.problem = "shape mismatch"
    answer = cycles.cycle(engine, 1)  # type: ignore[arg-type]
    assert answer == {"error": "the weights were not updated: shape mismatch"}


def test_updates_answer_by_version() -> None:
    assert _problem((True, "fine", 0)) == ""
    assert _problem((False, "no")) == "no"


def test_fixed_prompts_share_and_fit_one_prefill() -> None:
    prompts = cycles.cycle_prompts(32000)
    assert prompts == cycles.cycle_prompts(32000)
    assert len({tuple(prompt[:1024]) for prompt in prompts if len(prompt) > 1024}) == 1
    assert sum(map(len, prompts)) <= EngineOptions("fa3", SHAPES["tiny"], ()).chunked_prefill


# Many


def told(tokens: list[int], together: bool = True) -> dict[str, Any]:
    return {"tokens": [[tokens]] * 3, "together": together}


def run(answers: list[Any], count: int, **how: Any) -> dict[str, Any]:
    coming = iter(answers)

    def answer(options: EngineOptions, command: dict[str, Any]) -> dict[str, Any]:
        if command["do"] == "start":
            assert options.checkpoint
            assert options.clock
            return {}
        found = next(coming)
        if isinstance(found, Exception):
            raise found
        return dict(found)

    result = cycles.run_cycles(
        CPU, count, start=starting(answer), **{"deadline": Deadline(), **how}
    )
    json.dumps(result)
    return result


def test_cycles_pass_with_the_same_tokens_in_each() -> None:
    kept: list[int] = []
    result = run([told([1, 2])] * 4, 3, keep=lambda one: kept.append(len(one["cycles"])))
    assert result["passed"]
    assert [one["cycle"] for one in result["cycles"]] == [1, 2, 3]
    assert result["cycles"][0]["tokens"] == 6
    assert kept == [0, 1, 2, 3]
    assert cycles.format_cycles(result).endswith("\npassed")


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ([told([1, 2]), told([1, 2]), told([1, 3])], "cycle 2: 3 of 6 tokens are the same"),
        ([told([1]), told([2], together=False), told([1])], "were not one batch"),
        ([told([1]), WorkerError("it ended")], "it ended"),
        ([told([1]), {"error": "the weights were not updated: x"}], "not updated: x"),
    ],
)
def test_cycles_fail(answers: list[Any], message: str) -> None:
    result = run(answers, 2)
    assert not result["passed"]
    assert message in " ".join(result["failures"])


def test_memory_that_is_not_given_back_fails() -> None:
    kept = {**told([1]), "held_mib": 20000.0, "released_mib": 19000.0}
    result = run([told([1]), kept], 1)
    assert result["failures"] == [
        "cycle 1: 19000 of 20000 MiB of GPU memory were still held after the release"
    ]
    assert run([told([1]), {**kept, "released_mib": 3000.0}], 1)["passed"]


def test_fewer_cycles_than_asked_do_not_pass() -> None:
    now = [0.0]

    def keep(result: dict[str, Any]) -> None:
        now[0] += 10

    result = run([told([1])] * 9, 5, keep=keep, deadline=Deadline(25, clock=lambda: now[0]))
    assert result["failures"] == ["2 cycles of 5"]


def test_what_cycles_need_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cycles, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install torch-memory-saver"):
        cycles.run_cycles(replace(CPU, device="cuda"), 1, deadline=Deadline())
    other = replace(SHAPES["tiny"], source="{}", name="gpt-oss")
    with pytest.raises(ValueError, match="a Llama-like --model-shape, got gpt-oss"):
        cycles.run_cycles(replace(CPU, shape=other), 1, deadline=Deadline())
    monkeypatch.setattr(cycles, "find_spec", lambda name: ModuleSpec(name, None))
    seen: list[EngineOptions] = []

    def answer(options: EngineOptions, command: dict[str, Any]) -> dict[str, Any]:
        seen.append(options)
        return told([1])

    options = replace(CPU, device="cuda")
    cycles.run_cycles(options, 1, deadline=Deadline(), start=starting(answer))
    assert dict(seen[0].extra)["enable_memory_saver"] is True


# The hierarchical cache


def test_arguments_of_a_hierarchical_cache() -> None:
    found = dict(soak_module.hicache_arguments("direct"))
    assert found["enable_hierarchical_cache"] is True
    assert found["hicache_io_backend"] == "direct"
    assert found["hicache_mem_layout"] == "page_first_direct"
    assert dict(soak_module.hicache_arguments("kernel:layer_first"))["hicache_mem_layout"] == (
        "layer_first"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("disk", "--hicache disk: 'disk' is not one of kernel, direct"),
        ("kernel:page_first_direct", "with kernel, 'page_first_direct' is not one of"),
    ],
)
def test_a_cache_that_sglang_would_change_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        soak_module.hicache_arguments(text)


@pytest.mark.parametrize(
    ("counts", "failures", "enough"),
    [
        ({"evictions": 2000, "loads": 1001}, [], True),
        ({"evictions": 2000, "loads": 7}, [], False),
        ({"evictions": 3, "loads": 0}, ["the hierarchical cache made no loads"], False),
        (
            None,
            [f"the hierarchical cache made no {name}" for name in ("evictions", "loads")],
            False,
        ),
    ],
)
def test_a_soak_counts_evictions_and_loads(
    counts: dict[str, int] | None, failures: list[str], enough: bool
) -> None:
    result = soaked(hicache=counts)
    assert result["failures"] == failures
    assert result["passed"] is (not failures)
    assert (result["hicache_enough"], result["hicache_bar"]) == (enough, 1000)


def test_a_soak_that_does_not_end_idle_keeps_what_it_saw(monkeypatch: pytest.MonkeyPatch) -> None:
    class Run:
        def __init__(self, engine: Any, record: soak_module.Record, seed: int) -> None:
            record.tokens = 7

        async def run(self, seconds: float) -> None:
            pass

    class Busy:
        options, counts = CPU, None
        loop = asyncio.new_event_loop()

        def about(self) -> dict[str, Any]:
            return {"device": "cpu"}

        def flush(self) -> None:
            raise RuntimeError("requests are still running")

    monkeypatch.setattr(soak_module, "_Soak", Run)
    result = soak_module.soak(Busy(), minutes=1, seed=0)  # type: ignore[arg-type]
    assert (result["tokens"], result["errors"]) == (7, ["requests are still running"])


def test_most_prefixes_of_a_hicache_soak_are_not_on_the_gpu() -> None:
    longest = 131070
    traffic = soak_module.Traffic(1000, longest, 3, soak_module.HICACHE_PREFIXES)
    held = sum(map(len, traffic._prefixes))
    assert len(traffic._prefixes) == soak_module.HICACHE_PREFIXES
    assert held > 1.5 * (9 * 131072 // 8)
    traffic.renew_prefix()
    assert len(traffic._prefixes) == soak_module.HICACHE_PREFIXES


def test_counts_are_read_while_they_are_made(tmp_path: Path) -> None:
    file = tmp_path / "counts"
    assert hicache.read_counts(file) is None
    file.touch()  # a scheduler has claimed it and not written yet
    assert hicache.read_counts(file) is None


def test_answers_of_a_method_are_told() -> None:
    class Cache:
        def load_back(self, node: int, quota: int = 0) -> list[int] | None:
            return [1, 2] if node else None

    heard: list[Any] = []
    hicache._after(Cache, "load_back", heard.append)
    assert Cache().load_back(1, quota=3) == [1, 2]
    assert Cache().load_back(0) is None
    assert heard == [[1, 2], None]
    assert [hicache._made(value) for value in (None, False, True, [1])] == [
        False,
        False,
        True,
        True,
    ]
