"""Continuous batching over a trace: one engine, a prefix cache of fixed size, and a step clock.

A step gives every decoding request one token and spends up to `prefill_chunk` prompt tokens on
waiting ones, first come first served. It lasts `step_ms` plus its prompt tokens divided by the
prefill rate; an engine with nothing to run jumps to the next arrival. Unless each step is observed,
those in which nobody comes, goes or begins a page are taken in one go, to the same figures.

The head of the queue is admitted when the step has prompt tokens to spend, the batch has a place,
and every page the request may ever need is to be had, free or evictable. The pages of its output
are only promised then, and taken as they fill, so no running request ever has to be put out
again. Prompt pages enter the cache on admission: prompts are computed in order of admission, so a
later request that hits them finds them filled. Output pages are never shared (a trace does not
say what is in them) and are freed at the end; full prompt pages stay until they are evicted.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from flashcore.replay.counts import BatchPages
from flashcore.replay.prefix_cache import (
    MAX_PAGES,
    ROOT,
    PageIds,
    PrefixCache,
    check_page_tokens,
    prompt_page_keys,
)
from flashcore.replay.step_log import Step, StepLog
from flashcore.replay.trace import HASH_BLOCK_TOKENS, Request


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """The simulated engine; a ValueError names the setting that is out of range."""

    page_tokens: int = 128
    block_tokens: int = HASH_BLOCK_TOKENS  # of the trace's hash ids
    cache_pages: int = 4096
    max_batch: int = 256
    prefill_chunk: int = 2048  # prompt tokens a step may compute
    step_ms: float = 25.0
    prefill_tokens_per_s: float = 20_000.0
    time_scale: float = 1.0  # arrival times are multiplied by it: 0.5 doubles the load

    def __post_init__(self) -> None:
        check_page_tokens(self.page_tokens, self.block_tokens)
        if self.cache_pages > MAX_PAGES:
            raise ValueError(f"cache_pages is {self.cache_pages}; it must be 1 to {MAX_PAGES}")
        for name in ("cache_pages", "max_batch", "prefill_chunk"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("step_ms", "prefill_tokens_per_s"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0")
        if not 0 <= self.time_scale < math.inf:
            raise ValueError(f"time_scale is {self.time_scale}; it must be 0 or above")


_FORGET_ARRIVALS = 4096
_STEPS_AT_ONCE = 1024


@dataclass(slots=True, eq=False)
class RunningRequest:
    """An admitted request: `pages` has room for all its pages, in sequence order."""

    slot: int
    request: Request
    pages: PageIds
    taken: int  # pages[:taken] are set
    joined: int  # pages[:joined] are read by the current step


class BatchRow(NamedTuple):
    """What one sequence of a step reads and computes."""

    request: Request
    pages: PageIds  # in sequence order
    kv_tokens: int  # in those pages, this step's own included
    q_tokens: int  # computed in this step


@dataclass(slots=True)
class Totals:
    """What happened to the requests."""

    completed: int = 0
    refused: int = 0  # would not fit the whole cache
    prompt_tokens: int = 0  # of the admitted requests
    cached_tokens: int = 0  # of those, not computed because their pages were cached
    output_tokens: int = 0  # of the completed requests

    def __add__(self, other: Totals) -> Totals:
        return Totals(
            *(getattr(self, one.name) + getattr(other, one.name) for one in fields(Totals))
        )


class Engine:
    """Runs requests, sorted by arrival, to their end; more of them may be submitted between."""

    def __init__(self, requests: Iterable[Request], settings: EngineSettings) -> None:
        self.settings = settings
        self.cache = PrefixCache(settings.cache_pages)
        self.counts = BatchPages(settings.cache_pages)
        self.totals = Totals()
        self.log = StepLog()
        self.now_ms = 0.0
        self._requests: list[Request] = []
        self._arrivals: list[float] = []  # theirs, in ms of the simulation
        self._head = 0  # the next request to admit
        self._head_blocked = False  # it did not fit, and nothing was released since
        self._promised_pages = 0  # of running requests' outputs, not yet taken
        self._free_slots: list[int] = []  # of those used before
        self._running: dict[int, RunningRequest] = {}  # by slot, in order of admission
        self._kv_tokens = np.zeros(1, np.int64)  # by slot; longer when more run at once
        self._tokens_left = np.zeros(1, np.int64)  # to generate after the first one
        self._decoding = np.zeros(0, np.int64)  # slots
        self._prefilled: list[tuple[RunningRequest, int]] = []  # tokens computed in this step
        self._batch_tokens = 0  # sum of _kv_tokens over the running requests
        for request in requests:
            self.submit(request)

    def submit(self, request: Request) -> None:
        """Add a request, which arrives no earlier than those before it."""
        if self._head > _FORGET_ARRIVALS:
            del self._requests[: self._head], self._arrivals[: self._head]
            self._head = 0
        self._requests.append(request)
        self._arrivals.append(request.arrival_ms * self.settings.time_scale)

    @property
    def done(self) -> int:
        """Requests completed or refused."""
        return self.totals.completed + self.totals.refused

    @property
    def idle(self) -> bool:
        """Whether every request submitted so far is done."""
        return not self._running and self._head == len(self._requests)

    def nothing_ends_before(self) -> float:
        """A time up to which a run brings no request to its end, whatever else is submitted.

        No request ends sooner than with a step for each token that it has still to generate, each
        of them of `step_ms` at least.
        """
        waiting = self._requests[self._head :]
        if any(self._pages_at_end(request) > self.cache.num_pages for request in waiting):
            return self.now_ms  # to be refused
        steps = [max(request.output_tokens, 1) for request in waiting]
        for row, _ in self._prefilled:
            if not self._prompt_done(row):
                steps.append(int(self._tokens_left[row.slot]) + 1)
        if self._decoding.size:
            steps.append(int(self._tokens_left[self._decoding].min()))
        # A sum of that many steps may round to less than their product.
        return self.now_ms + (min(steps, default=1) - 1) * self.settings.step_ms * (1 - 1e-9)

    def run(
        self,
        on_step: Callable[[Engine], None] | None = None,
        on_progress: Callable[[int], None] | None = None,
        until_ms: float = math.inf,
    ) -> StepLog:
        """Step until every request is completed or refused, or the next step begins at `until_ms`.

        What arrives before `until_ms` has to be submitted; in pieces or whole, a run is the same.
        `on_step` is called within each step, when its pages are known and before any request
        leaves; `on_progress` after it, with the number of requests that are done.
        """
        while self.now_ms < until_ms and (self._running or self._next_arrival()):
            prefill_tokens = self._begin_step()
            if not self._running:
                continue  # all that had arrived was refused
            self._record(prefill_tokens)
            if on_step is not None:
                on_step(self)
            self.counts.end_step()
            self._leave_finished()
            self.now_ms += self.settings.step_ms
            self.now_ms += prefill_tokens * 1000.0 / self.settings.prefill_tokens_per_s
            if on_step is None:
                self._quiet_steps(until_ms)
            if on_progress is not None:
                on_progress(self.done)
        return self.log

    def batch(self) -> Iterator[BatchRow]:
        """The current step's sequences, in order of admission."""
        computed = {row.slot: tokens for row, tokens in self._prefilled}
        for slot, row in self._running.items():
            kv_tokens, q_tokens = int(self._kv_tokens[slot]), computed.get(slot, 1)
            yield BatchRow(row.request, row.pages[: row.joined], kv_tokens, q_tokens)

    def _next_arrival(self) -> bool:
        """Let an idle engine jump to the next arrival; False when there is none."""
        if self._head == len(self._requests):
            return False
        self.now_ms = max(self.now_ms, self._arrivals[self._head])
        return True

    def _quiet_steps(self, until_ms: float) -> None:
        """All steps from now on that decode and do nothing else."""
        slots = self._decoding
        if not slots.size or slots.size < len(self._running):
            return
        kv_tokens, left = self._kv_tokens[slots], self._tokens_left[slots]
        before_page_edge = -kv_tokens % self.settings.page_tokens
        count = int(min(before_page_edge.min(), left.min() - 1, _STEPS_AT_ONCE))
        if count < 1:
            return
        if not self._head_blocked and self._has_slot() and self._head < len(self._requests):
            until_ms = min(until_ms, self._arrivals[self._head])
        # Added one by one, as step for step: a closed form would round differently.
        times = np.full(count + 1, self.settings.step_ms)
        times[0] = self.now_ms
        np.add.accumulate(times, out=times)
        count = int(np.searchsorted(times[:-1], until_ms))
        if count < 1:
            return
        self._kv_tokens[slots] = kv_tokens + count
        self._tokens_left[slots] = left - count
        self._prefilled = []
        self._record_quiet(times[:count])
        self.now_ms = float(times[count])
        self.counts.end_step()

    def _record_quiet(self, times: NDArray[np.float64]) -> None:
        batch, counts = len(self._running), self.counts
        arrived = [bisect_right(self._arrivals, time) for time in (times[0], times[-1])]
        waiting: int | NDArray[np.int64] = arrived[0] - self._head
        if arrived[0] != arrived[1]:
            waiting = np.searchsorted(self._arrivals, times, side="right") - self._head
        per_sequence = self._batch_tokens + batch * np.arange(1, times.size + 1)
        once = per_sequence - counts.repeated_reads * self.settings.page_tokens
        columns = (batch, waiting, 0, per_sequence, once, counts.used, counts.shared, 0)
        self.log.extend(times, columns)
        self._batch_tokens += batch * times.size

    def _has_slot(self) -> bool:
        return len(self._running) < self.settings.max_batch

    def _take_slot(self) -> int:
        if self._free_slots:
            return self._free_slots.pop()
        slot = len(self._running)
        if slot == self._kv_tokens.size:
            self._kv_tokens = np.resize(self._kv_tokens, 2 * slot)
            self._tokens_left = np.resize(self._tokens_left, 2 * slot)
        return slot

    def _begin_step(self) -> int:
        """Decode, then prefill and admit; returns the prompt tokens computed."""
        self._decode()
        budget = self.settings.prefill_chunk
        # Only the last request admitted can be unfinished: the next one waits for spare budget.
        unfinished = [row for row, _ in self._prefilled if not self._prompt_done(row)]
        self._prefilled = []
        for row in unfinished:
            budget -= self._prefill(row, budget)
        while budget > 0 and (admitted := self._admit_head()) is not None:
            budget -= self._prefill(admitted, budget)
        return self.settings.prefill_chunk - budget

    def _decode(self) -> None:
        """One more token for each decoding request, and a page where the last one is full."""
        slots = self._decoding
        on_page_edge = slots[self._kv_tokens[slots] % self.settings.page_tokens == 0]
        self._kv_tokens[slots] += 1
        self._tokens_left[slots] -= 1
        self._batch_tokens += slots.size
        if not on_page_edge.size:
            return
        pages = self.cache.take(on_page_edge.size)
        self._promised_pages -= pages.size
        for slot, page in zip(on_page_edge.tolist(), pages.tolist(), strict=True):
            row = self._running[slot]
            row.pages[row.taken] = page
            row.taken += 1
            row.joined += 1
        self.counts.forget(pages)
        self.counts.join(pages)

    def _prompt_done(self, row: RunningRequest) -> bool:
        return bool(self._kv_tokens[row.slot] >= row.request.input_tokens)

    def _prefill(self, row: RunningRequest, budget: int) -> int:
        """Compute up to `budget` prompt tokens of one request; returns how many."""
        kv_tokens = int(self._kv_tokens[row.slot])
        tokens = min(budget, row.request.input_tokens - kv_tokens)
        self._kv_tokens[row.slot] = kv_tokens + tokens
        self._batch_tokens += tokens
        reached = self._pages_for(kv_tokens + tokens)
        self.counts.join(row.pages[row.joined : reached])
        row.joined = reached
        self._prefilled.append((row, tokens))
        return tokens

    def _admit_head(self) -> RunningRequest | None:
        """Admit the head of the queue if it has arrived and fits; refuse what never will."""
        while (
            not self._head_blocked
            and self._has_slot()
            and self._head < len(self._requests)
            and self._arrivals[self._head] <= self.now_ms
        ):
            request = self._requests[self._head]
            if self._pages_at_end(request) > self.cache.num_pages:
                self.totals.refused += 1
                self._head += 1
                continue
            row = self._try_admit(request)
            if row is None:
                self._head_blocked = True
                return None
            self._head += 1
            return row
        return None

    def _try_admit(self, request: Request) -> RunningRequest | None:
        """Take the pages of the prompt and promise those of the output; None if too few."""
        keys = prompt_page_keys(request, self.settings.page_tokens, self.settings.block_tokens)
        hit = self.cache.match(keys)
        pages_at_end = self._pages_at_end(request)
        obtainable = self.cache.obtainable_beside(hit) - self._promised_pages
        if pages_at_end - hit.size > obtainable:
            return None
        self.cache.hold(hit)
        fresh = self.cache.extend(int(hit[-1]) if hit.size else ROOT, keys[hit.size :])
        tail = self.cache.take(self._pages_for(request.input_tokens) - len(keys))
        prompt_pages = np.concatenate([hit, fresh, tail])
        self.counts.forget(prompt_pages[hit.size :])
        self.counts.join(hit)
        pages = np.full(pages_at_end, -1, np.int32)
        pages[: prompt_pages.size] = prompt_pages
        self._promised_pages += pages_at_end - prompt_pages.size

        # One token at least is computed, even of a prompt that is cached whole: its logits are
        # needed for the first output token.
        cached = min(hit.size * self.settings.page_tokens, request.input_tokens - 1)
        self.totals.prompt_tokens += request.input_tokens
        self.totals.cached_tokens += cached
        slot = self._take_slot()
        self._kv_tokens[slot] = cached
        # The last prompt token yields the first output token, so one step less is left.
        self._tokens_left[slot] = max(request.output_tokens - 1, 0)
        self._batch_tokens += cached
        row = RunningRequest(slot, request, pages, prompt_pages.size, hit.size)
        self._running[slot] = row
        return row

    def _pages_for(self, tokens: int) -> int:
        return -(-tokens // self.settings.page_tokens)

    def _pages_at_end(self, request: Request) -> int:
        # The last output token is never fed back, so its keys and values are never written.
        return self._pages_for(request.input_tokens + max(request.output_tokens - 1, 0))

    def _record(self, prefill_tokens: int) -> None:
        counts = self.counts
        arrived = bisect_right(self._arrivals, self.now_ms)
        # Only full pages are ever shared, so each repeated read is one of page_tokens tokens.
        repeated_tokens = counts.repeated_reads * self.settings.page_tokens
        self.log.append(
            Step(
                time_ms=self.now_ms,
                batch=len(self._running),
                waiting=arrived - self._head,
                prefill_tokens=prefill_tokens,
                tokens_per_sequence=self._batch_tokens,
                tokens_once=self._batch_tokens - repeated_tokens,
                pages_used=counts.used,
                pages_shared=counts.shared,
                pages_staged=counts.staged,
            )
        )

    def _leave_finished(self) -> None:
        left = self._tokens_left[self._decoding]
        ends = left == 0
        finished, still = [], [self._decoding]
        if ends.any():
            finished, still = self._decoding[ends].tolist(), [self._decoding[~ends]]
        for row, _ in self._prefilled:
            if self._prompt_done(row):
                if self._tokens_left[row.slot] == 0:
                    finished.append(row.slot)
                else:
                    still.append(np.array([row.slot], np.int64))
        if finished or len(still) > 1:
            self._decoding = np.concatenate(still)
        for slot in finished:
            self._leave(self._running.pop(slot))

    def _leave(self, row: RunningRequest) -> None:
        self.counts.leave(row.pages[: row.joined])
        self.cache.release(row.pages[: row.taken])
        self._batch_tokens -= int(self._kv_tokens[row.slot])
        self._free_slots.append(row.slot)
        self._head_blocked = False
        self.totals.completed += 1
        self.totals.output_tokens += row.request.output_tokens
