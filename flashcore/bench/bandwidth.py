"""How fast this GPU streams from DRAM: the denominator of every bound.

Two rates of one run: that of `torch.sum`, a library's plain streaming read, by which bounds are
stated here and elsewhere, and that of the fastest read found, which says what is left above it.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import torch

from flashcore.bench.graphs import Flusher, capture, start_sample, time_graphs

TORCH_SUM = "torch.sum of bf16"
"""The plain read of a library, which bounds are stated by; not the fastest."""

_BYTES = 4 << 30  # eighty times the L2


def read_bandwidth(device: str, rounds: int = 30) -> dict[str, float]:
    """Bytes per second of each way to read 4 GiB once, nothing of them in L2, by name, medians."""
    words = torch.empty(_BYTES // 4, dtype=torch.int32, device=device).random_()
    words.bitwise_and_(0x3FFF3FFF)  # as bf16 and fp32 small positive numbers
    ways: dict[str, Callable[[], torch.Tensor]] = {
        TORCH_SUM: lambda: words.view(torch.bfloat16).sum(),
        "torch.sum of fp32": lambda: words.view(torch.float32).sum(),
        "torch.amax of int32": lambda: words.amax(),
    }
    if find_spec("triton") is not None:
        from flashcore.bench.streaming_read import SHAPES, reader

        for shape in SHAPES:
            programs, block, _ = shape
            ways[f"Triton, {programs} programs of {block} words"] = reader(words, shape)
    graphs = {name: capture(way) for name, way in ways.items()}
    flush = Flusher(device)
    timings = time_graphs(graphs, rounds=rounds, start=lambda graph: start_sample(graph, flush))
    return {name: _BYTES / (timing.median_ms * 1e-3) for name, timing in timings.items()}
