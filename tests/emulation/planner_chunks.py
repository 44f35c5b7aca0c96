"""As `planner_emulation`, with what the kernels do more for chunks (owners.py)."""

from __future__ import annotations

from flashcore.contract.counts import Count
from flashcore.contract.scratch import Entries as E
from tests.emulation.planner import Emulation


class ChunkEmulation(Emulation):
    """Stands in for the launch of the kernels of a batch-invariant planner."""

    def claim(self) -> None:
        super().claim()
        there = int(self.p["counts"][Count.NNZ])
        self.entries[E.DIFFERS, :there] = self.entries[E.CHUNK_USES, :there] = 0
        for e in self.any_order(there):
            self.compare(e)
        for e in self.any_order(there):
            if self.active(self.entries[E.ROW, e]):
                begin, owner = self.owning_chunk(e)
                if begin == e:
                    self.entries[E.CHUNK_USES, owner] += 1

    def compare(self, e: int) -> None:
        if not self.active(self.entries[E.ROW, e]):
            return
        begin, twin = self.twin_of_chunk(e)
        at = twin + e - begin
        for name in ("cols", "token_counts"):
            if self.p[name][at] != self.p[name][e]:
                self.entries[E.DIFFERS, begin] = 1

    def chunk_pages(self, row: int) -> int:
        short, long, few = self.chunk_numbers
        return long if self.queries_of(row) > few else short

    def chunk_of(self, e: int) -> tuple[int, int, bool]:
        row = self.entries[E.ROW, e]
        first, end = self.p["row_offsets"][row : row + 2].tolist()
        pages = self.chunk_pages(row)
        begin = e - (e - first) % pages
        last = min(begin + pages, end) - 1
        return begin, last, begin == first and last + 1 == end

    def twin_of_chunk(self, e: int) -> tuple[int, int]:
        begin, last, alone = self.chunk_of(e)
        owner = self.owner_and_uses(last)[0]
        other, other_last, other_alone = self.chunk_of(owner)
        alike = (other_last, other_last - other, other_alone) == (owner, last - begin, alone)
        return begin, other if alike else begin

    def owning_chunk(self, e: int) -> tuple[int, int]:
        begin, twin = self.twin_of_chunk(e)
        return begin, begin if self.entries[E.DIFFERS, begin] else twin

    def owner_of(self, e: int) -> tuple[int, int]:
        begin, owner = self.owning_chunk(e)
        return owner + e - begin, int(self.entries[E.CHUNK_USES, owner])

    def pages_of_split(self, entry: int, pages: int, balanced: int, split: bool) -> int:
        if not split:
            return pages
        return min(pages, self.chunk_pages(self.entries[E.ROW, entry]))
