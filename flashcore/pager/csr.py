"""The pager: turns a batch's page tables into the CSR layout that the planner reads.

Everything is a vectorised torch operation, so the same code runs on any torch device. These forms
check their input and trim their output, for which they wait for the device (`.item()`); they are
meant for one call per batch, not one per layer.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from flashcore import validate
from flashcore.names import known


class Layout(NamedTuple):
    """CSR form of a batch: row b uses the pages cols[row_offsets[b] : row_offsets[b + 1]] in order.

    Made by `build_layout`, `layout_from_page_table` and `layout_from_csr`, never by its
    constructor. All tensors are int32 and live on one device.

    row_offsets: [batch + 1], first entry of each row; the last element is nnz.
    cols: [nnz], physical page ids in sequence order.
    token_counts: [nnz], valid tokens of that page for that sequence, 1 .. page_tokens; the valid
        tokens are slots 0 .. token_counts - 1 of the page.
    staging_ids: [n], each page that is used and not resident, once per batch, in first-use order.
    page_tokens: tokens that a page holds.
    """

    row_offsets: torch.Tensor
    cols: torch.Tensor
    token_counts: torch.Tensor
    staging_ids: torch.Tensor
    page_tokens: int


@known
def build_layout(
    token_to_page: torch.Tensor,
    seq_starts: torch.Tensor,
    seq_ends: torch.Tensor,
    page_resident_bitmap: torch.Tensor | None = None,
    *,
    page_tokens: int = 128,
    num_pages: int | None = None,
) -> Layout:
    """Layout of sequences given as ranges of a token-level page map.

    Args:
        token_to_page: [total_tokens] int32 or int64, the page that holds each token. Entries
            outside every range are never looked at.
        seq_starts, seq_ends: [batch] int32 or int64; sequence b is the tokens
            seq_starts[b] .. seq_ends[b] - 1. Ranges may be empty, and may overlap.
        page_resident_bitmap: which pages are on the device already: bool or uint8 [num_pages], or
            int32 words of 32 pages each, lowest bit first. None: no page is.
        page_tokens: tokens a page holds. A run of one page that is longer is split into entries of
            page_tokens; a page that returns after another page is a new entry.
        num_pages: size of the page pool; ids at or above it are an error.

    Raises:
        TypeError: a wrong dtype.
        ValueError: a wrong shape or device, a range outside token_to_page, a page id out of range.
    """
    validate.tensor("token_to_page", token_to_page, dtypes=validate.INT_DTYPES, ndim=1)
    validate.tensor("seq_starts", seq_starts, dtypes=validate.INT_DTYPES, ndim=1)
    validate.tensor("seq_ends", seq_ends, dtypes=validate.INT_DTYPES, ndim=1)
    validate.positive_int("page_tokens", page_tokens)
    validate.same_device(
        "token_to_page",
        token_to_page,
        seq_starts=seq_starts,
        seq_ends=seq_ends,
        page_resident_bitmap=page_resident_bitmap,
    )
    validate.readable(token_to_page=token_to_page, seq_starts=seq_starts, seq_ends=seq_ends)
    num_pages = _pool_size(page_resident_bitmap, num_pages)
    starts, ends = seq_starts.long(), seq_ends.long()
    _check_ranges(starts, ends, token_to_page.numel())

    run_start, run_length, runs_per_row = _page_runs(token_to_page, starts, ends)
    run_page = token_to_page[run_start]
    validate.page_ids("token_to_page", run_page, num_pages)

    pieces = (run_length + page_tokens - 1) // page_tokens
    row_entries = _segment_sums(pieces, runs_per_row)
    if bool((pieces > 1).any()):
        run = torch.repeat_interleave(pieces)
        first_piece = torch.cumsum(pieces, 0) - pieces
        piece = torch.arange(run.numel(), device=run.device) - first_piece[run]
        run_page = run_page[run]
        run_length = (run_length[run] - piece * page_tokens).clamp(max=page_tokens)
    return _layout(row_entries, run_page, run_length, page_tokens, page_resident_bitmap)


@known
def layout_from_page_table(
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    page_tokens: int,
    page_resident_bitmap: torch.Tensor | None = None,
    num_pages: int | None = None,
) -> Layout:
    """Layout of sequences given as a page table.

    Args:
        page_table: [batch, max_pages] int32 or int64 (any strides); row b uses its first
            ceil(seq_lens[b] / page_tokens) ids, the others are never looked at.
        seq_lens: [batch] int32 or int64, tokens of each sequence, at least 0.
        page_tokens, page_resident_bitmap, num_pages: as in `build_layout`.

    Raises:
        TypeError: a wrong dtype.
        ValueError: a wrong shape or device, a length beyond the table, a page id out of range.
    """
    validate.tensor("page_table", page_table, dtypes=validate.INT_DTYPES, ndim=2)
    validate.tensor("seq_lens", seq_lens, dtypes=validate.INT_DTYPES, ndim=1)
    validate.positive_int("page_tokens", page_tokens)
    validate.same_device(
        "page_table", page_table, seq_lens=seq_lens, page_resident_bitmap=page_resident_bitmap
    )
    validate.readable(page_table=page_table, seq_lens=seq_lens)
    batch, max_pages = page_table.shape
    if seq_lens.numel() != batch:
        raise ValueError(
            f"seq_lens must have one length per row of page_table ({batch}), got {seq_lens.numel()}"
        )
    num_pages = _pool_size(page_resident_bitmap, num_pages)
    lengths = seq_lens.long()
    if batch and int(lengths.min()) < 0:
        row = validate.first_index(lengths < 0)
        raise ValueError(f"seq_lens[{row}] must be at least 0, got {int(lengths[row])}")
    pages = (lengths + page_tokens - 1) // page_tokens
    if batch and int(pages.max()) > max_pages:
        row = validate.first_index(pages > max_pages)
        raise ValueError(
            f"seq_lens[{row}] = {int(lengths[row])} is beyond page_table, whose {max_pages} "
            f"columns hold at most {max_pages * page_tokens} tokens of page_tokens = {page_tokens}"
        )
    column = torch.arange(max_pages, device=page_table.device)
    cols = page_table[column < pages[:, None]]
    validate.page_ids("page_table", cols, num_pages)
    counts = torch.full_like(cols, page_tokens, dtype=torch.long)
    used = pages > 0
    last_entry = torch.cumsum(pages, 0)[used] - 1
    counts[last_entry] = (lengths - (pages - 1) * page_tokens)[used]
    return _layout(pages, cols, counts, page_tokens, page_resident_bitmap)


@known
def layout_from_csr(
    indptr: torch.Tensor,
    indices: torch.Tensor,
    last_page_len: torch.Tensor,
    *,
    page_tokens: int,
    page_resident_bitmap: torch.Tensor | None = None,
    num_pages: int | None = None,
) -> Layout:
    """Layout of sequences given by lists of pages, as FlashInfer has them.

    Args:
        indptr: [batch + 1] int32 or int64, ends of the sequences' lists in `indices`, 0 first.
        indices: [indptr[-1]] int32 or int64, page ids, sequence after sequence.
        last_page_len: [batch] int32 or int64, tokens of each sequence's last page, 1 to
            page_tokens; not looked at where a sequence has no pages.
        page_tokens, page_resident_bitmap, num_pages: as in `build_layout`.

    Raises:
        TypeError: a wrong dtype.
        ValueError: a wrong shape or device, lists that do not end with `indices`, a last page that
            is empty or too full, a page id out of range.
    """
    for name, value in (
        ("indptr", indptr), ("indices", indices), ("last_page_len", last_page_len)
    ):  # fmt: skip
        validate.tensor(name, value, dtypes=validate.INT_DTYPES, ndim=1)
    validate.positive_int("page_tokens", page_tokens)
    validate.same_device(
        "indices",
        indices,
        indptr=indptr,
        last_page_len=last_page_len,
        page_resident_bitmap=page_resident_bitmap,
    )
    validate.readable(indptr=indptr, indices=indices, last_page_len=last_page_len)
    batch = last_page_len.numel()
    pages = validate.lengths_of("indptr", indptr.cpu(), "last_page_len", batch).to(indptr.device)
    if int(indptr[-1]) != indices.numel():
        raise ValueError(
            f"indptr must end with the length of indices ({indices.numel()}), got {int(indptr[-1])}"
        )
    num_pages = _pool_size(page_resident_bitmap, num_pages)
    validate.page_ids("indices", indices, num_pages)
    used = pages > 0
    wrong = used & ((last_page_len < 1) | (last_page_len > page_tokens))
    if bool(wrong.any()):
        row = validate.first_index(wrong)
        raise ValueError(
            f"last_page_len[{row}] must be 1 to page_tokens ({page_tokens}), got "
            f"{int(last_page_len[row])}"
        )
    counts = torch.full_like(indices, page_tokens, dtype=torch.long)
    counts[torch.cumsum(pages, 0)[used] - 1] = last_page_len[used].long()
    return _layout(pages.long(), indices, counts, page_tokens, page_resident_bitmap)


def _layout(
    row_entries: torch.Tensor,
    cols: torch.Tensor,
    counts: torch.Tensor,
    page_tokens: int,
    resident: torch.Tensor | None,
) -> Layout:
    row_offsets = torch.zeros(row_entries.numel() + 1, dtype=torch.int32, device=cols.device)
    if cols.numel() > validate.INT32_MAX:
        raise ValueError(f"a layout holds at most 2**31 - 1 entries, got {cols.numel()}")
    torch.cumsum(row_entries, 0, out=row_offsets[1:])
    cols = cols.int()
    return Layout(row_offsets, cols, counts.int(), _staging_ids(cols, resident), page_tokens)


def _check_ranges(starts: torch.Tensor, ends: torch.Tensor, total: int) -> None:
    if starts.numel() != ends.numel():
        raise ValueError(
            f"seq_ends must have as many elements as seq_starts ({starts.numel()}), "
            f"got {ends.numel()}"
        )
    if starts.numel() == 0:
        return
    if int(starts.min()) < 0:
        row = validate.first_index(starts < 0)
        raise ValueError(f"seq_starts[{row}] must be at least 0, got {int(starts[row])}")
    if bool((ends < starts).any()):
        row = validate.first_index(ends < starts)
        raise ValueError(
            f"seq_ends[{row}] must be at least seq_starts[{row}] = {int(starts[row])}, "
            f"got {int(ends[row])}"
        )
    if int(ends.max()) > total:
        row = validate.first_index(ends > total)
        raise ValueError(
            f"seq_ends[{row}] must be at most the length of token_to_page ({total}), "
            f"got {int(ends[row])}"
        )


def _page_runs(
    token_to_page: torch.Tensor, starts: torch.Tensor, ends: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Maximal runs of one page in each range, as (first token, length, runs per range).

    One comparison of neighbours finds every change of page; each range then takes the changes
    inside it, so overlapping ranges cost nothing extra.
    """
    device = token_to_page.device
    occupied = ends > starts
    if not bool(occupied.any()):
        none = torch.zeros(0, dtype=torch.long, device=device)
        return none, none, torch.zeros_like(starts)
    low, high = int(starts[occupied].min()), int(ends.max())
    window = token_to_page[low:high]
    change = torch.nonzero(window[1:] != window[:-1]).flatten() + (low + 1)
    first = torch.searchsorted(change, starts, right=True)
    last = torch.searchsorted(change, ends)
    runs = torch.where(occupied, last - first + 1, 0)
    row = torch.repeat_interleave(runs)
    index_in_row = torch.arange(row.numel(), device=device) - (torch.cumsum(runs, 0) - runs)[row]
    # The run before a row's k-th change begins at the change before it, or at the row's start.
    before = (first[row] + index_in_row - 1).clamp(min=0)
    run_start = starts[row]
    if change.numel():
        run_start = torch.where(index_in_row == 0, run_start, change[before])
    run_end = ends[row]
    run_end[:-1] = torch.where(row[1:] == row[:-1], run_start[1:], run_end[:-1])
    return run_start, run_end - run_start, runs


def _segment_sums(values: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Sums of consecutive stretches of `values` of the given lengths."""
    total = torch.zeros(values.numel() + 1, dtype=torch.long, device=values.device)
    torch.cumsum(values, 0, out=total[1:])
    ends = torch.cumsum(counts, 0)
    return total[ends] - total[ends - counts]


def _pool_size(resident: torch.Tensor | None, num_pages: int | None) -> int | None:
    """Pages of the pool as far as it is known, and a check of the bitmap against it."""
    if num_pages is not None:
        validate.positive_int("num_pages", num_pages, maximum=validate.INT32_MAX)
    if resident is None:
        return num_pages
    dtypes = (torch.bool, torch.uint8, torch.int32)
    validate.tensor("page_resident_bitmap", resident, dtypes=dtypes, ndim=1)
    held = resident.numel() * (32 if resident.dtype == torch.int32 else 1)
    if num_pages is None:
        return held
    if held < num_pages:
        raise ValueError(
            f"page_resident_bitmap must cover num_pages = {num_pages} pages, it covers {held}"
        )
    return num_pages


def _staging_ids(cols: torch.Tensor, resident: torch.Tensor | None) -> torch.Tensor:
    """Distinct pages of `cols` that are not resident, in the order of their first use."""
    ordered, entry = torch.sort(cols, stable=True)
    first = torch.ones_like(ordered, dtype=torch.bool)
    first[1:] = ordered[1:] != ordered[:-1]
    used = cols[torch.sort(entry[first]).values]
    if resident is None:
        return used
    if resident.dtype == torch.int32:
        present = (resident[(used >> 5).long()] >> (used & 31)) & 1
    else:
        present = resident[used.long()]
    return used[~present.bool()]
