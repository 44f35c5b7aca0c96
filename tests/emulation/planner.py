"""The planner's kernels step by step in numpy, on the buffers of a `DevicePlanner` on the CPU.

The same steps, loops and scratch as flashcore/sm90/kernels/planner; what is parallel there is done
here in an order drawn at random, so that a result that depends on the order shows. Scratch is
poisoned between updates where the kernels may not rely on it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from flashcore.contract.counts import INVALID, Count, Fault, Seen, Stat
from flashcore.contract.operands import PlannerSource
from flashcore.contract.reasons import Reason
from flashcore.contract.scratch import Entries as E
from flashcore.contract.scratch import Groups as G
from flashcore.contract.scratch import Rows, State, Tiles
from flashcore.contract.scratch import Segments as S
from flashcore.contract.work import DIRECT, FIELDS, Group, Work
from flashcore.planner.device_plan import Capacities
from flashcore.sm90.device_pager import DeviceLayout
from flashcore.sm90.device_planner import DevicePlanner
from tests.cases import Batch, batches
from tests.device_plan_cases import inputs, planner_for
from tests.emulation.planner_entries import POISON, EntriesEmulation, last_at_most

ROOMY = Capacities(max_batch=16, max_entries=400, max_q=64, max_partials=20_000)
batches_of_rows = batches(max_batch=9, ragged=False)


class Emulation(EntriesEmulation):
    """Stands in for the launch of the kernels."""

    def update(self, table: torch.Tensor, seq_lens: torch.Tensor, q_lens: torch.Tensor) -> None:
        self.poison()
        self.batch = table.shape[0]
        self.layout(table.numpy(), seq_lens.numpy(), q_lens.numpy())
        self.finish_update()

    def update_from_layout(self, layout: DeviceLayout, q_lens: torch.Tensor) -> None:
        self.poison()
        self.batch = len(q_lens)
        self.adopt(PlannerSource(*(t.numpy() for t in layout.source())), q_lens.numpy())
        self.finish_update()

    def poison(self) -> None:
        self.entries[:], self.segs[:], self.found[:] = POISON, POISON, POISON
        self.rows[Rows.FAULTS], self.rows[Rows.PAGE_FAULT + 1 :] = POISON, POISON

    def finish_update(self) -> None:
        self.claim()
        self.link()
        self.number_segments()
        if self.p["counts"][Count.SEGMENTS] <= self.c.max_segments:
            self.find_groups()
        self.finish()
        self.emit()
        self.tiles[Tiles.CUT, Tiles.STAMP] += 1

    # Step 5

    def find_groups(self) -> None:
        n, found = int(self.p["counts"][Count.SEGMENTS]), self.found
        num_found = int(self.p["counts"][Count.FOUND])
        for s in self.any_order(n):
            self.collect(s, n)
        for g in self.any_order(num_found):
            low = found[G.LOW, g]
            found[G.PARENT, g] = low if low == found[G.HIGH, g] else -1
            if found[G.PARENT, g] >= 0:
                found[G.CHILDREN, found[G.PARENT, g]] += 1
                found[G.CHILD_BLOCKS, found[G.PARENT, g]] += self.blocks(found[G.QUERIES, g])
        for s in self.any_order(max(n - 1, 0)):
            if self.segs[S.ROW, s] == self.segs[S.ROW, s + 1]:
                g = self.segs[S.GROUP, s]
                if found[G.PARENT, self.segs[S.GROUP, s + 1]] != g:
                    found[G.STRAYS, g] = 1
        self.kv_cost, self.folding = self.kv_token, False
        while True:
            gains = sum(self.judge(g) for g in self.any_order(num_found))
            if self.fold and (found[G.STATE, :num_found] == State.UNDECIDED).any():
                gains, self.folding = self.fold_groups(num_found), True
            if not self.fold or not 0 < gains <= self.least_gain:
                break
            self.kv_cost = 0
        self.keep(num_found, n)

    def collect(self, s: int, n: int) -> None:
        p, segs, found = self.p, self.segs, self.found
        entry, row, owner = segs[[S.ENTRY, S.ROW, S.OWNER], s]
        g = self.entries[E.GROUP, owner]
        end, last = p["row_offsets"][row + 1], True
        if s + 1 < n and segs[S.ROW, s + 1] == row:
            end, last = segs[S.ENTRY, s + 1], False
        before = -1
        if s > 0 and segs[S.ROW, s - 1] == row:
            before = self.entries[E.GROUP, segs[S.OWNER, s - 1]]
        segs[S.GROUP, s] = g
        found[G.MEMBERS, g] += 1
        found[G.QUERIES, g] += self.queries_of(row)
        found[G.LOW, g] = min(found[G.LOW, g], before)
        found[G.HIGH, g] = max(found[G.HIGH, g], before)
        if last:
            found[G.ENDS, g] = 1
        if owner == entry:
            found[G.ENTRIES, g] = end - entry
            tokens = (end - 1 - entry) * self.page_tokens + p["token_counts"][end - 1]
            found[G.TOKENS, g] = tokens

    def gain(self, g: int, tokens: int) -> int:
        found, queries = self.found, int(self.found[G.QUERIES, g])
        blocks = int(found[G.CHILD_BLOCKS, g]) - self.blocks(queries)
        return blocks * self.kv_cost * int(tokens) - queries * self.partial_token

    def judge(self, g: int) -> int:
        """What the group saves if it is worth keeping, else 0."""
        found = self.found
        members, tokens, children = found[[G.MEMBERS, G.TOKENS, G.CHILDREN], g]
        state, reason = State.KEPT, Reason.PRIVATE
        if members > 1 and not self.fold:
            reason = Reason.KEPT_ALL
        elif members > 1:
            small = self.gain(g, tokens) <= 0
            state, reason = State.UNDECIDED if small else State.WORTH, Reason.KEPT
            for hinders, name in (
                (found[G.STRAYS, g], Reason.KEPT_BRANCHING),
                (found[G.ENDS, g], Reason.KEPT_LAST),
                (tokens != found[G.ENTRIES, g] * self.page_tokens, Reason.KEPT_PARTIAL_PAGE),
            ):
                if hinders:
                    state, reason = State.KEPT, name if small else reason
        found[G.STATE, g] = state
        self.p["decisions"][g] = tokens, members, children, reason
        return self.gain(g, tokens) if state == State.WORTH else 0

    def fold_groups(self, num_found: int, threads: int = 4) -> int:
        """In tiles, as the kernel does it; small ones, so that there are several."""
        found, gains = self.found, 0
        for base in range(0, num_found, threads):
            waiting = set(range(base, min(base + threads, num_found)))
            while waiting:
                seen = {}
                for g in waiting:
                    parent = int(found[G.PARENT, g])
                    above = int(found[G.STATE, parent]) if parent >= 0 else State.KEPT
                    seen[g] = parent, above
                for g, (parent, above) in seen.items():
                    if above != State.UNDECIDED:
                        gains += self.decide(g, parent, above)
                        waiting.remove(g)
        return gains

    def decide(self, g: int, parent: int, above: int) -> int:
        found = self.found
        extra = 0
        if above == State.FOLDED:
            extra = found[G.TOKENS, parent] + found[G.EXTRA_TOKENS, parent]
            found[G.EXTRA_TOKENS, g] = extra
            found[G.EXTRA_ENTRIES, g] = found[G.ENTRIES, parent] + found[G.EXTRA_ENTRIES, parent]
        if found[G.STATE, g] == State.KEPT:
            return 0
        saves = self.gain(g, found[G.TOKENS, g] + extra)
        if found[G.STATE, g] == State.UNDECIDED:
            found[G.STATE, g] = State.WORTH if saves > 0 else State.FOLDED
            if saves <= 0:
                self.p["decisions"][g, 3] = Reason.FOLDED
                return 0
        return saves

    def keep(self, num_found: int, n: int) -> None:
        p, segs, found = self.p, self.segs, self.found
        self.groups = 0 if self.folding else num_found
        for g in range(num_found if self.folding else 0):
            folded = found[G.STATE, g] == State.FOLDED
            found[G.NUMBER, g] = -1 if folded else self.groups
            self.groups += not folded
        self.kept = 0
        for s in range(n):
            g = segs[S.GROUP, s]
            h = found[G.NUMBER, g] if self.folding else g
            if h < 0:
                continue
            entry, row = segs[[S.ENTRY, S.ROW], s]
            start = self.entries[E.START, entry] - found[G.EXTRA_TOKENS, g]
            segs[[S.KEPT_ROW, S.KEPT_GROUP, S.KEPT_START], self.kept] = row, h, start
            self.kept += 1
            if segs[S.OWNER, s] == entry:
                extra = found[G.EXTRA_ENTRIES, g]
                table = p["groups"][h]
                table[Group.ENTRY] = entry - extra
                table[Group.NUM_ENTRIES] = found[G.ENTRIES, g] + extra
                table[Group.NUM_TOKENS] = found[G.TOKENS, g] + found[G.EXTRA_TOKENS, g]
                table[Group.NUM_Q] = found[G.QUERIES, g]
                p["member_offsets"][h] = found[G.MEMBERS, g]

    # Step 6

    def blocks(self, queries: int) -> int:
        return (int(queries) * self.group_size + self.tile_m - 1) // self.tile_m

    def finish(self) -> None:
        p, counts = self.p, self.p["counts"]
        first = int(counts[Count.SEGMENTS] > self.c.max_segments)
        for attempt in range(first, 3):
            if attempt == 1:
                self.unshare()
            fits = self.cut(split=attempt < 2)
            if fits:
                break
        p["stats"][Stat.UNSHARED] = attempt > 0
        self.place_members()
        self.place_groups()
        self.place_classes()
        good = [b for b in range(self.batch) if self.active(b)]
        tokens = sum(int(p["kv_lens"][b]) for b in good)
        self.place_splits()
        self.place_lists(not fits)
        assert counts[Count.MERGE] <= len(p["merge_partials"])
        counts[Count.TOTAL_Q] = p["q_offsets"][self.batch]
        kept, found = int(fits), int(counts[Count.FOUND])
        p["stats"][Stat.TOKENS_UNIQUE] *= kept
        p["stats"][Stat.TOKENS_ONCE] = kept * p["groups"][: self.groups, Group.NUM_TOKENS].sum()
        p["stats"][Stat.TOKENS_PER_SEQUENCE] = kept * tokens
        p["stats"][Stat.NUM_GROUPS] = kept * self.groups
        p["stats"][Stat.NUM_FOLDED] = kept * (found - self.groups)
        p["stats"][Stat.UNSHARED] *= kept
        p["stats"][Stat.FAULTS] = counts[Count.FAULTS]

    def unshare(self) -> None:
        p, segs = self.p, self.segs
        stretches = 0
        for e in range(int(p["counts"][Count.NNZ])):
            row = self.entries[E.ROW, e]
            if self.active(row) and (
                e == p["row_offsets"][row] or p["token_counts"][e - 1] != self.page_tokens
            ):
                if stretches < self.c.max_segments:
                    segs[[S.ENTRY, S.ROW], stretches] = e, row
                stretches += 1
        p["counts"][Count.SEGMENTS] = stretches
        stretches = stretches if stretches <= self.c.max_segments else 0
        for s in self.any_order(stretches):
            entry, row = segs[[S.ENTRY, S.ROW], s]
            end, last = p["row_offsets"][row + 1], 1
            if s + 1 < stretches and segs[S.ROW, s + 1] == row:
                end, last = segs[S.ENTRY, s + 1], 0
            tokens = (end - 1 - entry) * self.page_tokens + p["token_counts"][end - 1]
            start = self.entries[E.START, entry]
            segs[[S.KEPT_ROW, S.KEPT_GROUP, S.KEPT_START], s] = row, s, start
            self.found[G.MERGED, s] = 0
            columns = [Group.ENTRY, Group.NUM_ENTRIES, Group.NUM_TOKENS, Group.NUM_Q]
            p["groups"][s, columns] = entry, end - entry, tokens, self.queries_of(row)
            p["member_offsets"][s] = 1
            p["decisions"][s] = tokens, 1, 1 - last, Reason.PRIVATE
        p["counts"][Count.FOUND] = stretches
        self.groups = self.kept = stretches

    def cut(self, split: bool) -> bool:
        table, segs, counts = self.p["groups"], self.segs, self.p["counts"]
        work = [
            (int(row[Group.NUM_TOKENS]), self.blocks(row[Group.NUM_Q]))
            for row in table[: self.groups]
        ]
        once, in_blocks = sum(t for t, _ in work), sum(t * blocks for t, blocks in work)
        block = self.block_cost
        for row, members in zip(table, self.p["member_offsets"][: self.groups], strict=False):
            if int(row[Group.NUM_Q]) * self.group_size > 128 * int(members):
                block = 0
        reads = int(16 * once >= block * in_blocks)
        each = [max(reads * (11 + 5 * blocks), block * blocks) for _, blocks in work]
        total = self.kv_heads * sum(t * cost for (t, _), cost in zip(work, each, strict=True))
        items = [t * cost // blocks for (t, blocks), cost in zip(work, each, strict=True)]
        share = 0
        if self.workers > 1 and any(4 * cost * self.workers > 5 * total for cost in items):
            two, four = -(-total // (2 * self.workers)), -(-total // (4 * self.workers))
            share = max(min(two, 16 * self.long), four)
            if len(set(items)) == 1:
                share = -(-total // self.workers)
            few = total < 16 * 128 * self.workers
            share = max(share, 16 * (min(self.least, 127) if few else self.least))
        share *= split
        unit = self.unit // self.page_tokens
        for row, (_, blocks), cost in zip(table[: self.groups], work, each, strict=True):
            pages = per_split = int(row[Group.NUM_ENTRIES])
            if share:
                length = (share * blocks // cost // self.unit + 1) * unit
                splits = max(1, (4 * pages + 3 * length - 1) // (4 * length))
                per_split = -(-pages // splits)
                per_split = -(-per_split // unit) * unit
            per_split = self.pages_of_split(int(row[Group.ENTRY]), pages, per_split, split)
            row[Group.SPLIT_ENTRIES] = per_split
            row[Group.NUM_SPLITS] = (pages + per_split - 1) // per_split
        for k in self.any_order(self.kept):
            around = [j for j in (k - 1, k + 1) if 0 <= j < self.kept]
            if any(segs[S.KEPT_ROW, j] == segs[S.KEPT_ROW, k] for j in around):
                self.found[G.MERGED, segs[S.KEPT_GROUP, k]] = 1
        gathered = partials = items = 0
        for h, (row, (_, blocks)) in enumerate(zip(table[: self.groups], work, strict=True)):
            queries, splits = int(row[Group.NUM_Q]), int(row[Group.NUM_SPLITS])
            gathered += queries
            partials += 0 if self.is_direct(h) else splits * queries
            items += splits * blocks * self.kv_heads
        fits = gathered <= len(self.p["q_tokens"]) and items <= len(self.p["work"])
        fits = fits and partials <= self.c.max_partials
        fits = fits and counts[Count.SEGMENTS] <= self.c.max_segments
        lists = [Count.GATHERED, Count.PARTIALS, Count.ITEMS]
        counts[lists] = (gathered, partials, items) if fits else 0
        counts[[Count.GROUPS, Count.MEMBERS, Count.FITS]] = self.groups, self.kept, fits
        return fits

    def pages_of_split(self, entry: int, pages: int, balanced: int, split: bool) -> int:
        return balanced

    def is_direct(self, h: int) -> bool:
        return self.p["groups"][h, Group.NUM_SPLITS] == 1 and self.found[G.MERGED, h] == 0

    def place_members(self) -> None:
        p, segs = self.p, self.segs
        order = np.argsort(segs[S.KEPT_GROUP, : self.kept], kind="stable")
        before = 0
        for i, k in enumerate(order):
            row = segs[S.KEPT_ROW, k]
            segs[S.Q_BEGIN, k] = segs[S.MEMBER_BEGIN, i] = before
            p["member_rows"][i], p["member_starts"][i] = row, segs[S.KEPT_START, k]
            before += self.queries_of(row)

    def place_groups(self) -> None:
        p, table = self.p, self.p["groups"]
        members = gathered = partials = 0
        self.classes = []
        for h in range(self.groups):
            row = table[h]
            queries, splits = int(row[Group.NUM_Q]), int(row[Group.NUM_SPLITS])
            direct = self.is_direct(h)
            full = int(row[Group.SPLIT_ENTRIES]) * self.page_tokens
            last = int(row[Group.NUM_TOKENS]) - (splits - 1) * full
            per_split = self.blocks(queries) * self.kv_heads
            weight = 2 if self.blocks(queries) > 1 else 1
            first = full if splits > 1 else last
            self.classes.append((weight * first, 2 * h, (splits - 1) * per_split))
            self.classes.append((weight * last, 2 * h + 1, per_split))
            size = p["member_offsets"][h]
            p["member_offsets"][h] = members
            row[Group.Q_BEGIN] = gathered
            row[Group.PARTIAL] = DIRECT if direct else partials
            members += size
            gathered += queries
            partials += 0 if direct else splits * queries
        p["member_offsets"][self.groups] = members

    def place_classes(self) -> None:
        self.classes.sort(key=lambda c: -c[0])  # stable
        begins = np.cumsum([0] + [c[2] for c in self.classes])
        self.class_begin = begins[:-1]

    def place_splits(self) -> None:
        segs, rows = self.segs, self.rows
        rows[[Rows.FIRST_SEGMENT, Rows.END_SEGMENT]] = 0
        self.splits = 0
        for k in range(self.kept):
            row = segs[S.KEPT_ROW, k]
            splits = int(self.p["groups"][segs[S.KEPT_GROUP, k], Group.NUM_SPLITS])
            if k == 0 or segs[S.KEPT_ROW, k - 1] != row:
                rows[Rows.FIRST_SEGMENT, row] = k
            if k + 1 == self.kept or segs[S.KEPT_ROW, k + 1] != row:
                rows[Rows.END_SEGMENT, row] = k + 1
            segs[S.SPLITS_BEFORE, k] = self.splits
            self.splits += splits

    def place_lists(self, failed: bool) -> None:
        p, rows = self.p, self.rows
        begin, longest, faults = 0, 0, 0
        for b in range(self.batch):
            queries = self.queries_of(b)
            longest = max(longest, queries)
            fault = int(rows[Rows.FAULTS, b])
            if rows[Rows.PAGE_FAULT, b]:
                fault |= Fault.PAGE
                rows[Rows.PAGE_FAULT, b] = 0
            if failed and queries:
                fault |= Fault.PLAN
            if fault:
                p["kv_lens"][b] = 0
                self.seen[Seen.SEQUENCE] = b
            p["bad"][b] = fault
            faults |= fault
            first, end = rows[[Rows.FIRST_SEGMENT, Rows.END_SEGMENT], b]
            length = 0
            if fault:
                length = 1
            elif end > first:
                after = self.segs[S.SPLITS_BEFORE, end] if end < self.kept else self.splits
                length = after - self.segs[S.SPLITS_BEFORE, first]
            rows[[Rows.LIST_LENGTH, Rows.MERGE_BEGIN], b] = length, begin
            begin += length * queries
        p["counts"][Count.MERGE] = begin
        p["counts"][Count.MAX_Q_LEN], p["counts"][Count.FAULTS] = longest, faults
        if faults:
            self.seen[Seen.UPDATES] += 1
            self.seen[Seen.FAULTS] |= faults

    # Step 7

    def emit(self) -> None:
        p, counts = self.p, self.p["counts"]
        begins = self.segs[S.MEMBER_BEGIN]
        for i in self.any_order(int(counts[Count.GATHERED])):
            member = last_at_most(begins, 0, int(counts[Count.MEMBERS]), i)
            row = p["member_rows"][member]
            token = i - begins[member]
            own = p["kv_lens"][row] - self.queries_of(row)
            p["q_tokens"][i] = p["q_offsets"][row] + token
            p["q_positions"][i] = own + token - p["member_starts"][member]
        for q in self.any_order(len(p["merge_offsets"])):
            begin, token = counts[Count.MERGE], 0
            if q < counts[Count.TOTAL_Q]:
                row = last_at_most(p["q_offsets"], 0, self.batch, q)
                token = q - p["q_offsets"][row]
                begin = self.rows[Rows.MERGE_BEGIN, row]
                begin = begin + token * self.rows[Rows.LIST_LENGTH, row]
            p["merge_offsets"][q] = begin
            if q < len(p["q_index"]):
                p["q_index"][q] = token
        for i in self.any_order(int(counts[Count.MERGE])):
            p["merge_partials"][i] = self.merge_element(i)
        for i in self.any_order(int(counts[Count.ITEMS])):
            p["work"][i] = self.work_item(i)

    def merge_element(self, i: int) -> int:
        segs, rows = self.segs, self.rows
        row = last_at_most(rows[Rows.MERGE_BEGIN], 0, self.batch, i)
        if self.p["bad"][row]:
            return INVALID
        place = i - int(rows[Rows.MERGE_BEGIN, row])
        token, place = divmod(place, int(rows[Rows.LIST_LENGTH, row]))
        first = int(rows[Rows.FIRST_SEGMENT, row])
        place += int(segs[S.SPLITS_BEFORE, first])
        k = last_at_most(segs[S.SPLITS_BEFORE], first, int(rows[Rows.END_SEGMENT, row]), place)
        group = self.p["groups"][segs[S.KEPT_GROUP, k]].tolist()
        if group[Group.PARTIAL] == DIRECT:
            return DIRECT
        split = place - int(segs[S.SPLITS_BEFORE, k])
        gathered = int(segs[S.Q_BEGIN, k]) + token - group[Group.Q_BEGIN]
        return group[Group.PARTIAL] + split * group[Group.NUM_Q] + gathered

    def work_item(self, i: int) -> list[int]:
        place = last_at_most(self.class_begin, 0, 2 * self.groups, i)
        which = self.classes[place][1]
        group = self.p["groups"][which >> 1].tolist()
        blocks, index = self.blocks(group[Group.NUM_Q]), i - int(self.class_begin[place])
        split = index // (blocks * self.kv_heads)
        if which & 1:
            split = group[Group.NUM_SPLITS] - 1
        row = index % blocks * self.tile_m
        first_entry = split * group[Group.SPLIT_ENTRIES]
        offset = first_entry * self.page_tokens
        partial = group[Group.PARTIAL]
        if partial != DIRECT:
            partial += split * group[Group.NUM_Q] + row // self.group_size
        item = [0] * FIELDS
        item[Work.KV_HEAD] = index // blocks % self.kv_heads
        item[Work.ROW_BEGIN] = group[Group.Q_BEGIN] * self.group_size + row
        item[Work.NUM_ROWS] = min(group[Group.NUM_Q] * self.group_size - row, self.tile_m)
        item[Work.ENTRY] = group[Group.ENTRY] + first_entry
        item[Work.NUM_TOKENS] = min(
            group[Group.NUM_TOKENS] - offset, group[Group.SPLIT_ENTRIES] * self.page_tokens
        )
        item[Work.KV_OFFSET], item[Work.PARTIAL] = offset, partial
        item[Work.GROUP] = which >> 1
        return item


def emulate(
    batch: Batch,
    capacities: Capacities = ROOMY,
    kind: type[Emulation] = Emulation,
    **options: Any,
) -> DevicePlanner:
    """A planner that has planned the batch."""
    planner = planner_for(batch, capacities, "cpu", **options)
    emulation = kind(planner, batch.seed)
    for _ in range(2):  # the first leaves its scratch to the second
        emulation.update(*inputs(batch, "cpu"))
    return planner
