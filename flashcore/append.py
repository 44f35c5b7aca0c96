"""`append_kv`: scatter the K and V of new tokens into the pages of a KV cache.

    slot mapping, or page table + lengths ─► slots ─► k_pages, v_pages, in place

A slot is page * page_tokens + place in the page. Nothing is awaited. On a CUDA device one launch
writes K and V (`append_kernel`); elsewhere, and under a compiler, torch operators do, which that
kernel is held against.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache

import torch

from flashcore import checks, kv_checks, triton_compiler, validate
from flashcore.kv_checks import FP8_DTYPES
from flashcore.names import known
from flashcore.problem import KVPool

logger = logging.getLogger(__name__)


@known
def append_kv(
    k: torch.Tensor,
    v: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    *,
    slot_mapping: torch.Tensor | None = None,
    page_table: torch.Tensor | None = None,
    seq_lens: torch.Tensor | None = None,
    q_lens: torch.Tensor | Sequence[int] | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> None:
    """Write the K and V of new tokens to their places in the pages.

    The places come from a slot mapping, as serving engines have it, or from a page table and
    lengths, as `layout_from_page_table` and `plan` take them: the new tokens of a sequence are its
    last q_len. Call it before `paged_attention`, which expects them in the cache.

    Args:
        k: [new_tokens, num_kv_heads, head_dim]. v: [new_tokens, num_kv_heads, v_head_dim]. Any
            float dtype; they are rounded to the pages'.
        k_pages: [num_pages, page_tokens, num_kv_heads, head_dim], v_pages likewise with v_head_dim;
            any strides. fp32, bf16, fp16, float8_e4m3fn or float8_e5m2, both the same. Written in
            place. What is beyond fp8's largest value, infinity too, becomes that value; a NaN stays
            one.
        slot_mapping: int32 or int64 [new_tokens]; tokens with a negative slot are left out. No two
            tokens have the same slot.
        page_table: int32 or int64 [batch, max_pages].
        seq_lens: int32 or int64 [batch], new tokens included.
        q_lens: [batch] new tokens of each sequence, all of them together new_tokens; None for one
            each. A tensor on a GPU is not looked at on the host: lengths that do not add up to
            new_tokens then leave tokens out or write them beyond what was meant.
        cu_seqlens_q: [batch + 1] in place of q_lens: their ends, 0 first.
        k_scale, v_scale: as in `paged_attention`, which gets the same: fp32 tensors where k is, ()
            or [num_kv_heads], above 0. Pages get K divided by k_scale, and V by v_scale.

    Raises:
        TypeError, ValueError: naming the argument, what it is and what it may be. On the CPU the
            slots and page ids are checked too; on a GPU one out of range is an assertion on the
            device.
    """
    pool = KVPool(k_pages, v_pages, k_scale, v_scale)
    _check_tokens(k, v, pool)
    if slot_mapping is not None:
        others = (page_table, seq_lens, q_lens, cu_seqlens_q)
        if any(other is not None for other in others):
            raise ValueError(
                "slot_mapping takes the place of page_table, seq_lens, q_lens and cu_seqlens_q; "
                "give one or the others"
            )
        slots = validate.tensor("slot_mapping", slot_mapping, dtypes=validate.INT_DTYPES, ndim=1)
        validate.same_device("k", k, slot_mapping=slot_mapping)
        if slots.numel() != k.shape[0]:
            raise ValueError(
                f"slot_mapping must be [new_tokens] = [{k.shape[0]}], got {tuple(slots.shape)}"
            )
    elif page_table is not None and seq_lens is not None:
        if cu_seqlens_q is not None:
            if q_lens is not None:
                raise ValueError("cu_seqlens_q takes the place of q_lens; give one of them")
            validate.tensor("page_table", page_table, dtypes=validate.INT_DTYPES, ndim=2)
            rows = page_table.shape[0]
            q_lens = validate.lengths_of("cu_seqlens_q", cu_seqlens_q, "rows of page_table", rows)
        slots = _slots(k.shape[0], k_pages.shape[1], page_table, seq_lens, q_lens)
        validate.same_device("k", k, page_table=page_table, seq_lens=seq_lens)
    else:
        raise ValueError("append_kv needs slot_mapping, or page_table and seq_lens")
    if k.shape[0] == 0:
        return
    num_slots = k_pages.shape[0] * k_pages.shape[1]
    if slots.device.type == "cpu" and not checks.traced(slots) and int(slots.max()) >= num_slots:
        raise ValueError(
            f"slot {int(slots.max())} is not in the cache: slots are below num_pages * page_tokens "
            f"= {num_slots}"
        )
    if k.is_cuda and not checks.traced(k) and can_compile():
        from flashcore.append_kernel import scatter

        scatter(k, v, pool, slots)
    else:
        scatter_by_torch(k, v, pool, slots)


@cache
def can_compile() -> bool:
    """Whether Triton and what it compiles with are here. What is missing is told once: the same
    values are then written by torch operators, in a dozen launches."""
    missing = triton_compiler.missing()
    if missing is not None:
        logger.warning(
            "flashcore.append_kv runs by torch operators, a dozen launches in the place of one: it "
            "needs Triton and a C compiler (cc, gcc, clang or CC), and %s",
            missing,
        )
    return missing is None


def scatter_by_torch(k: torch.Tensor, v: torch.Tensor, pool: KVPool, slots: torch.Tensor) -> None:
    """Write k and v to their slots, of which negative ones are left out."""
    slots, page_tokens = slots.long(), pool.k.shape[1]
    # A token without a slot writes what the first one with a slot writes, to the same place: so no
    # mask has to be counted on the host. Where none has one, the place keeps what it holds.
    held = slots >= 0
    first = held.int().argmax()[None]  # an index that compilers need not know
    place = torch.where(held, slots, slots[first].clamp(min=0))
    page, row = place // page_tokens, place % page_tokens
    any_held = held.any()
    for new, pages, scale in ((k, pool.k, pool.k_scale), (v, pool.v, pool.v_scale)):
        values = stored(torch.where(held[:, None, None], new, new[first]), pages.dtype, scale)
        if pages.dtype in FP8_DTYPES:  # of which not every device scatters anything but the bytes
            values, pages = values.view(torch.uint8), pages.view(torch.uint8)
        pages[page, row] = torch.where(any_held, values, pages[page, row])


def stored(x: torch.Tensor, dtype: torch.dtype, scale: torch.Tensor | None) -> torch.Tensor:
    """What pages of this dtype hold of x [tokens, num_kv_heads, columns]."""
    if scale is not None:
        x = x.float() / scale.expand(x.shape[1])[:, None]
    if dtype in FP8_DTYPES:  # which not every cast saturates; a NaN passes the clamp
        most = torch.finfo(dtype).max
        x = x.float().clamp(-most, most)
    return x.to(dtype)


def _check_tokens(k: torch.Tensor, v: torch.Tensor, pool: KVPool) -> None:
    k_pages, v_pages, k_scale, v_scale = pool
    for name, value in (("k", k), ("v", v)):
        validate.tensor(name, value, dtypes=validate.FLOAT_DTYPES, ndim=3)
    kv_checks.page_dtypes(k_pages, v_pages)
    validate.readable(k=k, v=v, k_pages=k_pages, v_pages=v_pages)
    validate.same_dtype("k_pages", k_pages, v_pages=v_pages)
    validate.same_device("k", k, v=v, k_pages=k_pages, v_pages=v_pages)
    validate.no_grad(k=k, v=v)
    if v_pages.shape[:3] != k_pages.shape[:3]:
        raise ValueError(
            f"v_pages must have the pages, tokens and heads of k_pages {tuple(k_pages.shape[:3])}, "
            f"got {tuple(v_pages.shape[:3])}"
        )
    if v.shape[0] != k.shape[0]:
        raise ValueError(f"v must have the tokens of k ({k.shape[0]}), got {v.shape[0]}")
    for name, new, pages in (("k", k, k_pages), ("v", v, v_pages)):
        if new.shape[1:] != pages.shape[2:]:
            raise ValueError(
                f"{name} must be [new_tokens, *{tuple(pages.shape[2:])}] as {name}_pages has heads "
                f"and dims, got {tuple(new.shape)}"
            )
    kv_checks.scales("k", k, k_pages, k_scale=k_scale, v_scale=v_scale)


def _slots(
    new_tokens: int,
    page_tokens: int,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    q_lens: torch.Tensor | Sequence[int] | None,
) -> torch.Tensor:
    """[new_tokens] int64: slots of each sequence's last tokens; -1 for tokens of no sequence."""
    validate.tensor("page_table", page_table, dtypes=validate.INT_DTYPES, ndim=2)
    validate.tensor("seq_lens", seq_lens, dtypes=validate.INT_DTYPES, ndim=1)
    batch, device = page_table.shape[0], page_table.device
    if q_lens is None:
        q_lens = torch.ones(batch, dtype=torch.int64, device=device)
    elif not isinstance(q_lens, torch.Tensor):
        q_lens = torch.tensor(validate.int_list("q_lens", q_lens), device=device)
    validate.tensor("q_lens", q_lens, dtypes=validate.INT_DTYPES, ndim=1)
    validate.same_device("page_table", page_table, seq_lens=seq_lens, q_lens=q_lens)
    if not batch == seq_lens.numel() == q_lens.numel():
        raise ValueError(
            f"seq_lens and q_lens must have one length per row of page_table ({batch}), got "
            f"{seq_lens.numel()} and {q_lens.numel()}"
        )
    if device.type == "cpu":
        _check_lengths(new_tokens, page_tokens, page_table, seq_lens, q_lens)
    ends = q_lens.long().cumsum(0)
    token = torch.arange(new_tokens, device=device)
    row = torch.searchsorted(ends, token, right=True)
    known = row < batch
    row = row.clamp(max=max(batch - 1, 0))
    if batch == 0:
        return torch.full((new_tokens,), -1, dtype=torch.int64, device=device)
    position = seq_lens.long()[row] - ends[row] + token
    column = (position // page_tokens).clamp(0, max(page_table.shape[1] - 1, 0))
    slot = page_table[row, column].long() * page_tokens + position % page_tokens
    return torch.where(known & (position >= 0), slot, -1)


def _check_lengths(
    new_tokens: int,
    page_tokens: int,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    q_lens: torch.Tensor,
) -> None:
    total = int(q_lens.sum())
    if total != new_tokens or (q_lens.numel() and int(q_lens.min()) < 0):
        raise ValueError(
            f"q_lens must be at least 0 and add up to the tokens of k ({new_tokens}), got "
            f"{q_lens.tolist()}"
        )
    room = page_table.shape[1] * page_tokens
    wrong = (seq_lens < q_lens) | (seq_lens > room)
    if bool(wrong.any()):
        row = validate.first_index(wrong)
        raise ValueError(
            f"seq_lens[{row}] must be at least q_lens[{row}] ({int(q_lens[row])}), since it counts "
            f"the new tokens, and at most {room} (columns of page_table * page_tokens), got "
            f"{int(seq_lens[row])}"
        )
    used = torch.arange(page_table.shape[1]) < -(-seq_lens[:, None] // page_tokens)
    validate.page_ids("page_table", page_table[used], None)
