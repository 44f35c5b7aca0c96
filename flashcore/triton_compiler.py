"""What Triton's kernels here are compiled with at their first use, and whether it is there."""

from __future__ import annotations

import os
import shutil
from importlib.util import find_spec


def missing() -> str | None:
    """What is missing in words, of Triton and a C compiler; None where both are here."""
    if find_spec("triton") is None:
        return "Triton is not here"
    if not (os.environ.get("CC") or any(map(shutil.which, ("cc", "gcc", "clang")))):
        return "the compiler is not here"
    return None
