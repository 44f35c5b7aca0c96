"""What a plan does and why, as numbers a serving engine can log."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from flashcore import validate
from flashcore.contract.reasons import Reason
from flashcore.contract.work import Group
from flashcore.planner.expansion import WAY_TEXT, expanded_bytes
from flashcore.problem import Problem

if TYPE_CHECKING:
    from flashcore.planner.types import Plan

REASON_TEXT = {
    Reason.PRIVATE: "used by one sequence",
    Reason.KEPT: "shared",
    Reason.FOLDED: "folded: its partial results would cost more than reading it again",
    Reason.KEPT_LAST: "shared though small: a sequence ends with it",
    Reason.KEPT_PARTIAL_PAGE: "shared though small: its last page is not full",
    Reason.KEPT_BRANCHING: "shared though small: a run after it is also reached another way",
    Reason.KEPT_ALL: "shared: folding was off",
}


@dataclass(frozen=True)
class PlanStats:
    """Counts of one plan, made by `Plan.stats`, never by its constructor.

    Tokens are KV tokens of one layer; bytes come from `bytes_*`.

    tokens_per_sequence: read if every sequence with queries reads its own copy.
    tokens_once: read by this plan.
    tokens_unique: in distinct pages; what no plan can go below.
    pages_per_sequence, pages_unique: the same in pages.
    num_groups, num_shared_groups, largest_fan_out: groups of this plan, those with several members,
        and the most members of one.
    num_work_items, num_partial_tokens: see `work`.
    reasons: for each `Reason` that occurs, its text -> (groups as found, their tokens).
    problem: what the plan is for.
    expansion: what becomes of fp8 pages, and why; "" where the plan's itemsize is not 1.
    pages_expanded: distinct pages that a call may expand; 0 where it converts.
    """

    batch: int
    total_q: int
    tokens_per_sequence: int
    tokens_once: int
    tokens_unique: int
    pages_per_sequence: int
    pages_unique: int
    num_groups: int
    num_shared_groups: int
    largest_fan_out: int
    num_work_items: int
    num_partial_tokens: int
    reasons: dict[str, tuple[int, int]]
    problem: Problem
    expansion: str = ""
    pages_expanded: int = 0

    @property
    def reuse(self) -> float:
        """Tokens read per sequence over tokens read by this plan (1 when none are read)."""
        return self.tokens_per_sequence / self.tokens_once if self.tokens_once else 1.0

    @property
    def num_folded(self) -> int:
        """Groups that were shared as found and were given back."""
        return self.reasons.get(REASON_TEXT[Reason.FOLDED], (0, 0))[0]

    def bytes_per_sequence(self, dtype: torch.dtype) -> int:
        """K and V bytes of one layer if every sequence reads its own copy."""
        return self.tokens_per_sequence * self._token_bytes(dtype)

    def bytes_once(self, dtype: torch.dtype) -> int:
        """K and V bytes of one layer that this plan reads."""
        return self.tokens_once * self._token_bytes(dtype)

    def bytes_partial(self) -> int:
        """Bytes of partial results, written once and read once."""
        return 2 * self.num_partial_tokens * self.problem.partial_bytes

    def bytes_expansion(self) -> int:
        """Bytes of the scratch that a call expands pages into."""
        return expanded_bytes(self.pages_expanded, self.problem)

    def _token_bytes(self, dtype: torch.dtype) -> int:
        return replace(
            self.problem, itemsize=validate.dtype("dtype", dtype).itemsize
        ).kv_token_bytes


def plan_stats(plan: Plan) -> PlanStats:
    """Count what `plan` reads, shares and folds. Waits for the device."""
    active = plan.q_offsets.diff() > 0
    entry_active = torch.repeat_interleave(active, plan.row_offsets.diff().long())
    pages = plan.cols[entry_active].long()
    counts = plan.token_counts[entry_active]
    distinct, page = torch.unique(pages, return_inverse=True)
    longest = torch.zeros(distinct.numel(), dtype=counts.dtype, device=counts.device)
    longest.scatter_reduce_(0, page, counts, "amax")
    fan_out = plan.member_offsets.diff()
    reasons: dict[str, tuple[int, int]] = {}
    for reason in Reason:
        chosen = plan.decisions[plan.decisions[:, 3] == reason]
        if chosen.shape[0]:
            reasons[REASON_TEXT[reason]] = (chosen.shape[0], int(chosen[:, 0].sum()))
    places = None if plan.expansion is None else plan.expansion.places
    return PlanStats(
        batch=plan.batch,
        total_q=plan.total_q,
        tokens_per_sequence=int(plan.kv_lens[active].sum()),
        tokens_once=int(plan.groups[:, Group.NUM_TOKENS].sum()),
        tokens_unique=int(longest.sum()),
        pages_per_sequence=pages.numel(),
        pages_unique=distinct.numel(),
        num_groups=plan.groups.shape[0],
        num_shared_groups=int((fan_out > 1).sum()),
        largest_fan_out=int(fan_out.max()) if fan_out.numel() else 0,
        num_work_items=plan.work.shape[0],
        num_partial_tokens=plan.num_partial_tokens,
        reasons=reasons,
        problem=plan.problem,
        expansion="" if plan.expansion is None else WAY_TEXT[plan.expansion.way],
        pages_expanded=0 if places is None else places.pages.numel(),
    )
