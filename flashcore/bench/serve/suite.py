"""The benchmark's own process: starts a worker for each backend, collects, makes the rows."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from flashcore.bench.rows import Row
from flashcore.bench.serve.engine import ENVIRONMENT, EngineOptions
from flashcore.bench.serve.measure import Sample
from flashcore.bench.serve.shapes import ModelShape, model_shape
from flashcore.bench.serve.workloads import Workload

START_TIMEOUT_S = 540.0
MEASURE_TIMEOUT_S = 400.0
_TAIL_LINES = 25
_COUNTERS = "flashcore decode: "
_POINTER = "See root cause above"  # what vLLM's own process says of its engine's


class WorkerError(Exception):
    """An engine did not start, died, or did not answer in time; the message has its last words."""


class Worker:
    """A process with an engine in it, and the conversation with it.

    It loads the engine's package at once, for which it takes half a minute, and no GPU memory to
    speak of; the engine starts with `begin`.
    """

    def __init__(self, options: EngineOptions, log: IO[bytes]) -> None:
        self.backend = options.name
        self._options: EngineOptions | None = options  # None: told
        self._stopped = False
        self._log = log
        self._read_to = Path(str(log.name)).stat().st_size
        receive, send = os.pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "flashcore.bench.serve.worker", str(send), options.engine],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            pass_fds=(send,),
            start_new_session=True,  # a group of its own, so that its children can be ended too
            env={**ENVIRONMENT, **os.environ, **options.environment},
        )
        os.close(send)
        self._answers: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, args=(receive,), daemon=True).start()

    def begin(self) -> None:
        """Start the engine; `ready` waits for it."""
        if self._options is not None:
            self._tell(asdict(self._options))
            self._options = None

    def ready(self, timeout: float = START_TIMEOUT_S) -> dict[str, Any]:
        """What the engine says of itself once it has started. To be called first, and once."""
        self.begin()
        return self._answer(timeout)

    def ask(self, command: dict[str, Any], timeout: float) -> dict[str, Any]:
        """The answer to a command; WorkerError if the process ends or stays silent."""
        self._tell(command)
        return self._answer(timeout)

    def _tell(self, command: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # then the answer is that it ended
            self._process.stdin.write(json.dumps(command).encode() + b"\n")
            self._process.stdin.flush()

    def _answer(self, timeout: float) -> dict[str, Any]:
        try:
            line = self._answers.get(timeout=timeout)
        except queue.Empty:
            raise WorkerError(self._failure(f"gave no answer in {timeout:.0f} s")) from None
        if line is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=10)  # its last words come after it closed the answers
            raise WorkerError(self._failure(f"ended with status {self._process.poll()}"))
        answer: dict[str, Any] = json.loads(line)
        return answer

    def counters(self) -> str | None:
        """What flashcore logged last of its decode plans since the last call (docs/sglang.md)."""
        told, self._read_to = counters_since(Path(str(self._log.name)), self._read_to)
        return told

    def stop(self, patience: float = 90.0) -> None:
        """End the engine and every process that it started; by force after `patience` seconds."""
        if self._stopped:  # the number of its group may be another's by now
            return
        self._stopped = True
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=patience)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)  # the group started above
        self._process.wait()

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop(patience=90 if kind is None else 5)

    def _read(self, receive: int) -> None:
        with os.fdopen(receive) as lines:
            for line in lines:
                self._answers.put(line)
        self._answers.put(None)

    def _failure(self, what: str) -> str:
        self._log.flush()
        text = Path(str(self._log.name)).read_text(errors="replace").splitlines()
        last = "\n".join(f"    {line}" for line in text[-_TAIL_LINES:])
        return f"the engine with backend {self.backend} {what}; its last lines:\n{last}"


def reason(log: str, otherwise: str) -> str:
    """The line of an engine's log that says why it ended: one line of at most 300 characters."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    lines = [line for line in lines if _POINTER not in line]
    for sign in ("does not serve", "NotServed", "Error: ", "Error"):
        for line in reversed(lines):
            if sign in line:
                return line[-300:] if sign == "does not serve" else line[:300]
    return otherwise.splitlines()[0][:300]


@dataclass(frozen=True)
class Turns:
    """How often: `repeats` of each workload whenever it is an engine's turn, all `rounds` times.

    together: all engines are started first and take turns at each workload; otherwise each is
    started, does all workloads and ends, while the next one's process loads SGLang.
    """

    repeats: int = 3
    rounds: int = 1
    together: bool = False


def run_serve(
    workloads: Sequence[Workload],
    options: Sequence[EngineOptions],
    turns: Turns,
    *,
    log_dir: Path | None = None,
    start: Callable[[EngineOptions, IO[bytes]], Worker] = Worker,
    after: Callable[[str], None] = lambda text: None,
    keep: Callable[[dict[str, Any]], None] = lambda result: None,
) -> dict[str, Any]:
    """`rows`, `skipped` and `engines` of the benchmark's JSON object.

    `options` has an entry for each engine, all of one shape; a workload with a model of its own is
    run with that one. `after` is told what was done; `keep` is given the result so far after each
    workload.
    """
    samples: dict[tuple[str, str], list[Sample]] = {}
    skipped: dict[str, str] = {}
    engines: list[dict[str, Any]] = []
    shapes: dict[str, ModelShape] = {}

    def take(worker: Worker, workload: Workload) -> None:
        command = {"do": "measure", "workload": asdict(workload), "repeats": turns.repeats}
        answer = worker.ask(command, MEASURE_TIMEOUT_S)
        if "skipped" in answer:
            skipped[f"{worker.backend} on {workload.name}"] = answer["skipped"]
        else:
            answer["samples"][-1]["counters"] = worker.counters()
            samples.setdefault((workload.name, worker.backend), []).extend(answer["samples"])
        after(f"{workload.name}, {worker.backend}: {_brief(answer)}")
        keep(result())

    def result() -> dict[str, Any]:
        rows = [
            make_row(workload, shapes[workload.name], one, taken)
            for workload in workloads
            for one in options
            if (taken := samples.get((workload.name, one.name)))
        ]
        notes = [f"{what}: {why}" for what, why in skipped.items()]
        return {"rows": rows, "skipped": notes, "engines": engines}

    def launch(one: EngineOptions, stack: contextlib.ExitStack) -> Worker:
        return stack.enter_context(start(one, stack.enter_context(log_file(log_dir, one))))

    def started(one: EngineOptions, worker: Worker) -> bool:
        try:
            ready = worker.ready()
        except WorkerError as error:
            failed(one, error)
            return False
        engines.append({"backend": one.name, **ready})
        after(f"{one.shape.name}, {one.name}: engine started in {ready['start_s']:.0f} s")
        return True

    def failed(one: EngineOptions, error: WorkerError) -> None:  # the others shall have their turn
        skipped[f"{one.name} on {one.shape.name}"] = reason(str(error), str(error))
        after(str(error))

    def take_turns(those: Sequence[EngineOptions], group: Sequence[Workload]) -> None:
        with contextlib.ExitStack() as stack:
            launched = [(one, launch(one, stack)) for one in those]
            begin_beside(launched)
            workers = {one: worker for one, worker in launched if started(one, worker)}
            for turn, workload in enumerate(group):
                order = list(workers)
                first = turn % max(1, len(order))
                for one in (*order[first:], *order[:first]):
                    try:
                        take(workers[one], workload)
                    except WorkerError as error:
                        failed(one, error)
                        del workers[one]

    def one_after_the_other(order: Sequence[EngineOptions], group: Sequence[Workload]) -> None:
        with contextlib.ExitStack() as all_of_them:

            def prepared(one: EngineOptions) -> tuple[contextlib.ExitStack, Worker]:
                stack = all_of_them.enter_context(contextlib.ExitStack())
                return stack, launch(one, stack)

            following = [prepared(order[0])]
            for number, one in enumerate(order):
                stack, worker = following.pop()
                following += [prepared(coming) for coming in order[number + 1 : number + 2]]
                with stack:
                    if started(one, worker):
                        try:
                            for workload in group:
                                take(worker, workload)
                        except WorkerError as error:
                            failed(one, error)

    with tempfile.TemporaryDirectory() as caches:
        apart = with_caches(options, caches)
        for shape, group in by_model(workloads, options[0].shape):
            shapes.update({workload.name: shape for workload in group})
            those = [fitted(one, shape, group, turns.together) for one in apart]
            if turns.together:
                for _ in range(turns.rounds):
                    take_turns(those, group)
            else:
                one_after_the_other(those * turns.rounds, group)
    return result()


def begin_beside(launched: Iterable[tuple[EngineOptions, Worker]]) -> None:
    """Start engines side by side, but for those of several GPUs, which start when they are waited
    for: SGLang's ranks compare their GPUs' free memory, which another's start would unbalance."""
    for one, worker in launched:
        if one.gpus == 1:
            worker.begin()


def with_caches(options: Sequence[EngineOptions], folder: str) -> list[EngineOptions]:
    """Each with a Triton cache of its own: in a common one, an engine's first request of a kind
    would compile the engine's kernels for all that come after it."""
    return [replace(one, triton_cache=f"{folder}/{n}") for n, one in enumerate(options)]


def counters_since(log: Path, offset: int) -> tuple[str | None, int]:
    """flashcore's last line on decode after that many bytes of a log, and the log's length."""
    with log.open("rb") as file:
        file.seek(offset)
        text = file.read().decode(errors="replace")
        length = file.tell()
    found = [line.split(_COUNTERS, 1)[1] for line in text.splitlines() if _COUNTERS in line]
    return (found[-1] if found else None), length


def make_row(
    workload: Workload, shape: ModelShape, options: EngineOptions, samples: Sequence[Sample]
) -> Row:
    """One line of the result: medians over the samples of an engine, and the samples themselves."""

    def values(name: str) -> list[float]:
        return [sample[name] for sample in samples if sample.get(name) is not None]

    def median(name: str) -> float | None:
        found = values(name)
        return statistics.median(found) if found else None

    step_ms = median("step_ms")
    page, kv_bytes = options.page_size, shape.kv_bytes_per_token(options.kv_cache_dtype)
    half = workload.output / 2  # the batch as it is in the middle of decoding
    unique = workload.tokens_unique(half, page)
    weights = shape.weight_bytes_per_step
    traffic = None if weights is None else weights + unique * kv_bytes
    return {
        "workload": workload.name,
        "spec": workload.spec,
        "model": shape.name,
        "engine": options.engine,
        "backend": options.backend,
        "name": options.name,
        "page_size": page,
        "kv_cache_dtype": options.kv_cache_dtype,
        "deterministic": options.deterministic,
        "tokens_per_s": None if step_ms is None else 1e3 * workload.batch / step_ms,
        "step_ms": step_ms,
        "step_ms_all": values("step_ms"),
        "step_ms_by_difference": median("step_ms_by_difference"),
        "ttft_ms": median("ttft_ms"),
        "ttft_ms_all": values("ttft_ms"),
        "ttft_max_ms": median("ttft_max_ms"),
        "first_request_ttft_ms": median("first_request_ttft_ms"),
        "wall_s": median("wall_s"),
        "cached_tokens": min(values("cached_tokens") or values("ttft_cached_tokens"), default=None),
        "retractions": sum(values("retractions")),
        "gb_per_step": None if step_ms is None or traffic is None else traffic / 1e9,
        "reuse": workload.tokens_per_sequence(half) / unique,
        "counters": next((s["counters"] for s in reversed(samples) if s.get("counters")), None),
    }


SPARE_PAGES = 64


def by_model(
    workloads: Sequence[Workload], default: ModelShape
) -> Iterator[tuple[ModelShape, list[Workload]]]:
    for name in dict.fromkeys(workload.model for workload in workloads):
        group = [workload for workload in workloads if workload.model == name]
        yield (default if name is None else model_shape(name)), group


def fitted(
    options: EngineOptions, shape: ModelShape, workloads: Sequence[Workload], together: bool
) -> EngineOptions:
    """The options for these workloads: a graph for each batch size, and no more cache than needed
    where engines share the memory."""
    batches = tuple(sorted({w.batch for w in workloads}))
    page = options.page_size
    # The scheduler runs a step ahead, and what the last batch left is evicted first: a cache that
    # is just large enough cuts answers short.
    room = max(w.capacity(page) for w in workloads) * 21 // 20 // page * page + SPARE_PAGES * page
    return replace(
        options,
        shape=shape,
        decode_batches=batches,
        max_total_tokens=room if together else options.max_total_tokens,
    )


def log_file(folder: Path | None, options: EngineOptions) -> IO[bytes]:
    """Where an engine's own output goes: kept in `folder`, or gone with the run."""
    if folder is None:
        return tempfile.NamedTemporaryFile(prefix="flashcore-serve-", suffix=".log")
    name = f"serve-{options.shape.name}-{options.name}.log"
    return (folder / name.replace(" ", "-")).open("ab")


def _brief(answer: dict[str, Any]) -> str:
    if "skipped" in answer:
        return f"not timed: {answer['skipped']}"
    parts = []
    for name, unit in (("step_ms", "ms a step"), ("ttft_ms", "ms to the first token")):
        found = [sample[name] for sample in answer["samples"] if name in sample]
        if found:
            parts.append(f"{', '.join(f'{value:.2f}' for value in found)} {unit}")
    return "; ".join(parts)
