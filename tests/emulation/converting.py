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
    faults: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.narrow = {x: Ring(self.stages, 1, 1, self.parts) for x in "kv"}
        self.wide = {
            x: Ring(stages, self.parts, self.parts, CONSUMER_WARPS)
            for x, stages in zip("kv", self.wide_stages, strict=True)
        }

    def run(self) -> list[str]:
        """What went wrong; each warp goes on at the time that it has said."""
        warps = [self._load(), *map(self._convert, range(self.warps))]
        warps += [self._consume() for _ in range(CONSUMER_WARPS)]
        waiting = [(0.0, number) for number in range(len(warps))]
        for _ in range(200_000):
            if not waiting or self.faults:
                return self.faults
            now, number = heapq.heappop(waiting)
            delay = next(warps[number], None)
            if delay is not None:
                heapq.heappush(waiting, (now + delay, number))
        return ["it does not end"]

    def _load(self) -> Iterator[float]:
        first = 0
        for tiles in self.items:
            order = [("k", first)]
            for tile in range(first, first + tiles - 1):
                order += [("k", tile + 1), ("v", tile)]
            for kind, tile in [*order, ("v", first + tiles - 1)]:
                ring = self.narrow[kind]
                while not ring.may_write(tile):
                    yield self.random.random()
                yield self.random.random() * self.load_time
                ring.tiles[tile % ring.stages] = [tile]
                ring.full[tile % ring.stages].arrive()
            first += tiles

    def _convert(self, part: int) -> Iterator[float]:
        while part < 2 * self.parts * sum(self.items):
            tile, place = divmod(part, 2 * self.parts)
            kind = "k" if place < self.parts else "v"
            narrow, wide = self.narrow[kind], self.wide[kind]
            source, target = tile % narrow.stages, tile % wide.stages
            while not narrow.may_read(tile):
                yield self.random.random()
            while not wide.may_write(tile):
                yield self.random.random()
            yield self.random.random() * self.convert_time
            if narrow.tiles[source] != [tile]:
                self.faults.append(f"{kind} {tile} is converted before it is there")
            if wide.readers[target]:
                self.faults.append(f"{kind} {tile} is written while its stage is read")
            wide.tiles[target][place % self.parts] = tile
            wide.full[target].arrive()
            narrow.empty[source].arrive()
            part += self.warps

    def _consume(self) -> Iterator[float]:
        first = 0
        for tiles in self.items:
            yield from self._read("k", first)
            yield self.random.random() * 0.3
            self._free("k", first)
            yield self.random.random() * self.softmax_time
            for tile in range(first + 1, first + tiles):
                yield from self._read("k", tile)
                yield from self._read("v", tile - 1)
                yield self.random.random() * 0.3
                self._free("k", tile)
                yield self.random.random() * self.softmax_time
                self._free("v", tile - 1)
            first += tiles
            yield from self._read("v", first - 1)
            yield self.random.random() * 0.3
            self._free("v", first - 1)

    def _read(self, kind: str, tile: int) -> Iterator[float]:
        ring = self.wide[kind]
        while not ring.may_read(tile):
            yield self.random.random()
        if set(ring.tiles[tile % ring.stages]) != {tile}:
            self.faults.append(f"{kind} {tile} is read from {ring.tiles[tile % ring.stages]}")
        ring.readers[tile % ring.stages] += 1

    def _free(self, kind: str, tile: int) -> None:
        ring = self.wide[kind]
        ring.readers[tile % ring.stages] -= 1
        ring.empty[tile % ring.stages].arrive()
