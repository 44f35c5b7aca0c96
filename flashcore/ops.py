"""The torch custom operators flashcore::attention and flashcore::paged_attention.

They take plain tensors and numbers that `api` has checked, so that torch.compile and torch.export
see one node each with a known output shape. `api` calls the functions behind them directly when
nothing is being traced, which saves the dispatcher's share of a launch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from flashcore.dispatch import device_path
from flashcore.eager.dense import dense_attention
from flashcore.eager.paged import paged_attention as eager_paged_attention
from flashcore.eager.run import Rules
from flashcore.planner.device_plan import DevicePlan
from flashcore.planner.types import Plan

if TYPE_CHECKING:
    from flashcore.sm90.launch.dense import DenseLaunch
    from flashcore.sm90.launch.paged import PagedLaunch


def attention_launch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    causal: bool,
    window_left: int,
    window_right: int,
    softcap: float,
    sinks: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    max_seqlen_q: int,
    return_lse: bool,
) -> DenseLaunch | None:
    """The launch that `attention_impl` would make of these arguments; None off Hopper."""
    if device_path(q.device).name != "hopper":
        return None
    from flashcore.sm90.launch.dense import dense_launch

    return dense_launch(
        q,
        k,
        v,
        causal=causal,
        scale=scale,
        window_left=window_left,
        window_right=window_right,
        softcap=softcap,
        has_sinks=sinks is not None,
        batch=None if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1,
        max_seqlen_q=max_seqlen_q,
        return_lse=return_lse,
    )


def attention_impl(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    causal: bool,
    window_left: int,
    window_right: int,
    softcap: float,
    sinks: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    max_seqlen_q: int,
    return_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """out as q, and the LSE, which is empty where it was not asked for."""
    launch = attention_launch(
        q,
        k,
        v,
        scale,
        causal,
        window_left,
        window_right,
        softcap,
        sinks,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        return_lse,
    )
    if launch is not None:
        out, lse = launch(q, k, v, sinks, cu_seqlens_q, cu_seqlens_k)
    else:
        rules = Rules(scale, causal, window_left, window_right, softcap)
        out, lse = dense_attention(q, k, v, rules, sinks, cu_seqlens_q, cu_seqlens_k)
    if not return_lse or lse is None:
        return out, q.new_empty(0, dtype=torch.float32)
    return out, lse


def paged_attention_impl(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    cols: torch.Tensor,
    groups: torch.Tensor,
    q_tokens: torch.Tensor,
    q_positions: torch.Tensor,
    q_index: torch.Tensor,
    work: torch.Tensor,
    merge_offsets: torch.Tensor,
    merge_partials: torch.Tensor,
    num_partial_tokens: int,
    needs_merge: bool,
    tile_m: int,
    batch_invariant: bool,
    scale: float,
    causal: bool,
    window_left: int,
    window_right: int,
    softcap: float,
    sinks: torch.Tensor | None,
    tree_mask: torch.Tensor | None,
    tree_positions: torch.Tensor | None,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """out [total_q, num_q_heads, v_head_dim], and the LSE [total_q, num_q_heads]."""
    if device_path(q.device).name == "hopper":
        from flashcore.sm90.launch.paged import paged_attention

        return paged_attention(
            q,
            k_pages,
            v_pages,
            cols,
            work,
            q_tokens,
            q_positions,
            q_index,
            merge_offsets,
            merge_partials,
            num_partial_tokens,
            needs_merge,
            tile_m,
            batch_invariant=batch_invariant,
            causal=causal,
            scale=scale,
            window_left=window_left,
            window_right=window_right,
            softcap=softcap,
            sinks=sinks,
            tree_mask=tree_mask,
            tree_positions=tree_positions,
            out=out,
        )
    result, lse = eager_paged_attention(
        q,
        k_pages,
        v_pages,
        cols,
        groups,
        q_tokens,
        q_positions,
        q_index,
        merge_offsets,
        merge_partials,
        num_partial_tokens,
        Rules(scale, causal, window_left, window_right, softcap),
        sinks,
        tree_mask,
        tree_positions,
    )
    return (result, lse) if out is None else (out.copy_(result), lse)


def plan_launch(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    plan: Plan | DevicePlan,
    scale: float,
    causal: bool,
    window_left: int,
    window_right: int,
    softcap: float,
    sinks: torch.Tensor | None,
    tree_mask: torch.Tensor | None,
    out: torch.Tensor | None,
    return_lse: bool,
) -> PagedLaunch | None:
    """The launches that `paged_attention_impl` would make of these arguments; None off Hopper.

    Of a DevicePlan all that there is to do is read on the device, which needs one.
    """
    path = device_path(q.device)
    if path.name != "hopper":
        if isinstance(plan, DevicePlan):
            raise NotImplementedError(
                f"plan is a flashcore.DevicePlan, which only the Hopper kernels read: "
                f"{path.reason}; use flashcore.plan"
            )
        return None
    from flashcore.sm90.launch.paged import paged_launch

    counts, workspace = None, None
    if isinstance(plan, DevicePlan):
        counts, workspace = plan.counts, (plan.partial_out, plan.partial_lse, plan.counter)
        num_partials, needs_merge = plan.partial_lse.shape[0], True
    else:
        num_partials, needs_merge = plan.num_partial_tokens, plan.needs_merge
    return paged_launch(
        q,
        k_pages,
        v_pages,
        plan.cols,
        plan.work,
        plan.q_tokens,
        plan.q_positions,
        plan.q_index,
        plan.merge_offsets,
        plan.merge_partials,
        num_partials,
        needs_merge,
        plan.tile_m,
        batch_invariant=plan.batch_invariant,
        causal=causal,
        scale=scale,
        window_left=window_left,
        window_right=window_right,
        softcap=softcap,
        has_sinks=sinks is not None,
        has_tree_mask=tree_mask is not None,
        counts=counts,
        workspace=workspace,
        out=out,
        return_lse=return_lse,
    )


attention_op = torch.library.custom_op(
    "flashcore::attention", attention_impl, mutates_args=(), device_types=None
)


@attention_op.register_fake
def _attention_fake(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    causal: bool,
    window_left: int,
    window_right: int,
    softcap: float,
    sinks: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    max_seqlen_q: int,
    return_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    shape = q.shape[:-1] if return_lse else (0,)
    return q.new_empty(q.shape), q.new_empty(shape, dtype=torch.float32)


def _paged_attention_fake(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    cols: torch.Tensor,
    groups: torch.Tensor,
    q_tokens: torch.Tensor,
    q_positions: torch.Tensor,
    q_index: torch.Tensor,
    work: torch.Tensor,
    merge_offsets: torch.Tensor,
    merge_partials: torch.Tensor,
    num_partial_tokens: int,
    needs_merge: bool,
    tile_m: int,
    batch_invariant: bool,
    scale: float,
    causal: bool,
    window_left: int,
    window_right: int,
    softcap: float,
    sinks: torch.Tensor | None,
    tree_mask: torch.Tensor | None,
    tree_positions: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    rows = q.shape[:-1]
    return q.new_empty(*rows, v_pages.shape[-1]), q.new_empty(rows, dtype=torch.float32)


# The operator allocates its result: only the direct call has `out`.
paged_attention_op = torch.library.custom_op(
    "flashcore::paged_attention",
    paged_attention_impl,
    mutates_args=(),
    device_types=None,
    schema=torch.library.infer_schema(_paged_attention_fake, mutates_args=()),
)
paged_attention_op.register_fake(_paged_attention_fake)
