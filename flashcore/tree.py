"""Draft trees under a sliding window, with torch operators: the window counts by depth.

Both paths call this for what their masks need beyond the tree mask itself. On a GPU it is a few
small launches for each call, none of which waits; positions that are given save most of them.
"""

from __future__ import annotations

import torch


def by_depth(
    tree_mask: torch.Tensor,
    tree_positions: torch.Tensor | None,
    q_index: torch.Tensor,
    total_q: torch.Tensor | int,
    left: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(What the window leaves of the tree mask, a position for each row of it).

    tree_mask, tree_positions: as in `flashcore.paged_attention`. q_index: the plan's, which may be
    shorter or longer than the mask. total_q: query tokens of the plan. left: bound of the window.
    """
    if tree_positions is None:
        tree_positions = positions(tree_mask, q_index, total_q)
    rows, width = tree_mask.shape
    if left >= width - 1:  # no two new tokens of a sequence are further apart
        return tree_mask, tree_positions
    key = (_roots(q_index, rows)[:, None] + _columns(tree_mask)).clamp_(max=rows - 1)
    return tree_mask & (tree_positions[:, None] - tree_positions[key] <= left), tree_positions


def positions(
    tree_mask: torch.Tensor, q_index: torch.Tensor, total_q: torch.Tensor | int
) -> torch.Tensor:
    """New tokens of its own sequence that a query's row of the mask allows; int32."""
    rows = tree_mask.shape[0]
    root = _roots(q_index, rows)
    key = root[:, None] + _columns(tree_mask)
    own = (root[key.clamp(max=rows - 1)] == root[:, None]) & (key < total_q)
    return (tree_mask & own).sum(1, dtype=torch.int32)


def _roots(q_index: torch.Tensor, rows: int) -> torch.Tensor:
    """The first query token of each one's sequence, int64. Past the plan's tokens anything."""
    root = torch.arange(rows, device=q_index.device)
    planned = q_index[:rows]
    root[: planned.numel()] -= planned
    return root.clamp_(min=0)


def _columns(tree_mask: torch.Tensor) -> torch.Tensor:
    return torch.arange(tree_mask.shape[1], device=tree_mask.device)
