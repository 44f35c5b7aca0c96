"""Memory in which calls with plans made on the device expand fp8 pages; planners can share it."""

from __future__ import annotations

import torch

from flashcore import validate
from flashcore.contract.counts import Count
from flashcore.planner.expansion import EXPANSION_BYTES, DeviceExpansion, Places, expanded_bytes
from flashcore.problem import Problem


class ExpansionScratch:
    """Room for expanded pages, and scratch of the plans that say which.

    Planners whose updates and attention calls follow one another (on one stream, or ordered by
    events) may have it together: nothing in it outlives a call.

    Args:
        num_bytes: of K and V in 16 bits; a batch with more distinct pages is converted instead.
        num_pages: as in `DevicePlanner`, the most of all.
        device: where.
    """

    def __init__(
        self,
        num_bytes: int = EXPANSION_BYTES,
        *,
        num_pages: int,
        device: torch.device | str = "cuda",
    ):
        validate.positive_int("num_bytes", num_bytes)
        validate.positive_int("num_pages", num_pages)
        self.pages = torch.empty(num_bytes // 2, dtype=torch.float16, device=device)
        self.entries = torch.zeros(num_pages, dtype=torch.int32, device=device)

    @staticmethod
    def bytes_of(num_bytes: int, num_pages: int) -> int:
        """What `ExpansionScratch` of these arguments takes."""
        return num_bytes // 2 * 2 + 4 * num_pages

    @staticmethod
    def plan_bytes(num_bytes: int, num_pages: int, max_entries: int, problem: Problem) -> int:
        """What `lent` of such a scratch takes."""
        pages = _capacity(num_bytes, num_pages, max_entries, problem)
        return 4 * (pages + 1 + max_entries + 2 * int(Count.SIZE) + 2)

    def lent(self, problem: Problem, num_pages: int, max_entries: int) -> DeviceExpansion:
        """What the plan of a planner of these sizes has of it, with tensors of its own.

        Raises ValueError where the scratch is too small for a page, or for so many page ids.
        """
        if num_pages > self.entries.numel():
            raise ValueError(
                f"expansion has num_pages {self.entries.numel()}, the planner's is {num_pages}"
            )
        most = _capacity(2 * self.pages.numel(), num_pages, max_entries, problem)
        if not most:
            raise ValueError(
                f"expansion has {2 * self.pages.numel()} bytes, fewer than the "
                f"{expanded_bytes(1, problem)} of a page"
            )

        def counted(n: int) -> torch.Tensor:
            return torch.zeros(n, dtype=torch.int32, device=self.entries.device)

        places = Places(counted(most), counted(1), counted(max_entries))
        counts, converted = counted(int(Count.SIZE)), counted(int(Count.SIZE))
        return DeviceExpansion(problem, places, self.pages, counts, converted, counted(2))


def _capacity(num_bytes: int, num_pages: int, max_entries: int, problem: Problem) -> int:
    """Pages that can be expanded: as many as fit, and as can be asked for."""
    return min(num_bytes // expanded_bytes(1, problem), num_pages, max_entries)
