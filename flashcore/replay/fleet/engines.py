"""The engines of a fleet: in this process, or spread over several."""

from __future__ import annotations

import multiprocessing
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Protocol

from flashcore.replay.fleet.tally import Tally
from flashcore.replay.simulate import Engine, EngineSettings
from flashcore.replay.trace import Request

Sent = list[tuple[int, Request]]  # number of the engine, request
Ended = list[tuple[int, int]]  # number of the engine, requests
_FOLD_STEPS = 1024


class Engines(Protocol):
    """The engines of a fleet, numbered from 0, wherever they run."""

    def run(self, sent: Sent, until_ms: float) -> Ended:
        """Give requests to engines and let all run until then; what has ended in it."""

    def tallies(self) -> list[Tally]:
        """Of each engine, once all have run to their ends."""


class LocalEngines:
    """Engines in this process."""

    def __init__(self, numbers: Iterable[int], settings: EngineSettings) -> None:
        self._engines = {number: Engine((), settings) for number in numbers}
        self._tallies = {number: Tally() for number in self._engines}
        self._at_work: dict[int, float] = {}  # and until when nothing ends there

    def run(self, sent: Sent, until_ms: float) -> Ended:
        """See Engines.

        An engine in which nothing can have ended waits: it runs later, to the same steps, and
        more of them in one go.
        """
        for number, request in sent:
            self._engines[number].submit(request)
            self._at_work[number] = 0.0
        for number, _ in sent:
            if not self._at_work[number]:
                self._at_work[number] = self._engines[number].nothing_ends_before()
        ended = []
        due = [number for number, end_ms in self._at_work.items() if end_ms < until_ms]
        for number in due:
            engine = self._engines[number]
            before = engine.done
            engine.run(until_ms=until_ms)
            if len(engine.log) >= _FOLD_STEPS:
                self._fold(number)
            if engine.idle:
                del self._at_work[number]
            else:
                self._at_work[number] = engine.nothing_ends_before()
            if engine.done > before:
                ended.append((number, engine.done - before))
        return ended

    def tallies(self) -> list[Tally]:
        """See Engines."""
        for number, engine in self._engines.items():
            self._fold(number)
            self._tallies[number].close(engine)
        return list(self._tallies.values())

    def _fold(self, number: int) -> None:
        log = self._engines[number].log
        self._tallies[number].add_steps(log)
        log.clear()


class SpreadEngines:
    """Engines in processes of their own, each with every so many-th of them.

    Use it as a context manager: leaving it ends the processes, whatever they are at.
    """

    def __init__(self, engines: int, settings: EngineSettings, processes: int) -> None:
        # Spawned, not forked: a child then holds no other child's pipe open.
        context = multiprocessing.get_context("spawn")
        self._processes: list[Any] = []
        self._pipes: list[Connection[Any, Any]] = []
        for place in range(processes):
            ours, theirs = context.Pipe()
            numbers = range(place, engines, processes)
            process = context.Process(target=_serve, args=(theirs, numbers, settings), daemon=True)
            with _no_interrupts():
                process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)

    def run(self, sent: Sent, until_ms: float) -> Ended:
        """See Engines."""
        parts: list[Sent] = [[] for _ in self._pipes]
        for one in sent:
            parts[one[0] % len(parts)].append(one)
        return [one for ended in self._ask([(p, until_ms) for p in parts]) for one in ended]

    def tallies(self) -> list[Tally]:
        """See Engines."""
        parts = self._ask([None] * len(self._pipes))
        engines = sum(map(len, parts))
        return [parts[number % len(parts)][number // len(parts)] for number in range(engines)]

    def _ask(self, questions: list[Any]) -> list[Any]:
        try:
            for pipe, question in zip(self._pipes, questions, strict=True):
                pipe.send(question)
            answers = [pipe.recv() for pipe in self._pipes]
        except (EOFError, ConnectionError) as error:
            raise MemoryError(
                f"a process of engines has ended ({self._ends()}); where memory has run out, "
                "ask for fewer engines or smaller caches"
            ) from error
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
        return answers

    def _ends(self) -> str:
        """By which signals or with which status processes have ended."""
        codes = []
        for process in self._processes:
            process.join(timeout=1.0 / len(self._processes))
            code = process.exitcode
            if code is not None:
                codes.append(signal.Signals(-code).name if code < 0 else f"status {code}")
        return ", ".join(codes) or "not said how"

    def __enter__(self) -> SpreadEngines:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for process in self._processes:
            process.terminate()
        for process, pipe in zip(self._processes, self._pipes, strict=True):
            process.join()
            pipe.close()


@contextmanager
def _no_interrupts() -> Iterator[None]:
    """Ctrl-C is for the parent to tell. A child that starts here ignores it from the first on,
    also while it still imports."""
    if threading.current_thread() is not threading.main_thread():
        yield  # where Python sets no signals
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _serve(pipe: Connection[Any, Any], numbers: range, settings: EngineSettings) -> None:
    """A process of engines: answers until its parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        engines = LocalEngines(numbers, settings)
        while True:
            question = pipe.recv()
            pipe.send(engines.tallies() if question is None else engines.run(*question))
    except (EOFError, ConnectionError):
        return
    except Exception as error:  # the parent raises it
        pipe.send(error)
