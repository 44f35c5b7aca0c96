"""What a `DevicePlanner` fills: tensors at capacity, and how large the capacities are."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod

import torch

from flashcore import validate
from flashcore.contract.counts import Count, Fault, Stat
from flashcore.contract.operands import PlannerResult
from flashcore.contract.scratch import SCAN_THREADS
from flashcore.contract.work import FIELDS
from flashcore.planner import chunks
from flashcore.planner.expansion import DeviceExpansion
from flashcore.planner.types import (
    Planned,
    PlanNumbers,
    Workspace,
    dims_text,
    no_launches,
    plan_problem,
    plan_tensors,
)
from flashcore.problem import Problem
from flashcore.remembered import Remembered

_MOST = validate.INT32_MAX // FIELDS  # rows of a table whose elements are counted in int32
_DECODE_QUERIES = 1024
_PARTIALS = 8
_PARTIALS_BEYOND = 2


@dataclass(frozen=True)
class Capacities:
    """Most of everything. 0 for any of the last four takes what ordinary batches need.

    max_batch: sequences. max_entries: pages of all sequences together. max_q: query tokens of all
    sequences together. max_gathered: query tokens of all groups together. max_partials: partial
    results of query tokens. max_items: work items. max_segments: runs of pages that the same
    sequences use, counted once for each of these sequences; a batch that has more is planned as if
    nothing were shared. An entry takes 28 bytes of memory, a segment 220.
    """

    max_batch: int
    max_entries: int
    max_q: int
    max_gathered: int = 0
    max_partials: int = 0
    max_items: int = 0
    max_segments: int = 0


def check_capacities(capacities: object) -> Capacities:
    """Capacities, with an int in every field."""
    if not isinstance(capacities, Capacities):
        raise TypeError(
            f"capacities must be a flashcore.Capacities, got {type(capacities).__name__}"
        )
    for number, (name, value) in enumerate(vars(capacities).items()):
        if number < 3 or isinstance(value, bool) or value != 0:
            validate.positive_int(name, value, maximum=_MOST)
    return capacities


def fill_defaults(
    c: Capacities,
    num_q_heads: int,
    num_kv_heads: int,
    tile_m: int,
    num_workers: int,
    chunk_pages: int = 0,
) -> Capacities:
    """Capacities for what ordinary batches need, checked.

    Segments: one a page, which is the most there can be. Gathered tokens: each member's queries;
    decode has at most one a segment. Work items: one for each row block and KV head of a group, and
    4096 for the splits.
    Partial tokens: one for each gathered token whose group is not all there is to it, and for the
    splits `5 * num_workers * tile_m / num_q_heads` more, whatever the lengths: a split is at least
    four fifths of a fourth of a worker's share of all work. They are the only large ones, so query
    tokens get eight groups each (a prefix tree of that depth), and those beyond 1024, which are
    prefill, two.
    With chunks of `chunk_pages`, every query token has a partial token for each of its sequence's
    chunks, in place of the splits: enough for decode and verify of `max_q / max_batch` tokens each
    at any lengths. Each of them is in a work item, so there are more of these too.
    """
    group_size = num_q_heads // num_kv_heads
    for name in ("max_batch", "max_entries", "max_q"):
        validate.positive_int(name, getattr(c, name), maximum=_MOST)
    segments = c.max_segments or c.max_entries
    gathered = c.max_gathered or segments + 8 * c.max_q
    blocks = segments + -(-gathered * group_size // tile_m)
    beyond = max(c.max_q - _DECODE_QUERIES, 0)
    whole = min(_PARTIALS * (c.max_q - beyond) + _PARTIALS_BEYOND * beyond, gathered)
    splits, more_blocks = -(-5 * num_workers * tile_m // num_q_heads), 0
    if chunk_pages:
        queries = min(-(-c.max_q // c.max_batch), chunks.FEW_QUERIES)
        splits = (c.max_entries // chunk_pages + c.max_batch) * queries
        more_blocks = -(-(c.max_partials or whole + splits) * group_size // tile_m)
    filled = Capacities(
        c.max_batch,
        c.max_entries,
        c.max_q,
        gathered,
        c.max_partials or whole + splits,
        c.max_items or num_kv_heads * (blocks + more_blocks) + 4096,
        segments,
    )
    for name, value in vars(filled).items():
        validate.positive_int(name, value, maximum=_MOST)
    if segments < min(c.max_batch, c.max_entries):
        raise ValueError(
            f"max_segments must be at least max_batch ({c.max_batch}), one for each sequence where "
            f"nothing is shared, got {segments}"
        )
    most_q = most_queries(c.max_batch)
    if c.max_q > most_q:
        raise ValueError(
            f"max_q must be at most {most_q} with max_batch {c.max_batch}, got {c.max_q}"
        )
    return filled


def most_queries(max_batch: int) -> int:
    """The largest max_q: query lengths are added up in int32, each as at most max_q + 1, of as many
    sequences as a CTA has threads."""
    return min(_MOST, validate.INT32_MAX // min(max_batch, SCAN_THREADS) - 1)


@dataclass(frozen=True, eq=False)
class DevicePlan:
    """The plan of one batch on the device, for `flashcore.paged_attention`.

    A `DevicePlanner` makes it, never its constructor, and owns it.

    Numbers and tensors as in `flashcore.Plan`, int32, the tensors at capacity; an update rewrites
    them where they are. Merge lists of places past the last query token are empty. Besides:

    max_q: query tokens there may be. num_pages: pages that the pool must have.
    counts: [Count.SIZE] how much of each tensor is filled, and `Fault` bits of the whole batch.
    stats: int64 [Stat.SIZE], see `DevicePlanner.stats`.
    bad: [max_batch] `Fault` bits of each sequence.
    partial_out, partial_lse, counter: workspace of an attention call; nothing in it outlives the
        call, but the counter is left at zero.
    expansion: where long prefills expand fp8 pages; None: they do not.
    launches: as in `flashcore.Plan`.
    """

    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    page_tokens: int
    tile_m: int
    batch_invariant: bool
    max_q: int
    num_pages: int
    counts: torch.Tensor
    stats: torch.Tensor
    bad: torch.Tensor
    row_offsets: torch.Tensor
    kv_lens: torch.Tensor
    q_offsets: torch.Tensor
    cols: torch.Tensor
    token_counts: torch.Tensor
    groups: torch.Tensor
    member_offsets: torch.Tensor
    member_rows: torch.Tensor
    member_starts: torch.Tensor
    decisions: torch.Tensor
    q_tokens: torch.Tensor
    q_positions: torch.Tensor
    q_index: torch.Tensor
    work: torch.Tensor
    merge_offsets: torch.Tensor
    merge_partials: torch.Tensor
    partial_out: torch.Tensor
    partial_lse: torch.Tensor
    counter: torch.Tensor
    itemsize: int = field(default=2, kw_only=True)
    expansion: DeviceExpansion | None = field(default=None, kw_only=True)
    launches: Remembered = field(default_factory=no_launches, init=False, repr=False)

    @property
    def device(self) -> torch.device:
        return self.cols.device

    @property
    def problem(self) -> Problem:
        return plan_problem(self)

    @property
    def planned(self) -> Planned:
        """What there is to merge, if anything, only the device knows."""
        most = self.partial_lse.shape[0]
        return Planned(
            plan_tensors(self),
            PlanNumbers(most, True, self.tile_m, self.batch_invariant),
            self.counts,
            Workspace(self.partial_out, self.partial_lse, self.counter),
            self.expansion,
        )

    def faults(self) -> Fault:
        """What was wrong with any sequence of the last update. Waits for the device."""
        return Fault(int(self.counts[Count.FAULTS]))

    def __repr__(self) -> str:
        return (
            f"DevicePlan(max_batch={self.bad.numel()}, max_q={self.max_q}, "
            f"max_entries={self.cols.numel()}, max_partials={self.partial_lse.shape[0]}, "
            f"heads={self.num_q_heads}/{self.num_kv_heads}, "
            f"head_dim={dims_text(self.head_dim, self.v_head_dim)}, "
            f"page_tokens={self.page_tokens}, device={self.device})"
        )


def planned_tensors(c: Capacities, device: torch.device) -> PlannerResult:
    """The tensors that an update fills; `c` with its defaults filled in."""
    return PlannerResult(
        **{
            name: torch.zeros(
                shape, dtype=torch.int64 if name == "stats" else torch.int32, device=device
            )
            for name, shape in _planned_shapes(c).items()
        }
    )


def planned_bytes(c: Capacities) -> int:
    """What `planned_tensors` take; `c` with its defaults filled in."""
    return 4 * sum(map(prod, _planned_shapes(c).values())) + 4 * Stat.SIZE


def _planned_shapes(c: Capacities) -> dict[str, tuple[int, ...]]:
    return {
        "counts": (Count.SIZE,),
        "stats": (Stat.SIZE,),
        "bad": (c.max_batch,),
        "row_offsets": (c.max_batch + 1,),
        "kv_lens": (c.max_batch,),
        "q_offsets": (c.max_batch + 1,),
        "cols": (c.max_entries,),
        "token_counts": (c.max_entries,),
        "groups": (c.max_segments, FIELDS),
        "member_offsets": (c.max_segments + 1,),
        "member_rows": (c.max_segments,),
        "member_starts": (c.max_segments,),
        "decisions": (c.max_segments, 4),
        "q_tokens": (c.max_gathered,),
        "q_positions": (c.max_gathered,),
        "q_index": (c.max_q,),
        "work": (c.max_items, FIELDS),
        "merge_offsets": (c.max_q + 1,),
        "merge_partials": (c.max_partials + c.max_q,),
    }


def workspace_elements(max_partials: int, num_q_heads: int, v_head_dim: int) -> int:
    """fp32 elements of the partial results: a row and its LSE for each partial token and head."""
    return max_partials * num_q_heads * (v_head_dim + 1)


def workspace_tensors(
    max_partials: int,
    num_q_heads: int,
    v_head_dim: int,
    workspace: torch.Tensor | None,
    device: torch.device,
) -> dict[str, torch.Tensor]:
    """Partial results in `workspace`, or in memory of their own, and the counter."""
    elements = workspace_elements(max_partials, num_q_heads, v_head_dim)
    if workspace is None:
        workspace = torch.empty(elements, dtype=torch.float32, device=device)
    validate.tensor("workspace", workspace, dtypes=(torch.float32,), ndim=1)
    if workspace.device.type != device.type or not workspace.is_contiguous():
        raise ValueError(f"workspace must be contiguous on {device}, got {workspace.device}")
    if workspace.numel() < elements or workspace.data_ptr() % 16:
        raise ValueError(
            f"workspace must have at least {elements} elements (max_partials {max_partials} x "
            f"num_q_heads {num_q_heads} x (v_head_dim {v_head_dim} + 1)) and start at an address "
            f"divisible by 16, got {workspace.numel()} at {workspace.data_ptr()}"
        )
    rows = max_partials * num_q_heads
    return {
        "partial_out": workspace[: rows * v_head_dim].view(max_partials, num_q_heads, v_head_dim),
        "partial_lse": workspace[rows * v_head_dim : elements].view(max_partials, num_q_heads),
        "counter": torch.zeros(2, dtype=torch.int32, device=device),
    }
