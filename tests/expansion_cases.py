"""Plans as a `DevicePlanner` would leave them, at capacity, and what their expansion must be."""

from __future__ import annotations

import torch

import flashcore
from flashcore.contract.counts import Count
from flashcore.planner.expansion import DeviceExpansion, Places, Way
from flashcore.planner.types import PlanTensors
from tests.test_expansion import long_prefill

ABSURD = 1 << 30


def plans() -> list[flashcore.Plan]:
    """Of each way; with pages of one sequence and of all, in one block of entries and in many."""
    return [
        long_prefill(2048, 32768),
        long_prefill(1, 4096),
        long_prefill(256, 3072, batch=7, shared=2048),
        long_prefill(2048, 32768, batch=8),
        long_prefill(2048, 32768, batch=8, shared=30720, fold=False),
        long_prefill(1024, 32768, batch=8, shared=30720, fold="always"),
    ]


def at_capacity(plan: flashcore.Plan, device: str) -> tuple[PlanTensors, torch.Tensor]:
    """The plan's tensors with absurd values past what there is, and its counts."""
    tensors = PlanTensors(
        *(
            torch.cat([x, torch.full((99, *x.shape[1:]), ABSURD, dtype=torch.int32)]).to(device)
            for x in plan.tensors
        )
    )
    counts = torch.arange(int(Count.SIZE), dtype=torch.int32) + 1000
    counts[Count.NNZ], counts[Count.GROUPS] = plan.cols.numel(), plan.groups.shape[0]
    counts[Count.ITEMS] = plan.work.shape[0]
    return tensors, counts.to(device)


def room(plan: flashcore.Plan, pages: int, device: str) -> DeviceExpansion:
    """Tensors to fill, for so many pages."""

    def filled(n: int) -> torch.Tensor:
        return torch.full((n,), ABSURD, dtype=torch.int32, device=device)

    counts = [filled(int(Count.SIZE)) for _ in range(2)]
    places = Places(filled(pages), filled(1), filled(plan.cols.numel() + 99))
    scratch = torch.empty(0, dtype=torch.float16, device=device)
    return DeviceExpansion(plan.problem, places, scratch, *counts, filled(2))


def assert_expansion(found: DeviceExpansion, plan: flashcore.Plan, counts: torch.Tensor) -> None:
    """What was found is what the host finds, pages in any order."""
    way, distinct = found.outcome.tolist()
    assert way == plan.expansion.way
    expands = way == Way.EXPANDED
    items = int(counts[Count.ITEMS])
    for given, wanted in ((found.counts, expands), (found.converted_counts, not expands)):
        assert int(given[Count.ITEMS]) == (items if wanted else 0)
        others = torch.arange(int(Count.SIZE), device=given.device) != int(Count.ITEMS)
        assert torch.equal(given[others], counts[others])
    assert distinct == plan.cols.unique().numel()
    assert int(found.places.page_count) == (distinct if expands else 0)
    if expands:
        pages, cols = found.places.pages[:distinct], found.places.cols[: plan.cols.numel()]
        assert sorted(pages.tolist()) == plan.expansion.places.pages.tolist()
        assert torch.equal(pages[cols.long()].cpu(), plan.cols)
        assert (found.places.cols[plan.cols.numel() :] == ABSURD).all()
    assert int(found.places.cols[: plan.cols.numel()].max()) < found.places.pages.numel()
