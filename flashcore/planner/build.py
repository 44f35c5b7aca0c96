"""`plan`: from a layout and the query lengths to groups, work items and merge lists."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from flashcore import validate
from flashcore.contract.chunks import TILE_M, tallest_tile
from flashcore.contract.reasons import Reason
from flashcore.contract.work import DIRECT, FIELDS, Group, Work
from flashcore.dispatch import resident_ctas
from flashcore.names import known
from flashcore.pager.csr import Layout
from flashcore.planner import chunks, expansion, split
from flashcore.planner.folding import FOLD_ROWS, Costs, Fold, Folding, Runs, check_fold, fold_groups
from flashcore.planner.sharing import Segments, find_segments
from flashcore.planner.types import Plan
from flashcore.problem import Problem


@known
def plan(
    layout: Layout,
    *,
    q_lens: torch.Tensor | Sequence[int] | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    v_head_dim: int | None = None,
    page_tokens: int | None = None,
    itemsize: int | None = None,
    dtype: torch.dtype | None = None,
    tile_m: int | None = None,
    num_workers: int | None = None,
    share: bool = True,
    fold: Fold = True,
    batch_invariant: bool = False,
    expand: bool | None = None,
) -> Plan:
    """Plan the attention of one batch; the result serves every layer.

    Args:
        layout: from `build_layout`, `layout_from_page_table` or `layout_from_csr`.
        q_lens: [batch] query tokens of each sequence, its last q_len KV tokens being their own, so
            the layout's lengths count them; None for one each (decode). Sequences with 0 are left
            out, whatever pages they hold.
        cu_seqlens_q: [batch + 1] in place of q_lens: ends of the sequences' query tokens, 0 first.
        num_q_heads, num_kv_heads, head_dim: the model's, as this rank sees them.
        v_head_dim: columns of V and of the result, at most head_dim; None: head_dim.
        page_tokens: tokens of a page; the layout knows them, and others are an error.
        itemsize, dtype: bytes of a K or V element, or its dtype, for the folding rule. None: 2.
        tile_m: packed query rows of a work item at most; None: 64, or 128 where the groups fill it.
        num_workers: work items that run at the same time (CTAs); KV runs are split to fill them.
            0: no split. None: as many as a CUDA device runs, elsewhere 0.
        share: False reads every sequence's pages for itself (for comparison; same results).
        fold: True gives groups back to their sequences where sharing would not pay. False keeps
            every group however small; "always" keeps none that can be given back.
        batch_invariant: the bits of a query token's output and LSE follow from its sequence's
            tokens up to it and from nothing else: not from the rest of the
            batch, sharing, q_len, the page size or the GPU's size (docs/determinism.md). Wants
            pages that divide 1024 tokens.
        expand: of fp8 pages (itemsize 1), whether calls with kernels widen each distinct page once
            into scratch of 16 bits, which is faster where many row blocks read it (long prefill);
            results are the same bits, but for work items of up to 32 packed rows, whose last bits
            may differ. None: where it costs less, by `planner.expansion`, and takes at most
            `planner.expansion.EXPANSION_BYTES`; `PlanStats.expansion` says what and why.

    Raises:
        TypeError, ValueError: naming the argument, what it is and what it may be.
    """
    _check_layout(layout, page_tokens)
    problem = Problem.checked(
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        v_head_dim=v_head_dim,
        page_tokens=layout.page_tokens,
        itemsize=validate.item_size(itemsize, dtype),
    )
    if cu_seqlens_q is not None:
        if q_lens is not None:
            raise ValueError("cu_seqlens_q takes the place of q_lens; give one of them")
        batch = layout.row_offsets.numel() - 1
        validate.same_device("layout", layout.cols, cu_seqlens_q=cu_seqlens_q)
        q_lens = validate.lengths_of("cu_seqlens_q", cu_seqlens_q, "sequences", batch)
    choices = _Choices(tile_m, num_workers, share, fold, batch_invariant, expand)
    choices.check()
    return _plan(layout, _query_lengths(layout, q_lens), problem, choices)


class _Choices(NamedTuple):
    """As in `plan`."""

    tile_m: int | None
    num_workers: int | None
    share: bool
    fold: Fold
    batch_invariant: bool
    expand: bool | None

    def check(self) -> None:
        """A TypeError or ValueError naming the argument."""
        if self.tile_m is not None:
            validate.positive_int("tile_m", self.tile_m)
        workers = self.num_workers
        if workers is not None and (isinstance(workers, bool) or workers != 0):
            validate.positive_int("num_workers", workers)
        validate.flag("share", self.share)
        validate.flag("batch_invariant", self.batch_invariant)
        if self.expand is not None:
            validate.flag("expand", self.expand)
        check_fold(self.fold)

    def workers(self, device: torch.device, problem: Problem, tile_m: int) -> int:
        """Work items that run at the same time, 0 for no split."""
        if self.num_workers is not None:
            return self.num_workers
        if device.type != "cuda":
            return 0
        return resident_ctas(device, problem.head_dim, tile_m, problem.v_head_dim)


def _plan(layout: Layout, lengths: torch.Tensor, problem: Problem, choices: _Choices) -> Plan:
    """lengths: [batch] int64, query tokens of each sequence."""
    tile_m, page_tokens = choices.tile_m, problem.page_tokens
    q_offsets = _offsets(lengths)
    counts = layout.token_counts.long()
    tokens_before = _offsets(counts)
    kv_lens = tokens_before[layout.row_offsets[1:].long()]
    kv_lens = kv_lens - tokens_before[layout.row_offsets[:-1].long()]
    _check_queries(lengths, kv_lens)
    chunk_pages = None
    if choices.batch_invariant:
        chunk_pages = chunks.chunk_pages(lengths, counts, layout.row_offsets, page_tokens)
        if tallest_tile(problem.v_head_dim) == TILE_M:
            tile_m = tile_m or TILE_M

    pages = layout.cols
    if not choices.share:  # every entry a page of its own
        pages = torch.arange(pages.numel(), dtype=pages.dtype, device=pages.device)
    active = lengths > 0
    found = find_segments(pages, counts, layout.row_offsets, active, page_tokens, chunk_pages)
    runs = _runs(found, tokens_before, lengths)
    parallel = layout.cols.is_cuda if choices.num_workers is None else choices.num_workers > 0
    folding = fold_groups(
        found,
        runs,
        _row_blocks(runs.queries * problem.group_size, tile_m or FOLD_ROWS),
        runs.tokens == runs.entries * page_tokens,
        Costs.of(problem, choices.fold, parallel=parallel),
        enabled=bool(choices.fold),
    )
    segments = _fold(found, folding)
    gathered = _gather_queries(segments, lengths, q_offsets, kv_lens)
    kept = _runs(segments, tokens_before, lengths)
    prefill = _has_prefill(kept, problem)
    tile_m = tile_m or _tile_rows(kept, problem, prefill)
    if chunk_pages is None:
        num_workers = choices.workers(layout.cols.device, problem, tile_m)
        blocks = _row_blocks(kept.queries * problem.group_size, tile_m)
        block_cost = _block_cost(prefill, problem, tile_m)
        per_split = _split_pages(kept, blocks, problem, num_workers, block_cost)
    else:  # runs begin with a chunk, and all their chunks but the last are full
        per_split = torch.minimum(chunk_pages[segments.row[segments.owner]], kept.entries)
    groups, num_partials = _group_table(segments, kept, gathered, per_split)
    merge_offsets, merge_partials = _merge_lists(
        segments, groups, gathered, lengths, q_offsets, int(q_offsets[-1])
    )
    tables = expansion.Tables(layout.cols, groups, gathered.positions)
    decisions = (runs.tokens, runs.members, folding.children, folding.reason)
    return Plan(
        num_q_heads=problem.num_q_heads,
        num_kv_heads=problem.num_kv_heads,
        head_dim=problem.head_dim,
        v_head_dim=problem.v_head_dim,
        page_tokens=page_tokens,
        itemsize=problem.itemsize,
        expansion=expansion.expansion_of(tables, problem, tile_m, choices.expand),
        tile_m=tile_m,
        total_q=int(q_offsets[-1]),
        max_q_len=int(lengths.max()) if lengths.numel() else 0,
        num_pages=int(layout.cols.max()) + 1 if layout.cols.numel() else 0,
        num_partial_tokens=num_partials,
        needs_merge=num_partials > 0 or bool((merge_offsets.diff() == 0).any()),
        batch_invariant=choices.batch_invariant,
        cols=layout.cols,
        token_counts=layout.token_counts,
        row_offsets=layout.row_offsets,
        kv_lens=kv_lens.int(),
        q_offsets=q_offsets.int(),
        q_index=_index_within(lengths)[1].int(),
        groups=groups.int(),
        member_offsets=gathered.member_offsets.int(),
        member_rows=segments.row[gathered.order].int(),
        member_starts=segments.kv_start[gathered.order].int(),
        q_tokens=gathered.tokens.int(),
        q_positions=gathered.positions.int(),
        work=_work_list(groups, problem, tile_m).int(),
        merge_offsets=merge_offsets.int(),
        merge_partials=merge_partials.int(),
        decisions=torch.stack(decisions, 1).int(),
    )


class _Gathered(NamedTuple):
    """Members in group order, and their query tokens one after another.

    order: [members] segment of each member. member_offsets: [groups + 1]. segment_begin: [segments]
    first gathered token of each segment. q_begin: [groups + 1]. tokens, positions: [gathered].
    """

    order: torch.Tensor
    member_offsets: torch.Tensor
    segment_begin: torch.Tensor
    q_begin: torch.Tensor
    tokens: torch.Tensor
    positions: torch.Tensor


def _check_queries(q_lens: torch.Tensor, kv_lens: torch.Tensor) -> None:
    """Lengths without the new tokens are the usual slip. A sequence with no keys has zeros."""
    longer = (q_lens > kv_lens) & (kv_lens > 0)
    if bool(longer.any()):
        row = validate.first_index(longer)
        raise ValueError(
            f"q_lens[{row}] = {int(q_lens[row])} is more than the {int(kv_lens[row])} KV tokens of "
            "its sequence in the layout, which count the new ones"
        )


def _check_layout(layout: Layout, page_tokens: int | None) -> None:
    if not isinstance(layout, Layout):
        raise TypeError(f"layout must be a flashcore.Layout, got {type(layout).__name__}")
    own = validate.positive_int("layout.page_tokens", layout.page_tokens)
    if page_tokens is not None and validate.positive_int("page_tokens", page_tokens) != own:
        raise ValueError(
            f"page_tokens must be what the layout was built with, {own}, got {page_tokens}"
        )
    if layout.token_counts.numel() and int(layout.token_counts.max()) > own:
        raise ValueError(
            f"layout has pages of {own} tokens (layout.page_tokens), and one that holds "
            f"{int(layout.token_counts.max())}"
        )


def _query_lengths(layout: Layout, q_lens: torch.Tensor | Sequence[int] | None) -> torch.Tensor:
    """As int64 on the layout's device, checked."""
    batch = layout.row_offsets.numel() - 1
    device = layout.cols.device
    if q_lens is None:
        return torch.ones(batch, dtype=torch.long, device=device)
    if not isinstance(q_lens, torch.Tensor):
        lengths = validate.int_list("q_lens", q_lens)
        q_lens = torch.tensor(lengths, dtype=torch.long, device=device)
    validate.tensor("q_lens", q_lens, dtypes=validate.INT_DTYPES, ndim=1)
    validate.same_device("layout", layout.cols, q_lens=q_lens)
    validate.readable(q_lens=q_lens)
    if q_lens.numel() != batch:
        raise ValueError(f"q_lens must have one length per row ({batch}), got {q_lens.numel()}")
    if batch and int(q_lens.min()) < 0:
        row = validate.first_index(q_lens < 0)
        raise ValueError(f"q_lens[{row}] must be at least 0, got {int(q_lens[row])}")
    return q_lens.long()


def _offsets(counts: torch.Tensor) -> torch.Tensor:
    """[0, c0, c0 + c1, ...], int64."""
    result = torch.zeros(counts.numel() + 1, dtype=torch.long, device=counts.device)
    torch.cumsum(counts, 0, out=result[1:])
    return result


def _index_within(counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """For counts [2, 3]: which one, [0, 0, 1, 1, 1], and the place in it, [0, 1, 0, 1, 2]."""
    which = torch.repeat_interleave(counts)
    begin = torch.cumsum(counts, 0) - counts
    return which, torch.arange(which.numel(), device=counts.device) - begin[which]


def _runs(segments: Segments, tokens_before: torch.Tensor, q_lens: torch.Tensor) -> Runs:
    num_groups = segments.owner.numel()
    first, count = segments.entry[segments.owner], segments.num_entries[segments.owner]
    queries = torch.zeros(num_groups, dtype=torch.long, device=first.device)
    queries.index_add_(0, segments.group, q_lens[segments.row])
    return Runs(
        entries=count,
        tokens=tokens_before[first + count] - tokens_before[first],
        members=torch.bincount(segments.group, minlength=num_groups),
        queries=queries,
    )


def _fold(found: Segments, folding: Folding) -> Segments:
    """The segments that stay, longer at the head by what their folded ancestors leave them."""
    folded = folding.reason == Reason.FOLDED
    keep = ~folded[found.group]
    group = found.group[keep]
    new_number = torch.cumsum(~folded, 0) - 1
    new_segment = torch.cumsum(keep, 0) - 1
    return Segments(
        group=new_number[group],
        row=found.row[keep],
        entry=found.entry[keep] - folding.extra_entries[group],
        num_entries=found.num_entries[keep] + folding.extra_entries[group],
        kv_start=found.kv_start[keep] - folding.extra_tokens[group],
        owner=new_segment[found.owner[~folded]],
    )


def _gather_queries(
    segments: Segments, q_lens: torch.Tensor, q_offsets: torch.Tensor, kv_lens: torch.Tensor
) -> _Gathered:
    num_groups = segments.owner.numel()
    order = torch.sort(segments.group, stable=True).indices
    row = segments.row[order]
    begin = _offsets(q_lens[row])
    member_offsets = _offsets(torch.bincount(segments.group, minlength=num_groups))
    segment_begin = torch.empty_like(order)
    segment_begin[order] = begin[:-1]
    member, index = _index_within(q_lens[row])
    member_row = row[member]
    position = (kv_lens - q_lens)[member_row] + index - segments.kv_start[order][member]
    return _Gathered(
        order=order,
        member_offsets=member_offsets,
        segment_begin=segment_begin,
        q_begin=begin[member_offsets],
        tokens=q_offsets[member_row] + index,
        positions=position,
    )


def _row_blocks(rows: torch.Tensor, tile_m: int) -> torch.Tensor:
    """M tiles that so many packed rows need."""
    return (rows + tile_m - 1) // tile_m


def _has_prefill(runs: Runs, problem: Problem) -> bool:
    """Whether some run is a prefill's. Waits for the device: once for a plan."""
    return bool(split.fills_tiles(runs.queries * problem.group_size, runs.members).any())


def _block_cost(prefill: bool, problem: Problem, tile_m: int) -> int:
    """`split.block_cost`, or 0 where the batch has a prefill."""
    return 0 if prefill else split.block_cost(tile_m, *problem.dims)


def _tile_rows(runs: Runs, problem: Problem, prefill: bool) -> int:
    """64, or 128 where that lowers what all items read by a tenth or more, and raises what they
    cost by no more than that.

    Two CTAs of 64 rows share an SM and hide each other's waits, which is worth about that; 128 rows
    halve what row blocks read from L2 (prefill, alone or beside decode). But a tile is computed
    whole: 128 rows where most runs have few are twice the arithmetic.
    """
    tokens, rows = runs.tokens, runs.queries * problem.group_size
    blocks = {tile_m: _row_blocks(rows, tile_m) for tile_m in (64, 128)}
    read = {tile_m: int((tokens * split.read_cost(b)).sum()) for tile_m, b in blocks.items()}
    computed = {
        tile_m: int((tokens * b).sum()) * _block_cost(prefill, problem, tile_m)
        for tile_m, b in blocks.items()
    }
    narrow, wide = (max(read[tile_m], computed[tile_m]) for tile_m in (64, 128))
    fewer_reads = tokens.numel() > 0 and 10 * read[64] >= 11 * read[128]
    return 128 if fewer_reads and 10 * wide <= 11 * narrow else 64


def _split_pages(
    runs: Runs, blocks: torch.Tensor, problem: Problem, num_workers: int, block_cost: int
) -> torch.Tensor:
    """Pages of a split of each group; block_cost: of the batch."""
    if runs.tokens.numel() == 0:
        return runs.entries
    in_blocks = int((runs.tokens * blocks).sum())
    costs = split.costs_of(int(runs.tokens.sum()), in_blocks, block_cost)
    cost = split.run_cost(runs.tokens, blocks, costs)
    total = int((runs.tokens * split.token_cost(blocks, costs)).sum()) * problem.num_kv_heads
    share = split.split_share(total, int(cost.max()), int(cost.min()), num_workers)
    if share == 0:
        return runs.entries
    page_tokens = problem.page_tokens
    pages: torch.Tensor = split.split_pages(runs.entries, blocks, share, page_tokens, costs)
    return pages


def _group_table(
    segments: Segments, runs: Runs, gathered: _Gathered, per_split: torch.Tensor
) -> tuple[torch.Tensor, int]:
    """The group table, int64, and the number of partial tokens; `per_split` pages a split."""
    count, queries = runs.entries, runs.queries
    splits = (count + per_split - 1) // per_split

    # Only a group whose query tokens all have this one result may write it to the output.
    same_row = torch.zeros_like(segments.row, dtype=torch.bool)
    same_row[1:] = segments.row[1:] == segments.row[:-1]
    has_company = same_row.clone()
    has_company[:-1] |= same_row[1:]
    merged = torch.zeros_like(count, dtype=torch.bool)
    merged[segments.group[has_company]] = True
    direct = (splits == 1) & ~merged
    begin = _offsets(torch.where(direct, 0, splits * queries))

    table = torch.zeros((count.numel(), FIELDS), dtype=torch.long, device=count.device)
    table[:, Group.ENTRY] = segments.entry[segments.owner]
    table[:, Group.NUM_ENTRIES] = count
    table[:, Group.NUM_TOKENS] = runs.tokens
    table[:, Group.Q_BEGIN] = gathered.q_begin[:-1]
    table[:, Group.NUM_Q] = queries
    table[:, Group.SPLIT_ENTRIES] = per_split
    table[:, Group.NUM_SPLITS] = splits
    table[:, Group.PARTIAL] = torch.where(direct, DIRECT, begin[:-1])
    return table, int(begin[-1])


def _merge_lists(
    segments: Segments,
    groups: torch.Tensor,
    gathered: _Gathered,
    q_lens: torch.Tensor,
    q_offsets: torch.Tensor,
    total_q: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Per query token, its partial tokens in the order of the KV positions, as CSR."""
    group = groups[segments.group]
    queries = q_lens[segments.row]
    segment, item = _index_within(queries * group[:, Group.NUM_SPLITS])
    # Per segment the splits vary fastest within a token, so a stable sort by token gives the order.
    splits = group[segment, Group.NUM_SPLITS]
    token, part = item // splits, item % splits
    gathered_token = gathered.segment_begin[segment] + token
    group = group[segment]
    partial = group[:, Group.PARTIAL] + part * group[:, Group.NUM_Q]
    partial = partial + gathered_token - group[:, Group.Q_BEGIN]
    partial = torch.where(group[:, Group.PARTIAL] == DIRECT, DIRECT, partial)
    query = q_offsets[segments.row[segment]] + token
    order = torch.sort(query, stable=True).indices
    return _offsets(torch.bincount(query, minlength=total_q)), partial[order]


def _work_list(groups: torch.Tensor, problem: Problem, tile_m: int) -> torch.Tensor:
    """Every (group, split, KV head, row block), longest first, neighbours together."""
    group_size, num_kv_heads = problem.group_size, problem.num_kv_heads
    rows = groups[:, Group.NUM_Q] * group_size
    blocks = _row_blocks(rows, tile_m)
    which, index = _index_within(groups[:, Group.NUM_SPLITS] * num_kv_heads * blocks)
    group, blocks, rows = groups[which], blocks[which], rows[which]
    block = index % blocks
    head = index // blocks % num_kv_heads
    part = index // (blocks * num_kv_heads)
    first_entry = part * group[:, Group.SPLIT_ENTRIES]
    offset = first_entry * problem.page_tokens
    tokens = torch.minimum(
        group[:, Group.NUM_TOKENS] - offset, group[:, Group.SPLIT_ENTRIES] * problem.page_tokens
    )
    row = block * tile_m
    partial = group[:, Group.PARTIAL] + part * group[:, Group.NUM_Q] + row // group_size
    table = torch.zeros((which.numel(), FIELDS), dtype=torch.long, device=groups.device)
    table[:, Work.KV_HEAD] = head
    table[:, Work.ROW_BEGIN] = group[:, Group.Q_BEGIN] * group_size + row
    table[:, Work.NUM_ROWS] = torch.clamp(rows - row, max=tile_m)
    table[:, Work.ENTRY] = group[:, Group.ENTRY] + first_entry
    table[:, Work.NUM_TOKENS] = tokens
    table[:, Work.KV_OFFSET] = offset
    table[:, Work.PARTIAL] = torch.where(group[:, Group.PARTIAL] == DIRECT, DIRECT, partial)
    table[:, Work.GROUP] = which
    order = torch.where(blocks > 1, split.LONGEST_FIRST, 1) * tokens
    return table[torch.sort(order, descending=True, stable=True).indices]
