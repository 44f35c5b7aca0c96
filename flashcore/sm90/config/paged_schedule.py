"""How a paged kernel shares out an SM: tiles, stages, CTAs and registers, by dimensions and rows.

`config.paged.choose` makes a `PagedConfig` of it. Imports neither torch nor the DSL.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from flashcore.contract.chunks import tallest_tile
from flashcore.sm90.config.dense import (
    HEAD_DIMS,
    SMEM_BYTES_PER_SM90_CTA,
    WARPGROUP_ROWS,
)

LARGEST_DIM = HEAD_DIMS[-1]
SMEM_BYTES_RESERVED_PER_CTA = 1024
KV_BYTES_PER_SM = 128 << 10
"""Stages of K and V of all CTAs of an SM. One CTA alone reads 56 GB/s with its half of them; with
192 KB, queues in front of the DRAM made it up to 2 % slower."""
MOST_STAGES = 4


def tile_columns(dim: int) -> int:
    """The narrowest tile that holds rows of `dim` columns; `dim` itself where none does.

    The swizzles want whole 32 columns, and the dense kernel's tiles are known to be fast.
    """
    return next((columns for columns in HEAD_DIMS if columns >= dim), dim)


class Tile(NamedTuple):
    """What decides on a schedule."""

    head_dim: int
    v_head_dim: int
    tile_m: int
    tile_n: int
    ctas: int  # of an SM
    chunked: bool

    @property
    def columns(self) -> int:
        """Of K and V in shared memory."""
        return tile_columns(self.head_dim) + tile_columns(self.v_head_dim)

    @property
    def q_bytes(self) -> int:
        """Of Q in shared memory."""
        return 2 * self.tile_m * tile_columns(self.head_dim)

    @property
    def kv_room(self) -> int:
        """Bytes that a CTA has beside Q and running totals."""
        totals = total_bytes(self.tile_m, self.v_head_dim) if self.chunked else 0
        return smem_bytes_of_cta(self.ctas) - 1024 - totals - self.q_bytes

    @property
    def fitting_stages(self) -> int:
        """Of 16 bits; two of them take the room of one of fp16 and two of fp8."""
        return self.kv_room // (2 * self.tile_n * self.columns)

    def wanted_stages(self, itemsize: int) -> int:
        """As many as come nearest to KV_BYTES_PER_SM on their way; padding is not read."""
        on_the_way = itemsize * self.ctas * self.tile_n * (self.head_dim + self.v_head_dim)
        return max(2, round(KV_BYTES_PER_SM / on_the_way))


def tile_of(head_dim: int, v_head_dim: int, tile_m: int, chunked: bool) -> Tile:
    """The same for fp8 and 16-bit pages, so that results are."""
    ctas = beside = ctas_per_sm(head_dim, tile_m, v_head_dim, chunked)
    if chunked:  # the order of sums is one for all tiles: that of the lower
        beside = ctas_per_sm(head_dim, WARPGROUP_ROWS, v_head_dim, True)
    # Wider tiles have fewer waits, as long as two stages of them are no more than is wanted.
    key_bytes = 2 * (head_dim + v_head_dim)
    tile_n = 128 if beside * 2 * 128 * key_bytes <= KV_BYTES_PER_SM else 64
    if chunked:  # padded rows of which two stages must fit beside the totals, in each height
        for rows in range(WARPGROUP_ROWS, tallest_tile(v_head_dim) + 1, WARPGROUP_ROWS):
            of_rows = ctas_per_sm(head_dim, rows, v_head_dim, True)
            if Tile(head_dim, v_head_dim, rows, tile_n, of_rows, True).fitting_stages < 2:
                tile_n = 64
    return Tile(head_dim, v_head_dim, tile_m, tile_n, ctas, chunked)


def ctas_per_sm(
    head_dim: int, tile_m: int, v_head_dim: int | None = None, chunked: bool = False
) -> int:
    """CTAs of the chosen kernel that an SM runs at once.

    Two where two stages of 64 keys each fit: while one changes items, the other reads. Measured for
    head_dim 128 over ten decode batches: 0 to 6 % faster than one CTA of the same rows in all but
    two; gathered pages of 1 token, 64 x 8192 with 90 % shared: 20 %.
    """
    v_head_dim = head_dim if v_head_dim is None else v_head_dim
    tile = Tile(head_dim, v_head_dim, tile_m, 64, 2, chunked)
    return 2 if tile_m == WARPGROUP_ROWS and tile.fitting_stages >= 2 else 1


def smem_bytes_of_cta(ctas: int) -> int:
    """Shared memory that each of `ctas` CTAs of an SM may take."""
    of_sm = SMEM_BYTES_PER_SM90_CTA + SMEM_BYTES_RESERVED_PER_CTA
    return of_sm // ctas - SMEM_BYTES_RESERVED_PER_CTA


def total_bytes(tile_m: int, v_head_dim: int) -> int:
    """Shared memory of a running total, and 1024 for the numbers about more than 64 rows."""
    return 4 * tile_m * tile_columns(v_head_dim) + (tile_m > WARPGROUP_ROWS) * 1024


def as_it_lies(tile: Tile, kv_load: str) -> dict[str, Any]:
    """Schedule of 16-bit pages. Gathered rows: as many stages as fit, at most four."""
    stages = tile.fitting_stages
    if kv_load == "tma":
        stages = min(stages, tile.wanted_stages(2))
    return {
        "tile_n": tile.tile_n,
        "stages": min(stages, MOST_STAGES),
        "ctas_per_sm": tile.ctas,
        "producer_registers": 40 if tile.ctas == 1 else 56,
        "consumer_registers": 200 if tile.ctas == 2 else registers_of_one(tile, 232),
    }


def converting(tile: Tile, *, window: bool, tree: bool, softcap: bool) -> dict[str, Any]:
    """Schedule of fp8 pages: two stages of fp16 each for K and V where they leave two of fp8, or
    two for K alone, or one each; the rest of the room is for what is on its way.

    Q in registers takes 32 of them for 128 columns, and from shared memory a seventh of its work;
    two warpgroups' products of 128 keys, and a window under a tree mask, have none to spare, and
    with masks two warpgroups have none for a second stage either. A warp
    converts 64 rows at a time: with half of that, what it waits for came up twice as often, 14 %
    of 32 x 8192 tokens; with a second stage of V this became 2 % less again, and 14 % where runs
    are long and shared (8 x 131072, 70 %).
    """
    in_registers = tile.ctas == 2 and tile.head_dim <= 128 and not (window and tree)
    room = tile.kv_room + in_registers * tile.q_bytes
    k_stage, v_stage = (
        2 * tile.tile_n * tile_columns(dim) for dim in (tile.head_dim, tile.v_head_dim)
    )
    narrow_stage = (k_stage + v_stage) // 2
    masked = window or tree or softcap
    warpgroups = tile.tile_m // WARPGROUP_ROWS
    widest = tile_columns(tile.v_head_dim) == LARGEST_DIM
    for wide in ((1, 1),) if masked and warpgroups > 1 else ((2, 2), (2, 1), (1, 1)):
        fitting = (room - wide[0] * k_stage - wide[1] * v_stage) // narrow_stage
        if fitting >= 2:
            break
    of_one = 248 if tile.tile_m == WARPGROUP_ROWS else 216
    return {
        "tile_n": tile.tile_n,
        "stages": min(fitting, tile.wanted_stages(1), MOST_STAGES),
        "ctas_per_sm": tile.ctas,
        "producer_registers": 72,
        "consumer_registers": 184 if tile.ctas == 2 else of_one,
        "q_registers": in_registers,
        "wide_k_stages": wide[0],
        "wide_v_stages": wide[1],
        "converting_warps": 2,
        # Beside two warpgroups of 256 columns a warp has no registers for more.
        "converted_rows": 32 if warpgroups > 1 and widest else min(tile.tile_n, 64),
    }


def registers_of_one(tile: Tile, usual: int) -> int:
    """Of a consumer thread of the only CTA; a warpgroup alone has more than any thread can use."""
    return 248 if tile.chunked and tile.tile_m == WARPGROUP_ROWS else usual
