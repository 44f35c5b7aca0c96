"""K and V of fp8 pages on their way to the products: converted to fp16 in shared memory.

    pages ── TMA or cp.async ──► ring of fp8 ── converting warps ──► stages of fp16 ──► WGMMA

Every fp8 value is a value of fp16, so nothing is rounded. The converting warps take parts of tiles
in turn, in one order for all items: a tile of K, then V of the same keys. No part waits for one
after it: products of K come before those of V, and those of V a tile later. A warp has the same
parts of every tile, or it could not tell the stage that it waits for from the one two tiles ago.
"""

from __future__ import annotations

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Float8E4M3FN, Float8E5M2, Float16, Float32, Int32, Uint32, const_expr

from flashcore.sm90.config.paged import PagedConfig, rows_at_a_time
from flashcore.sm90.kernels.attention.paged import work_loop
from flashcore.sm90.kernels.attention.paged.few_rows.shape import Swizzled, takes
from flashcore.sm90.kernels.attention.paged.intervals import Rows
from flashcore.sm90.kernels.attention.paged.operands import Operands
from flashcore.sm90.kernels.attention.paged.pages import VECTOR
from flashcore.sm90.kernels.attention.paged.work_loop import Item, Slot
from flashcore.sm90.kernels.attention.parts import matmul, pipelines
from flashcore.sm90.kernels.attention.parts.consumer import ROWS
from flashcore.sm90.kernels.attention.parts.softmax import Scale

CHUNK = 16  # fp8 values of a 16-byte load, and of two 16-byte stores
WORDS = 4  # of 16 bytes
LOADS_AHEAD = 4  # 16-byte loads of a lane in flight
LARGEST_FP16 = 65504.0


class Lanes(NamedTuple):
    """How a warp goes over a tile, a 16-byte chunk of fp8 for each lane and step.

    A step has `rows` rows and `block` columns, which are a row of the swizzle in fp16: 128 bytes,
    or 64 where columns are not whole 64. Eight lanes load 128 bytes from all banks and store to
    all banks: even rows meet even 16-byte chunks of the swizzle where odd rows meet odd ones. Where
    rows of fp8 are whole 128 bytes, odd rows take the other half of them, or the chunks of two rows
    would be in the same banks. That holds where fp8 is swizzled too: rows next to each other have
    chunks exchanged within the same half, or within opposite ones.
    """

    columns: int
    tile_n: int
    swizzled: Swizzled | None = None  # stages of fp8, where they are

    @property
    def block(self) -> int:
        return 64 if self.columns % 64 == 0 else 32

    @property
    def chunks(self) -> int:
        """Of a row of a step."""
        return self.block // CHUNK

    @property
    def rows(self) -> int:
        return 32 // self.chunks

    @property
    def crossed(self) -> bool:
        return self.columns % 128 == 0

    def steps(self, rows: int) -> list[tuple[int, int]]:
        """(first row, block of columns) of the steps of so many rows."""
        blocks = self.columns // self.block
        return [(row, b) for row in range(0, rows, self.rows) for b in range(blocks)]

    def _column_block(self, row, parity: int):
        """Of a lane's row, from the step's own block, less that block's parity."""
        return (row + parity) % 2 if self.crossed else parity

    def source(self, lane, parity: int):
        """Byte of the fp8 tile that a lane loads from, in step (0, parity)."""
        row = lane // self.chunks
        in_row = self._column_block(row, parity) * self.block + lane % self.chunks * CHUNK
        if self.swizzled is not None:
            in_row = in_row ^ self.swizzled.turn(row) * CHUNK
        return self.source_rows(row) + in_row

    def target(self, lane, parity: int, second: int):
        """Byte of the fp16 tile that a lane's store 0 or 1 goes to, in step (0, parity)."""
        row = lane // self.chunks
        # Bits 4 to 6 of an address are exchanged with 7 to 9; with rows of 64 bytes, 4 and 5.
        swizzle = row % 8 if self.block == 64 else row // 2 % 4
        chunk = (2 * (lane % self.chunks) + second) ^ swizzle
        return (
            row * 2 * self.block + chunk * 16 + self._column_block(row, parity) * self.block_bytes
        )

    @property
    def block_bytes(self) -> int:
        """Of a block of columns in an fp16 tile."""
        return self.tile_n * self.block * 2

    def source_step(self, row: int, block: int) -> int:
        """Bytes from step (0, parity of block) to step (row, block)."""
        if self.swizzled is not None:
            return self.source_rows(row) + block // 2 * self.tile_n * self.swizzled.width
        return self.source_rows(row) + block // 2 * 2 * self.block

    def source_rows(self, row):
        """Bytes of so many rows of fp8, of a block of columns where they are swizzled."""
        return row * (self.columns if self.swizzled is None else self.swizzled.width)

    def target_step(self, row: int, block: int) -> int:
        return row * 2 * self.block + block // 2 * 2 * self.block_bytes


class Side(NamedTuple):
    """K or V: where its stages of fp8 and of fp16 are, by byte address, and their rings."""

    narrow: Int32
    wide: Int32
    loaded: object  # ring of fp8
    converted: object  # ring of fp16
    stages: int  # of fp16


def clears_v(config: PagedConfig) -> bool:
    """Whether the converting warps zero the rows of V that no row of an item sees, which are those
    of its end. Of a window's edges consumers see to more (nonfinite.py)."""
    return config.kv_dtype != "" and not config.window


@cute.jit
def convert_items(
    config: cutlass.Constexpr[PagedConfig],
    k: Side,
    v: Side,
    slot: Slot,
    turn: Int32,  # of this warp among those that convert
):
    """Every `converting_warps`-th part of all items' tiles."""
    c = config
    parts = const_expr(c.converted_parts)
    part, begin, slot_phase = turn, Int32(0), Int32(0)
    unconverted = Int32(0)  # tiles of items that consumers have from the stages of fp8
    item = work_loop.await_item(slot, slot_phase)
    while item.valid >= 0:
        slot_phase ^= 1
        if item.end > item.first:
            # Of its last tile, which comes first; rows beyond are of no token and may be NaN.
            first, seen = begin // const_expr(2 * parts), item.high - (item.end - 1) * c.tile_n
            begin += (item.end - item.first) * const_expr(2 * parts)
            if const_expr(c.few_rows > 0):
                if takes(c, item):
                    unconverted += item.end - item.first
                    while part < begin:
                        tile, place = part // const_expr(2 * parts), part % const_expr(2 * parts)
                        if place < parts:
                            pass_part(c, k, tile)
                        else:
                            pass_part(c, v, tile)
                        part += c.converting_warps
            while part < begin:
                tile, place = part // const_expr(2 * parts), part % const_expr(2 * parts)
                if place < parts:
                    convert_part(c, c.k_columns, k, tile, place, None, unconverted)
                elif const_expr(not clears_v(c)) or tile > first or seen >= c.tile_n:
                    convert_part(c, c.v_columns, v, tile, place - parts, None, unconverted)
                else:
                    convert_part(c, c.v_columns, v, tile, place - parts, seen, unconverted)
                part += c.converting_warps
        item = work_loop.await_item(slot, slot_phase)


@cute.jit
def convert_part(
    config: cutlass.Constexpr[PagedConfig],
    columns: cutlass.Constexpr[int],
    side: Side,
    tile: Int32,  # of all that there were of K or of V
    place: Int32,  # of the part in its tile
    seen: Int32 | None,  # rows of the tile that stay; zeros take the place of the others
    unconverted: Int32,  # tiles before it that have no stage of fp16
):
    """Wait for a tile of fp8, convert a part of it, hand both stages on."""
    c = config
    swizzled = const_expr(Swizzled(columns, c.tile_n) if c.few_rows else None)
    lanes = const_expr(Lanes(columns, c.tile_n, swizzled))
    lane = cute.arch.lane_idx()
    loaded = pipelines.state_at(tile, c.stages, False)
    converted = tile
    if const_expr(c.few_rows > 0):
        converted = tile - unconverted
    wide = pipelines.state_at(converted, side.stages, True)
    row = place * c.converted_rows
    source = side.narrow + loaded.index * (c.tile_n * columns) + lanes.source_rows(row)
    target = side.wide + wide.index * (2 * c.tile_n * columns) + row * (2 * lanes.block)
    sources = [source + lanes.source(lane, parity) for parity in range(2)]
    targets = [[target + lanes.target(lane, parity, h) for h in range(2)] for parity in range(2)]
    steps = const_expr(lanes.steps(c.converted_rows))
    batches = const_expr([steps[i : i + LOADS_AHEAD] for i in range(0, len(steps), LOADS_AHEAD)])
    side.loaded.consumer_wait(loaded)
    words = fetch(lanes, sources, batches[0])
    side.converted.producer_acquire(wide)
    for b in cutlass.range_constexpr(len(batches)):
        ahead = words
        if const_expr(b + 1 < len(batches)):
            ahead = fetch(lanes, sources, batches[b + 1])
        for i in cutlass.range_constexpr(len(batches[b])):
            first, block = batches[b][i]
            if const_expr(seen is not None):
                kept = row + first + lane // lanes.chunks < seen
                for w in cutlass.range_constexpr(WORDS):
                    words[i][w] = words[i][w] if kept else Uint32(0)
            values = widen(words[i], c.kv_dtype)
            for h in cutlass.range_constexpr(2):
                at = targets[block % 2][h] + lanes.target_step(first, block)
                cute.autovec_copy(values[None, h], vector(at, Float16))
        words = ahead
    side.converted.producer_commit(wide)
    if const_expr(c.few_rows > 0):
        pipelines.release(side.loaded, loaded, c.arrivals_of_a_part)
    else:
        side.loaded.consumer_release(loaded)


@cute.jit
def pass_part(config: cutlass.Constexpr[PagedConfig], side: Side, tile: Int32):
    """See a part of a tile come that the consumers read as it is.

    A warp that did not wait for it would take the parity of its stage's barrier for another's.
    """
    loaded = pipelines.state_at(tile, config.stages, False)
    side.loaded.consumer_wait(loaded)
    pipelines.release(side.loaded, loaded)


@cute.jit
def fetch(lanes: cutlass.Constexpr[Lanes], sources, steps: cutlass.Constexpr[list]):
    """A lane's loads of some steps."""
    batch = []
    for i in cutlass.range_constexpr(len(steps)):
        row, block = steps[i]
        words = cute.make_rmem_tensor(WORDS, Uint32)
        at = sources[block % 2] + lanes.source_step(row, block)
        cute.autovec_copy(vector(at, Uint32), words)
        batch.append(words)
    return batch


@cute.jit
def widen(words: cute.Tensor, kv_dtype: cutlass.Constexpr[str]) -> cute.Tensor:
    """16 fp8 values as fp16 (8, 2): one instruction for two of them."""
    wide = cute.make_rmem_tensor(CHUNK, Float16)
    narrow = cute.recast_tensor(words, Float8E4M3FN if kv_dtype == "e4m3" else Float8E5M2)
    wide.store(narrow.load().to(Float16))
    return cute.logical_divide(wide, CHUNK // 2)


def vector(address: Int32, dtype) -> cute.Tensor:
    """16 bytes of shared memory."""
    pointer = cute.make_ptr(dtype, address, cute.AddressSpace.smem, assumed_align=16)
    return cute.make_tensor(pointer, cute.make_layout(128 // dtype.width))


@cute.jit
def item_scale(
    config: cutlass.Constexpr[PagedConfig], scale: Scale, m: Operands, kv_head: Int32
) -> Scale:
    """`scale` times the K scale of a head: scores are of fp8 values as they are."""
    factor = m.k_scale[kv_head]
    if const_expr(config.softcap):
        result = Scale(scale.log2, scale.cap_factor * factor)
    else:
        result = Scale(scale.log2 * factor, scale.cap_factor)
    return result


@cute.jit
def load_queries(
    config: cutlass.Constexpr[PagedConfig],
    m: Operands,
    item: Item,
    rows: Rows,
    operand: cute.Tensor,  # of a warpgroup's QK: ((column pair, row, columns + 8), 1, step)
    thread_row: Int32,
    column: Int32,  # this thread's first
):
    """A thread's elements of Q, straight from memory to the registers that products read; those
    past num_rows are the first row's."""
    c = config
    words = cute.recast_tensor(operand, Uint32)  # (row, columns + 8) of each step
    for r in cutlass.range_constexpr(ROWS):
        row = thread_row + 8 * r
        packed = item.row_begin + (row if row < item.num_rows else Int32(0))
        head = item.kv_head * c.group_size + packed % c.group_size
        mRow = m.q[rows.token[r], head, None]
        for i in cutlass.range_constexpr(2 * c.k_steps):
            at = cute.recast_ptr((mRow.iterator + (8 * i + column)).align(4), dtype=Uint32)
            words[r + ROWS * i] = cute.make_tensor(at, cute.make_layout(1))[0]
    if const_expr(m.q.element_type is not Float16):
        for i in cutlass.range_constexpr(ROWS * 2 * c.k_steps):
            words[i] = pair_as_fp16(words[i])


@cute.jit
def pair_as_fp16(pair: Uint32) -> Uint32:
    """Two bf16 values: finite ones are clamped, what is infinite or NaN stays so."""
    wide = cute.make_rmem_tensor(2, Uint32)
    wide[0], wide[1] = pair << Uint32(16), pair & Uint32(0xFFFF0000)
    values = cute.recast_tensor(wide, Float32)
    for h in cutlass.range_constexpr(2):
        x = values[h]
        clamped = cute.arch.fmax(cute.arch.fmin(x, Float32(LARGEST_FP16)), Float32(-LARGEST_FP16))
        values[h] = clamped if x - x == 0.0 else x
    return Uint32(matmul.pack_pair(values[0], values[1], Float16))


QUERY_LOADS = 8  # 16-byte loads of a thread in flight


@cute.jit
def gather_queries(
    config: cutlass.Constexpr[PagedConfig],
    m: Operands,
    item: Item,
    sQ: cute.Tensor,  # (tile_m, columns), fp16
    first_row: Int32,  # of this warpgroup in the tile
    thread: Int32,  # in this warpgroup
):
    """This warpgroup's 64 packed rows of a bf16 Q as fp16: finite values beyond its largest become
    the largest. Rows past num_rows are zero, and so are columns past head_dim."""
    c = config
    vectors = const_expr(c.head_dim // VECTOR)
    step = const_expr(rows_at_a_time(c.k_columns, 1))
    lanes = const_expr(128 // step)  # of a row
    sVectors = cute.logical_divide(sQ, (None, VECTOR))
    copies = const_expr(
        [(i, j) for i in range(64 // step) for j in range(c.k_columns // VECTOR // lanes)]
    )
    for b in cutlass.range_constexpr(0, len(copies), QUERY_LOADS):
        batch = const_expr(copies[b : b + QUERY_LOADS])
        loaded = []
        for n in cutlass.range_constexpr(len(batch)):
            i, j = batch[n]
            row, column = first_row + i * step + thread // lanes, thread % lanes + lanes * j
            values = cute.make_rmem_tensor(VECTOR, m.q.element_type)
            values.fill(0.0)
            if row < item.num_rows and column < vectors:
                packed = item.row_begin + row
                token = m.q_tokens[packed // c.group_size]
                head = item.kv_head * c.group_size + packed % c.group_size
                src = cute.logical_divide(m.q[token, head, None], VECTOR)[None, column]
                cute.autovec_copy(cute.make_tensor(src.iterator.align(16), src.layout), values)
            loaded.append(values)
        for n in cutlass.range_constexpr(len(batch)):
            i, j = batch[n]
            row, column = first_row + i * step + thread // lanes, thread % lanes + lanes * j
            words = cute.recast_tensor(loaded[n], Uint32)
            for w in cutlass.range_constexpr(VECTOR // 2):
                words[w] = pair_as_fp16(words[w])
            cute.autovec_copy(cute.recast_tensor(words, Float16), sVectors[row, (None, column)])
