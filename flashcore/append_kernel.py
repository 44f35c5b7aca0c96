"""`append_kv` on a GPU: K and V scaled, saturated, cast and scattered by one Triton launch."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from flashcore.kv_checks import FP8_DTYPES
from flashcore.problem import KVPool
from flashcore.validate import INT32_MAX

_ELEMENTS = 2048  # of a program: a few tokens of decoding spread over many SMs
_VECTOR_BYTES = 16

# Compiled kernels by all that Triton compiles for, as in `serving.page_table_kernel`.
_compiled: dict[tuple[Any, ...], Any] = {}


class _Side(NamedTuple):
    """K or V of a call, as the kernel takes them."""

    new: torch.Tensor
    pages: torch.Tensor
    scale: torch.Tensor | None

    def arguments(self, aligned: bool) -> tuple[Any, ...]:
        scale = self.scale
        return (
            self.new,
            *_strides(self.new, aligned),
            self.pages,
            *_strides(self.pages, aligned),
            self.pages if scale is None else scale,  # an address that is not read
            0 if scale is None or scale.dim() == 0 else scale.stride(0),
        )


def scatter(k: torch.Tensor, v: torch.Tensor, pool: KVPool, slots: torch.Tensor) -> None:
    """Write k and v [new_tokens, num_kv_heads, columns] to their slots; negative ones are left out.

    The arguments of `flashcore.append_kv`, checked. A slot beyond the pages is an assertion on the
    device.
    """
    tokens, heads, _ = k.shape
    if tokens == 0:
        return
    sides = _Side(k, pool.k, pool.k_scale), _Side(v, pool.v, pool.v_scale)
    aligned = all(_aligned(x) for x in (k, v, pool.k, pool.v))
    columns = triton.next_power_of_2(max(k.shape[2], v.shape[2]))
    block = min(triton.next_power_of_2(heads), max(1, _ELEMENTS // columns))
    constants = (
        heads,
        k.shape[2],
        v.shape[2],
        pool.k.shape[1],
        block,
        columns,
        pool.k_scale is not None,
        pool.v_scale is not None,
        torch.finfo(pool.k.dtype).max if pool.k.dtype in FP8_DTYPES else 0.0,
        aligned,
    )
    arguments = (
        slots,
        slots.stride(0),
        pool.k.shape[0] * pool.k.shape[1],
        *sides[0].arguments(aligned),
        *sides[1].arguments(aligned),
        *constants,
    )
    grid = (tokens, triton.cdiv(heads, block), 2)
    if not aligned or any(isinstance(x, int) and abs(x) > INT32_MAX for x in arguments):
        _scatter[grid](*arguments)  # there are more things that Triton compiles for
        return
    key = (k.get_device(), slots.dtype, k.dtype, v.dtype, pool.k.dtype, *constants)
    compiled = _compiled.get(key)
    if compiled is None:
        _compiled[key] = _scatter[grid](*arguments)
    else:
        compiled[grid](*arguments)


def _aligned(x: torch.Tensor) -> bool:
    """All its heads are whole vectors."""
    vector = _VECTOR_BYTES // x.element_size()
    whole = x.data_ptr() % _VECTOR_BYTES == 0 and not any(s % vector for s in x.stride()[:-1])
    return whole and x.stride(-1) == 1


def _strides(x: torch.Tensor, aligned: bool) -> tuple[int, ...]:
    """In elements; in vectors where aligned, so that the compiler can see it."""
    vector = _VECTOR_BYTES // x.element_size()
    return tuple(s // vector for s in x.stride()) if aligned else x.stride()


_SIZES = [
    *("slots_stride", "num_slots"),
    *("k_token", "k_head", "k_column", "k_page", "k_row", "k_page_head", "k_page_column"),
    *("v_token", "v_head", "v_column", "v_page", "v_row", "v_page_head", "v_page_column"),
    *("k_scale_head", "v_scale_head"),
]
_TENSORS = ["slots", "k_scale", "v_scale"]


# Debugging is what Triton calls assertions on the device.
@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=_TENSORS, debug=True)
def _scatter(  # type: ignore[no-untyped-def]
    slots,
    slots_stride,
    num_slots,
    k,
    k_token,
    k_head,
    k_column,
    k_pages,
    k_page,
    k_row,
    k_page_head,
    k_page_column,
    k_scale,
    k_scale_head,
    v,
    v_token,
    v_head,
    v_column,
    v_pages,
    v_page,
    v_row,
    v_page_head,
    v_page_column,
    v_scale,
    v_scale_head,
    HEADS: tl.constexpr,
    K_COLUMNS: tl.constexpr,
    V_COLUMNS: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,  # heads of a program
    COLUMNS: tl.constexpr,
    K_SCALED: tl.constexpr,
    V_SCALED: tl.constexpr,
    MAX: tl.constexpr,  # of an fp8 format; 0: not fp8
    ALIGNED: tl.constexpr,
):
    # All of it in 64 bits: Triton adds assertions to sums of 32.
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token * slots_stride).to(tl.int64)
    tl.device_assert(slot < num_slots, "append_kv: a slot is beyond the pages")
    if (slot >= 0) & (slot < num_slots):
        first = tl.program_id(1).to(tl.int64) * BLOCK
        head = first + tl.arange(0, BLOCK).to(tl.int64)[:, None]
        column = tl.arange(0, COLUMNS).to(tl.int64)[None, :]
        page = slot // PAGE_TOKENS
        row = slot % PAGE_TOKENS
        if tl.program_id(2) == 0:
            source = _row(k, token, k_token, ALIGNED)
            target = _row(_row(k_pages, page, k_page, ALIGNED), row, k_row, ALIGNED)
            _store(
                _places(source, head, k_head, column, k_column, ALIGNED),
                _places(target, head, k_page_head, column, k_page_column, ALIGNED),
                k_scale + head * k_scale_head,
                head < HEADS,
                column < K_COLUMNS,
                K_SCALED,
                MAX,
            )
        else:
            source = _row(v, token, v_token, ALIGNED)
            target = _row(_row(v_pages, page, v_page, ALIGNED), row, v_row, ALIGNED)
            _store(
                _places(source, head, v_head, column, v_column, ALIGNED),
                _places(target, head, v_page_head, column, v_page_column, ALIGNED),
                v_scale + head * v_scale_head,
                head < HEADS,
                column < V_COLUMNS,
                V_SCALED,
                MAX,
            )


@triton.jit
def _row(base, index, stride, ALIGNED: tl.constexpr):  # type: ignore[no-untyped-def]
    """base[index]."""
    if ALIGNED:
        stride = stride.to(tl.int64) * (128 // base.dtype.element_ty.primitive_bitwidth)
    return base + index * stride


@triton.jit
def _places(  # type: ignore[no-untyped-def]
    row, head, head_stride, column, column_stride, ALIGNED: tl.constexpr
):
    """Addresses [heads, columns] in a row."""
    heads = _row(row, head, head_stride, ALIGNED)
    return heads + column if ALIGNED else heads + column * column_stride


@triton.jit
def _store(  # type: ignore[no-untyped-def]
    source, target, scale, heads, columns, SCALED: tl.constexpr, MAX: tl.constexpr
):
    """As `append.stored`."""
    inside = heads & columns
    x = tl.load(source, mask=inside)
    if source.dtype.element_ty != target.dtype.element_ty:
        x = x.to(tl.float32)
        if SCALED:
            # Rounded as IEEE says, which `/` is not: torch's division to the bit.
            x = tl.div_rn(x, tl.load(scale, mask=heads, other=1.0) + tl.zeros_like(x))
        if MAX > 0:  # a NaN is on neither side and stays one
            x = tl.where(x > MAX, MAX, x)
            x = tl.where(x < -MAX, -MAX, x)
    tl.store(target, x.to(target.dtype.element_ty), mask=inside)
