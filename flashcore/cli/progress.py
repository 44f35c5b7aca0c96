"""A progress bar on one line of standard error."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TextIO

_BAR_CHARACTERS = 28
_REDRAW_SECONDS = 0.1


class ProgressBar:
    """Shows `done / total` with the time left; silent unless the stream is a terminal.

    `shown` forces the bar on (True) or off (False). Use it as a context manager: leaving it
    clears the line, so that what is printed next starts on a clean one.
    """

    def __init__(
        self, label: str, total: int, *, shown: bool | None = None, stream: TextIO | None = None
    ) -> None:
        self._label = label
        self._total = max(total, 1)
        self._stream = sys.stderr if stream is None else stream
        self._shown = self._stream.isatty() if shown is None else shown
        self._started = time.monotonic()
        self._next_draw = self._started
        self._width = 0

    def update(self, done: int) -> None:
        """Show that `done` of the total are finished; cheap when called often."""
        if not self._shown:
            return
        now = time.monotonic()
        if now < self._next_draw and done < self._total:
            return
        self._next_draw = now + _REDRAW_SECONDS
        self._draw(self._line(done, now - self._started))

    def close(self) -> None:
        """Clear the line."""
        if self._shown and self._width:
            self._draw("")
            self._stream.write("\r")
            self._stream.flush()
            self._width = 0

    def _line(self, done: int, elapsed: float) -> str:
        share = min(done / self._total, 1.0)
        filled = round(share * _BAR_CHARACTERS)
        bar = "#" * filled + "." * (_BAR_CHARACTERS - filled)
        left = f"{elapsed / share - elapsed:4.0f} s left" if share > 0 else ""
        return f"{self._label} [{bar}] {done}/{self._total} {left}".rstrip()

    def _draw(self, line: str) -> None:
        self._stream.write("\r" + line.ljust(self._width))
        self._stream.flush()
        self._width = len(line)

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
