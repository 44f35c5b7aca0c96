"""What the code of the planner's kernels depends on, and the sizes of their CTAs."""

from __future__ import annotations

from dataclasses import dataclass

from flashcore.sm90.config.dense import SMEM_BYTES_PER_SM90_CTA

ENTRY_THREADS = 256  # of CTAs that only visit entries or write the plan
GROUP_THREADS = 512  # of CTAs that look at segments and groups
RADIX_BITS = 9
RADIX_BINS = 1 << RADIX_BITS
RANKED = 256  # pairs up to which counting those before each takes less than a radix sort
SMALL_BATCH = 64  # sequences that one kernel can plan
SMALL_QUERIES = 1024  # query tokens there may be of them: its lists are written by few threads
SMALL_ENTRIES = 16384  # places in their table: where all are used, a grid takes 15 us less
SMALL_CLUSTER = 8  # its CTAs
NEAR_ENTRIES = 512  # entries that its first CTA plans by itself, in shared memory
ROW_CAPACITIES = (1024, 8192, 32768, 57344)  # the last is what an SM's memory holds


@dataclass(frozen=True)
class PlannerConfig:
    """Everything that the code of the planner's kernels depends on."""

    row_capacity: int  # sequences whose offsets fit in the shared memory of one CTA
    from_layout: bool = False  # of a pager on the device, in place of a page table
    chunks: bool = False  # batch-invariant plans: `planner.chunks`
    small: bool = False  # one kernel for all steps

    @property
    def smem_bytes(self) -> int:
        """Of the layout kernel, the largest: offsets of all rows, 1 KB for the scans. Of a small
        one: what is looked at of entries and groups, and of the sort by bins."""
        if self.small:
            return 4 * (62 * NEAR_ENTRIES + RADIX_BINS * (GROUP_THREADS // 32 + 1)) + 8192
        return 4 * (self.row_capacity + 1) + 1024


def illegal_reason(config: PlannerConfig) -> str | None:
    """Why `config` cannot run, or None."""
    capacities = (SMALL_BATCH,) if config.small else ROW_CAPACITIES
    if config.row_capacity not in capacities:
        return f"row_capacity {config.row_capacity} is not one of {capacities}"
    if config.small and config.from_layout:
        return "a layout made on the device is planned by a chain of kernels"
    if config.smem_bytes > SMEM_BYTES_PER_SM90_CTA:
        return f"{config.smem_bytes} bytes of shared memory exceed {SMEM_BYTES_PER_SM90_CTA}"
    if config.chunks and config.from_layout:
        return "chunks are counted from a page table: a layout may have a page that ends one"
    return None


def choose_small(chunks: bool = False) -> PlannerConfig:
    """The kernel for at most SMALL_BATCH sequences with room for SMALL_QUERIES query tokens."""
    return PlannerConfig(SMALL_BATCH, chunks=chunks, small=True)


def choose(max_batch: int, from_layout: bool = False, chunks: bool = False) -> PlannerConfig:
    """The smallest kernel that takes `max_batch` sequences; ValueError where there is none."""
    for rows in ROW_CAPACITIES:
        if max_batch <= rows:
            return PlannerConfig(rows, from_layout, chunks)
    raise ValueError(f"max_batch must be at most {ROW_CAPACITIES[-1]}, got {max_batch}")
