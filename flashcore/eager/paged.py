"""Paged attention with torch operators: a group's K and V are gathered once for all members."""

from __future__ import annotations

import math

import torch

from flashcore.eager import run
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
    out = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
    lse = torch.full((total_q, num_q_heads), -math.inf, dtype=torch.float32, device=q.device)
    partial_out = out.new_empty(num_partial_tokens, num_q_heads, dim)
    partial_lse = out.new_empty(num_partial_tokens, num_q_heads)
    pages, gathered_tokens, gathered_positions = cols.long(), q_tokens.long(), q_positions.long()
    scaled = (q.float() * rules.scale).view(total_q, num_kv_heads, num_q_heads // num_kv_heads, dim)
    table = groups.tolist()
    # A chunk that begins inside a page (a window does that) touches one page more.
    longest = max((row[Group.NUM_ENTRIES] for row in table), default=0)
    most = min(longest, run.KEYS_PER_CHUNK // page_tokens + 2)
    gather_k, gather_v = _Gather(k_pages, most), _Gather(v_pages, most)
    for row in table:
        gathered = slice(row[Group.Q_BEGIN], row[Group.Q_BEGIN] + row[Group.NUM_Q])
        tokens, positions = gathered_tokens[gathered], gathered_positions[gathered]
        queries = scaled[tokens].transpose(0, 1)
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
                return gather_k(ids)[:, keys], gather_v(ids)[:, keys]

            direct = row[Group.PARTIAL] == DIRECT
            if direct:
                result = out.new_empty(len(tokens), num_q_heads, dim)
                logs = out.new_empty(len(tokens), num_q_heads)
            else:
                begin = row[Group.PARTIAL] + split * row[Group.NUM_Q]
                result = partial_out[begin : begin + row[Group.NUM_Q]]
                logs = partial_lse[begin : begin + row[Group.NUM_Q]]
            shifted = None if tree is None else Tree(tree.mask, tree.first_key - offset)
            attend_run(queries, positions - offset, num_keys, load, rules, shifted, result, logs)
            if direct:
                out[tokens], lse[tokens] = result, logs
    merge_partials(partial_out, partial_lse, merge_offsets, merge_list, out, lse)
    if sinks is not None:
        apply_sinks(out, lse, sinks)
    return out.to(q.dtype), lse


class _Gather:
    """Copies pages of one pool into one buffer: far quicker than fresh memory each time."""

    def __init__(self, pages: torch.Tensor, most: int) -> None:
        self.pages = pages
        self.buffer = torch.empty(most, *pages.shape[1:], dtype=pages.dtype, device=pages.device)

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        """[num_kv_heads, tokens, head_dim] view of the named pages, until the next call."""
        chosen = self.buffer[: ids.numel()]
        torch.index_select(self.pages, 0, ids, out=chosen)
        return chosen.flatten(0, 1).transpose(0, 1)
