"""Every kernel the library ships: what `flashcore compile` builds and the static gates judge.

They are what `choose` picks for the problems below, so a new tuning decision is gated without a
word here. Other configurations are legal too and are compiled when they are first needed.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from flashcore.contract.chunks import tallest_tile
from flashcore.jit.kernel import Kernel
from flashcore.sm90.config import merge, paged
from flashcore.sm90.config.dense import DTYPES, HEAD_DIMS, DenseConfig, DenseProblem, choose
from flashcore.sm90.config.merge import MergeConfig
from flashcore.sm90.config.paged import PagedCall, PagedConfig
from flashcore.sm90.config.pager import PagerConfig
from flashcore.sm90.config.planner import PlannerConfig, choose_small
from flashcore.sm90.families import DENSE, MERGE, PAGED, PAGER, PLANNER

# Many tiles in every dimension.
_LONG_SEQUENCES = DenseProblem("bf16", 128, 4, 4096, 4096, num_heads=16, num_kv_heads=16)
PAGED_DIMS = (64, 128, 256)  # in every variant
OTHER_PAGED_DIMS = ((80, 80), (96, 96), (112, 112), (192, 128))  # Phi 2 and 3, MiMo V2, ...


def shipped_kernels() -> list[Kernel]:
    """Kernels of all families, in a fixed order and each once."""
    return [
        *(Kernel(DENSE, config) for config in _dense_configs()),
        *(Kernel(PAGED, config) for config in _paged_configs()),
        *(Kernel(MERGE, config) for config in _merge_configs()),
        *(Kernel(PLANNER, PlannerConfig(1024, from_layout)) for from_layout in (False, True)),
        Kernel(PLANNER, PlannerConfig(1024, chunks=True)),
        *(Kernel(PLANNER, choose_small(chunks)) for chunks in (False, True)),
        *(Kernel(PAGER, PagerConfig(tokens, "words")) for tokens in (False, True)),
        *(Kernel(PAGER, PagerConfig(tokens, "none")) for tokens in (False, True)),
    ]


def _dense_configs() -> list[DenseConfig]:
    """Plain attention for every dtype and head_dim; each feature for the models that have it."""

    def of(head_dim: int, dtype: str = "bf16", group: int = 1, **changes: Any) -> DenseProblem:
        wanted: dict[str, Any] = {"dtype": dtype, "head_dim": head_dim, "num_kv_heads": 16 // group}
        return replace(_LONG_SEQUENCES, **wanted, **changes)

    problems = [
        of(head_dim, dtype, causal=causal)
        for dtype in DTYPES
        for head_dim in HEAD_DIMS
        for causal in (False, True)
    ]
    # Full attention at head_dim 64 and 128 has a tile of its own for few keys.
    problems += [of(dim, dtype, seqlen_k=2048) for dim in (64, 128) for dtype in DTYPES]
    for causal in (False, True):
        problems += [of(d, causal=causal, return_lse=True) for d in (64, 128)]
        problems += [of(d, causal=causal, varlen=True) for d in (64, 128, 256)]
        problems.append(of(128, "fp16", causal=causal, varlen=True))
    problems += [of(d, causal=True, window_left=1024) for d in (64, 128, 256)]
    # Sinks on alternating full and windowed layers, packed: gpt-oss. Soft cap: Gemma 2.
    problems += [
        of(64, causal=True, window_left=left, sinks=True, varlen=True) for left in (-1, 128)
    ]
    problems += [of(256, causal=True, window_left=left, softcap=True) for left in (-1, 4096)]
    # One query and a group of heads for each KV head: the group fills the tile.
    problems += [of(128, seqlen_q=1, group=group, causal=True) for group in (4, 8)]
    problems.append(of(64, seqlen_q=3, group=4, causal=True))
    # What else `flashcore check` asks for, so that a wheel has all of it.
    problems += [of(d, seqlen_k=2048, varlen=True) for d in (64, 128)]
    sinks: dict[str, Any] = {"causal": True, "sinks": True, "return_lse": True}
    problems += [of(128, **sinks), of(128, window_left=300, softcap=True, **sinks)]
    return list(dict.fromkeys(choose(problem) for problem in problems))


def _paged_configs() -> list[PagedConfig]:
    """Decode and prefill tiles for every head_dim; page sizes and features for models' own."""

    def pick(dtype: str, dim: int, page: int, group: int, m: int, **of_call: Any) -> PagedConfig:
        return paged.choose(PagedCall(dtype, dim, page, group, **of_call), m)

    configs = [pick("bf16", dim, 64, 4, m) for dim in PAGED_DIMS for m in (64, 128)]
    configs += [pick("fp16", dim, 64, 4, 64) for dim in PAGED_DIMS]
    configs += [pick("bf16", 128, page, 4, 64) for page in (16, 128)]
    # Pages of 1 are SGLang's default, 8 another whose rows are gathered.
    configs += [pick("bf16", dim, 1, 4, m) for dim in PAGED_DIMS for m in (64, 128)]
    configs += [pick("fp16", 128, 1, 4, 64), pick("bf16", 128, 8, 4, 64)]
    configs += [pick("bf16", 128, 1, group, 64) for group in (1, 8)]
    configs.append(pick("bf16", 128, 1, 4, 64, tree=True))
    configs += [pick("bf16", 128, 64, group, m) for group in (1, 8) for m in (64, 128)]
    configs += [pick("bf16", 128, 64, 4, m, tree=True) for m in (64, 128)]
    configs.append(pick("bf16", 64, 64, 8, 64, window=True, sinks=True))
    configs.append(pick("bf16", 256, 64, 2, 64, window=True, softcap=True))
    # Plans made on the device, as an engine with CUDA graphs uses them; verify with a tree mask.
    configs += [
        pick(dtype, dim, 64, 4, 64, device_counts=True) for dtype in DTYPES for dim in PAGED_DIMS
    ]
    configs.append(pick("bf16", 128, 64, 4, 64, tree=True, device_counts=True))
    configs += [
        pick("bf16", dim, page, 4, 64, v_head_dim=v_dim, device_counts=True)
        for dim, v_dim in OTHER_PAGED_DIMS
        for page in (64, 1)
    ]
    # Batch-invariant plans, in every tile that there is room for.
    configs += [
        pick("bf16", dim, 64, 4, m, chunked=True, device_counts=on_device)
        for dim in PAGED_DIMS
        for m in (64, 128)
        if m <= tallest_tile(dim)
        for on_device in (False, True)
    ]
    configs += [pick("bf16", 128, n, 4, 64, chunked=True, device_counts=True) for n in (1, 16, 128)]
    configs.append(pick("bf16", 64, 64, 8, 64, window=True, sinks=True, chunked=True))
    configs.append(pick("bf16", 256, 64, 2, 64, window=True, softcap=True, chunked=True))
    options = {"window": True, "sinks": True, "tree": True, "device_counts": True}
    configs.append(pick("bf16", 64, 64, 8, 64, **options))
    return list(dict.fromkeys([*configs, *_fp8_configs()]))


def _fp8_configs() -> list[PagedConfig]:
    """Pages of e4m3 as engines have them; e5m2 once."""

    def pick(dim: int, page: int, m: int = 64, group: int = 4, **of_call: Any) -> PagedConfig:
        kind = {"kv_dtype": "e4m3", **of_call}
        return paged.choose(PagedCall("bf16", dim, page, group, **kind), m)

    on_device: dict[str, Any] = {"device_counts": True}
    configs = [pick(dim, page, **on_device) for dim in PAGED_DIMS for page in (64, 1)]
    configs += [pick(dim, 64, m) for dim in PAGED_DIMS for m in (64, 128)]
    configs += [pick(128, page) for page in (1, 16, 128)]
    configs += [pick(128, 64, 64, group, **on_device) for group in (1, 8)]
    configs.append(pick(128, 64, tree=True, **on_device))
    configs.append(pick(128, 64, kv_dtype="e5m2", **on_device))
    configs.append(pick(128, 64, chunked=True, **on_device))
    # Expanded, of long prefills.
    wide: dict[str, Any] = {"kv_dtype": "", "expanded": True}
    configs += [pick(dim, 64, 128, **wide, **on_device) for dim in PAGED_DIMS]
    configs += [pick(128, page, 128, **wide, **on_device) for page in (1, 128)]
    configs += [pick(128, 64, 128, **wide), pick(128, 64, 128, chunked=True, **wide, **on_device)]
    return configs


def _merge_configs() -> list[MergeConfig]:
    """One for each head_dim and dtype, and with sinks for the models that have them."""
    plain = [MergeConfig(dtype, dim) for dtype in DTYPES for dim in PAGED_DIMS]
    long = [MergeConfig("bf16", dim, warps_per_row=8) for dim in PAGED_DIMS]
    fixed = [
        MergeConfig("bf16", dim, warps_per_row=warps, fixed_order=True)
        for dim in PAGED_DIMS
        for warps in (1, 8)
    ]
    rows = merge.MERGE_SIZES
    kinds = [(dtype, dim) for dtype in DTYPES for dim in PAGED_DIMS]
    kinds += [("bf16", v_dim) for _, v_dim in OTHER_PAGED_DIMS if v_dim not in PAGED_DIMS]
    device = [merge.choose_device_merge(dtype, dim, False, n) for dtype, dim in kinds for n in rows]
    device += [
        merge.choose_device_merge("bf16", dim, False, n, True) for dim in PAGED_DIMS for n in rows
    ]
    return [*plain, *long, *fixed, *device, MergeConfig("bf16", 64, sinks=True)]
