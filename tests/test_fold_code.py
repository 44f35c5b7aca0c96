"""The machine code of the fold, in a merge and in the attention kernels that do it themselves."""

from __future__ import annotations

import pytest

from flashcore.jit.cache import KernelCache
from flashcore.jit.folder import default_folder
from flashcore.jit.gates import check_kernel
from flashcore.jit.inspect import disassemble, extract_cubins
from flashcore.jit.kernel import Kernel
from flashcore.jit.target import detect_target
from flashcore.sm90.config import paged
from flashcore.sm90.config.merge import MergeConfig
from flashcore.sm90.config.paged import PagedCall
from flashcore.sm90.families import MERGE, PAGED
from tests.runtime_fixtures import needs_disassembler, needs_dsl
from tools.compare_machine_code import instructions

pytestmark = [needs_dsl, needs_disassembler]

LOG2_E = "1.4426950"
CHUNKED = PagedCall("bf16", 128, 64, 4, chunked=True)


def code(kernel: Kernel) -> list[list[str]]:
    """Words of each instruction, its predicate left out."""
    verdict = check_kernel(kernel, default_folder(), detect_target())
    assert verdict.violations == []
    entry = KernelCache.open(None).entry(kernel)
    lines = [
        line.split()
        for cubin in extract_cubins(entry.shared_object)
        for line in instructions(disassemble(cubin))
    ]
    return [words[words[0].startswith("@") :] for words in lines if len(words) > 1]


def of(found: list[list[str]], name: str, operand: str = "") -> list[list[str]]:
    return [w for w in found if w[0] == name and any(operand in part for part in w[1:])]


@pytest.mark.parametrize(
    ("kernel", "exponents"),
    [
        (Kernel(MERGE, MergeConfig("bf16", 128, fixed_order=True)), 8),  # four chunks in flight
        (Kernel(MERGE, MergeConfig("bf16", 128, warps_per_row=8, fixed_order=True)), 2),
        # Of a thread's two rows, one when a chunk is closed and two when it is added; the
        # softmax's scale besides.
        (Kernel(PAGED, paged.choose(CHUNKED, 64)), 7),
        (Kernel(PAGED, paged.choose(CHUNKED, 128)), 7),
    ],
    ids=["merge", "merge by a CTA", "attention, 64 rows", "attention, 128 rows"],
)
def test_weights_are_the_same_instructions(kernel: Kernel, exponents: int) -> None:
    """A difference, a product, an exponential: nothing contracted, no denormal looked after."""
    found = code(kernel)
    with_constant = [words for words in found if any(LOG2_E in part for part in words)]
    assert {words[0] for words in with_constant} == {"FMUL"}
    assert len(with_constant) >= exponents
    # What ptxas adds around exp2 and log2 where denormals are not flushed.
    assert not of(found, "FMUL", "16777216")
    assert not of(found, "FSETP.GEU.AND", "-126")


@pytest.mark.parametrize(("dim", "tile_m"), [(64, 64), (128, 64), (128, 128), (256, 64)])
def test_products_are_those_of_one_order(dim: int, tile_m: int) -> None:
    """WGMMAs of one shape whatever the height: 64 rows, one width of keys, all columns."""
    found = code(Kernel(PAGED, paged.choose(CHUNKED._replace(head_dim=dim), tile_m)))
    shapes = {words[0] for words in found if words[0].startswith("HGMMA")}
    width = paged.choose(CHUNKED._replace(head_dim=dim), 64).tile_n
    assert shapes == {f"HGMMA.64x{width}x16.F32.BF16", f"HGMMA.64x{dim}x16.F32.BF16"}
