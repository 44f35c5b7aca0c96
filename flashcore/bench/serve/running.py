"""What the benchmark does with a running engine, whichever engine it is."""

from __future__ import annotations

import asyncio
import gc
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from flashcore.bench.serve.answers import Answer
from flashcore.bench.serve.timeline import Timeline

if TYPE_CHECKING:
    from flashcore.bench.serve.clock import Clock
    from flashcore.bench.serve.engine import EngineOptions


class RunningEngine(ABC):
    """An engine in this process and in those that it started. Only one in a process."""

    model_argument: ClassVar[str]  # the one of its arguments that names a folder
    options: EngineOptions
    folder: Path  # of the model
    arguments: dict[str, Any]
    start_seconds: float
    capacity: int  # tokens of the KV cache
    clock: Clock | None = None  # None: its steps are timed by difference
    counts: Path | None = None  # of the hierarchical cache

    @property
    @abstractmethod
    def loop(self) -> asyncio.AbstractEventLoop:
        """Where its requests run."""

    def about(self) -> dict[str, Any]:
        """Its arguments, without folders, and its device."""
        shape = {self.model_argument: self.options.shape.name}
        return {"device": self.options.device, **self.arguments, **shape}

    def flush(self) -> None:
        """Empty the prefix cache. Raises RuntimeError while requests are running."""
        for _ in range(50):  # a finished request leaves the engine a moment after its last token
            if self._emptied():
                return
            time.sleep(0.1)
        raise RuntimeError("the engine did not flush its cache: requests are still running")

    def run(
        self, prompts: Sequence[list[int]], output: int, *, temperature: float = 0.0
    ) -> list[Timeline]:
        """Send all prompts at once; wait for `output` tokens of each."""
        timelines = self.loop.run_until_complete(self._run(prompts, output, temperature))
        check_lengths([timeline.tokens for timeline in timelines], output)
        return timelines

    def settle(self) -> None:
        """Collect garbage now, and leave what is alive out of later collections."""
        gc.collect()
        gc.freeze()

    @abstractmethod
    def _emptied(self) -> bool:
        """Empty the prefix cache, unless a request holds something of it."""

    @abstractmethod
    async def _run(
        self, prompts: Sequence[list[int]], output: int, temperature: float
    ) -> list[Timeline]: ...

    @abstractmethod
    def seconds(
        self, prompts: Sequence[list[int]], output: int, *, temperature: float = 0.0
    ) -> float:
        """Send all prompts at once; wall time until all of each answer is there, not streamed."""

    @abstractmethod
    def answers(
        self, prompts: Sequence[list[int]], output: int, *, prompt: bool = False, **options: Any
    ) -> list[Answer]:
        """Greedy answers of `output` tokens to prompts sent at once. prompt: with the prompts'
        log-probabilities. options: the engine's own."""

    @abstractmethod
    def follow(
        self, prompt: list[int], output: int, *, temperature: float = 0.0, name: str | None = None
    ) -> AsyncIterator[Answer]:
        """One request's answer as it grows. name: for `abort`."""

    @abstractmethod
    def abort(self, name: str) -> None:
        """Stop a request that is being followed; a name that is not running is ignored."""

    @abstractmethod
    async def pause(self) -> None:
        """Stop generating; what runs stays where it is, what comes waits."""

    @abstractmethod
    async def go_on(self) -> None:
        """Generate again."""

    @abstractmethod
    def release(self, number: int) -> None:
        """Give memory back, in the way that a cycle of that number does."""

    @abstractmethod
    def resume(self) -> None:
        """Take it again."""

    @abstractmethod
    def renew_weights(self, number: int) -> str:
        """Hand the same weights over, in the way that a cycle of that number does; says why if that
        failed, else nothing."""

    @abstractmethod
    def processes(self) -> list[int]:
        """Process ids of the engine's workers."""

    @abstractmethod
    def stop(self) -> None: ...


def check_lengths(tokens: Sequence[int], output: int) -> None:
    """Raises RuntimeError for an answer that is not `output` tokens long."""
    short = [count for count in tokens if count != output]
    if short:
        raise RuntimeError(f"a request answered {short[0]} tokens instead of {output}")
