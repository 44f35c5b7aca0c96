"""Paged attention with torch operators: a group's K and V are gathered once for all members."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from flashcore.contract.work import DIRECT, Group
from flashcore.eager import chunked, run
from flashcore.eager.merge import apply_sinks, merge_partials
from flashcore.eager.run import Tree, attend_runs, sees_all
from flashcore.eager.workspace import scratch
from flashcore.kv_checks import FP8_DTYPES
from flashcore.planner.types import Planned
from flashcore.problem import Extras, KVPool, Rules
from flashcore.tree import by_depth

KEYS_PER_BATCH = 8192
"""Keys gathered at a time when several runs go together."""


def paged_attention(
    q: torch.Tensor, kv: KVPool, planned: Planned, rules: Rules, extras: Extras
) -> tuple[torch.Tensor, torch.Tensor]:
    """Shapes as in `flashcore.paged_attention` and `Plan`.

    Reads the group table on the host, for which an accelerator has to be waited for.
    Returns out in q's dtype and lse [total_q, num_q_heads] fp32.
    """
    total_q, num_q_heads, dim = q.shape
    num_kv_heads, v_dim = kv.k.shape[2], kv.v.shape[3]
    plan, num_partials = planned.tensors, planned.numbers.num_partial_tokens
    sinks, tree_mask, tree_positions = extras
    out = torch.zeros(total_q, num_q_heads, v_dim, dtype=torch.float32, device=q.device)
    lse = torch.full((total_q, num_q_heads), -math.inf, dtype=torch.float32, device=q.device)
    partial_out = out.new_empty(num_partials, num_q_heads, v_dim)
    partial_lse = out.new_empty(num_partials, num_q_heads)
    gathered, positions = plan.q_tokens.long(), plan.q_positions.long()
    depth = None
    if tree_mask is not None and rules.window_left >= 0:
        tree_mask, tree_positions = by_depth(
            tree_mask, tree_positions, plan.q_index, total_q, rules.window_left
        )
        root = torch.arange(total_q, device=q.device) - plan.q_index
        depth = tree_positions - tree_positions[root]
    scaled = (q.float() * rules.scale).view(total_q, num_kv_heads, num_q_heads // num_kv_heads, dim)
    if kv.k_scale is not None:
        scaled = scaled * kv.k_scale.expand(num_kv_heads)[:, None, None]
    runs = _runs(plan.groups, positions, kv.k.shape[1])
    reader = _PageReader(kv, plan.cols.long())
    invariant = planned.numbers.batch_invariant
    for batch in [[r] for r in runs] if invariant else _batches(runs, rules, tree_mask is not None):
        first = batch[0]
        index = torch.tensor([run.q_begin for run in batch], device=q.device)[:, None]
        index = index + torch.arange(first.num_q, device=q.device)
        tokens = gathered[index]
        place = positions[index] - first.offset
        tree = None
        if tree_mask is not None:
            tree = Tree(tree_mask[tokens[0]], place[0] - plan.q_index[tokens[0]])
            if depth is not None:
                place = (tree.first_key + depth[tokens[0]])[None]
        load = reader.loader(batch)
        asked = scaled[tokens], place, first.num_keys, load, rules, v_dim, tree
        result, logs = chunked.attend_runs(*asked) if invariant else attend_runs(*asked)
        result, logs = result.flatten(2, 3), logs.flatten(2, 3)
        if first.partial == DIRECT:
            out[tokens], lse[tokens] = result, logs
        else:
            begin = torch.tensor([run.partial for run in batch], device=q.device)[:, None]
            index = begin + torch.arange(first.num_q, device=q.device)
            partial_out[index], partial_lse[index] = result, logs
    lists = plan.merge_offsets, plan.merge_partials
    (chunked.merge if invariant else merge_partials)(partial_out, partial_lse, *lists, out, lse)
    if kv.v_scale is not None:
        grouped = out.view(total_q, num_kv_heads, num_q_heads // num_kv_heads, v_dim)
        grouped *= kv.v_scale.expand(num_kv_heads)[:, None, None]
    if sinks is not None:
        apply_sinks(out, lse, sinks)
    return out.to(q.dtype), lse


class _Run(NamedTuple):
    """One split of a group: what is read, by whom, and where the result goes."""

    entry: int
    num_keys: int
    offset: int  # tokens of the group's run before this split
    q_begin: int
    num_q: int
    partial: int  # or DIRECT
    first_position: int  # smallest position of its queries, on this split's scale


def _runs(groups: torch.Tensor, positions: torch.Tensor, page_tokens: int) -> list[_Run]:
    """All splits of all groups, on the host."""
    num_q = groups[:, Group.NUM_Q].long()
    least = torch.full_like(num_q, torch.iinfo(torch.long).max)
    least.scatter_reduce_(0, torch.repeat_interleave(num_q), positions, "amin")
    found = []
    for row, least_position in zip(groups.tolist(), least.tolist(), strict=True):
        for split in range(row[Group.NUM_SPLITS]):
            before = split * row[Group.SPLIT_ENTRIES]
            offset = before * page_tokens
            whole = row[Group.SPLIT_ENTRIES] * page_tokens
            partial = row[Group.PARTIAL]
            found.append(
                _Run(
                    entry=row[Group.ENTRY] + before,
                    num_keys=min(whole, row[Group.NUM_TOKENS] - offset),
                    offset=offset,
                    q_begin=row[Group.Q_BEGIN],
                    num_q=row[Group.NUM_Q],
                    partial=partial if partial == DIRECT else partial + split * row[Group.NUM_Q],
                    first_position=least_position - offset,
                )
            )
    return found


def _batches(runs: list[_Run], rules: Rules, has_tree: bool) -> list[list[_Run]]:
    """Runs of one shape that need no mask go together, as far as their keys stay in the cache.

    Sequences that decode in step (samples of one prompt) have tails of one shape.
    """
    batches: list[list[_Run]] = []
    open_batches: dict[tuple[int, ...], list[_Run]] = {}
    for part in runs:
        if not sees_all(part.first_position, part.num_keys, rules, has_tree):
            batches.append([part])
            continue
        shape = (part.num_keys, part.num_q, part.offset, part.partial == DIRECT)
        batch = open_batches.get(shape)
        most = KEYS_PER_BATCH // min(part.num_keys, run.KEYS_PER_CHUNK)
        if batch is None or len(batch) >= most:
            batch = open_batches[shape] = []
            batches.append(batch)
        batch.append(part)
    return batches


class _PageReader:
    """Gathers pages, each pool into one buffer."""

    def __init__(self, kv: KVPool, cols: torch.Tensor) -> None:
        self.cols = cols
        self.page_tokens = kv.k.shape[1]
        self.pools = {"k": kv.k, "v": kv.v}

    def loader(self, batch: list[_Run]) -> run.LoadKeys:
        """How to load the keys of runs of one shape."""
        starts = torch.tensor([part.entry for part in batch], device=self.cols.device)[:, None]

        def load(begin: int, end: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
            first, last = begin // self.page_tokens, -(-end // self.page_tokens)
            pages = torch.arange(first, last, device=self.cols.device)
            k, v = self._gather(self.cols[starts + pages])
            skip = begin - first * self.page_tokens
            keys = slice(skip, skip + end - begin)
            return [(k[i, :, keys], v[i, :, keys]) for i in range(len(batch))]

        return load

    def _gather(self, ids: torch.Tensor) -> list[torch.Tensor]:
        """K and V of pages [runs, pages] as [runs, num_kv_heads, tokens, columns]."""
        gathered = []
        for purpose, pool in self.pools.items():
            # Of fp8 not every device gathers anything but the bytes.
            stored = pool.view(torch.uint8) if pool.dtype in FP8_DTYPES else pool
            chosen = scratch(purpose, (ids.numel(), *pool.shape[1:]), stored)
            torch.index_select(stored, 0, ids.flatten(), out=chosen)
            chosen = chosen.view(pool.dtype)
            gathered.append(chosen.view(len(ids), -1, *pool.shape[2:]).transpose(1, 2))
        return gathered
