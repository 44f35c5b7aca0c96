"""Which paged attention kernel runs: one frozen config, one legality predicate, one choice.

`PagedConfig` holds everything that determines the generated code and nothing else, so it is the
compile key. Imports neither torch nor the DSL.
"""

from __future__ import annotations

from dataclasses import dataclass

from flashcore.config.dense import (
    DTYPES,
    REGISTERS_PER_SM90_SM,
    SMEM_BYTES_PER_SM90_CTA,
    WARPGROUP_ROWS,
    WARPGROUP_THREADS,
)

HEAD_DIMS = (64, 128, 256)
SMEM_BYTES_RESERVED_PER_CTA = 1024
KV_LOADS = ("tma", "gather")
LONGEST_GATHERED_PAGE = 8
"""Page tokens up to which rows are gathered. With a TMA box each, pages of 1 took ten times the
bound; pages of 16 took 1.029 where gathered rows took 1.032."""
KV_BYTES_PER_SM = 128 << 10
"""Stages of K and V of all CTAs of an SM. One CTA alone reads 56 GB/s with its half of them; with
192 KB, queues in front of the DRAM made it up to 2 % slower."""
PAGE_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128)


@dataclass(frozen=True)
class PagedConfig:
    """A compiled paged kernel: features, tile, schedule."""

    dtype: str  # "bf16" | "fp16": of q, the pages and out
    head_dim: int
    page_tokens: int
    group_size: int  # query heads of one KV head, packed in the rows of a tile
    num_consumer_warpgroups: int  # 64 packed rows each
    tile_n: int  # keys of one K/V stage
    stages: int  # depth of the K and of the V ring
    kv_load: str = "tma"  # "tma": boxes, one warp | "gather": rows by cp.async, four warps
    causal: bool = True
    window: bool = False  # window_left / window_right are read at run time
    softcap: bool = False
    sinks: bool = False
    tree: bool = False  # a tree mask takes the place of causal
    device_counts: bool = False  # of a plan made on the device: tensors are at capacity
    rescale_log2: float = 8.0  # a row maximum may lag by this factor (log2) before O is rescaled
    producer_registers: int = 40
    consumer_registers: int = 232
    evict_first: bool = False  # K and V may leave L2 first: decode reads them once
    ctas_per_sm: int = 1  # resident together, each with its share of registers and shared memory

    @property
    def tile_m(self) -> int:
        """Packed query rows of a work item at most."""
        return WARPGROUP_ROWS * self.num_consumer_warpgroups

    @property
    def box_n(self) -> int:
        """Rows of one TMA box: a page, or a tile where a page is longer."""
        return min(self.page_tokens, self.tile_n)

    @property
    def loading_warps(self) -> int:
        """Warps of the producer warpgroup that copy K and V."""
        return 4 if self.kv_load == "gather" else 1

    @property
    def smem_bytes(self) -> int:
        """Shared memory of one CTA; 1024 covers barriers, the work slot and alignment."""
        row = self.head_dim * 2
        return (self.tile_m + 2 * self.stages * self.tile_n) * row + 1024

    @property
    def threads(self) -> int:
        """Threads of one CTA: a producer warpgroup and the consumers."""
        return (1 + self.num_consumer_warpgroups) * WARPGROUP_THREADS


def illegal_reason(config: PagedConfig) -> str | None:
    """Why `config` cannot run, or None. The single statement of the constraints."""
    c = config
    registers = WARPGROUP_THREADS * (
        c.producer_registers + c.num_consumer_warpgroups * c.consumer_registers
    )
    rules = (
        (c.dtype in DTYPES, f"dtype {c.dtype!r} is not one of {DTYPES}"),
        (c.head_dim in HEAD_DIMS, f"head_dim {c.head_dim} is not one of {HEAD_DIMS}"),
        (c.page_tokens in PAGE_TOKENS, f"page_tokens {c.page_tokens} is not one of {PAGE_TOKENS}"),
        (c.num_consumer_warpgroups in (1, 2), "one or two consumer warpgroups"),
        (c.tile_n % 16 == 0 and 16 <= c.tile_n <= 128, f"tile_n {c.tile_n}: 16 to 128, step 16"),
        (c.kv_load in KV_LOADS, f"kv_load {c.kv_load!r} is not one of {KV_LOADS}"),
        (c.tile_n % c.box_n == 0, "tile_n is whole pages, or part of one"),
        (c.page_tokens % c.box_n == 0, "a page is whole boxes"),
        (c.stages >= 2, "at least two K/V stages"),
        (c.group_size >= 1, "at least one query head for each KV head"),
        (not (c.causal and c.tree), "a tree mask takes the place of causal"),
        (
            registers * c.ctas_per_sm <= REGISTERS_PER_SM90_SM,
            f"{registers} registers exceed 65536 / {c.ctas_per_sm}",
        ),
        (
            c.smem_bytes <= smem_bytes_of_cta(c.ctas_per_sm),
            f"{c.smem_bytes} bytes of shared memory exceed {smem_bytes_of_cta(c.ctas_per_sm)}",
        ),
    )
    return next((reason for ok, reason in rules if not ok), None)


def choose(
    dtype: str,
    head_dim: int,
    page_tokens: int,
    group_size: int,
    tile_m: int,
    *,
    causal: bool = True,
    window: bool = False,
    softcap: bool = False,
    sinks: bool = False,
    tree: bool = False,
    device_counts: bool = False,
) -> PagedConfig:
    """The config for a plan's tile_m; ValueError where there is no kernel."""
    if tile_m not in (WARPGROUP_ROWS, 2 * WARPGROUP_ROWS):
        raise ValueError(f"tile_m must be 64 or 128, got {tile_m}")
    warpgroups = tile_m // WARPGROUP_ROWS
    ctas = ctas_per_sm(head_dim, tile_m)
    kv_load = "gather" if page_tokens <= LONGEST_GATHERED_PAGE else "tma"
    tile_n = 64 if head_dim * ctas >= 256 else 128
    config = PagedConfig(
        dtype=dtype,
        head_dim=head_dim,
        page_tokens=page_tokens,
        group_size=group_size,
        num_consumer_warpgroups=warpgroups,
        tile_n=tile_n,
        stages=_stages(kv_load, head_dim, tile_m, tile_n, ctas),
        kv_load=kv_load,
        producer_registers=40 if ctas == 1 else 56,
        consumer_registers=232 if ctas == 1 else 200,
        evict_first=tile_m == WARPGROUP_ROWS,
        ctas_per_sm=ctas,
        causal=causal and not tree,
        window=window,
        softcap=softcap,
        sinks=sinks,
        tree=tree,
        device_counts=device_counts,
    )
    reason = illegal_reason(config)
    if reason is not None:
        raise ValueError(f"no paged kernel: {reason}")
    return config


def ctas_per_sm(head_dim: int, tile_m: int) -> int:
    """CTAs of the chosen kernel that an SM runs at once.

    Two where their stages fit: while one changes items, the other reads. Measured for head_dim 128
    over ten decode batches: 0 to 6 % faster than one CTA of the same rows in all but two; gathered
    pages of 1 token, 64 x 8192 with 90 % shared: 20 %.
    """
    return 2 if tile_m == WARPGROUP_ROWS and head_dim <= 128 else 1


def smem_bytes_of_cta(ctas: int) -> int:
    """Shared memory that each of `ctas` CTAs of an SM may take."""
    of_sm = SMEM_BYTES_PER_SM90_CTA + SMEM_BYTES_RESERVED_PER_CTA
    return of_sm // ctas - SMEM_BYTES_RESERVED_PER_CTA


def _stages(kv_load: str, head_dim: int, tile_m: int, tile_n: int, ctas: int) -> int:
    """Boxes: as many as make KV_BYTES_PER_SM. Gathered rows: as many as fit, at most four."""
    row = head_dim * 2
    stage = 2 * tile_n * row  # of K and of V
    if kv_load == "tma":
        return KV_BYTES_PER_SM // (ctas * stage)
    return min(4, (smem_bytes_of_cta(ctas) - 1024 - tile_m * row) // stage)


@dataclass(frozen=True)
class CombineConfig:
    """A compiled merge kernel."""

    dtype: str  # "bf16" | "fp16": of out
    head_dim: int
    sinks: bool = False
    warps_per_row: int = 1  # that share a merge list; 8 where lists are long
    device_counts: bool = False  # as in `PagedConfig`
    fixed_order: bool = False  # warps_per_row has no say in the order of a sum


LONG_LIST = 8
"""Partial results per query token from which a list is shared by several warps: one warp walks it
with four loads in flight."""


FEW_ROWS = 256
"""Query tokens times heads up to which lists of unknown length get several warps each. Splits are
about two for each worker over all KV heads, so with more rows no list is long: several warps took
4.6 us less at 32 rows (1 x 131072), 2.3 and 4.1 us more at 1024 and 2048 (32 and 64 x 8192)."""


def choose_combine(
    dtype: str,
    head_dim: int,
    sinks: bool,
    partials: int,
    total_q: int,
    batch_invariant: bool = False,
) -> CombineConfig:
    """The config for `partials` merge list entries of `total_q` query tokens."""
    warps = 8 if partials >= LONG_LIST * total_q else 1
    return CombineConfig(dtype, head_dim, sinks, warps, fixed_order=batch_invariant)


def choose_device_combine(
    dtype: str, head_dim: int, sinks: bool, rows: int, batch_invariant: bool = False
) -> CombineConfig:
    """The config for merge lists that only the device knows; `rows`: query tokens x heads."""
    warps = 8 if rows <= FEW_ROWS else 1
    return CombineConfig(
        dtype, head_dim, sinks, warps, device_counts=True, fixed_order=batch_invariant
    )
