"""Random batches with hostile contents, shared by tests and benchmarks of the torch path.

Whatever no sequence may read is poisoned: NaN in every cache row past a sequence's end and in every
page that nobody uses, absurd ids in unused slots of the page table.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from unittest import mock

import numpy as np
import torch
from hypothesis import strategies as st

import flashcore
from flashcore.planner import folding, split

ABSURD_PAGE = 2_147_480_000


@contextmanager
def small_scale() -> Iterator[None]:
    """Plans in which small batches have splits, and shared groups that are kept."""
    with (
        mock.patch.multiple(split, MIN_SPLIT_TOKENS=2, TILE_TOKENS=1),
        mock.patch.multiple(folding, PARTIAL_COST=folding.L2_COST, LEAST_GAIN=0),
    ):
        yield


@dataclass
class Batch:
    """One batch as a serving engine would hand it over."""

    page_table: torch.Tensor  # [batch, max_pages] int32
    kv_lens: list[int]
    q_lens: list[int]
    page_tokens: int
    num_pages: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    seed: int = 0
    ragged: bool = False  # pages in the middle of a sequence may be partial, as in a token map
    v_head_dim: int | None = None  # of head_dim where None
    layout: flashcore.Layout = field(init=False)

    def __post_init__(self) -> None:
        if self.ragged:
            self._lay_out_by_tokens()
        else:
            self.layout = flashcore.layout_from_page_table(
                self.page_table,
                torch.tensor(self.kv_lens, dtype=torch.int32),
                page_tokens=self.page_tokens,
                num_pages=self.num_pages,
            )
        # New tokens are among the KV tokens; a sequence without any may still have queries.
        lengths = zip(self.q_lens, self.kv_lens, strict=True)
        self.q_lens = [min(q, kv) if kv else q for q, kv in lengths]

    def _lay_out_by_tokens(self) -> None:
        """Give each page a random number of its tokens; equal (page, tokens) stay common."""
        rng = np.random.default_rng(self.seed)
        usual = rng.integers(1, self.page_tokens + 1, self.num_pages)
        rows = []
        for row, length in enumerate(self.kv_lens):
            pages = self.page_table[row, : -(-length // self.page_tokens)].tolist()
            full = [self.page_tokens if rng.random() < 0.6 else int(usual[p]) for p in pages]
            rows.append([p for p, n in zip(pages, full, strict=True) for _ in range(n)])
        self.kv_lens = [len(row) for row in rows]
        ends = torch.tensor([0, *self.kv_lens]).cumsum(0)
        self.layout = flashcore.build_layout(
            torch.tensor([p for row in rows for p in row], dtype=torch.int32),
            ends[:-1],
            ends[1:],
            page_tokens=self.page_tokens,
            num_pages=self.num_pages,
        )

    def plan(self, **options: object) -> flashcore.Plan:
        """A plan as in `small_scale`."""
        with small_scale():
            return self._plan(**options)

    def _plan(self, **options: object) -> flashcore.Plan:
        return flashcore.plan(
            self.layout,
            q_lens=self.q_lens,
            num_q_heads=self.num_q_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            v_head_dim=self.v_head_dim,
            page_tokens=self.page_tokens,
            **options,
        )

    def tensors(self, dtype: torch.dtype = torch.float32, poison: bool = True):
        """q, k_pages, v_pages; NaN wherever no sequence has a token."""
        rng = torch.Generator().manual_seed(self.seed)
        pool = (self.num_pages, self.page_tokens, self.num_kv_heads)
        k = torch.randn(*pool, self.head_dim, generator=rng)
        v = torch.randn(*pool, self.v_head_dim or self.head_dim, generator=rng)
        q = torch.randn(sum(self.q_lens), self.num_q_heads, self.head_dim, generator=rng)
        if poison:
            held = torch.zeros(self.num_pages, dtype=torch.long)
            cols, counts = self.layout.cols.long(), self.layout.token_counts.long()
            held.scatter_reduce_(0, cols, counts, "amax")
            dead = torch.arange(self.page_tokens) >= held[:, None]
            k[dead], v[dead] = float("nan"), float("nan")
        return q.to(dtype), k.to(dtype), v.to(dtype)

    def tree_mask(self) -> torch.Tensor:
        """Random ancestors among a sequence's new tokens; each token sees itself."""
        rng = torch.Generator().manual_seed(self.seed + 1)
        width = max(self.q_lens, default=0) + 1
        mask = torch.rand(sum(self.q_lens), width, generator=rng) < 0.5
        own = torch.cat(
            [torch.arange(n) for n in self.q_lens] or [torch.zeros(0, dtype=torch.long)]
        )
        mask[torch.arange(len(own)), own] = True
        return mask


def picked(batch: Batch, rows: list[int]) -> Batch:
    """A batch of these sequences of it, in this order and as often as they are named."""
    chosen = replace(batch, page_table=batch.page_table[:0], kv_lens=[], q_lens=[])
    chosen.kv_lens = [batch.kv_lens[row] for row in rows]
    chosen.q_lens = [batch.q_lens[row] for row in rows]
    ends = batch.layout.row_offsets.tolist()
    entries = torch.tensor([e for row in rows for e in range(ends[row], ends[row + 1])]).long()
    sizes = torch.tensor([0, *(ends[row + 1] - ends[row] for row in rows)])
    cols = batch.layout.cols[entries]
    chosen.layout = flashcore.Layout(
        row_offsets=sizes.cumsum(0).int(),
        cols=cols,
        token_counts=batch.layout.token_counts[entries],
        staging_ids=cols[:0],
        page_tokens=batch.page_tokens,
    )
    return chosen


def hide_unused(table: np.ndarray, kv_lens: list[int], page_tokens: int) -> None:
    """Put ids that no pool has past the last page of each sequence."""
    for row, length in enumerate(kv_lens):
        table[row, -(-length // page_tokens) :] = ABSURD_PAGE


def prefix_tree(
    rng: np.random.Generator, batch: int, columns: int, num_pages: int, full_pages: list[int]
) -> np.ndarray:
    """Rows that copy a stretch of an earlier row, in front or in the middle, and go on alone."""
    table = np.empty((batch, columns), dtype=np.int64)
    for row in range(batch):
        table[row] = rng.integers(0, num_pages, columns)
        if row and rng.random() < 0.8:
            source = int(rng.integers(0, row))
            length = int(rng.integers(0, full_pages[source] + 1))
            begin = 0 if rng.random() < 0.7 else int(rng.integers(0, length + 1))
            shift = 0 if rng.random() < 0.8 else int(rng.integers(0, 3))
            to = min(columns, begin + shift + length - begin)
            table[row, begin + shift : to] = table[source, begin : to - shift]
            if rng.random() < 0.1:
                table[row] = table[source]
    return table


@st.composite
def batches(draw: st.DrawFn, max_batch: int = 6, ragged: bool | None = None) -> Batch:
    """Batches over few pages, so that accidental sharing, repeats and partial pages are common."""
    seed = draw(st.integers(0, 2**31 - 1))
    rng = np.random.default_rng(seed)
    batch = draw(st.integers(0, max_batch))
    page_tokens = draw(st.sampled_from([1, 2, 4, 16]))
    # Few pages: rows collide and repeat pages. Many: sharing is only what the tree makes.
    num_pages = draw(st.sampled_from([3, 12, 400]))
    columns = draw(st.integers(1, 9))
    kv_lens = [int(rng.integers(0, columns * page_tokens + 1)) for _ in range(batch)]
    table = prefix_tree(rng, batch, columns, num_pages, [n // page_tokens for n in kv_lens])
    for row, length in enumerate(kv_lens):
        table[row, -(-length // page_tokens) :] = ABSURD_PAGE * (1 if rng.random() < 0.5 else -1)
    longest = draw(st.sampled_from([1, 2, 5]))
    q_lens = [int(rng.integers(0, longest + 1)) for _ in range(batch)]
    heads = draw(st.sampled_from([(1, 1), (4, 4), (6, 2), (5, 1), (8, 2)]))
    return Batch(
        torch.from_numpy(table).reshape(batch, columns).int(),
        kv_lens,
        q_lens,
        page_tokens,
        num_pages,
        *heads,
        head_dim=draw(st.sampled_from([3, 8, 16])),
        v_head_dim=draw(st.sampled_from([None, None, 2])),
        seed=seed,
        ragged=draw(st.booleans()) if ragged is None else ragged,
    )
