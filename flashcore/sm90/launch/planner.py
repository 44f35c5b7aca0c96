"""Launch the planner's kernels on torch tensors.

Five launches, with chunks seven, on torch's current stream, nothing read back, so a call can be
captured in a CUDA graph once the kernel is loaded. Arguments are taken as already checked
(`planner.device`).
"""

from __future__ import annotations

import torch

from flashcore.jit.cache import shared_cache
from flashcore.jit.kernel import Kernel
from flashcore.jit.load import CompiledFunction
from flashcore.sm90.available import sm_count
from flashcore.sm90.config.planner import PlannerConfig
from flashcore.sm90.families import PLANNER

_functions: dict[PlannerConfig, CompiledFunction] = {}


def make_plan(
    config: PlannerConfig,
    page_table: torch.Tensor | None,
    seq_lens: torch.Tensor | None,
    q_lens: torch.Tensor,
    layout: tuple[torch.Tensor, ...] | None,
    plan: tuple[torch.Tensor, ...],
    scratch: tuple[torch.Tensor, ...],
    problem: tuple[int, ...],
) -> None:
    """Fill `plan` from a page table or a layout; the tuples are `Source`, `Plan`, `Scratch` and
    `Problem` of `kernels.planner_operands`."""
    sms = sm_count(q_lens.device)
    load_planner(config)(page_table, seq_lens, q_lens, layout, plan, scratch, problem, sms)


def load_planner(config: PlannerConfig) -> CompiledFunction:
    """The compiled planner, compiled now if no process has done so before."""
    found = _functions.get(config)
    if found is None:
        found = _functions[config] = shared_cache().function(Kernel(PLANNER, config))
    return found
