"""Paged attention with torch operators: a group's K and V are gathered once for all members."""

from __future__ import annotations

import math

import torch

from flashcore.eager.merge import apply_sinks, merge_partials
from flashcore.eager.run import Rules, Tree, attend_run
from flashcore.planner.work import DIRECT, Group


def paged_attention(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    cols: torch.Tensor,
    groups: torch.Tensor,
    q_tokens: torch.Tensor,
    q_positions: torch.Tensor,
    q_index: torch.Tensor,
    merge_offsets: torch.Tensor,
    merge_list: torch.Tensor,
    num_partial_tokens: int,
    rules: Rules,
    sinks: torch.Tensor | None,
    tree_mask: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Shapes as in `flashcore.paged_attention` and `Plan`; q_index: [total_q] place in its
    sequence.

    Reads the group table on the host, for which an accelerator has to be waited for.
    Returns out in q's dtype and lse [total_q, num_q_heads] fp32.
    """
    total_q, num_q_heads, dim = q.shape
    page_tokens, num_kv_heads = k_pages.shape[1], k_pages.shape[2]
    shape = (num_q_heads, dim)
    out = torch.zeros(total_q, *shape, dtype=torch.float32, device=q.device)
    lse = torch.full((total_q, num_q_heads), -math.inf, dtype=torch.float32, device=q.device)
    partial_out = torch.empty(num_partial_tokens, *shape, dtype=torch.float32, device=q.device)
    partial_lse = torch.empty(num_partial_tokens, num_q_heads, device=q.device)
    pages = cols.long()
    for row in groups.tolist():
        gathered = slice(row[Group.Q_BEGIN], row[Group.Q_BEGIN] + row[Group.NUM_Q])
        tokens, positions = q_tokens[gathered].long(), q_positions[gathered].long()
        queries = q[tokens].view(len(tokens), num_kv_heads, -1, dim).transpose(0, 1)
        tree = None
        if tree_mask is not None:
            tree = Tree(tree_mask[tokens], positions - q_index[tokens])
        for split in range(row[Group.NUM_SPLITS]):
            offset = split * row[Group.SPLIT_ENTRIES] * page_tokens
            first = row[Group.ENTRY] + split * row[Group.SPLIT_ENTRIES]
            num_keys = min(row[Group.SPLIT_ENTRIES] * page_tokens, row[Group.NUM_TOKENS] - offset)

            def load(begin: int, end: int, first: int = first) -> tuple[torch.Tensor, torch.Tensor]:
                ids = pages[first + begin // page_tokens : first + -(-end // page_tokens)]
                skip = begin % page_tokens
                keys = slice(skip, skip + end - begin)
                return _gather(k_pages, ids)[:, keys], _gather(v_pages, ids)[:, keys]

            shifted = None if tree is None else Tree(tree.mask, tree.first_key - offset)
            result = attend_run(queries, positions - offset, num_keys, load, rules, shifted)
            if row[Group.PARTIAL] == DIRECT:
                out[tokens], lse[tokens] = result
            else:
                begin = row[Group.PARTIAL] + split * row[Group.NUM_Q]
                where = slice(begin, begin + row[Group.NUM_Q])
                partial_out[where], partial_lse[where] = result
    merge_partials(partial_out, partial_lse, merge_offsets, merge_list, out, lse)
    if sinks is not None:
        apply_sinks(out, lse, sinks)
    return out.to(q.dtype), lse


def _gather(pages: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """[num_kv_heads, tokens, head_dim] view of a copy of the named pages."""
    chosen = pages.index_select(0, ids)
    return chosen.flatten(0, 1).transpose(0, 1)
