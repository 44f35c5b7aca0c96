"""Which merge of partial results runs: one frozen config, and the choice of it.

`MergeConfig` is the compile key, as `config.paged.PagedConfig` is. Imports neither torch nor the
DSL.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class MergeConfig:
    """A compiled merge kernel."""

    dtype: str  # "bf16" | "fp16": of out
    head_dim: int  # columns of out and of partial results: v_head_dim where the two differ
    sinks: bool = False
    warps_per_row: int = 1  # that share a merge list; 8 where lists are long
    heads_per_warp: int = 1  # that a warp takes in turn; more only with one warp for a row
    device_counts: bool = False  # as in `PagedConfig`
    fixed_order: bool = False  # the fold of chunks, whatever warps_per_row: `kernels.fold_merge`


LONG_LIST = 8
"""Partial results per query token from which a list is shared by several warps: one warp walks it
with four loads in flight."""


FEW_ROWS = 256
"""Query tokens times heads up to which lists of unknown length get several warps each. Splits are
about two for each worker over all KV heads, so with more rows no list is long: several warps took
4.6 us less at 32 rows (1 x 131072), 2.3 and 4.1 us more at 1024 and 2048 (32 and 64 x 8192)."""


MANY_ROWS = 65536
"""Query tokens times heads from which on a warp takes `HEADS_PER_WARP` heads of its token. So many
are new tokens of prefills, most of which are in the output already, and a warp for each row costs
more than it finds to do: 262144 rows without a partial result took about 40 us."""


HEADS_PER_WARP = 8
MERGE_SIZES = (1, FEW_ROWS + 1, MANY_ROWS + 1)
"""Rows of which each has a kernel of its own in `choose_device_merge`."""


def choose_merge(
    dtype: str,
    head_dim: int,
    sinks: bool,
    partials: int,
    total_q: int,
    fold_heads: int = 0,
) -> MergeConfig:
    """The config for `partials` merge list entries of `total_q` query tokens.

    fold_heads: of a batch-invariant plan, the query heads: its bits are the same for any number of
    warps, and where rows are many a CTA for each costs more than a warp's longer walk.
    """
    few = not fold_heads or total_q * fold_heads <= FEW_ROWS
    warps = 8 if few and partials >= LONG_LIST * total_q else 1
    return MergeConfig(dtype, head_dim, sinks, warps, fixed_order=fold_heads > 0)


def choose_device_merge(
    dtype: str, head_dim: int, sinks: bool, rows: int, batch_invariant: bool = False
) -> MergeConfig:
    """The config for merge lists that only the device knows; `rows`: query tokens x heads."""
    return MergeConfig(
        dtype,
        head_dim,
        sinks,
        warps_per_row=8 if rows <= FEW_ROWS else 1,
        heads_per_warp=HEADS_PER_WARP if rows > MANY_ROWS else 1,
        device_counts=True,
        fixed_order=batch_invariant,
    )
