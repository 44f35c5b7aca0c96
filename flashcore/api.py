"""`attention` and `paged_attention`: check the arguments, then hand them to the device's path."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor, is_grad_enabled
from torch.compiler import is_dynamo_compiling

from flashcore import checks, names, ops, validate
from flashcore.checks import Window
from flashcore.dispatch import Impl
from flashcore.eager.dense import dense_attention
from flashcore.eager.paged import paged_attention as eager_paged_attention
from flashcore.one_off import plan_once, refuse_tables
from flashcore.planner.device_plan import DevicePlan
from flashcore.planner.types import Plan
from flashcore.problem import Extras, KVPool, Packing, Tables
from flashcore.remembered import Remembered


@overload
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = ...,
    scale: float | None = ...,
    window: Window | None = ...,
    softcap: float = ...,
    sinks: torch.Tensor | None = ...,
    cu_seqlens_q: torch.Tensor | None = ...,
    cu_seqlens_k: torch.Tensor | None = ...,
    max_seqlen_q: int | None = ...,
    return_lse: Literal[False] = ...,
    impl: Impl | None = ...,
) -> torch.Tensor: ...
@overload
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = ...,
    scale: float | None = ...,
    window: Window | None = ...,
    softcap: float = ...,
    sinks: torch.Tensor | None = ...,
    cu_seqlens_q: torch.Tensor | None = ...,
    cu_seqlens_k: torch.Tensor | None = ...,
    max_seqlen_q: int | None = ...,
    return_lse: Literal[True],
    impl: Impl | None = ...,
) -> tuple[torch.Tensor, torch.Tensor]: ...
@names.needs("q", "k", "v")
def attention(
    q: torch.Tensor = names.MISSING,
    k: torch.Tensor = names.MISSING,
    v: torch.Tensor = names.MISSING,
    *,
    causal: bool = False,
    scale: float | None = None,
    window: Window | None = None,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    return_lse: bool = False,
    impl: Impl | None = None,
    **unknown: Any,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Dense attention: softmax(scale * q k^T) v, exactly as `flashcore.reference` states it.

    Args:
        q: [batch, seqlen_q, num_q_heads, head_dim], or packed [total_q, num_q_heads, head_dim] with
            cu_seqlens. fp32, bf16 or fp16; softmax and accumulation are fp32.
        k, v: [batch, seqlen_k, num_kv_heads, head_dim] or [total_k, num_kv_heads, head_dim], dtype
            as q. num_q_heads is a multiple of num_kv_heads (MHA, GQA, MQA). Strides are free but
            for the last axis, which is contiguous.
        causal: query i sees key j iff j <= i + seqlen_k - seqlen_q (aligned bottom-right).
        scale: of the scores, above 0; 1 / sqrt(head_dim) by default.
        window: (left, right), keys from i - left to i + right in the same alignment; -1 does not
            bind, nor does 2**31 - 1 or more.
        softcap: scores become softcap * tanh(score / softcap); 0 is off.
        sinks: [num_q_heads], a logit per head that joins the softmax's sum with no value.
        cu_seqlens_q, cu_seqlens_k: int32 [batch + 1], ends of the packed sequences, 0 first.
        max_seqlen_q: at least the longest packed query sequence, where the caller knows it. It
            saves empty tiles on a GPU, where a smaller number leaves rows out of the result (the
            CPU can check it without waiting, and does).
        return_lse: also return the natural log of the softmax's sum, sinks included.
        impl: "auto" takes our kernels on a CUDA device, and torch operators on others, such as the
            CPU. "eager" takes torch operators on any device, for what kernels do not serve and for
            comparison: they are slow. None: what the environment variable FLASHCORE_IMPL says at
            the program's first call, "auto" where it is not set.

    Returns:
        out like q, and with return_lse also lse fp32 [batch, seqlen_q, num_q_heads] or
        [total_q, num_q_heads]. A query that sees no key gives zeros and -inf (its sink, if any).

    Raises:
        TypeError, ValueError: naming the argument, what it is and what it may be.
        NotImplementedError: on a CUDA device without kernels, or of what they do not take, unless
            impl asks for torch operators.
    """
    if unknown:
        raise names.unexpected(attention, unknown)
    key = None
    if not is_dynamo_compiling() and type(q) is Tensor:
        try:
            key = (
                q.shape,
                k.shape,
                q.dtype,
                q.get_device(),
                causal,
                scale,
                window,
                softcap,
                max_seqlen_q,
                return_lse,
                impl,
                None if sinks is None else (sinks.dtype, sinks.shape),
                None if cu_seqlens_q is None else cu_seqlens_q.shape,
            )
            launch = _dense_launches.get(key)
            if launch is not None and not (is_grad_enabled() and _wants_gradient(q, k, v, sinks)):
                out, lse = launch(q, k, v, sinks, cu_seqlens_q, cu_seqlens_k)
                return (out, lse) if return_lse else out
        except _REFUSED:  # the checks below, or the same launch there, say what is wrong
            pass
    checks.impl(impl)
    packing = checks.dense(q, k, v, sinks, Packing(cu_seqlens_q, cu_seqlens_k, max_seqlen_q))
    rules = checks.rules(scale, q.shape[-1], causal, window, softcap)
    validate.flag("return_lse", return_lse)
    if checks.traced(q):
        out, lse = ops.attention_op(q, k, v, *rules, sinks, *packing, return_lse, impl)
        return (out, lse) if return_lse else out
    launch = ops.attention_launch(q, k, v, rules, sinks, packing, return_lse, impl)
    if launch is None:
        out, lse = dense_attention(q, k, v, rules, sinks, packing)
    else:
        options = (causal, scale, window, softcap, max_seqlen_q, return_lse)
        if key is not None and launch.reusable and _all_plain(options):
            _dense_launches.remember(key, launch)
        out, lse = launch(q, k, v, sinks, cu_seqlens_q, cu_seqlens_k)
    return (out, lse) if return_lse else out


@overload
def paged_attention(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    plan: Plan | DevicePlan | None = ...,
    *,
    page_table: torch.Tensor | None = ...,
    seq_lens: torch.Tensor | None = ...,
    cu_seqlens_q: torch.Tensor | None = ...,
    scale: float | None = ...,
    causal: bool = ...,
    window: Window | None = ...,
    softcap: float = ...,
    sinks: torch.Tensor | None = ...,
    k_scale: torch.Tensor | None = ...,
    v_scale: torch.Tensor | None = ...,
    tree_mask: torch.Tensor | None = ...,
    tree_positions: torch.Tensor | None = ...,
    out: torch.Tensor | None = ...,
    return_lse: Literal[False] = ...,
    impl: Impl | None = ...,
) -> torch.Tensor: ...
@overload
def paged_attention(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    plan: Plan | DevicePlan | None = ...,
    *,
    page_table: torch.Tensor | None = ...,
    seq_lens: torch.Tensor | None = ...,
    cu_seqlens_q: torch.Tensor | None = ...,
    scale: float | None = ...,
    causal: bool = ...,
    window: Window | None = ...,
    softcap: float = ...,
    sinks: torch.Tensor | None = ...,
    k_scale: torch.Tensor | None = ...,
    v_scale: torch.Tensor | None = ...,
    tree_mask: torch.Tensor | None = ...,
    tree_positions: torch.Tensor | None = ...,
    out: torch.Tensor | None = ...,
    return_lse: Literal[True],
    impl: Impl | None = ...,
) -> tuple[torch.Tensor, torch.Tensor]: ...
@names.needs("q", "k_pages", "v_pages")
def paged_attention(
    q: torch.Tensor = names.MISSING,
    k_pages: torch.Tensor = names.MISSING,
    v_pages: torch.Tensor = names.MISSING,
    plan: Plan | DevicePlan | None = None,
    *,
    page_table: torch.Tensor | None = None,
    seq_lens: torch.Tensor | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    scale: float | None = None,
    causal: bool = True,
    window: Window | None = None,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    tree_mask: torch.Tensor | None = None,
    tree_positions: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    return_lse: bool = False,
    impl: Impl | None = None,
    **unknown: Any,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention of a batch over a paged KV cache; each run of shared pages is read once.

    Decode (q_len 1), prefill, chunked prefill on a cached prefix and speculative verify may stand
    in one batch: the queries of a sequence are its last q_len tokens, whose K and V are in the
    cache already. Meaning: `flashcore.reference.paged_attention_reference`.

    A plan serves every layer of its batch. Given page_table and seq_lens instead, the call makes
    one for itself and throws it away: right for a single layer or a try, slow in a model, since
    each call waits for the device and plans anew.

    Args:
        q: [total_q, num_q_heads, head_dim], sequence after sequence as in the plan's q_lens. fp32,
            bf16 or fp16; softmax and accumulation are fp32.
        k_pages: [num_pages, page_tokens, num_kv_heads, head_dim], dtype as q, or float8_e4m3fn or
            float8_e5m2 with q in bf16 or fp16; any strides with a contiguous last axis, so a
            [num_pages, num_kv_heads, page_tokens, head_dim] cache is passed as `.transpose(1, 2)`.
        v_pages: the same with v_head_dim columns, as many as head_dim or fewer; dtype as k_pages.
        plan: from `flashcore.plan` or from `flashcore.DevicePlanner.update`, on q's device. With
            the latter, q may have more rows than the plan has query tokens, as a batch padded for a
            CUDA graph has. Rows of sequences that could not be planned come out as NaN; so do all
            rows where q or the tree mask is too small for the plan. Keep it alive while a CUDA
            graph that holds the call is in use: its buffers are the graph's.
        page_table, seq_lens: in place of a plan, as in `flashcore.layout_from_page_table`: int32 or
            int64 [batch, max_pages] and [batch], new tokens included.
        cu_seqlens_q: with these, [batch + 1] int32 or int64 ends of the sequences' rows in q, 0
            first; None: one row each (decode).
        scale, window, softcap, sinks: as in `attention`; a window counts from the query's position,
            and under a tree mask by depth.
        k_scale, v_scale: with fp8 pages, fp32 tensors on q's device, () or [num_kv_heads]: K is
            what its pages hold times k_scale, V likewise; None is 1. They are read on the device
            at each call, which nothing waits for. k_scale counts in the scores before the softcap,
            and so in the LSE.
        causal: query t of a sequence sees keys 0 .. kv_len - q_len + t.
        tree_mask: bool [total_q, width], width at least the longest q_len: among its sequence's own
            new tokens, query t sees token j iff tree_mask[t, j]; the cached ones are all visible.
            It takes the place of `causal`, and of the window's right bound.
        tree_positions: int32 [total_q], with a tree mask: where each query token stands in its
            sequence, as engines have it in their `positions`. Only differences to the sequence's
            first new token count, which is the root and stands right after the cached ones; they
            are depths in the tree, from 0 to width - 1. A window counts by them, for queries and
            for keys. Without them a token stands at the number of new tokens that its row of the
            mask allows: the same where rows hold all ancestors and the token itself, as those of
            draft trees do, and some small launches more for each call on a GPU. They are neither
            needed nor read without a window.
        out: [total_q, num_q_heads, v_head_dim] in q's dtype, to write the result to.
        return_lse: also return the natural log of the softmax's sum, sinks included.
        impl: as in `attention`; a DevicePlan is read by kernels alone.

    Returns:
        out [total_q, num_q_heads, v_head_dim] in q's dtype, and with return_lse also lse fp32
        [total_q, num_q_heads]. A query that sees no key gives zeros and -inf (its sink, if any); so
        do rows of q past a DevicePlan's last query token.

    Raises:
        TypeError, ValueError: naming the argument, what it is and what it may be.
        NotImplementedError: as in `attention`; a DevicePlan under torch.compile or without our
            kernels.
    """
    if unknown:
        raise names.unexpected(paged_attention, unknown)
    if not isinstance(plan, (Plan, DevicePlan)):
        tables = Tables(page_table, seq_lens, cu_seqlens_q)
        plan = plan_once(q, KVPool(k_pages, v_pages), plan, tables)
    elif page_table is not None or seq_lens is not None or cu_seqlens_q is not None:
        refuse_tables(Tables(page_table, seq_lens, cu_seqlens_q))
    key = None
    if not is_dynamo_compiling() and type(q) is Tensor:
        try:
            key = (
                q.shape,
                k_pages.shape,
                q.dtype,
                k_pages.dtype,
                q.get_device(),
                causal,
                scale,
                window,
                softcap,
                return_lse,
                impl,
                out is None,
                None if sinks is None else (sinks.dtype, sinks.shape),
                None if k_scale is None else k_scale.shape,
                None if v_scale is None else v_scale.shape,
                None if tree_mask is None else (tree_mask.dtype, tree_mask.shape),
                None if tree_positions is None else (tree_positions.dtype, tree_positions.shape),
            )
            launch = plan.launches.get(key)
            if launch is not None and not (
                is_grad_enabled() and _wants_gradient(q, k_pages, v_pages, sinks)
            ):
                kv = (k_pages, v_pages, k_scale, v_scale)
                result, lse = launch(q, kv, (sinks, tree_mask, tree_positions), out)
                return (result, lse) if return_lse else result
        except _REFUSED:  # the checks below, or the same launch there, say what is wrong
            pass
    checks.impl(impl)
    pool = KVPool(k_pages, v_pages, k_scale, v_scale)
    extras = Extras(sinks, tree_mask, tree_positions)
    checks.paged(q, pool, plan, extras, out)
    rules = checks.rules(scale, q.shape[-1], causal, window, softcap)
    validate.flag("return_lse", return_lse)
    if checks.traced(q):
        if isinstance(plan, DevicePlan):
            raise NotImplementedError(
                "plan is a flashcore.DevicePlan, which torch.compile and torch.export cannot "
                "trace; keep the call out of the traced region (torch.compiler.disable) or use "
                "flashcore.plan"
            )
        result, lse = ops.paged_attention_op(
            q, *pool, *plan.tensors, *plan.numbers, *rules, *extras, impl
        )
        if out is not None:
            result = out.copy_(result)
        return (result, lse) if return_lse else result
    launch = ops.plan_launch(q, pool, plan, rules, extras, out, return_lse, impl)
    if launch is None:
        result, lse = eager_paged_attention(q, pool, plan.planned, rules, extras)
        if out is not None:
            result = out.copy_(result)
    else:
        options = (causal, scale, window, softcap, return_lse)
        if key is not None and launch.reusable and _all_plain(options):
            plan.launches.remember(key, launch)
        result, lse = launch(q, pool, extras, out)
    return (result, lse) if return_lse else result


# Launches of calls that passed every check. A key is what the choice of the launch depends on; that
# the other tensors' dtypes, shapes, strides, addresses and devices agree is checked by the compiled
# function itself. Checks of the contents of a tensor are made on the CPU alone, where no launch is
# remembered. An index is device enough: the CPU's is -1, and torch supports one kind of accelerator
# in a process.
_dense_launches = Remembered(4096)

# What that check raises (TypeError, ValueError), torch where a tensor cannot be handed over
# (RuntimeError, BufferError), and the making of a key from what is no tensor (AttributeError) or
# cannot be one (TypeError). Launches that fail raise RuntimeError, here and then again.
_REFUSED = (AttributeError, BufferError, RuntimeError, TypeError, ValueError)


def _wants_gradient(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None
) -> bool:
    return (
        q.requires_grad
        or k.requires_grad
        or v.requires_grad
        or (sinks is not None and sinks.requires_grad)
    )


def _all_plain(options: tuple[Any, ...]) -> bool:
    """No option is an object that can change and keep its hash, such as a tensor."""
    return all(x is None or isinstance(x, (bool, int, float, tuple)) for x in options)
