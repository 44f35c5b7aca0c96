"""Which engine of a fleet a request goes to: what a router in front of them can know decides.

A router sees every request and its answer. So it knows how many requests each engine has in flight
(those sent and not seen to end; endings are reported now and then) and which prompts it has sent
where. It does not see the engines' caches, batches or queues.
"""

from __future__ import annotations

import math
from collections import OrderedDict, defaultdict
from dataclasses import dataclass

from flashcore.replay.trace import Request

ROUTINGS = ("round-robin", "least-loaded", "prefix-aware")
MAX_ENGINES = 10_000


@dataclass(frozen=True, kw_only=True)
class RoutingSettings:
    """How many engines, and how requests are spread over them; a ValueError names what is wrong."""

    engines: int = 1
    routing: str = "round-robin"
    balance_abs: int = 8  # requests in flight above the least loaded engine, and
    balance_rel: float = 1.5  # times as many: from both on, a prefix draws nothing more there
    report_ms: float = 100.0  # how often the router hears what has ended

    def __post_init__(self) -> None:
        if not 1 <= self.engines <= MAX_ENGINES:
            raise ValueError(f"engines is {self.engines}; it must be 1 to {MAX_ENGINES}")
        if self.routing not in ROUTINGS:
            raise ValueError(f"routing is {self.routing!r}; it must be {', '.join(ROUTINGS)}")
        if self.balance_abs < 0:
            raise ValueError(f"balance_abs is {self.balance_abs}; it must be 0 or above")
        if not 1 <= self.balance_rel < math.inf:
            raise ValueError(f"balance_rel is {self.balance_rel}; it must be 1 or above")
        if not 0 < self.report_ms < math.inf:
            raise ValueError(f"report_ms is {self.report_ms}; it must be above 0")


class Loads:
    """Requests in flight of each engine. Sets of engines are bits of an integer."""

    def __init__(self, engines: int) -> None:
        self.all = (1 << engines) - 1
        self.in_flight = [0] * engines
        self._having: defaultdict[int, int] = defaultdict(int, {0: self.all})  # by requests
        self._last = engines - 1  # the engine chosen before

    def change(self, engine: int, by: int) -> None:
        """Add requests to an engine, or take some that have ended."""
        before = self.in_flight[engine]
        self.in_flight[engine] = after = before + by
        self._having[before] ^= 1 << engine
        if not self._having[before]:
            del self._having[before]
        self._having[after] |= 1 << engine

    def least(self) -> int:
        """The smallest number of requests that an engine has in flight."""
        return min(self._having)

    def choose(self, among: int, at_most: float = math.inf) -> int | None:
        """Of these engines the one with the fewest in flight, or None if all have more.

        Of equals, the next one in turn after the engine chosen last: else those of small numbers
        would take all there is at low load.
        """
        for level in sorted(self._having):
            if level > at_most:
                break
            if found := among & self._having[level]:
                later = found >> (self._last + 1)
                self._last = _lowest(later) + self._last + 1 if later else _lowest(found)
                return self._last
        return None


def _lowest(engines: int) -> int:
    return (engines & -engines).bit_length() - 1


class Router:
    """Round robin: each engine in its turn, whatever it has to do."""

    def __init__(self, settings: RoutingSettings) -> None:
        self.settings = settings
        self.loads = Loads(settings.engines)
        self._sent = 0

    def send(self, request: Request) -> int:
        """The engine that the request goes to, which has it in flight from now on."""
        engine = self._choose(request)
        self.loads.change(engine, 1)
        self._sent += 1
        return engine

    def ended(self, engine: int, requests: int) -> None:
        """So many requests of an engine were seen to end."""
        self.loads.change(engine, -requests)

    def _choose(self, request: Request) -> int:
        return self._sent % self.settings.engines


class LeastLoaded(Router):
    """The engine with the fewest requests in flight; of equals, the next in turn."""

    def _choose(self, request: Request) -> int:
        engine = self.loads.choose(self.loads.all)
        assert engine is not None  # there is no limit
        return engine


class PrefixAware(LeastLoaded):
    """The engine that was sent the longest part of this prompt before, unless it is crowded.

    For each engine the router keeps the blocks of the prompts that it sent there, as many as the
    engine's cache holds, those used last: an approximation, for the engine evicts in an order of
    its own. (A block's id stands for all of the prompt up to its end.) Crowded is an engine with
    more than `balance_abs` requests above the least loaded one and more than `balance_rel` times
    as many. Of engines that match equally far, the least loaded; where none matches, or all that
    do are crowded, the least loaded of all.
    """

    def __init__(self, settings: RoutingSettings, block_tokens: int, cache_blocks: int) -> None:
        super().__init__(settings)
        self._block_tokens = block_tokens
        self._cache_blocks = cache_blocks
        self._holders: dict[int, int] = {}  # of a block: engines as bits
        self._blocks: list[OrderedDict[int, None]] = [  # of an engine, the next to forget first
            OrderedDict() for _ in range(settings.engines)
        ]

    def _choose(self, request: Request) -> int:
        # A block that is not full is in no page that others can use.
        blocks = request.hash_ids[: request.input_tokens // self._block_tokens]
        engine = self._matching(blocks)
        if engine is None:
            engine = super()._choose(request)
        self._remember(engine, blocks)
        return engine

    def _matching(self, blocks: tuple[int, ...]) -> int | None:
        least = self.loads.least()
        uncrowded = max(least + self.settings.balance_abs, least * self.settings.balance_rel)
        holding: list[int] = []  # the first block, the first two, ..., where that is fewer engines
        engines = self.loads.all
        for block in blocks:
            engines &= self._holders.get(block, 0)
            if not engines:
                break
            if not holding or holding[-1] != engines:
                holding.append(engines)
        for engines in reversed(holding):
            engine = self.loads.choose(engines, at_most=uncrowded)
            if engine is not None:
                return engine
        return None

    def _remember(self, engine: int, blocks: tuple[int, ...]) -> None:
        known, holders, bit = self._blocks[engine], self._holders, 1 << engine
        for block in reversed(blocks):  # ends of prompts are to be forgotten before beginnings
            if block in known:
                known.move_to_end(block)
            else:
                known[block] = None
                holders[block] = holders.get(block, 0) | bit
        while len(known) > self._cache_blocks:
            block, _ = known.popitem(last=False)
            holders[block] ^= bit
            if not holders[block]:
                del holders[block]


def make_router(settings: RoutingSettings, block_tokens: int, cache_tokens: int) -> Router:
    """The router of these settings, before engines that cache so many tokens each."""
    if settings.routing == "prefix-aware":
        return PrefixAware(settings, block_tokens, max(cache_tokens // block_tokens, 1))
    return LeastLoaded(settings) if settings.routing == "least-loaded" else Router(settings)
