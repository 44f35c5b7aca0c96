"""Schedules of gathered rows that no rule chooses, on a Hopper GPU: the bits of the one it does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch

from flashcore.sm90.available import available
from flashcore.sm90.config.paged import PagedCall, PagedConfig, choose
from flashcore.sm90.launch import paged as launch
from tests.gpu.test_paged_gpu import batch_of, run

pytestmark = pytest.mark.skipif(
    not available("cuda")[0], reason=f"no Hopper GPU: {available('cuda')[1]}"
)


def with_changes(monkeypatch: pytest.MonkeyPatch, changes: Mapping[str, Any]) -> list[PagedConfig]:
    """Launches take the chosen configuration with `changes`; the list has those they took."""
    taken = []

    def chosen(call: PagedCall, tile_m: int) -> PagedConfig:
        taken.append(replace(choose(call, tile_m), **changes))
        return taken[-1]

    monkeypatch.setattr(launch, "_choose", chosen)
    return taken


# Several items for each CTA, of 1 to 14 tiles and with none, and rows past a run's end; tiles of
# 128 and of 64 keys, rows of several and of less than 256 bytes.
@pytest.mark.parametrize(
    "changes",
    [
        {"rows_in_flight": 16},
        {"rows_in_flight": 32},
        {"rows_in_flight": 48},
        {"rows_in_flight": 64},
        {"stages": 2},
        {"stages": 2, "rows_in_flight": 48},
        {"fetch_whole_rows": False},
    ],
    ids=str,
)
@pytest.mark.parametrize(("head_dim", "tile_m"), [(64, 64), (128, 64), (256, 64), (128, 128)])
def test_schedules(
    monkeypatch: pytest.MonkeyPatch, head_dim: int, tile_m: int, changes: dict[str, Any]
) -> None:
    batch = batch_of(7, 1, (8, 8), head_dim, 1, 150)
    options = {"tile_m": tile_m, "share": False, "num_workers": 100}
    expected = run(batch, torch.bfloat16, {}, **options)
    taken = with_changes(monkeypatch, changes)
    for _ in range(20):
        got = run(batch, torch.bfloat16, {}, **options)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert all(config.kv_load == "gather" for config in taken)
