"""What an engine of a fleet did, in sums that need no log of its steps."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from flashcore.replay.simulate import Engine, Totals
from flashcore.replay.step_log import Step, StepLog

_SUMMED = Step._fields[1:]


@dataclass
class Tally:
    """Sums over steps, requests and pages of one engine, or of several together."""

    steps: int = 0
    sums: dict[str, int] = field(default_factory=lambda: dict.fromkeys(_SUMMED, 0))
    steps_by_batch: NDArray[np.int64] = field(default_factory=lambda: np.zeros(1, np.int64))
    totals: Totals = field(default_factory=Totals)
    evictions: int = 0
    end_ms: float = 0.0

    def add_steps(self, log: StepLog) -> None:
        """Add the steps of a log."""
        if not len(log):
            return
        self.steps += len(log)
        for name in _SUMMED:
            self.sums[name] += int(log.column(name).sum())
        self._add_batches(np.bincount(log.column("batch")))

    def close(self, engine: Engine) -> None:
        """Take what the engine says of its requests and pages at the end."""
        self.totals = engine.totals
        self.evictions = engine.cache.evictions
        self.end_ms = engine.now_ms

    def add(self, other: Tally) -> None:
        """Add another engine's."""
        self.steps += other.steps
        for name in _SUMMED:
            self.sums[name] += other.sums[name]
        self._add_batches(other.steps_by_batch)
        self.totals = self.totals + other.totals
        self.evictions += other.evictions
        self.end_ms = max(self.end_ms, other.end_ms)

    def batch_quantile(self, share: float) -> float:
        """Of the batch sizes of all steps, interpolated as numpy.percentile does."""
        if not self.steps:
            return 0.0
        ends = np.cumsum(self.steps_by_batch)
        place = share * (self.steps - 1)
        low, high = np.searchsorted(ends, [np.floor(place), np.ceil(place)], side="right").tolist()
        return float(low + (high - low) * (place - np.floor(place)))

    def _add_batches(self, more: NDArray[np.int64]) -> None:
        short, long = sorted((self.steps_by_batch, more), key=len)
        total = long.astype(np.int64)
        total[: short.size] += short
        self.steps_by_batch = total
