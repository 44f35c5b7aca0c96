"""What can be said of the planner's kernels without a GPU: their machine code, and their caller."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from flashcore.dispatch import Path
from flashcore.jit.folder import default_folder
from flashcore.jit.gates import check_kernel
from flashcore.jit.kernel import Kernel
from flashcore.jit.target import detect_target
from flashcore.planner.device_plan import Capacities
from flashcore.sm90.config.planner import (
    ROW_CAPACITIES,
    PlannerConfig,
    choose,
    choose_small,
    illegal_reason,
)
from flashcore.sm90.device_planner import DevicePlanner
from flashcore.sm90.families import PLANNER
from tests.runtime_fixtures import needs_disassembler, needs_dsl


@needs_dsl
@needs_disassembler
@pytest.mark.parametrize(
    "config",
    [
        *(PlannerConfig(rows) for rows in ROW_CAPACITIES),
        PlannerConfig(1024, True),
        PlannerConfig(1024, chunks=True),
        choose_small(),
        choose_small(chunks=True),
    ],
)
def test_nothing_spills(config: PlannerConfig) -> None:
    row = check_kernel(Kernel(PLANNER, config), default_folder(), detect_target())
    assert row.violations == []
    if config.small:
        assert row.resources is not None
        assert row.resources.dynamic_smem_bytes <= config.smem_bytes


def test_smallest_kernel_is_chosen() -> None:
    sizes = (1, 1024, 1025, 32768, 40_000, 57_344)
    chosen = [1024, 1024, 8192, 32768, 57_344, 57_344]
    assert [choose(n).row_capacity for n in sizes] == chosen
    with pytest.raises(ValueError, match="max_batch must be at most 57344, got 57345"):
        choose(57_345)
    assert "row_capacity 7 is not one of" in str(illegal_reason(PlannerConfig(7)))
    assert "not one of (64,)" in str(illegal_reason(PlannerConfig(1024, small=True)))
    assert "chain of kernels" in str(illegal_reason(PlannerConfig(64, True, small=True)))


@pytest.mark.parametrize("chunks", [False, True])
def test_one_kernel_for_few_sequences(chunks: bool) -> None:
    """And few query tokens, and places in the table; else a chain of kernels."""
    taken = {}
    for max_q, batch, columns in (
        (1024, 64, 256),
        (1024, 1, 16384),
        (1024, 65, 1),
        (1025, 64, 1),
        (1024, 64, 257),
        (1024, 1, 16385),
    ):
        made = planner(max_batch=70, max_entries=999, max_q=max_q, batch_invariant=chunks)
        lens = torch.zeros(batch, dtype=torch.int32)
        with (
            mock.patch(
                "flashcore.sm90.device_planner.device_path", return_value=Path("hopper", "")
            ),
            mock.patch("flashcore.sm90.device_planner.sm_count", return_value=132),
            mock.patch("flashcore.sm90.launch.planner.make_plan") as launch,
        ):
            made.update(torch.zeros(batch, columns, dtype=torch.int32), lens, lens)
        config = launch.call_args.args[0]
        assert config in (choose_small(chunks), choose(70, chunks=chunks))
        taken[max_q, batch, columns] = config.small
    assert list(taken.values()) == [True, True, False, False, False, False]


def planner(**changes: int) -> DevicePlanner:
    capacities = {"max_batch": 4, "max_entries": 64, "max_q": 16}
    options = {"num_pages": 32, "num_q_heads": 8, "num_kv_heads": 2, "head_dim": 64}
    capacities |= {n: v for n, v in changes.items() if n.startswith("max_")}
    options |= {n: v for n, v in changes.items() if not n.startswith("max_")}
    return DevicePlanner(Capacities(**capacities), page_tokens=16, device="cpu", **options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_batch": 0}, "max_batch must be at least 1 .* got 0"),
        ({"max_entries": -1}, "max_entries must be at least 1 .* got -1"),
        ({"max_items": 2**30}, "max_items must be .* at most"),
        ({"num_pages": 0}, "num_pages must be at least 1 .* got 0"),
        ({"num_kv_heads": 3}, "num_q_heads must be a multiple"),
        # The limit on sequences before any other that they break.
        ({"max_batch": 70_000, "max_q": 100_000}, "max_batch must be at most 57344, got 70000"),
        ({"max_batch": 3000, "max_q": 2**21}, "max_q must be at most 2097150 with max_batch 3000"),
        ({"max_segments": 3}, r"max_segments must be at least max_batch \(4\).* got 3"),
    ],
)
def test_impossible_capacities_are_named(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        planner(**changes)


def test_inputs_are_checked() -> None:
    table = torch.zeros(3, 8, dtype=torch.int32)
    lens = torch.zeros(3, dtype=torch.int32)
    with pytest.raises(TypeError, match="page_table must have dtype int32"):
        planner().update(table.long(), lens, lens)
    with pytest.raises(ValueError, match="has 3 rows, max_batch is 2"):
        planner(max_batch=2).update(table, lens, lens)
    with pytest.raises(ValueError, match=r"length per row of page_table \(3\), .* got 3 and 2"):
        planner().update(table, lens, lens[:2])
    with pytest.raises(ValueError, match="page_table must have contiguous rows"):
        planner().update(torch.zeros(8, 3, dtype=torch.int32).T, lens, lens)
