"""Medians with their spread, and ratios of pairs with a confidence interval. Pure arithmetic."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

CONFIDENCE = 0.95


def quartiles(values: Sequence[float]) -> list[float] | None:
    """First and third quartile; None for fewer than two values."""
    if len(values) < 2:
        return None
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return [first, third]


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """Two of the values between which the median lies with at least CONFIDENCE.

    By order statistics: no assumption on how the values are spread. With fewer than six the whole
    range, which says less than CONFIDENCE.
    """
    ordered, count = sorted(values), len(values)
    outside, cut = 0.0, 0
    while cut < count // 2:
        outside += 2 * math.comb(count, cut) / 2**count
        if outside > 1 - CONFIDENCE:
            break
        cut += 1
    cut = max(cut, 1)
    return ordered[cut - 1], ordered[count - cut]


def paired_ratio(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, Any] | None:
    """Median of ours / theirs over pairs taken one right after the other, and its interval."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=False)]
    if not ratios:
        return None
    low, high = median_interval(ratios)
    return {"median": statistics.median(ratios), "low": low, "high": high, "pairs": len(ratios)}
