"""What differs between the versions of vLLM that are served, 0.26.0 to 0.33.0: nothing else here
asks which one it is."""

from __future__ import annotations

import logging
from typing import Any

import torch

from flashcore.append import scatter_by_torch
from flashcore.kv_checks import FP8_DTYPES
from flashcore.problem import KVPool

OWN_NAME = "FLASHCORE"
SHARED_NAME = "CUSTOM"


def takes_names() -> bool:
    """Whether backends can have names of their own: since 0.33; before, there is one for all."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    return hasattr(AttentionBackendEnum, "register")


def backend_name() -> str:
    """What `--attention-backend` calls this backend: a member of vLLM's registry."""
    return OWN_NAME if takes_names() else SHARED_NAME


class _ToVllm(logging.Handler):
    """Hands records to vLLM's logger, which is set up after plugins are loaded (0.33) or before."""

    def emit(self, record: logging.LogRecord) -> None:
        theirs = logging.getLogger("vllm")
        if theirs.isEnabledFor(record.levelno):
            theirs.handle(record)


def log_with_vllm() -> None:
    """Let flashcore's messages go where vLLM's go, which sets up its own logger alone. Nothing
    changes where the program has said where flashcore's go."""
    ours = logging.getLogger("flashcore")
    if not ours.handlers:
        ours.addHandler(_ToVllm())
        ours.setLevel(ours.level or logging.INFO)
        ours.propagate = False


def layout_order(with_layers: bool) -> tuple[int, ...]:
    """Order in memory of the cache's dimensions [blocks, kv_heads, tokens, 2 * head_dim], with one
    for the layers before them or without, in the layout that the operator or a connector chose.

    From 0.33 vLLM orders them itself and asks for none.
    """
    from vllm.v1.attention.backends.utils import get_kv_cache_layout

    layout = get_kv_cache_layout()
    orders = {
        "NHD": ((0, 2, 1, 3), (1, 0, 3, 2, 4)),
        "HND": ((0, 1, 2, 3), (1, 2, 0, 3, 4)),
    }
    if layout not in orders:
        raise ValueError(f"KV cache layout must be NHD or HND, got {layout}")
    return orders[layout][with_layers]


def canonical_strides(pool: torch.Tensor) -> torch.Tensor:
    """The same memory with the strides that dimensions of one element ought to have: torch gives
    them any, and TMA takes multiples of 16 bytes alone."""
    from vllm.utils.torch_utils import canonicalize_singleton_dim_strides

    fixed: torch.Tensor = canonicalize_singleton_dim_strides(pool)
    return fixed


def write_cache(
    layer: Any,
    key: torch.Tensor,
    value: torch.Tensor,
    pool: KVPool,
    slots: torch.Tensor,
) -> None:
    """key, value [tokens, kv_heads, dim] to their slots [tokens or fewer] in the cache; a slot of
    -1 is padding. vLLM's kernel on a GPU, which scales and saturates where the cache is fp8;
    elsewhere it has one for another layout alone, so torch operators write there."""
    k_pages, v_pages = pool.k, pool.v
    if key.is_cuda:
        from vllm.v1.attention.backends.fa_utils import reshape_and_cache_flash

        name = "auto"
        if k_pages.dtype in FP8_DTYPES:  # bytes to vLLM
            name = layer.impl.kv_cache_dtype
            k_pages, v_pages = k_pages.view(torch.uint8), v_pages.view(torch.uint8)
        reshape_and_cache_flash(
            key, value, k_pages, v_pages, slots, name, layer._k_scale, layer._v_scale
        )
    elif len(slots):
        scatter_by_torch(key[: len(slots)], value[: len(slots)], pool, slots)


def batch_invariant() -> bool:
    """VLLM_BATCH_INVARIANT."""
    from vllm import envs

    return bool(envs.VLLM_BATCH_INVARIANT)


def log_interval() -> float:
    """Seconds between vLLM's own lines of statistics."""
    from vllm import envs

    return float(envs.VLLM_LOG_STATS_INTERVAL)


def ubatches(parallel: Any) -> int:
    """Parts that a batch is cut into so that one's communication overlaps with the other."""
    return int(parallel.num_ubatches) if parallel.use_ubatching else 1
