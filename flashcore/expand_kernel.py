"""fp8 pages as fp16, each distinct one once: K and V by one Triton launch.

    pools ── pages[i] ──► page i of the targets

Triton and not the DSL: it is a copy that DRAM bounds, compiled in a moment where it runs, and its
interpreter runs it in the tests of machines without a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

_ROWS = 32  # of a program at a time
_PROGRAMS = 8  # for an SM, of K and of V each
_VECTOR_BYTES = 16

_Pair = tuple[torch.Tensor, torch.Tensor]

# Compiled kernels by all that Triton compiles for, as in `append_kernel`.
_compiled: dict[tuple[Any, ...], Any] = {}


def expand(pools: _Pair, pages: torch.Tensor, count: torch.Tensor, targets: _Pair) -> None:
    """targets[.][i] = pools[.][pages[i]] for i below count.

    pools: K and V, fp8 [num_pages, page_tokens, num_kv_heads, columns], any strides with a
    contiguous last axis. pages: int32. count: int32 [1], at most the targets' pages. targets: fp16
    [at least count, page_tokens, num_kv_heads, columns], the transpose of contiguous [..,
    num_kv_heads, page_tokens, columns].
    """
    _, tokens, heads, k_columns = pools[0].shape
    v_columns = pools[1].shape[3]
    rows = targets[0].shape[0] * tokens * heads
    programs = min(triton.cdiv(rows, _ROWS), _PROGRAMS * _multiprocessors(pools[0]))
    if programs == 0:
        return
    k, v = (pool.view(torch.uint8) for pool in pools)
    strides = (*k.stride()[:3], *v.stride()[:3])
    constants = (
        *(tokens, heads, k_columns, v_columns, _ROWS),
        *(triton.next_power_of_2(k_columns), triton.next_power_of_2(v_columns)),
        pools[0].dtype == torch.float8_e4m3fn,
    )
    tensors = pages, count, k, v, *targets
    arguments = (*tensors, *strides, *constants)
    odd = tuple(x.data_ptr() % _VECTOR_BYTES for x in tensors)
    key = (pages.get_device(), odd, strides, constants)
    compiled = _compiled.get(key)
    if compiled is None:
        _compiled[key] = _expand[programs, 2](*arguments)
    else:
        compiled[programs, 2, 1](*arguments)


def _multiprocessors(x: torch.Tensor) -> int:
    """Of its device; 1 for the interpreter."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1


@triton.jit
def _expand(  # type: ignore[no-untyped-def]
    pages,
    count,
    k,
    v,
    wide_k,
    wide_v,
    k_page,
    k_token,
    k_head,
    v_page,
    v_token,
    v_head,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    K_COLUMNS: tl.constexpr,
    V_COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    K_WIDTH: tl.constexpr,
    V_WIDTH: tl.constexpr,
    E4M3: tl.constexpr,
):
    rows = tl.load(count) * (TOKENS * HEADS)
    first = tl.program_id(0) * ROWS
    while first < rows:
        row = first + tl.arange(0, ROWS)
        page = tl.load(pages + row // (TOKENS * HEADS), mask=row < rows, other=0).to(tl.int64)
        token = row % (TOKENS * HEADS) % TOKENS
        head = row % (TOKENS * HEADS) // TOKENS
        if tl.program_id(1) == 0:
            place = page * k_page + token * k_token + head * k_head
            _widen(k, place, wide_k, row, rows, K_COLUMNS, K_WIDTH, E4M3)
        else:
            place = page * v_page + token * v_token + head * v_head
            _widen(v, place, wide_v, row, rows, V_COLUMNS, V_WIDTH, E4M3)
        first += tl.num_programs(0) * ROWS


@triton.jit
def _widen(  # type: ignore[no-untyped-def]
    source, place, target, row, rows, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, E4M3: tl.constexpr
):
    """Rows at `place` of source to rows `row` of target, those below `rows`."""
    column = tl.arange(0, WIDTH)[None, :]
    mask = (row < rows)[:, None] & (column < COLUMNS)
    narrow = tl.load(source + place[:, None] + column, mask=mask, other=0)
    narrow = narrow.to(tl.float8e4nv if E4M3 else tl.float8e5, bitcast=True)
    wide = row.to(tl.int64)[:, None] * COLUMNS + column
    tl.store(target + wide, narrow.to(tl.float16), mask=mask)
