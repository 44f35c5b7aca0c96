"""`page_tables.fill` on a GPU: one Triton launch for a table, lengths and window included."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from flashcore.serving.page_tables import PageTables, Slots

_BLOCK = 1024

# Compiled kernels by all that Triton compiles for. Its own look-up, made for kernels that are
# compiled for more, takes the host longer than the rest of a launch.
_compiled: dict[tuple[Any, ...], Any] = {}


def fill_tables(
    tables: PageTables,
    slots: Slots,
    page_tokens: int,
    window: int,
    translation: torch.Tensor | None,
    align: int,
) -> None:
    """See `page_tables.fill`."""
    batch, width = tables.pages.shape
    if batch == 0:
        return
    constant = isinstance(slots.new_tokens, int)
    arguments = (
        slots.req_to_token,
        slots.req_to_token.stride(0),
        slots.requests,
        slots.seq_lens,
        slots.seq_lens if constant else slots.new_tokens,
        slots.new_tokens if constant else 0,
        slots.added,
        slots.real,
        slots.req_to_token if translation is None else translation,
        tables.pages,
        tables.pages.stride(0),
        width,
        tables.seq_lens,
        tables.q_lens,
        window,
        align,
        page_tokens,
        1 if slots.pages else page_tokens,
        constant,
        translation is not None,
        _BLOCK,
    )
    grid = (batch, max(1, triton.cdiv(width, _BLOCK)), 1)
    key = (
        tables.pages.get_device(),
        slots.requests.dtype,
        slots.seq_lens.dtype,
        getattr(slots.new_tokens, "dtype", None),
        None if translation is None else translation.dtype,
        page_tokens,
        slots.pages,
    )
    compiled = _compiled.get(key)
    if compiled is None:
        _compiled[key] = _fill[grid](*arguments)
    else:
        compiled[grid](*arguments)


# Compiled for types and for what a model's layers decide, never for a batch's sizes or addresses:
# the halves of a batch begin at any element, and a first request must not wait for a compiler.
_SIZES = ["req_stride", "count", "added", "real", "pages_stride", "width", "window", "align"]
_TENSORS = [
    *("req_to_token", "requests", "seq_lens", "new_tokens", "translation"),
    *("pages", "seq_lens_out", "q_lens_out"),
]


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=_TENSORS)
def _fill(  # type: ignore[no-untyped-def]
    req_to_token,
    req_stride,
    requests,
    seq_lens,
    new_tokens,
    count,
    added,
    real,
    translation,
    pages,
    pages_stride,
    width,
    seq_lens_out,
    q_lens_out,
    window,
    align,
    PAGE_TOKENS: tl.constexpr,
    SPAN: tl.constexpr,  # entries of req_to_token for a page
    CONSTANT: tl.constexpr,
    TRANSLATED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    block = tl.program_id(1)
    length = tl.load(seq_lens + row).to(tl.int32) + added
    new = tl.zeros((), tl.int32) + count
    if not CONSTANT:
        new = tl.load(new_tokens + row).to(tl.int32)
    if row >= real:
        length = length * 0
        new = new * 0
    first = tl.maximum(length - new - window, 0) // PAGE_TOKENS // align * align
    if window < 0:
        first = first * 0
    length -= first * PAGE_TOKENS
    if block == 0:
        tl.store(seq_lens_out + row, length)
        tl.store(q_lens_out + row, new)
    used = (length + PAGE_TOKENS - 1) // PAGE_TOKENS
    if block * BLOCK < used:
        column = block * BLOCK + tl.arange(0, BLOCK)
        mask = column < tl.minimum(used, width)
        request = tl.load(requests + row).to(tl.int64)
        position = (first + column) * SPAN
        slot = tl.load(req_to_token + request * req_stride + position, mask=mask, other=0)
        if TRANSLATED:
            slot = tl.load(translation + slot, mask=mask, other=0)
        page = tl.maximum(slot // SPAN, 0).to(tl.int32)
        tl.store(pages + row.to(tl.int64) * pages_stride + column, page, mask=mask)
