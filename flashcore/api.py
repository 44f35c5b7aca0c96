"""`attention` and `paged_attention`: check the arguments, then hand them to the device's path."""

from __future__ import annotations

import math
from typing import Any, Literal, overload

import torch
from torch import is_grad_enabled
from torch.compiler import is_dynamo_compiling

from flashcore import ops, validate
from flashcore.planner.device_plan import DevicePlan
from flashcore.planner.types import Plan
from flashcore.remembered import Remembered

Window = tuple[int, int]


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
) -> tuple[torch.Tensor, torch.Tensor]: ...
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
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

    Returns:
        out like q, and with return_lse also lse fp32 [batch, seqlen_q, num_q_heads] or
        [total_q, num_q_heads]. A query that sees no key gives zeros and -inf (its sink, if any).

    Raises:
        TypeError, ValueError: naming the argument, what it is and what it may be.
    """
    key = None
    if not is_dynamo_compiling() and type(q) is torch.Tensor:
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
                None if sinks is None else (sinks.dtype, sinks.shape),
                None if cu_seqlens_q is None else cu_seqlens_q.shape,
            )
            launch = _dense_launches.get(key)
            if launch is not None and not (is_grad_enabled() and _wants_gradient(q, k, v, sinks)):
                out, lse = launch(q, k, v, sinks, cu_seqlens_q, cu_seqlens_k)
                return (out, lse) if return_lse else out
        except Exception:  # the checks below, or the same launch there, say what is wrong
            pass
    validate.tensor("q", q, dtypes=validate.FLOAT_DTYPES, ndim=(3, 4))
    for name, value in (("k", k), ("v", v)):
        validate.tensor(name, value, dtypes=validate.FLOAT_DTYPES, ndim=q.dim())
    validate.same_dtype("q", q, k=k, v=v)
    validate.same_device(
        "q", q, k=k, v=v, sinks=sinks, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k
    )
    validate.contiguous_last_axis(q=q, k=k, v=v)
    validate.no_grad(q=q, k=k, v=v, sinks=sinks)
    _check_dense_shapes(q, k, v)
    longest = _check_cu_seqlens(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q)
    left, right = _window(window)
    arguments = (
        q,
        k,
        v,
        _scale(scale, q.shape[-1]),
        bool(causal),
        left,
        right,
        _softcap(softcap),
        _sinks(sinks, q.shape[-2]),
        cu_seqlens_q,
        cu_seqlens_k,
        longest,
        return_lse,
    )
    launch = None if _traced(q) else ops.attention_launch(*arguments)
    if launch is not None:
        options = (causal, scale, window, softcap, max_seqlen_q, return_lse)
        if key is not None and launch.reusable and _all_plain(options):
            _dense_launches.remember(key, launch)
        out, lse = launch(q, k, v, sinks, cu_seqlens_q, cu_seqlens_k)
    else:
        out, lse = (ops.attention_op if _traced(q) else ops.attention_impl)(*arguments)
    return (out, lse) if return_lse else out


@overload
def paged_attention(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    plan: Plan | DevicePlan,
    *,
    scale: float | None = ...,
    causal: bool = ...,
    window: Window | None = ...,
    softcap: float = ...,
    sinks: torch.Tensor | None = ...,
    tree_mask: torch.Tensor | None = ...,
    tree_positions: torch.Tensor | None = ...,
    out: torch.Tensor | None = ...,
    return_lse: Literal[False] = ...,
) -> torch.Tensor: ...
@overload
def paged_attention(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    plan: Plan | DevicePlan,
    *,
    scale: float | None = ...,
    causal: bool = ...,
    window: Window | None = ...,
    softcap: float = ...,
    sinks: torch.Tensor | None = ...,
    tree_mask: torch.Tensor | None = ...,
    tree_positions: torch.Tensor | None = ...,
    out: torch.Tensor | None = ...,
    return_lse: Literal[True],
) -> tuple[torch.Tensor, torch.Tensor]: ...
def paged_attention(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    plan: Plan | DevicePlan,
    *,
    scale: float | None = None,
    causal: bool = True,
    window: Window | None = None,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    tree_mask: torch.Tensor | None = None,
    tree_positions: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention of a batch over a paged KV cache; each run of shared pages is read once.

    Decode (q_len 1), prefill, chunked prefill on a cached prefix and speculative verify may stand
    in
    one batch: the queries of a sequence are its last q_len tokens, whose K and V are in the cache
    already. Meaning: `flashcore.reference.paged_attention_reference`.

    Args:
        q: [total_q, num_q_heads, head_dim], sequence after sequence as in the plan's q_lens. fp32,
            bf16 or fp16; softmax and accumulation are fp32.
        k_pages: [num_pages, page_tokens, num_kv_heads, head_dim], dtype as q; any strides with a
            contiguous last axis, so a [num_pages, num_kv_heads, page_tokens, head_dim] cache is
            passed as `.transpose(1, 2)`.
        v_pages: the same with v_head_dim columns, as many as head_dim or fewer.
        plan: from `flashcore.plan` or from `flashcore.DevicePlanner.update`, on q's device. With
            the latter, q may have more rows than the plan has query tokens, as a batch padded for a
            CUDA graph has. Rows of sequences that could not be planned come out as NaN; so do all
            rows where q or the tree mask is too small for the plan.
        scale, window, softcap, sinks: as in `attention`; a window counts from the query's position,
            and under a tree mask by depth.
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

    Returns:
        out [total_q, num_q_heads, v_head_dim] in q's dtype, and with return_lse also lse fp32
        [total_q, num_q_heads]. A query that sees no key gives zeros and -inf (its sink, if any); so
        do rows of q past a DevicePlan's last query token.

    Raises:
        TypeError, ValueError: naming the argument, what it is and what it may be.
        NotImplementedError: a DevicePlan under torch.compile or without a Hopper GPU.
    """
    if not isinstance(plan, (Plan, DevicePlan)):
        raise TypeError(
            f"plan must be a flashcore.Plan or a flashcore.DevicePlan, got {type(plan).__name__}"
        )
    key = None
    if not is_dynamo_compiling() and type(q) is torch.Tensor:
        try:
            key = (
                q.shape,
                k_pages.shape,
                q.dtype,
                q.get_device(),
                causal,
                scale,
                window,
                softcap,
                return_lse,
                out is None,
                None if sinks is None else (sinks.dtype, sinks.shape),
                None if tree_mask is None else (tree_mask.dtype, tree_mask.shape),
                None if tree_positions is None else (tree_positions.dtype, tree_positions.shape),
            )
            launch = plan.launches.get(key)
            if launch is not None and not (
                is_grad_enabled() and _wants_gradient(q, k_pages, v_pages, sinks)
            ):
                result, lse = launch(q, k_pages, v_pages, sinks, tree_mask, tree_positions, out)
                return (result, lse) if return_lse else result
        except Exception:  # the checks below, or the same launch there, say what is wrong
            pass
    validate.tensor("q", q, dtypes=validate.FLOAT_DTYPES, ndim=3)
    for name, value in (("k_pages", k_pages), ("v_pages", v_pages)):
        validate.tensor(name, value, dtypes=validate.FLOAT_DTYPES, ndim=4)
    validate.same_dtype("q", q, k_pages=k_pages, v_pages=v_pages)
    validate.same_device(
        "q",
        q,
        k_pages=k_pages,
        v_pages=v_pages,
        plan=plan.cols,
        sinks=sinks,
        tree_mask=tree_mask,
        tree_positions=tree_positions,
        out=out,
    )
    validate.contiguous_last_axis(q=q, k_pages=k_pages, v_pages=v_pages)
    validate.no_grad(q=q, k_pages=k_pages, v_pages=v_pages, sinks=sinks)
    _check_paged_shapes(q, k_pages, v_pages, plan)
    if tree_mask is not None:
        _check_tree_mask(tree_mask, plan, len(q))
    if tree_positions is not None:
        _check_tree_positions(tree_positions, tree_mask, plan)
    if out is not None:
        _check_out(out, q, plan.v_head_dim)
    left, right = _window(window)
    rules = (_scale(scale, q.shape[-1]), bool(causal), left, right, _softcap(softcap))
    sinks = _sinks(sinks, q.shape[-2])
    if not _traced(q):
        launch = ops.plan_launch(
            q, k_pages, v_pages, plan, *rules, sinks, tree_mask, out, return_lse
        )
        if launch is not None:
            options = (causal, scale, window, softcap, return_lse)
            if key is not None and launch.reusable and _all_plain(options):
                plan.launches.remember(key, launch)
            result, lse = launch(q, k_pages, v_pages, sinks, tree_mask, tree_positions, out)
            return result if lse is None else (result, lse)
    elif isinstance(plan, DevicePlan):
        raise NotImplementedError(
            "plan is a flashcore.DevicePlan, which torch.compile and torch.export cannot "
            "trace; keep the call out of the traced region (torch.compiler.disable) or use "
            "flashcore.plan"
        )
    assert isinstance(plan, Plan)  # plan_launch has an answer to any other
    arguments = (
        q,
        k_pages,
        v_pages,
        plan.cols,
        plan.groups,
        plan.q_tokens,
        plan.q_positions,
        plan.q_index,
        plan.work,
        plan.merge_offsets,
        plan.merge_partials,
        plan.num_partial_tokens,
        plan.needs_merge,
        plan.tile_m,
        plan.batch_invariant,
        *rules,
        sinks,
        tree_mask,
        tree_positions,
    )
    if _traced(q):
        result, lse = ops.paged_attention_op(*arguments)
        if out is not None:
            result = out.copy_(result)
    else:
        result, lse = ops.paged_attention_impl(*arguments, out)
    return (result, lse) if return_lse else result


# Launches of calls that passed every check. A key is what the choice of the launch depends on; that
# the other tensors' dtypes, shapes, strides, addresses and devices agree is checked by the compiled
# function itself. Checks of the contents of a tensor are made on the CPU alone, where no launch is
# remembered. An index is device enough: the CPU's is -1, and torch supports one kind of accelerator
# in a process.
_dense_launches = Remembered(4096)


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


def _traced(q: torch.Tensor) -> bool:
    """Wrapped tensors (fake ones), and all under a compiler, go through the dispatcher."""
    return torch.compiler.is_compiling() or type(q) is not torch.Tensor


def _check_dense_shapes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    if k.shape != v.shape:
        raise ValueError(f"v must have the shape of k {tuple(k.shape)}, got {tuple(v.shape)}")
    if q.shape[-1] != k.shape[-1] or q.shape[-1] < 1:
        raise ValueError(
            f"k must have the head_dim of q ({q.shape[-1]}, at least 1), got {k.shape[-1]}"
        )
    validate.head_counts(q.shape[-2], k.shape[-2])
    if q.dim() == 4 and q.shape[0] != k.shape[0]:
        raise ValueError(f"k must have the batch size of q ({q.shape[0]}), got {k.shape[0]}")


def _check_cu_seqlens(
    q: torch.Tensor,
    k: torch.Tensor,
    cu_q: torch.Tensor | None,
    cu_k: torch.Tensor | None,
    max_seqlen_q: int | None,
) -> int:
    """The longest query sequence as far as the host knows it.

    The values are checked where that needs no waiting, which is on the CPU.
    """
    if q.dim() == 4:
        if cu_q is not None or cu_k is not None:
            raise ValueError("cu_seqlens_q and cu_seqlens_k go with packed q [total_q, heads, dim]")
        return q.shape[1]
    if cu_q is None or cu_k is None:
        raise ValueError("cu_seqlens_q and cu_seqlens_k are needed with packed q, k, v")
    for name, ends, total in (("cu_seqlens_q", cu_q, len(q)), ("cu_seqlens_k", cu_k, len(k))):
        validate.tensor(name, ends, dtypes=(torch.int32,), ndim=1)
        if ends.numel() < 1 or ends.numel() != cu_q.numel():
            raise ValueError(
                f"{name} must have batch + 1 elements like cu_seqlens_q ({cu_q.numel()}), "
                f"got {ends.numel()}"
            )
        if ends.device.type == "cpu" and not _traced(q):
            _check_ends(name, ends, total)
    if max_seqlen_q is not None:
        validate.positive_int("max_seqlen_q", max_seqlen_q)
        if cu_q.device.type == "cpu" and not _traced(q):
            longest = int(cu_q.diff().max()) if cu_q.numel() > 1 else 0
            if longest > max_seqlen_q:
                raise ValueError(
                    f"max_seqlen_q must be at least the longest sequence of cu_seqlens_q "
                    f"({longest}), got {max_seqlen_q}"
                )
        return max_seqlen_q
    return len(q)


def _check_ends(name: str, ends: torch.Tensor, total: int) -> None:
    first, last = int(ends[0]), int(ends[-1])
    if first != 0 or last != total:
        raise ValueError(
            f"{name} must go from 0 to {total} (the packed rows), got {first} to {last}"
        )
    if ends.numel() > 1 and int(ends.diff().min()) < 0:
        raise ValueError(f"{name} must not decrease, got {ends.tolist()}")


def _check_paged_shapes(
    q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, plan: Plan | DevicePlan
) -> None:
    total_q = plan.total_q if isinstance(plan, Plan) else len(q)
    expected = (total_q, plan.num_q_heads, plan.head_dim)
    if tuple(q.shape) != expected:
        raise ValueError(
            f"q must have the plan's [total_q, num_q_heads, head_dim] = {expected}, "
            f"got {tuple(q.shape)}"
        )
    for name, value, of_dim, dim in (
        ("k_pages", k_pages, "head_dim", plan.head_dim),
        ("v_pages", v_pages, "v_head_dim", plan.v_head_dim),
    ):
        if tuple(value.shape[1:]) != (plan.page_tokens, plan.num_kv_heads, dim):
            raise ValueError(
                f"{name} must have the plan's [num_pages, page_tokens, num_kv_heads, {of_dim}] = "
                f"[any, {plan.page_tokens}, {plan.num_kv_heads}, {dim}], got {tuple(value.shape)}"
            )
        if value.shape[0] < plan.num_pages:
            raise ValueError(
                f"{name} must have at least {plan.num_pages} pages, since the plan may use the "
                f"page id {plan.num_pages - 1}; got {value.shape[0]}"
            )


def _check_tree_mask(tree_mask: torch.Tensor, plan: Plan | DevicePlan, total_q: int) -> None:
    validate.tensor("tree_mask", tree_mask, dtypes=(torch.bool,), ndim=2)
    longest = plan.max_q_len if isinstance(plan, Plan) else 1
    if tree_mask.shape[0] != total_q or tree_mask.shape[1] < longest:
        raise ValueError(
            f"tree_mask must be [total_q, at least the longest q_len] = [{total_q}, "
            f">= {longest}], got {tuple(tree_mask.shape)}"
        )


def _check_tree_positions(
    tree_positions: torch.Tensor, tree_mask: torch.Tensor | None, plan: Plan | DevicePlan
) -> None:
    """The values are checked on the CPU, as those of `cu_seqlens_q` are."""
    validate.tensor("tree_positions", tree_positions, dtypes=(torch.int32,), ndim=1)
    if tree_mask is None:
        raise ValueError("tree_positions go with a tree_mask; without one the plan has positions")
    rows, width = tree_mask.shape
    if tree_positions.numel() != rows:
        raise ValueError(
            f"tree_positions must be [total_q] = [{rows}], got {tuple(tree_positions.shape)}"
        )
    on_host = tree_positions.device.type == "cpu" and isinstance(plan, Plan)
    if not on_host or _traced(tree_positions) or rows == 0:
        return
    first = tree_positions.long()[torch.arange(rows) - plan.q_index]
    low, high = (int(x) for x in torch.aminmax(tree_positions.long() - first))
    if low < 0 or high >= width:
        raise ValueError(
            f"tree_positions must be 0 to {width - 1} (the width of tree_mask, less 1) beyond that "
            f"of their sequence's first new token, got {low if low < 0 else high}"
        )


def _check_out(out: torch.Tensor, q: torch.Tensor, v_head_dim: int) -> None:
    validate.tensor("out", out, dtypes=(q.dtype,), ndim=3)
    expected = (*q.shape[:-1], v_head_dim)
    if tuple(out.shape) != expected:
        of = "the shape of q" if v_head_dim == q.shape[-1] else "[total_q, num_q_heads, v_head_dim]"
        raise ValueError(f"out must have {of} {expected}, got {tuple(out.shape)}")
    validate.contiguous_last_axis(out=out)


def _window(window: Window | None) -> Window:
    if window is None:
        return -1, -1
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        raise TypeError(f"window must be None or (left, right), got {window!r}")
    left, right = window
    for name, bound in (("left", left), ("right", right)):
        if isinstance(bound, bool) or not isinstance(bound, int) or bound < -1:
            raise ValueError(
                f"window {name} must be an int of at least -1 (no bound), got {bound!r}"
            )
    # No sequence is longer, and kernels take a bound in 32 bits.
    return (
        -1 if left >= validate.INT32_MAX else left,
        -1 if right >= validate.INT32_MAX else right,
    )


def _scale(scale: float | None, head_dim: int) -> float:
    if scale is None:
        return 1.0 / math.sqrt(head_dim)
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"scale must be finite and above 0, got {scale}")
    return float(scale)


def _softcap(softcap: float) -> float:
    if not (math.isfinite(softcap) and softcap >= 0):
        raise ValueError(f"softcap must be finite and at least 0 (off), got {softcap}")
    return float(softcap)


def _sinks(sinks: torch.Tensor | None, num_q_heads: int) -> torch.Tensor | None:
    if sinks is None:
        return None
    validate.tensor("sinks", sinks, dtypes=validate.FLOAT_DTYPES, ndim=1)
    if sinks.numel() != num_q_heads:
        raise ValueError(
            f"sinks must have one logit per query head ({num_q_heads}), got {sinks.numel()}"
        )
    return sinks
