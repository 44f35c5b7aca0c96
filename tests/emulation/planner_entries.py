"""Steps 1 to 4 of `planner_emulation`: entries, owners, links, segments."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from flashcore.contract.counts import Count, Fault, PagerCount, Stat
from flashcore.contract.operands import PlannerSource
from flashcore.contract.scratch import UNUSED, Rows, Slots
from flashcore.contract.scratch import Entries as E
from flashcore.contract.scratch import Groups as G
from flashcore.contract.scratch import Segments as S
from flashcore.sm90.device_planner import DevicePlanner

POISON = -123_456_789


def last_at_most(values: np.ndarray, low: int, high: int, x: int) -> int:
    while high - low > 1:
        middle = (low + high) >> 1
        if values[middle] <= x:
            low = middle
        else:
            high = middle
    return low


class EntriesEmulation:
    """The buffers, and the steps that go over entries."""

    def __init__(self, planner: DevicePlanner, seed: int = 0):
        self.c = planner.capacities
        tensors = {n: t for n, t in vars(planner.plan).items() if isinstance(t, torch.Tensor)}
        self.p = {name: tensor.numpy() for name, tensor in tensors.items()}
        memory = planner._lent
        self.slots, self.entries = memory.slots.numpy(), memory.entries.numpy()
        self.segs, self.found = memory.segments.numpy(), memory.found.numpy()
        self.rows, self.tiles = memory.rows.numpy(), memory.tiles.numpy()
        self.seen = planner._seen.numpy()
        m = planner._problem
        self.page_tokens, self.num_pages, self.tile_m = m.page_tokens, m.num_pages, m.tile_m
        self.kv_heads, self.group_size = m.kv_heads, m.group_size
        self.kv_token, self.partial_token = m.kv_token_cost, m.partial_token_cost
        self.least_gain, self.fold, self.workers = m.least_gain, m.fold, m.num_workers
        self.least, self.long, self.unit = m.min_split_tokens, m.long_split_tokens, m.split_unit
        self.block_cost = m.block_cost
        self.chunk_numbers = m.chunk_pages, m.long_chunk_pages, m.few_queries
        self.rng = np.random.default_rng(seed)

    def any_order(self, n: int) -> Iterator[int]:
        yield from self.rng.permutation(n).tolist()

    def queries_of(self, row: int) -> int:
        return int(self.p["q_offsets"][row + 1] - self.p["q_offsets"][row])

    def active(self, row: int) -> bool:
        faults = self.rows[Rows.FAULTS, row] + self.rows[Rows.PAGE_FAULT, row]
        return self.queries_of(row) > 0 and faults == 0

    # Step 1

    def layout(self, table: np.ndarray, seq_lens: np.ndarray, q_lens: np.ndarray) -> None:
        p, c = self.p, self.c
        ends, queries = [0], 0
        p["q_offsets"][0] = p["row_offsets"][0] = 0
        for b in range(self.batch):
            length, q, faults = int(seq_lens[b]), int(q_lens[b]), 0
            pages = (length - 1) // self.page_tokens + 1 if length > 0 else 0
            if length < 0 or pages > table.shape[1]:
                pages, faults = 0, faults | Fault.LENGTH
            if q < 0:
                q, faults = 0, faults | Fault.QUERY_LENGTH
            q = min(q, c.max_q + 1)
            ends.append(ends[-1] + pages)
            queries = min(queries, c.max_q + 1) + q
            if pages and ends[-1] > c.max_entries:
                faults |= Fault.ENTRIES
            if q and queries > c.max_q:
                faults |= Fault.QUERIES
            p["q_offsets"][b + 1] = min(queries, c.max_q)
            p["kv_lens"][b] = 0 if faults else length
            self.rows[Rows.FAULTS, b] = faults
        nnz = max(end for end in ends if end <= c.max_entries)
        for b in range(self.batch):
            p["row_offsets"][b + 1] = min(ends[b + 1], nnz)
        p["counts"][Count.NNZ] = nnz
        p["stats"][Stat.TOKENS_UNIQUE] = 0
        for e in self.any_order(nnz):
            row = last_at_most(np.array(ends), 0, self.batch, e)
            column = e - ends[row]
            page = int(table[row, column])
            if not 0 <= page < self.num_pages:
                page = 0
                self.rows[Rows.PAGE_FAULT, row] = 1
            p["cols"][e] = page
            left = int(seq_lens[row]) - column * self.page_tokens
            p["token_counts"][e] = min(left, self.page_tokens)
            self.entries[E.ROW, e] = row
            self.entries[E.START, e] = column * self.page_tokens
            if column == 0:
                self.entries[E.PREVIOUS, e] = -1

    def adopt(self, source: PlannerSource, q_lens: np.ndarray) -> None:
        p, c = self.p, self.c
        counts, bad, row_offsets, kv_lens, cols, token_counts, starts, rows = source
        there, queries = int(counts[PagerCount.BATCH]), 0
        nnz = int(row_offsets[min(self.batch, there)])
        p["q_offsets"][0] = p["row_offsets"][0] = 0
        p["counts"][Count.NNZ], p["stats"][Stat.TOKENS_UNIQUE] = nnz, 0
        for b in range(self.batch):
            faults, length, end = int(Fault.LENGTH), 0, nnz
            if b < there:
                faults, length, end = int(bad[b]), int(kv_lens[b]), int(row_offsets[b + 1])
            q = int(q_lens[b])
            if q < 0:
                q, faults = 0, faults | Fault.QUERY_LENGTH
            q = min(q, c.max_q + 1)
            queries = min(queries, c.max_q + 1) + q
            if q and queries > c.max_q:
                faults |= Fault.QUERIES
            p["q_offsets"][b + 1], p["row_offsets"][b + 1] = min(queries, c.max_q), end
            p["kv_lens"][b], self.rows[Rows.FAULTS, b] = 0 if faults else length, faults
        for e in self.any_order(nnz):
            p["cols"][e], p["token_counts"][e] = cols[e], token_counts[e]
            self.entries[[E.ROW, E.START], e] = rows[e], starts[e]
            if starts[e] == 0:
                self.entries[E.PREVIOUS, e] = -1

    # Steps 2 to 4

    def claim(self) -> None:
        for e in self.any_order(int(self.p["counts"][Count.NNZ])):
            self.entries[E.BROKEN, e] = 0
            if self.active(self.entries[E.ROW, e]):
                slot = self.slots[self.p["cols"][e]]
                tokens = self.p["token_counts"][e]
                slot[Slots.FIRST] = min(slot[Slots.FIRST], e)
                slot[Slots.USES] += 1
                slot[Slots.LONGEST] = max(slot[Slots.LONGEST], tokens)
                if tokens < self.page_tokens:
                    slot[Slots.PARTIAL_TOKENS] += tokens

    def owner_and_uses(self, e: int) -> tuple[int, int, int]:
        first, uses, partial, longest = self.slots[self.p["cols"][e]].tolist()
        tokens = longest if first == e else 0
        if partial != 0 and partial != uses * longest:
            return e, 1, tokens
        return first, uses, tokens

    def owner_of(self, e: int) -> tuple[int, int]:
        """Owner and uses, as the links count them."""
        return self.owner_and_uses(e)[:2]

    def link(self) -> None:
        p = self.p
        for e in self.any_order(int(p["counts"][Count.NNZ])):
            row = self.entries[E.ROW, e]
            if not self.active(row):
                self.entries[E.OWNER, e] = -1
                continue
            tokens = self.owner_and_uses(e)[2]
            owner, uses = self.owner_of(e)
            p["stats"][Stat.TOKENS_UNIQUE] += tokens
            linked = False
            if e + 1 < p["row_offsets"][row + 1]:
                next_owner, next_uses = self.owner_of(e + 1)
                full = p["token_counts"][e] == self.page_tokens
                linked = full and next_uses == uses and next_owner == owner + 1
                self.entries[E.PREVIOUS, e + 1] = owner
            self.entries[E.OWNER, e] = owner
            if not linked:
                self.entries[E.BROKEN, owner] = 1

    def number_segments(self) -> None:
        p, segments, groups = self.p, 0, 0
        for e in range(int(p["counts"][Count.NNZ])):
            row, owner, previous = self.entries[[E.ROW, E.OWNER, E.PREVIOUS], e]
            if owner >= 0 and (previous < 0 or self.entries[E.BROKEN, previous] == 1):
                there = segments < self.c.max_segments
                if there:
                    self.segs[[S.ENTRY, S.ROW, S.OWNER], segments] = e, row, owner
                if there and owner == e:
                    self.entries[E.GROUP, e] = groups
                    self.found[list(G.ZEROED), groups] = 0
                    self.found[G.LOW, groups], self.found[G.HIGH, groups] = UNUSED, -1
                segments += 1
                groups += owner == e
            self.slots[p["cols"][e]] = UNUSED, 0, 0, 0
        p["counts"][[Count.SEGMENTS, Count.FOUND]] = segments, groups
