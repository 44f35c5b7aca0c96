"""Every kernel the library ships: what `flashcore compile` builds and the static gates judge.

Other configurations are legal too and are compiled when they are first needed.
"""

from __future__ import annotations

from flashcore.config import dense
from flashcore.runtime.kernel import DENSE, Kernel


def shipped_kernels() -> list[Kernel]:
    """Kernels of all families, in a fixed order."""
    return [Kernel(DENSE, config) for config in dense.shipped_dense_configs()]
