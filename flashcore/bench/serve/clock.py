"""When the scheduler had a step's result, by its own clock, and what its host spent on it.

Tokens that arrive at a client have gone through two more processes; a step of 1.5 ms is not seen
through those to 2 %. The scheduler writes into a file that the benchmark maps as well: a few
hundred nanoseconds a step. Both clocks are the machine's monotonic one.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

_ROWS = 1 << 14  # steps remembered
_COLUMNS = 6  # time, sequences, decode, host of a step, its graph launch, its metadata; ns
DECODE, EXTEND, OTHER = 1, 2, 0
_SETTLING = 2  # steps after prefill in which the pipeline fills


@dataclass(frozen=True)
class Step:
    """One result. Times in nanoseconds; the host's are sums since the scheduler started."""

    at: int
    sequences: int
    kind: int
    host: int
    launch: int
    metadata: int


class Clock:
    """The reading side. `mark` before something, `since(mark)` after it."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def mark(self) -> int:
        """Steps so far; 0 before the first."""
        return int(self._table()[0, 0]) if self._path.exists() else 0

    def since(self, mark: int) -> list[Step]:
        """The steps after a mark, the last _ROWS - 1 of them."""
        if not self._path.exists():
            return []
        table = self._table()
        count = int(table[0, 0])
        first = max(mark, count - (_ROWS - 1))
        rows = (table[1 + number % (_ROWS - 1)] for number in range(first, count))
        return [Step(*map(int, row)) for row in rows]

    def _table(self) -> np.ndarray[Any, Any]:
        return np.memmap(self._path, np.int64, "r", shape=(_ROWS, _COLUMNS))


class Writer:
    """The writing side, in the scheduler."""

    def __init__(self, path: Path) -> None:
        self._table = np.memmap(path, np.int64, "w+", shape=(_ROWS, _COLUMNS))
        self.host = self.launch = self.metadata = 0
        self._count = 0

    def step(self, sequences: int, kind: int) -> None:
        row = (time.perf_counter_ns(), sequences, kind, self.host, self.launch, self.metadata)
        self._table[1 + self._count % (_ROWS - 1)] = row
        self._count += 1
        self._table[0, 0] = self._count


def step_figures(steps: list[Step], sequences: int) -> dict[str, float] | None:
    """Of the decode steps in which so many sequences took part: `step_ms` (their mean),
    `step_ms_p50`, `host_us` (the decode runner's host time a step outside the graph's launch) and
    of that `metadata_us` (the attention backend's). None for fewer than eight steps.
    """
    taken = [s for s in steps if s.kind == DECODE and s.sequences == sequences][_SETTLING:]
    if len(taken) < 8:
        return None
    first, last, count = taken[0], taken[-1], len(taken) - 1
    gaps = [(b.at - a.at) / 1e6 for a, b in pairwise(taken)]
    figures = {
        "step_ms": (last.at - first.at) / count / 1e6,
        "step_ms_p50": statistics.median(gaps),
    }
    if last.host > first.host:  # there is a graph to launch
        host = (last.host - first.host) - (last.launch - first.launch)
        figures["host_us"] = host / count / 1e3
        figures["metadata_us"] = (last.metadata - first.metadata) / count / 1e3
    return figures


def install(file: str) -> None:
    """Have this process's scheduler write to `file`; the first process that asks, no other."""
    from sglang.srt.managers.scheduler import Scheduler
    from sglang.srt.model_executor.runner import decode_cuda_graph_runner as decode

    try:
        Path(file).open("xb").close()
    except FileExistsError:
        return
    writer = Writer(Path(file))
    process = Scheduler.process_batch_result

    def process_batch_result(self: Any, batch: Any, result: Any, *args: Any, **kwargs: Any) -> Any:
        mode, sequences = batch.forward_mode, len(batch.reqs)
        kind = DECODE if mode.is_decode() else EXTEND if mode.is_extend() else OTHER
        answer = process(self, batch, result, *args, **kwargs)
        writer.step(sequences, kind)
        return answer

    Scheduler.process_batch_result = process_batch_result
    runner = decode.DecodeCudaGraphRunner
    execute = runner.execute

    def timed_execute(self: Any, *args: Any, **kwargs: Any) -> Any:
        _time_method(writer, "launch", self.backend, "replay")
        _time_method(writer, "metadata", self.attn_backend, "init_forward_metadata_out_graph")
        started = time.perf_counter_ns()
        try:
            return execute(self, *args, **kwargs)
        finally:
            writer.host += time.perf_counter_ns() - started

    runner.execute = timed_execute


def _time_method(writer: Writer, total: str, owner: Any, name: str) -> None:
    """Add what `owner.name` takes to a total of the writer, from the first call of this on."""
    if getattr(owner, "_flashcore_timed", None) == name:
        return
    method: Callable[..., Any] = getattr(owner, name)

    def timed(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter_ns()
        try:
            return method(*args, **kwargs)
        finally:
            setattr(writer, total, getattr(writer, total) + time.perf_counter_ns() - started)

    with contextlib.suppress(AttributeError):  # an object with slots stays untimed
        setattr(owner, name, timed)
        owner._flashcore_timed = name
