"""Folding: a group too small to pay for its partial results is given back to the runs that follow
it.

Kept, a group costs each of its query tokens one more partial result. Folded, its pages are read at
the head of every following run ("child") instead: by the row blocks of all children, where now its
own row blocks read them. The children run at about the same time, so what they read again comes
from L2. The cheaper one is taken. And where all that the groups of a batch save together is less
than what merging takes at the least, all are given back.

A group can be folded only where that is exact: every member goes on, the run that follows in each
member has this group before it in all of its own members, and the last page is full (a page that is
not may only end a run). In a prefix tree these are the inner nodes. Decisions go from the root
down, since a folded parent's pages lengthen what its children would have to repeat.

The costs were measured on an H100 (docs/experiments/planner.md#folding): 310 decode batches with
one shared prefix, each with it kept and folded.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

from flashcore.contract.reasons import Reason
from flashcore.planner import split
from flashcore.planner.sharing import Segments
from flashcore.problem import Problem

L2_COST = split.read_cost(2) - split.read_cost(1)
"""Of reading a byte of KV again, in 1 / split.COST_UNIT of reading it from DRAM."""

PARTIAL_COST = split.COST_UNIT
"""Of writing and reading a byte of partial results, in the same unit."""

LEAST_GAIN = split.COST_UNIT * (9 << 19)
"""Sharing that saves less than 4.5 MiB of DRAM reads, 1.5 us, loses it to the merge."""

FOLD_ROWS = 128
"""Query rows of a block where the plan has not been told its tiles."""


Fold = bool | Literal["always"]
"""True: what is cheaper. False: nothing. "always": every group whose fold is exact."""


def check_fold(fold: object) -> None:
    """Raise ValueError for what is no `Fold`."""
    if not isinstance(fold, bool) and fold != "always":
        raise ValueError(f"fold must be True, False or 'always', got {fold!r}")


class Costs(NamedTuple):
    """What decides on folding, in 1 / split.COST_UNIT bytes read from DRAM, or in bytes."""

    kv_token: int  # K and V of a token, all KV heads, read again; 0: every exact fold is cheaper
    partial_token: int  # one more partial result of one query token, all query heads, both ways
    least_gain: int  # of all groups together

    @staticmethod
    def of(problem: Problem, fold: Fold = True, *, parallel: bool = True) -> Costs:
        """parallel: whether work items run side by side, so that they read again from a common L2
        and wait for each other before the merge. Else bytes are bytes."""
        l2_cost, partial_cost, least_gain = 1, 1, 0
        if parallel:
            l2_cost, partial_cost, least_gain = L2_COST, PARTIAL_COST, LEAST_GAIN
        kv_token = 0 if fold == "always" else l2_cost * problem.kv_token_bytes
        partial_token = partial_cost * 2 * problem.partial_bytes
        return Costs(kv_token, partial_token, least_gain)


class Runs(NamedTuple):
    """Per group: pages, tokens, members, query tokens of all members; int64 tensors."""

    entries: torch.Tensor
    tokens: torch.Tensor
    members: torch.Tensor
    queries: torch.Tensor


class Folding(NamedTuple):
    """Outcome for each group found: int64 tensors [num_groups].

    reason: a `Reason`. children: runs that would repeat it.
    extra_entries, extra_tokens: what folded ancestors put at the head of this group's run.
    """

    reason: torch.Tensor
    children: torch.Tensor
    extra_entries: torch.Tensor
    extra_tokens: torch.Tensor


def fold_groups(
    segments: Segments,
    runs: Runs,
    blocks: torch.Tensor,
    ends_full: torch.Tensor,
    costs: Costs,
    *,
    enabled: bool,
) -> Folding:
    """Decide for each group. blocks: row blocks of its query tokens. ends_full: whether its last
    page is full."""
    entries, tokens, members, query_tokens = runs
    num_groups = segments.owner.numel()
    parent = _parents(segments, num_groups)
    has_parent = parent >= 0
    children = torch.bincount(parent[has_parent], minlength=num_groups)
    ends, strays = _successors(segments, parent, num_groups)
    zero = torch.zeros_like(tokens)
    # What reading a token again costs, for all blocks that would do it.
    again = zero.index_add(0, parent[has_parent], blocks[has_parent]) - blocks
    again *= costs.kv_token
    saved = query_tokens * costs.partial_token

    reason = torch.where(members > 1, Reason.KEPT if enabled else Reason.KEPT_ALL, Reason.PRIVATE)
    if not enabled:
        return Folding(reason, children, zero, zero.clone())
    # The least a fold can cost, before the pages that folded ancestors would add.
    small = (members > 1) & (again * tokens <= saved)
    reason[small & strays] = Reason.KEPT_BRANCHING
    reason[small & ends] = Reason.KEPT_LAST
    reason[small & ~ends_full] = Reason.KEPT_PARTIAL_PAGE
    exact = (members > 1) & ~strays & ~ends & ends_full
    folded, extra_entries, extra_tokens = _decide(
        exact & small, parent, again, entries, tokens, saved
    )
    gains = again * (tokens + extra_tokens) - saved
    if 0 < int(gains[exact & ~folded].sum()) <= costs.least_gain:
        costs = costs._replace(kv_token=0)
        return fold_groups(segments, runs, blocks, ends_full, costs, enabled=True)
    reason[folded] = Reason.FOLDED
    return Folding(reason, children, extra_entries, extra_tokens)


def _parents(segments: Segments, num_groups: int) -> torch.Tensor:
    """The group just before this one in all of its members, or -1."""
    previous = torch.full_like(segments.group, -1)
    same_row = segments.row[1:] == segments.row[:-1]
    previous[1:] = torch.where(same_row, segments.group[:-1], -1)
    low = torch.full((num_groups,), num_groups, dtype=torch.long, device=previous.device)
    high = torch.full_like(low, -1)
    low.scatter_reduce_(0, segments.group, previous, "amin")
    high.scatter_reduce_(0, segments.group, previous, "amax")
    return torch.where(low == high, low, -1)


def _successors(
    segments: Segments, parent: torch.Tensor, num_groups: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Per group: does some member end with it; is some successor not its child."""
    last = torch.ones_like(segments.group, dtype=torch.bool)
    last[:-1] = segments.row[1:] != segments.row[:-1]
    ends = torch.zeros(num_groups, dtype=torch.bool, device=parent.device)
    ends[segments.group[last]] = True
    strays = torch.zeros_like(ends)
    inner = torch.nonzero(~last).flatten()
    group, successor = segments.group[inner], segments.group[inner + 1]
    strays[group[parent[successor] != group]] = True
    return ends, strays


def _decide(
    candidate: torch.Tensor,
    parent: torch.Tensor,
    again: torch.Tensor,
    entries: torch.Tensor,
    tokens: torch.Tensor,
    saved: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Walk candidates from the roots down, level by level; pages of folded parents sink."""
    folded = torch.zeros_like(candidate)
    extra_entries, extra_tokens = torch.zeros_like(entries), torch.zeros_like(tokens)
    waiting = torch.nonzero(candidate).flatten()
    undecided = candidate.clone()
    while waiting.numel():
        up = parent[waiting]
        ready = (up < 0) | ~undecided[up.clamp(min=0)]
        level, waiting = waiting[ready], waiting[~ready]
        _inherit(level, parent, folded, entries, tokens, extra_entries, extra_tokens)
        folded[level] = again[level] * (tokens[level] + extra_tokens[level]) <= saved[level]
        undecided[level] = False
    rest = torch.nonzero(~candidate).flatten()
    _inherit(rest, parent, folded, entries, tokens, extra_entries, extra_tokens)
    return folded, extra_entries, extra_tokens


def _inherit(
    groups: torch.Tensor,
    parent: torch.Tensor,
    folded: torch.Tensor,
    entries: torch.Tensor,
    tokens: torch.Tensor,
    extra_entries: torch.Tensor,
    extra_tokens: torch.Tensor,
) -> None:
    up = parent[groups]
    heirs, up = groups[up >= 0], up[up >= 0]
    heirs, up = heirs[folded[up]], up[folded[up]]
    extra_entries[heirs] = entries[up] + extra_entries[up]
    extra_tokens[heirs] = tokens[up] + extra_tokens[up]
