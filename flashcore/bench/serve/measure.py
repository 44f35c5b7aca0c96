"""One workload on one engine: the samples from which the suite makes a row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from flashcore.bench.serve.timeline import (
    Timeline,
    first_token_seconds,
    step_seconds,
    wall_seconds,
)
from flashcore.bench.serve.workloads import Prompts, Workload

WARM_TOKENS = 24


class Runner(Protocol):
    """What a measurement needs of an engine."""

    capacity: int

    def flush(self) -> None: ...

    def run(
        self, prompts: Sequence[list[int]], output: int, *, temperature: float = 0.0
    ) -> list[Timeline]: ...


class DoesNotFitError(Exception):
    """The workload needs more KV cache than the engine has."""


Sample = dict[str, Any]


def measure(
    engine: Runner, workload: Workload, *, vocab: int, page: int, repeats: int, seed: int = 0
) -> list[Sample]:
    """`repeats` samples of a workload, after whatever warms the engine up for it.

    Raises DoesNotFitError if its tokens do not fit into the engine's cache.
    """
    need = workload.capacity(page)
    if need > engine.capacity:
        raise DoesNotFitError(f"needs room for {need} KV tokens, the engine has {engine.capacity}")
    prompts = Prompts(workload, vocab, seed)
    engine.flush()
    if prompts.prefixes:
        engine.run(prompts.prefixes, 1)
    take = _time_to_first_token if workload.prefill_only else _decode
    return take(engine, workload, prompts, page, repeats)


def _time_to_first_token(
    engine: Runner, workload: Workload, prompts: Prompts, page: int, repeats: int
) -> list[Sample]:
    """Fresh unique parts every time; the prefixes stay in the cache, being used all the time.

    The first batch is timed apart: it may be the engine's first of that kind.
    """
    first = first_token_sample(engine.run(prompts.batch(), 1))
    samples = [first_token_sample(engine.run(prompts.batch(), 1)) for _ in range(repeats)]
    samples[0]["first_request_ttft_ms"] = first["ttft_ms"]
    return samples


def _decode(
    engine: Runner, workload: Workload, prompts: Prompts, page: int, repeats: int
) -> list[Sample]:
    """Decoding of prompts that lie in the prefix cache but for their last page.

    Two passes give the time to the first token: of the engine's first batch of that kind, for which
    it may have to compile or load, and of another's, which lies in the cache then. From there on a
    batch begins to decode almost at once, which keeps the prefill of long prompts out of what is
    timed.
    """
    temperature = 0.0 if workload.unique else 1.0  # samples of one prompt shall differ
    first = first_token_sample(engine.run(prompts.batch(), 1))
    batch = prompts.batch()
    later = first_token_sample(engine.run(batch, 1))
    engine.run(batch, min(WARM_TOKENS, workload.output), temperature=temperature)
    samples = []
    for _ in range(repeats):
        alone = wall_seconds(engine.run(batch, 1, temperature=temperature))
        timelines = engine.run(batch, workload.output, temperature=temperature)
        whole = wall_seconds(timelines)
        samples.append(
            {
                "step_ms": 1e3 * step_seconds(timelines),
                "step_ms_by_difference": 1e3 * (whole - alone) / (workload.output - 1),
                "wall_s": whole,
                "cached_tokens": min(timeline.cached_tokens for timeline in timelines),
                "retractions": sum(timeline.retractions for timeline in timelines),
            }
        )
    # The prompts were new only once.
    samples[0].update(later, first_request_ttft_ms=first["ttft_ms"])
    return samples


def first_token_sample(timelines: Sequence[Timeline]) -> Sample:
    """Of one batch sent at once."""
    mean, largest = first_token_seconds(timelines)
    return {
        "ttft_ms": 1e3 * mean,
        "ttft_max_ms": 1e3 * largest,
        "ttft_cached_tokens": min(timeline.cached_tokens for timeline in timelines),
    }
