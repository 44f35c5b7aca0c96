"""The compiled kernels that the backend asks for: built before the server serves, or before it
starts."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

import torch

from flashcore.jit.kernel import Kernel
from flashcore.serving.shapes import Model, Shape
from flashcore.sm90.config import paged, planner
from flashcore.sm90.config.dense import WARPGROUP_ROWS
from flashcore.sm90.families import MERGE, PAGED, PLANNER

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
    """Every kernel that any forward of these layers asks for, each once."""
    kernels = [
        kernel
        for kind in kinds
        for variant in kind.variants
        for kernel in kernels_for(
            kind.shape.num_q_heads,
            kind.shape.num_kv_heads,
            kind.shape.head_dim,
            v_head_dim=kind.shape.v_head_dim,
            dtype="bf16" if model.dtype == torch.bfloat16 else "fp16",
            page_tokens=model.page_tokens,
            max_batch=max_batch,
            windowed=kind.windowed,
            softcap=variant.softcap,
            sinks=variant.sinks,
            tree=tree,
            causal=variant.causal,
            batch_invariant=batch_invariant,
        )
    ]
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


def kernels_for(
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    *,
    v_head_dim: int | None = None,
    dtype: str = "bf16",
    page_tokens: int = 64,
    max_batch: int = 4096,
    windowed: bool = False,
    softcap: bool = False,
    sinks: bool = False,
    tree: bool = False,
    causal: bool = True,
    batch_invariant: bool = False,
) -> list[Kernel]:
    """Kernels of layers of one shape, heads as one rank sees them; each once.

    v_head_dim: head_dim where not given. windowed, softcap, sinks: features of those layers. tree:
    speculative decoding with trees. max_batch: requests that run at most. batch_invariant: plans
    are, whose tiles have one height.
    """
    tiles = (WARPGROUP_ROWS,) if batch_invariant else (WARPGROUP_ROWS, 2 * WARPGROUP_ROWS)
    call = paged.PagedCall(
        dtype,
        head_dim,
        page_tokens,
        num_q_heads // num_kv_heads,
        v_head_dim or 0,
        causal=causal,
        window=windowed,
        softcap=softcap,
        sinks=sinks,
        device_counts=True,
    )
    attention = [
        paged.choose(call._replace(tree=with_tree), tile_m)
        for with_tree in ((False, True) if tree else (False,))
        for tile_m in tiles
        if not (with_tree and tile_m > WARPGROUP_ROWS)  # verify runs with decode's tile
    ]
    merges = [
        paged.choose_device_merge(dtype, v_head_dim or head_dim, sinks, rows, batch_invariant)
        for rows in paged.MERGE_SIZES
    ]
    # Prefill planners are made for few sequences and grow, to twice as many as can run.
    most = planner.ROW_CAPACITIES[-1]
    plans = [
        planner.choose_small(chunks=batch_invariant),
        *(
            planner.choose(rows, chunks=batch_invariant)
            for rows in (64, max_batch, min(2 * max_batch, most))
        ),
    ]
    kernels = [
        *(Kernel(PAGED, config) for config in attention),
        *(Kernel(MERGE, config) for config in merges),
        *(Kernel(PLANNER, config) for config in plans),
    ]
    return list(dict.fromkeys(kernels))
