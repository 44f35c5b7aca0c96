"""More traffic than a trace has: copies of it, laid over each other, by a rule with a seed.

A copy is the whole trace, its times shifted by a random part of the trace's length and wrapped
round its end, its prompts fresh: no prompt of one copy begins like one of another. So the load
grows with the number of copies, while each keeps its own order, pauses and conversations. Of a
fraction of a copy, each conversation is kept or not, at random.

With a pool of system prompts, each conversation of each copy begins with one of them. Which one is
drawn by Zipf's law: the k-th of the pool with a weight of 1 / k ** exponent. They are all that
copies have in common.

A conversation is the requests whose prompts have the same first block of their own: the first that
no more than 1 % of the trace's requests (or 10) have. What more have, such as a template that all
begin with, is nobody's own.

Requests are made as they are asked for: a million takes no more memory than the trace.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from flashcore.replay.trace import MAX_LENGTH_TOKENS, Request

MAX_COPIES = 10_000  # each takes some 30 KB while it is under way
_COMMON_SHARE = 0.01
_COMMON_REQUESTS = 10


@dataclass(frozen=True, kw_only=True)
class TrafficSettings:
    """How many copies, and what they begin with; a ValueError names what is out of range."""

    copies: float = 1.0
    system_prompts: int = 0  # in the pool; 0: none
    system_tokens: int = 2048  # of each
    zipf: float = 1.0  # exponent
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.copies <= MAX_COPIES:
            raise ValueError(
                f"copies is {self.copies}; it must be above 0 and at most {MAX_COPIES}"
            )
        if not 0 <= self.system_prompts <= 1_000_000:
            raise ValueError(f"system_prompts is {self.system_prompts}; it must be 0 to 1000000")
        if not 1 <= self.system_tokens <= MAX_LENGTH_TOKENS // 2:
            raise ValueError(
                f"system_tokens is {self.system_tokens}; it must be 1 to {MAX_LENGTH_TOKENS // 2}"
            )
        if not 0 <= self.zipf < math.inf:
            raise ValueError(f"zipf is {self.zipf}; it must be 0 or above")


class Traffic:
    """Requests in order of arrival, the same on every pass."""

    def __init__(
        self, requests: Sequence[Request], settings: TrafficSettings, block_tokens: int
    ) -> None:
        self._requests = requests
        self._settings = settings
        if settings.system_prompts and settings.system_tokens % block_tokens:
            raise ValueError(
                f"system_tokens is {settings.system_tokens}; it must be a multiple of "
                f"{block_tokens}, the tokens of one hash block"
            )
        self._system_blocks = settings.system_tokens // block_tokens
        self._conversation = _conversations(requests)  # of each request
        ids = [one for request in requests for one in request.hash_ids]
        self._lowest_id, self._ids = min(ids), max(ids) - min(ids) + 1
        weights = np.arange(1, settings.system_prompts + 1, dtype=np.float64) ** -settings.zipf
        self._drawn_up_to = np.cumsum(weights) / weights.sum()

    def __len__(self) -> int:
        """How many requests there are."""
        whole, rest = divmod(self._settings.copies, 1.0)
        kept = self._kept(int(whole)) if rest else None
        return int(whole) * len(self._requests) + (0 if kept is None else int(kept.sum()))

    def __iter__(self) -> Iterator[Request]:
        if self._settings.copies == 1 and not self._settings.system_prompts:
            return iter(self._requests)
        copies = [self._copy(number) for number in range(math.ceil(self._settings.copies))]
        return (request for *_, request in heapq.merge(*copies))

    def _copy(self, number: int) -> Iterator[tuple[float, int, int, Request]]:
        """A copy's requests by arrival, which comes first; equal times stand in a fixed order."""
        draw = np.random.default_rng((self._settings.seed, number))
        count, first, last = len(self._requests), self._requests[0], self._requests[-1]
        # The end is followed by the beginning after a pause of the mean length.
        length_ms = (last.arrival_ms - first.arrival_ms) * (1 + 1 / max(count - 1, 1))
        # The first copy is the trace as it is.
        shift_ms = draw.random() * length_ms if number else 0.0
        end_ms = first.arrival_ms + length_ms - shift_ms
        begin = (
            bisect_left(self._requests, end_ms, key=lambda r: r.arrival_ms) if shift_ms else count
        )
        kept, prompts = self._kept(number), self._prompts(draw)
        for place in chain(range(begin, count), range(begin)):
            if kept is None or kept[place]:
                request, prompt = self._requests[place], 0
                arrival = request.arrival_ms + shift_ms - (length_ms if place >= begin else 0.0)
                if prompts is not None:
                    prompt = int(prompts[self._conversation[place]])
                yield arrival, number, place, self._fresh(request, arrival, number, prompt)

    def _prompts(self, draw: np.random.Generator) -> NDArray[np.int32] | None:
        """The system prompt of each conversation; None: there are none."""
        if not self._settings.system_prompts:
            return None
        drawn = draw.random(int(self._conversation.max()) + 1)
        return np.searchsorted(self._drawn_up_to, drawn, side="right").astype(np.int32)

    def _kept(self, number: int) -> NDArray[np.bool_] | None:
        """Which requests a copy has; None: all."""
        share = self._settings.copies - number
        if share >= 1:
            return None
        draw = np.random.default_rng((self._settings.seed, number, 1))
        conversations = draw.random(int(self._conversation.max()) + 1) < share
        kept: NDArray[np.bool_] = conversations[self._conversation]
        return kept

    def _fresh(self, request: Request, arrival: float, number: int, prompt: int) -> Request:
        """This copy's own ids: equal ones mean equal prompts from the first token on."""
        pool = self._settings.system_prompts
        offset = (number * max(pool, 1) + prompt) * self._ids - self._lowest_id
        ids = tuple([one + offset for one in request.hash_ids])
        tokens = request.input_tokens
        if pool:
            below_all = -1 - prompt * self._system_blocks
            ids = (*range(below_all, below_all - self._system_blocks, -1), *ids)
            tokens += self._settings.system_tokens
        return Request(arrival, tokens, request.output_tokens, ids)


def _conversations(requests: Sequence[Request]) -> NDArray[np.int64]:
    """Of each request the number of its conversation."""
    having = Counter(one for request in requests for one in set(request.hash_ids))
    common = max(_COMMON_SHARE * len(requests), _COMMON_REQUESTS)
    owns = [
        next((one for one in request.hash_ids if having[one] <= common), request.hash_ids[-1])
        for request in requests
    ]
    numbers = {own: number for number, own in enumerate(dict.fromkeys(owns))}
    return np.array([numbers[own] for own in owns], np.int64)
