"""Where an engine's long prefills expand fp8 pages: memory within the budget of plans, one piece
for all kinds of layers, or none."""

from __future__ import annotations

from dataclasses import dataclass

from flashcore.planner.expansion import EXPANSION_BYTES, expanded_bytes
from flashcore.serving import capacity, planners
from flashcore.serving.capacity import Kind
from flashcore.serving.shapes import Limits, Model
from flashcore.sm90.expansion_scratch import ExpansionScratch
from flashcore.sm90.launch.expand import can_expand

LEAST_BYTES = 64 << 20
"""Less room holds no long prefill, unless it holds the whole cache."""


@dataclass(frozen=True)
class Layers:
    """One kind of layers of a model within a server's limits."""

    model: Model
    limits: Limits
    kind: Kind

    @property
    def expand(self) -> bool:
        """Whether they may: the device knows no window, so windowed layers convert."""
        on_kernels = planners.on_kernels(self.model.device)
        return self.model.fp8 and self.kind.window < 0 and on_kernels

    @property
    def pages(self) -> int:
        """Of the pool."""
        return self.kind.slots // self.model.page_tokens

    @property
    def entries(self) -> int:
        """Pages of all sequences of a forward."""
        return capacity.room_of(self.limits, self.model.page_tokens, self.kind.window).entries

    def wanted_bytes(self) -> int:
        """For all pages that a forward can have."""
        return expanded_bytes(min(self.entries, self.pages), self.kind.problem(self.model))

    def plan_bytes(self, num_bytes: int) -> int:
        """Of their plan, beside room of so many bytes."""
        problem = self.kind.problem(self.model)
        return ExpansionScratch.plan_bytes(num_bytes, self.pages, self.entries, problem)


def room_to_expand(layers: list[Layers], taken: int) -> tuple[ExpansionScratch | None, int]:
    """Room, and the bytes that it and the plans take of it; (None, 0) where no layers may expand or
    the budget leaves too little. What expanding lacks is told. taken: bytes of everything else."""
    layers = [one for one in layers if one.expand]
    if not layers or not can_expand(forced=False):
        return None, 0
    pages, device = max(one.pages for one in layers), layers[0].model.device
    beside = ExpansionScratch.bytes_of(0, pages)
    beside += sum(one.plan_bytes(EXPANSION_BYTES) for one in layers)
    wanted = max(one.wanted_bytes() for one in layers)
    most = min(EXPANSION_BYTES, wanted, capacity.budget(device) - taken - beside)
    if most < min(wanted, LEAST_BYTES):
        return None, 0
    return ExpansionScratch(int(most), num_pages=pages, device=device), int(most) + beside


def describe(model: Model, room: ExpansionScratch | None) -> str:
    """What becomes of an fp8 cache in long prefills, for the log; "" for other caches."""
    if not model.fp8:
        return ""
    if room is None:
        return ", fp8 pages converted in long prefills too"
    return f", fp8 pages of long prefills expanded in {room.pages.nbytes / 2**20:.0f} MiB"
