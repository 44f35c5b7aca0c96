"""Time of the plan on the GPU, all its kernels, in a CUDA graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from flashcore.bench.graphs import Graph, capture, time_graphs
from flashcore.bench.paged import Machine
from flashcore.bench.paged_problems import PagedProblem, make_batch

SHAPES = ((256, 64), (64, 1024), (64, 64), (16, 64), (8, 16), (1, 8))
_UPDATES = 20  # in a graph, so that the launch of the first does not count


def plan_times(
    machine: Machine, rounds: int, sizes: Sequence[tuple[int, int]] = SHAPES
) -> list[dict[str, Any]]:
    """For sequences x pages of 128 tokens, half of each sequence common to all."""
    graphs: dict[str, Graph] = {}
    shapes = {f"{n}x{pages}": (n, pages) for n, pages in sizes}
    for name, (sequences, pages) in shapes.items():
        graphs[name] = capture(_updates(sequences, pages, machine.device))
    timings = time_graphs(graphs, rounds=rounds, start=machine.start)
    return [
        {
            "sequences": sequences,
            "pages": pages,
            "us": timings[name].median_ms * 1e3 / _UPDATES,
        }
        for name, (sequences, pages) in shapes.items()
    ]


def _updates(sequences: int, pages: int, device: str) -> Any:
    from flashcore.planner.device_plan import Capacities
    from flashcore.sm90.device_planner import DevicePlanner

    problem = PagedProblem("", sequences, pages * 128, prefix_tokens=pages // 2 * 128)
    batch = make_batch(problem)
    planner = DevicePlanner(
        Capacities(sequences, sequences * pages, sequences),
        num_pages=batch.num_pages,
        num_q_heads=problem.q_heads,
        num_kv_heads=problem.kv_heads,
        head_dim=problem.head_dim,
        device=device,
    )
    table, lens = batch.page_table.to(device), batch.seq_lens.to(device)
    q_lens = torch.ones(sequences, dtype=torch.int32, device=device)

    def call() -> torch.Tensor:
        for _ in range(_UPDATES):
            plan = planner.update(table, lens, q_lens)
        return plan.counts

    return call
