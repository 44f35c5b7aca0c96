"""Names of the DSL that stand elsewhere in other versions of it."""

from __future__ import annotations

try:
    from cutlass.memory import SmemAllocator
except ImportError:  # before 4.8
    from cutlass.utils import SmemAllocator

__all__ = ["SmemAllocator"]
