"""What the plans share, told at the engine's log interval for next to no time; and their faults,
at once.

At the end of an interval the last plan's counters are copied to pinned memory without waiting; they
are read and told an interval later, when they have long arrived.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from flashcore.contract.counts import Fault, Seen, Stat
from flashcore.planner.expansion import Way

if TYPE_CHECKING:
    from flashcore.serving.views import View

logger = logging.getLogger(__name__)
_UPDATES = int(Seen.UPDATES)  # an index that costs nothing
_GUIDE = "docs/sglang.md"


class Counters:
    """Steps of one forward mode."""

    def __init__(self, mode: str, interval: int, quiet: bool = False):
        self.mode, self.interval, self.quiet = mode, max(1, interval), quiet
        self.steps = 0
        self._copy: torch.Tensor | None = None
        self._outcome: torch.Tensor | None = None
        self._arrived: torch.cuda.Event | None = None

    def step(self, stats: torch.Tensor, outcome: torch.Tensor | None = None) -> None:
        """One more forward; `stats`: int64 [Stat.SIZE] of the plan before it; outcome: int32 [2],
        of its fp8 pages where they may be expanded."""
        self.steps += 1
        if self.quiet or self.steps % self.interval:
            return
        if self._copy is None:
            self._copy = torch.zeros(Stat.SIZE, dtype=torch.int64, pin_memory=stats.is_cuda)
            self._outcome = torch.zeros(2, dtype=torch.int32, pin_memory=stats.is_cuda)
        elif self._arrived is None or self._arrived.query():  # type: ignore[no-untyped-call]
            assert self._outcome is not None
            self._tell(self._copy.tolist(), self._outcome.tolist())
        assert self._outcome is not None
        self._copy.copy_(stats, non_blocking=True)
        if outcome is None:
            self._outcome.zero_()
        else:
            self._outcome.copy_(outcome, non_blocking=True)
        if stats.is_cuda:
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record()

    def _tell(self, stats: list[int], outcome: list[int]) -> None:
        if stats[Stat.TOKENS_PER_SEQUENCE]:
            logger.info("%s", line(self.mode, stats) + expansion_text(*outcome))


class FaultLog:
    """Tells of the faults of every planner: the first of each kind at once, more at the interval.

    Planners count their faults in memory of the host, which is read before each forward. So none is
    lost, whatever plan had it, and it is told with the first forward that begins after it.
    """

    def __init__(
        self,
        views: Sequence[View],
        interval: int,
        quiet: bool = False,
        guide: str = _GUIDE,
    ):
        """guide: what the log refers to."""
        self.views, self.interval, self.quiet = views, max(1, interval), quiet
        self.guide = guide
        self.steps = 0
        self._plans = 0  # with a fault, that have been told
        self._kinds: dict[str, Fault] = {}  # that have been told, by what had them

    def look(self) -> None:
        """One more forward."""
        self.steps += 1
        plans = 0
        for view in self.views:
            for _, seen in view.seen:
                plans += seen[_UPDATES]
        if plans != self._plans and not self.quiet:
            self._tell(plans)

    def _tell(self, plans: int) -> None:
        kinds: dict[str, Fault] = {}
        sequences: dict[str, int] = {}
        for view in self.views:
            layers = "full attention" if view.window < 0 else f"window {view.window}"
            for mode, seen in view.seen:
                if seen[_UPDATES]:
                    where = f"{mode}, {layers}"
                    kinds[where] = kinds.get(where, Fault(0)) | Fault(seen[Seen.FAULTS])
                    sequences[where] = seen[Seen.SEQUENCE]
        for where, found in kinds.items():
            if found & ~self._kinds.get(where, Fault(0)) or self.steps % self.interval == 0:
                more = plans - self._plans
                logger.error("%s", faults_line(where, found, more, sequences[where], self.guide))
        if kinds != self._kinds or self.steps % self.interval == 0:
            self._plans, self._kinds = plans, kinds


def line(mode: str, stats: list[int]) -> str:
    """The counters of one plan, for the log."""
    once, each = stats[Stat.TOKENS_ONCE], stats[Stat.TOKENS_PER_SEQUENCE]
    unique, groups, folded = (
        stats[Stat.TOKENS_UNIQUE],
        stats[Stat.NUM_GROUPS],
        stats[Stat.NUM_FOLDED],
    )
    text = (
        f"flashcore {mode}: KV tokens read: {once}, per sequence: {each}, "
        f"reuse: {each / max(once, 1):.2f}, groups: {groups}, folded: {folded}"
    )
    if once < each:
        return text
    if stats[Stat.UNSHARED]:
        return f"{text}, nothing shared: no room for the partial results of so many groups"
    if unique == each:
        return f"{text}, nothing shared: no two sequences have a page in common"
    return f"{text}, nothing shared: common pages are too few to pay for partial results"


def expansion_text(way: int, pages: int) -> str:
    """What became of fp8 pages that could be expanded, for the log; way: a `Way`."""
    if way == Way.EXPANDED:
        return f", fp8 pages expanded: {pages}"
    if way == Way.NO_ROOM:
        return f", fp8 pages converted: no room to expand {pages}"
    return ""


def faults_line(where: str, faults: Fault, plans: int, sequence: int, guide: str = _GUIDE) -> str:
    """What could not be planned, for the log. plans: with a fault, since the last line."""
    names = [fault.name.lower() for fault in Fault if fault & faults and fault.name]
    return (
        f"flashcore {where}: sequences that could not be planned, whose results are NaN: "
        f"{', '.join(names)}; in {plans} forwards, last sequence {sequence} of its batch; "
        f"see {guide}"
    )
