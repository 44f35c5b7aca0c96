"""The converting kernel's barriers: loads, converting warps and consumers with delays at random.

Barriers are those of the hardware: who waits knows the parity of a phase alone. Every stage holds
the number of its tile instead of values, so that what is read too early, or written while it is
read, shows.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, field
from random import Random

CONSUMER_WARPS = 4


class Barrier:
    """An mbarrier."""

    def __init__(self, arrivals: int) -> None:
        self.arrivals = self.pending = arrivals
        self.phase = 0

    def arrive(self) -> None:
        self.pending -= 1
        if not self.pending:
            self.pending, self.phase = self.arrivals, self.phase + 1

    def completed(self, parity: int) -> bool:
        return self.phase % 2 != parity


class Ring:
    """Stages with a tile in each, or in each part of it."""

    def __init__(self, stages: int, parts: int, writers: int, readers: int) -> None:
        self.stages = stages
        self.full = [Barrier(writers) for _ in range(stages)]
        self.empty = [Barrier(readers) for _ in range(stages)]
        self.tiles = [[-1] * parts for _ in range(stages)]
        self.readers = [0] * stages

    def may_write(self, tile: int) -> bool:
        return self.empty[tile % self.stages].completed(tile // self.stages % 2 ^ 1)

    def may_read(self, tile: int) -> bool:
        return self.full[tile % self.stages].completed(tile // self.stages % 2)


@dataclass
class Kernel:
    """A CTA's items, each so many tiles; delays are multiples of a time for each kind."""

    items: list[int]
    random: Random
    warps: int
    parts: int
    stages: int
    wide_stages: tuple[int, int]
    load_time: float
    convert_time: float
    softmax_time: float
    few: list[bool] | None = None  # items that consumers have from the stages of fp8, if any may be
    careless: bool = False  # converting warps do not wait for the tiles of such items
    faults: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        # Of a part, those of the consumers too by the warp that has converted it.
        self.arrivals = (
            1 if self.few is None else CONSUMER_WARPS // self.parts + (not self.careless)
        )
        self.few = self.few or [False] * len(self.items)
        self.narrow = {x: Ring(self.stages, 1, 1, self.parts * self.arrivals) for x in "kv"}
        self.published = 0
        self.wide = {
            x: Ring(stages, self.parts, self.parts, CONSUMER_WARPS)
            for x, stages in zip("kv", self.wide_stages, strict=True)
        }

    def run(self) -> list[str]:
        """What went wrong; each warp goes on at the time that it has said."""
        self.processes = warps = [self._load(), *map(self._convert, range(self.warps))]
        warps += [self._consume() for _ in range(CONSUMER_WARPS)]
        self.waiting = waiting = [(0.0, number) for number in range(len(warps))]
        for _ in range(200_000):
            if not waiting or self.faults:
                return self.faults
            now, number = heapq.heappop(waiting)
            self.now = now
            delay = next(warps[number], None)
            if delay is not None:
                heapq.heappush(waiting, (now + delay, number))
        return ["it does not end"]

    def _load(self) -> Iterator[float]:
        """Publishes an item once the loads of the one before it are on their way."""
        first = 0
        for tiles in self.items:
            self.published += 1
            order = [("k", first)]
            for tile in range(first, first + tiles - 1):
                order += [("k", tile + 1), ("v", tile)]
            for kind, tile in [*order, ("v", first + tiles - 1)]:
                while not self.narrow[kind].may_write(tile):
                    yield self.random.random()
                self.processes.append(self._land(self.narrow[kind], tile))
                heapq.heappush(self.waiting, (self.now, len(self.processes) - 1))
                yield self.random.random() * 0.1
            first += tiles

    def _land(self, ring: Ring, tile: int) -> Iterator[float]:
        ring.tiles[tile % ring.stages] = [-1]
        yield self.random.random() * self.load_time
        ring.tiles[tile % ring.stages] = [tile]
        ring.full[tile % ring.stages].arrive()

    def _convert(self, part: int) -> Iterator[float]:
        end = unconverted = 0
        for number, tiles in enumerate(self.items):
            while self.published <= number:
                yield self.random.random()
            end += 2 * self.parts * tiles
            unconverted += tiles * self.few[number]
            while part < end:
                tile, place = divmod(part, 2 * self.parts)
                kind = "k" if place < self.parts else "v"
                if not self.few[number]:
                    yield from self._convert_part(kind, tile, place, tile - unconverted)
                elif not self.careless:
                    yield from self._await_loaded(kind, tile, "passed over")
                    self.narrow[kind].empty[tile % self.stages].arrive()
                part += self.warps

    def _convert_part(self, kind: str, tile: int, place: int, converted: int) -> Iterator[float]:
        narrow, wide = self.narrow[kind], self.wide[kind]
        target = converted % wide.stages
        yield from self._await_loaded(kind, tile, "converted")
        while not wide.may_write(converted):
            yield self.random.random()
        yield self.random.random() * self.convert_time
        if narrow.tiles[tile % narrow.stages] != [tile]:
            self.faults.append(f"{kind} {tile} is gone before it is converted")
        if wide.readers[target]:
            self.faults.append(f"{kind} {tile} is written while its stage is read")
        wide.tiles[target][place % self.parts] = tile
        wide.full[target].arrive()
        for _ in range(self.arrivals):
            narrow.empty[tile % narrow.stages].arrive()

    def _await_loaded(self, kind: str, tile: int, what: str) -> Iterator[float]:
        narrow = self.narrow[kind]
        while not narrow.may_read(tile):
            yield self.random.random()
        if narrow.tiles[tile % narrow.stages] != [tile]:
            self.faults.append(f"{kind} {tile} is {what} before it is there")

    def _consume(self) -> Iterator[float]:
        first = converted = 0
        for number, tiles in enumerate(self.items):
            while self.published <= number:
                yield self.random.random()
            if self.few[number]:
                yield from self._consume_few(first, tiles)
            else:
                yield from self._consume_item(first, converted, tiles)
                converted += tiles
            first += tiles

    def _consume_few(self, first: int, tiles: int) -> Iterator[float]:
        """The stages of the last tile are kept until all warps' sums have been in them."""
        for tile in range(first, first + tiles):
            for kind in "kv":
                yield from self._await_loaded(kind, tile, "read as it is")
                yield self.random.random() * self.softmax_time / 2
                if self.narrow[kind].tiles[tile % self.stages] != [tile]:
                    self.faults.append(f"{kind} {tile} is gone while it is read as it is")
                if tile < first + tiles - 1:
                    self.narrow[kind].empty[tile % self.stages].arrive()
        yield self.random.random()
        for kind in "kv":
            self.narrow[kind].empty[(first + tiles - 1) % self.stages].arrive()

    def _consume_item(self, first: int, converted: int, tiles: int) -> Iterator[float]:
        """first: tile of all; converted: of those in stages of fp16."""
        yield from self._read("k", first, converted)
        yield self.random.random() * 0.3
        self._free("k", converted)
        yield self.random.random() * self.softmax_time
        for n in range(1, tiles):
            yield from self._read("k", first + n, converted + n)
            yield from self._read("v", first + n - 1, converted + n - 1)
            yield self.random.random() * 0.3
            self._free("k", converted + n)
            yield self.random.random() * self.softmax_time
            self._free("v", converted + n - 1)
        yield from self._read("v", first + tiles - 1, converted + tiles - 1)
        yield self.random.random() * 0.3
        self._free("v", converted + tiles - 1)

    def _read(self, kind: str, tile: int, converted: int) -> Iterator[float]:
        ring = self.wide[kind]
        while not ring.may_read(converted):
            yield self.random.random()
        if set(ring.tiles[converted % ring.stages]) != {tile}:
            self.faults.append(f"{kind} {tile} is read from {ring.tiles[converted % ring.stages]}")
        ring.readers[converted % ring.stages] += 1

    def _free(self, kind: str, converted: int) -> None:
        ring = self.wide[kind]
        ring.readers[converted % ring.stages] -= 1
        ring.empty[converted % ring.stages].arrive()
