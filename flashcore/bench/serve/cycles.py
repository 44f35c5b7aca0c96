"""What a trainer does between rollouts, over and over: the answers must stay the same.

A cycle: generation is paused in the middle of answers and goes on; memory of KV cache, weights and
SGLang's CUDA graphs is released and resumed (vLLM sleeps and wakes), the same weights are loaded
again, the cache is flushed. Fixed prompts, some with a common prefix, are answered after each, in
captured graphs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from flashcore.bench.serve.clock import EXTEND
from flashcore.bench.serve.deadline import Deadline
from flashcore.bench.serve.engine import EngineOptions
from flashcore.bench.serve.running import RunningEngine
from flashcore.bench.serve.soak import device_mib
from flashcore.bench.serve.suite import START_TIMEOUT_S, Worker, WorkerError, log_file
from flashcore.bench.serve.workloads import Prompts, Workload

SAVER = "torch_memory_saver"
OUTPUT = 64
CYCLE_TIMEOUT_S = 240.0
MOST_HELD = 0.7  # of the memory, by contexts and workspaces, when the rest is given back
_PAUSED_S = 0.2
_BUSY_S = 0.015  # into the prefill of a long prompt of two chunks
_ATTEMPTS = 5
_PARTS = (Workload("shared", 6, 1024, 100, OUTPUT), Workload("alone", 2, 0, 333, OUTPUT))


def cycle_prompts(vocab: int) -> list[list[int]]:
    """The fixed prompts."""
    return [
        prompt
        for seed, part in enumerate(_PARTS)
        for prompt in Prompts(part, vocab, seed + 300).batch()
    ]


def cycle(engine: RunningEngine, number: int) -> dict[str, Any]:
    """One cycle, then the fixed prompts: from an empty cache, from what that left, and paused.

    Number 0 is the engine as it started, which nothing has been done to. `together` says whether
    they were one batch each time; bits depend on a batch's size.
    """
    prompts = cycle_prompts(engine.options.shape.vocab)
    memory = {}
    if number:
        engine.flush()  # waits until the engine is idle, which a release asserts
        memory["held_mib"] = device_mib(engine)
        engine.release(number)
        memory["released_mib"] = device_mib(engine)
        engine.resume()
        problem = engine.renew_weights(number)
        if problem:
            return {"error": f"the weights were not updated: {problem}"}
    found = [
        _answers(engine, prompts, way, 10 * number + place)
        for place, way in enumerate(("empty", "full", "paused"))
    ]
    together = all(one_batch for _, one_batch in found)
    return {"tokens": [tokens for tokens, _ in found], "together": together, **memory}


def _answers(
    engine: RunningEngine, prompts: list[list[int]], way: str, seed: int
) -> tuple[list[list[int]], bool]:
    """Greedy answers to prompts that are one batch; whether they were, after some attempts.

    `seed` draws the long prompt before them, which must not be found in the cache.
    """
    if engine.clock is None:  # nobody tells, and requests that come while it is paused wait
        if way == "empty":
            engine.flush()
        work = _together(engine, None, prompts, pause=way == "paused")
        return engine.loop.run_until_complete(work), True
    chunk = engine.options.chunked_prefill
    length = min(2 * chunk, engine.options.shape.longest - 16)
    before = Prompts(Workload("before", 1, 0, length, 1), engine.options.shape.vocab, 400 + seed)
    for _ in range(_ATTEMPTS):
        if way == "empty":
            engine.flush()
        mark = engine.clock.mark()
        work = _together(engine, before.batch()[0], prompts, pause=way == "paused")
        tokens = engine.loop.run_until_complete(work)
        if any(s.kind == EXTEND and s.sequences == len(prompts) for s in engine.clock.since(mark)):
            return tokens, True
    return tokens, False


async def _together(
    engine: RunningEngine, before: list[int] | None, prompts: list[list[int]], *, pause: bool
) -> list[list[int]]:
    """Send the prompts while the engine is busy with a long one, or paused where there is none, so
    that it finds them all at once when it looks for more."""
    begun = asyncio.Event()

    async def one(prompt: list[int], output: int) -> list[int]:
        answer: dict[str, Any] = {}
        async for part in engine.follow(prompt, output):
            answer = part
            if output > 1:
                begun.set()
        tokens: list[int] = answer["tokens"]
        return tokens

    first = []
    if before is None:
        await engine.pause()
    else:
        first = [asyncio.ensure_future(one(before, 1))]
        await asyncio.sleep(_BUSY_S)
    running = [asyncio.ensure_future(one(prompt, OUTPUT)) for prompt in prompts]
    if before is None:
        await asyncio.sleep(_PAUSED_S)
        await engine.go_on()
    if pause:
        await begun.wait()
        await engine.pause()
        await asyncio.sleep(_PAUSED_S)
        await engine.go_on()
    await asyncio.gather(*first)
    return list(await asyncio.gather(*running))


def run_cycles(
    options: EngineOptions,
    cycles: int,
    *,
    deadline: Deadline,
    log_dir: Path | None = None,
    start: Callable[..., Worker] = Worker,
    after: Callable[[str], None] = lambda text: None,
    keep: Callable[[dict[str, Any]], None] = lambda result: None,
) -> dict[str, Any]:
    """Result and verdict; `keep` is given it after each cycle.

    Raises ValueError where the memory saver is not installed or the model is no Llama-like one.
    """
    sglang = options.engine == "sglang"
    if sglang and options.device == "cuda" and find_spec(SAVER) is None:
        raise ValueError(
            f"--cycles needs {SAVER}, which SGLang's --enable-memory-saver uses: "
            "pip install torch-memory-saver"
        )
    if options.shape.source is not None:
        raise ValueError(f"--cycles needs a Llama-like --model-shape, got {options.shape.name}")
    prompts = cycle_prompts(options.shape.vocab)
    saver = "enable_memory_saver" if sglang else "enable_sleep_mode"
    arguments: tuple[tuple[str, Any], ...] = ()
    if options.device == "cuda":
        arguments = ((saver, True),)
    if sglang:  # the long one before them has a place too
        arguments += (("max_running_requests", 2 * len(prompts)),)
    ready = replace(
        options,
        checkpoint=True,
        clock=sglang,
        decode_batches=(len(prompts),),
        max_total_tokens=options.max_total_tokens or 65536,
        extra=(*arguments, *options.extra),
    )
    told: list[dict[str, Any]] = []

    def result(error: str | None = None) -> dict[str, Any]:
        about = {"backend": options.backend, "model": options.shape.name, "asked": cycles}
        return judged({**about, "cycles": told, "error": error})

    with log_file(log_dir, ready) as log, start(ready, log) as worker:
        try:
            worker.ready(deadline.within(START_TIMEOUT_S))
            first: list[Any] | None = None
            for number in range(cycles + 1):
                if deadline.passed:
                    break
                command = {"do": "cycle", "number": number}
                answer = worker.ask(command, max(1.0, deadline.within(CYCLE_TIMEOUT_S)))
                if "error" in answer:
                    return result(answer["error"])
                first = first or answer["tokens"]
                if number:
                    alike = same_tokens(first, answer["tokens"])
                    notes = {key: value for key, value in answer.items() if key != "tokens"}
                    told.append({"cycle": number, **alike, **notes})
                    after(f"cycle {number}: {told[-1]['same']} of {told[-1]['tokens']} tokens")
                keep(result())
        except WorkerError as error:
            worker.stop(patience=5)
            return result(str(error))
    return result()


def same_tokens(first: list[Any], now: list[Any]) -> dict[str, Any]:
    """How many of the tokens are those of the engine as it started, asked in the same way."""
    same = tokens = 0
    for answers, expected_answers in zip(now, first, strict=True):
        for expected, found in zip(expected_answers, answers, strict=True):
            tokens += len(expected)
            same += sum(a == b for a, b in zip(expected, found, strict=False))
    return {"same": same, "tokens": tokens, "passed": same == tokens}


def judged(result: dict[str, Any]) -> dict[str, Any]:
    """With `failures` and `passed`: every cycle that was asked for, the same tokens in each, and
    the memory given back."""
    failures = [
        f"cycle {one['cycle']}: {one['same']} of {one['tokens']} tokens are the same"
        + ("" if one["together"] else ", and the prompts were not one batch")
        for one in result["cycles"]
        if not one["passed"]
    ]
    failures += [
        f"cycle {one['cycle']}: {one['released_mib']:.0f} of {one['held_mib']:.0f} MiB of GPU "
        "memory were still held after the release"
        for one in result["cycles"]
        if one.get("held_mib") and one["released_mib"] > MOST_HELD * one["held_mib"]
    ]
    if result["error"]:
        failures.append(result["error"].splitlines()[0])
    elif len(result["cycles"]) < result["asked"]:
        failures.append(f"{len(result['cycles'])} cycles of {result['asked']}")
    return {**result, "failures": failures, "passed": not failures}


def format_cycles(result: dict[str, Any]) -> str:
    """How many cycles, and the verdict."""
    lines = [f"{len(result['cycles'])} cycles of {result['model']} with {result['backend']}"]
    lines += [f"failed: {text}" for text in result["failures"]]
    return "\n".join([*lines, "passed" if result["passed"] else "FAILED"])
