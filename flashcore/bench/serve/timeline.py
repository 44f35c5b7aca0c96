"""From the arrival times of tokens to figures. Pure arithmetic, no engine."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


class NotTogetherError(Exception):
    """The sequences of a workload never decoded all at once."""


@dataclass(frozen=True)
class Timeline:
    """What came back for one request: (seconds since its batch was sent, tokens so far)."""

    chunks: tuple[tuple[float, int], ...]
    cached_tokens: int = 0  # of the prompt, found in the prefix cache
    retractions: int = 0  # times the engine threw the sequence out for want of memory

    @property
    def first(self) -> float:
        return self.chunks[0][0]

    @property
    def last(self) -> float:
        return self.chunks[-1][0]

    @property
    def tokens(self) -> int:
        return self.chunks[-1][1]


def step_seconds(timelines: Sequence[Timeline]) -> float:
    """Seconds of one decode step while all requests are decoding; prefill is no part of it.

    All decode together from the last request's first token to the first request's last. Within
    that, a request's chunks say how long so many tokens took, exactly, and an engine gives every
    request of a batch one token a step. The median over requests sheds chunks that were read late.

    Raises NotTogetherError if some request has fewer than two chunks in that time.
    """
    begin = max(timeline.first for timeline in timelines)
    end = min(timeline.last for timeline in timelines)
    steps = []
    for timeline in timelines:
        inside = [chunk for chunk in timeline.chunks if begin <= chunk[0] <= end]
        if len(inside) < 2 or inside[-1][1] == inside[0][1]:
            together = max(0.0, end - begin)
            raise NotTogetherError(
                f"all {len(timelines)} sequences were decoding for {together:.3f} s only"
            )
        (t0, n0), (t1, n1) = inside[0], inside[-1]
        steps.append((t1 - t0) / (n1 - n0))
    return statistics.median(steps)


def first_token_seconds(timelines: Sequence[Timeline]) -> tuple[float, float]:
    """Mean and largest time from sending the batch to a request's first token."""
    times = [timeline.first for timeline in timelines]
    return statistics.fmean(times), max(times)


def wall_seconds(timelines: Sequence[Timeline]) -> float:
    """From sending the batch to its last token."""
    return max(timeline.last for timeline in timelines)
