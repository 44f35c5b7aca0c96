"""The compiled kernels that the backend asks for: built before the server serves, or before it
starts."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import Any

import torch

from flashcore.config import paged, planner
from flashcore.config.dense import WARPGROUP_ROWS
from flashcore.runtime.kernel import COMBINE, PAGED, PLANNER, Kernel
from flashcore.sglang.support import Model, Shape, attention_layers

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


def kinds_of(model: Model, runner: Any) -> list[Kind]:
    """The kinds of layers of a runner's model and their variants, each once."""
    layers = attention_layers(runner)
    with_sinks = _layers_with_sinks(getattr(runner, "model", None), layers)
    kinds = []
    for shape, windowed in ((model.full, False), (model.windowed, True)):
        if shape is None:
            continue
        found = {
            Variant(
                softcap=bool(layer.logit_cap),
                sinks=id(layer) in with_sinks,
                causal=layer.attn_type.value != "encoder_only",
            )
            for layer in layers
            if (layer.sliding_window_size >= 0) == windowed
        }
        order = sorted(found or {Variant()}, key=str)
        kinds.append(Kind(shape, windowed, tuple(order)))
    return kinds


def _layers_with_sinks(model: Any, layers: list[Any]) -> set[int]:
    """Attention layers, by id, whose parent has sinks to hand them: SGLang passes them with each
    call, and its models keep them beside the layer, under names with "sink"."""
    found: set[int] = set()
    known = {id(layer) for layer in layers}
    for module in model.modules() if known else ():
        values = {**vars(module), **module._parameters, **module._buffers}
        if any("sink" in name and isinstance(x, torch.Tensor) for name, x in values.items()):
            found |= {id(child) for child in module.children()} & known
    return found


def wanted(model: Model, kinds: list[Kind], max_batch: int, tree: bool) -> list[Kernel]:
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
        )
    ]
    return list(dict.fromkeys(kernels))


def prepare(kernels: list[Kernel]) -> None:
    """Compile what the cache lacks, so that no request waits for a compiler."""
    from flashcore.runtime.cache import shared_cache

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
