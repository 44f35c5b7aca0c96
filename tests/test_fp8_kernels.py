"""Kernels of fp8 pages: what is chosen and refused, and the machine code."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import flashcore
from flashcore.contract.chunks import tallest_tile
from flashcore.jit.folder import default_folder
from flashcore.jit.gates import check_kernel
from flashcore.jit.kernel import Kernel
from flashcore.jit.target import detect_target
from flashcore.sm90.config import paged
from flashcore.sm90.config.paged import PagedCall, PagedConfig
from flashcore.sm90.families import PAGED
from tests.runtime_fixtures import needs_disassembler, needs_dsl
from tests.test_paged_dims import SMEM_OF_SM, Recorder, arguments, recorder

__all__ = ["recorder"]  # a fixture


def choose(head_dim: int, page_tokens: int, tile_m: int, **of_call: Any) -> PagedConfig:
    return paged.choose(PagedCall("bf16", head_dim, page_tokens, 4, **of_call), tile_m)


@pytest.mark.parametrize("page_tokens", [1, 64])
@pytest.mark.parametrize("tile_m", [64, 128])
@pytest.mark.parametrize("chunked", [False, True])
def test_every_pair_of_dims_has_the_tiles_of_16_bits(
    page_tokens: int, tile_m: int, chunked: bool
) -> None:
    for head_dim in range(16, 257, 16):
        for v_head_dim in range(16, head_dim + 1, 16):
            if chunked and tile_m > tallest_tile(v_head_dim):
                continue
            of_call = {"v_head_dim": v_head_dim, "chunked": chunked}
            c = choose(head_dim, page_tokens, tile_m, kv_dtype="e4m3", **of_call)
            assert paged.illegal_reason(c) is None
            assert c.ctas_per_sm * (c.smem_bytes + 1024) <= SMEM_OF_SM
            wide = choose(head_dim, page_tokens, tile_m, **of_call)
            assert (c.tile_n, c.ctas_per_sm) == (wide.tile_n, wide.ctas_per_sm)
            assert c.kv_load == wide.kv_load


@pytest.mark.parametrize("page_tokens", [1, 64])
@pytest.mark.parametrize("tile_m", [64, 128])
@pytest.mark.parametrize("chunked", [False, True])
def test_expanded_pages_have_the_kernels_of_fp16(
    page_tokens: int, tile_m: int, chunked: bool
) -> None:
    """Of the same tiles, but with scales, and with products of fp16 whatever q is."""
    for head_dim in range(16, 257, 16):
        if chunked and tile_m > tallest_tile(head_dim):
            continue
        expanded = choose(head_dim, page_tokens, tile_m, expanded=True, chunked=chunked)
        plain = choose(head_dim, page_tokens, tile_m, chunked=chunked)
        assert paged.illegal_reason(expanded) is None
        assert expanded == replace(plain, expanded=True)
        assert (expanded.scaled, plain.scaled) == (True, False)


# (tile_n, stages of fp8, of K and of V in fp16, Q in registers, CTAs of an SM, registers)
@pytest.mark.parametrize(
    ("head_dim", "tile_m", "expected"),
    [
        (64, 64, (128, 3, 2, 2, True, 2, 72, 184)),
        (128, 64, (64, 3, 2, 2, True, 2, 72, 184)),
        (128, 128, (128, 2, 2, 2, False, 1, 72, 216)),
        (256, 64, (64, 2, 2, 2, False, 1, 72, 248)),
        (256, 128, (64, 2, 2, 1, False, 1, 72, 216)),
    ],
)
def test_configurations(head_dim: int, tile_m: int, expected: tuple[int, ...]) -> None:
    for page_tokens in (64, 1):
        c = choose(head_dim, page_tokens, tile_m, kv_dtype="e5m2")
        found = (c.tile_n, c.stages, c.wide_k_stages, c.wide_v_stages, c.q_registers, c.ctas_per_sm)
        assert (*found, c.producer_registers, c.consumer_registers) == expected
        of_a_warp = 32 if (head_dim, tile_m) == (256, 128) else 64
        assert (c.converting_warps, c.converted_rows) == (2, of_a_warp)
        assert c.loading_warps + c.converting_warps <= 4


@pytest.mark.parametrize(
    ("dims", "message"),
    [
        ((72, 72), "head_dim of fp8 pages must be a multiple of 16, got 72"),
        ((128, 72), "v_head_dim of fp8 pages must be a multiple of 16, got 72"),
    ],
)
def test_dims_without_a_kernel_are_named(
    recorder: Recorder,
    dims: tuple[int, int],
    message: str,
) -> None:
    given = arguments(*dims)
    given |= {name: given[name].to(torch.float8_e4m3fn) for name in ("k_pages", "v_pages")}
    with pytest.raises(ValueError, match=message):
        flashcore.paged_attention(**given)
    assert recorder.calls == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kv_dtype": "e3m4"}, "kv_dtype 'e3m4' is not one of"),
        ({"kv_dtype": ""}, "stages of fp16 and their warps are for fp8 pages"),
        ({"expanded": True}, "expanded pages are not of fp8"),
        ({"wide_k_stages": 0}, "at least one stage of fp16"),
        ({"converting_warps": 3}, "3 converting warps: each takes the same parts of all tiles"),
        ({"converting_warps": 4}, "4 converting warps beside 1 that load"),
        ({"converting_warps": 3, "kv_load": "gather"}, "3 converting warps beside 2 that load"),
        ({"converted_rows": 24}, "converted_rows 24: multiples of 16 that divide tile_n"),
        ({"wide_v_stages": 3}, "bytes of shared memory exceed 115712"),
    ],
)
def test_what_cannot_run_is_named(changes: dict[str, Any], message: str) -> None:
    config = replace(choose(128, 64, 64, kv_dtype="e4m3"), **changes)
    assert message in str(paged.illegal_reason(config))
    with pytest.raises(ValueError, match="kv_dtype must be one of"):
        choose(128, 64, 64, kv_dtype="e3m4")


RULES: dict[str, Any] = {"window": True, "softcap": True, "sinks": True, "tree": True}


@needs_dsl
@needs_disassembler
@pytest.mark.parametrize(
    ("dims", "page_tokens", "tile_m", "kv_dtype", "rules"),
    [
        ((128, 128), 64, 64, "e4m3", {}),
        ((128, 128), 1, 64, "e5m2", RULES),
        ((128, 128), 16, 128, "e4m3", RULES),
        ((80, 80), 1, 64, "e4m3", {}),
        ((128, 128), 64, 64, "e4m3", {"softcap": True, "sinks": True}),
        ((128, 128), 64, 64, "e5m2", {"window": True, "softcap": True, "sinks": True}),
        ((128, 128), 1, 64, "e4m3", {"window": True, "sinks": True}),
        ((64, 64), 1, 64, "e4m3", {"window": True, "softcap": True, "sinks": True}),
        ((64, 64), 64, 64, "e5m2", {"softcap": True}),
        ((256, 256), 1, 64, "e4m3", {"softcap": True, "sinks": True}),
        ((192, 128), 64, 64, "e4m3", RULES),
        ((256, 256), 64, 64, "e4m3", RULES),
        ((256, 256), 1, 128, "e4m3", {}),
        ((256, 256), 64, 128, "e4m3", {}),
        ((128, 128), 64, 64, "e4m3", {"chunked": True}),
        ((128, 128), 1, 128, "e4m3", {"chunked": True, **RULES}),
        ((256, 256), 64, 64, "e5m2", {"chunked": True, **RULES}),
    ],
)
def test_kernels_pass_the_gates(
    dims: tuple[int, int], page_tokens: int, tile_m: int, kv_dtype: str, rules: dict[str, Any]
) -> None:
    from flashcore.sm90.kernels.attention.paged.few_rows.shape import shapes_of

    config = choose(
        dims[0], page_tokens, tile_m, v_head_dim=dims[1], kv_dtype=kv_dtype,
        device_counts=True, **rules,
    )  # fmt: skip
    verdict = check_kernel(Kernel(PAGED, config), default_folder(), detect_target())
    assert verdict.violations == []
    resources = verdict.resources
    assert resources is not None
    assert resources.dynamic_smem_bytes is not None
    assert config.ctas_per_sm * (resources.dynamic_smem_bytes + 1024) <= SMEM_OF_SM
    # One instruction for two values, of a part of K and of V, and of V with rows that are zeroed.
    opcode = f"F2FP.F16.{kv_dtype.upper()}.UNPACK_B"
    copies = 1 if config.window else 2
    values = config.converted_rows * (config.k_columns + copies * config.v_columns)
    # And what warps have from stages of fp8, in each shape; with a window what is finite of V too,
    # and flags of what is not, of e4m3 the same for both signs.
    copies = (3 if kv_dtype == "e4m3" else 4) if config.window else 1
    columns = config.k_columns + copies * config.v_columns
    values += sum(16 * shape.key_blocks * columns for shape in shapes_of(config))
    assert resources.count(opcode) == values // 64
    assert resources.count("HMMA.16816.F32") >= len(shapes_of(config)) * columns // 16
