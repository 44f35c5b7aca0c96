"""How four warps share an item of few rows, and where in a stage of fp8 a lane's operands are."""

from __future__ import annotations

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Int32, const_expr

from flashcore.sm90.config.paged import CONSUMER_WARPS, PagedConfig
from flashcore.sm90.kernels.attention.paged.work_loop import Item

CHUNK = 16  # columns of V, and rows of O^T, of a product; columns of K likewise
LANE_BYTES = 16  # of a row that one lane of ldmatrix has the address of


class Swizzled(NamedTuple):
    """A stage of fp8: blocks of columns of 64 or 128 bytes, rows swizzled over as many bytes.

    Bits 4 to 6 of an address are exchanged with 7 to 9, or 4 and 5 with 7 and 8.
    """

    columns: int
    tile_n: int

    @property
    def width(self) -> int:
        """Bytes of a row of a block."""
        return min(self.columns, 128)

    @property
    def stage_bytes(self) -> int:
        return self.tile_n * self.columns

    def turn(self, row):
        """What the 16-byte chunks of a row are exchanged by."""
        return row % 8 if self.width == 128 else row // 2 % 4

    def row_offset(self, row):
        return row * self.width

    def lane_offset(self, lane):
        """Of the four matrices: keys 0 to 7, keys 8 to 15; then the next 16 columns of both."""
        row = lane % 16
        return row * self.width + (lane // 16 ^ self.turn(row)) * LANE_BYTES

    def address(self, at, key_block: int, pair: int):
        """Of a lane, from `at` of its pair 0 of chunks and its block 0 of 16 keys."""
        pairs = self.width // (2 * CHUNK)
        block, bits = pair // pairs, pair % pairs * (2 * CHUNK)
        return (at ^ bits) + (key_block * CHUNK * self.width + block * self.tile_n * self.width)


class Shape(NamedTuple):
    """How many rows there are, and who has which, in blocks of 8 rows and of 16 keys."""

    config: PagedConfig
    blocks: int  # of rows, of a warp
    row_warps: int  # warps that have the same keys of a tile, with other rows

    @property
    def rows(self) -> int:
        """Of an item at most."""
        return 8 * self.blocks * self.row_warps

    @property
    def key_warps(self) -> int:
        """Warps that have the same rows, with other keys."""
        return CONSUMER_WARPS // self.row_warps

    @property
    def key_blocks(self) -> int:
        """Of a warp in a tile."""
        return self.config.tile_n // (16 * self.key_warps)

    @property
    def k(self) -> Swizzled:
        return Swizzled(self.config.k_columns, self.config.tile_n)

    @property
    def v(self) -> Swizzled:
        return Swizzled(self.config.v_columns, self.config.tile_n)

    @property
    def k_steps(self) -> int:
        return self.config.k_columns // CHUNK

    @property
    def v_chunks(self) -> int:
        return self.config.v_columns // CHUNK

    @property
    def chains(self) -> int:
        """Sums of products of keys, where one warp has no others to go on with."""
        return 2 if self.blocks == 1 else 1


def shapes_of(config: PagedConfig) -> list[Shape]:
    """For up to 8 rows, and one for up to 16 or 32, as the configuration goes."""
    shapes = {0: [], 8: [(1, 1)], 16: [(1, 1), (2, 1)], 32: [(1, 1), (2, 2)]}
    return [Shape(config, *of) for of in shapes[config.few_rows]]


class Warp(NamedTuple):
    """What a warp has of an item; of its lanes' rows 2 t and 2 t + 1 of each block."""

    queries: cute.Tensor  # words (2, step, block) of fp16
    low: cute.Tensor  # (2 x block): keys low .. high - 1 are visible
    high: cute.Tensor
    out: cute.Tensor  # O^T: (4, chunk of 16 columns, block)
    peak: cute.Tensor  # (2 x block), of log2 units: P is of scores less this
    total: cute.Tensor  # of this lane's keys


@cute.jit
def sees(
    window: cutlass.Constexpr[bool], warp: Warp, r: cutlass.Constexpr[int], key: Int32
) -> Boolean:
    """Whether one of a lane's rows sees a key."""
    seen = Boolean(key < warp.high[r])
    if const_expr(window):
        seen = seen and key >= warp.low[r]
    return seen


@cute.jit
def takes(config: cutlass.Constexpr[PagedConfig], item: Item) -> Boolean:
    """Whether an item goes this way. Consumers and converting warps ask the same of it."""
    return item.num_rows <= config.few_rows and item.end > item.first
