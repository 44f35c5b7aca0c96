"""Finds the groups of a batch: maximal runs of consecutive pages used by the same set of sequences.

Exact for any page tables and data-parallel, so that a device kernel can do the same in O(nnz):

1. The owner of a page is the first entry (row-major) that uses it. A page whose entries disagree on
   their token count is shared by nobody: each entry owns itself.
2. Entry e is linked to its successor e + 1 in the row if e's page is full, both pages have the same
   number of uses, and owner(e + 1) = owner(e) + 1. The owner's link holds only if all uses of the
   page are linked. Equal counts and a link from every use make the users of both pages the same.
3. A segment is a maximal linked stretch of one row; segments with the same owner are one group, and
   each of them is a member. A row that uses a run twice is a member twice.

Position plays no part: rows may hold a shared run at different places (each member carries its
    own).

With chunks (`planner.chunks`), owners and uses are those of whole chunks; the rest is the same.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from flashcore.planner import chunks


class Segments(NamedTuple):
    """A partition of all entries into stretches, in row-major order; int64 tensors.

    group: [n] group number; groups are numbered by their owner's entry.
    row: [n] sequence.
    entry, num_entries: [n] stretch of Layout.cols.
    kv_start: [n] tokens of the row before the stretch.
    owner: [num_groups] the segment whose pages stand for the group (its first member).
    """

    group: torch.Tensor
    row: torch.Tensor
    entry: torch.Tensor
    num_entries: torch.Tensor
    kv_start: torch.Tensor
    owner: torch.Tensor


def find_segments(
    cols: torch.Tensor,
    token_counts: torch.Tensor,
    row_offsets: torch.Tensor,
    active: torch.Tensor,
    page_tokens: int,
    chunk_pages: torch.Tensor | None = None,
) -> Segments:
    """Segments of the active rows (bool [batch]); the others neither read nor break runs.

    chunk_pages: [batch] of a chunk of each row, where nothing less may be shared.
    """
    device = cols.device
    row_entries = torch.where(active, row_offsets.diff().long(), 0)
    row = torch.repeat_interleave(row_entries)
    first_of_row = torch.cumsum(row_entries, 0) - row_entries
    # Entries of inactive rows drop out; `entry` leads back to Layout.cols.
    index = torch.arange(row.numel(), device=device)
    entry = row_offsets.long()[row] + index - first_of_row[row]
    pages, counts = cols[entry], token_counts[entry].long()

    owner_of_entry, uses = _owners(pages, counts)
    if chunk_pages is not None:
        cut = chunks.cut(counts, row, chunk_pages, page_tokens)
        owner_of_entry, uses = chunks.share_chunks(owner_of_entry, pages, counts, row, cut)
    start_of_entry = _segment_starts(owner_of_entry, uses, counts, row, page_tokens)
    first = torch.nonzero(start_of_entry).flatten()
    num_entries = torch.diff(first, append=first.new_full((1,), row.numel()))
    before = torch.cumsum(counts, 0) - counts
    kv_start = before[first] - before[first_of_row[row[first]]]

    owner_first = owner_of_entry[first]
    is_owner = owner_first == first
    number = torch.zeros_like(index)
    number[first[is_owner]] = torch.arange(int(is_owner.sum()), device=device)
    return Segments(
        group=number[owner_first],
        row=row[first],
        entry=entry[first],
        num_entries=num_entries,
        kv_start=kv_start,
        owner=torch.nonzero(is_owner).flatten(),
    )


def _segment_starts(
    owner: torch.Tensor,
    uses: torch.Tensor,
    counts: torch.Tensor,
    row: torch.Tensor,
    page_tokens: int,
) -> torch.Tensor:
    """Whether a segment begins at an entry (bool)."""
    n = owner.numel()
    linked = torch.zeros(n, dtype=torch.bool, device=owner.device)
    if n > 1:
        linked[:-1] = (
            (row[1:] == row[:-1])
            & (counts[:-1] == page_tokens)
            & (uses[1:] == uses[:-1])
            & (owner[1:] == owner[:-1] + 1)
        )
    broken = torch.zeros(n, dtype=torch.bool, device=owner.device)
    broken[owner[~linked]] = True
    start = torch.ones(n, dtype=torch.bool, device=owner.device)
    start[1:] = broken[owner[:-1]]
    return start


def _owners(pages: torch.Tensor, counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """For each entry, the first entry that uses its page, and how many do (both int64)."""
    n = pages.numel()
    ordered, entry = torch.sort(pages, stable=True)
    new_page = torch.ones(n, dtype=torch.bool, device=pages.device)
    new_page[1:] = ordered[1:] != ordered[:-1]
    page = torch.cumsum(new_page, 0) - 1
    first_use = entry[new_page]
    page_uses = torch.bincount(page, minlength=first_use.numel())

    differs = counts[entry] != counts[first_use][page]
    mixed = torch.zeros_like(page_uses, dtype=torch.bool)
    mixed[page[differs]] = True

    private = mixed[page]
    owner, uses = torch.empty_like(entry), torch.empty_like(entry)
    owner[entry] = torch.where(private, entry, first_use[page])
    uses[entry] = torch.where(private, 1, page_uses[page])
    return owner, uses
