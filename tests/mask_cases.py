"""Draft trees, what decoding each of their paths step by step gives, values that are not finite at
the edges of windows, and vectors in any strides."""

from __future__ import annotations

import numpy as np
import torch

from tests import oracle
from tests.cases import Batch


class Drafts:
    """A random tree of the new tokens of each sequence of a batch: its mask and positions."""

    def __init__(self, batch: Batch, seed: int = 0, extra_columns: int = 1):
        rng = np.random.default_rng(seed)
        self.paths: list[list[int]] = []  # of each query token: places in its sequence, root first
        width = max(batch.q_lens, default=0) + extra_columns
        rows, positions = [], []
        for length, n in zip(batch.kv_lens, batch.q_lens, strict=True):
            own: list[list[int]] = []
            for i in range(n):
                above = own[int(rng.integers(0, i))] if i else []
                own.append([*above, i])
            for path in own:
                row = rng.random(width) < 0.5  # columns past the sequence's tokens mean nothing
                row[:n] = [k in path for k in range(n)]
                rows.append(row)
                positions.append(length - n + len(path) - 1)
            self.paths += own
        self.mask = torch.from_numpy(np.array(rows).reshape(-1, width))
        self.positions = torch.tensor(positions, dtype=torch.int32)


def step_by_step(
    batch: Batch,
    drafts: Drafts,
    tensors: tuple[torch.Tensor, ...],
    left: int,
    sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """out and LSE of each draft token as the last of its own path, under a plain window."""
    q, k, v = (x.double() for x in tensors)
    out, lse, first = [], [], 0
    offsets = batch.layout.row_offsets.tolist()
    for row, (length, n) in enumerate(zip(batch.kv_lens, batch.q_lens, strict=True)):
        entries = range(offsets[row], offsets[row + 1])
        found = [(int(batch.layout.cols[e]), int(batch.layout.token_counts[e])) for e in entries]
        keys, values = (torch.cat([x[p, :c] for p, c in found]).numpy() for x in (k, v))
        for path, query in zip(drafts.paths[first : first + n], q[first : first + n], strict=True):
            there = [*range(length - n), *(length - n + i for i in path)]
            one = oracle.attention(
                query[None].numpy(),
                keys[there],
                values[there],
                scale=batch.head_dim**-0.5,
                causal=True,
                window=(left, 0),
                sinks=None if sinks is None else sinks.numpy(),
            )
            out.append(one[0])
            lse.append(one[1])
        first += n
    return torch.from_numpy(np.concatenate(out)), torch.from_numpy(np.concatenate(lse))


def verify_batch(
    page_tokens: int, heads: tuple[int, int], head_dim: int, lengths: list[int], drafts: int
) -> Batch:
    """Sequences on a common prefix of half the longest one, each with so many drafts."""
    columns = -(-max(lengths) // page_tokens)
    table = torch.arange(len(lengths) * columns).view(len(lengths), columns)
    for row, length in enumerate(lengths):
        shared = min(max(lengths) // 2, length - drafts) // page_tokens
        table[row, :shared] = table[0, :shared]
    return Batch(
        table.int(),
        lengths,
        [drafts] * len(lengths),
        page_tokens,
        table.numel(),
        *heads,
        head_dim,
    )


def staggered_batch(
    page_tokens: int, heads: tuple[int, int], head_dim: int, window: int, q_len: int = 1
) -> Batch:
    """Five sequences on common pages, each three tokens beyond the one before it: under a window,
    keys at its edge that some see and others do not. Shared pages end with the shortest."""
    shared = -(-(window + 40) // page_tokens)
    lengths = [shared * page_tokens + 3 * row + q_len for row in range(5)]
    columns = -(-max(lengths) // page_tokens)
    table = torch.arange(5 * columns).view(5, columns)
    table[:, :shared] = table[0, :shared]
    return Batch(
        table.int(), lengths, [q_len] * 5, page_tokens, table.numel(), *heads, head_dim, seed=3
    )


def spoil(batch: Batch, v: torch.Tensor, window: int, seed: int = 0) -> list[int]:
    """NaN and infinities in V where the windows of the batch begin. Returns the tokens hit."""
    rng = np.random.default_rng(seed)
    begins = [length - n - window for length, n in zip(batch.kv_lens, batch.q_lens, strict=True)]
    tokens = sorted({begins[0], begins[1], begins[-1] - 1, begins[2] + 1})
    for token, value in zip(tokens, (torch.nan, torch.inf, -torch.inf, torch.nan), strict=False):
        page, slot = divmod(token, batch.page_tokens)
        page = int(batch.page_table[0, page])
        head, dim = int(rng.integers(0, v.shape[2])), int(rng.integers(0, v.shape[3] - 1))
        v[page, slot, head, dim : dim + 2] = value
    return tokens


def same_with_nan(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """NaN, infinite and finite in the same places."""
    for kind in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(kind(actual), kind(expected)), kind.__name__


def finite_part(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """x with zeros where `like` is not finite."""
    return torch.where(torch.isfinite(like), x, 0)


def strided(x: torch.Tensor) -> list[torch.Tensor]:
    """The same vector as a column, and as 16-bit numbers in a column."""
    column = torch.stack([x, -x], 1)[:, 0]
    return [column, column.bfloat16(), x[:1].expand(len(x)), torch.stack([x, x]).bfloat16().T[:, 0]]
