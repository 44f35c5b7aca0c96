"""What has been worked out for a call and serves the next one like it."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any


class Remembered(dict[Hashable, Any]):
    """A dictionary that starts anew once it holds `limit` entries: lengths that vary make ever
    more keys. A copy starts empty: compiled functions, which the values hold, cannot be copied."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit = limit

    def remember(self, key: Hashable, value: Any) -> None:
        """Set an entry."""
        if len(self) >= self.limit:
            self.clear()
        self[key] = value

    def __reduce__(self) -> tuple[type[Remembered], tuple[int]]:
        return Remembered, (self.limit,)
