"""Expansion in a launch: fp8 pages as fp16 in scratch, where the plan's work list reads them.

    pool ── Expansion.pages ──► scratch ─► attention over Expansion.cols

Where the host has decided (`flashcore.plan`) this is all there is. Where the device decides
(`DevicePlanner`) the converting kernel is launched as well, and one of the two finds no work item.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Any

import torch

from flashcore import triton_compiler
from flashcore.jit.load import CompiledFunction, prepared
from flashcore.planner.device_plan import DevicePlan
from flashcore.planner.expansion import AnyExpansion, DeviceExpansion, Places
from flashcore.planner.types import plan_tensors
from flashcore.problem import KVPool
from flashcore.sm90.launch.allocate import Allocate, contiguous

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class Expanded:
    """What of a launch is on expanded pages. It takes pools of the shapes, dtype and device it was
    made for; for others it raises ValueError."""

    attend: CompiledFunction
    cols: Any  # as `load.prepared` has it
    counts: Any  # of the work list, where the device decides
    converted_counts: Any  # those of the converting kernel beside it
    places: Places
    scratch: torch.Tensor | None  # fp16; None: taken for each call
    pools: tuple[tuple[Any, ...], ...]  # what `_kind_of` says of K and of V
    allocate: Allocate

    def pages(
        self, k_pages: torch.Tensor, v_pages: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of the expansion's pages, in fp16: launches, nothing is awaited."""
        from flashcore.expand_kernel import expand

        kinds = _kind_of(k_pages), _kind_of(v_pages)
        if kinds != self.pools:
            raise ValueError(f"k_pages and v_pages are {kinds}, the launch is for {self.pools}")
        found, scratch = [], self.scratch
        pages, page_count, _ = self.places
        for pool in (k_pages, v_pages):
            _, tokens, heads, columns = pool.shape
            # Heads outside of tokens: what is read at a time, rows of one head, is one piece.
            shape = (pages.numel(), heads, tokens, columns)
            if scratch is None:
                own = self.allocate(*contiguous(shape, torch.float16))
            else:
                elements = prod(shape)
                own, scratch = scratch[:elements].view(shape), scratch[elements:]
            found.append(own.transpose(1, 2))
        targets = found[0], found[1]
        expand((k_pages, v_pages), pages, page_count, targets)
        return targets


def expanded_launch(
    attend: CompiledFunction,
    kv: KVPool,
    expansion: AnyExpansion,
    allocate: Allocate,
) -> Expanded:
    """The part of a launch on expanded pages, whose kernel is `attend`."""
    assert expansion.places is not None
    device = expansion if isinstance(expansion, DeviceExpansion) else None
    return Expanded(
        attend=attend,
        cols=prepared(expansion.places.cols),
        counts=prepared(device and device.counts),
        converted_counts=prepared(device and device.converted_counts),
        places=expansion.places,
        scratch=device and device.scratch,
        pools=(_kind_of(kv.k), _kind_of(kv.v)),
        allocate=allocate,
    )


def plan_expansion(plan: DevicePlan, scratch: torch.Tensor) -> None:
    """Find the expansion of a plan that the device has just made, where it has one. scratch: int32,
    an element for every page id there may be."""
    if plan.expansion is not None and can_expand(forced=False):
        from flashcore import expand_plan_kernel

        of_pool = scratch[: plan.num_pages]
        expand_plan_kernel.plan_expansion(
            plan_tensors(plan), plan.counts, plan.expansion, of_pool, plan.tile_m
        )


def can_expand(forced: bool) -> bool:
    """Whether the expanding kernel can be compiled. What is missing is told once; where it was
    asked for, NotImplementedError."""
    missing = _missing()
    if missing is not None and forced:
        raise NotImplementedError(
            f"expand=True: fp8 pages are expanded by a Triton kernel, and {missing}"
        )
    return missing is None


@cache
def _missing() -> str | None:
    missing = triton_compiler.missing()
    if missing is not None:
        logger.warning(
            "flashcore.paged_attention converts fp8 pages for each row block, in long prefills too:"
            " to expand them once it needs Triton and a C compiler (cc, gcc, clang or CC), and %s",
            missing,
        )
    return missing


def _kind_of(pool: torch.Tensor) -> tuple[Any, ...]:
    """What must stay the same from call to call."""
    return (tuple(pool.shape), pool.dtype, pool.device, pool.stride(-1))
