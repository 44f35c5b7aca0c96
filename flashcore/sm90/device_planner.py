"""The plan on the GPU: fixed capacities, made by kernels alone, fit for CUDA graphs.

The host waits for nothing: what there is of each list is counted in `DevicePlan.counts`, on the
device. A sequence that cannot be planned (a page id out of range, lengths that do not fit) is left
out and marked in `DevicePlan.bad`; its query tokens' merge lists hold `counts.INVALID`.
"""

from __future__ import annotations

from copy import copy
from dataclasses import replace

import torch

from flashcore import validate
from flashcore.contract.counts import Count, Fault, Seen
from flashcore.contract.operands import Planner, PlannerProblem, PlannerResult
from flashcore.contract.work import DIRECT
from flashcore.dispatch import device_path, resident_ctas
from flashcore.jit.kernel import Kernel
from flashcore.names import known
from flashcore.planner import chunks, split
from flashcore.planner.device_plan import (
    Capacities,
    DevicePlan,
    check_capacities,
    fill_defaults,
    planned_bytes,
    planned_tensors,
    workspace_elements,
    workspace_tensors,
)
from flashcore.planner.folding import Costs, Fold, check_fold
from flashcore.planner.types import Plan
from flashcore.problem import Rules
from flashcore.sm90.available import sm_count
from flashcore.sm90.config import planner as config
from flashcore.sm90.config.dense import WARPGROUP_ROWS
from flashcore.sm90.config.paged import PAGE_TOKENS, unserved_dims
from flashcore.sm90.device_pager import DeviceLayout, unit_stride
from flashcore.sm90.expansion_scratch import ExpansionScratch
from flashcore.sm90.needed import Plans, kernels_for
from flashcore.sm90.planner_scratch import PlannerScratch

_MOST_PAGES = validate.INT32_MAX // 8


class DevicePlanner:
    """Plans batches of one model on one GPU, into one `DevicePlan` that it owns.

    Everything is launched and nothing awaited, so that a CUDA graph can hold the update and the
    attention calls of a step:

        planner = DevicePlanner(Capacities(max_batch=256, max_entries=65536, max_q=256), ...)
        plan = planner.update(page_table, seq_lens, q_lens)
        out = flashcore.paged_attention(q, k_pages, v_pages, plan)

    Keep the planner alive while a graph that holds an update or an attention call with its plan is
    in use: the graph has the addresses of their tensors.

    Args:
        capacities: the most there may be of everything; see `Capacities`.
        num_pages: size of the page pool; page tables with an id outside it are caught.
        num_q_heads, num_kv_heads, head_dim, v_head_dim, page_tokens, itemsize, dtype, tile_m,
            num_workers, fold: as in `flashcore.plan`; tile_m is 64 if not given.
        batch_invariant: as in `flashcore.plan`, for `update` alone.
        device: a Hopper GPU.
        workspace: fp32 [n], n at least max_partials * num_q_heads * (v_head_dim + 1), where
            partial results go; allocated if None. Planners whose attention calls never overlap may
            share one. Where capacities.max_partials is 0, what it holds is the capacity.
        scratch: what the kernels keep between their steps; of its own if None. Planners whose
            updates follow one another may share one.
        expansion: an `expansion_scratch.ExpansionScratch`: room in which calls of long prefills
            widen each distinct fp8 page once, where the device finds that it costs less than
            converting each for each row block; the same bits, but for last ones of work items of
            up to 32 packed rows. None: never.

    Faults are also told to the host as they are found: see `faults_seen`. Its numbers are there in
    `seen` too (`counts.Seen`), to look at in every step for next to nothing.

    An update and the attention calls with its plan go on one stream, or are ordered by events.

    Raises:
        TypeError, ValueError: naming the argument, what it is and what it may be.
    """

    @known
    def __init__(
        self,
        capacities: Capacities,
        *,
        num_pages: int,
        num_q_heads: int,
        num_kv_heads: int,
        head_dim: int,
        v_head_dim: int | None = None,
        page_tokens: int = 128,
        itemsize: int | None = None,
        dtype: torch.dtype | None = None,
        tile_m: int = 64,
        num_workers: int | None = None,
        fold: Fold = True,
        batch_invariant: bool = False,
        device: torch.device | str = "cuda",
        workspace: torch.Tensor | None = None,
        scratch: PlannerScratch | None = None,
        expansion: ExpansionScratch | None = None,
    ):
        validate.head_counts(num_q_heads, num_kv_heads)
        v_head_dim = validate.head_dims(head_dim, v_head_dim)
        capacities = check_capacities(capacities)
        if scratch is not None and not isinstance(scratch, PlannerScratch):
            raise TypeError(f"scratch must be a PlannerScratch, got {type(scratch).__name__}")
        if expansion is not None and not isinstance(expansion, ExpansionScratch):
            raise TypeError(
                f"expansion must be an ExpansionScratch, got {type(expansion).__name__}"
            )
        if workspace is not None:
            validate.tensor("workspace", workspace, dtypes=(torch.float32,), ndim=1)
        validate.flag("batch_invariant", batch_invariant)
        check_fold(fold)
        device = validate.device("device", device)
        unserved = unserved_dims(head_dim, v_head_dim)
        if unserved and device.type == "cuda":  # elsewhere the emulation plans for any model
            raise ValueError(unserved)
        itemsize = validate.item_size(itemsize, dtype)
        validate.positive_int("tile_m", tile_m)
        validate.positive_int("page_tokens", page_tokens)
        validate.positive_int("num_pages", num_pages, maximum=_MOST_PAGES)
        chunked = bool(batch_invariant)
        # First, since it names the limit on sequences.
        self._chain = config.choose(capacities.max_batch, chunks=chunked)
        self._chain_from_layout = config.choose(capacities.max_batch, from_layout=True)
        self._small = config.choose_small(chunks=chunked)
        self._num_workers, self._fold = num_workers, fold
        workers = _workers(num_workers, device, head_dim, tile_m, v_head_dim)
        if workspace is not None and not capacities.max_partials:
            held = workspace.numel() // workspace_elements(1, num_q_heads, v_head_dim)
            capacities = replace(capacities, max_partials=held)
        short = chunks.lengths(page_tokens)[0] if batch_invariant else 0
        c = fill_defaults(capacities, num_q_heads, num_kv_heads, tile_m, workers, short)
        self.capacities = c
        filled = planned_tensors(c, device)
        self.plan = DevicePlan(
            num_q_heads=num_q_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            v_head_dim=v_head_dim,
            page_tokens=page_tokens,
            tile_m=tile_m,
            batch_invariant=chunked,
            max_q=c.max_q,
            num_pages=num_pages,
            itemsize=itemsize,
            **filled._asdict(),
            **workspace_tensors(c.max_partials, num_q_heads, v_head_dim, workspace, device),  # type: ignore[arg-type]
        )
        if scratch is None:
            limits = (c.max_batch, c.max_entries, c.max_segments, num_pages)
            scratch = PlannerScratch(*limits, chunks=chunked, device=device)
        self.scratch = scratch
        self._lent = scratch.lent(c, num_pages, chunked)
        self._expansion = expansion
        if expansion is not None:
            if itemsize != 1:
                raise ValueError(f"expansion is for fp8 pages, of itemsize 1, got {itemsize}")
            lent = expansion.lent(self.plan.problem, num_pages, c.max_entries)
            self.plan = replace(self.plan, expansion=lent)
        self._prepare()

    def _prepare(self) -> None:
        """What launches pass, of the plan's tensors and the numbers of the problem."""
        p = self.plan
        workers = _workers(self._num_workers, p.device, p.head_dim, p.tile_m, p.v_head_dim)
        costs = Costs.of(p.problem, self._fold, parallel=workers > 0)
        unit = p.page_tokens * -(-split.TILE_TOKENS // p.page_tokens)
        short, long = chunks.lengths(p.page_tokens) if p.batch_invariant else (0, 0)
        # Pinned memory of the host has one address on both sides.
        self._seen = torch.zeros(
            Seen.SIZE, dtype=torch.int32, device="cpu", pin_memory=p.cols.is_cuda
        )
        self.seen = self._seen.numpy().data
        self._filled = PlannerResult(*(getattr(p, name) for name in PlannerResult._fields))
        self._problem = PlannerProblem(
            page_tokens=p.page_tokens,
            num_pages=p.num_pages,
            kv_heads=p.num_kv_heads,
            group_size=p.problem.group_size,
            tile_m=p.tile_m,
            kv_token_cost=costs.kv_token,
            partial_token_cost=costs.partial_token,
            least_gain=costs.least_gain,
            fold=int(bool(self._fold)),
            num_workers=workers,
            min_split_tokens=split.MIN_SPLIT_TOKENS,
            long_split_tokens=split.LONG_SPLIT_TOKENS,
            split_unit=unit,
            block_cost=split.block_cost(p.tile_m, *p.problem.dims),
            chunk_pages=short,
            long_chunk_pages=long,
            few_queries=chunks.FEW_QUERIES,
            seen=self._seen.data_ptr(),
        )

    def variant(
        self,
        *,
        tile_m: int | None = None,
        fold: Fold | None = None,
        max_q: int | None = None,
        expand: bool = True,
    ) -> DevicePlanner:
        """A planner like this one but for what is given, that fills the same tensors: it takes no
        memory, and its plan is good until either of them makes the next one.

        tile_m, fold: as in the constructor. max_q: at most this one's; fewer take less time to lay
        out. expand: False for one whose calls expand no pages, as those of decode never would.
        Capacities stay as they are, those too whose defaults depend on tile_m.
        """
        most, own = self.capacities.max_q, self.plan.tile_m
        max_q = validate.positive_int("max_q", most if max_q is None else max_q, maximum=most)
        tile_m = validate.positive_int("tile_m", own if tile_m is None else tile_m)
        if fold is not None:
            check_fold(fold)
        validate.flag("expand", expand)
        other = copy(self)
        other._fold = self._fold if fold is None else fold
        other.capacities = replace(self.capacities, max_q=max_q)
        partials = self.capacities.max_partials
        other.plan = replace(
            self.plan,
            tile_m=tile_m,
            max_q=max_q,
            q_index=self.plan.q_index[:max_q],
            merge_offsets=self.plan.merge_offsets[: max_q + 1],
            merge_partials=self.plan.merge_partials[: partials + max_q],
            expansion=self.plan.expansion if expand else None,
        )
        other._prepare()
        return other

    @property
    def bytes(self) -> int:
        """What the plan's tensors take: neither the workspace nor the scratch, both of which may be
        shared."""
        return planned_bytes(self.capacities)

    def faults_seen(self) -> tuple[Fault, int, int]:
        """Of all updates that have finished: their faults, how many had one, and a sequence of the
        last of these that had.

        Waits for nothing and copies nothing: the kernels write it to memory of the host, and only
        after a fault; those of captured graphs too. Never cleared. A variant has its own.
        """
        seen = self.seen
        return Fault(seen[Seen.FAULTS]), seen[Seen.UPDATES], seen[Seen.SEQUENCE]

    def reset(self) -> None:
        """Make updates safe after the device's memory was given back and taken again, as a memory
        saver does it: `PlannerScratch.reset` and the work counter. A plan must be made anew."""
        self.scratch.reset()
        self.plan.counter.zero_()

    @property
    def workspace_bytes(self) -> int:
        """Bytes of the partial results, the largest of what the planner holds."""
        c, p = self.capacities, self.plan
        return 4 * workspace_elements(c.max_partials, p.num_q_heads, p.v_head_dim)

    def stats(self) -> torch.Tensor:
        """Counters of the last update: int64 [Stat.SIZE] on the device, columns `counts.Stat`.

        The same tensor always; updates rewrite it. Copy it to pinned memory with non_blocking=True
        to read it later without waiting.
        """
        return self.plan.stats

    def update(
        self,
        page_table: torch.Tensor,
        seq_lens: torch.Tensor,
        q_lens: torch.Tensor | None = None,
        *,
        cu_seqlens_q: torch.Tensor | None = None,
    ) -> DevicePlan:
        """Plan a batch: launches on the current stream, no more. The first call may compile.

        page_table: [batch, max_pages] int32 with contiguous rows. seq_lens, q_lens: [batch] int32,
        contiguous. cu_seqlens_q: [batch + 1] int32 in place of q_lens, their ends, 0 first. A
        sequence of length 0 and no queries takes up nothing, so a captured graph serves any number
        of sequences up to its batch. The result is the planner's one plan, the same object each
        time.

        A sequence that cannot be planned is left out and named in `plan.bad`; the results of its
        query tokens are NaN. Where gathered tokens, partial tokens or work items do not fit, the
        batch is planned as `flashcore.plan(share=False)` does it, if need be with num_workers=0,
        and `Stat.UNSHARED` is 1.
        """
        q_lens = self._query_lengths(q_lens, cu_seqlens_q)
        self._check(page_table, seq_lens, q_lens)
        if page_table.numel() == 0:  # torch gives empty tensors any strides
            page_table = torch.empty(page_table.shape, dtype=torch.int32, device=page_table.device)
        return self._launch(page_table, unit_stride(seq_lens), unit_stride(q_lens), None)

    def update_from_layout(
        self,
        layout: DeviceLayout,
        q_lens: torch.Tensor | None = None,
        *,
        cu_seqlens_q: torch.Tensor | None = None,
    ) -> DevicePlan:
        """Plan the batch that a `DevicePager` has laid out, on the stream of its update.

        q_lens: [batch] int32, contiguous, for the sequences of the layout; cu_seqlens_q as in
        `update`. A sequence that could not be laid out is left out as there.
        """
        if self.plan.batch_invariant:
            raise NotImplementedError(
                "batch_invariant plans are made from page tables: use DevicePlanner.update, or "
                "flashcore.plan for layouts"
            )
        if not isinstance(layout, DeviceLayout):
            raise TypeError(f"layout must be a DevicePager's layout, got {type(layout).__name__}")
        q_lens = self._query_lengths(q_lens, cu_seqlens_q)
        validate.tensor("q_lens", q_lens, dtypes=(torch.int32,), ndim=1)
        validate.same_device("plan", self.plan.cols, layout=layout.cols, q_lens=q_lens)
        for name in ("page_tokens", "num_pages"):
            found, wanted = getattr(layout, name), getattr(self.plan, name)
            if found != wanted:
                raise ValueError(f"layout must have the planner's {name} {wanted}, got {found}")
        if layout.cols.numel() > self.capacities.max_entries:
            raise ValueError(
                f"layout has max_entries {layout.cols.numel()}, the planner's is "
                f"{self.capacities.max_entries}"
            )
        most_rows = min(self.capacities.max_batch, layout.bad.numel())
        if q_lens.numel() > most_rows:
            raise ValueError(
                f"q_lens or cu_seqlens_q have {q_lens.numel()} sequences, max_batch of planner and "
                f"layout is {most_rows}"
            )
        return self._launch(None, None, q_lens, layout)

    def _launch(
        self,
        page_table: torch.Tensor | None,
        seq_lens: torch.Tensor | None,
        q_lens: torch.Tensor,
        layout: DeviceLayout | None,
    ) -> DevicePlan:
        path = device_path(q_lens.device)
        if path.name != "hopper":
            raise NotImplementedError(
                f"DevicePlanner plans with Hopper kernels: {path.reason}; use flashcore.plan"
            )
        from flashcore.sm90.launch.planner import make_plan

        operands = Planner(
            page_table=page_table,
            seq_lens=seq_lens,
            q_lens=q_lens,
            source=None if layout is None else layout.source(),
            plan=self._filled,
            scratch=self._lent,
            problem=self._problem,
            num_sms=sm_count(q_lens.device),
        )
        make_plan(self._config(page_table), operands, self._following)
        if self._expansion is not None:
            from flashcore.sm90.launch.expand import plan_expansion

            plan_expansion(self.plan, self._expansion.entries)
        return self.plan

    def _following(self) -> list[Kernel]:
        """Of the attention that most probably reads the plan: causal, in bf16."""
        p = self.plan
        if (
            p.itemsize != 2
            or p.page_tokens not in PAGE_TOKENS
            or p.tile_m not in (WARPGROUP_ROWS, 2 * WARPGROUP_ROWS)
        ):
            return []
        rows = (p.max_q * p.num_q_heads,)
        plans = Plans((p.tile_m,), True, p.batch_invariant, rows=rows)
        return kernels_for(p.problem, Rules(1.0, causal=True), plans)

    def _config(self, page_table: torch.Tensor | None) -> config.PlannerConfig:
        """The kernels that take the least time for a table of this shape, None for a layout. How
        much of it is used only the device knows."""
        if page_table is None:
            return self._chain_from_layout
        few_queries = self.capacities.max_q <= config.SMALL_QUERIES
        few_rows = page_table.shape[0] <= config.SMALL_BATCH
        few_entries = page_table.numel() <= config.SMALL_ENTRIES
        return self._small if few_queries and few_rows and few_entries else self._chain

    def trimmed(self, batch: int) -> Plan:
        """The last update, of so many sequences, as a `Plan` of its own. Waits for the device."""
        if isinstance(batch, bool) or batch != 0:
            validate.positive_int("batch", batch, maximum=self.capacities.max_batch)
        p, n = self.plan, self.plan.counts.tolist()
        nnz, total_q, groups = n[Count.NNZ], n[Count.TOTAL_Q], n[Count.GROUPS]
        members, gathered, found = n[Count.MEMBERS], n[Count.GATHERED], n[Count.FOUND]
        offsets = p.merge_offsets[: total_q + 1].clone()
        lists = p.merge_partials[: n[Count.MERGE]].clone()
        return Plan(
            num_q_heads=p.num_q_heads,
            num_kv_heads=p.num_kv_heads,
            head_dim=p.head_dim,
            v_head_dim=p.v_head_dim,
            page_tokens=p.page_tokens,
            tile_m=p.tile_m,
            total_q=total_q,
            max_q_len=n[Count.MAX_Q_LEN],
            num_pages=int(p.cols[:nnz].max()) + 1 if nnz else 0,
            num_partial_tokens=n[Count.PARTIALS],
            needs_merge=bool((lists != DIRECT).any() or (offsets.diff() == 0).any()),
            batch_invariant=p.batch_invariant,
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
            itemsize=p.itemsize,
        )

    def _query_lengths(
        self, q_lens: torch.Tensor | None, cu_seqlens_q: torch.Tensor | None
    ) -> torch.Tensor:
        """Of the two what was given. Ends are not looked at: they lie on the device."""
        if cu_seqlens_q is None:
            if q_lens is None:
                raise TypeError("q_lens, or cu_seqlens_q instead, must be a torch.Tensor, got None")
            return q_lens
        if q_lens is not None:
            raise ValueError("cu_seqlens_q takes the place of q_lens; give one of them")
        validate.tensor("cu_seqlens_q", cu_seqlens_q, dtypes=(torch.int32,), ndim=1)
        validate.same_device("plan", self.plan.cols, cu_seqlens_q=cu_seqlens_q)
        if cu_seqlens_q.numel() == 0:
            raise ValueError("cu_seqlens_q must be [batch + 1], got no element")
        return cu_seqlens_q.diff()

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
                f"seq_lens and q_lens must have one length per row of page_table ({batch}), "
                "cu_seqlens_q one element more, got "
                f"{seq_lens.numel()} and {q_lens.numel()}"
            )
        if page_table.numel() > validate.INT32_MAX:
            raise ValueError("page_table must have fewer than 2**31 elements")
        if page_table.stride(1) != 1 and page_table.numel():
            raise ValueError(
                f"page_table must have contiguous rows, got strides {page_table.stride()}"
            )


def _workers(
    num_workers: int | None, device: torch.device, head_dim: int, tile_m: int, v_head_dim: int
) -> int:
    """CTAs to balance, 0 for no split."""
    if num_workers is None:
        is_cuda = device.type == "cuda"
        return resident_ctas(device, head_dim, tile_m, v_head_dim) if is_cuda else 0
    if num_workers:
        validate.positive_int("num_workers", num_workers)
    return num_workers
