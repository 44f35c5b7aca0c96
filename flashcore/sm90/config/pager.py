"""What the code of the pager's kernels depends on."""

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
