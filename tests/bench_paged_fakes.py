"""Small problems, and a machine without a GPU, for tests of the paged benchmark."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from flashcore.bench.paged import Machine, add_bounds, run_paged
from flashcore.bench.paged_problems import PagedInputs, PagedProblem, Tree
from flashcore.bench.paged_providers import PagedProvider, our_call, plan_of
from flashcore.bench.paged_report import summarise

SMALL = {"q_heads": 4, "kv_heads": 2, "head_dim": 64, "page_tokens": 16}
SHARED = PagedProblem("shared", 3, 128, prefix_tokens=96, **SMALL)
TREE = PagedProblem("tree", 24, 400, tree=Tree(64, 3, 96), **SMALL)
PREFILL = PagedProblem("prefill", 2, 96, prefix_tokens=64, q_len=32, **SMALL)
READ = {
    **{"bytes_per_second": 1e9, "method": "torch.sum of bf16"},
    **{"fastest_bytes_per_second": 2e9, "fastest_method": "a loop"},
}


class CpuGraph:
    """Stands in for a captured call."""

    def __init__(self, call: Callable[[], torch.Tensor]):
        self.call, self.out = call, call()

    def replay(self) -> None:
        self.out.copy_(self.call())


def machine(milliseconds: Callable[[Any], float] = lambda graph: 1.0) -> Machine:
    return Machine(
        "cpu", CpuGraph, lambda graph: lambda: milliseconds(graph), lambda: {"sm_mhz": 1.0}
    )


def ours(factor: float = 1.0, name: str = "flashcore", share: bool = True) -> PagedProvider:
    def prepare(problem: PagedProblem, inputs: PagedInputs) -> Callable[[], torch.Tensor]:
        call = our_call(inputs, plan_of(problem, inputs, share=share))
        return lambda: call() * factor

    return PagedProvider(name, "1.0", prepare)


def measured(*providers: PagedProvider, problem: PagedProblem = SHARED) -> dict[str, Any]:
    result = run_paged([problem], providers, machine(), rounds=3)
    add_bounds(result["rows"], 1e9, 2e9)
    return result


def complete(result: dict[str, Any]) -> dict[str, Any]:
    return {
        **{"device": "a GPU", "driver": "1", "commit": "abc", "date": "2026-01-01T00:00:00"},
        **{"read_bandwidth": READ, "streaming_read_gbs": 1.0, "fastest_read_gbs": 2.0},
        "method": "graphs",
        **{"empty_graph_ms": 0.002, "summary": summarise(result["rows"])},
        **result,
    }
