"""The merge of batch-invariant plans: a query token's chunks from the last to the first.

The arithmetic is that of `parts.fold`, which an attention kernel does on several chunks of an item
itself. Peaks of the running total are maxima, so a warp knows those of 32 chunks at once; what is
left of the chain is a product and a sum for each element and chunk. Where a CTA has the row, its
warps load 32 results together, and every thread folds a column.
"""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr

from flashcore.sm90.kernels.attention.parts import fold
from flashcore.sm90.kernels.dsl import SmemAllocator
from flashcore.sm90.kernels.merge import LANES, UNROLL, Merge, Share


class FoldMerge(Merge):
    """Merge of all query tokens of a batch-invariant plan, for one `MergeConfig`."""

    @cute.jit
    def share(self, begin: Int32, end: Int32, warp: Int32):
        """The whole list, of which every warp reads all weights."""
        return begin, end

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
        """One row."""
        together = const_expr(self.config.warps_per_row > 1)
        columns = const_expr(1 if together else self.columns)
        count = s.end - s.begin
        stage = None
        if const_expr(together):
            layout = cute.make_layout(
                (LANES, self.config.head_dim), stride=(self.config.head_dim, 1)
            )
            stage = SmemAllocator().allocate_tensor(Float32, layout, byte_alignment=16)
        acc = cute.make_rmem_tensor(columns, Float32)
        acc.fill(0.0)
        rows = cute.make_rmem_tensor((UNROLL, const_expr(self.columns)), Float32)
        rows.fill(0.0)
        peak, total = -Float32.inf, Float32(0.0)
        done = Int32(0)
        # The list's first 32 entries are there already; mostly they are all, to be turned round.
        entry = cute.arch.shuffle_sync(s.any_entry, max(min(count, LANES) - 1 - lane, 0))
        if count > LANES:
            entry = self.entry(mList, s.end - 1 - lane, s.end)
        while done < count:
            there = min(count - done, Int32(LANES))
            lse = -Float32.inf
            if lane < there:
                lse = mPartialLSE[entry, head]
            own = entry
            if const_expr(together):
                self.load_rows(mPartialO, own, UNROLL * warp, head, lane, rows)
            else:
                self.load_rows(mPartialO, own, Int32(0), head, lane, rows)
            done += LANES
            if done < count:
                entry = self.entry(mList, max(s.end - 1 - done - lane, s.begin), s.end)
            peaks = self.running_peaks(lse, peak, lane)
            before = cute.arch.shuffle_sync(peaks, max(lane - 1, 0))
            before = peak if lane == 0 else before
            peak = cute.arch.shuffle_sync(peaks, LANES - 1)
            if const_expr(together):
                self.put(stage, rows, lane, warp)
                cute.arch.sync_threads()
                column = min(LANES * warp + lane, const_expr(self.config.head_dim - 1))
                for j in cutlass.range(there, unroll=4):
                    x = cute.make_rmem_tensor(1, Float32)
                    x[0] = stage[j, column]
                    total = self.add(acc, x, before, lse, total, j)
                cute.arch.sync_threads()
            else:
                for j in cutlass.range(0, there, UNROLL, unroll=1):
                    for u in cutlass.range_constexpr(UNROLL):
                        if j + u < there:
                            total = self.add(acc, rows[u, None], before, lse, total, j + u)
                    if j + UNROLL < there:
                        self.load_rows(mPartialO, own, j + UNROLL, head, lane, rows)
        sink = Float32(0.0)
        if const_expr(self.config.sinks):
            sink = mSinks[head]
        factor, result = fold.finish(peak, total, sink, self.config.sinks)
        if const_expr(together):
            if LANES * warp + lane < self.config.head_dim:
                mO[token, head, LANES * warp + lane] = (acc[0] * factor).to(self.dtype)
        else:
            rO = cute.make_rmem_tensor(columns, self.dtype)
            for c in cutlass.range_constexpr(columns):
                rO[c] = (acc[c] * factor).to(self.dtype)
            self.write(rO, mO[token, head, None], lane)
        if lane == 0:
            mLSE[token, head] = result

    @cute.jit
    def running_peaks(self, lse: Float32, peak: Float32, lane: Int32) -> Float32:
        """The running total's peak after the chunk of each lane."""
        peaks = cute.arch.fmax(lse, peak)
        for k in cutlass.range_constexpr(5):
            above = cute.arch.shuffle_sync(peaks, max(lane - (1 << k), 0))
            peaks = cute.arch.fmax(peaks, above)
        return peaks

    @cute.jit
    def add(
        self,
        acc: cute.Tensor,
        x: cute.Tensor,  # as acc, of the chunk
        before: Float32,  # of each lane: peak before its chunk
        lse: Float32,  # of each lane: of its chunk
        total: Float32,
        j: Int32,  # lane of the chunk
    ) -> Float32:
        """Add a chunk to `acc`; the total with it."""
        peak, own = cute.arch.shuffle_sync(before, j), cute.arch.shuffle_sync(lse, j)
        _, total, scale, weight = fold.factors(peak, total, own)
        first, unseen = peak == -Float32.inf, own == -Float32.inf
        for c in cutlass.range_constexpr(cute.size(acc)):
            acc[c] = fold.weigh(acc[c], x[c], scale, weight, first, unseen)
        return total

    @cute.jit
    def put(self, stage: cute.Tensor, rows: cute.Tensor, lane: Int32, warp: Int32):
        """This warp's rows of 32 that a CTA loads together."""
        for u in cutlass.range_constexpr(UNROLL):
            values = cute.make_rmem_tensor(const_expr(self.columns), Float32)
            for c in cutlass.range_constexpr(self.columns):
                values[c] = rows[u, c]
            self.write(values, stage[UNROLL * warp + u, None], lane)
