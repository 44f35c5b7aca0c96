"""What every simulated step read, in columns."""

from __future__ import annotations

import csv
from os import PathLike
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

_FIRST_CAPACITY = 64  # steps


class Step(NamedTuple):
    """One step of the engine."""

    time_ms: float  # when it starts
    batch: int  # sequences in it
    waiting: int  # requests that have arrived and are not admitted
    prefill_tokens: int  # prompt tokens computed in it
    tokens_per_sequence: int  # sum of the sequences' lengths
    tokens_once: int  # the same with the tokens of each page counted once
    pages_used: int
    pages_shared: int  # used by two sequences or more
    pages_staged: int  # used, and not resident since the step before


class StepLog:
    """All steps of a run, column by column; 72 bytes a step."""

    def __init__(self) -> None:
        self._size = 0
        self._times = np.zeros(_FIRST_CAPACITY)
        self._counts = np.zeros((_FIRST_CAPACITY, len(Step._fields) - 1), np.int64)

    def append(self, step: Step) -> None:
        """Add one step."""
        self._reserve(1)
        self._times[self._size] = step[0]
        self._counts[self._size] = step[1:]
        self._size += 1

    def extend(self, times_ms: NDArray[np.float64], counts: tuple[Any, ...]) -> None:
        """Add steps: when they start, and each further field, one number for all or an array."""
        self._reserve(times_ms.size)
        begin, end = self._size, self._size + times_ms.size
        self._times[begin:end] = times_ms
        for column, values in enumerate(counts):
            self._counts[begin:end, column] = values
        self._size = end

    def clear(self) -> None:
        """Forget all steps."""
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> Step:
        place = range(self._size)[index]
        return Step(float(self._times[place]), *self._counts[place].tolist())

    def column(self, name: str) -> NDArray[Any]:
        """A copy of the column of this field of Step."""
        place = Step._fields.index(name)
        column: NDArray[Any] = self._counts[:, place - 1] if place else self._times
        copy: NDArray[Any] = column[: self._size].copy()
        return copy

    def write_csv(self, path: str | PathLike[str]) -> None:
        """Write a header and one line a step; OSError when the file cannot be written."""
        with open(path, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(Step._fields)
            writer.writerows(self[index] for index in range(self._size))

    def _reserve(self, more: int) -> None:
        needed = self._size + more
        if needed > self._times.size:
            capacity = max(needed, 2 * self._times.size)
            times, counts = self._times, self._counts
            self._times = np.zeros(capacity)
            self._counts = np.zeros((capacity, counts.shape[1]), np.int64)
            self._times[: self._size] = times[: self._size]
            self._counts[: self._size] = counts[: self._size]
