"""Which paged attention kernel runs: one frozen config, one legality predicate, one choice.

`PagedConfig` holds everything that determines the generated code and nothing else, so it is the
compile key. Imports neither torch nor the DSL.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import gcd
from typing import NamedTuple

from flashcore.sm90.config.dense import (
    DTYPES,
    REGISTERS_PER_SM90_SM,
    WARPGROUP_ROWS,
    WARPGROUP_THREADS,
)
from flashcore.sm90.config.paged_schedule import (
    LARGEST_DIM,
    as_it_lies,
    converting,
    smem_bytes_of_cta,
    tile_columns,
    tile_of,
    total_bytes,
)

DIM_STEP = 8  # columns of a 16-byte copy, which TMA and cp.async take
PRODUCT_STEP = 16  # columns of Q and K that one WGMMA takes
KV_LOADS = ("tma", "gather")
KV_DTYPES = ("e4m3", "e5m2")
NARROW_DIM_STEP = 16  # columns of a 16-byte copy of fp8
CONVERTED_ROWS = 16  # that a warp converts at a time are whole, in each swizzle
LONGEST_GATHERED_PAGE = 8
"""Page tokens up to which rows are gathered. With a TMA box each, pages of 1 took ten times the
bound; pages of 16 took 1.029 where gathered rows took 1.032."""
CONSUMER_WARPS = 4  # of a warpgroup
FEW_ROWS = (0, 8, 16, 32)
FEW_ROWS_DIMS = (64, 128, 256)
PAGE_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128)


@dataclass(frozen=True)
class PagedConfig:
    """A compiled paged kernel: features, tile, schedule."""

    dtype: str  # "bf16" | "fp16": of q and out, and of the pages where kv_dtype is ""
    head_dim: int  # columns of q and of the K pages as they are: padding is compiled in
    v_head_dim: int  # of the V pages, of out and of partial results; at most head_dim
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
    chunked: bool = False  # each chunk by itself, then their fold: of a batch-invariant plan
    rescale_log2: float = 8.0  # a row maximum may lag by this factor (log2) before O is rescaled
    producer_registers: int = 40
    consumer_registers: int = 232
    evict_first: bool = False  # K and V may leave L2 first: decode reads them once
    ctas_per_sm: int = 1  # resident together, each with its share of registers and shared memory
    kv_dtype: str = ""  # "e4m3" | "e5m2": fp8 pages, converted in shared memory to fp16, which the
    # products take; what follows is 0 without it. `stages` are then of fp8.
    q_registers: bool = False  # Q is in the consumers' registers, and nowhere in shared memory
    wide_k_stages: int = 0  # of fp16
    wide_v_stages: int = 0
    converting_warps: int = 0  # of the producer warpgroup, its last
    converted_rows: int = 0  # that one of them converts at a time: a tile, or part of one
    few_rows: int = 0  # packed rows of an item up to which warps multiply its fp8 K and V by
    # themselves, without stages of fp16
    expanded: bool = False  # pages are fp16, widened from fp8 before: all is as of these but that
    # nothing is converted

    @property
    def tile_m(self) -> int:
        """Packed query rows of a work item at most."""
        return WARPGROUP_ROWS * self.num_consumer_warpgroups

    @property
    def k_columns(self) -> int:
        """Columns of Q and K tiles in shared memory, those past head_dim zeros."""
        return tile_columns(self.head_dim)

    @property
    def v_columns(self) -> int:
        """Columns of V tiles and of the output accumulator."""
        return tile_columns(self.v_head_dim)

    @property
    def k_steps(self) -> int:
        """Products along head_dim: the padding beyond them is not multiplied."""
        return -(-self.head_dim // PRODUCT_STEP)

    @property
    def box_n(self) -> int:
        """Rows of one TMA box: a page, or a tile where a page is longer."""
        return min(self.page_tokens, self.tile_n)

    @property
    def loading_warps(self) -> int:
        """Warps of the producer warpgroup that copy K and V."""
        if self.kv_load == "gather":
            return 2 if self.kv_dtype else 4
        return 1

    @property
    def awaiting_warps(self) -> int:
        """Warps that read published items: the consumers, and producers but the one by TMA."""
        gathering = self.loading_warps if self.kv_load == "gather" else 0
        return 4 * self.num_consumer_warpgroups + gathering + self.converting_warps

    @property
    def product_stages(self) -> tuple[int, int]:
        """Stages of K and of V that products read."""
        wide = self.wide_k_stages, self.wide_v_stages
        return wide if self.kv_dtype else (self.stages, self.stages)

    @property
    def scaled(self) -> bool:
        """What pages hold is of fp8: products are of fp16, and K and V have scales."""
        return self.expanded or self.kv_dtype != ""

    @property
    def converted_parts(self) -> int:
        """Parts of a tile that are converted one by one."""
        return self.tile_n // self.converted_rows

    @property
    def readers(self) -> int:
        """Arrivals that free a stage of fp8: the consumer warps' too where they may read it."""
        return self.converted_parts + (CONSUMER_WARPS if self.few_rows else 0)

    @property
    def arrivals_of_a_part(self) -> int:
        """Of these, those of a warp that has converted a part of a stage for the consumers."""
        return self.readers // self.converted_parts

    @property
    def few_totals(self) -> int:
        """fp32 numbers that consumer warps exchange about few rows: two of each row and warp that
        has it, which are all four for up to 16 rows and two beyond."""
        return 2 * CONSUMER_WARPS * min(self.few_rows, 16)

    @property
    def total_rows(self) -> int:
        """fp32 numbers about the rows of a running total in shared memory."""
        return 2 * self.tile_m * self.chunked

    @property
    def total_elements(self) -> int:
        """fp32 elements of a running total in shared memory."""
        return self.tile_m * self.v_columns * self.chunked

    @property
    def smem_bytes(self) -> int:
        """Shared memory of one CTA; 1024 covers barriers, the work slot, the numbers about 64 rows
        and alignment."""
        k_stages, v_stages = self.product_stages
        kv = 2 * self.tile_n * (k_stages * self.k_columns + v_stages * self.v_columns)
        if self.kv_dtype:
            kv += self.stages * self.tile_n * (self.k_columns + self.v_columns)
        totals = total_bytes(self.tile_m, self.v_head_dim) if self.chunked else 0
        q = 0 if self.q_registers else 2 * self.tile_m * self.k_columns
        return q + kv + totals + 1024

    @property
    def threads(self) -> int:
        """Threads of one CTA: a producer warpgroup and the consumers."""
        return (1 + self.num_consumer_warpgroups) * WARPGROUP_THREADS


def unserved_dims(head_dim: int, v_head_dim: int) -> str | None:
    """Why no paged kernel has these dimensions, or None."""
    for name, dim in (("head_dim", head_dim), ("v_head_dim", v_head_dim)):
        if dim % DIM_STEP or not DIM_STEP <= dim <= LARGEST_DIM:
            limits = f"a multiple of {DIM_STEP} from {DIM_STEP} to {LARGEST_DIM}"
            return f"{name} must be {limits}, got {dim}"
    if v_head_dim > head_dim:
        return f"v_head_dim must be at most head_dim ({head_dim}), got {v_head_dim}"
    return None


def illegal_reason(config: PagedConfig) -> str | None:
    """Why `config` cannot run, or None. The single statement of the constraints."""
    c = config
    unserved = unserved_dims(c.head_dim, c.v_head_dim)
    registers = WARPGROUP_THREADS * (
        c.producer_registers + c.num_consumer_warpgroups * c.consumer_registers
    )
    rules = (
        (c.dtype in DTYPES, f"dtype {c.dtype!r} is not one of {DTYPES}"),
        (unserved is None, unserved or ""),
        (c.page_tokens in PAGE_TOKENS, f"page_tokens {c.page_tokens} is not one of {PAGE_TOKENS}"),
        (c.num_consumer_warpgroups in (1, 2), "one or two consumer warpgroups"),
        (c.tile_n % 16 == 0 and 16 <= c.tile_n <= 128, f"tile_n {c.tile_n}: 16 to 128, step 16"),
        (c.kv_load in KV_LOADS, f"kv_load {c.kv_load!r} is not one of {KV_LOADS}"),
        (c.tile_n % c.box_n == 0, "tile_n is whole pages, or part of one"),
        (c.page_tokens % c.box_n == 0, "a page is whole boxes"),
        (
            c.tile_n % rows_at_a_time(c.v_columns, c.num_consumer_warpgroups) == 0,
            f"tile_n {c.tile_n}: the consumers clear rows of V in whole passes",
        ),
        (c.stages >= 2, "at least two K/V stages"),
        *_conversion_rules(c),
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


def _conversion_rules(c: PagedConfig) -> tuple[tuple[bool, str], ...]:
    """What must hold of fp8 pages, or of their absence."""
    if not c.kv_dtype:
        spare = (c.wide_k_stages, c.wide_v_stages, c.converting_warps, c.converted_rows)
        return (
            (spare == (0, 0, 0, 0), "stages of fp16 and their warps are for fp8 pages"),
            (not c.q_registers, "Q goes to registers where pages are fp8"),
            (c.few_rows == 0, "few rows are multiplied by themselves where pages are fp8"),
        )
    return (
        (not c.expanded, "expanded pages are not of fp8"),
        (c.kv_dtype in KV_DTYPES, f"kv_dtype {c.kv_dtype!r} is not one of {KV_DTYPES}"),
        *(
            (dim % NARROW_DIM_STEP == 0, f"{name} of fp8 pages: a multiple of 16, got {dim}")
            for name, dim in (("head_dim", c.head_dim), ("v_head_dim", c.v_head_dim))
        ),
        (min(c.wide_k_stages, c.wide_v_stages) >= 1, "at least one stage of fp16"),
        (
            1 <= c.converting_warps <= 4 - c.loading_warps,
            f"{c.converting_warps} converting warps beside {c.loading_warps} that load",
        ),
        (
            c.converted_rows > 0
            and c.converted_rows % CONVERTED_ROWS == 0
            and c.tile_n % c.converted_rows == 0,
            f"converted_rows {c.converted_rows}: multiples of {CONVERTED_ROWS} that divide tile_n",
        ),
        # A warp that passes over a tile may wait for a stage two tiles early, and barriers tell
        # only odd phases from even ones: it would write into a stage that is being read.
        (
            c.converted_rows > 0
            and c.converting_warps > 0
            and 2 * c.tile_n // c.converted_rows % c.converting_warps == 0,
            f"{c.converting_warps} converting warps: each takes the same parts of all tiles",
        ),
        (c.few_rows in FEW_ROWS, f"few_rows {c.few_rows} is not one of {FEW_ROWS}"),
        (c.few_rows == 0 or serves_few_rows(c), "few_rows: no tree, chunks, padding, 128 rows"),
    )


def serves_few_rows(c: PagedConfig) -> bool:
    """Whether the consumer warps of a converting kernel can do without its stages of fp16."""
    return (
        c.num_consumer_warpgroups == 1
        and c.head_dim == c.v_head_dim
        and c.head_dim in FEW_ROWS_DIMS
        and c.tile_n % 64 == 0
        and CONSUMER_WARPS % c.converted_parts == 0
        and not c.tree
        and not c.chunked
    )


class PagedCall(NamedTuple):
    """What of a call decides on its attention kernel, besides the plan's tile; as in `PagedConfig`.

    v_head_dim: head_dim where it is 0. causal has no say under a tree mask.
    """

    dtype: str
    head_dim: int
    page_tokens: int
    group_size: int
    v_head_dim: int = 0
    causal: bool = True
    window: bool = False
    softcap: bool = False
    sinks: bool = False
    tree: bool = False
    device_counts: bool = False
    chunked: bool = False
    kv_dtype: str = ""
    expanded: bool = False


def choose(call: PagedCall, tile_m: int) -> PagedConfig:
    """The config of `call` with a plan's tile_m; ValueError where there is no kernel."""
    head_dim, v_head_dim = call.head_dim, call.v_head_dim or call.head_dim
    if unserved := unserved_dims(head_dim, v_head_dim):
        raise ValueError(unserved)
    if tile_m not in (WARPGROUP_ROWS, 2 * WARPGROUP_ROWS):
        raise ValueError(f"tile_m must be 64 or 128, got {tile_m}")
    if call.kv_dtype not in ("", *KV_DTYPES):
        raise ValueError(f"kv_dtype must be one of {KV_DTYPES} or empty, got {call.kv_dtype!r}")
    if call.kv_dtype:
        for name, dim in (("head_dim", head_dim), ("v_head_dim", v_head_dim)):
            if dim % NARROW_DIM_STEP:
                raise ValueError(f"{name} of fp8 pages must be a multiple of 16, got {dim}")
    kv_load = "gather" if call.page_tokens <= LONGEST_GATHERED_PAGE else "tma"
    tile = tile_of(head_dim, v_head_dim, tile_m, call.chunked)
    schedule = as_it_lies(tile, kv_load)
    if call.kv_dtype:
        schedule = converting(tile, window=call.window, tree=call.tree, softcap=call.softcap)
    config = PagedConfig(
        dtype=call.dtype,
        head_dim=head_dim,
        v_head_dim=v_head_dim,
        page_tokens=call.page_tokens,
        group_size=call.group_size,
        num_consumer_warpgroups=tile_m // WARPGROUP_ROWS,
        kv_load=kv_load,
        **schedule,
        kv_dtype=call.kv_dtype,
        expanded=call.expanded,
        evict_first=tile_m == WARPGROUP_ROWS,
        causal=call.causal and not call.tree,
        window=call.window,
        softcap=call.softcap,
        sinks=call.sinks,
        tree=call.tree,
        device_counts=call.device_counts,
        chunked=call.chunked,
    )
    if call.kv_dtype and serves_few_rows(config):
        # Registers are left for no more with a window, or with 256 columns, and with both for none.
        few_rows = (32, 8, 0)[call.window + (head_dim > 128)]
        config = replace(config, few_rows=few_rows)
    reason = illegal_reason(config)
    if reason is not None:
        raise ValueError(f"no paged kernel: {reason}")
    return config


def rows_at_a_time(columns: int, warpgroups: int) -> int:
    """Rows of a tile that so many warpgroups copy or clear at a time.

    A row's 16-byte vectors go to as many threads as divide both, which each take the same number.
    """
    threads = WARPGROUP_THREADS * warpgroups
    return threads // gcd(columns // DIM_STEP, threads)
