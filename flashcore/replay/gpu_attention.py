"""Attention of simulated steps timed on a GPU, beside FlashAttention-3 where it is installed."""

from __future__ import annotations

from typing import NamedTuple

import torch

import flashcore
from flashcore.bench.graphs import Flusher, Graph, capture, start_sample, time_graphs
from flashcore.bench.paged_accuracy import relative_distance
from flashcore.bench.paged_providers import WRONG
from flashcore.planner.types import Plan

_ROUNDS = 7


class GpuStep(NamedTuple):
    """One step on a GPU: the arguments of `paged_attention`, and the page table for a peer."""

    q: torch.Tensor
    k_pages: torch.Tensor
    v_pages: torch.Tensor
    plan: Plan
    page_table: torch.Tensor
    kv_lens: torch.Tensor
    q_lens: torch.Tensor


class GpuTimer:
    """Times steps in CUDA graphs, the L2 flushed before each replay; `peer_absent` says why there
    are no times of FlashAttention-3."""

    def __init__(self) -> None:
        self.peer_absent: str | None = None
        self._flush = Flusher("cuda")
        try:
            from flashcore.bench.paged_providers import load_fa3

            self._peer = load_fa3()[0]
        except Exception as error:  # it fails to import in many ways
            self.peer_absent = _first_line(error)

    def time(self, step: GpuStep) -> tuple[float, float | None]:
        """Median milliseconds of one layer's attention: ours, FlashAttention-3's."""
        graphs = {
            "ours": capture(
                lambda: flashcore.paged_attention(
                    step.q, step.k_pages, step.v_pages, step.plan, impl="auto"
                )
            )
        }
        if self.peer_absent is None:
            try:
                graphs["peer"] = self._capture_peer(step)
                self._compare(graphs["ours"], graphs["peer"])
            except Exception as error:  # a peer that cannot run a step is left out from then on
                self.peer_absent = _first_line(error)
                graphs.pop("peer", None)
        timings = time_graphs(
            graphs, rounds=_ROUNDS, start=lambda graph: start_sample(graph, self._flush)
        )
        peer = timings.get("peer")
        return timings["ours"].median_ms, None if peer is None else peer.median_ms

    def _capture_peer(self, step: GpuStep) -> Graph:
        table = step.page_table.clamp_min(0)  # ids past a sequence's end are -1 here
        longest = int(step.q_lens.max())
        offsets = torch.zeros(step.q_lens.numel() + 1, dtype=torch.int32, device=table.device)
        offsets[1:] = step.q_lens.cumsum(0)
        return capture(
            lambda: self._peer(
                *(step.q, step.k_pages, step.v_pages, table, step.kv_lens, offsets, longest)
            )
        )

    @staticmethod
    def _compare(ours: Graph, peer: Graph) -> None:
        ours.replay()
        peer.replay()
        distance = float(relative_distance(peer.out, ours.out).max())
        if not distance <= 2 * WRONG:
            raise ValueError(f"its result differs by {distance:.2g} of ours")


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
