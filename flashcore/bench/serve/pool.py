"""Many engines, several at a time on each GPU, each asked one thing."""

from __future__ import annotations

import contextlib
import json
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from flashcore.bench.serve.deadline import Deadline
from flashcore.bench.serve.engine import EngineOptions
from flashcore.bench.serve.suite import START_TIMEOUT_S, Worker, WorkerError, reason

FEWEST_S = 50.0  # an engine that has less than this is not started
ANSWER_S = 240.0
_ANSWERS = ".answers.json"
IMPATIENCE_S = 5.0  # with an engine that failed


@dataclass(frozen=True)
class Job:
    """An engine to start and what to ask of it. `name` is unique, and that of its log."""

    name: str
    options: EngineOptions
    command: dict[str, Any]


@dataclass(frozen=True)
class Places:
    """`jobs` engines at a time on each of `gpus` GPUs, counted from `first`."""

    gpus: int = 1
    jobs: int = 6
    first: int = 0


Start = Callable[[EngineOptions, IO[bytes]], Worker]


@dataclass(frozen=True)
class Survey:
    """Engines that are asked where there is a place, and what becomes of their answers.

    Answers lie in `log_dir` as JSON, to be known the next time. answers: by name of a job; those
    that are there are not asked again. after: told what was done. keep: given the result after each
    engine.
    """

    places: Places
    deadline: Deadline
    log_dir: Path
    answers: dict[str, dict[str, Any]] = field(default_factory=dict)
    start: Start = Worker
    after: Callable[[str], None] = lambda text: None
    keep: Callable[[dict[str, Any]], None] = lambda result: None

    def ask(
        self,
        jobs: Sequence[Job],
        told: Callable[[dict[str, Any]], str],
        result: Callable[[], dict[str, Any]],
    ) -> dict[str, Any]:
        """The result once all jobs are answered. told: a good answer in a few words."""

        def done(job: Job, answer: dict[str, Any]) -> None:
            self.answers[job.name] = answer
            if "error" not in answer:
                path = self.log_dir / f"{job.name}{_ANSWERS}"
                path.write_text(json.dumps(answer))
            self.after(f"{job.name}: {answer.get('error') or told(answer)}")
            self.keep(result())

        unknown = [job for job in jobs if job.name not in self.answers]
        run_jobs(
            unknown,
            self.places,
            done,
            deadline=self.deadline,
            log_dir=self.log_dir,
            start=self.start,
        )
        return result()


def read_answers(log_dir: Path) -> dict[str, dict[str, Any]]:
    """The answers that a run left in its log folder, by job."""
    files = log_dir.glob(f"*{_ANSWERS}")
    return {file.name.removesuffix(_ANSWERS): json.loads(file.read_text()) for file in files}


def run_jobs(
    jobs: Sequence[Job],
    places: Places,
    done: Callable[[Job, dict[str, Any]], None],
    *,
    deadline: Deadline,
    log_dir: Path,
    start: Start = Worker,
) -> None:
    """Run all jobs, in their order as places become free.

    `done` is told each one's answer with `start_s`, or `{"error": one line}`; one call at a time.
    A job for which no time is left is answered with an error as well.
    """
    free: queue.Queue[int] = queue.Queue()
    for _ in range(places.jobs):
        for gpu in range(places.gpus):
            free.put(places.first + gpu)
    engines = _Engines(deadline, log_dir, start)
    lock = threading.Lock()

    def one(job: Job) -> None:
        gpu = free.get()
        try:
            # Engines of several GPUs begin at the first.
            first = places.first if job.options.gpus > 1 else gpu
            answer = engines.answer(job, replace(job.options, base_gpu=first))
        except Exception as error:  # the others shall have their turn
            answer = {"error": f"{type(error).__name__}: {error}"}
        finally:
            free.put(gpu)
        with lock:
            done(job, answer)

    with ThreadPoolExecutor(max_workers=places.jobs * places.gpus) as threads:
        try:
            for future in [threads.submit(one, job) for job in jobs]:
                future.result()
        except BaseException:  # told to end: nobody waits for answers any more
            threads.shutdown(wait=False, cancel_futures=True)
            engines.stop()
            raise


class _Engines:
    """Those that are running, so that all can be ended at once."""

    def __init__(self, deadline: Deadline, log_dir: Path, start: Start) -> None:
        self._deadline, self._log_dir, self._start = deadline, log_dir, start
        self._running: set[Worker] = set()
        self._stopped = False

    def answer(self, job: Job, options: EngineOptions) -> dict[str, Any]:
        if self._stopped or not self._deadline.allows(FEWEST_S):
            return {"error": "no time left"}
        log_path = self._log_dir / f"{job.name}.log"
        with contextlib.ExitStack() as stack:
            log = stack.enter_context(log_path.open("ab"))
            worker = stack.enter_context(self._start(options, log))
            self._running.add(worker)
            stack.callback(self._running.discard, worker)
            try:
                ready = worker.ready(self._deadline.within(START_TIMEOUT_S))
                answer = worker.ask(job.command, self._deadline.within(ANSWER_S))
            except WorkerError as error:
                worker.stop(patience=IMPATIENCE_S)
                return {"error": reason(log_path.read_text(errors="replace"), str(error))}
            arguments = ready.get("arguments", {})
            return {**answer, "start_s": round(ready["start_s"], 1), "arguments": arguments}

    def stop(self) -> None:
        self._stopped = True
        for worker in list(self._running):
            worker.stop(patience=0)
