"""Kernels of a call, for `launched`: rules by their names, plans by what decides on kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from flashcore.jit.kernel import Kernel
from flashcore.problem import Problem, Rules
from flashcore.sm90.needed import Attached, Plans, kernels_for

Launches = Callable[..., list[Kernel]]
FP8_QUERIES = {"e4m3": torch.bfloat16, "e5m2": torch.float16}
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
BITMAP_KINDS = {"none": "none", "bool": "bytes", "uint8": "bytes", "words": "words"}
ROWS = 64  # sequences of most planners here

# As `rules` of test_paged_gpu.py names them: rules, sinks, tree mask.
RULES = {
    "causal": (Rules(1.0, True), False, False),
    "full": (Rules(1.0), False, False),
    "window": (Rules(1.0, True, 100, 0), False, False),
    "softcap_sinks": (Rules(1.0, True, softcap=5.0), True, False),
    "window_softcap_sinks": (Rules(1.0, True, 100, 0, 5.0), True, False),
    "tree": (Rules(1.0, True), False, True),
    "sinks_tree": (Rules(1.0, True), True, True),
    "everything": (Rules(1.0, True, 200, 2, 9.0), True, True),
    "window_sinks": (Rules(1.0, True, 9, 0), True, False),
    "window_tree": (Rules(1.0, True, 9, 0), False, True),
    "window_sinks_tree": (Rules(1.0, True, 9, 0), True, True),
}


def paged(
    rule: str,
    page_tokens: int,
    plans: Plans,
    dims: int | tuple[int, int] = 128,
    heads: tuple[int, int] = (8, 2),
    dtype: Any = torch.bfloat16,
    fp8: str = "",
) -> list[Kernel]:
    """Of paged calls with these plans; dims: head_dim, or with v_head_dim; fp8: of pages, or
    "expanded"."""
    rules, sinks, tree_mask = RULES[rule]
    dim, v_dim = (dims, dims) if isinstance(dims, int) else dims
    pages = {"expanded": True} if fp8 == "expanded" else {"kv_dtype": fp8}
    attached = Attached(DTYPES[dtype], sinks, tree_mask, **pages)
    problem = Problem(*heads, dim, v_dim, page_tokens, itemsize=1 if fp8 else 2)
    return kernels_for(problem, rules, plans, attached)


def host(tile_m: int = 64, **options: Any) -> Plans:
    return Plans((tile_m,), **options)


def device(tile_m: int = 64, max_batch: int = ROWS, **options: Any) -> Plans:
    return Plans((tile_m,), True, max_batch=(max_batch,), **options)
