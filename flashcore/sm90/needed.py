"""Which kernels calls need: problem and rules in, kernels out, no tensor and no launch.

`flashcore compile`, engines before they serve and the list of what tests/gpu launches ask here.
"""

from __future__ import annotations

from dataclasses import dataclass

from flashcore.jit.kernel import Kernel
from flashcore.problem import Problem, Rules
from flashcore.sm90.config import merge, paged, planner
from flashcore.sm90.families import MERGE, PAGED, PLANNER


@dataclass(frozen=True)
class Attached:
    """What a paged call brings besides q and the pool. dtype: "bf16" or "fp16", of both; kv_dtype:
    "e4m3" or "e5m2" where the pool is fp8, with a `Problem` of itemsize 1. expanded: in place of it
    where such pages have been expanded."""

    dtype: str = "bf16"
    sinks: bool = False
    tree_mask: bool = False
    kv_dtype: str = ""
    expanded: bool = False


@dataclass(frozen=True)
class Plans:
    """The plans that calls are made with.

    tiles: each tile_m. on_device: made by a DevicePlanner. max_batch: of each planner that makes
    them from page tables. merges: warps that share a row's merge list where the host knows the
    lists (8 of a long one, else 1); 0 where nothing is partial. rows: query tokens times heads that
    results on the device are merged for.
    """

    tiles: tuple[int, ...]
    on_device: bool = False
    batch_invariant: bool = False
    max_batch: tuple[int, ...] = ()
    merges: tuple[int, ...] = (1, 8)
    rows: tuple[int, ...] = merge.MERGE_SIZES


PLAIN = Attached()


def kernels_for(
    problem: Problem, rules: Rules, plans: Plans, attached: Attached = PLAIN
) -> list[Kernel]:
    """Every kernel that paged calls of one kind need, each once: attention, merges, planners.

    Raises ValueError where there is none, naming what is not served.
    """
    call = call_of(problem, rules, attached, plans.on_device)._replace(
        chunked=plans.batch_invariant
    )
    kernels = [Kernel(PAGED, paged.choose(call, tile_m)) for tile_m in plans.tiles]
    kernels += [Kernel(MERGE, config) for config in _merges(problem, plans, attached)]
    planners = [planner.choose(rows, chunks=plans.batch_invariant) for rows in plans.max_batch]
    if planners:  # each of which plans small batches by the same kernel
        planners.append(planner.choose_small(chunks=plans.batch_invariant))
    kernels += [Kernel(PLANNER, config) for config in planners]
    return list(dict.fromkeys(kernels))


def call_of(problem: Problem, rules: Rules, attached: Attached, on_device: bool) -> paged.PagedCall:
    """What of a call decides on its attention kernel."""
    if attached.tree_mask:
        rules = rules._replace(window_right=-1)  # has no say
    return paged.PagedCall(
        attached.dtype,
        problem.head_dim,
        problem.page_tokens,
        problem.group_size,
        problem.v_head_dim,
        causal=rules.causal,
        window=rules.windowed,
        softcap=rules.softcap > 0,
        sinks=attached.sinks,
        tree=attached.tree_mask,
        device_counts=on_device,
        kv_dtype=attached.kv_dtype,
        expanded=attached.expanded,
    )


def _merges(problem: Problem, plans: Plans, attached: Attached) -> list[merge.MergeConfig]:
    dtype, dim, fixed = attached.dtype, problem.v_head_dim, plans.batch_invariant
    if plans.on_device:
        return [
            merge.choose_device_merge(dtype, dim, attached.sinks, rows, fixed)
            for rows in plans.rows
        ]
    return [
        merge.MergeConfig(dtype, dim, attached.sinks, warps, fixed_order=fixed)
        for warps in plans.merges
    ]
