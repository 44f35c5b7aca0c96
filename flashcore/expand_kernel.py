"""fp8 pages as fp16, each distinct one once, by one Triton launch for K and one for V.

    pool ── pages[i] ──► scratch page i

Triton and not the DSL: it is a copy that DRAM bounds, compiled in a moment where it runs, and its
interpreter runs it in the tests of machines without a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_ROWS = 32  # of a program at a time
_PROGRAMS = 16  # for an SM


def expand(
    pool: torch.Tensor, pages: torch.Tensor, count: torch.Tensor, target: torch.Tensor
) -> None:
    """target[i] = pool[pages[i]] for i below count.

    pool: fp8 [num_pages, page_tokens, num_kv_heads, columns], any strides with a contiguous last
    axis. pages: int32. count: int32 [1], at most target's pages. target: fp16 [at least count,
    page_tokens, num_kv_heads, columns], the transpose of contiguous [.., num_kv_heads, page_tokens,
    columns].
    """
    _, tokens, heads, columns = pool.shape
    rows = target.shape[0] * tokens * heads
    programs = min(triton.cdiv(rows, _ROWS), _PROGRAMS * _multiprocessors(pool))
    if programs == 0:
        return
    _expand[(programs,)](
        pages,
        count,
        pool.view(torch.uint8),
        *pool.stride()[:3],
        target,
        tokens,
        heads,
        columns,
        _ROWS,
        triton.next_power_of_2(columns),
        pool.dtype == torch.float8_e4m3fn,
    )


def _multiprocessors(x: torch.Tensor) -> int:
    """Of its device; 1 for the interpreter."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1


@triton.jit
def _expand(  # type: ignore[no-untyped-def]
    pages,
    count,
    source,
    page_stride,
    token_stride,
    head_stride,
    target,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    E4M3: tl.constexpr,
):
    rows_of_page: tl.constexpr = TOKENS * HEADS
    rows = tl.load(count) * rows_of_page
    column = tl.arange(0, WIDTH)[None, :]
    first = tl.program_id(0) * ROWS
    while first < rows:
        row = first + tl.arange(0, ROWS)
        there = row < rows
        page = tl.load(pages + row // rows_of_page, mask=there, other=0).to(tl.int64)
        inside = row % rows_of_page
        place = page * page_stride + inside % TOKENS * token_stride + inside // TOKENS * head_stride
        mask = there[:, None] & (column < COLUMNS)
        narrow = tl.load(source + place[:, None] + column, mask=mask, other=0)
        narrow = narrow.to(tl.float8e4nv if E4M3 else tl.float8e5, bitcast=True)
        wide = row.to(tl.int64)[:, None] * COLUMNS + column
        tl.store(target + wide, narrow.to(tl.float16), mask=mask)
        first += tl.num_programs(0) * ROWS
