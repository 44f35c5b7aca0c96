"""The torch custom operators flashcore::attention and flashcore::paged_attention.

Their schemas are the one place where all arguments of attention stand in a row: plain tensors and
numbers that `api` has checked, so that torch.compile and torch.export see one node each with a
known output shape. Behind them the row is cut into the values of `problem` and `planner.types`.
`api` hands over these values directly when nothing is being traced, which saves the dispatcher's
share of a launch.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch

from flashcore.dispatch import PROVIDERS, VARIABLE, Path, device_path, no_kernels, wanted
from flashcore.eager.dense import dense_attention
from flashcore.eager.paged import paged_attention as eager_paged_attention
from flashcore.planner.device_plan import DevicePlan
from flashcore.planner.types import Plan, Planned, PlanNumbers, PlanTensors
from flashcore.problem import Extras, KVPool, Packing, Rules

if TYPE_CHECKING:
    from flashcore.sm90.launch.dense import DenseLaunch
    from flashcore.sm90.launch.paged import PagedLaunch

Result = tuple[torch.Tensor, torch.Tensor]

ATTENTION = """(
    Tensor q, Tensor k, Tensor v,
    float scale, bool causal, SymInt window_left, SymInt window_right, float softcap,
    Tensor? sinks,
    Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, SymInt max_seqlen_q,
    bool return_lse,
    str? impl
) -> (Tensor, Tensor)"""

PAGED_ATTENTION = """(
    Tensor q, Tensor k_pages, Tensor v_pages, Tensor? k_scale, Tensor? v_scale,
    Tensor cols, Tensor groups, Tensor q_tokens, Tensor q_positions, Tensor q_index, Tensor work,
    Tensor merge_offsets, Tensor merge_partials,
    SymInt num_partial_tokens, bool needs_merge, SymInt tile_m, bool batch_invariant,
    float scale, bool causal, SymInt window_left, SymInt window_right, float softcap,
    Tensor? sinks, Tensor? tree_mask, Tensor? tree_positions,
    str? impl
) -> (Tensor, Tensor)"""


def attention_launch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rules: Rules,
    sinks: torch.Tensor | None,
    packing: Packing,
    return_lse: bool,
    impl: str | None,
) -> DenseLaunch | None:
    """The launch of our kernels for these arguments; None where torch operators serve them."""
    if not _by_kernels(q.device, impl):
        return None
    from flashcore.sm90.launch.dense import dense_launch

    return dense_launch(q, k, v, rules, sinks, packing, return_lse)


def plan_launch(
    q: torch.Tensor,
    kv: KVPool,
    plan: Plan | DevicePlan,
    rules: Rules,
    extras: Extras,
    out: torch.Tensor | None,
    return_lse: bool,
    impl: str | None,
) -> PagedLaunch | None:
    """The launches of our kernels for these arguments; None where torch operators serve them.

    Of a DevicePlan all that there is to do is read on the device, which needs one.
    """
    if not _by_kernels(q.device, impl, plan):
        return None
    from flashcore.sm90.launch.paged import paged_launch

    return paged_launch(q, kv, plan.planned, rules, extras, out, return_lse)


def _by_kernels(
    device: torch.device, impl: str | None, plan: Plan | DevicePlan | None = None
) -> bool:
    """Whether our kernels serve a call, or torch operators; NotImplementedError where neither."""
    if wanted(impl) == "eager":
        path = Path("eager", f"torch operators were asked for (impl or {VARIABLE})")
    else:
        path = device_path(device)
    if path.name in PROVIDERS:
        return True
    if isinstance(plan, DevicePlan):
        raise NotImplementedError(
            f"plan is a flashcore.DevicePlan, which only the Hopper kernels read: "
            f"{path.reason}; use flashcore.plan"
        )
    if path.name == "none":
        raise no_kernels(device, path.reason)
    return False


def _attention(*row: Any) -> Result:
    """out as q, and the LSE, which is empty where it was not asked for."""
    take = iter(row)
    q, k, v = islice(take, 3)
    rules, sinks, packing = _next(Rules, take), next(take), _next(Packing, take)
    return_lse, impl = take
    launch = attention_launch(q, k, v, rules, sinks, packing, return_lse, impl)
    out, lse = (
        dense_attention(q, k, v, rules, sinks, packing)
        if launch is None
        else launch(q, k, v, sinks, packing.cu_seqlens_q, packing.cu_seqlens_k)
    )
    if not return_lse or lse is None:
        return out, q.new_empty(0, dtype=torch.float32)
    return out, lse


def _paged_attention(*row: Any) -> Result:
    """out [total_q, num_q_heads, v_head_dim], and the LSE [total_q, num_q_heads]."""
    take = iter(row)
    q, kv = next(take), _next(KVPool, take)
    planned = Planned(_next(PlanTensors, take), _next(PlanNumbers, take))
    rules, extras, impl = _next(Rules, take), _next(Extras, take), next(take)
    if not _by_kernels(q.device, impl):
        return eager_paged_attention(q, kv, planned, rules, extras)
    from flashcore.sm90.launch.paged import paged_attention

    return paged_attention(q, kv, planned, rules, extras)


def _next(kind: Any, row: Iterator[Any]) -> Any:
    """The next arguments as a tuple of this kind."""
    return kind(*islice(row, len(kind._fields)))


attention_op = torch.library.custom_op(
    "flashcore::attention", _attention, mutates_args=(), device_types=None, schema=ATTENTION
)

# The operator allocates its result: only the direct call has `out`.
paged_attention_op = torch.library.custom_op(
    "flashcore::paged_attention",
    _paged_attention,
    mutates_args=(),
    device_types=None,
    schema=PAGED_ATTENTION,
)


@attention_op.register_fake
def _attention_fake(*row: Any) -> Result:
    q, return_lse = row[0], row[-2]
    shape = q.shape[:-1] if return_lse else (0,)
    return q.new_empty(q.shape), q.new_empty(shape, dtype=torch.float32)


@paged_attention_op.register_fake
def _paged_attention_fake(*row: Any) -> Result:
    q, v_pages = row[0], row[2]
    rows = q.shape[:-1]
    return q.new_empty(*rows, v_pages.shape[-1]), q.new_empty(rows, dtype=torch.float32)
