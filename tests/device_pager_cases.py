"""Token maps, page tables and bitmaps for the pager on the device, and what it must equal."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

import flashcore
from flashcore.sm90.device_pager import DevicePager
from tests.cases import ABSURD_PAGE, small_scale


@dataclass
class TokenMap:
    """A map with hostile ids outside all ranges, which may overlap and be empty."""

    pages: torch.Tensor
    starts: torch.Tensor
    ends: torch.Tensor
    page_tokens: int
    num_pages: int

    def new_tokens(self, seed: int, least: int = 0) -> torch.Tensor:
        """Query tokens of each sequence, up to 3: among its KV tokens, if it has any."""
        q_lens = torch.from_numpy(np.random.default_rng(seed).integers(least, 4, len(self.starts)))
        lengths = self.ends - self.starts
        return torch.where(lengths > 0, torch.minimum(q_lens, lengths), q_lens).int()


def token_map(seed: int, most_rows: int = 9, most_tokens: int = 300) -> TokenMap:
    """Runs of few pages, some longer than a page, pages that return, shared and nested ranges."""
    rng = np.random.default_rng(seed)
    page_tokens = int(rng.choice([1, 3, 16]))
    num_pages = int(rng.choice([2, 9, 200]))
    total = int(rng.integers(0, most_tokens + 1))
    longest = int(rng.choice([1, page_tokens + 1, 4 * page_tokens]))
    pages: list[int] = []
    while len(pages) < total:
        pages += [int(rng.integers(0, num_pages))] * int(rng.integers(1, longest + 1))
    rows = int(rng.integers(0, most_rows + 1))
    cuts = np.sort(rng.integers(0, total + 1, (rows, 2)), axis=1)
    if rng.random() < 0.5:  # most begin at one place
        cuts[rng.random(rows) < 0.7, 0] = 0
    inside = np.zeros(total, dtype=bool)
    for begin, end in cuts:
        inside[begin:end] = True
    values = np.where(inside, np.array(pages[:total], dtype=np.int64), ABSURD_PAGE)
    starts, ends = (torch.from_numpy(cuts[:, i].copy()).int() for i in (0, 1))
    return TokenMap(torch.from_numpy(values).int(), starts, ends, page_tokens, num_pages)


def bitmap(kind: str, num_pages: int, seed: int) -> torch.Tensor | None:
    """Random resident pages; the sign bit of a word is a page like any other."""
    rng = torch.Generator().manual_seed(seed)
    if kind == "none":
        return None
    if kind == "words":
        words = torch.randint(-(2**31), 2**31, (-(-num_pages // 32),), generator=rng)
        return words.int()
    resident = torch.rand(num_pages, generator=rng) < 0.5
    return resident if kind == "bool" else resident.to(torch.uint8) * 7


KINDS = ("none", "bool", "uint8", "words")


def pager_for(
    num_pages: int,
    page_tokens: int,
    device: str,
    max_batch: int = 9,
    max_entries: int = 2700,
    max_tokens: int = 300,
) -> DevicePager:
    return DevicePager(
        max_batch=max_batch,
        max_entries=max_entries,
        max_tokens=max_tokens,
        num_pages=num_pages,
        page_tokens=page_tokens,
        device=device,
    )


def assert_same_layout(pager: DevicePager, expected: flashcore.Layout) -> None:
    """Every element; besides, where in its sequence each entry begins."""
    found = pager.layout.trimmed()
    assert found.page_tokens == expected.page_tokens
    for name, a, b in zip(flashcore.Layout._fields[:-1], found[:-1], expected[:-1], strict=True):
        assert a.dtype == b.dtype == torch.int32
        assert a.tolist() == b.tolist(), name
    nnz = expected.cols.numel()
    counts, rows = expected.token_counts, torch.repeat_interleave(expected.row_offsets.diff())
    before = counts.cumsum(0) - counts
    starts = before - before[expected.row_offsets[rows].long()]
    assert pager.layout.starts[:nnz].tolist() == starts.tolist()
    assert pager.layout.rows[:nnz].tolist() == rows.tolist()
    lens = torch.zeros(len(expected.row_offsets) - 1, dtype=torch.long)
    lens.index_add_(0, rows.long(), counts.long())
    assert pager.layout.kv_lens[: len(lens)].tolist() == lens.tolist()
    assert not pager.layout.faults()


HEADS = {"num_q_heads": 4, "num_kv_heads": 2, "head_dim": 64}


def planner_of(
    m: TokenMap, workers: int, device: str = "cpu", max_partials: int = 20_000
) -> flashcore.DevicePlanner:
    """A planner for a map."""
    with small_scale():
        return flashcore.DevicePlanner(
            flashcore.Capacities(9, 2700, 64, 20_000, max_partials),
            num_pages=m.num_pages,
            page_tokens=m.page_tokens,
            num_workers=workers,
            device=device,
            **HEADS,
        )


def host_plan(
    m: TokenMap, q_lens: torch.Tensor, workers: int, share: bool = True
) -> flashcore.Plan:
    """What it must make."""
    layout = flashcore.build_layout(
        m.pages, m.starts, m.ends, page_tokens=m.page_tokens, num_pages=m.num_pages
    )
    with small_scale():
        return flashcore.plan(
            layout,
            q_lens=q_lens,
            page_tokens=m.page_tokens,
            num_workers=workers,
            tile_m=64,
            share=share,
            **HEADS,
        )
