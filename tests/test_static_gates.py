"""The machine code of every shipped kernel, and proof that the gate fails where it should.

A first run compiles all shipped configurations (minutes on two cores); the results stay in the
user's cache, keyed by sources and versions, so the next run takes seconds.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from flashcore.jit.folder import default_folder
from flashcore.jit.gates import (
    GateRow,
    check_kernel,
    check_kernels,
    default_jobs,
    format_table,
    violations,
)
from flashcore.jit.inspect import Resources, extract_cubins
from flashcore.jit.kernel import Kernel
from flashcore.jit.target import detect_target
from flashcore.sm90.config import dense, paged
from flashcore.sm90.config.paged import PagedCall
from flashcore.sm90.families import DENSE, MERGE, PAGED, PAGER, PLANNER
from tests.runtime_fixtures import CONSTANT, TILE, ConstantConfig, needs_disassembler, needs_dsl
from tests.toy_kernels import TileConfig

pytestmark = [needs_dsl, needs_disassembler]


def test_every_shipped_kernel_passes(capsys: pytest.CaptureFixture[str]) -> None:
    from flashcore.sm90.shipped import shipped_kernels

    kernels = shipped_kernels()
    assert kernels
    rows = check_kernels(kernels, default_folder(), detect_target(), default_jobs())
    table = format_table(rows)
    with capsys.disabled():
        print("\n" + table)
    assert [row.kernel for row in rows if row.violations] == [], table


# Each row plants one fault in a kernel that is otherwise right.
@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (TileConfig(), []),
        (TileConfig(fence_each=True), ["serialised products"]),
        (TileConfig(tma=False), ["no UTMALDG"]),
        (TileConfig(tensor_cores=False), ["no HGMMA"]),
        (TileConfig(local_array=32), ["stack frame", "local loads and stores"]),
        (TileConfig(extra_smem_bytes=230_000), ["bytes of shared memory, 232448 allowed"]),
        (TileConfig(steps=-1), ["Error"]),
    ],
    ids=["good", "serialised", "no TMA", "no WGMMA", "spills", "shared memory", "no kernel"],
)
def test_planted_fault_is_found(tmp_path: Path, config: TileConfig, expected: list[str]) -> None:
    row = check_kernel(Kernel(TILE, config), tmp_path, detect_target())
    assert len(row.violations) == len(expected), row.violations
    for violation, words in zip(row.violations, expected, strict=True):
        assert words in violation


def test_planted_dense_configuration_fails(tmp_path: Path) -> None:
    """A dense kernel whose tile is too wide for its registers, beside a good one."""
    good = dense.choose(dense.DenseProblem("bf16", 64, 1, 128, 128, 1, 1))
    bad = spilling_config()
    rows = check_kernels(
        [Kernel(DENSE, good), Kernel(DENSE, bad)], tmp_path, detect_target(), jobs=2
    )
    assert [bool(row.violations) for row in rows] == [False, True]
    assert "spills" in " ".join(rows[1].violations)
    assert "FAILED: " in format_table(rows)
    assert format_table(rows).endswith("2 kernels, 1 failed")


def spilling_config() -> dense.DenseConfig:
    base = dense.choose(dense.DenseProblem("bf16", 128, 1, 4096, 4096, 1, 1))
    bad = replace(base, tile_n=256, stages=1)  # 128 + 64 + 64 registers for S, P and O alone
    assert dense.illegal_reason(bad) is None
    return bad


def test_crashing_compiler_is_a_violation(tmp_path: Path) -> None:
    kernels = [Kernel(CONSTANT, ConstantConfig(crash=True))]
    (row,) = check_kernels(kernels, tmp_path, detect_target(), jobs=1)
    assert row.violations == ["a compiling process died"]


def test_verdict_is_remembered(tmp_path: Path) -> None:
    kernel, target = Kernel(TILE, TileConfig()), detect_target()
    first = check_kernel(kernel, tmp_path, target)
    (remembered,) = tmp_path.glob("*.sass.json")
    assert check_kernel(kernel, tmp_path, target) == first
    remembered.write_text("{}")  # of another version, or damaged
    assert check_kernel(kernel, tmp_path, target) == first
    assert remembered.read_text() != "{}"


def test_no_gpu_code_is_an_error_not_a_pass(tmp_path: Path) -> None:
    assert extract_cubins(Path(sys.executable).read_bytes()[:4096]) == []
    row = check_kernel(Kernel(CONSTANT, ConstantConfig()), tmp_path, detect_target())
    assert row.resources is None
    assert "no GPU code" in row.violations[0]


@pytest.mark.parametrize(
    ("hgmma", "arrive", "serialised"), [(32, 4, False), (32, 8, False), (32, 9, True)]
)
def test_limit_of_arrivals(hgmma: int, arrive: int, serialised: bool) -> None:
    resources = Resources(
        registers=168,
        stack_bytes=0,
        static_smem_bytes=0,
        dynamic_smem_bytes=232_448,
        opcodes={"HGMMA.64x128x16.F32.BF16": hgmma, "WARPGROUP.ARRIVE": arrive, "UTMALDG.4D": 4},
        arch="sm_90a",
    )
    assert bool(violations(resources)) is serialised


def test_required_opcodes_are_the_family_s() -> None:
    resources = Resources(64, 0, 0, 1024, {"LDG.E.128": 8}, "sm_90a")
    assert violations(resources, ()) == []
    assert violations(resources, ("UTMALDG",)) == ["no UTMALDG"]


def test_code_for_another_gpu_fails() -> None:
    resources = Resources(64, 0, 0, 1024, {"LDG.E.128": 8}, "sm_100a")
    assert violations(resources, ()) == ["compiled for sm_100a, not for sm_90a"]


def test_load_path_is_told_by_its_opcodes(tmp_path: Path) -> None:
    """Gathered rows need their own proof: Q comes by LDGSTS in every paged kernel."""
    boxes = paged.choose(PagedCall("bf16", 64, 16, 4), 64)
    rows = paged.choose(PagedCall("bf16", 64, 8, 4), 64)
    assert (boxes.kv_load, rows.kv_load) == ("tma", "gather")
    of = {c: Kernel(PAGED, c).required_opcodes for c in (boxes, rows)}
    for config, other in ((boxes, rows), (rows, boxes)):
        verdict = check_kernel(Kernel(PAGED, config), tmp_path, detect_target())
        assert verdict.resources is not None
        assert verdict.violations == []
        assert len(violations(verdict.resources, of[other])) == 1


# Which copy a row goes through depends on the rows beside it; batch-invariant plans rely on all
# rounding alike. One that multiplies and adds in two steps would be a whole copy short of FFMAs.
@pytest.mark.parametrize(
    "config",
    [
        paged.choose(PagedCall("bf16", 128, 64, 4), 64),
        paged.choose(PagedCall("bf16", 128, 1, 4), 64),
        paged.choose(PagedCall("bf16", 64, 64, 8, window=True, sinks=True), 64),
        paged.choose(PagedCall("bf16", 256, 64, 2, window=True, softcap=True), 64),
        paged.choose(PagedCall("bf16", 128, 64, 4, chunked=True), 64),
        paged.choose(PagedCall("bf16", 128, 64, 4, chunked=True), 128),
        paged.choose(PagedCall("bf16", 256, 1, 4, chunked=True), 64),
    ],
)
def test_all_copies_of_the_softmax_use_the_same_products(config: paged.PagedConfig) -> None:
    resources = check_kernel(Kernel(PAGED, config), default_folder(), detect_target()).resources
    assert resources is not None
    copies = 4 if config.window else 3  # first tile, masked, plain; masked again below a window
    scores = config.tile_n // 2  # of a thread in a tile
    assert resources.count("MUFU.EX2") // (scores * (2 if config.softcap else 1)) == copies
    folded = config.v_columns // 2 if config.chunked else 0  # elements of a thread
    assert 0 <= resources.count("FFMA") - copies * scores - folded < scores


# A vote is inline assembly: were it doubled into two branches, each would wait for the other.
@pytest.mark.parametrize(
    ("config", "masked_copies"),
    [
        (paged.choose(PagedCall("bf16", 64, 64, 8, window=True, sinks=True), 64), 3),
        (paged.choose(PagedCall("bf16", 256, 64, 2, window=True, softcap=True), 64), 3),
        (paged.choose(PagedCall("bf16", 128, 64, 4), 64), 0),
    ],
)
def test_a_window_has_one_vote_for_each_masked_copy(
    config: paged.PagedConfig, masked_copies: int
) -> None:
    resources = check_kernel(Kernel(PAGED, config), default_folder(), detect_target()).resources
    assert resources is not None
    assert resources.count("BAR.RED") == masked_copies


FAMILIES = (DENSE, PAGED, MERGE, PLANNER, PAGER)


def test_shipped_kernels_are_legal_and_distinct() -> None:
    from flashcore.sm90.shipped import OTHER_PAGED_DIMS, PAGED_DIMS, shipped_kernels

    kernels = shipped_kernels()
    assert len(set(kernels)) == len(kernels)
    of = {family: [k.config for k in kernels if k.family is family] for family in FAMILIES}
    assert sum(map(len, of.values())) == len(kernels)
    assert [dense.illegal_reason(c) for c in of[DENSE]] == [None] * len(of[DENSE])
    assert [paged.illegal_reason(c) for c in of[PAGED]] == [None] * len(of[PAGED])
    plain = {(c.dtype, c.head_dim, c.causal) for c in of[DENSE]}
    assert plain >= {(t, d, m) for t in dense.DTYPES for d in dense.HEAD_DIMS for m in (0, 1)}
    tiles = {(c.head_dim, c.tile_m) for c in of[PAGED]}
    assert tiles >= {(d, m) for d in PAGED_DIMS for m in (64, 128)}
    merges = {(c.dtype, c.head_dim) for c in of[MERGE]}
    assert merges >= {(t, d) for t in dense.DTYPES for d in PAGED_DIMS}
    for configs in (of[PAGED], of[MERGE]):  # for plans made on the device too
        made = {(c.dtype, c.head_dim) for c in configs if c.device_counts}
        assert made >= {(t, d) for t in dense.DTYPES for d in PAGED_DIMS}
    engines = {(c.head_dim, c.v_head_dim, c.page_tokens) for c in of[PAGED] if c.device_counts}
    assert engines >= {(*dims, page) for dims in OTHER_PAGED_DIMS for page in (1, 64)}
    fp8 = {(c.head_dim, c.page_tokens) for c in of[PAGED] if c.device_counts and c.kv_dtype}
    assert fp8 >= {(dim, page) for dim in PAGED_DIMS for page in (1, 64)}
    assert made >= {("bf16", v_dim) for _, v_dim in OTHER_PAGED_DIMS}


def test_unknown_shared_memory_fails() -> None:
    resources = Resources(
        168, 0, 0, None, {"HGMMA": 8, "WARPGROUP.ARRIVE": 1, "UTMALDG": 1}, "sm_90a"
    )
    assert violations(resources) == ["shared memory of the launch is unknown"]


def test_counting_does_not_match_longer_names() -> None:
    resources = Resources(1, 0, 0, 0, {"LDL": 1, "LDL.64": 2, "LDLX": 4}, "sm_90a")
    assert resources.count("LDL") == 3


def test_table_names_kernels_that_did_not_compile() -> None:
    table = format_table([GateRow("dense bad", None, ["ValueError: no"])])
    assert "dense bad" in table
    assert "FAILED: ValueError: no" in table
