"""What the threads of one CTA can do together: scans, sums, a stable sort; and how threads share a
list.

Every thread of the CTA takes part in what is named block_*, every lane of a warp in what is named
warp_*. warp_idx is itself a shuffle of the whole warp: never under a condition on the lane.
"""

from __future__ import annotations

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64, const_expr

from flashcore.contract.scratch import Sort
from flashcore.sm90.config.planner import (
    GROUP_THREADS,
    RADIX_BINS,
    RADIX_BITS,
    RANKED,
)

TOGETHER = 4  # numbers that are scanned or summed at once


class Shared(NamedTuple):
    """Shared memory of a CTA of GROUP_THREADS that scans and sorts."""

    sums: cute.Tensor  # int32 (TOGETHER, warps)
    wide: cute.Tensor  # int64 (TOGETHER, warps + 1), the last for sums of all
    bins: cute.Tensor  # int32 (RADIX_BINS,)
    warp_bins: cute.Tensor  # int32 (RADIX_BINS * warps,), bins of a warp together


class Part(NamedTuple):
    """This thread's part of a list."""

    first: Int32  # element
    stride: Int32  # to its next


@cute.jit
def part_of_grid(threads: cutlass.Constexpr[int]) -> Part:
    """Where all CTAs along x share a list."""
    tid, _, _ = cute.arch.thread_idx()
    bid, _, _ = cute.arch.block_idx()
    grid, _, _ = cute.arch.grid_dim()
    return Part(bid * threads + tid, grid * threads)


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
def warp_sum(x: Int64):
    """Sum over the lanes of a warp: 32 numbers of 22 bits do not overflow one of 32."""
    low, middle = (x & Int64(0x3FFFFF)).to(Int32), ((x >> 22) & Int64(0x3FFFFF)).to(Int32)
    low = Int64(cute.arch.warp_redux_sync(low, "add"))
    middle = Int64(cute.arch.warp_redux_sync(middle, "add"))
    high = Int64(cute.arch.warp_redux_sync((x >> 44).to(Int32), "add"))
    return low + (middle << 22) + (high << 44)


@cute.jit
def of_warp(line: cute.Tensor, warps: cutlass.Constexpr[int], lane: Int32):
    """The number of warp `lane`, 0 past the last."""
    x = line.element_type(0)
    if const_expr(warps == 32):
        x = line[lane]
    else:
        if lane < warps:
            x = line[lane]
    return x


@cute.jit
def sums_of_warps(line: cute.Tensor):
    """Sums over the warps before this one and over all."""
    lane, warp = cute.arch.lane_idx(), cute.arch.warp_idx()
    x = of_warp(line, const_expr(cute.size(line)), lane)
    before = cute.arch.warp_redux_sync(x if lane < warp else Int32(0), "add")
    return before, cute.arch.warp_redux_sync(x, "add")


@cute.jit
def block_scan(x: Int32, sums: cute.Tensor):
    """Exclusive prefix sum over the CTA's threads, and the sum of all."""
    before, totals = block_scans((x,), sums)
    return before[0], totals[0]


@cute.jit
def block_scans(numbers: tuple[Int32, ...], sums: cute.Tensor):
    """`block_scan` of up to TOGETHER numbers: their prefix sums, their totals."""
    lane, warp = cute.arch.lane_idx(), cute.arch.warp_idx()
    inclusive = [warp_scan(x) for x in numbers]
    if lane == 31:
        for k in cutlass.range_constexpr(len(numbers)):
            sums[k, warp] = inclusive[k]
    cute.arch.sync_threads()
    found = [sums_of_warps(sums[k, None]) for k in range(len(numbers))]
    cute.arch.sync_threads()
    before = [found[k][0] + inclusive[k] - numbers[k] for k in range(len(numbers))]
    return before, [total for _, total in found]


@cute.jit
def block_counts(flags: tuple[Int32, ...], sums: cute.Tensor):
    """`block_scans` of flags, 0 or 1, for less."""
    lane, warp = cute.arch.lane_idx(), cute.arch.warp_idx()
    ones = [cute.arch.vote_ballot_sync(flag != 0) for flag in flags]
    if lane == 0:
        for k in cutlass.range_constexpr(len(flags)):
            sums[k, warp] = cute.arch.popc(ones[k])
    cute.arch.sync_threads()
    found = [sums_of_warps(sums[k, None]) for k in range(len(flags))]
    cute.arch.sync_threads()
    lower = (Int32(1) << lane) - 1
    before = [found[k][0] + cute.arch.popc(ones[k] & lower) for k in range(len(flags))]
    return before, [total for _, total in found]


@cute.jit
def block_sum(x: Int64, wide: cute.Tensor):
    """Sum over the CTA's threads in 64 bits."""
    return block_sums((x,), wide)[0]


@cute.jit
def block_sums(numbers: tuple[Int64, ...], wide: cute.Tensor):
    """Sums of up to TOGETHER numbers over the CTA's threads, in 64 bits."""
    lane, warp = cute.arch.lane_idx(), cute.arch.warp_idx()
    warps = const_expr(cute.size(wide, mode=[1]) - 1)
    for k in cutlass.range_constexpr(len(numbers)):
        of_one = warp_sum(numbers[k])
        if lane == 0:
            wide[k, warp] = of_one
    cute.arch.sync_threads()
    # Warps that all add up take longer than one more barrier.
    for k in cutlass.range_constexpr(len(numbers)):
        if warp == k:
            of_all = warp_sum(of_warp(wide[k, None], warps, lane))
            if lane == 0:
                wide[k, warps] = of_all
    # Totals have places of their own: who writes the next ones has passed another barrier first.
    cute.arch.sync_threads()
    return [wide[k, warps] for k in range(len(numbers))]


@cute.jit
def block_reduce(
    numbers: tuple[Int32, ...], kinds: cutlass.Constexpr[tuple[str, ...]], sums: cute.Tensor
):
    """Each number's "max", "min", "or" or "add" over the CTA's threads."""
    lane, warp = cute.arch.lane_idx(), cute.arch.warp_idx()
    warps = const_expr(cute.size(sums, mode=[1]))
    for k in cutlass.range_constexpr(len(kinds)):
        of_one = cute.arch.warp_redux_sync(numbers[k], kinds[k])
        if lane == 0:
            sums[k, warp] = of_one
    cute.arch.sync_threads()
    found = []
    for k in cutlass.range_constexpr(len(kinds)):
        # Lanes past the last warp add nothing, or take its number once more.
        x = of_warp(sums[k, None], warps, lane)
        if const_expr(kinds[k] != "add"):
            x = sums[k, lane if lane < warps else warps - 1]
        found.append(cute.arch.warp_redux_sync(x, kinds[k]))
    cute.arch.sync_threads()
    return found


@cute.jit
def block_any(x: Int32, sums: cute.Tensor):
    """0 if x is 0 in every thread, else something else."""
    return block_reduce((x,), ("or",), sums)[0]


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
def sort_pairs(mSort: cute.Tensor, n: Int32, largest: Int32, shared: Shared):
    """Sort n (key, value) pairs of buffer 0 by key, stably; keys are 0 .. largest.

    Returns the buffer that has the result.
    """
    tid, _, _ = cute.arch.thread_idx()
    source, shift, left = Int32(0), Int32(0), largest
    if n <= RANKED and largest > 0:
        rank_pairs(mSort, n, shared)
        source, left = Int32(1), Int32(0)
    while left > 0:
        if tid < RADIX_BINS:
            shared.bins[tid] = Int32(0)
        cute.arch.sync_threads()
        for i in cutlass.range(tid, n, GROUP_THREADS, unroll=1):
            digit = (mSort[2 * source + Sort.KEY, i] >> shift) & (RADIX_BINS - 1)
            cute.arch.atomic_add(shared.bins.iterator + digit, Int32(1), sem="relaxed", scope="cta")
        cute.arch.sync_threads()
        count = shared.bins[tid % RADIX_BINS] if tid < RADIX_BINS else Int32(0)
        before, _ = block_scan(count, shared.sums)
        if tid < RADIX_BINS:
            shared.bins[tid] = before
        for base in cutlass.range(0, n, GROUP_THREADS, unroll=1):
            radix_tile(mSort, source, base, n, shift, shared)
        source = 1 - source
        shift = shift + RADIX_BITS
        left = left >> RADIX_BITS
    return source


@cute.jit
def rank_pairs(mSort: cute.Tensor, n: Int32, shared: Shared):
    """Sort at most RANKED pairs of buffer 0 into buffer 1: each goes where as many come before it
    as do, counted by a few threads together."""
    tid, _, _ = cute.arch.thread_idx()
    parts = const_expr(GROUP_THREADS // RANKED)
    i, part = tid // parts, tid % parts
    if tid < RANKED:
        shared.warp_bins[tid] = mSort[Sort.KEY, tid] if tid < n else Int32(2**31 - 1)
    cute.arch.sync_threads()
    key, rank = shared.warp_bins[i], Int32(0)
    for j in cutlass.range(part, n, parts, unroll=8):
        other = shared.warp_bins[j]
        if other < key or (other == key and j < i):
            rank = rank + 1
    for k in cutlass.range_constexpr(const_expr(parts.bit_length() - 1)):
        rank = rank + cute.arch.shuffle_sync_bfly(rank, 1 << k)
    if part == 0 and i < n:
        mSort[2 + Sort.KEY, rank] = key
        mSort[2 + Sort.VALUE, rank] = mSort[Sort.VALUE, i]
    cute.arch.sync_threads()


@cute.jit
def radix_tile(
    mSort: cute.Tensor, source: Int32, base: Int32, n: Int32, shift: Int32, shared: Shared
):
    """Move one tile of GROUP_THREADS pairs to its places; `bins` holds where each digit goes on."""
    tid, _, _ = cute.arch.thread_idx()
    lane, warp = cute.arch.lane_idx(), cute.arch.warp_idx()
    i = base + tid
    there = i < n
    key, value = Int32(0), Int32(0)
    if there:
        key = mSort[2 * source + Sort.KEY, i]
        value = mSort[2 * source + Sort.VALUE, i]
    digit = (key >> shift) & (RADIX_BINS - 1)
    for k in cutlass.range_constexpr(RADIX_BINS // 32):
        shared.warp_bins[k * GROUP_THREADS + tid] = Int32(0)
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
        for w in cutlass.range(const_expr(GROUP_THREADS // 32), unroll=8):
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
def scan_memory(smem, threads: cutlass.Constexpr[int]):
    """Allocate what `block_scans` of so many threads needs."""
    return smem.allocate_tensor(Int32, cute.make_ordered_layout((TOGETHER, threads // 32), (1, 0)))


@cute.jit
def shared_memory(smem) -> Shared:
    """Allocate `Shared`."""
    warps = const_expr(GROUP_THREADS // 32)
    sums = scan_memory(smem, GROUP_THREADS)
    wide = smem.allocate_tensor(Int64, cute.make_ordered_layout((TOGETHER, warps + 1), (1, 0)))
    bins = smem.allocate_tensor(Int32, cute.make_layout(RADIX_BINS))
    return Shared(
        sums, wide, bins, smem.allocate_tensor(Int32, cute.make_layout(RADIX_BINS * warps))
    )
