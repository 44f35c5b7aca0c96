"""The workloads of the paged benchmark: page tables over prefix trees, and the bytes each is.

Page ids are a random permutation of the pool, as in a cache that has been in use.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

DTYPE = torch.bfloat16


@dataclass(frozen=True)
class PagedProblem:
    """`sequences` of `tokens` KV tokens, the first `prefix_tokens` of them common to all of one of
    `groups` equal groups; or, with `tree`, of random lengths from 1 to `tokens` along a prefix
    tree."""

    name: str  # as it is chosen on the command line
    sequences: int
    tokens: int
    prefix_tokens: int = 0  # whole pages
    tree: Tree | None = None
    q_heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    page_tokens: int = 128
    q_len: int = 1  # query tokens of each sequence, its last ones
    kv_dtype: torch.dtype = DTYPE  # of the pages
    groups: int = 1  # neighbours; a divisor of `sequences`

    @property
    def total_q(self) -> int:
        return self.sequences * self.q_len

    @property
    def token_bytes(self) -> int:
        """K and V of one token in one layer."""
        return 2 * self.kv_heads * self.head_dim * self.kv_dtype.itemsize

    def flops(self, seq_lens: torch.Tensor) -> float:
        """Multiplications and additions of both matrix products, causal on the new tokens."""
        pairs = self.q_len * int(seq_lens.long().sum())
        pairs -= self.sequences * self.q_len * (self.q_len - 1) // 2
        return 4.0 * pairs * self.q_heads * self.head_dim


@dataclass(frozen=True)
class Tree:
    """Three levels: a root run, one of `branches` runs, then the sequence's own tokens."""

    root_tokens: int
    branches: int
    branch_tokens: int


class Level(NamedTuple):
    """One level of the tree in the form FlashInfer's cascade takes it.

    Request r has the query tokens q_offsets[r] .. q_offsets[r + 1], the page ids
    pages[page_offsets[r]] .. pages[page_offsets[r + 1]], and last_page_tokens[r] tokens in the last
    of them (0: no page). All int32 on the CPU.
    """

    q_offsets: torch.Tensor
    page_offsets: torch.Tensor
    pages: torch.Tensor
    last_page_tokens: torch.Tensor


class Batch(NamedTuple):
    """Of one problem, int32 on the CPU. Page ids past a sequence's last page are 0.

    page_table: [sequences, max_pages]. seq_lens: [sequences]. unique_tokens: in distinct pages.
    levels: what a cascade has to be told; empty where nothing is shared.
    """

    page_table: torch.Tensor
    seq_lens: torch.Tensor
    num_pages: int
    unique_tokens: int
    levels: list[Level]

    @property
    def reuse(self) -> float:
        """The share of all tokens that need no reading of their own."""
        return 1.0 - self.unique_tokens / int(self.seq_lens.long().sum())


def paged_problems() -> list[PagedProblem]:
    """Eleven decode workloads (one of them with four page sizes) and one of prefill."""
    return [
        _decode("8x131072-70", 8, 131072, 0.7),
        _decode("8x65536-70-mha", 8, 65536, 0.7, kv_heads=32),
        _decode("16x32768-50", 16, 32768, 0.5),
        _decode("32x8192-30", 32, 8192, 0.3),
        _decode("32x8192-70", 32, 8192, 0.7),
        _decode("64x8192-90", 64, 8192, 0.9),
        _decode("256x4096-90", 256, 4096, 0.9),
        *(
            _decode(f"32x8192-0-page{tokens}", 32, 8192, 0.0, page_tokens=tokens)
            for tokens in (128, 64, 16, 1)
        ),
        _decode("64x2048-0-64heads", 64, 2048, 0.0, q_heads=64),
        _decode("1x131072-0", 1, 131072, 0.0),
        PagedProblem("ragged-tree", 128, 32768, tree=Tree(4096, 8, 8192)),
        PagedProblem("prefill-16x2048", 16, 32768 + 2048, prefix_tokens=32768, q_len=2048),
    ]


def _decode(
    name: str,
    sequences: int,
    tokens: int,
    share: float,
    *,
    q_heads: int = 32,
    kv_heads: int = 8,
    page_tokens: int = 128,
) -> PagedProblem:
    """Decode with `share` of all tokens repeats of another sequence's, to the nearest page."""
    prefix = 0
    if share:
        pages = share * sequences / (sequences - 1) * tokens / page_tokens
        prefix = min(round(pages) * page_tokens, tokens)
    return PagedProblem(
        name,
        sequences,
        tokens,
        prefix,
        q_heads=q_heads,
        kv_heads=kv_heads,
        page_tokens=page_tokens,
    )


def make_batch(problem: PagedProblem, seed: int = 0) -> Batch:
    """Page table and lengths of a problem; the same for the same seed."""
    rng = torch.Generator().manual_seed(seed)
    if problem.tree is not None:
        return _tree_batch(problem, problem.tree, rng)
    lens = torch.full((problem.sequences,), problem.tokens, dtype=torch.int32)
    shared = [problem.prefix_tokens // problem.page_tokens] * problem.sequences
    node = [row * problem.groups // problem.sequences for row in range(problem.sequences)]
    runs = [
        [(f"prefix {one}", pages)] if pages else [] for one, pages in zip(node, shared, strict=True)
    ]
    table, num_pages = _page_table(runs, lens, problem.page_tokens, rng)
    levels = []
    if shared[0]:
        levels = _levels(problem, table, lens, [shared], [node])
    return Batch(table, lens, num_pages, unique_tokens(table, lens, problem.page_tokens), levels)


def _tree_batch(problem: PagedProblem, tree: Tree, rng: torch.Generator) -> Batch:
    """Sequences end anywhere in the tree; their last page is their own unless it is full.

    Rows are ordered so that the members of a node are neighbours, as a cascade needs it: by
    branch, the longer first, and those that end in the root last.
    """
    page = problem.page_tokens
    drawn = torch.randint(1, problem.tokens + 1, (problem.sequences,), generator=rng).tolist()
    drawn[0], drawn[-1] = 1, problem.tokens
    members = [(length, number % tree.branches) for number, length in enumerate(drawn)]
    members.sort(key=lambda m: (m[0] < tree.root_tokens, m[1], -m[0]))
    root_pages, branch_pages = tree.root_tokens // page, tree.branch_tokens // page
    runs, in_root, in_branch = [], [], []
    for length, branch in members:
        full = length // page
        root = min(full, root_pages)
        beyond = max(0, min(full - root_pages, branch_pages))
        runs.append([("root", root), (f"branch {branch}", beyond)])
        # A cascade has whole nodes only: who ends inside one reads its pages as its own.
        in_root.append(root_pages if root == root_pages else 0)
        in_branch.append(branch_pages if beyond == branch_pages else 0)
    lens = torch.tensor([length for length, _ in members], dtype=torch.int32)
    table, num_pages = _page_table(runs, lens, page, rng)
    node = [branch for _, branch in members]
    levels = _levels(problem, table, lens, [in_root, in_branch], [[0] * len(members), node])
    return Batch(table, lens, num_pages, unique_tokens(table, lens, page), levels)


def _page_table(
    runs: list[list[tuple[str, int]]], lens: torch.Tensor, page_tokens: int, rng: torch.Generator
) -> tuple[torch.Tensor, int]:
    """Table of rows that begin with so many pages of named nodes; the rest of a row is its own."""
    nodes: dict[str, int] = {}
    for row in runs:
        for name, pages in row:
            nodes[name] = max(nodes.get(name, 0), pages)
    first, count = {}, 0
    for name, pages in nodes.items():
        first[name], count = count, count + pages
    columns = ((lens.long() + page_tokens - 1) // page_tokens).tolist()
    table = torch.zeros(len(columns), max(columns), dtype=torch.long)
    used = torch.zeros_like(table, dtype=torch.bool)
    for number, (row, width) in enumerate(zip(runs, columns, strict=True)):
        at = 0
        for name, pages in row:
            table[number, at : at + pages] = torch.arange(first[name], first[name] + pages)
            at += pages
        table[number, at:width] = torch.arange(count, count + width - at)
        count += width - at
        used[number, :width] = True
    ids = torch.randperm(count, generator=rng)
    return torch.where(used, ids[table], 0).int(), count


def unique_tokens(page_table: torch.Tensor, seq_lens: torch.Tensor, page_tokens: int) -> int:
    """Tokens in distinct pages: of each page as many as the sequence that reads most of it."""
    columns = torch.arange(page_table.shape[1])
    counts = (seq_lens.long()[:, None] - columns * page_tokens).clamp(0, page_tokens)
    most = torch.zeros(int(page_table.max()) + 1, dtype=torch.long)
    most.scatter_reduce_(0, page_table.long().flatten(), counts.flatten(), "amax")
    return int(most.sum())


def _levels(
    problem: PagedProblem,
    table: torch.Tensor,
    lens: torch.Tensor,
    pages_of: list[list[int]],
    nodes: list[list[int]],
) -> list[Level]:
    """A level for each of `pages_of` ([level][row], 0: the row is not of a node) and one of the
    rows' own pages. Neighbouring rows of one node, or of none, are one request."""
    page = problem.page_tokens
    begin = [0] * problem.sequences
    levels = []
    for pages, node in zip(pages_of, nodes, strict=True):
        keys = [(count, where if count else -1) for count, where in zip(pages, node, strict=True)]
        starts = [r for r, key in enumerate(keys) if r == 0 or key != keys[r - 1]]
        requests = [(r, table[r, begin[r] : begin[r] + pages[r]], page) for r in starts]
        levels.append(_level(problem, requests))
        begin = [b + p for b, p in zip(begin, pages, strict=True)]
    own = []
    for row, length in enumerate(lens.tolist()):
        width = -(-length // page)
        own.append((row, table[row, begin[row] : width], length - (width - 1) * page))
    return [*levels, _level(problem, own)]


def _level(problem: PagedProblem, requests: list[tuple[int, torch.Tensor, int]]) -> Level:
    """Of requests (first row, page ids, tokens of the last page)."""
    rows = [row for row, _, _ in requests] + [problem.sequences]
    counts = torch.tensor([0] + [pages.numel() for _, pages, _ in requests])
    last = [tokens if pages.numel() else 0 for _, pages, tokens in requests]
    return Level(
        torch.tensor(rows, dtype=torch.int32) * problem.q_len,
        counts.cumsum(0).int(),
        torch.cat([pages for _, pages, _ in requests]).int(),
        torch.tensor(last, dtype=torch.int32),
    )


@dataclass(frozen=True)
class PagedInputs:
    """A batch on a device with random q [total_q, q_heads, head_dim] and pools [num_pages,
    page_tokens, kv_heads, head_dim]."""

    batch: Batch
    page_table: torch.Tensor
    seq_lens: torch.Tensor
    q: torch.Tensor
    k_pages: torch.Tensor
    v_pages: torch.Tensor

    @property
    def device(self) -> torch.device:
        return self.q.device

    def widened(self) -> PagedInputs:
        """With pages of 16 bits that hold the same."""
        pools = (pool.to(DTYPE) for pool in (self.k_pages, self.v_pages))
        return PagedInputs(self.batch, self.page_table, self.seq_lens, self.q, *pools)


def make_inputs(problem: PagedProblem, device: str, seed: int = 0) -> PagedInputs:
    """Normal values: zeros or constants would draw less power and so run at higher clocks."""
    batch = make_batch(problem, seed)
    rng = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=DTYPE, device=device).normal_(generator=rng)

    pool = (batch.num_pages, problem.page_tokens, problem.kv_heads, problem.head_dim)
    return PagedInputs(
        batch,
        batch.page_table.to(device),
        batch.seq_lens.to(device),
        normal(problem.total_q, problem.q_heads, problem.head_dim),
        normal(*pool).to(problem.kv_dtype),
        normal(*pool).to(problem.kv_dtype),
    )
