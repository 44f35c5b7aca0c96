"""Small steps and first tokens: the engines of all backends side by side, sample by sample in turn.

What moves a step of 1.5 ms by a tenth (clocks, the host, whatever else the machine does) lasts
longer than a sample, so a pair of samples taken one right after the other shares it. What counts is
the median over such pairs of one backend's time over the other's, and an interval for it.
"""

from __future__ import annotations

import contextlib
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from flashcore.bench.rows import Row
from flashcore.bench.serve.deadline import Deadline
from flashcore.bench.serve.engine import EngineOptions
from flashcore.bench.serve.measure import Sample
from flashcore.bench.serve.report import BASELINES, engine_of
from flashcore.bench.serve.shapes import ModelShape
from flashcore.bench.serve.spread import paired_ratio, quartiles
from flashcore.bench.serve.suite import (
    MEASURE_TIMEOUT_S,
    START_TIMEOUT_S,
    Worker,
    WorkerError,
    begin_beside,
    by_model,
    fitted,
    log_file,
    make_row,
    reason,
    with_caches,
)
from flashcore.bench.serve.workloads import Workload

IMPATIENCE_S = 5.0  # with an engine that failed
FEWEST = 3  # samples, however long they take
_START_S = 45.0  # what is left must be more than this for a start to make sense


@dataclass(frozen=True)
class Plan:
    """How much is measured: `repeats` samples of each figure over `starts` sets of fresh engines,
    fewer (at least FEWEST a start) where those of one figure take more than `seconds`."""

    repeats: int = 15
    starts: int = 2
    seconds: float = 30.0
    seed: int = 0
    deadline: Deadline = field(default_factory=Deadline)


@dataclass
class _Taken:
    """Samples of one workload: backend -> its samples, the n-th of each taken together."""

    first: dict[str, list[Sample]] = field(default_factory=dict)
    later: dict[str, list[Sample]] = field(default_factory=dict)
    decode: dict[str, list[Sample]] = field(default_factory=dict)


Start = Callable[[EngineOptions, IO[bytes]], Worker]


def run_turns(
    workloads: Sequence[Workload],
    options: Sequence[EngineOptions],
    plan: Plan,
    *,
    log_dir: Path | None = None,
    start: Start = Worker,
    after: Callable[[str], None] = lambda text: None,
    keep: Callable[[dict[str, Any]], None] = lambda result: None,
) -> dict[str, Any]:
    """`rows`, `skipped` and `engines` of the benchmark's JSON object.

    `options` has an entry for each engine. `keep` is given the result so far after each workload.
    """
    run = _Run(workloads, options, plan, start, log_dir, after, keep)
    with tempfile.TemporaryDirectory() as caches:
        options = with_caches(options, caches)
        for shape, group in by_model(workloads, options[0].shape):
            run.shapes.update({workload.name: shape for workload in group})
            those = [replace(fitted(one, shape, group, True), clock=True) for one in options]
            for number in range(plan.starts):
                if not plan.deadline.allows(_START_S):
                    run.skipped[f"start {number + 1} of {shape.name}"] = "no time left"
                    continue
                turn = number % len(group)  # another kind comes first
                run.one_start(those, [*group[turn:], *group[:turn]], number)
    return run.result()


class _Run:
    def __init__(
        self,
        workloads: Sequence[Workload],
        options: Sequence[EngineOptions],
        plan: Plan,
        start: Start,
        log_dir: Path | None,
        after: Callable[[str], None],
        keep: Callable[[dict[str, Any]], None],
    ) -> None:
        self._workloads, self._options, self._plan = workloads, options, plan
        self._start, self._log_dir, self._after, self._keep = start, log_dir, after, keep
        self._random = random.Random(plan.seed)
        self._taken = {workload.name: _Taken() for workload in workloads}
        self.shapes: dict[str, ModelShape] = {}
        self.skipped: dict[str, str] = {}
        self.engines: list[dict[str, Any]] = []

    def one_start(
        self, those: Sequence[EngineOptions], group: Sequence[Workload], number: int
    ) -> None:
        """Fresh engines, each workload prepared and sampled on them."""
        with contextlib.ExitStack() as stack:
            workers: dict[str, Worker] = {}
            for one in those:
                log = stack.enter_context(log_file(self._log_dir, one))
                workers[one.name] = stack.enter_context(self._start(one, log))
            begin_beside(zip(those, workers.values(), strict=True))
            for backend, worker in list(workers.items()):
                try:
                    ready = worker.ready(self._plan.deadline.within(START_TIMEOUT_S))
                except WorkerError as error:
                    self._lost(workers, backend, error)
                else:
                    self.engines.append({"backend": backend, **ready})
                    self._after(f"{those[0].shape.name}, {backend}: {ready['start_s']:.0f} s")
            for workload in group:
                if self._plan.deadline.passed:
                    self.skipped[workload.name] = "no time left"
                elif workers:
                    self._measure(workload, workers, number)
                    self._keep(self.result())

    def _measure(self, workload: Workload, workers: dict[str, Worker], number: int) -> None:
        taken = self._taken[workload.name]
        command = {"do": "prepare", "workload": asdict(workload), "seed": number}
        ready = self._round(workload, workers, command, taken.first)
        self._samples(workload, ready, {"do": "first_token"}, taken.later)
        if not workload.prefill_only:
            self._round(workload, ready, {"do": "ready"}, {})
            self._samples(workload, ready, {"do": "decode"}, taken.decode)
        for backend in set(workers) - set(ready):  # died on the way, or has no room
            if f"{backend} on {workload.name}" not in self.skipped:
                workers.pop(backend)
        self._after(f"{workload.name}: {_brief(self.row(workload, b) for b in ready)}")

    def _samples(
        self,
        workload: Workload,
        workers: dict[str, Worker],
        command: dict[str, Any],
        into: dict[str, list[Sample]],
    ) -> None:
        """Rounds until there are enough or time is up."""
        each = -(-self._plan.repeats // self._plan.starts)
        started = time.monotonic()
        for number in range(each):
            late = number >= FEWEST and time.monotonic() - started > self._plan.seconds
            if late or self._plan.deadline.passed or not workers:
                return
            self._round(workload, workers, command, into)

    def _round(
        self,
        workload: Workload,
        workers: dict[str, Worker],
        command: dict[str, Any],
        into: dict[str, list[Sample]],
    ) -> dict[str, Worker]:
        """One answer of each, in shuffled order; those that gave one. A round is whole or is
        left out, so that samples of the same number belong together."""
        order = list(workers)
        self._random.shuffle(order)
        answers: dict[str, Sample] = {}
        for backend in order:
            try:
                patience = max(1.0, self._plan.deadline.within(MEASURE_TIMEOUT_S))
                answer = workers[backend].ask(command, patience)
            except WorkerError as error:
                self._lost(workers, backend, error)
                continue
            if "skipped" in answer:
                self.skipped[f"{backend} on {workload.name}"] = answer["skipped"]
            else:
                answers[backend] = answer["sample"]
        for backend, sample in answers.items():
            if set(answers) == set(order) or command["do"] == "prepare":
                into.setdefault(backend, []).append(sample)
        return {backend: workers[backend] for backend in answers}

    def _lost(self, workers: dict[str, Worker], backend: str, error: WorkerError) -> None:
        workers.pop(backend).stop(patience=IMPATIENCE_S)
        self.skipped[backend] = reason(str(error), str(error))
        self._after(str(error))

    def row(self, workload: Workload, backend: str) -> Row | None:
        """One line of the result; None where nothing was measured."""
        taken = self._taken[workload.name]
        samples = [*taken.later.get(backend, []), *taken.decode.get(backend, [])]
        first = [sample["ttft_ms"] for sample in taken.first.get(backend, [])]
        if not samples:  # nothing but a first request, which alone says little
            return None
        (options,) = (one for one in self._options if one.name == backend)
        row = make_row(workload, self.shapes[workload.name], options, samples)
        found = {
            name: [sample[name] for sample in samples if sample.get(name) is not None]
            for name in ("step_ms_p50", "host_us", "metadata_us")
        }
        return {
            **row,
            **{name: statistics.median(v) if v else None for name, v in found.items()},
            "first_request_ttft_ms": statistics.median(first) if first else None,
            "first_request_ttft_ms_all": first,
            "step_ms_quartiles": quartiles(row["step_ms_all"]),
            "ttft_ms_quartiles": quartiles(row["ttft_ms_all"]),
            f"over_{BASELINES[options.engine]}": self._ratios(taken, backend),
        }

    def _ratios(self, taken: _Taken, backend: str) -> dict[str, Any]:
        """Figure -> median ratio to FA3's over the pairs, with its interval."""
        ratios, baseline = {}, BASELINES[self._options[0].engine]
        for figure, samples, name in (
            ("step_ms", taken.decode, "step_ms"),
            ("ttft_ms", taken.later, "ttft_ms"),
            ("first_request_ttft_ms", taken.first, "ttft_ms"),
            ("host_us", taken.decode, "host_us"),
        ):
            both = [samples.get(one, []) for one in (backend, baseline)]
            ours, theirs = ([s[name] for s in one if name in s] for one in both)
            ratio = paired_ratio(ours, theirs) if len(ours) == len(theirs) else None
            if ratio is not None:
                ratios[figure] = ratio
        return ratios

    def result(self) -> dict[str, Any]:
        backends = [one.name for one in self._options]
        rows = [
            row
            for workload in self._workloads
            if workload.name in self.shapes
            for backend in backends
            if (row := self.row(workload, backend)) is not None
        ]
        notes = [f"{what}: {why}" for what, why in self.skipped.items()]
        return {"rows": rows, "skipped": notes, "engines": self.engines}


def format_ratios(rows: Sequence[Row]) -> str:
    """A line for each figure of ours that was measured beside FA3's."""
    baseline = BASELINES[engine_of(rows)]
    return "\n".join(
        f"{row['workload']:<36}{figure + ' over ' + baseline:<36}"
        f"{ratio['median']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f})"
        for row in rows
        if row["backend"] == "flashcore"
        for figure, ratio in row[f"over_{baseline}"].items()
        if ratio
    )


def _brief(rows: Any) -> str:
    parts = []
    for row in rows:
        if row is not None:
            step = "" if row["step_ms"] is None else f" {row['step_ms']:.3f} ms a step,"
            ttft = "-" if row["ttft_ms"] is None else f"{row['ttft_ms']:.1f}"
            first = row["first_request_ttft_ms"]
            parts.append(f"{row['name']}{step} {ttft} ms to the first token, first {first:.1f}")
    return "; ".join(parts)
