"""What `api` checks of the arguments of attention; each failure is one error naming the argument.

Nothing here waits for an accelerator. Under a compiler and with fake tensors, shapes alone are
looked at.
"""

from __future__ import annotations

import math

import torch

from flashcore import kv_checks, validate
from flashcore.dispatch import wanted
from flashcore.planner.device_plan import DevicePlan
from flashcore.planner.types import Plan
from flashcore.problem import Extras, KVPool, Packing, Rules

Window = tuple[int, int]


def traced(q: torch.Tensor) -> bool:
    """Wrapped tensors (fake ones), and all under a compiler, go through the dispatcher."""
    return torch.compiler.is_compiling() or type(q) is not torch.Tensor


def impl(value: str | None) -> None:
    """The program's choice is not looked at, which compilers could not trace."""
    if value is not None:
        wanted(value)


def dense(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor | None,
    packing: Packing,
) -> Packing:
    """Check the tensors of `attention`; the packing with its longest query sequence."""
    validate.tensor("q", q, dtypes=validate.FLOAT_DTYPES, ndim=(3, 4))
    for name, value in (("k", k), ("v", v)):
        validate.tensor(name, value, dtypes=validate.FLOAT_DTYPES, ndim=q.dim())
    validate.same_dtype("q", q, k=k, v=v)
    validate.same_device(
        "q",
        q,
        k=k,
        v=v,
        sinks=sinks,
        cu_seqlens_q=packing.cu_seqlens_q,
        cu_seqlens_k=packing.cu_seqlens_k,
    )
    validate.contiguous_last_axis(q=q, k=k, v=v)
    validate.no_grad(q=q, k=k, v=v, sinks=sinks)
    _dense_shapes(q, k, v)
    packing = _packing(q, k, packing)
    _sinks(sinks, q.shape[-2])
    return packing


def paged(
    q: torch.Tensor,
    kv: KVPool,
    plan: Plan | DevicePlan,
    extras: Extras,
    out: torch.Tensor | None,
) -> None:
    """Check the tensors of `paged_attention` against its plan."""
    validate.tensor("q", q, dtypes=validate.FLOAT_DTYPES, ndim=3)
    k_pages, v_pages, k_scale, v_scale = kv
    kv_checks.page_dtypes(k_pages, v_pages)
    kv_checks.same_dtypes(q, k_pages, v_pages)
    validate.same_device(
        "q", q, k_pages=k_pages, v_pages=v_pages, plan=plan.cols, **extras._asdict(), out=out
    )
    validate.contiguous_last_axis(q=q, k_pages=k_pages, v_pages=v_pages)
    validate.no_grad(q=q, k_pages=k_pages, v_pages=v_pages, sinks=extras.sinks)
    _paged_shapes(q, k_pages, v_pages, plan)
    kv_checks.scales("q", q, k_pages, k_scale=k_scale, v_scale=v_scale)
    if extras.tree_mask is not None:
        _tree_mask(extras.tree_mask, plan, len(q))
    if extras.tree_positions is not None:
        _tree_positions(extras.tree_positions, extras.tree_mask, plan)
    if out is not None:
        _out(out, q, plan.v_head_dim)
    _sinks(extras.sinks, q.shape[-2])


def rules(
    scale: float | None, head_dim: int, causal: bool, window: Window | None, softcap: float
) -> Rules:
    """The rules of a call, checked."""
    bounds = _window(window)
    return Rules.of(
        _scale(scale, head_dim), validate.flag("causal", causal), bounds, _softcap(softcap)
    )


def _dense_shapes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    if k.shape != v.shape:
        raise ValueError(f"v must have the shape of k {tuple(k.shape)}, got {tuple(v.shape)}")
    if q.shape[-1] != k.shape[-1] or q.shape[-1] < 1:
        raise ValueError(
            f"k must have the head_dim of q ({q.shape[-1]}, at least 1), got {k.shape[-1]}"
        )
    validate.head_counts(q.shape[-2], k.shape[-2])
    if q.dim() == 4 and q.shape[0] != k.shape[0]:
        raise ValueError(f"k must have the batch size of q ({q.shape[0]}), got {k.shape[0]}")


def _packing(q: torch.Tensor, k: torch.Tensor, packing: Packing) -> Packing:
    """With the longest query sequence as far as the host knows it.

    The values are checked where that needs no waiting, which is on the CPU.
    """
    cu_q, cu_k, longest_q = packing
    if q.dim() == 4:
        if cu_q is not None or cu_k is not None:
            raise ValueError("cu_seqlens_q and cu_seqlens_k go with packed q [total_q, heads, dim]")
        return packing._replace(max_seqlen_q=q.shape[1])
    if cu_q is None or cu_k is None:
        raise ValueError("cu_seqlens_q and cu_seqlens_k are needed with packed q, k, v")
    for name, ends, total in (("cu_seqlens_q", cu_q, len(q)), ("cu_seqlens_k", cu_k, len(k))):
        validate.tensor(name, ends, dtypes=(torch.int32,), ndim=1)
        if ends.numel() < 1 or ends.numel() != cu_q.numel():
            raise ValueError(
                f"{name} must have batch + 1 elements like cu_seqlens_q ({cu_q.numel()}), "
                f"got {ends.numel()}"
            )
        if ends.device.type == "cpu" and not traced(q):
            _ends(name, ends, total)
    if longest_q is None:
        return packing._replace(max_seqlen_q=len(q))
    validate.positive_int("max_seqlen_q", longest_q)
    if cu_q.device.type == "cpu" and not traced(q):
        longest = int(cu_q.diff().max()) if cu_q.numel() > 1 else 0
        if longest > longest_q:
            raise ValueError(
                f"max_seqlen_q must be at least the longest sequence of cu_seqlens_q "
                f"({longest}), got {longest_q}"
            )
    return packing


def _ends(name: str, ends: torch.Tensor, total: int) -> None:
    first, last = int(ends[0]), int(ends[-1])
    if first != 0 or last != total:
        raise ValueError(
            f"{name} must go from 0 to {total} (the packed rows), got {first} to {last}"
        )
    if ends.numel() > 1 and int(ends.diff().min()) < 0:
        raise ValueError(f"{name} must not decrease, got {ends.tolist()}")


def _paged_shapes(
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


def _tree_mask(tree_mask: torch.Tensor, plan: Plan | DevicePlan, total_q: int) -> None:
    validate.tensor("tree_mask", tree_mask, dtypes=(torch.bool,), ndim=2)
    longest = plan.max_q_len if isinstance(plan, Plan) else 1
    if tree_mask.shape[0] != total_q or tree_mask.shape[1] < longest:
        raise ValueError(
            f"tree_mask must be [total_q, at least the longest q_len] = [{total_q}, "
            f">= {longest}], got {tuple(tree_mask.shape)}"
        )


def _tree_positions(
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
    if not on_host or traced(tree_positions) or rows == 0:
        return
    first = tree_positions.long()[torch.arange(rows) - plan.q_index]
    low, high = (int(x) for x in torch.aminmax(tree_positions.long() - first))
    if low < 0 or high >= width:
        raise ValueError(
            f"tree_positions must be 0 to {width - 1} (the width of tree_mask, less 1) beyond that "
            f"of their sequence's first new token, got {low if low < 0 else high}"
        )


def _out(out: torch.Tensor, q: torch.Tensor, v_head_dim: int) -> None:
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
    for name, bound in zip(("left", "right"), window, strict=True):
        if isinstance(bound, bool) or not isinstance(bound, int) or bound < -1:
            raise ValueError(
                f"window {name} must be an int of at least -1 (no bound), got {bound!r}"
            )
    left, right = window
    return left, right


def _scale(scale: float | None, head_dim: int) -> float:
    if scale is None:
        return 1.0 / math.sqrt(head_dim)
    number = validate.finite("scale", scale, "above 0")
    if number <= 0:
        raise ValueError(f"scale must be finite and above 0, got {scale}")
    return number


def _softcap(softcap: float) -> float:
    number = validate.finite("softcap", softcap, "at least 0 (off)")
    if number < 0:
        raise ValueError(f"softcap must be finite and at least 0 (off), got {softcap}")
    return number


def _sinks(sinks: torch.Tensor | None, num_q_heads: int) -> None:
    if sinks is None:
        return
    validate.tensor("sinks", sinks, dtypes=validate.FLOAT_DTYPES, ndim=1)
    if sinks.numel() != num_q_heads:
        raise ValueError(
            f"sinks must have one logit per query head ({num_q_heads}), got {sinks.numel()}"
        )
