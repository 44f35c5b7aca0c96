"""Page tables from an engine's own: request rows in, planner's input out, nothing awaited.

SGLang keeps token slots: `req_to_token[r, i]` is the slot of token i of request r. Slots of a page
are neighbours and aligned, so page j of a sequence is `req_to_token[r, j * P] // P`. vLLM keeps the
pages themselves: there P is 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class PageTables:
    """What a planner reads, int32 on one device.

    pages: [batch, width], the pages of each sequence; columns past its last one are not written.
    seq_lens: [batch] KV tokens, new ones included. q_lens: [batch] new tokens.
    """

    pages: torch.Tensor
    seq_lens: torch.Tensor
    q_lens: torch.Tensor

    @staticmethod
    def empty(batch: int, width: int, device: torch.device) -> PageTables:
        """Tables for `batch` sequences, of no length yet."""
        lengths = torch.zeros(2, batch, dtype=torch.int32, device=device)
        pages = torch.zeros(batch, width, dtype=torch.int32, device=device)
        return PageTables(pages, lengths[0], lengths[1])

    def rows(self, batch: int) -> PageTables:
        """The first `batch` sequences, in the same memory."""
        return PageTables(self.pages[:batch], self.seq_lens[:batch], self.q_lens[:batch])


class Buffer:
    """Memory for the tables of one batch after another, of any shape within it. What it holds is
    never cleared: nobody reads past a sequence's last page."""

    def __init__(self, elements: int, max_batch: int, device: torch.device):
        self.pages = torch.empty(elements, dtype=torch.int32, device=device)
        self.lengths = torch.zeros(2, max_batch, dtype=torch.int32, device=device)

    def shaped(self, batch: int, width: int) -> PageTables:
        """Tables for `batch` sequences of up to `width` pages."""
        pages = self.pages[: batch * width].view(batch, width)
        return PageTables(pages, self.lengths[0, :batch], self.lengths[1, :batch])


@dataclass(frozen=True, eq=False)
class Slots:
    """Where an engine keeps the slots of a batch.

    req_to_token: int32 [requests, tokens]. requests: [batch] int32 or int64, rows of it.
    seq_lens: [batch] int32 or int64; `added` tokens more are in the cache. new_tokens: [batch], or
    one number for all. real: sequences that are; those after it pad the batch and get no tokens.
    pages: `req_to_token` has pages, one for each page of a sequence, in place of slots.
    """

    req_to_token: torch.Tensor
    requests: torch.Tensor
    seq_lens: torch.Tensor
    new_tokens: torch.Tensor | int
    added: int
    real: int
    pages: bool = False


def fill(
    tables: PageTables,
    slots: Slots,
    page_tokens: int,
    window: int = -1,
    translation: torch.Tensor | None = None,
    align: int = 1,
) -> None:
    """Write `tables` for the batch in `slots`.

    window: keys to the left of a query that a layer sees: pages before all of them are left out,
    and the length counts from the first page that stays. -1: every page.
    translation: slot -> slot of another pool.
    align: with a window, the first page that stays is a multiple of so many. What an engine has
    given back of the pages before the window is page 0, which no query sees.
    """
    if slots.req_to_token.is_cuda:
        from flashcore.serving.page_table_kernel import fill_tables

        fill_tables(tables, slots, page_tokens, window, translation, align)
        return
    new = torch.as_tensor(slots.new_tokens, device=slots.seq_lens.device)
    real = torch.arange(len(slots.requests), device=slots.seq_lens.device) < slots.real
    lengths = torch.where(real, slots.seq_lens.long() + slots.added, 0)
    new = torch.where(real, new.long(), 0)
    first = torch.zeros_like(lengths)
    if window >= 0:
        first = (lengths - new - window).clamp(min=0) // page_tokens // align * align
    lengths = lengths - first * page_tokens
    tables.seq_lens.copy_(lengths)
    tables.q_lens.copy_(new)
    column = torch.arange(tables.pages.shape[1], device=lengths.device)
    used = column < ((lengths + page_tokens - 1) // page_tokens)[:, None]
    row, column = used.nonzero(as_tuple=True)
    span = 1 if slots.pages else page_tokens
    position = (first[row] + column) * span
    slot = slots.req_to_token[slots.requests[row].long(), position].long()
    if translation is not None:
        slot = translation[slot]
    tables.pages[row, column] = (slot // span).clamp(min=0).int()


def tree_mask(
    out: torch.Tensor, mask: torch.Tensor, seq_lens: torch.Tensor, draft_tokens: int, full: bool
) -> None:
    """Among its sequence's draft tokens, which of them each one sees: out [tokens, draft_tokens].

    mask: SGLang's, flat. full: rows over all keys of their sequence, which are seq_lens + draft
    tokens; else over the draft tokens alone. seq_lens: [batch] of the sequences that are; rows of
    others see themselves.
    """
    n, batch = draft_tokens, seq_lens.numel()
    step = torch.arange(n, device=out.device)
    if full:
        seq = seq_lens.long()
        begin = n * (torch.cumsum(seq, 0) - seq) + n * n * torch.arange(batch, device=out.device)
        row = begin[:, None] + step * (seq + n)[:, None] + seq[:, None]
        at = row[:, :, None] + step
        # Never past the mask, whatever the lengths say.
        seen = mask[at.clamp(max=mask.numel() - 1)] & (at < mask.numel())
    else:
        seen = mask[: batch * n * n].view(batch, n, n)
    out[: batch * n].copy_(seen.reshape(batch * n, n))
    if out.shape[0] > batch * n:
        own = torch.eye(n, dtype=torch.bool, device=out.device)
        out[batch * n :].copy_(own.repeat(-(-out.shape[0] // n) - batch, 1)[: len(out) - batch * n])
