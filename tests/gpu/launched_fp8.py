"""What the tests of fp8 pages launch, for `launched`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from flashcore.jit.kernel import Kernel
from flashcore.sm90.config.paged import PagedConfig
from tests.fp8 import changed
from tests.gpu.launched_calls import DTYPES, Launches, device, host, paged

TALL = host(128, batch_invariant=True)


def chosen(kernels: list[Kernel], **changes: Any) -> list[Kernel]:
    """As `tests.fp8.chosen` has them."""
    return [
        replace(k, config=changed(k.config, **changes)) if isinstance(k.config, PagedConfig) else k
        for k in kernels
    ]


def fp8_and_fp16(
    rule: str,
    page_tokens: int,
    tile_m: int = 64,
    dims: int | tuple[int, int] = 128,
    heads: tuple[int, int] = (8, 2),
    fp8: str = "e4m3",
    batch_invariant: bool = False,
) -> list[Kernel]:
    """Of one plan over pages of fp8, and over the same in fp16."""
    plans = host(tile_m, batch_invariant=batch_invariant)
    call = (rule, page_tokens, plans, dims, heads, torch.float16)
    kernels = [kernel for pages in (fp8, "") for kernel in paged(*call, pages)]
    return chosen(kernels, few_rows=0)


def expanded_and_converted(*call: Any, fp8: str = "e4m3", **options: Any) -> list[Kernel]:
    """Of one plan, over fp8 pages as they lie and expanded; arguments as of `paged`."""
    kernels = [k for pages in (fp8, "expanded") for k in paged(*call, fp8=pages, **options)]
    return chosen(kernels, few_rows=0)


def few_and_all(*call: Any, fp8: str = "e4m3", **options: Any) -> list[Kernel]:
    """Of one plan, with items of few rows by themselves and with all items in stages of fp16."""
    kernels = paged(*call, fp8=fp8, **options)
    return [*kernels, *chosen(kernels, few_rows=0)]


FP8_LAUNCHES: dict[str, dict[str, Launches]] = {
    "test_fp8_gpu": {
        "test_decode": lambda fp8, page_tokens: fp8_and_fp16("causal", page_tokens, fp8=fp8),
        "test_rules": lambda rule, tile_m: fp8_and_fp16(rule, 32, tile_m),
        "test_page_sizes": lambda page_tokens, longest_q: fp8_and_fp16("causal", page_tokens),
        "test_dims": lambda dims, page_tokens, tile_m, rule, longest_q: fp8_and_fp16(
            rule, page_tokens, tile_m, dims
        ),
        "test_items_in_a_row": lambda page_tokens, tile_m: fp8_and_fp16(
            "causal", page_tokens, tile_m, heads=(8, 8)
        ),
        "test_scales": lambda fp8, kind, dtype: paged("causal", 64, host(), dtype=dtype, fp8=fp8),
        "test_scales_under_rules": lambda rule: paged(rule, 64, host(), fp8="e4m3"),
        "test_batch_invariant_plans": lambda page_tokens, longest_q: fp8_and_fp16(
            "causal", page_tokens, batch_invariant=True
        ),
        "test_planned_on_the_device": lambda batch_invariant: paged(
            "causal", 64, device(batch_invariant=batch_invariant), fp8="e4m3"
        ),
        "test_strides": lambda page_tokens: paged(
            "causal", page_tokens, host(), dtype=torch.float16, fp8="e4m3"
        ),
        "test_a_graph_reads_the_scales_at_each_replay": lambda: paged(
            "causal", 64, host(), fp8="e4m3"
        ),
        "test_queries_beyond_fp16_become_its_largest": lambda: [
            kernel
            for dtype in DTYPES
            for kernel in paged("causal", 64, host(), dtype=dtype, fp8="e4m3")
        ],
        "test_same_bits_every_time": lambda page_tokens: paged(
            "causal", page_tokens, host(), fp8="e4m3"
        ),
    },
    "test_few_rows_gpu": {
        "test_decode": lambda fp8, page_tokens: paged(
            "causal", page_tokens, host(), dtype=torch.float16, fp8=fp8
        ),
        "test_groups": lambda heads, longest_q: paged(
            "causal", 64, host(), heads=heads, fp8="e4m3"
        ),
        "test_shapes": lambda few_rows, head_dim, page_tokens: chosen(
            paged("causal", page_tokens, host(), head_dim, fp8="e4m3"), few_rows=few_rows
        ),
        "test_rules": lambda rule, head_dim, page_tokens: paged(
            rule, page_tokens, host(), head_dim, fp8="e5m2"
        ),
        "test_both_kinds_of_items_in_a_row": lambda page_tokens, share, longest_q: few_and_all(
            "causal", page_tokens, host(), heads=(8, 8)
        ),
        "test_sequences_of_a_token": lambda page_tokens: paged(
            "causal", page_tokens, host(), fp8="e4m3"
        ),
        "test_planned_on_the_device": lambda page_tokens, rule: paged(
            rule, page_tokens, device(), fp8="e4m3"
        ),
        "test_what_is_not_finite_reaches_the_rows_that_see_it_alone": lambda fp8: paged(
            "window", 16, host(), heads=(4, 2), dtype=torch.float16, fp8=fp8
        ),
        "test_same_bits_every_time": lambda page_tokens: paged(
            "causal", page_tokens, host(), fp8="e4m3"
        ),
    },
    "test_expand_gpu": {
        "": lambda **_: [],  # Triton's
        "test_rules": lambda rule, tile_m: expanded_and_converted(rule, 32, host(tile_m)),
        "test_scales": lambda fp8, kind, dtype: expanded_and_converted(
            "causal", 64, host(128), fp8=fp8, dtype=dtype
        ),
        "test_dims": lambda dims, page_tokens: expanded_and_converted(
            "causal", page_tokens, host(128), dims
        ),
        "test_batch_invariant_plans": lambda page_tokens: expanded_and_converted(
            "causal", page_tokens, TALL
        ),
        "test_strides_of_a_cache_of_one_tensor": lambda: expanded_and_converted(
            "causal", 16, host(), dtype=torch.float16
        ),
        "test_layers_after_each_other_and_in_a_graph": lambda: expanded_and_converted(
            "causal", 64, host()
        ),
        "test_planned_on_the_device": lambda batch_invariant: expanded_and_converted(
            "causal", 64, device(128, batch_invariant=batch_invariant), heads=(16, 2)
        ),
    },
}
