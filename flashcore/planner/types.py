"""The plan: all that the attention of one batch needs to know, made once for every layer.

A `Plan` shows all of it; attention is handed what it reads of it, as `Planned`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, NamedTuple

import torch

from flashcore import validate
from flashcore.planner.expansion import AnyExpansion, Expansion
from flashcore.planner.stats import PlanStats, plan_stats
from flashcore.problem import Problem
from flashcore.remembered import Remembered

if TYPE_CHECKING:
    from flashcore.planner.device_plan import DevicePlan


def dims_text(head_dim: int, v_head_dim: int) -> str:
    """128, or 192/128 where V has fewer columns than K."""
    return f"{head_dim}" if head_dim == v_head_dim else f"{head_dim}/{v_head_dim}"


def no_launches() -> Remembered:
    """What calls with a plan have made ready, by all that they depend on besides the plan. Few:
    launches keep buffers."""
    return Remembered(64)


class PlanTensors(NamedTuple):
    """What attention reads of a plan, as described in `Plan`."""

    cols: torch.Tensor
    groups: torch.Tensor
    q_tokens: torch.Tensor
    q_positions: torch.Tensor
    q_index: torch.Tensor
    work: torch.Tensor
    merge_offsets: torch.Tensor
    merge_partials: torch.Tensor


class PlanNumbers(NamedTuple):
    """What the host knows of a plan; of one made on the device, the most there may be."""

    num_partial_tokens: int
    needs_merge: bool
    tile_m: int
    batch_invariant: bool


class Workspace(NamedTuple):
    """partial_out: fp32 [num_partial_tokens, num_q_heads, v_head_dim]. partial_lse: without the
    last axis. counter: int32 [2], zero, and left at zero."""

    partial_out: torch.Tensor
    partial_lse: torch.Tensor
    counter: torch.Tensor


class Planned(NamedTuple):
    """A plan as attention takes it. counts: of a plan made on the device. workspace: the plan's
    own; made for a call where there is none. expansion: of fp8 pages, where kernels may expand
    them; its results are those without it."""

    tensors: PlanTensors
    numbers: PlanNumbers
    counts: torch.Tensor | None = None
    workspace: Workspace | None = None
    expansion: AnyExpansion | None = None


def plan_tensors(plan: Plan | DevicePlan) -> PlanTensors:
    return PlanTensors(*(getattr(plan, name) for name in PlanTensors._fields))


def plan_problem(plan: Plan | DevicePlan) -> Problem:
    return Problem(
        plan.num_q_heads,
        plan.num_kv_heads,
        plan.head_dim,
        plan.v_head_dim,
        plan.page_tokens,
        plan.itemsize,
    )


@dataclass(frozen=True, eq=False)
class Plan:
    """Immutable work description of one batch, made by `flashcore.plan`, never by its constructor.

    Keep it alive while a CUDA graph that holds attention calls with it is in use: the graph has the
    addresses of its tensors and buffers. All tensors are int32 on one device.

    v_head_dim: columns of V and of the result.
    max_q_len: the longest q_len. num_pages: pages that the pool must have at least (largest id +
        1).
    needs_merge: some query token has no DIRECT result: partial ones, or no keys at all.
    batch_invariant: made so that no result depends on what else is in the batch.
    cols, token_counts: [nnz], row_offsets: [batch + 1]: the layout it was made from.
    kv_lens: [batch] KV tokens of each sequence, its new tokens included.
    q_offsets: [batch + 1] first query token of each sequence; the last element is total_q.
    q_index: [total_q] place of each query token among its sequence's.
    groups: [num_groups, 8], columns `work.Group`.
    member_offsets: [num_groups + 1]; member_rows, member_starts: [num_members] the sequence, and
        the tokens of that sequence before the run.
    q_tokens: [num_gathered] query token of each gathered token.
    q_positions: [num_gathered] its position in the sequence minus the run's place there: under a
        causal mask it sees the run's tokens 0 .. q_positions. Negative: none of them.
    work: [num_items, 8], columns `work.Work`, longest first.
    merge_offsets: [total_q + 1]; merge_partials: the partial tokens of each query token in the
        order of the KV positions, or one `work.DIRECT`. An empty list: no keys, so zeros and an LSE
        of -inf.
    decisions: [num_groups_found, 4] what folding decided about each group as found: tokens,
        members, runs that follow, `folding.Reason`.
    itemsize: bytes of a K or V element, as folding took it to be.
    expansion: the way of fp8 pages (`planner.expansion`); None where itemsize is not 1.
    launches: of `flashcore.paged_attention` with this plan; not part of its contents.
    """

    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    page_tokens: int
    tile_m: int
    total_q: int
    max_q_len: int
    num_pages: int
    num_partial_tokens: int
    needs_merge: bool
    batch_invariant: bool
    cols: torch.Tensor
    token_counts: torch.Tensor
    row_offsets: torch.Tensor
    kv_lens: torch.Tensor
    q_offsets: torch.Tensor
    q_index: torch.Tensor
    groups: torch.Tensor
    member_offsets: torch.Tensor
    member_rows: torch.Tensor
    member_starts: torch.Tensor
    q_tokens: torch.Tensor
    q_positions: torch.Tensor
    work: torch.Tensor
    merge_offsets: torch.Tensor
    merge_partials: torch.Tensor
    decisions: torch.Tensor
    itemsize: int = field(default=2, kw_only=True)
    expansion: Expansion | None = field(default=None, kw_only=True)
    launches: Remembered = field(default_factory=no_launches, init=False, repr=False)

    @property
    def device(self) -> torch.device:
        return self.cols.device

    @property
    def batch(self) -> int:
        return self.kv_lens.numel()

    @property
    def problem(self) -> Problem:
        return plan_problem(self)

    @property
    def tensors(self) -> PlanTensors:
        return plan_tensors(self)

    @property
    def numbers(self) -> PlanNumbers:
        return PlanNumbers(
            self.num_partial_tokens, self.needs_merge, self.tile_m, self.batch_invariant
        )

    @property
    def planned(self) -> Planned:
        return Planned(self.tensors, self.numbers, expansion=self.expansion)

    def stats(self) -> PlanStats:
        """What the plan reads, shares and folds, and why. Waits for the device."""
        return plan_stats(self)

    def to(self, device: torch.device | str) -> Plan:
        """The same plan on another device."""
        device = validate.device("device", device)
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.init}
        for name, value in values.items():
            if isinstance(value, (torch.Tensor, Expansion)):
                values[name] = value.to(device)
        return Plan(**values)

    def __repr__(self) -> str:
        return (
            f"Plan(batch={self.batch}, total_q={self.total_q}, groups={self.groups.shape[0]}, "
            f"work={self.work.shape[0]}, partial_tokens={self.num_partial_tokens}, "
            f"heads={self.num_q_heads}/{self.num_kv_heads}, "
            f"head_dim={dims_text(self.head_dim, self.v_head_dim)}, "
            f"page_tokens={self.page_tokens}, device={self.device})"
        )
