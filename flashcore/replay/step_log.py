"""What every simulated step read, in columns."""

from __future__ import annotations

import csv
from array import array
from os import PathLike
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray


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
        self._columns: list[array[Any]] = [
            array("d" if field == "time_ms" else "q") for field in Step._fields
        ]

    def append(self, step: Step) -> None:
        """Add one step."""
        for column, value in zip(self._columns, step, strict=True):
            column.append(value)

    def __len__(self) -> int:
        return len(self._columns[0])

    def __getitem__(self, index: int) -> Step:
        return Step(*(column[index] for column in self._columns))

    def column(self, name: str) -> NDArray[Any]:
        """A copy of the column of this field of Step."""
        return np.array(self._columns[Step._fields.index(name)])

    def write_csv(self, path: str | PathLike[str]) -> None:
        """Write a header and one line a step; OSError when the file cannot be written."""
        with open(path, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(Step._fields)
            writer.writerows(zip(*self._columns, strict=True))
