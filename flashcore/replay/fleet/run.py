"""Requests through a router to simulated engines, each with a cache, a batch and a clock.

Time goes in windows of `report_ms`. Requests that arrive in a window are sent by what had ended
before it and by what was sent since; then the engines run to the next window in which a request
arrives. An engine steps as `flashcore.replay.simulate` says, so a fleet of one is that engine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import groupby

from flashcore.replay.fleet.engines import Engines, Sent
from flashcore.replay.fleet.routing import RoutingSettings, make_router
from flashcore.replay.fleet.tally import Tally
from flashcore.replay.simulate import EngineSettings
from flashcore.replay.trace import Request

_LAST_WINDOWS_MS = 10_000.0  # of the simulation, in which no request arrives any more


def run_fleet(
    requests: Iterable[Request],
    engines: Engines,
    settings: EngineSettings,
    routing: RoutingSettings,
    on_progress: Callable[[int], None] | None = None,
) -> list[Tally]:
    """Send every request, in order of arrival, and run the engines to their ends.

    `on_progress` gets the number of requests that are done.
    """
    cache_tokens = settings.cache_pages * settings.page_tokens
    router = make_router(routing, settings.block_tokens, cache_tokens)
    until_ms, total, done = 0.0, 0, 0
    sent: Sent = []
    for begin_ms, arriving in _windows(requests, routing.report_ms / (settings.time_scale or 1.0)):
        until_ms = begin_ms * settings.time_scale
        for number, count in engines.run(sent, until_ms):
            router.ended(number, count)
            done += count
        sent = [(router.send(request), request) for request in arriving]
        total += len(sent)
        if on_progress is not None:
            on_progress(done)
    while done < total:
        until_ms += _LAST_WINDOWS_MS
        done += sum(count for _, count in engines.run(sent, until_ms))
        sent = []
        if on_progress is not None:
            on_progress(done)
    return engines.tallies()


def _windows(
    requests: Iterable[Request], window_ms: float
) -> Iterator[tuple[float, Iterator[Request]]]:
    """Requests by the window they arrive in, and where it begins; in the trace's time."""
    for number, arriving in groupby(requests, lambda request: request.arrival_ms // window_ms):
        yield number * window_ms, arriving
