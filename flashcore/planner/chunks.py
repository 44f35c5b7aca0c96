"""Batch-invariant plans: sequences are cut into chunks by themselves alone, and shared by chunks.

The bits of a result depend on where its KV run is cut, and on how the pieces are put together. So
nothing moves a cut: a sequence falls into chunks of `CHUNK_TOKENS` tokens, counted from its
beginning, whose results are folded from the last to the first with one arithmetic
(`flashcore.reference_fold`). A work item is one chunk of its members, and the merge folds; or, for
a sequence whose own query tokens fill the GPU, it is the whole sequence, and the attention kernel
folds as it goes. Two sequences share a chunk if all of it is the same in both; else each reads its
own, to the same bits.

A page that is not full (a token map may have one anywhere) may only end a run, so it ends its
chunk too, and the count begins again after it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from flashcore.contract.chunks import CHUNK_TOKENS

FEW_QUERIES = 64
"""Query tokens of a sequence up to which it is cut. More fill the GPU without cuts, and a partial
result of each of them for each chunk would need 17 GB for 8192 of them at 131072 tokens (32 heads
of 128)."""

WHOLE_TOKENS = 1 << 30
"""Tokens of a piece that is not cut: longer than any sequence, and no sum of two is too large for
an int32."""


class Chunks(NamedTuple):
    """int64: number: [n] chunk of each entry; first, entries: [chunks] first entry, pages of it."""

    number: torch.Tensor
    first: torch.Tensor
    entries: torch.Tensor


def lengths(page_tokens: int) -> tuple[int, int]:
    """Pages of a chunk, and of a piece that is not cut. ValueError where chunks are not pages."""
    if CHUNK_TOKENS % page_tokens:
        raise ValueError(
            f"page_tokens must divide {CHUNK_TOKENS} for batch_invariant, got {page_tokens}"
        )
    return CHUNK_TOKENS // page_tokens, WHOLE_TOKENS // page_tokens


def chunk_pages(
    q_lens: torch.Tensor, counts: torch.Tensor, row_offsets: torch.Tensor, page_tokens: int
) -> torch.Tensor:
    """Pages of a piece of each sequence.

    counts: tokens of each entry. One with a page before its last that is not full is cut whatever
    its q_len: chunks begin anew there, which the attention kernel does not know of.
    """
    short, whole = lengths(page_tokens)
    row = torch.repeat_interleave(row_offsets.diff().long())
    inside = torch.ones_like(row, dtype=torch.bool)
    inside[:-1] = row[1:] == row[:-1]
    inside[-1:] = False
    broken = torch.zeros_like(q_lens, dtype=torch.bool)
    broken[row[inside & (counts < page_tokens)]] = True
    return torch.where((q_lens > FEW_QUERIES) & ~broken, whole, short)


def cut(
    counts: torch.Tensor, row: torch.Tensor, chunk_pages: torch.Tensor, page_tokens: int
) -> Chunks:
    """Chunks of entries with these token counts and rows."""
    index = torch.arange(row.numel(), device=row.device)
    restart = torch.ones(row.numel(), dtype=torch.bool, device=row.device)
    restart[1:] = (row[1:] != row[:-1]) | (counts[:-1] < page_tokens)
    since = index - torch.where(restart, index, 0).cummax(0).values
    begins = since % chunk_pages[row] == 0
    first = torch.nonzero(begins).flatten()
    entries = torch.diff(first, append=first.new_full((1,), row.numel()))
    return Chunks(torch.cumsum(begins, 0) - 1, first, entries)


def share_chunks(
    owner: torch.Tensor,
    pages: torch.Tensor,
    counts: torch.Tensor,
    row: torch.Tensor,
    chunks: Chunks,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Owner and number of uses of each entry, as `sharing` wants them, equal to whole chunks.

    owner: of each entry, the first one that uses its page. A chunk belongs to the chunk that ends
    with the owner of its last page, if all pages of both are the same; else to itself. That chunk
    ends with a page's owner, so it does belong to itself, and one look is enough.
    """
    if row.numel() == 0:
        return owner, torch.ones_like(owner)
    number, first, entries = chunks
    last = first + entries - 1
    # The result of a sequence's only chunk goes to the output at once, which a member of the same
    # group that has others must not decide.
    row_ends = torch.ones_like(row, dtype=torch.bool)
    row_ends[:-1] = row[1:] != row[:-1]
    alone = row_ends.roll(1)[first] & row_ends[last]

    other = number[owner[last]]
    shared = (last[other] == owner[last]) & (entries[other] == entries) & (alone[other] == alone)
    place = torch.arange(row.numel(), device=row.device) - first[number]
    twin = (first[other][number] + place).clamp(max=row.numel() - 1)
    differs = (pages[twin] != pages) | (counts[twin] != counts)
    shared[number[differs]] = False

    of = torch.where(shared, other, torch.arange(first.numel(), device=row.device))
    uses = torch.bincount(of, minlength=first.numel())
    return first[of][number] + place, uses[of][number]
