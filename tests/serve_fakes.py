"""Stand-ins for the workers of the serving benchmark."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import IO, Any

from flashcore.bench.serve.engine import EngineOptions
from flashcore.bench.serve.report import summarise
from flashcore.bench.serve.shapes import SHAPES
from flashcore.bench.serve.suite import Turns, WorkerError, run_serve
from flashcore.bench.serve.workloads import Workload, parse_workload

OPTIONS = EngineOptions("fa3", SHAPES["tiny"], (), page_size=4)


STEP_MS = {"flashcore": 10.0, "fa3": 25.0}


class FakeWorker:
    """A worker with a fixed speed; a backend named `broken` dies at its first workload."""

    def __init__(self, options: EngineOptions, calls: list[str]) -> None:
        self.backend, self.options, self.calls = options.name, options, calls
        self.begun = False
        calls.append(f"load {self.backend}")

    def __enter__(self) -> FakeWorker:
        return self

    def __exit__(self, *_: object) -> None:
        self.calls.append(f"stop {self.backend}")

    def begin(self) -> None:
        self.begun = True
        self.calls.append(
            f"start {self.options.shape.name} {self.backend} {self.options.decode_batches}"
        )

    def ready(self) -> dict[str, Any]:
        if not self.begun:
            self.begin()
        return {"start_s": 1.0, "capacity": 1}

    def counters(self) -> str | None:
        return "reuse: 2.00" if self.backend == "flashcore" else None

    def ask(self, command: dict[str, Any], timeout: float) -> dict[str, Any]:
        workload = Workload(**command["workload"])
        self.calls.append(f"{self.backend} {workload.name}")
        if self.backend == "broken":
            raise WorkerError("the engine with backend broken ended")
        if workload.batch == 7:
            return {"skipped": "needs room"}
        step = STEP_MS[self.backend]
        sample = {"ttft_ms": step} if workload.prefill_only else {"step_ms": step, "ttft_ms": 1.0}
        return {"samples": [dict(sample) for _ in range(command["repeats"])]}


def fake_run(texts: list[str], backends: list[str], **how: Any) -> tuple[dict[str, Any], list[str]]:
    """how: fields of `Turns`, and options of `run_serve`."""
    calls: list[str] = []
    turns = {"repeats": 2, **{f.name: how.pop(f.name) for f in fields(Turns) if f.name in how}}
    result = run_serve(
        [parse_workload(text) for text in texts],
        [replace(OPTIONS, backend=backend) for backend in backends],
        Turns(**turns),
        **how,
        start=lambda options, log: FakeWorker(options, calls),  # type: ignore[arg-type,return-value]
    )
    return result, calls


class AskedWorker:
    """A worker whose answers are those of `answer(options, command)`; it may raise WorkerError."""

    def __init__(
        self,
        options: EngineOptions,
        log: IO[bytes],
        answer: Callable[[EngineOptions, dict[str, Any]], dict[str, Any]],
    ) -> None:
        self.options, self.backend, self.log, self._answer = options, options.name, log, answer

    def __enter__(self) -> AskedWorker:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def begin(self) -> None:
        pass

    def stop(self, patience: float = 90.0) -> None:
        self.stopped = patience

    def ready(self, timeout: float = 1.0) -> dict[str, Any]:
        return {"start_s": 2.0, "capacity": 100, **self._answer(self.options, {"do": "start"})}

    def counters(self) -> str | None:
        return None

    def ask(self, command: dict[str, Any], timeout: float) -> dict[str, Any]:
        return self._answer(self.options, command)


def starting(
    answer: Callable[[EngineOptions, dict[str, Any]], dict[str, Any]],
) -> Callable[[EngineOptions, IO[bytes]], Any]:
    """What starts such workers."""
    return lambda options, log: AskedWorker(options, log, answer)


def result_of(texts: list[str], backends: list[str]) -> dict[str, Any]:
    """A whole result of such a run."""
    measured, _ = fake_run(texts, backends)
    about = {"device": "a GPU", "driver": "1", "commit": "abc", "date": "2026-01-01T00:00:00"}
    return {**about, **measured, "summary": summarise(measured["rows"])}
