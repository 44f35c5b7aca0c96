"""The paged launch with a stand-in for the compiled kernels: which run, with which buffers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import flashcore
from flashcore import ops
from flashcore.device import Path
from flashcore.runtime import launch_paged
from flashcore.runtime.kernel import Kernel

HEADS, KV_HEADS, DIM, PAGE = 8, 2, 128, 64


class Recorder:
    """Takes the place of the disk cache and of every function in it."""

    def __init__(self) -> None:
        self.kernels: list[Kernel] = []
        self.calls: list[tuple[str, tuple[Any, ...]]] = []

    def function(self, kernel: Kernel) -> Any:
        self.kernels.append(kernel)
        return lambda *arguments: self.calls.append((kernel.family.name, arguments))


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """CPU tensors pass for tensors of a GPU with 132 SMs."""
    recorder = Recorder()
    monkeypatch.setattr(ops, "device_path", lambda device: Path("hopper", ""))
    monkeypatch.setattr(launch_paged, "shared_cache", lambda: recorder)
    monkeypatch.setattr(launch_paged, "_functions", {})
    monkeypatch.setattr(launch_paged, "sm_count", lambda device: 132)
    monkeypatch.setattr(launch_paged, "scheduler_scratch", lambda index: "scratch")
    monkeypatch.setattr(launch_paged, "lasting_stream", lambda index: 0)
    return recorder


def attend(prefix_pages: int, batch: int = 2, **options: Any) -> Any:
    """Sequences that decode, with a common prefix of so many pages and two pages of their own."""
    own = [[prefix_pages + 2 * b, prefix_pages + 2 * b + 1] for b in range(batch)]
    table = torch.tensor([[*range(prefix_pages), *pages] for pages in own], dtype=torch.int32)
    lengths = torch.full((batch,), PAGE * (prefix_pages + 2) - 9)
    plan = flashcore.plan(
        flashcore.layout_from_page_table(table, lengths, page_tokens=PAGE),
        q_lens=[1] * batch,
        num_q_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=DIM,
        page_tokens=PAGE,
    )
    q = torch.zeros(batch, HEADS, DIM, dtype=torch.bfloat16)
    pages = torch.zeros(prefix_pages + 2 * batch, PAGE, KV_HEADS, DIM, dtype=torch.bfloat16)
    return plan, flashcore.paged_attention(q, pages, pages.clone(), plan, **options)


def test_partial_results_are_merged_from_where_they_were_written(recorder: Recorder) -> None:
    plan, (out, lse) = attend(64, return_lse=True)
    (first, attention), (second, merge) = recorder.calls
    assert (first, second) == ("paged", "combine")
    assert attention[3] is merge[0] is out
    assert attention[4] is merge[1] is lse
    assert attention[5] is merge[2]
    assert attention[6] is merge[3]
    assert plan.num_partial_tokens > 0
    assert attention[5].shape == (plan.num_partial_tokens, HEADS, DIM)
    assert attention[6].shape == (plan.num_partial_tokens, HEADS)
    assert attention[5].dtype == attention[6].dtype == lse.dtype == torch.float32


def test_nothing_partial_makes_no_buffer_and_no_merge(recorder: Recorder) -> None:
    for _ in range(2):
        plan, _ = attend(0, batch=200)
        assert (plan.num_partial_tokens, plan.needs_merge) == (0, False)
    (first, before), (second, after) = recorder.calls
    assert first == second == "paged"
    assert before[5].shape == (1, HEADS, DIM)  # an address to hand over, no more
    assert before[5] is after[5]
    assert before[6] is after[6]
    assert before[3] is not after[3]


def test_a_choice_is_made_once(recorder: Recorder) -> None:
    for batch in (2, 3, 2):
        attend(64, batch=batch)
    assert [kernel.family.name for kernel in recorder.kernels] == ["paged", "combine"]


def test_options_choose_another_kernel(recorder: Recorder) -> None:
    attend(64)
    attend(64, window=(100, -1))
    attend(64, softcap=3.0, sinks=torch.zeros(HEADS))
    configs = [k.config for k in recorder.kernels if k.family.name == "paged"]
    assert [(c.window, c.softcap, c.sinks) for c in configs] == [
        (False, False, False),
        (True, False, False),
        (False, True, True),
    ]
