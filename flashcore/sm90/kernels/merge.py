"""Merging partial results: out = sum_i exp(lse_i - lse) out_i over a query token's merge list.

One warp per (query token, head), or a CTA of eight where lists are long, or one warp for eight
heads of a token where tokens are many: few of them have anything to merge then. The list is walked
in its order, so the same inputs give the same bits.

Tokens whose only result is in the output already are left alone; tokens with an empty list see no
key. With a plan made on the device, tokens whose sequence could not be planned become NaN, and
places past the last query token have empty lists.
"""

from __future__ import annotations

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float16, Float32, Int32, const_expr

from flashcore.contract.counts import INVALID
from flashcore.sm90.config.merge import MergeConfig
from flashcore.sm90.kernels.attention.parts.device_counts import plan_fits
from flashcore.sm90.kernels.attention.parts.softmax import LN2, LOG2_E
from flashcore.sm90.kernels.dsl import SmemAllocator

WARPS = 8
LANES = 32
UNROLL = 4  # rows of partial results in flight in a warp; WARPS * UNROLL is LANES


class Share(NamedTuple):
    """A row's merge list, this warp's part of it, and this lane's entry of the first 32 of each."""

    begin: Int32
    end: Int32
    first: Int32
    last: Int32
    any_entry: Int32
    own_entry: Int32


class Merge:
    """Merge of all query tokens of a plan, for one `MergeConfig`."""

    def __init__(self, config: MergeConfig):
        self.config = config
        self.dtype = {"bf16": BFloat16, "fp16": Float16}[config.dtype]
        # A power of two for whole vectors; lanes past the last column work along and write nothing.
        self.columns = next(n for n in (2, 4, 8) if n * LANES >= config.head_dim)  # of a lane
        self.lanes = config.head_dim // self.columns

    @cute.jit
    def __call__(
        self,
        out: cute.Tensor,  # these as in `contract.operands.Merge`
        lse: cute.Tensor,
        partial_out: cute.Tensor,
        partial_lse: cute.Tensor,
        merge_offsets: cute.Tensor,
        merge_partials: cute.Tensor,
        sinks: cute.Tensor | None,
        counts: cute.Tensor | None,
        tree_width: Int32,
        stream,
    ):
        rows = out.shape[0] * self.units(out.shape[1])
        self.kernel(
            out, lse, partial_out, partial_lse, merge_offsets, merge_partials, sinks, counts,
            tree_width,
        ).launch(
            grid=[cute.ceil_div(rows * self.config.warps_per_row, WARPS), 1, 1],
            block=[WARPS * LANES, 1, 1],
            stream=stream,
            use_pdl=True,
        )  # fmt: skip

    @cute.kernel
    def kernel(
        self,
        mO: cute.Tensor,
        mLSE: cute.Tensor,
        mPartialO: cute.Tensor,
        mPartialLSE: cute.Tensor,
        mOffsets: cute.Tensor,
        mList: cute.Tensor,
        mSinks: cute.Tensor | None,
        mCounts: cute.Tensor | None,
        tree_width: Int32,
    ):
        tidx, _, _ = cute.arch.thread_idx()
        bid, _, _ = cute.arch.block_idx()
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        lane = tidx % LANES
        units = self.units(mO.shape[1])
        index = bid * (WARPS // self.config.warps_per_row)
        if const_expr(self.config.warps_per_row == 1):
            index += warp
        there = index < mO.shape[0] * units
        token, head, begin, end = Int32(0), Int32(0), Int32(0), Int32(0)
        first, last = Int32(0), Int32(0)
        any_entry, own_entry = Int32(0), Int32(0)
        if there:
            token, head = index // units, index % units * self.config.heads_per_warp
            if token < mOffsets.shape[0] - 1:
                begin, end = mOffsets[token], mOffsets[token + 1]
            first, last = self.share(begin, end, warp)
            # The plan is older than the attention kernel: its lists need no waiting.
            any_entry = self.entry(mList, begin + lane, end)
            own_entry = any_entry
            if const_expr(self.config.warps_per_row > 1):
                own_entry = self.entry(mList, first + lane, end)
        cute.arch.griddepcontrol_wait()
        if there:
            leading = Int32(0)  # DIRECT and INVALID are negative and stand alone
            if end > begin:
                leading = cute.arch.shuffle_sync(any_entry, 0)
            if const_expr(self.config.device_counts):
                if not plan_fits(mCounts, mO.shape[0], tree_width):
                    leading = Int32(INVALID)
                if leading == INVALID:
                    if const_expr(self.config.heads_per_warp == 1):
                        self.spoil(mO, mLSE, token, head, lane)
                    else:
                        for h in cutlass.range(head, self.end(head, mO), unroll=1):
                            self.spoil(mO, mLSE, token, h, lane)
            if leading >= 0:
                share = Share(begin, end, first, last, any_entry, own_entry)
                if const_expr(self.config.heads_per_warp == 1):
                    self.merge(
                        mO, mLSE, mPartialO, mPartialLSE, mList, mSinks, token, head, share,
                        lane, warp,
                    )  # fmt: skip
                else:
                    for h in cutlass.range(head, self.end(head, mO), unroll=1):
                        self.merge(
                            mO, mLSE, mPartialO, mPartialLSE, mList, mSinks, token, h, share,
                            lane, warp,
                        )  # fmt: skip

    @cute.jit
    def units(self, heads: Int32) -> Int32:
        """Warps, or CTAs, that a token takes."""
        if const_expr(self.config.heads_per_warp > 1):
            heads = cute.ceil_div(heads, self.config.heads_per_warp)
        return heads

    @cute.jit
    def end(self, head: Int32, mO: cute.Tensor) -> Int32:
        """Last + 1 of the heads that a warp takes from `head` on."""
        return min(head + self.config.heads_per_warp, mO.shape[1])

    @cute.jit
    def share(self, begin: Int32, end: Int32, warp: Int32):
        """First and last + 1 of a warp's part of a list: a contiguous share for each, so that the
        order of the sum depends on nothing else."""
        share = cute.ceil_div(end - begin, self.config.warps_per_row)
        first = begin
        if const_expr(self.config.warps_per_row > 1):
            first = min(begin + warp * share, end)
        last = min(first + share, end)
        return first, last

    @cute.jit
    def entry(self, mList: cute.Tensor, i: Int32, end: Int32) -> Int32:
        """Entry i of the merge lists, the one before `end` from there on."""
        partial = Int32(0)
        if end > 0:
            partial = mList[min(i, end - 1)]
        return partial

    @cute.jit
    def merge(
        self,
        mO: cute.Tensor,
        mLSE: cute.Tensor,
        mPartialO: cute.Tensor,
        mPartialLSE: cute.Tensor,
        mList: cute.Tensor,
        mSinks: cute.Tensor | None,
        token: Int32,
        head: Int32,
        s: Share,
        lane: Int32,
        warp: Int32,
    ):
        """One row: the peak of all terms, then the weighted sum in list order."""
        columns = const_expr(self.columns)
        begin, end, first, last, any_entry, own_entry = s
        # The first rows are on their way while the weights are made.
        rows = cute.make_rmem_tensor((UNROLL, columns), Float32)
        rows.fill(0.0)
        if first < last:
            self.load_rows(mPartialO, own_entry, Int32(0), head, lane, rows)
        peak = -Float32.inf
        if begin + lane < end:
            peak = mPartialLSE[any_entry, head]
        own_term = peak
        if const_expr(self.config.warps_per_row > 1):
            own_term = -Float32.inf
            if first + lane < last:
                own_term = mPartialLSE[own_entry, head]
        i = begin + lane + LANES
        while i < end:
            peak = cute.arch.fmax(peak, mPartialLSE[mList[i], head])
            i += LANES
        for k in cutlass.range_constexpr(5):
            peak = cute.arch.fmax(peak, cute.arch.shuffle_sync_bfly(peak, 1 << k))
        if const_expr(self.config.sinks):
            peak = cute.arch.fmax(peak, mSinks[head])
        safe = Float32(0.0) if peak == -Float32.inf else peak
        acc = cute.make_rmem_tensor(columns + 1, Float32)  # weights in the last column
        acc.fill(0.0)
        chunk = first
        while chunk < last:
            # 32 entries: an entry and its weight in each lane.
            if chunk > first:
                own_entry = self.entry(mList, chunk + lane, end)
                own_term = -Float32.inf
                if chunk + lane < last:
                    own_term = mPartialLSE[own_entry, head]
                self.load_rows(mPartialO, own_entry, Int32(0), head, lane, rows)
            weight = cute.math.exp2((own_term - safe) * LOG2_E, fastmath=True)
            count = min(last - chunk, Int32(LANES))
            for j in cutlass.range(0, count, UNROLL, unroll=1):
                self.add_rows(acc, weight, j, count, rows)
                if j + UNROLL < count:
                    self.load_rows(mPartialO, own_entry, j + UNROLL, head, lane, rows)
            chunk += LANES
        if const_expr(self.config.warps_per_row == 1):
            self.store(mO, mLSE, mSinks, token, head, lane, safe, acc)
        else:
            self.gather(acc, lane, warp)
            if warp == 0:
                self.store(mO, mLSE, mSinks, token, head, lane, safe, acc)

    @cute.jit
    def add_rows(
        self,
        acc: cute.Tensor,
        weight: Float32,  # of this lane's entry
        j: Int32,
        count: Int32,
        rows: cute.Tensor,
    ):
        """Add the rows of entries j .. j + UNROLL - 1, as far as there are so many."""
        columns = const_expr(self.columns)
        for u in cutlass.range_constexpr(UNROLL):
            w = cute.arch.shuffle_sync(weight, j + u)
            if j + u < count:  # past them an entry comes again, and 0 times infinity is NaN
                acc[columns] = acc[columns] + w
                for c in cutlass.range_constexpr(columns):
                    acc[c] = acc[c] + w * rows[u, c]

    @cute.jit
    def load_rows(
        self,
        mPartialO: cute.Tensor,
        entry: Int32,
        j: Int32,
        head: Int32,
        lane: Int32,
        rows: cute.Tensor,
    ):
        """Rows of the entries that lanes j .. j + UNROLL - 1 hold, all of them in flight."""
        for u in cutlass.range_constexpr(UNROLL):
            partial = cute.arch.shuffle_sync(entry, j + u)
            values = cute.make_rmem_tensor(self.columns, Float32)
            within = lane if const_expr(self.lanes == LANES) else min(lane, self.lanes - 1)
            cute.autovec_copy(self.row(mPartialO[partial, head, None], within), values)
            for c in cutlass.range_constexpr(self.columns):
                rows[u, c] = values[c]

    @cute.jit
    def gather(self, acc: cute.Tensor, lane: Int32, warp: Int32):
        """Add the warps' shares in warp order; the result is warp 0's."""
        width = const_expr(self.columns + 1)
        layout = cute.make_layout((WARPS, LANES, width), stride=(LANES * width, width, 1))
        shares = SmemAllocator().allocate_tensor(Float32, layout, byte_alignment=16)
        for c in cutlass.range_constexpr(width):
            shares[warp, lane, c] = acc[c]
        cute.arch.sync_threads()
        for w in cutlass.range_constexpr(1, WARPS):
            for c in cutlass.range_constexpr(width):
                acc[c] = acc[c] + shares[w, lane, c]

    @cute.jit
    def store(
        self,
        mO: cute.Tensor,
        mLSE: cute.Tensor,
        mSinks: cute.Tensor | None,
        token: Int32,
        head: Int32,
        lane: Int32,
        peak: Float32,
        acc: cute.Tensor,
    ):
        """Normalise and write a row, with its LSE."""
        columns = const_expr(self.columns)
        total = acc[columns]
        if const_expr(self.config.sinks):
            total += cute.math.exp2((mSinks[head] - peak) * LOG2_E, fastmath=True)
        factor = Float32(0.0) if total == 0.0 else 1.0 / total
        rO = cute.make_rmem_tensor(columns, self.dtype)
        for c in cutlass.range_constexpr(columns):
            rO[c] = (acc[c] * factor).to(self.dtype)
        self.write(rO, mO[token, head, None], lane)
        if lane == 0:
            lse = -Float32.inf
            if total > 0.0:
                lse = peak + cute.math.log2(total, fastmath=True) * LN2
            mLSE[token, head] = lse

    @cute.jit
    def spoil(self, mO: cute.Tensor, mLSE: cute.Tensor, token: Int32, head: Int32, lane: Int32):
        """A row of NaN. Warps that share the row all write the same."""
        rO = cute.make_rmem_tensor(const_expr(self.columns), self.dtype)
        rO.fill(float("nan"))
        self.write(rO, mO[token, head, None], lane)
        if lane == 0:
            mLSE[token, head] = Float32(float("nan"))

    @cute.jit
    def write(self, values: cute.Tensor, mRow: cute.Tensor, lane: Int32):
        """Write this lane's columns of a row, if it has any."""
        if const_expr(self.lanes < LANES):
            if lane < self.lanes:
                cute.autovec_copy(values, self.row(mRow, lane))
        else:
            cute.autovec_copy(values, self.row(mRow, lane))

    @cute.jit
    def row(self, mRow: cute.Tensor, lane: Int32) -> cute.Tensor:
        """This lane's columns of a row, for a vector copy."""
        width = const_expr(self.columns * mRow.element_type.width // 8)
        at = (mRow.iterator + lane * self.columns).align(min(width, 16))
        return cute.make_tensor(at, cute.make_layout(self.columns))
