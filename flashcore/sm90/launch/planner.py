"""Launch the planner's kernels.

Five launches, with chunks seven, of a small batch one, on torch's current stream, nothing read
back, so a call can be captured in a CUDA graph once the kernel is loaded. Arguments are taken as
already checked (`sm90.device_planner`).
"""

from __future__ import annotations

from collections.abc import Callable

from flashcore.contract.operands import Planner
from flashcore.jit.beside import compile_beside
from flashcore.jit.cache import shared_cache
from flashcore.jit.kernel import Kernel
from flashcore.jit.load import CompiledFunction
from flashcore.sm90.config.planner import PlannerConfig
from flashcore.sm90.families import PLANNER

_functions: dict[PlannerConfig, CompiledFunction] = {}


def make_plan(
    config: PlannerConfig, operands: Planner, following: Callable[[], list[Kernel]] = list
) -> None:
    """Fill `operands.plan` from a page table or a layout. following: the kernels of the calls that
    are to come, to compile while the planner's own are compiled."""
    planner = _functions.get(config)
    if planner is None:
        cache, kernel = shared_cache(), Kernel(PLANNER, config)
        compile_beside(cache, kernel, following())
        planner = _functions[config] = cache.function(kernel)
    planner(*operands)
