"""Launch the pager's kernels.

Four launches on torch's current stream, six for a token map, nothing read back, so a call can be
captured in a CUDA graph once the kernel is loaded. Arguments are taken as already checked
(`sm90.device_pager`).
"""

from __future__ import annotations

from flashcore.contract.operands import Pager
from flashcore.jit.cache import shared_cache
from flashcore.jit.kernel import Kernel
from flashcore.jit.load import CompiledFunction
from flashcore.sm90.config.pager import PagerConfig
from flashcore.sm90.families import PAGER

_functions: dict[PagerConfig, CompiledFunction] = {}


def make_layout(config: PagerConfig, operands: Pager) -> None:
    """Fill `operands.layout` from a token map or a page table."""
    found = _functions.get(config)
    if found is None:
        found = _functions[config] = shared_cache().function(Kernel(PAGER, config))
    found(*operands)
