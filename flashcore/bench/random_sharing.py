"""Never slower than with sharing ignored: random batches, both plans on the same kernel."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from flashcore.bench.graphs import time_graphs
from flashcore.bench.paged import Machine
from flashcore.bench.paged_problems import DTYPE, Batch, PagedInputs, PagedProblem, unique_tokens
from flashcore.bench.paged_providers import our_call, plan_of

_MOST_TOKENS = 1 << 18  # of a batch, read once per sequence: 1 GiB
_LONGEST = 16384


@dataclass(frozen=True)
class RandomBatch:
    """`fan_out` sequences with `shared_pages` common pages and own lengths from there on."""

    fan_out: int
    shared_pages: int
    lengths: tuple[int, ...]
    page_tokens: int

    def __str__(self) -> str:
        return (
            f"{self.fan_out} sequences of {min(self.lengths)} to {max(self.lengths)} tokens, "
            f"{self.shared_pages} pages of {self.page_tokens} shared"
        )


def random_batches(count: int, seed: int = 0, page_tokens: int = 128) -> list[RandomBatch]:
    """Fan-out 1 to 256 and shared length 1 page to all, both spread evenly over the logarithm;
    the first four are the corners."""
    rng = torch.Generator().manual_seed(seed)
    batches = []
    for number in range(count):
        u, v, w = torch.rand(3, generator=rng).tolist()
        corner = (number & 1, number >> 1) if number < 4 else None
        u, v = corner if corner else (u, v)
        fan_out = round(256**u)
        longest = min(_LONGEST, _MOST_TOKENS // fan_out) // page_tokens
        pages = max(1, round(longest ** (0.4 + 0.6 * w)))
        shared = max(1, round(pages**v))
        own = (pages - shared) * page_tokens
        spread = torch.randint(own // 2, own + 1, (fan_out,), generator=rng)
        lengths = tuple((shared * page_tokens + spread).tolist())
        batches.append(RandomBatch(fan_out, shared, lengths, page_tokens))
    return batches


def run_random(
    count: int,
    machine: Machine,
    *,
    rounds: int,
    seed: int = 0,
    on_batch: Callable[[int], None] = lambda number: None,
) -> dict[str, Any]:
    """Time of our kernel with the plan over its time with the plan that ignores sharing."""
    batches = random_batches(count, seed)
    pool = _pool(machine.device, batches)
    ratios: list[tuple[float, RandomBatch, float]] = []
    for number, batch in enumerate(batches):
        on_batch(number)
        problem, inputs = _inputs(batch, pool, number)
        graphs = {
            str(share): machine.capture(our_call(inputs, plan_of(problem, inputs, share=share)))
            for share in (True, False)
        }
        timings = time_graphs(graphs, rounds=rounds, start=machine.start)
        shared, ignored = timings["True"].median_ms, timings["False"].median_ms
        ratios.append((shared / ignored, batch, shared))
    values = [ratio for ratio, _, _ in ratios]
    worst = max(ratios, key=lambda entry: entry[0])
    return {
        "batches": count,
        "rounds": rounds,
        "seed": seed,
        "median": statistics.median(values),
        "geometric_mean": math.exp(statistics.fmean(math.log(value) for value in values)),
        "worst": worst[0],
        "worst_batch": f"{worst[1]}, {worst[2] * 1e3:.1f} us",
        "above_1": sum(value > 1.0 for value in values),
        "above_1_05": sum(value > 1.05 for value in values),
        "ratios": [
            {
                "fan_out": batch.fan_out,
                "shared_pages": batch.shared_pages,
                "tokens": sum(batch.lengths),
                "ms": ms,
                "ratio": ratio,
            }
            for ratio, batch, ms in ratios
        ],
    }


def _pool(device: str, batches: list[RandomBatch]) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V that serve every batch; each takes random pages of it."""
    pages = max(_distinct_pages(batch) for batch in batches)
    shape = (pages, batches[0].page_tokens, 8, 128)
    rng = torch.Generator(device).manual_seed(0)
    k, v = (torch.empty(shape, dtype=DTYPE, device=device).normal_(generator=rng) for _ in "kv")
    return k, v


def _distinct_pages(batch: RandomBatch) -> int:
    own = (-(-length // batch.page_tokens) - batch.shared_pages for length in batch.lengths)
    return batch.shared_pages + sum(own)


def _inputs(
    batch: RandomBatch, pool: tuple[torch.Tensor, torch.Tensor], seed: int
) -> tuple[PagedProblem, PagedInputs]:
    k_pages, v_pages = pool
    rng = torch.Generator().manual_seed(seed)
    ids = torch.randperm(k_pages.shape[0], generator=rng).int()
    widths = [-(-length // batch.page_tokens) for length in batch.lengths]
    table = torch.zeros(batch.fan_out, max(widths), dtype=torch.int32)
    at = batch.shared_pages
    for row, width in zip(table, widths, strict=True):
        own = width - batch.shared_pages
        row[: batch.shared_pages] = ids[: batch.shared_pages]
        row[batch.shared_pages : width] = ids[at : at + own]
        at += own
    lens = torch.tensor(batch.lengths, dtype=torch.int32)
    problem = PagedProblem(str(batch), batch.fan_out, max(batch.lengths))
    distinct = unique_tokens(table, lens, batch.page_tokens)
    q = torch.randn(batch.fan_out, problem.q_heads, problem.head_dim, generator=rng)
    device = k_pages.device
    inputs = PagedInputs(
        Batch(table, lens, k_pages.shape[0], distinct, []),
        table.to(device),
        lens.to(device),
        q.to(device, DTYPE),
        k_pages,
        v_pages,
    )
    return problem, inputs
