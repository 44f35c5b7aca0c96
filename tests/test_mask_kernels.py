"""The masks of the paged kernels, run on the host: intervals, trees, and what not all rows see."""

from __future__ import annotations

import pytest
import torch

from flashcore.reference import visible_keys
from flashcore.sm90.config.paged import PagedCall, choose
from flashcore.tree import by_depth
from tests.mask_cases import Drafts, verify_batch
from tests.runtime_fixtures import needs_dsl

pytestmark = needs_dsl

LARGEST = 2**31 - 2


# Runs before, across and after a sequence's first new token; windows that end anywhere in it, and
# bounds whose sum with a position needs more than 32 bits.
@pytest.mark.parametrize("causal", [False, True])
def test_intervals_are_the_reference_s(causal: bool) -> None:
    from tests.mask_kernels_host import see

    config = choose(PagedCall("bf16", 64, 16, 8, causal=causal, window=True), 64)
    n, length = 6, 40
    index = torch.arange(n).int()
    nothing = torch.zeros(1, 1, dtype=torch.bool)
    for window in (
        (0, 0), (3, 0), (7, 2), (-1, 4), (9, -1), (60, 60), (LARGEST, -1), (-1, LARGEST),
        (LARGEST, LARGEST), (3, LARGEST),
    ):  # fmt: skip
        expected = visible_keys(n, length, causal, window)
        for begin, end in ((0, 40), (0, 30), (5, 36), (30, 40), (37, 40)):
            positions = index + length - n - begin
            seen, _ = see(config, positions, index, index, nothing, end - begin, window)
            assert torch.equal(seen, expected[:, begin:end]), (window, begin, end)


@pytest.mark.parametrize("left", [0, 1, 2, 5, 127, LARGEST])
def test_trees_are_the_reference_s(left: int) -> None:
    """Three sequences' drafts, with the mask that a launch hands over."""
    from tests.mask_kernels_host import see

    config = choose(PagedCall("bf16", 64, 16, 8, window=True, tree=True), 64)
    n, lengths = 9, [40, 12, 90]
    drafts = Drafts(verify_batch(16, (8, 1), 64, lengths, n), 5)
    q_index = torch.arange(n).int().repeat(3)
    for given in (None, drafts.positions):
        mask, positions = by_depth(drafts.mask, given, q_index, 3 * n, left)
        for row, length in enumerate(lengths):
            own = slice(row * n, row * n + n)
            stands = None if given is None else given[own]
            expected = visible_keys(n, length, True, (left, 0), drafts.mask[own], stands)
            for begin, end in ((0, length), (length // 3, length - 4), (length - 5, length)):
                at = q_index[own] + length - n - begin
                seen, bounds = see(
                    config, at, q_index[own], positions[own], mask[own], end - begin, (left, 0)
                )
                assert torch.equal(seen, expected[:, begin:end])
                # Between an item's largest `low` and its first new token, no row needs the mask.
                low, first_new = int(bounds[:, 0].max()), max(int(bounds[0, 2]), 0)
                assert bool(expected[:, begin + low : min(begin + first_new, end)].all())


@pytest.mark.parametrize(
    ("dtype", "head_dim", "tile_m"),
    [
        *(("bf16", 64, 64), ("fp16", 64, 128), ("bf16", 128, 64), ("fp16", 256, 64)),
        *(("bf16", 256, 128), ("bf16", 80, 64), ("fp16", 192, 128)),  # of tiles 96 and 192 wide
    ],
)
def test_what_is_not_finite_goes_to_the_rows_that_see_it(
    dtype: str, head_dim: int, tile_m: int
) -> None:
    from tests.mask_kernels_host import DTYPES, clear

    config = choose(PagedCall(dtype, head_dim, 16, 8, window=True), tile_m)
    rng = torch.Generator().manual_seed(head_dim + tile_m)
    first_key, tile = 3 * config.tile_n, config.tile_n
    columns = config.v_columns
    clean = torch.randn(tile, columns, generator=rng).to(DTYPES[dtype])
    clean[5, :4] = torch.tensor([65504.0, -65504.0, 1e-7, -0.0])
    for case in range(4):
        low = torch.randint(-20, tile // 2, (tile_m,), generator=rng)
        high = torch.randint(tile // 2, tile + 20, (tile_m,), generator=rng)
        if case == 1:
            low[:] = -3
        if case == 2:
            high[:], low[:] = tile + 9, 7
        v = clean.clone()
        for value in (torch.nan, torch.inf, -torch.inf, -torch.nan):
            if case < 3:
                at = torch.randint(0, tile * columns, (5,), generator=rng)
                v.view(-1)[at] = value
        seen = tuple(int(x) for x in (low.min(), high.max(), low.max(), high.min()))
        rows = torch.stack([low, high], 1).int() + first_key
        left, added, found = clear(config, v, rows, seen, first_key)
        key = torch.arange(tile)
        inside = (key >= seen[0]) & (key < seen[1])
        some = inside & ((key < seen[2]) | (key >= seen[3]))
        finite = torch.isfinite(v)
        assert found == bool((~finite & some[:, None]).any())
        # Exactly what no row sees, and what is not finite and not every row sees, is gone.
        gone = ~inside[:, None] | (some[:, None] & ~finite)
        same = torch.where(gone, 0, v)
        assert torch.equal(left.view(torch.int16), same.view(torch.int16))
        apart = torch.where(some[:, None] & ~finite, v.float(), 0)
        expected = torch.zeros(tile_m, columns)
        for row in range(tile_m):
            expected[row] = apart[(key >= low[row]) & (key < high[row])].sum(0)
        torch.testing.assert_close(added, expected, rtol=0, atol=0, equal_nan=True)
