"""What one CTA of SCAN_THREADS threads can do together: scans, sums, a stable radix sort; and how
CTAs of ENTRY_THREADS share a list."""

from __future__ import annotations

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64, const_expr

from flashcore.config.planner import (
    ENTRY_THREADS,
    RADIX_BINS,
    RADIX_BITS,
    SCAN_THREADS,
    WARPS,
    Sort,
)


class Shared(NamedTuple):
    """Shared memory of a CTA that scans and sorts."""

    sums: cute.Tensor  # int32 (WARPS,)
    wide: cute.Tensor  # int64 (WARPS,)
    bins: cute.Tensor  # int32 (RADIX_BINS,)
    warp_bins: cute.Tensor  # int32 (RADIX_BINS * WARPS,), bins of a warp together


@cute.jit
def first_and_stride():
    """First element of this thread of ENTRY_THREADS, and the distance to its next."""
    tid, _, _ = cute.arch.thread_idx()
    bid, _, _ = cute.arch.block_idx()
    grid, _, _ = cute.arch.grid_dim()
    return bid * ENTRY_THREADS + tid, grid * ENTRY_THREADS


@cute.jit
def warp_scan(x: Int32):
    """Inclusive prefix sum over the lanes of a warp."""
    lane = cute.arch.lane_idx()
    total = x
    for k in cutlass.range_constexpr(5):
        other = cute.arch.shuffle_sync_up(total, 1 << k, mask_and_clamp=0)
        total = total + (other if lane >= (1 << k) else Int32(0))
    return total


@cute.jit
def block_scan(x: Int32, sums: cute.Tensor):
    """Exclusive prefix sum over the CTA's threads, and the sum of all. Every thread takes part."""
    lane, warp = cute.arch.lane_idx(), cute.arch.warp_idx()
    inclusive = warp_scan(x)
    if lane == 31:
        sums[warp] = inclusive
    cute.arch.sync_threads()
    totals = warp_scan(sums[lane])
    total = cute.arch.shuffle_sync(totals, 31)
    before = cute.arch.shuffle_sync(totals, (warp + 31) % 32)
    before = before if warp > 0 else Int32(0)
    cute.arch.sync_threads()
    return before + inclusive - x, total


@cute.jit
def block_sum(x: Int64, wide: cute.Tensor):
    """Sum over the CTA's threads in 64 bits."""
    # warp_idx is itself a shuffle of the whole warp: never under a condition on the lane.
    lane, warp = cute.arch.lane_idx(), cute.arch.warp_idx()
    x = warp_sum(x)
    if lane == 0:
        wide[warp] = x
    cute.arch.sync_threads()
    # Shuffles of all warps take longer than one more barrier.
    if warp == 0:
        total = warp_sum(wide[lane])
        if lane == 0:
            wide[0] = total
    cute.arch.sync_threads()
    total = wide[0]
    cute.arch.sync_threads()
    return total


@cute.jit
def warp_sum(x: Int64):
    """Sum over the lanes of a warp; shuffles move 32 bits."""
    for k in cutlass.range_constexpr(5):
        low = cute.arch.shuffle_sync_bfly((x & Int64(0xFFFFFFFF)).to(Int32), 1 << k)
        high = cute.arch.shuffle_sync_bfly((x >> 32).to(Int32), 1 << k)
        x = x + ((Int64(high) << 32) | (Int64(low) & Int64(0xFFFFFFFF)))
    return x


@cute.jit
def block_any(x: Int32, sums: cute.Tensor):
    """Whether x is not 0 in some thread, as 0 or 1."""
    lane, warp = cute.arch.lane_idx(), cute.arch.warp_idx()
    mine = cute.arch.vote_ballot_sync(x != 0)
    if lane == 0:
        sums[warp] = mine
    cute.arch.sync_threads()
    found = cute.arch.vote_ballot_sync(sums[lane] != 0)
    cute.arch.sync_threads()
    return Int32(1) if found != 0 else Int32(0)


@cute.jit
def last_at_most(values: cute.Tensor, low: Int32, high: Int32, x: Int32):
    """Largest index of low .. high - 1 whose value is at most x; values ascend from <= x."""
    while high - low > 1:
        middle = (low + high) >> 1
        below = values[middle] <= x
        low = middle if below else low
        high = high if below else middle
    return low


@cute.jit
def radix_sort(mSort: cute.Tensor, n: Int32, largest: Int32, shared: Shared):
    """Sort n (key, value) pairs of buffer 0 by key, stably; keys are 0 .. largest.

    Returns the buffer that has the result.
    """
    tid, _, _ = cute.arch.thread_idx()
    source, shift, left = Int32(0), Int32(0), largest
    while left > 0:
        if tid < RADIX_BINS:
            shared.bins[tid] = Int32(0)
        cute.arch.sync_threads()
        for i in cutlass.range(tid, n, SCAN_THREADS, unroll=1):
            digit = (mSort[2 * source + Sort.KEY, i] >> shift) & (RADIX_BINS - 1)
            cute.arch.atomic_add(shared.bins.iterator + digit, Int32(1), sem="relaxed", scope="cta")
        cute.arch.sync_threads()
        count = shared.bins[tid % RADIX_BINS] if tid < RADIX_BINS else Int32(0)
        before, _ = block_scan(count, shared.sums)
        if tid < RADIX_BINS:
            shared.bins[tid] = before
        for base in cutlass.range(0, n, SCAN_THREADS, unroll=1):
            radix_tile(mSort, source, base, n, shift, shared)
        source = 1 - source
        shift = shift + RADIX_BITS
        left = left >> RADIX_BITS
    return source


@cute.jit
def radix_tile(
    mSort: cute.Tensor, source: Int32, base: Int32, n: Int32, shift: Int32, shared: Shared
):
    """Move one tile of SCAN_THREADS pairs to its places; `bins` holds where each digit goes on."""
    tid, _, _ = cute.arch.thread_idx()
    lane, warp = cute.arch.lane_idx(), cute.arch.warp_idx()
    i = base + tid
    there = i < n
    key, value = Int32(0), Int32(0)
    if there:
        key = mSort[2 * source + Sort.KEY, i]
        value = mSort[2 * source + Sort.VALUE, i]
    digit = (key >> shift) & (RADIX_BINS - 1)
    for k in cutlass.range_constexpr(RADIX_BINS * WARPS // SCAN_THREADS):
        shared.warp_bins[k * SCAN_THREADS + tid] = Int32(0)
    cute.arch.sync_threads()
    same = cute.arch.vote_ballot_sync(there)
    for k in cutlass.range_constexpr(RADIX_BITS):
        bit = (digit >> k) & 1
        ones = cute.arch.vote_ballot_sync(bit != 0)
        same = same & (ones if bit != 0 else ones ^ Int32(-1))
    rank = cute.arch.popc(same & ((Int32(1) << lane) - 1))
    slot = warp * RADIX_BINS + digit
    if there and rank == 0:
        shared.warp_bins[slot] = cute.arch.popc(same)
    cute.arch.sync_threads()
    if tid < RADIX_BINS:
        place = shared.bins[tid]
        for w in cutlass.range(WARPS, unroll=8):
            count = shared.warp_bins[w * RADIX_BINS + tid]
            shared.warp_bins[w * RADIX_BINS + tid] = place
            place = place + count
        shared.bins[tid] = place
    cute.arch.sync_threads()
    if there:
        place = shared.warp_bins[slot] + rank
        mSort[2 * (1 - source) + Sort.KEY, place] = key
        mSort[2 * (1 - source) + Sort.VALUE, place] = value
    cute.arch.sync_threads()


@cute.jit
def shared_memory(smem) -> Shared:
    """Allocate `Shared`."""
    int32 = lambda n: smem.allocate_tensor(Int32, cute.make_layout(n))  # noqa: E731
    wide = smem.allocate_tensor(Int64, cute.make_layout(const_expr(WARPS)))
    return Shared(int32(WARPS), wide, int32(RADIX_BINS), int32(RADIX_BINS * WARPS))
