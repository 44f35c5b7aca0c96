"""The compiled kernels that the backend asks for: built before the server serves, or before it
starts."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, replace

import torch

from flashcore.jit.kernel import Kernel
from flashcore.problem import Problem, Rules
from flashcore.serving.planners import prefill_tiles
from flashcore.serving.shapes import Model, NotServed, Shape
from flashcore.sm90.config import planner
from flashcore.sm90.config.dense import WARPGROUP_ROWS
from flashcore.sm90.launch.tensors import FP8_NAMES
from flashcore.sm90.needed import Attached, Plans, kernels_for

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Variant:
    """What of a model's layers decides on their kernels, besides shape and window."""

    softcap: bool = False
    sinks: bool = False
    causal: bool = True


@dataclass(frozen=True)
class Kind:
    """All layers with, or all without a window."""

    shape: Shape
    windowed: bool
    variants: tuple[Variant, ...]


def wanted(
    model: Model, kinds: list[Kind], max_batch: int, tree: bool, batch_invariant: bool = False
) -> list[Kernel]:
    """Every kernel that any forward of these layers asks for, each once.

    Raises NotServed where there is none for one of them.
    """
    dtype = "bf16" if model.dtype == torch.bfloat16 else "fp16"
    options = max_batch, tree, batch_invariant, FP8_NAMES.get(model.cache_dtype, "")
    try:
        kernels = [
            kernel
            for kind in kinds
            for kernel in kernels_of(kind, dtype, model.page_tokens, *options)
        ]
    except ValueError as error:
        instead = "a KV cache in the model's dtype" if model.fp8 else "another attention backend"
        raise NotServed(f"these layers ({error})", f"use {instead}") from None
    return list(dict.fromkeys(kernels))


def prepare(kernels: list[Kernel]) -> None:
    """Compile what the cache lacks, so that no request waits for a compiler."""
    from flashcore.jit.cache import shared_cache

    cache = shared_cache()
    missing = [kernel for kernel in kernels if cache.entry(kernel) is None]
    if not missing:
        return
    started = time.monotonic()
    for kernel in missing:
        cache.ensure(kernel)
    seconds = time.monotonic() - started
    logger.info("flashcore attention: %d kernels compiled in %.1f s", len(missing), seconds)


def kernels_of(
    kind: Kind,
    dtype: str,
    page_tokens: int,
    max_batch: int = 4096,
    tree: bool = False,
    batch_invariant: bool = False,
    kv_dtype: str = "",
) -> list[Kernel]:
    """Every kernel that forwards of one kind of layers ask for, each once.

    dtype: "bf16" or "fp16". max_batch: requests that run at most. tree: speculative decoding with
    trees. batch_invariant: plans are. kv_dtype: "e4m3" or "e5m2" where the cache is fp8. Raises
    ValueError where there is no kernel.
    """
    # Prefill planners are made for few sequences and grow, to twice as many as can run.
    batches = (64, max_batch, min(2 * max_batch, planner.ROW_CAPACITIES[-1]))
    tiles = prefill_tiles(kind.shape, batch_invariant)
    plans = Plans(tiles, True, batch_invariant, batches)
    verify = replace(plans, tiles=(WARPGROUP_ROWS,))  # runs with decode's tile
    shape = kind.shape
    problem = Problem(
        *(shape.num_q_heads, shape.num_kv_heads, shape.head_dim, shape.v_head_dim, page_tokens),
        itemsize=1 if kv_dtype else 2,
    )
    kernels = []
    for variant in kind.variants:
        softcap, left = float(variant.softcap), 0 if kind.windowed else -1
        rules = Rules(1.0, variant.causal, left, softcap=softcap)
        attached = Attached(dtype, variant.sinks, kv_dtype=kv_dtype)
        kernels += kernels_for(problem, rules, plans, attached)
        if kv_dtype and not kind.windowed:  # on pages that long prefills have expanded
            tallest = Plans((max(tiles),), True, batch_invariant, rows=())
            wide = replace(attached, kv_dtype="", expanded=True)
            kernels += kernels_for(problem, rules, tallest, wide)
        if tree:
            kernels += kernels_for(problem, rules, verify, replace(attached, tree_mask=True))
    return list(dict.fromkeys(kernels))
