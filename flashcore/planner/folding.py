"""Folding: a group too small to pay for its partial results is given back to the runs that follow
it.

A group of its own costs each of its query tokens one more partial result, written and read once:
2 * (4 * head_dim + 4) bytes per query head. Folded, its pages are read at the head of every
following run ("child") instead: one read each, so (children - 1) more than now. The cheaper one is
taken.

A group can be folded only where that is exact: every member goes on, the run that follows in each
member has this group before it in all of its own members, and the last page is full (a page that is
not may only end a run). In a prefix tree these are the inner nodes. Decisions go from the root
down, since a folded parent's pages lengthen what its children would have to repeat.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Literal, NamedTuple

import torch

from flashcore.planner.sharing import Segments


class Reason(IntEnum):
    """Why a group stands as it is; column REASON of Plan.decisions."""

    PRIVATE = 0  # one member: nothing to share
    KEPT = 1  # shared, and cheaper than reading it once per child
    FOLDED = 2  # shared, but its partial results would cost more than reading it again
    KEPT_LAST = 3  # shared and small, but some member ends with it
    KEPT_PARTIAL_PAGE = 4  # shared and small, but its last page is not full
    KEPT_BRANCHING = 5  # shared and small, but a following run is also reached another way
    KEPT_ALL = 6  # shared; folding was switched off


Fold = bool | Literal["always"]
"""True: what is cheaper in bytes. False: nothing. "always": every group whose fold is exact."""


class Costs(NamedTuple):
    """Bytes that decide on folding."""

    kv_token: int  # K and V of one token, all KV heads; 0 makes every exact fold cheaper
    partial_token: int  # one more partial result of one query token, all query heads, both ways

    @staticmethod
    def of(
        num_q_heads: int, num_kv_heads: int, head_dim: int, itemsize: int, fold: Fold = True
    ) -> Costs:
        kv_token = 0 if fold == "always" else 2 * num_kv_heads * head_dim * itemsize
        return Costs(kv_token, 2 * num_q_heads * (4 * head_dim + 4))


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
    entries: torch.Tensor,
    tokens: torch.Tensor,
    members: torch.Tensor,
    query_tokens: torch.Tensor,
    ends_full: torch.Tensor,
    costs: Costs,
    *,
    enabled: bool,
) -> Folding:
    """Decide for each group; per group: pages, tokens, members, query tokens, last page full."""
    num_groups = segments.owner.numel()
    parent = _parents(segments, num_groups)
    children = torch.bincount(parent[parent >= 0], minlength=num_groups)
    ends, strays = _successors(segments, parent, num_groups)
    zero = torch.zeros_like(tokens)
    saved = query_tokens * costs.partial_token

    reason = torch.where(members > 1, Reason.KEPT if enabled else Reason.KEPT_ALL, Reason.PRIVATE)
    if not enabled:
        return Folding(reason, children, zero, zero.clone())
    # The least a fold can cost, before the pages that folded ancestors would add.
    small = (members > 1) & ((children - 1) * tokens * costs.kv_token <= saved)
    reason[small & strays] = Reason.KEPT_BRANCHING
    reason[small & ends] = Reason.KEPT_LAST
    reason[small & ~ends_full] = Reason.KEPT_PARTIAL_PAGE
    candidate = small & ~strays & ~ends & ends_full
    folded, extra_entries, extra_tokens = _decide(
        candidate, parent, children, entries, tokens, saved, costs.kv_token
    )
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
    children: torch.Tensor,
    entries: torch.Tensor,
    tokens: torch.Tensor,
    saved: torch.Tensor,
    kv_token_bytes: int,
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
        again = (children[level] - 1) * (tokens[level] + extra_tokens[level]) * kv_token_bytes
        folded[level] = again <= saved[level]
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
