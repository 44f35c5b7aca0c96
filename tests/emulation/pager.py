"""The pager's kernels step by step in numpy, on the buffers of a `DevicePager` on the CPU.

The same steps and scratch as flashcore/sm90/kernels/pager.py; what is parallel there is done here
in an order drawn at random. Scratch is poisoned between updates where the kernels may not rely on
it.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from flashcore.contract.counts import Fault, PagerCount
from flashcore.contract.scratch import PagerRanges as Ranges
from flashcore.sm90.device_pager import DevicePager
from tests.emulation.planner_entries import POISON, last_at_most


class PagerEmulation:
    """Stands in for the launch of the kernels."""

    def __init__(self, pager: DevicePager, seed: int = 0):
        layout = vars(pager.layout)
        self.p = {n: t.numpy() for n, t in layout.items() if isinstance(t, torch.Tensor)}
        self.page_tokens, self.num_pages = pager.layout.page_tokens, pager.layout.num_pages
        memory = pager._scratch
        self.changes, self.pieces = memory.changes.numpy(), memory.pieces.numpy()
        self.ranges, self.slots = memory.ranges.numpy(), memory.slots.numpy()
        self.rng = np.random.default_rng(seed)

    def any_order(self, n: int) -> Iterator[int]:
        yield from self.rng.permutation(n).tolist()

    def update(
        self,
        pages: torch.Tensor,
        begins: torch.Tensor | None,
        ends: torch.Tensor,
        resident: torch.Tensor | None,
    ) -> None:
        self.changes[:], self.pieces[:], self.ranges[:] = POISON, POISON, POISON
        self.pages, self.ends = pages.numpy(), ends.numpy()
        self.begins = None if begins is None else begins.numpy()
        self.resident = None if resident is None else resident.numpy()
        if begins is not None:
            self.find_changes()
        self.rows()
        self.entries()
        self.claim()
        self.stage()

    def cut(self, tokens: int) -> int:
        return (int(tokens) - 1) // self.page_tokens + 1

    def find_changes(self) -> None:
        found = [t for t in range(1, len(self.pages)) if self.pages[t] != self.pages[t - 1]]
        self.num_changes = len(found)
        self.changes[: len(found)] = found
        before = 0
        for i, t in enumerate(found):
            self.pieces[i] = before
            end = found[i + 1] if i + 1 < len(found) else len(self.pages)
            before += self.cut(end - t)

    def rows(self) -> None:
        p, most, before, nnz = self.p, len(self.p["cols"]), 0, 0
        p["row_offsets"][0] = 0
        for b in range(len(self.ends)):
            need, length, fault = self.row_need(b)
            need = min(need, most + 1)
            before += need
            if need and before > most:
                fault |= Fault.ENTRIES
            if before <= most:
                nnz = max(nnz, before)
            p["row_offsets"][b + 1], p["kv_lens"][b], p["bad"][b] = before, length, fault
        offsets = p["row_offsets"][1 : len(self.ends) + 1]
        np.minimum(offsets, nnz, out=offsets)
        p["counts"][[PagerCount.BATCH, PagerCount.NNZ]] = len(self.ends), nnz
        p["counts"][PagerCount.FAULTS] = 0
        p["counts"][PagerCount.STAMP] += 1

    def row_need(self, b: int) -> tuple[int, int, int]:
        if self.begins is None:
            length = int(self.ends[b])
            pages = self.cut(length) if length > 0 else 0
            if length < 0 or pages > self.pages.shape[1]:
                return 0, 0, Fault.LENGTH
            return pages, length, 0
        begin, end = int(self.begins[b]), int(self.ends[b])
        if begin < 0 or end < begin or end > len(self.pages):
            return 0, 0, Fault.LENGTH
        if end == begin:
            return 0, 0, 0
        found = self.changes[: self.num_changes]
        first, after = (int(np.searchsorted(found, x)) for x in (begin + 1, end))
        self.ranges[[Ranges.FIRST_CHANGE, Ranges.END_CHANGE], b] = first, after
        if after <= first:
            return self.cut(end - begin), end - begin, 0
        inner = int(self.pieces[after - 1] - self.pieces[first])
        head, tail = self.cut(found[first] - begin), self.cut(end - found[after - 1])
        return head + inner + tail, end - begin, 0

    def entries(self) -> None:
        p = self.p
        for e in self.any_order(int(p["counts"][PagerCount.NNZ])):
            row = last_at_most(p["row_offsets"], 0, len(self.ends), e)
            place = e - int(p["row_offsets"][row])
            if self.begins is None:
                page, start = int(self.pages[row, place]), place * self.page_tokens
                tokens = min(int(self.ends[row]) - start, self.page_tokens)
            else:
                page, start, tokens = self.piece_of_map(row, place)
            if not 0 <= page < self.num_pages:
                page = 0
                p["bad"][row] |= Fault.PAGE
            p["cols"][e], p["token_counts"][e], p["starts"][e] = page, tokens, start
            p["rows"][e] = row

    def piece_of_map(self, row: int, place: int) -> tuple[int, int, int]:
        begin, end = int(self.begins[row]), int(self.ends[row])
        first, after = self.ranges[[Ranges.FIRST_CHANGE, Ranges.END_CHANGE], row].tolist()
        run_begin, run_end, piece = begin, end, place
        if after > first:
            run_end = int(self.changes[first])
            head = self.cut(run_end - begin)
            if place >= head:
                wanted = int(self.pieces[first]) + place - head
                change = last_at_most(self.pieces, first, after, wanted)
                piece = wanted - int(self.pieces[change])
                run_begin, run_end = int(self.changes[change]), end
                if change + 1 < after:
                    run_end = int(self.changes[change + 1])
        token = run_begin + piece * self.page_tokens
        page = int(self.pages[run_begin])
        return page, token - begin, min(run_end - token, self.page_tokens)

    def word(self, e: int) -> int:
        stamp = int(self.p["counts"][PagerCount.STAMP])
        return (2**31 - 1 - stamp) << 32 | e

    def claim(self) -> None:
        p = self.p
        for e in self.any_order(int(p["counts"][PagerCount.NNZ])):
            if p["bad"][p["rows"][e]] == 0:
                page = p["cols"][e]
                self.slots[page] = min(self.slots[page], self.word(e))
        for b in range(len(self.ends)):
            p["counts"][PagerCount.FAULTS] |= p["bad"][b]

    def stage(self) -> None:
        p, staged = self.p, 0
        for e in range(int(p["counts"][PagerCount.NNZ])):
            page = int(p["cols"][e])
            if self.slots[page] == self.word(e) and not self.is_resident(page):
                p["staging_ids"][staged] = page
                staged += 1
        p["counts"][PagerCount.STAGED] = staged

    def is_resident(self, page: int) -> bool:
        if self.resident is None:
            return False
        if self.resident.dtype == np.int32:
            return bool((self.resident[page >> 5] >> (page & 31)) & 1)
        return bool(self.resident[page])
