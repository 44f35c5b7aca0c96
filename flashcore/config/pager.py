"""Constants and scratch of the pager's kernels; imports neither torch nor the DSL."""

from __future__ import annotations

from dataclasses import dataclass

BITMAPS = ("none", "bytes", "words")


@dataclass(frozen=True)
class PagerConfig:
    """Everything that the code of the pager's kernels depends on."""

    tokens: bool  # sequences are ranges of a token map, not rows of a page table
    bitmap: str = "none"  # resident pages: none at all, a byte each, or words of 32, lowest first


def illegal_reason(config: PagerConfig) -> str | None:
    """Why `config` cannot run, or None."""
    if config.bitmap not in BITMAPS:
        return f"bitmap {config.bitmap!r} is not one of {BITMAPS}"
    return None


class Ranges:
    """Scratch per sequence of a token map: its page changes, the first and the one after the last.

    A page change is a token that lies in another page than the token before it.
    """

    FIRST_CHANGE = 0
    END_CHANGE = 1
    LINES = 2


class Tiles:
    """Per CTA of the scans, as `config.planner.Tiles`."""

    CHANGES = 0
    PIECES = 1
    STAGED = 2
    LINES = 3


FREE = 2**63 - 1
"""Slot of a page that no entry has claimed yet."""
