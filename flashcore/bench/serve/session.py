"""One engine's part in a measurement by turns: a workload prepared, then sample after sample."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from flashcore.bench.serve.clock import Clock, step_figures
from flashcore.bench.serve.measure import (
    WARM_TOKENS,
    DoesNotFitError,
    Runner,
    Sample,
    first_token_sample,
)
from flashcore.bench.serve.workloads import Prompts, Workload


class TimedRunner(Runner, Protocol):
    """What a session needs of an engine."""

    clock: Clock | None

    def seconds(
        self, prompts: Sequence[list[int]], output: int, *, temperature: float = 0.0
    ) -> float: ...

    def settle(self) -> None: ...


class Session:
    """The prefixes of a workload stay in the cache from `prepare` to the next `prepare`."""

    def __init__(self, engine: TimedRunner, *, vocab: int, page: int) -> None:
        self._engine, self._vocab, self._page = engine, vocab, page
        self._batch: list[list[int]] = []

    def prepare(self, workload: Workload, seed: int) -> Sample:
        """Prefixes into an empty cache; the first batch's time to the first token.

        Raises DoesNotFitError if its tokens do not fit into the engine's cache.
        """
        need = workload.capacity(self._page)
        if need > self._engine.capacity:
            raise DoesNotFitError(
                f"needs room for {need} KV tokens, the engine has {self._engine.capacity}"
            )
        self._workload = workload
        self._temperature = 0.0 if workload.unique else 1.0  # samples of a prompt shall differ
        self._prompts = Prompts(workload, self._vocab, seed)
        self._engine.flush()
        if self._prompts.prefixes:
            self._engine.run(self._prompts.prefixes, 1)
        return self.first_token()

    def first_token(self) -> Sample:
        """Time to the first token of a batch whose own parts are new."""
        return first_token_sample(self._engine.run(self._prompts.batch(), 1))

    def ready(self) -> None:
        """One batch into the cache, so that decoding it begins almost at once."""
        self._batch = self._prompts.batch()
        tokens = min(WARM_TOKENS, self._workload.output)
        for output in (1, tokens):
            self._engine.run(self._batch, output, temperature=self._temperature)
        self._engine.settle()

    def decode(self) -> Sample:
        """A step of decoding that batch: by the scheduler's clock, and by difference.

        Answers are not streamed: two processes less are at work beside the scheduler.
        """
        engine, output = self._engine, self._workload.output
        alone = engine.seconds(self._batch, 1, temperature=self._temperature)
        mark = engine.clock.mark() if engine.clock is not None else 0
        whole = engine.seconds(self._batch, output, temperature=self._temperature)
        steps = engine.clock.since(mark) if engine.clock is not None else []
        difference = 1e3 * (whole - alone) / (output - 1)
        figures = step_figures(steps, self._workload.batch)
        return {
            "step_ms_by_difference": difference,
            "wall_s": whole,
            "steps_seen": sum(step.sequences == self._workload.batch for step in steps),
            **(figures or {"step_ms": difference}),
        }
