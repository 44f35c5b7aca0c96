"""Timing of a replayed step beside a peer, with captured graphs and times that stand in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import flashcore
from flashcore.bench import paged_providers
from flashcore.reference import paged_attention_reference
from flashcore.replay import gpu_attention
from flashcore.replay.gpu_attention import GpuStep, GpuTimer


class CpuGraph:
    def __init__(self, call: Callable[[], torch.Tensor]):
        self.call, self.out = call, call()

    def replay(self) -> None:
        self.out.copy_(self.call())


def step() -> GpuStep:
    """A decoding sequence, one prefilling, unused page ids of -1."""
    table = torch.tensor([[3, 1, -1], [3, 0, 2]], dtype=torch.int32)
    lens = torch.tensor([20, 40], dtype=torch.int32)
    q_lens = torch.tensor([1, 9], dtype=torch.int32)
    layout = flashcore.layout_from_page_table(table, lens, page_tokens=16)
    plan = flashcore.plan(
        layout, q_lens=q_lens, num_q_heads=4, num_kv_heads=2, head_dim=32, page_tokens=16
    )
    rng = torch.Generator().manual_seed(0)
    q = torch.randn(10, 4, 32, generator=rng)
    k, v = torch.randn(2, 4, 16, 2, 32, generator=rng)
    return GpuStep(q, k, v, plan, table, lens, q_lens)


def attend(*args: Any) -> torch.Tensor:
    """The reference, taking what FlashAttention-3 takes."""
    q, k, v, table, lens, offsets, longest = args
    assert int(table.min()) >= 0
    assert longest == 9
    layout = flashcore.layout_from_page_table(table, lens, page_tokens=16)
    return paged_attention_reference(q, k, v, layout, offsets.diff().tolist())[0].to(q.dtype)


@pytest.fixture
def timer(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], GpuTimer]:
    monkeypatch.setattr(gpu_attention, "capture", CpuGraph)
    monkeypatch.setattr(gpu_attention, "Flusher", lambda device: None)
    monkeypatch.setattr(gpu_attention, "start_sample", lambda graph, flush: lambda: 2.0)

    def make(load: Any) -> GpuTimer:
        monkeypatch.setattr(paged_providers, "load_fa3", load)
        return GpuTimer()

    return make


def test_both_are_timed(timer: Callable[[Any], GpuTimer]) -> None:
    found = timer(lambda: (attend, "1"))
    assert found.time(step()) == (2.0, 2.0)
    assert found.peer_absent is None


def test_an_absent_peer_leaves_a_reason(timer: Callable[[Any], GpuTimer]) -> None:
    def load() -> Any:
        raise ImportError("no such library\nmore")

    found = timer(load)
    assert found.time(step()) == (2.0, None)
    assert found.peer_absent == "ImportError: no such library"


def test_a_wrong_peer_is_left_out(timer: Callable[[Any], GpuTimer]) -> None:
    found = timer(lambda: (lambda *args: attend(*args) * 1.1, "1"))
    assert found.time(step()) == (2.0, None)
    assert found.time(step()) == (2.0, None)
    assert "differs by 0.1" in str(found.peer_absent)
