"""Which pages the running batch reads, counted as requests join, grow and leave.

A scan of all pages in every step would cost more than the rest of the simulation, so each change
updates the totals: the cost is that of the pages that change hands.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from flashcore.replay.prefix_cache import PageIds


class BatchPages:
    """Readers of every page, and the totals over the pages with at least one reader.

    Within a step: `forget` for pages with new contents, `join` for pages that a sequence reads
    from now on, then `end_step`, then `leave` for the sequences that are done.
    """

    def __init__(self, num_pages: int) -> None:
        self.readers: NDArray[np.int32] = np.zeros(num_pages, np.int32)
        # True: the step before read this page, and it still holds what it held then.
        self.resident: NDArray[np.bool_] = np.zeros(num_pages, np.bool_)
        self.used = 0
        self.shared = 0  # pages with two readers or more
        self.repeated_reads = 0  # reads beyond the first one of each page
        self.staged = 0  # pages used in this step and not resident
        self._staged_now: list[PageIds] = []
        self._left: list[PageIds] = []

    def forget(self, pages: PageIds) -> None:
        """These pages were taken anew: what they held is gone."""
        self.resident[pages] = False

    def join(self, pages: PageIds) -> None:
        """One more sequence reads these pages; no page may occur twice."""
        if not pages.size:
            return
        before = self.readers[pages]
        first = pages[before == 0]
        self.used += first.size
        self.shared += int(np.count_nonzero(before == 1))
        self.repeated_reads += pages.size - first.size
        staged = first[~self.resident[first]]
        if staged.size:
            self.staged += staged.size
            self._staged_now.append(staged)
        self.readers[pages] += 1

    def leave(self, pages: PageIds) -> None:
        """One sequence less reads these pages."""
        self.readers[pages] -= 1
        after = self.readers[pages]
        last = pages[after == 0]
        self.used -= last.size
        self.shared -= int(np.count_nonzero(after == 1))
        self.repeated_reads -= pages.size - last.size
        self._left.append(last)

    def end_step(self) -> None:
        """Make the pages of this step, and no others, the resident ones."""
        if self._left:
            for left in self._left:
                self.resident[left[self.readers[left] == 0]] = False
            self._left.clear()
        if self._staged_now:
            self.resident[np.concatenate(self._staged_now)] = True
            self._staged_now.clear()
        self.staged = 0
