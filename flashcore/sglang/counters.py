"""What the plans share, told at SGLang's log interval for next to no time.

At the end of an interval the last plan's counters are copied to pinned memory without waiting; they
are read and told an interval later, when they have long arrived.
"""

from __future__ import annotations

import logging

import torch

from flashcore.planner.counters import Fault, Stat

logger = logging.getLogger(__name__)


class Counters:
    """Steps of one forward mode."""

    def __init__(self, mode: str, interval: int, quiet: bool = False):
        self.mode, self.interval, self.quiet = mode, max(1, interval), quiet
        self.steps = 0
        self._copy: torch.Tensor | None = None
        self._arrived: torch.cuda.Event | None = None

    def step(self, stats: torch.Tensor) -> None:
        """One more forward; `stats`: int64 [Stat.SIZE] of the plan before it."""
        self.steps += 1
        if self.quiet or self.steps % self.interval:
            return
        if self._copy is None:
            self._copy = torch.zeros(Stat.SIZE, dtype=torch.int64, pin_memory=stats.is_cuda)
        elif self._arrived is None or self._arrived.query():  # type: ignore[no-untyped-call]
            self._tell(self._copy.tolist())
        self._copy.copy_(stats, non_blocking=True)
        if stats.is_cuda:
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record()

    def _tell(self, stats: list[int]) -> None:
        if stats[Stat.FAULTS]:
            logger.error("%s", faults_line(self.mode, stats))
        elif stats[Stat.TOKENS_PER_SEQUENCE]:
            logger.info("%s", line(self.mode, stats))


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


def faults_line(mode: str, stats: list[int]) -> str:
    """What could not be planned, for the log."""
    names = [fault.name.lower() for fault in Fault if fault & stats[Stat.FAULTS] and fault.name]
    return (
        f"flashcore {mode}: sequences that could not be planned, whose results are NaN: "
        f"{', '.join(names)}; see docs/sglang.md"
    )
