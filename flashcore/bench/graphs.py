"""Timing of CUDA graphs with the L2 cache emptied before each replay.

A sample is: fill the L2 with something else, event, one replay, event. Nothing is subtracted; the
launch of the graph's first kernel hides behind the filling, its start on the GPU does not. In a
round everybody has one turn, in a random order, so that all see the same clocks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from flashcore.bench.timing import Timing, shuffled, timing_of

Pending = Callable[[], float]  # waits for the end of a sample: milliseconds

_FLUSH_BYTES = 256 << 20  # five times the L2 of an H100


@dataclass(frozen=True)
class Graph:
    """A captured call; `out` is rewritten by each replay.

    The call is kept with it: it owns tensors (a plan, a workspace) whose addresses are captured.
    """

    graph: Any
    out: torch.Tensor
    call: Callable[[], torch.Tensor]

    def replay(self) -> None:
        """Run it on the current stream."""
        self.graph.replay()


def capture(call: Callable[[], torch.Tensor]) -> Graph:
    """Warm `call` up (it may compile and allocate) and capture it."""
    cuda: Any = torch.cuda  # partly untyped in some versions of torch
    side = cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    return Graph(graph, out, call)


class Flusher:
    """Empties the L2 by reading 256 MiB, or with `write` by writing them.

    Writing leaves the L2 full of lines that are not yet in DRAM, and the next kernel pays for
    putting them there; no layer before an attention leaves that behind.
    """

    def __init__(self, device: str, *, write: bool = False):
        self._buffer = torch.zeros(_FLUSH_BYTES // 4, dtype=torch.int32, device=device)
        self._write = write

    def __call__(self) -> None:
        """Enqueue it on the current stream."""
        if self._write:
            self._buffer.zero_()
        else:
            self._buffer.sum()


def start_sample(graph: Graph, flush: Callable[[], None]) -> Pending:
    """Enqueue one sample on the current stream."""
    event: Any = torch.cuda.Event
    start, end = event(enable_timing=True), event(enable_timing=True)
    flush()
    start.record()
    graph.replay()
    end.record()

    def milliseconds() -> float:
        end.synchronize()
        return float(start.elapsed_time(end))

    return milliseconds


def time_graphs(
    graphs: Mapping[str, Graph], *, rounds: int, start: Callable[[Graph], Pending]
) -> dict[str, Timing]:
    """Median time of each, in rounds as `timing.shuffled` has them, the first of which does not
    count."""
    samples: dict[str, list[float]] = {name: [] for name in graphs}
    for turn, order in enumerate(shuffled(graphs, rounds + 1)):
        pending = [(name, start(graphs[name])) for name in order]
        for name, milliseconds in pending:
            value = milliseconds()
            if turn:
                samples[name].append(value)
    return {name: timing_of(values, 1) for name, values in samples.items()}


def empty_graph(device: str) -> Graph:
    """A graph of one kernel that writes four bytes: what a replay costs at least."""
    word = torch.zeros(1, dtype=torch.int32, device=device)
    return capture(lambda: word.zero_())
