"""What a `DevicePlanner`'s kernels keep between their steps; planners that take turns can share it.

Little of it outlives an update, but that must: `PlannerScratch.reset` puts it back.
"""

from __future__ import annotations

from math import prod

import torch

from flashcore.contract import scratch as lines
from flashcore.contract.operands import PlannerMemory
from flashcore.planner.device_plan import Capacities


class PlannerScratch:
    """Scratch for planners of up to these capacities and page pools of up to `num_pages`.

    Planners whose updates follow one another (on one stream, or ordered by events) may have it
    together, whatever else they differ in: between updates it holds nothing of a plan.

    Args:
        max_batch, max_entries, max_segments, num_pages: as in `Capacities` and `DevicePlanner`.
        chunks: also for batch-invariant planners.
        device: where.
    """

    def __init__(
        self,
        max_batch: int,
        max_entries: int,
        max_segments: int,
        num_pages: int,
        *,
        chunks: bool = False,
        device: torch.device | str = "cuda",
    ):
        self.limits = {
            "max_batch": max_batch,
            "max_entries": max_entries,
            "max_segments": max_segments,
            "num_pages": num_pages,
        }
        self.chunks = chunks
        shapes = _shapes(max_batch, max_entries, max_segments, num_pages, chunks)
        tiles = (lines.Tiles.LINES, lines.SCAN_THREADS)
        self.memory = PlannerMemory(
            **{
                name: torch.zeros(shape, dtype=torch.int32, device=device)
                for name, shape in shapes.items()
            },
            tiles=torch.zeros(tiles, dtype=torch.int64, device=device),
        )
        self.reset()

    def reset(self) -> None:
        """Put back what updates rely on, on the current stream and without waiting: after the
        memory has been given back and taken again, which leaves anything in it. Launches alone, so
        it can be called between updates at any time."""
        memory = self.memory
        memory.slots.zero_()
        memory.slots[:, lines.Slots.FIRST].fill_(lines.UNUSED)
        memory.rows[lines.Rows.PAGE_FAULT].zero_()
        memory.tiles.zero_()

    @staticmethod
    def bytes_of(
        max_batch: int, max_entries: int, max_segments: int, num_pages: int, chunks: bool = False
    ) -> int:
        """What `PlannerScratch` of these arguments takes."""
        shapes = _shapes(max_batch, max_entries, max_segments, num_pages, chunks)
        return 4 * sum(map(prod, shapes.values())) + 8 * lines.Tiles.LINES * lines.SCAN_THREADS

    def lent(self, c: Capacities, num_pages: int, chunks: bool) -> PlannerMemory:
        """What the kernels of a planner of these capacities are given.

        Raises ValueError where the scratch is too small for it."""
        for name, most in self.limits.items():
            wanted = num_pages if name == "num_pages" else getattr(c, name)
            if wanted > most:
                raise ValueError(f"scratch has {name} {most}, the planner's is {wanted}")
        if chunks and not self.chunks:
            raise ValueError("scratch of a batch_invariant planner must be made with chunks=True")
        entries = self.memory.entries
        return self.memory._replace(entries=entries if chunks else entries[: lines.Entries.LINES])


def _shapes(
    max_batch: int, max_entries: int, max_segments: int, num_pages: int, chunks: bool
) -> dict[str, tuple[int, int]]:
    """Of the int32 tensors, as `PlannerMemory` names them."""
    of_entries = lines.Entries.LINES_OF_CHUNKS if chunks else lines.Entries.LINES
    return {
        "slots": (num_pages, lines.Slots.LINES),
        "entries": (of_entries, max_entries),
        "segments": (lines.Segments.LINES, max_segments),
        "found": (lines.Groups.LINES, max_segments),
        "rows": (lines.Rows.LINES, max_batch),
        "members": (lines.Sort.LINES, max_segments),
        "classes": (lines.Sort.LINES_OF_CLASSES, 2 * max_segments),
    }
