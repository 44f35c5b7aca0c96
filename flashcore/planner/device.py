"""The plan on the GPU: fixed capacities, made by kernels alone, fit for CUDA graphs.

The host waits for nothing: what there is of each list is counted in `DevicePlan.counts`, on the
device. A sequence that cannot be planned (a page id out of range, lengths that do not fit) is left
out and marked in `DevicePlan.bad`; its query tokens' merge lists hold `counters.INVALID`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from flashcore import validate
from flashcore.config import planner as lines
from flashcore.planner import split
from flashcore.planner.counters import Count, Fault
from flashcore.planner.folding import Costs
from flashcore.planner.types import Plan
from flashcore.planner.work import DIRECT, FIELDS

_MOST = validate.INT32_MAX // FIELDS  # rows of a table whose elements are counted in int32


@dataclass(frozen=True, eq=False)
class DevicePlan:
    """Tensors of `Plan` at capacity, int32; an update rewrites them where they are.

    counts: [Count.SIZE] how much of each tensor is filled, and `Fault` bits of the whole batch.
    bad: [max_batch] `Fault` bits of each sequence.
    Merge lists of places past the last query token are empty.
    """

    counts: torch.Tensor
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

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """In the order of `kernels.planner_operands.Plan`."""
        return tuple(vars(self).values())

    def faults(self) -> Fault:
        """What was wrong with any sequence of the last update. Waits for the device."""
        return Fault(int(self.counts[Count.FAULTS]))


@dataclass(frozen=True)
class Capacities:
    """Most of everything; 0 for the last three chooses what ordinary batches cannot exceed."""

    max_batch: int
    max_entries: int  # pages of all sequences together
    max_q: int  # query tokens of all sequences together
    max_gathered: int = 0
    max_partials: int = 0
    max_items: int = 0


class DevicePlanner:
    """Plans batches of one model on one GPU, into one `DevicePlan` that it owns.

    Options as in `flashcore.plan`. `num_pages` is the size of the page pool; page tables with an id
    outside it are caught. Not for use on two streams at once.
    """

    def __init__(
        self,
        capacities: Capacities,
        *,
        num_pages: int,
        num_q_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_tokens: int = 128,
        itemsize: int = 2,
        tile_m: int = 64,
        num_workers: int = 0,
        fold: bool = True,
        device: torch.device | str = "cuda",
    ):
        group_size = validate.head_counts(num_q_heads, num_kv_heads)
        validate.positive_int("tile_m", tile_m)
        validate.positive_int("page_tokens", page_tokens)
        c = self.capacities = _with_defaults(capacities, group_size, num_kv_heads, tile_m)
        for name, value in vars(c).items():
            validate.positive_int(name, value, maximum=_MOST)
        if c.max_batch * (c.max_q + 1) > validate.INT32_MAX:
            raise ValueError(
                f"max_batch x (max_q + 1) must be below 2**31, got {c.max_batch} x {c.max_q + 1}"
            )
        validate.positive_int("num_pages", num_pages, maximum=_MOST)
        self.page_tokens, self.tile_m = page_tokens, tile_m
        self.num_q_heads, self.num_kv_heads, self.head_dim = num_q_heads, num_kv_heads, head_dim
        self.config = lines.choose(c.max_batch)
        self.plan = _allocate_plan(c, torch.device(device))
        self._scratch = _allocate_scratch(c, num_pages, torch.device(device))
        costs = Costs.of(num_q_heads, num_kv_heads, head_dim, itemsize)
        workers = num_workers * split.ITEMS_PER_WORKER if num_workers > 1 else 0
        unit = page_tokens * -(-split.TILE_TOKENS // page_tokens)
        self._problem = (
            *(page_tokens, num_pages, num_kv_heads, group_size, tile_m),
            *(*costs, int(fold)),
            *(workers, split.MIN_SPLIT_TOKENS, unit),
        )

    def update(
        self, page_table: torch.Tensor, seq_lens: torch.Tensor, q_lens: torch.Tensor
    ) -> DevicePlan:
        """Plan a batch: launches on the current stream, no more. The first call may compile.

        page_table: [batch, max_pages] int32 with contiguous rows. seq_lens, q_lens: [batch] int32,
        contiguous. A sequence of length 0 and no queries takes up nothing, so a captured graph
        serves any number of sequences up to its batch.
        """
        self._check(page_table, seq_lens, q_lens)
        if page_table.numel() == 0:  # torch gives empty tensors any strides
            page_table = torch.empty(page_table.shape, dtype=torch.int32, device=page_table.device)
        from flashcore.runtime.launch_planner import make_plan

        make_plan(
            self.config,
            page_table,
            seq_lens,
            q_lens,
            self.plan.tensors(),
            self._scratch,
            self._problem,
        )
        return self.plan

    def trimmed(self, batch: int) -> Plan:
        """The last update as a `Plan` of its own. Waits for the device."""
        p, n = self.plan, self.plan.counts.tolist()
        nnz, total_q, groups = n[Count.NNZ], n[Count.TOTAL_Q], n[Count.GROUPS]
        members, gathered, found = n[Count.MEMBERS], n[Count.GATHERED], n[Count.FOUND]
        offsets = p.merge_offsets[: total_q + 1].clone()
        lists = p.merge_partials[: n[Count.MERGE]].clone()
        return Plan(
            num_q_heads=self.num_q_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            page_tokens=self.page_tokens,
            tile_m=self.tile_m,
            total_q=total_q,
            max_q_len=n[Count.MAX_Q_LEN],
            num_pages=int(p.cols[:nnz].max()) + 1 if nnz else 0,
            num_partial_tokens=n[Count.PARTIALS],
            needs_merge=bool((lists != DIRECT).any() or (offsets.diff() == 0).any()),
            cols=p.cols[:nnz].clone(),
            token_counts=p.token_counts[:nnz].clone(),
            row_offsets=p.row_offsets[: batch + 1].clone(),
            kv_lens=p.kv_lens[:batch].clone(),
            q_offsets=p.q_offsets[: batch + 1].clone(),
            q_index=p.q_index[:total_q].clone(),
            groups=p.groups[:groups].clone(),
            member_offsets=p.member_offsets[: groups + 1].clone(),
            member_rows=p.member_rows[:members].clone(),
            member_starts=p.member_starts[:members].clone(),
            q_tokens=p.q_tokens[:gathered].clone(),
            q_positions=p.q_positions[:gathered].clone(),
            work=p.work[: n[Count.ITEMS]].clone(),
            merge_offsets=offsets,
            merge_partials=lists,
            decisions=p.decisions[:found].clone(),
        )

    def _check(
        self, page_table: torch.Tensor, seq_lens: torch.Tensor, q_lens: torch.Tensor
    ) -> None:
        int32 = (torch.int32,)
        validate.tensor("page_table", page_table, dtypes=int32, ndim=2)
        validate.tensor("seq_lens", seq_lens, dtypes=int32, ndim=1)
        validate.tensor("q_lens", q_lens, dtypes=int32, ndim=1)
        validate.same_device("plan", self.plan.cols, page_table=page_table)
        validate.same_device("page_table", page_table, seq_lens=seq_lens, q_lens=q_lens)
        batch = page_table.shape[0]
        if batch > self.capacities.max_batch:
            raise ValueError(
                f"page_table has {batch} rows, max_batch is {self.capacities.max_batch}"
            )
        if not batch == seq_lens.numel() == q_lens.numel():
            raise ValueError(
                f"seq_lens and q_lens must have one length per row of page_table ({batch}), got "
                f"{seq_lens.numel()} and {q_lens.numel()}"
            )
        if page_table.numel() > validate.INT32_MAX:
            raise ValueError("page_table must have fewer than 2**31 elements")
        if page_table.stride(1) != 1 and page_table.numel():
            raise ValueError(
                f"page_table must have contiguous rows, got strides {page_table.stride()}"
            )


def _with_defaults(c: Capacities, group_size: int, num_kv_heads: int, tile_m: int) -> Capacities:
    """Gathered tokens: each member's queries; decode has at most one a page. Work items: one for
    each row block and KV head of a group, and four a worker for the splits."""
    gathered = c.max_gathered or c.max_entries + 8 * c.max_q
    blocks = c.max_entries + -(-gathered * group_size // tile_m)
    items = c.max_items or num_kv_heads * blocks + 4096
    return Capacities(
        c.max_batch, c.max_entries, c.max_q, gathered, c.max_partials or 2 * gathered, items
    )


def _allocate_plan(c: Capacities, device: torch.device) -> DevicePlan:
    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.int32, device=device)

    return DevicePlan(
        counts=zeros(Count.SIZE),
        bad=zeros(c.max_batch),
        row_offsets=zeros(c.max_batch + 1),
        kv_lens=zeros(c.max_batch),
        q_offsets=zeros(c.max_batch + 1),
        cols=zeros(c.max_entries),
        token_counts=zeros(c.max_entries),
        groups=zeros(c.max_entries, FIELDS),
        member_offsets=zeros(c.max_entries + 1),
        member_rows=zeros(c.max_entries),
        member_starts=zeros(c.max_entries),
        decisions=zeros(c.max_entries, 4),
        q_tokens=zeros(c.max_gathered),
        q_positions=zeros(c.max_gathered),
        q_index=zeros(c.max_q),
        work=zeros(c.max_items, FIELDS),
        merge_offsets=zeros(c.max_q + 1),
        merge_partials=zeros(c.max_partials + c.max_q),
    )


def _allocate_scratch(
    c: Capacities, num_pages: int, device: torch.device
) -> tuple[torch.Tensor, ...]:
    """In the order of `kernels.planner_operands.Scratch`, as the first update wants it."""

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.int32, device=device)

    slots = zeros(num_pages, lines.Slots.LINES)
    slots[:, lines.Slots.FIRST] = lines.UNUSED
    return (
        slots,
        zeros(lines.Entries.LINES, c.max_entries),
        zeros(lines.Segments.LINES, c.max_entries),
        zeros(lines.Groups.LINES, c.max_entries),
        zeros(lines.Rows.LINES, c.max_batch),
        zeros(lines.Sort.LINES, c.max_entries),
        zeros(lines.Sort.LINES_OF_CLASSES, 2 * c.max_entries),
        zeros(lines.Tiles.LINES, lines.SCAN_THREADS).long(),
    )
