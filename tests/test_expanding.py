"""Room to expand fp8 pages in an engine: what is asked for, what there is, what is told."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch

from flashcore.contract.counts import Stat
from flashcore.planner import expansion
from flashcore.planner.expansion import Way
from flashcore.problem import Problem
from flashcore.serving import capacity, expanding, planners
from flashcore.serving.capacity import Kind
from flashcore.serving.counters import Counters
from flashcore.serving.expanding import Layers, room_to_expand
from flashcore.serving.shapes import Limits, Model, Shape
from flashcore.sm90.expansion_scratch import ExpansionScratch

SHAPE = Shape(32, 8, 128)
MODEL = Model(
    *(SHAPE, None, -1, 16, 0, torch.bfloat16, torch.device("cpu")), kv_dtype=torch.float8_e4m3fn
)
LAYERS = Layers(MODEL, Limits(64, 32_768, 8192, 64), Kind(SHAPE, -1, 1 << 20))
PROBLEM = Problem(32, 8, 128, 128, page_tokens=16, itemsize=1)
PAGE = 16 * 8 * 256 * 2


@pytest.fixture(autouse=True)
def on_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planners, "on_kernels", lambda device: True)
    monkeypatch.setattr(expanding, "can_expand", lambda forced: True)


def budget(monkeypatch: pytest.MonkeyPatch, mib: int) -> None:
    monkeypatch.setenv(capacity.ENVIRONMENT, str(mib))


def test_the_bound_or_the_whole_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    budget(monkeypatch, 4096)
    room, taken = room_to_expand([LAYERS], 0)
    assert room is not None
    assert room.pages.nbytes == expansion.EXPANSION_BYTES
    assert room.entries.numel() == (1 << 20) // 16
    pages = expansion.EXPANSION_BYTES // PAGE
    entries = 64 * 2048
    assert taken == room.pages.nbytes + room.entries.nbytes + 4 * (pages + 1 + entries + 34)
    small = replace(LAYERS, kind=Kind(SHAPE, -1, 160))
    room, _ = room_to_expand([small], 0)
    assert room is not None
    assert room.pages.nbytes == 10 * PAGE


def test_what_the_budget_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    budget(monkeypatch, 1024)
    room, taken = room_to_expand([LAYERS], 900 << 20)
    assert room is not None
    assert (110 << 20) < room.pages.nbytes < (124 << 20)
    assert taken <= 124 << 20
    assert room_to_expand([LAYERS], 990 << 20) == (None, 0)
    assert room_to_expand([LAYERS], 2048 << 20) == (None, 0)


def test_layers_that_never_expand() -> None:
    window = replace(LAYERS, kind=Kind(SHAPE, 1024, 1 << 20))
    plain = replace(LAYERS, model=replace(MODEL, kv_dtype=None))
    assert room_to_expand([window, plain], 0) == (None, 0)
    room, _ = room_to_expand([window, LAYERS, plain], 0)
    assert room is not None


def test_without_triton_there_is_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expanding, "can_expand", lambda forced: False)
    assert room_to_expand([LAYERS], 0) == (None, 0)


def test_what_is_told() -> None:
    room, _ = room_to_expand([LAYERS], 0)
    assert expanding.describe(MODEL, room) == ", fp8 pages of long prefills expanded in 512 MiB"
    assert expanding.describe(MODEL, None) == ", fp8 pages converted in long prefills too"
    assert expanding.describe(replace(MODEL, kv_dtype=None), None) == ""


def test_a_scratch_holds_what_it_says() -> None:
    scratch = ExpansionScratch(10 * PAGE + 7, num_pages=100, device="cpu")
    size = scratch.pages.nbytes + scratch.entries.nbytes
    assert size == ExpansionScratch.bytes_of(10 * PAGE + 7, 100)
    lent = scratch.lent(PROBLEM, 50, 300)
    assert lent.places.pages.numel() == 10
    tensors = (*lent.places, lent.counts, lent.converted_counts, lent.outcome)
    told = ExpansionScratch.plan_bytes(10 * PAGE + 7, 50, 300, PROBLEM)
    assert told == sum(x.nbytes for x in tensors)
    with pytest.raises(ValueError, match="expansion has num_pages 100, the planner's is 101"):
        scratch.lent(PROBLEM, 101, 300)
    with pytest.raises(ValueError, match=f"expansion has 100 bytes, fewer than the {PAGE} of a"):
        ExpansionScratch(100, num_pages=9, device="cpu").lent(PROBLEM, 9, 9)


@pytest.mark.parametrize(
    ("way", "text"),
    [
        (Way.EXPANDED, "fp8 pages expanded: 70"),
        (Way.NO_ROOM, "fp8 pages converted: no room to expand 70"),
        (Way.CONVERTED, ""),
        (None, ""),
    ],
)
def test_counters_tell_what_became_of_fp8_pages(
    way: Way | None, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    stats = torch.ones(Stat.SIZE, dtype=torch.int64)
    outcome = None if way is None else torch.tensor([way, 70], dtype=torch.int32)
    counters = Counters("prefill", interval=1)
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            counters.step(stats, outcome)
    (told,) = [record.getMessage() for record in caplog.records]
    assert text in told
    assert ("fp8" in told) == bool(text)
