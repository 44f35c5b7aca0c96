"""How warps go over tiles of fp8: each value to its place for the products, no bank twice."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from tests.emulation.few_rows import places as narrow_places
from tests.runtime_fixtures import needs_dsl

pytestmark = needs_dsl
COLUMNS = (64, 96, 128, 192, 256)


def places(columns: int, tile_n: int) -> torch.Tensor:
    """Byte of each element of an fp16 tile (tile_n, columns), as the products' layout has it."""
    import cutlass
    import cutlass.cute as cute
    from cutlass import Float16, Int32
    from cutlass.cute.runtime import from_dlpack

    from flashcore.sm90.kernels.attention.paged.gather import byte_layout
    from flashcore.sm90.kernels.attention.parts import matmul

    @cute.jit
    def evaluate(found):
        layout = byte_layout(matmul.smem_layout(Float16, tile_n, columns, 1))
        for i in cutlass.range(tile_n * columns):
            row, column = i // columns, i % columns
            found[i] = Int32(cute.crd2idx((row, 2 * column, 0), layout))

    found = torch.zeros(tile_n * columns, dtype=torch.int32)
    evaluate(from_dlpack(found))
    return found.view(tile_n, columns)


def wavefronts(addresses: list[int]) -> int:
    """Of a 16-byte access: eight lanes at a time, each bank once for every word of its own."""
    total = 0
    for quarter in range(0, 32, 8):
        words = {a // 4 + i for a in addresses[quarter : quarter + 8] for i in range(4)}
        total += max(Counter(word % 32 for word in words).values())
    return total


@pytest.mark.parametrize("tile_n", [64, 128])
@pytest.mark.parametrize(
    ("columns", "swizzled"),
    [*((columns, False) for columns in COLUMNS), *((columns, True) for columns in (64, 128, 256))],
)
def test_every_value_goes_to_its_place_and_no_bank_is_asked_twice(
    columns: int, swizzled: bool, tile_n: int
) -> None:
    from flashcore.sm90.kernels.attention.paged.convert import CHUNK, Lanes
    from flashcore.sm90.kernels.attention.paged.few_rows.shape import Swizzled

    lanes, rows = (
        Lanes(columns, tile_n, Swizzled(columns, tile_n) if swizzled else None),
        tile_n // 2,
    )
    tile = torch.arange(tile_n * columns)
    if swizzled:
        of_loads = torch.from_numpy(narrow_places(columns, tile_n)).flatten().long()
        tile[of_loads] = tile.clone()
    stage = torch.full((tile_n * columns,), -1)
    for part in range(2):
        source = lanes.source_rows(part * rows)
        target = part * rows * 2 * lanes.block
        for row, block in lanes.steps(rows):
            loads, stores = [], ([], [])
            for lane in range(32):
                at = source + lanes.source(lane, block % 2) + lanes.source_step(row, block)
                loads.append(at)
                for second in range(2):
                    to = target + lanes.target(lane, block % 2, second)
                    to += lanes.target_step(row, block)
                    stores[second].append(to)
                    first = at + CHUNK // 2 * second
                    stage[to // 2 : to // 2 + 8] = tile[first : first + 8]
            assert [wavefronts(x) for x in (loads, *stores)] == [4, 4, 4]
    placed = stage[places(columns, tile_n) // 2].flatten()
    assert torch.equal(placed, torch.arange(tile_n * columns))
