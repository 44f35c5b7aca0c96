"""Two small kernels for the runtime's tests: one that is quick to compile, one with TMA and WGMMA.

`TileConfig` plants the faults that the static gates must find.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class TileConfig:
    """out[64, 64] = a[64, 64 * steps] @ b[64, 64 * steps]^T, one CTA, one warpgroup."""

    steps: int = 4  # tiles of 64 columns, each with 4 HGMMA
    fence_each: bool = False  # one WARPGROUP.ARRIVE for each HGMMA: serialised products
    tma: bool = True  # False: load by ordinary copies
    tensor_cores: bool = True  # False: only move data
    local_array: int = 0  # floats indexed at run time, which cannot stay in registers
    extra_smem_bytes: int = 0


def compile_tile(config: TileConfig, options: str = "") -> Any:
    """Compile the tile kernel; imports the CuTe DSL."""
    from tests import toy_kernels_device

    return toy_kernels_device.compile_tile(config, options)
