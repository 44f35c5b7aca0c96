"""Interleaved timing: each round gives every provider its turn on the same tensors.

A GPU under load lowers its clocks within seconds. Timing one provider after the other would charge
that to whoever came last; in turns, every provider sees the same clocks.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from random import Random
from typing import Any, TypeVar

Item = TypeVar("Item")


@dataclass(frozen=True)
class Contestant:
    """Something to time: `call` runs one attention, `context` is entered around each sample."""

    name: str
    call: Callable[[], Any]
    context: Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call over all rounds."""

    median_ms: float
    p10_ms: float
    p90_ms: float
    rounds: int
    calls_per_round: int


def time_interleaved(
    contestants: Sequence[Contestant],
    *,
    rounds: int,
    sample_ms: float,
    elapsed_ms: Callable[[Contestant, int], float],
) -> dict[str, Timing]:
    """Median time of each contestant.

    A sample is as many calls as last `sample_ms`, so that the host's cost of a call hides behind
    the work before it. `elapsed_ms(contestant, calls)` takes one sample and returns its length.
    """
    calls = {}
    for contestant in contestants:
        elapsed_ms(contestant, 2)  # the first calls compile, load and allocate
        estimate = elapsed_ms(contestant, 3) / 3
        calls[contestant.name] = max(1, min(1000, round(sample_ms / max(estimate, 1e-3))))
    samples: dict[str, list[float]] = {contestant.name: [] for contestant in contestants}
    for order in shuffled(contestants, rounds):
        for contestant in order:
            number = calls[contestant.name]
            samples[contestant.name].append(elapsed_ms(contestant, number) / number)
    return {name: timing_of(values, calls[name]) for name, values in samples.items()}


def shuffled(items: Iterable[Item], rounds: int) -> Iterator[list[Item]]:
    """An order for each round, drawn anew, the same ones in every run.

    Who comes after a kernel that draws much power has lower clocks, and that must not always be
    the same one.
    """
    order, random = list(items), Random(0)
    for _ in range(rounds):
        random.shuffle(order)
        yield list(order)


def cuda_elapsed_ms(contestant: Contestant, calls: int) -> float:
    """Time `calls` calls with CUDA events on the current stream."""
    import torch

    event: Any = torch.cuda.Event  # untyped in some versions of torch
    start, end = event(enable_timing=True), event(enable_timing=True)
    with contestant.context():
        contestant.call()  # back to this contestant's data in the L2, and its code in the caches
        start.record()
        for _ in range(calls):
            contestant.call()
        end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def host_us_per_call(call: Callable[[], Any], calls: int = 200) -> float:
    """Microseconds of host time of one call, the GPU not waited for."""
    import time

    import torch

    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(calls):
        call()
    spent = time.perf_counter() - started
    torch.cuda.synchronize()
    return spent / calls * 1e6


def timing_of(values: list[float], calls: int) -> Timing:
    """Median and deciles of a contestant's samples, milliseconds of one call each."""
    ordered = sorted(values)
    tenth = (len(ordered) - 1) // 10
    return Timing(
        statistics.median(ordered), ordered[tenth], ordered[-1 - tenth], len(ordered), calls
    )
