"""The compiled kernels that the backend asks for: built before the server serves, or before it
starts."""

from __future__ import annotations

import logging
import time

import torch

from flashcore.config import paged, planner
from flashcore.config.dense import WARPGROUP_ROWS
from flashcore.runtime.kernel import COMBINE, PAGED, PLANNER, Kernel
from flashcore.sglang.support import Model

logger = logging.getLogger(__name__)


def prepare(model: Model, max_batch: int, softcap: bool, tree: bool) -> None:
    """Compile what `model` needs and the cache lacks, so that no request waits for a compiler.

    Attention sinks are known to the layers alone: their kernels are compiled at the first forward.
    """
    from flashcore.runtime.cache import shared_cache

    cache = shared_cache()
    wanted = [
        kernel
        for shape, windowed in ((model.full, False), (model.windowed, True))
        if shape is not None
        for kernel in kernels_for(
            shape.num_q_heads,
            shape.num_kv_heads,
            shape.head_dim,
            v_head_dim=shape.v_head_dim,
            dtype="bf16" if model.dtype == torch.bfloat16 else "fp16",
            page_tokens=model.page_tokens,
            max_batch=max_batch,
            windowed=windowed,
            softcap=softcap,
            tree=tree,
        )
    ]
    missing = [kernel for kernel in dict.fromkeys(wanted) if cache.entry(kernel) is None]
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
) -> list[Kernel]:
    """Kernels of layers of one shape, heads as one rank sees them; each once.

    v_head_dim: head_dim where not given. windowed, softcap, sinks: features of those layers. tree:
    speculative decoding with trees. max_batch: requests that run at most.
    """
    attention = [
        paged.choose(
            dtype,
            head_dim,
            page_tokens,
            num_q_heads // num_kv_heads,
            tile_m,
            v_head_dim=v_head_dim,
            causal=causal,
            window=windowed,
            softcap=softcap,
            sinks=sinks,
            tree=with_tree,
            device_counts=True,
        )
        for with_tree in ((False, True) if tree else (False,))
        for tile_m in (WARPGROUP_ROWS, 2 * WARPGROUP_ROWS)
        if not (with_tree and tile_m > WARPGROUP_ROWS)  # verify runs with decode's tile
    ]
    merges = [
        paged.choose_device_combine(dtype, v_head_dim or head_dim, sinks, rows)
        for rows in (1, paged.FEW_ROWS + 1)
    ]
    # Prefill planners are made for few sequences and grow, to twice as many as can run.
    most = planner.ROW_CAPACITIES[-1]
    plans = [planner.choose(rows) for rows in (64, max_batch, min(2 * max_batch, most))]
    kernels = [
        *(Kernel(PAGED, config) for config in attention),
        *(Kernel(COMBINE, config) for config in merges),
        *(Kernel(PLANNER, config) for config in plans),
    ]
    return list(dict.fromkeys(kernels))
