"""Kernels of gathered rows as no rule schedules them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from flashcore.jit.kernel import Kernel
from flashcore.problem import Problem, Rules
from flashcore.sm90.families import PAGED
from flashcore.sm90.needed import Attached, Plans, kernels_for


def scheduled(head_dim: int, tile_m: int, changes: Mapping[str, Any]) -> list[Kernel]:
    """Of causal calls over pages of 1 token, as the rules have them and with `changes`."""
    problem = Problem(8, 8, head_dim, head_dim, 1)
    kernels = kernels_for(problem, Rules(1.0, True), Plans((tile_m,)), Attached())
    attention = [kernel for kernel in kernels if kernel.family is PAGED]
    return kernels + [replace(k, config=replace(k.config, **changes)) for k in attention]
