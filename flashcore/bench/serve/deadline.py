"""A time by which a run has to be over."""

from __future__ import annotations

import time
from collections.abc import Callable


class Deadline:
    """So many seconds from now; None: never. `clock` gives seconds."""

    def __init__(
        self, seconds: float | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock = clock
        self._end = None if seconds is None else clock() + seconds

    def within(self, seconds: float) -> float:
        """That long a wait, or what is left where that is less; never below 0."""
        if self._end is None:
            return seconds
        return max(0.0, min(seconds, self._end - self._clock()))

    def allows(self, seconds: float) -> bool:
        """Whether something that takes so long would be over in time."""
        return self._end is None or self._clock() + seconds <= self._end

    @property
    def passed(self) -> bool:
        return not self.allows(0.0)
