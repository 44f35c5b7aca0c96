"""Paged attention with torch operators: a group's K and V are gathered once for all members."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch

from flashcore.eager import run
from flashcore.eager.merge import apply_sinks, merge_partials
from flashcore.eager.run import Rules, Tree, attend_runs, merge, sees_all
from flashcore.eager.threads import one_thread_an_operator, run_tasks, usable_threads
from flashcore.eager.workspace import scratch
from flashcore.planner.work import DIRECT, Group

KEYS_PER_BATCH = 8192
"""Keys gathered at a time when several runs go together."""

LONG_PRODUCT = 1 << 26
"""Multiply-adds of one matrix product, about a millisecond, from which torch's threads inside of it
do as well as tasks side by side, whose scores would all be alive at once."""

LEAST_READ = 1 << 18
"""Numbers of K to read, about 0.3 ms, for which other threads are worth waking."""


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
    threads = usable_threads() if q.device.type == "cpu" else 1
    with one_thread_an_operator():
        total_q, num_q_heads, dim = q.shape
        heads = k_pages.shape[2]
        call = _Call(
            q=(q.float() * rules.scale).view(total_q, heads, num_q_heads // heads, dim),
            q_tokens=q_tokens.long(),
            positions=q_positions.long(),
            q_index=q_index,
            reader=_PageReader(k_pages, v_pages, cols.long()),
            rules=rules,
            tree_mask=tree_mask,
            direct=_nothing_visible(total_q, q),
            partial=_nothing_visible(num_partial_tokens, q),
        )
        runs = _runs(groups, call.positions, k_pages.shape[1], rules, tree_mask is not None)
        batches = _batches(runs)
        short = _short_batches(call, batches, threads)
    for batch in batches:
        if batch not in short:
            call.store(batch, call.attend(batch))
    with one_thread_an_operator():
        _attend_side_by_side(call, short, threads)
        out, lse = call.direct
        merge_partials(*call.partial, merge_offsets, merge_list, out, lse)
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
    sees_all: bool  # every query sees every key


def _runs(
    groups: torch.Tensor, positions: torch.Tensor, page_tokens: int, rules: Rules, has_tree: bool
) -> list[_Run]:
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
            num_keys = min(whole, row[Group.NUM_TOKENS] - offset)
            partial = row[Group.PARTIAL]
            found.append(
                _Run(
                    entry=row[Group.ENTRY] + before,
                    num_keys=num_keys,
                    offset=offset,
                    q_begin=row[Group.Q_BEGIN],
                    num_q=row[Group.NUM_Q],
                    partial=partial if partial == DIRECT else partial + split * row[Group.NUM_Q],
                    sees_all=sees_all(least_position - offset, num_keys, rules, has_tree),
                )
            )
    return found


def _batches(runs: list[_Run]) -> list[list[_Run]]:
    """Runs of one shape that need no mask go together, as far as their keys stay in the cache.

    Sequences that decode in step (samples of one prompt) have tails of one shape.
    """
    batches: list[list[_Run]] = []
    open_batches: dict[tuple[int, ...], list[_Run]] = {}
    for part in runs:
        if not part.sees_all:
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


Results = tuple[torch.Tensor, torch.Tensor]
"""fp32 out [..., num_q_heads, head_dim], and lse without the last axis."""


def _nothing_visible(tokens: int, q: torch.Tensor) -> Results:
    """Results of query tokens that see no key."""
    out = q.new_zeros(tokens, *q.shape[1:], dtype=torch.float32)
    return out, torch.full(out.shape[:-1], -math.inf, device=q.device)


@dataclass(frozen=True)
class _Call:
    """What all runs of a call share. Threads may attend and store different runs at once."""

    q: torch.Tensor  # [total_q, num_kv_heads, g, head_dim] fp32, multiplied by the scale
    q_tokens: torch.Tensor
    positions: torch.Tensor
    q_index: torch.Tensor
    reader: _PageReader
    rules: Rules
    tree_mask: torch.Tensor | None
    direct: Results
    partial: Results

    def attend(self, batch: list[_Run], part: tuple[int, int] | None = None) -> Results:
        """Results [runs, num_q, ...] over all keys of the runs, or over a part of each."""
        first = batch[0]
        index = self._index([run.q_begin for run in batch], first.num_q)
        tokens = self.q_tokens[index]
        place = self.positions[index] - first.offset
        tree = None
        if self.tree_mask is not None:
            tree = Tree(self.tree_mask[tokens[0]], place[0] - self.q_index[tokens[0]])
        load = self.reader.loader(batch)
        out, lse = attend_runs(self.q[tokens], place, first.num_keys, load, self.rules, tree, part)
        return out.flatten(2, 3), lse.flatten(2, 3)

    def store(self, batch: list[_Run], results: Results) -> None:
        """Write results where the merge or the caller expects them."""
        first = batch[0]
        if first.partial == DIRECT:
            index = self.q_tokens[self._index([run.q_begin for run in batch], first.num_q)]
            out, lse = self.direct
        else:
            index = self._index([run.partial for run in batch], first.num_q)
            out, lse = self.partial
        out[index], lse[index] = results

    def _index(self, begins: list[int], count: int) -> torch.Tensor:
        index = torch.tensor(begins, device=self.q.device)[:, None]
        return index + torch.arange(count, device=self.q.device)


def _short_batches(call: _Call, batches: list[list[_Run]], threads: int) -> list[list[_Run]]:
    """Those whose products are no work for several threads; none where there are too few tasks."""
    _, heads, group, dim = call.q.shape
    short = []
    for batch in batches:
        rows = len(batch) * batch[0].num_q * heads * group
        if rows * min(batch[0].num_keys, run.KEYS_PER_CHUNK) * dim <= LONG_PRODUCT:
            short.append(batch)
    return short


def _attend_side_by_side(call: _Call, batches: list[list[_Run]], threads: int) -> None:
    """Each batch a task, long runs several, whose results are merged in the order of the keys.

    It does not matter which thread did what.
    """
    _, heads, _, dim = call.q.shape
    if sum(len(batch) * batch[0].num_keys for batch in batches) * heads * dim < LEAST_READ:
        threads = 1
    pieces = [(batch, part) for batch in batches for part in _parts(batch)]
    results = iter(run_tasks([partial(call.attend, *piece) for piece in pieces], threads))
    for batch in batches:
        out, lse = next(results)
        for _ in _parts(batch)[1:]:
            other, other_lse = next(results)
            out, lse = merge(out, lse[..., None], other, other_lse[..., None])
            lse = lse[..., 0]
        call.store(batch, (out, lse))


def _parts(batch: list[_Run]) -> list[tuple[int, int]]:
    """Ranges of keys that are tasks of their own; one where what is visible is not known yet."""
    first = batch[0]
    size = run.KEYS_PER_CHUNK if first.sees_all else first.num_keys
    begins = range(0, first.num_keys, size)
    return [(begin, min(begin + size, first.num_keys)) for begin in begins]


class _PageReader:
    """Gathers pages, each pool into one buffer."""

    def __init__(self, k_pages: torch.Tensor, v_pages: torch.Tensor, cols: torch.Tensor) -> None:
        self.cols = cols
        self.page_tokens = k_pages.shape[1]
        self.pools = {"k": k_pages, "v": v_pages}

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
        """K and V of pages [runs, pages] as [runs, num_kv_heads, tokens, head_dim]."""
        gathered = []
        for purpose, pool in self.pools.items():
            chosen = scratch(purpose, (ids.numel(), *pool.shape[1:]), pool)
            torch.index_select(pool, 0, ids.flatten(), out=chosen)
            gathered.append(chosen.view(len(ids), -1, *pool.shape[2:]).transpose(1, 2))
        return gathered
