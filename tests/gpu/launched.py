"""Which kernels the tests of this folder launch, test by test, from their parameters alone.

`tools/gpu_test_kernels.py` compiles them ahead. What is missing here is compiled when its test asks
for it, which then says so in a warning (conftest.py); what is too much costs a few seconds.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import torch

from flashcore.contract.chunks import tallest_tile
from flashcore.jit.kernel import Kernel
from flashcore.serving.kernels import Kind, Variant, kernels_of
from flashcore.serving.shapes import Shape
from flashcore.sm90.config import dense, planner
from flashcore.sm90.config.merge import MergeConfig
from flashcore.sm90.config.pager import PagerConfig
from flashcore.sm90.families import DENSE, MERGE, PAGER, PLANNER
from tests.gpu.launched_calls import (
    BITMAP_KINDS,
    DTYPES,
    FP8_QUERIES,
    ROWS,
    RULES,
    Launches,
    device,
    host,
    paged,
)
from tests.gpu.launched_fp8 import FP8_LAUNCHES

FIXED = host(batch_invariant=True)
TALL = host(128, batch_invariant=True)


def fixed(rule: str, page_tokens: int, dim: int = 128, **options: Any) -> list[Kernel]:
    """Of batch-invariant plans of the host, which choose the tile's height."""
    plans = (FIXED, TALL) if tallest_tile(dim) >= 128 else (FIXED,)
    return [k for plan in plans for k in paged(rule, page_tokens, plan, dim, **options)]


def chain(*max_batch: int, chunks: bool = False) -> list[Kernel]:
    """Planners of their own: for many sequences, and the one for few."""
    configs = [planner.choose(n, chunks=chunks) for n in max_batch or (ROWS,)]
    return [Kernel(PLANNER, config) for config in (*configs, planner.choose_small(chunks))]


def layouts(*bitmaps: str, maps: tuple[bool, ...] = (True,)) -> list[Kernel]:
    kinds = product(maps, bitmaps or ("none",))
    return [Kernel(PAGER, PagerConfig(tokens, BITMAP_KINDS[kind])) for tokens, kind in kinds]


def from_layout() -> list[Kernel]:
    return [Kernel(PLANNER, planner.choose(ROWS, from_layout=True))]


def rows(
    seqlen: int | tuple[int, int],
    causal: bool | None = None,
    dim: int = 64,
    heads: tuple[int, int] = (4, 4),
    **options: Any,
) -> list[Kernel]:
    """Of dense calls with and without LSE; causal None: with both too."""
    q, k = (seqlen, seqlen) if isinstance(seqlen, int) else seqlen
    found = []
    for one, lse in product((False, True) if causal is None else (causal,), (False, True)):
        problem = dense.DenseProblem("bf16", dim, 2, q, k, *heads, one, return_lse=lse, **options)
        found.append(Kernel(DENSE, dense.choose(problem)))
    return found


def merges(rule: str, warps: int, heads: int, dims: int, dtype: Any) -> list[Kernel]:
    """As `same_merge` of test_device_attention_gpu.py puts them in the place of others."""
    name, sinks = DTYPES[dtype], RULES[rule][1]
    return [
        Kernel(MERGE, MergeConfig(name, dims, sinks, warps)),
        Kernel(MERGE, MergeConfig(name, dims, sinks, warps, heads, device_counts=True)),
    ]


def both(
    rule: str,
    page_tokens: int,
    warps: int,
    heads_per_warp: int = 1,
    tile_m: int = 64,
    dims: int = 128,
    heads: tuple[int, int] = (8, 2),
    dtype: Any = torch.bfloat16,
) -> list[Kernel]:
    """A plan of the device and one of the host, merged alike."""
    call = (dims, heads, dtype)
    return [
        *paged(rule, page_tokens, device(tile_m, rows=()), *call),
        *paged(rule, page_tokens, host(tile_m, merges=()), *call),
        *merges(rule, warps, heads_per_warp, dims, dtype),
    ]


def nan_in_shared_memory() -> list[Kernel]:
    return rows(2048, False, 256, (17, 17))


def wrong_inputs(**_: Any) -> list[Kernel]:
    """What the right calls of tests/device_error_cases.py launch, before wrong ones and alone."""
    dense_calls = [
        rows(5, False, heads=(8, 2), sinks=sinks, softcap=softcap, varlen=not sinks)
        for sinks, softcap in ((True, False), (True, True), (False, False))
    ]
    return [
        *(kernel for call in dense_calls for kernel in call),
        *paged("causal", 16, host(), 64),
        *paged("causal", 16, host(), 64, fp8="e4m3"),
        *paged("sinks_tree", 16, host(), 64),
        *paged("causal", 16, device(max_batch=4), 64),
        *from_layout(),
        *layouts("none", "uint8", maps=(True, False)),
    ]


def engine(
    page_tokens: int,
    windows: str = "full",
    dims: tuple[int, int] = (128, 128),
    mode: str = "",
    dtype: Any = torch.bfloat16,
    sinks: bool = False,
    kv_dtype: str = "",
) -> list[Kernel]:
    """Of a backend with layers without a window and, but for windows "full", with one."""
    found: list[Kernel] = []
    for windowed in (False,) if windows == "full" else (False, True):
        kind = Kind(Shape(8, 2, *dims), windowed, (Variant(sinks=sinks),))
        tree = mode == "verify_tree"
        found += kernels_of(
            *(kind, DTYPES[dtype], page_tokens), max_batch=16, tree=tree, kv_dtype=kv_dtype
        )
    return found


INVARIANT_MERGES = [
    Kernel(MERGE, MergeConfig(name, dim, sinks, warps, fixed_order=True))
    for name, dim, sinks, warps in product(("bf16", "fp16"), (64, 128, 256), (False, True), (1, 8))
]


def vllm_fp8(kv_cache: str) -> list[Kernel]:
    """Of layers with an fp8 cache in test_vllm_gpu.py."""
    kinds = [Kind(Shape(8, 2, 64), windowed, (Variant(),)) for windowed in (False, True)]
    kinds.append(Kind(Shape(8, 1, 64), False, (Variant(),)))
    kv_dtype = "e5m2" if kv_cache == "fp8_e5m2" else "e4m3"
    return [
        kernel
        for kind, page, invariant in product(kinds, (16, 64), (False, True))
        for kernel in kernels_of(kind, "bf16", page, 12, False, invariant, kv_dtype)
    ]


def vllm_layers() -> list[Kernel]:
    """Of every kind of layer in test_vllm_gpu.py, in plans of either kind."""
    kinds = [
        Kind(Shape(8, 2, 64), windowed, (variant,))
        for windowed in (False, True)
        for variant in (Variant(), Variant(softcap=True), Variant(sinks=True))
    ]
    kinds.append(Kind(Shape(8, 1, 64), False, (Variant(),)))
    return [
        kernel
        for kind, page, invariant in product(kinds, (16, 64), (False, True))
        for kernel in kernels_of(kind, "bf16", page, 12, False, invariant)
    ]


def vllm_specified(heads: tuple[int, int], block: int, window: int | None) -> list[Kernel]:
    """Of a layer in one of vLLM's batch specifications."""
    kind = Kind(Shape(*heads, 128), window is not None, (Variant(),))
    return kernels_of(kind, "bf16", block, 33)


LAUNCHES: dict[str, dict[str, Launches]] = {
    "test_paged_gpu": {
        "test_rules": lambda rule, tile_m: paged(rule, 32, host(tile_m)),
        "test_page_sizes": lambda page_tokens, longest_q: paged("causal", page_tokens, host()),
        "test_gathered_rows": lambda rule, head_dim, tile_m: paged(
            *(rule, 1 if tile_m == 64 else 4, host(tile_m), head_dim),
            dtype=torch.bfloat16 if tile_m == 64 else torch.float16,
        ),
        "test_gathered_items_in_a_row": lambda head_dim, tile_m: paged(
            "causal", 1, host(tile_m), head_dim, (8, 8)
        ),
        "test_shapes": lambda head_dim, heads, tile_m: paged(
            *("causal", 32, host(tile_m), head_dim, heads),
            torch.float16 if heads == (4, 4) else torch.bfloat16,
        ),
        "test_plans": lambda options: paged("causal", 32, host(), heads=(32, 8)),
        "test_strides": lambda page_tokens: paged("causal", page_tokens, host()),
        "test_pool_beyond_two_to_the_31_elements": lambda page_tokens: paged(
            "causal", page_tokens, host(), 256, (8, 8)
        ),
        "test_same_bits_every_time": lambda page_tokens: paged("causal", page_tokens, host()),
    },
    "test_device_attention_gpu": {
        "test_rules": lambda rule, warps, heads: both(rule, 16, warps, heads),
        "test_shapes": lambda head_dim, dtype, page_tokens, heads, tile_m: both(
            "causal", page_tokens, 8, 1, tile_m, head_dim, heads, dtype
        ),
        "test_plan_and_attention_in_one_graph": lambda: both("causal", 16, 8, dims=64),
        "test_faults_concern_their_sequences_alone": lambda: paged("causal", 16, device(), 64),
        "test_what_does_not_fit_is_all_nan": lambda short: paged("tree", 16, device()),
        "test_out_and_no_waiting": lambda: [
            *paged("causal", 16, device()),
            *paged("causal", 16, host()),
        ],
        "test_same_bits_every_time": lambda: paged("causal", 16, device()),
    },
    "test_paged_dims_gpu": {
        "test_dims": lambda head_dim, v_head_dim, page_tokens, tile_m, rule, longest_q: [
            *paged(rule, page_tokens, device(tile_m), (head_dim, v_head_dim)),
            *nan_in_shared_memory(),
        ],
        "test_plans_of_the_host": lambda dims, page_tokens: [
            *paged("causal", page_tokens, host(), dims, dtype=torch.float16),
            *nan_in_shared_memory(),
        ],
        "test_nothing_is_left_over_from_another_item": lambda page_tokens: [
            *paged("causal", page_tokens, host(), 80, dtype=torch.float16),
            *nan_in_shared_memory(),
        ],
        "test_one_plan_serves_its_own_dims_only": lambda: paged(
            "causal", 64, host(), (192, 128), dtype=torch.float16
        ),
    },
    **FP8_LAUNCHES,
    "test_batch_invariant_gpu": {
        "test_decode": lambda dtype, head_dim, page_tokens: paged(
            "causal", page_tokens, FIXED, head_dim, dtype=dtype
        ),
        "test_several_queries": lambda head_dim, page_tokens: fixed(
            "causal", page_tokens, head_dim
        ),
        "test_rules": lambda rule, head_dim, longest_q: fixed(rule, 64, head_dim),
        "test_heads": lambda heads: fixed("causal", 64, heads=heads),
        "test_random_company": lambda rule, page_tokens: fixed(rule, page_tokens),
        "test_any_number_of_warps_merges_to_the_same_bits": lambda dtype, head_dim, rule: [
            *paged(rule, 16, FIXED, head_dim, dtype=dtype),
            *INVARIANT_MERGES,
        ],
        "test_planned_on_the_device": lambda rule: [
            *paged(rule, 16, device(batch_invariant=True)),
            *fixed(rule, 16),
        ],
        "test_planned_by_either_kernels": lambda page_tokens: [
            *paged("causal", page_tokens, device(batch_invariant=True)),
            *paged("causal", page_tokens, FIXED),
        ],
        "test_same_bits_every_time": lambda: paged("causal", 64, FIXED),
    },
    "test_deterministic_gpu": {
        "test_bits": lambda dtype, head_dim: [
            kernel
            for page, tile in product((1, 16, 64), (64, 128))
            if tile <= tallest_tile(head_dim)
            for kernel in paged(
                "causal", page, host(tile, batch_invariant=True), head_dim, dtype=dtype
            )
        ],
        "test_planned_on_the_device_and_replayed": lambda page_tokens: [
            *paged("causal", page_tokens, device(batch_invariant=True)),
            *paged("causal", page_tokens, FIXED),
            *paged("causal", page_tokens, TALL),
        ],
        "test_rules": lambda rule: [
            kernel for plans in (FIXED, TALL) for kernel in paged(rule, 16, plans)
        ],
        "test_token_by_token": lambda: [
            *paged("causal", 64, FIXED),
            *paged("causal", 64, TALL),
        ],
    },
    "test_masks_gpu": {
        "test_tree_window_is_that_of_each_path": lambda page_tokens, left: [
            *paged("window_sinks_tree", page_tokens, host(), 64, (64, 8)),
            *paged("window_sinks_tree", page_tokens, device(max_batch=9), 64, (64, 8)),
        ],
        "test_a_chain_is_a_causal_window": lambda left: [
            *paged("window_sinks", 64, host(), 64, (64, 8)),
            *paged("window_sinks_tree", 64, host(), 64, (64, 8)),
        ],
        "test_a_value_outside_a_window_has_no_say": (
            lambda page_tokens, heads, head_dim, tile_m, q_len: paged(
                "window", page_tokens, host(tile_m), head_dim, heads
            )
        ),
        "test_a_draft_outside_a_path_has_no_say": lambda page_tokens: paged(
            "window_sinks_tree", page_tokens, host(), 64, (64, 8)
        ),
        "test_a_bound_beyond_every_key_does_not_bind": lambda bound: [
            *paged("causal", 64, host()),
            *paged("window", 64, host()),
            *rows(300, heads=(2, 2)),
            *rows(300, heads=(2, 2), window_left=9),
            *rows(300, heads=(2, 2), window_right=5),
        ],
        "test_sinks_and_masks_in_any_strides": lambda: [
            *paged("window_sinks_tree", 64, host(), 64, (64, 8)),
            *rows(200, heads=(8, 8), sinks=True),
        ],
    },
    "test_runtime_gpu": {
        "test_runs_on_the_current_stream": lambda causal: rows(1000, causal),
        "test_streams_do_not_disturb_each_other": lambda causal: rows(700, causal),
        "test_graph_replays": lambda causal: rows(1000, causal),
        "test_does_not_synchronise": lambda: [*rows(1000), *rows(1000, varlen=True)],
        "test_remembered_calls_run_on_the_current_stream_and_in_graphs": (
            lambda causal: rows(1000, causal)
        ),
        "test_remembered_calls_refuse_what_does_not_fit": lambda: rows(1000),
        "test_head_dim_64_against_the_reference": lambda causal, seqlen_q, seqlen_k: rows(
            (seqlen_q, seqlen_k), causal
        ),
        "test_remembered_paged_calls": lambda prefix_pages: paged("causal", 64, host()),
        "test_remembered_paged_calls_refuse_what_does_not_fit": lambda: paged("causal", 64, host()),
        "test_torch_operators_where_a_call_asks_for_them": lambda: rows(100),
        "test_second_process_loads_without_the_dsl": lambda: rows(1000, True),
        "test_host_cost_is_far_below_a_kernel": lambda: rows(64, True),
    },
    "test_device_pager_gpu": {
        "test_token_maps": lambda kind: layouts(kind),
        "test_page_tables": lambda kind: layouts(kind, maps=(False,)),
        "test_large_maps": lambda kind: layouts(kind),
        "test_plans_of_token_maps": lambda: [*layouts("none"), *from_layout()],
        "test_replayed_with_other_contents": lambda: layouts("words", maps=(True, False)),
        "test_faults": lambda: layouts("none"),
        "test_no_waiting": lambda: layouts("none"),
    },
    "test_device_plan_gpu": {
        "test_very_many_sequences": lambda rows: chain(rows),
        "": lambda **_: chain(),  # all others
    },
    "test_errors_gpu": {"": wrong_inputs},
    "test_append_gpu": {"": lambda **_: []},  # Triton's, which are not in the cache
    # Heads and lengths are those of transformers' models: compiled as they are asked for.
    "test_transformers_gpu": {"": lambda **_: []},
    "test_vllm_gpu": {
        "": lambda **_: vllm_layers(),
        "test_fp8": lambda kv_cache, **_: vllm_fp8(kv_cache),
        "test_vllm_s_batch_specifications": lambda name, heads, block, window: vllm_specified(
            heads, block, window
        ),
    },
    "test_sglang_deterministic_gpu": {
        "test_prefill_chunks_and_decode": lambda page_tokens, window: [
            kernel
            for windowed in (False, True)[: 1 + (window >= 0)]
            for kernel in kernels_of(
                Kind(Shape(8, 2, 128), windowed, (Variant(),)), "bf16", page_tokens, 8, False, True
            )
        ],
    },
    "test_sglang_gpu": {
        "test_eager": lambda mode, windows, page_tokens: engine(page_tokens, windows, mode=mode),
        "test_head_dims_and_dtypes": lambda mode, dtype, head_dim: engine(
            64, dims=(head_dim, head_dim), mode=mode, dtype=dtype
        ),
        "test_forward_with_gradients_on": lambda mode: engine(64, "pools", (64, 64), sinks=True),
        "test_padded_head_dims": lambda mode, dims: engine(64, dims=dims),
        "test_graph": lambda mode, windows, page_tokens: engine(page_tokens, windows, mode=mode),
        "test_fp8": lambda mode, windows, pages: engine(
            64, windows, mode=mode, dtype=FP8_QUERIES[pages], kv_dtype=pages
        ),
        "test_fp8_in_a_graph": lambda windows: engine(64, windows, kv_dtype="e4m3"),
        "test_graph_with_narrow_values": lambda: engine(64, dims=(192, 128)),
        "": lambda mode="", windows="window", **_: [
            kernel for page in (16, 64) for kernel in engine(page, windows, mode=mode)
        ],
    },
}


def kernels_of_test(file: str, test: str, parameters: dict[str, Any]) -> list[Kernel] | None:
    """The kernels that a test launches; None where nothing is said of it."""
    of_file = LAUNCHES.get(file, {})
    launches = of_file.get(test, of_file.get(""))
    return None if launches is None else launches(**parameters)
