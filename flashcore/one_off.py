"""A plan for a single call of `paged_attention`, made inside it from a page table and lengths."""

from __future__ import annotations

import torch

from flashcore import checks, kv_checks, validate
from flashcore.pager.csr import layout_from_page_table
from flashcore.planner.build import plan
from flashcore.planner.types import Plan
from flashcore.problem import KVPool, Tables


def plan_once(q: torch.Tensor, kv: KVPool, given: object, tables: Tables) -> Plan:
    """The plan of one call; given: what stands in the place of a plan, None if all is right."""
    if given is not None:
        raise TypeError(
            f"plan must be a flashcore.Plan or a flashcore.DevicePlan, got {type(given).__name__}"
        )
    page_table, seq_lens, cu_seqlens_q = tables
    if page_table is None or seq_lens is None:
        raise ValueError(
            "paged_attention needs a plan, or page_table and seq_lens to plan this one call"
        )
    _check_shapes(q, kv)
    validate.tensor("page_table", page_table, dtypes=validate.INT_DTYPES, ndim=2)
    validate.same_device("q", q, **tables._asdict())
    if checks.traced(q):
        raise NotImplementedError(
            "page_table: a plan made inside the call cannot be traced by torch.compile and "
            "torch.export; make it before with flashcore.plan"
        )
    if q.is_cuda and torch.cuda.is_current_stream_capturing():
        raise NotImplementedError(
            "page_table: a plan made inside the call waits for the device, which a CUDA graph "
            "cannot hold; use flashcore.DevicePlanner"
        )
    k_pages, v_pages = kv.k, kv.v
    page_tokens, num_pages = k_pages.shape[1], k_pages.shape[0] or None
    layout = layout_from_page_table(
        page_table, seq_lens, page_tokens=page_tokens, num_pages=num_pages
    )
    return plan(
        layout,
        q_lens=_query_lengths(q, page_table, cu_seqlens_q),
        num_q_heads=q.shape[1],
        num_kv_heads=k_pages.shape[2],
        head_dim=q.shape[2],
        v_head_dim=v_pages.shape[3],
        dtype=k_pages.dtype,
    )


def refuse_tables(tables: Tables) -> None:
    """With a plan of the caller's they would be passed over."""
    for name, value in tables._asdict().items():
        if value is not None:
            raise ValueError(f"{name} goes without a plan, which has its own; give one of them")


def _check_shapes(q: torch.Tensor, kv: KVPool) -> None:
    """What the plan is made for, by the names of the call."""
    validate.tensor("q", q, dtypes=validate.FLOAT_DTYPES, ndim=3)
    kv_checks.page_dtypes(kv.k, kv.v)
    tokens, heads, head_dim = kv.k.shape[1:]
    if min(tokens, heads, head_dim) < 1:
        raise ValueError(
            "k_pages must have at least one token a page, one head and one column, got "
            f"{tuple(kv.k.shape)}"
        )
    if q.shape[1] < 1 or q.shape[1] % heads or q.shape[2] != head_dim:
        raise ValueError(
            f"q must have heads in a multiple of k_pages' ({heads}) and its head_dim ({head_dim}), "
            f"got {tuple(q.shape)}"
        )
    if kv.v.shape[:3] != kv.k.shape[:3] or not 1 <= kv.v.shape[3] <= head_dim:
        raise ValueError(
            "v_pages must have the pages, tokens and heads of k_pages and at most its columns "
            f"{tuple(kv.k.shape)}, got {tuple(kv.v.shape)}"
        )


def _query_lengths(
    q: torch.Tensor, page_table: torch.Tensor, cu_seqlens_q: torch.Tensor | None
) -> torch.Tensor | None:
    batch = len(page_table)
    if cu_seqlens_q is None:
        if len(q) != batch:
            raise ValueError(
                f"q must have a row for each of the {batch} rows of page_table where cu_seqlens_q "
                f"is not given, got {len(q)}"
            )
        return None
    validate.readable(cu_seqlens_q=cu_seqlens_q)
    ends = cu_seqlens_q.cpu()  # a plan waits for the device anyway
    lengths = validate.lengths_of("cu_seqlens_q", ends, "rows of page_table", batch)
    if int(ends[-1]) != len(q):
        raise ValueError(
            f"cu_seqlens_q must end with the rows of q ({len(q)}), got {int(ends[-1])}"
        )
    return lengths.to(q.device)
