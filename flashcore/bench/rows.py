"""Rows of a benchmark's result."""

from __future__ import annotations

from typing import Any

Row = dict[str, Any]


def by_workload(rows: list[Row], column: str = "kernel") -> dict[str, dict[str, Row]]:
    """Workload -> value of `column` -> row, in the order of the run."""
    found: dict[str, dict[str, Row]] = {}
    for row in rows:
        found.setdefault(row["workload"], {})[row[column]] = row
    return found
