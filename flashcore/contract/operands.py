"""What each compiled function is called with: the operands by name, in their order, once.

A kernel's signature has these names, it is compiled for stand-ins that are built by them, and what
a launch passes is built by them or compared with them (tests/test_operands.py). A tuple among the
operands stays a tuple in the call. Tensors are int32 and contiguous where nothing else is said;
sizes in capitals are those of `counts`, `scratch` and `work`. The stream comes last and is not
named here: a compiled function takes the caller's current one.
"""

from __future__ import annotations

from typing import Any, NamedTuple

Tensor = Any  # torch's in a launch, the DSL's in a kernel, a stand-in while one is compiled
Number = Any  # int32, fp32 where it belongs to scores


class Dense(NamedTuple):
    """Dense attention. Rows are [batch, tokens, heads, head_dim], with varlen [total tokens, heads,
    head_dim]; bf16 or fp16."""

    q: Tensor
    k: Tensor  # as q, with KV heads
    v: Tensor  # as k
    out: Tensor  # as q
    lse: Tensor  # fp32, as q without the last axis; or None
    cu_seqlens_q: Tensor  # [batch + 1] with varlen, else None
    cu_seqlens_k: Tensor
    sinks: Tensor  # fp32 [heads] or None
    counter: Tensor  # [2], zero before and after every launch; None where tiles are not drawn
    softmax_scale: Number
    softcap: Number
    window_left: Number  # -1: no bound
    window_right: Number
    max_seqlen_q: Number
    num_ctas: Number


class Paged(NamedTuple):
    """Attention over a plan's work list. q and out are bf16 or fp16, pages the same or bytes of
    fp8."""

    q: Tensor  # [total_q, heads, head_dim]
    k_pages: Tensor  # [pages, page_tokens, kv_heads, head_dim]
    v_pages: Tensor  # [pages, page_tokens, kv_heads, v_head_dim]
    out: Tensor  # [total_q, heads, v_head_dim]
    lse: Tensor  # fp32 [total_q, heads]
    partial_out: Tensor  # fp32 [partial tokens, heads, v_head_dim]
    partial_lse: Tensor  # fp32 [partial tokens, heads]
    cols: Tensor  # [entries]
    work: Tensor  # [items, FIELDS], columns `work.Work`
    q_tokens: Tensor  # [gathered] query token
    q_positions: Tensor  # [gathered]
    q_index: Tensor  # [total_q] place in its sequence, for a tree mask; else None
    tree_mask: Tensor  # uint8 [total_q, width] or None
    tree_positions: Tensor  # [total_q] where a window under a tree mask counts from them, else None
    sinks: Tensor  # fp32 [heads] or None
    k_scale: Tensor  # fp32 [kv_heads] of fp8 pages, in any stride; else None
    v_scale: Tensor
    counter: Tensor  # [2], zero before and after every launch
    counts: Tensor  # [Count.SIZE] of a plan made on the device, else None
    softmax_scale: Number
    softcap: Number
    window_left: Number  # -1: no bound
    window_right: Number
    num_ctas: Number


class Merge(NamedTuple):
    """The merge of partial results; tensors that `Paged` names are the same."""

    out: Tensor
    lse: Tensor
    partial_out: Tensor
    partial_lse: Tensor
    merge_offsets: Tensor  # [total_q + 1]
    merge_partials: Tensor  # [elements of all lists], DIRECT and INVALID are negative
    sinks: Tensor
    counts: Tensor
    tree_width: Number  # longest query that the plan may have


class PlannerSource(NamedTuple):
    """A layout made on the device; docs as in `sm90.device_pager.DeviceLayout`, whose capacities
    these are."""

    counts: Tensor  # [PagerCount.SIZE]
    bad: Tensor  # [max_batch]
    row_offsets: Tensor  # [max_batch + 1]
    kv_lens: Tensor  # [max_batch]
    cols: Tensor  # [max_entries], at most those of the plan
    token_counts: Tensor  # [max_entries]
    starts: Tensor  # [max_entries]
    rows: Tensor  # [max_entries]


class PlannerResult(NamedTuple):
    """The plan, at capacity; docs as in `planner.types.Plan`."""

    counts: Tensor  # [Count.SIZE]
    stats: Tensor  # int64 [Stat.SIZE]
    bad: Tensor  # [max_batch] `Fault` of each sequence
    row_offsets: Tensor  # [max_batch + 1]
    kv_lens: Tensor  # [max_batch]
    q_offsets: Tensor  # [max_batch + 1]
    cols: Tensor  # [max_entries]
    token_counts: Tensor  # [max_entries]
    groups: Tensor  # [max_segments, FIELDS]
    member_offsets: Tensor  # [max_segments + 1]
    member_rows: Tensor  # [max_segments]
    member_starts: Tensor  # [max_segments]
    decisions: Tensor  # [max_segments, 4]
    q_tokens: Tensor  # [max_gathered]
    q_positions: Tensor  # [max_gathered]
    q_index: Tensor  # [max_q]
    work: Tensor  # [max_items, FIELDS]
    merge_offsets: Tensor  # [max_q + 1]
    merge_partials: Tensor  # [max_partials + max_q]


class PlannerMemory(NamedTuple):
    """Scratch of the planner, whose lines `scratch` names. All may be longer than the plan's:
    planners that take turns share them."""

    slots: Tensor  # [num_pages, Slots.LINES]
    entries: Tensor  # [Entries.LINES, max_entries], with chunks LINES_OF_CHUNKS
    segments: Tensor  # [Segments.LINES, max_segments]
    found: Tensor  # [Groups.LINES, max_segments]
    rows: Tensor  # [Rows.LINES, max_batch]
    members: Tensor  # [Sort.LINES, max_segments]
    classes: Tensor  # [Sort.LINES_OF_CLASSES, 2 * max_segments]
    tiles: Tensor  # int64 [Tiles.LINES, SCAN_THREADS]


class PlannerProblem(NamedTuple):
    """What does not change from update to update; int32 but for the address."""

    page_tokens: Number
    num_pages: Number
    kv_heads: Number
    group_size: Number  # query heads of one KV head
    tile_m: Number
    kv_token_cost: Number  # `folding.Costs`
    partial_token_cost: Number
    least_gain: Number
    fold: Number  # 0: groups stay as found
    num_workers: Number  # 0 or 1: no split
    min_split_tokens: Number  # `planner.split`
    long_split_tokens: Number
    split_unit: Number  # tokens; splits are multiples of it
    block_cost: Number  # `split.block_cost`
    chunk_pages: Number  # `planner.chunks`, where the config has chunks
    long_chunk_pages: Number
    few_queries: Number  # more make chunks long
    seen: Number  # int64, address of `counts.Seen` in pinned memory of the host; 0: nowhere


class Planner(NamedTuple):
    """The planner's kernels."""

    page_table: Tensor  # [batch, max_pages]; None where there is a source
    seq_lens: Tensor  # [batch]; None where there is a source
    q_lens: Tensor  # [batch]
    source: PlannerSource | None
    plan: PlannerResult
    scratch: PlannerMemory
    problem: PlannerProblem
    num_sms: Number


class PagerBatch(NamedTuple):
    """What an update of the pager is given."""

    pages: Tensor  # [tokens] page of each token, or [batch, max_pages]
    begins: Tensor  # [batch] first token of each sequence in a token map, else None
    ends: Tensor  # [batch] token after its last; with a page table its length
    resident: Tensor  # uint8 [pages], int32 [words] or None


class PagerResult(NamedTuple):
    """The layout at capacity; docs as in `sm90.device_pager.DeviceLayout`."""

    counts: Tensor  # [PagerCount.SIZE]
    bad: Tensor  # [max_batch]
    row_offsets: Tensor  # [max_batch + 1]
    kv_lens: Tensor  # [max_batch]
    cols: Tensor  # [max_entries]
    token_counts: Tensor  # [max_entries]
    starts: Tensor  # [max_entries]
    rows: Tensor  # [max_entries]
    staging_ids: Tensor  # [max_entries]


class PagerMemory(NamedTuple):
    """Scratch of the pager. Nothing in it outlives an update but stamps that tell it from the
    last."""

    changes: Tensor  # [max_tokens] places of page changes
    pieces: Tensor  # [max_tokens] entries of all runs between the first change and this one
    ranges: Tensor  # [PagerRanges.LINES, max_batch]
    slots: Tensor  # int64 [pages]: first entry of the page, below the update's stamp
    tiles: Tensor  # int64 [PagerTiles.LINES, SCAN_THREADS]


class Pager(NamedTuple):
    """The pager's kernels. The batch is not a tuple: DSL 4.6 finds the device by tensors outside of
    tuples."""

    pages: Tensor
    begins: Tensor
    ends: Tensor
    resident: Tensor
    layout: PagerResult
    scratch: PagerMemory
    page_tokens: Number
    num_pages: Number
    num_sms: Number
