"""A decode batch with a shared prefix, and the ways of computing it that are compared."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import flashcore
from flashcore.reference import paged_attention_reference

Attention = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Problem:
    """`sequences` of `tokens` KV tokens each; `shared` of all tokens need no reading of their own.

    shared = 0.7 means that the distinct tokens are 0.3 of all. The prefix is whole pages; page ids
    are a random permutation of the pool, as in a cache that has been in use.
    """

    sequences: int = 8
    tokens: int = 8192
    shared: float = 0.7
    num_q_heads: int = 8
    num_kv_heads: int = 2
    head_dim: int = 64
    page_tokens: int = 128
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    seed: int = 0

    def __post_init__(self) -> None:
        most = 1 - 1 / self.sequences
        if not 0 <= self.shared <= most:
            raise ValueError(
                f"shared must be at least 0 and at most 1 - 1 / sequences = {most:.3f}, "
                f"got {self.shared}"
            )

    @property
    def prefix_pages(self) -> int:
        """Pages of the common prefix that make `shared` of all tokens repeats of another's."""
        if self.sequences == 1:
            return 0
        pages = self.shared * self.sequences / (self.sequences - 1) * self.tokens / self.page_tokens
        return min(round(pages), self.tokens // self.page_tokens)


@dataclass(frozen=True)
class Instance:
    """Tensors of a problem; q [sequences, num_q_heads, head_dim], pools as in `paged_attention`."""

    problem: Problem
    page_table: torch.Tensor
    layout: flashcore.Layout
    q: torch.Tensor
    k_pages: torch.Tensor
    v_pages: torch.Tensor

    def plan(self, share: bool = True) -> flashcore.Plan:
        p = self.problem
        return flashcore.plan(
            self.layout,
            num_q_heads=p.num_q_heads,
            num_kv_heads=p.num_kv_heads,
            head_dim=p.head_dim,
            page_tokens=p.page_tokens,
            itemsize=p.dtype.itemsize,
            share=share,
        )

    def deduplicated(self) -> Attention:
        """flashcore, each shared page read once; the plan is made before, once for all layers."""
        plan = self.plan()
        return lambda: flashcore.paged_attention(self.q, self.k_pages, self.v_pages, plan)

    def per_sequence(self) -> Attention:
        """torch's scaled_dot_product_attention called per sequence on gathered K and V.

        The query heads of a KV head are passed as query rows, which for one query token means the
        same and is faster on a CPU than `enable_gqa` (which copies K and V for every query head).
        """
        p = self.problem
        pages = self.page_table.long()
        group = p.num_q_heads // p.num_kv_heads

        def run() -> torch.Tensor:
            out = torch.empty_like(self.q)
            for row, ids in enumerate(pages):
                keys, values = (
                    pool[ids].flatten(0, 1)[: p.tokens].transpose(0, 1)[None]
                    for pool in (self.k_pages, self.v_pages)
                )
                rows = self.q[row].view(1, p.num_kv_heads, group, p.head_dim)
                out[row] = F.scaled_dot_product_attention(rows, keys, values).view(out[row].shape)
            return out

        return run

    def reference(self) -> torch.Tensor:
        """float64, from the specification."""
        p = self.problem
        return paged_attention_reference(
            self.q, self.k_pages, self.v_pages, self.layout, [1] * p.sequences
        )[0]


def make(problem: Problem) -> Instance:
    """Random tensors for a problem; the same for the same seed."""
    p = problem
    rng = torch.Generator().manual_seed(p.seed)
    columns = -(-p.tokens // p.page_tokens)
    num_pages = p.prefix_pages + p.sequences * (columns - p.prefix_pages)
    ids = torch.randperm(num_pages, generator=rng)
    table = torch.empty(p.sequences, columns, dtype=torch.long)
    table[:, : p.prefix_pages] = ids[: p.prefix_pages]
    table[:, p.prefix_pages :] = ids[p.prefix_pages :].view(p.sequences, -1)
    pool = (num_pages, p.page_tokens, p.num_kv_heads, p.head_dim)
    q = torch.randn(p.sequences, p.num_q_heads, p.head_dim, generator=rng)
    k, v = torch.randn(pool, generator=rng), torch.randn(pool, generator=rng)
    table = table.int().to(p.device)
    lens = torch.full((p.sequences,), p.tokens, dtype=torch.int32, device=p.device)
    layout = flashcore.layout_from_page_table(table, lens, page_tokens=p.page_tokens)
    tensors = (x.to(p.device, p.dtype) for x in (q, k, v))
    return Instance(p, table, layout, *tensors)


def interleaved_ms(
    functions: dict[str, Callable[[], object]], rounds: int, device: str = "cpu"
) -> dict[str, float]:
    """Median wall milliseconds of each function; every round runs each once, after one warm-up."""

    def wait() -> None:
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)

    times: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(rounds + 1):
        for name, function in functions.items():
            wait()
            begin = time.perf_counter()
            function()
            wait()
            if turn:
                times[name].append((time.perf_counter() - begin) * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}
