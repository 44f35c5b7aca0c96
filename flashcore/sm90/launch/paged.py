"""Launch the paged kernels on torch tensors: the hot path of `flashcore.paged_attention` on Hopper.

    plan's tensors ─► attention over the work list ─► partial results ─► merge ─► out, lse

Two launches on torch's current stream (one where no result is partial), no synchronisation, so
calls can be captured in a CUDA graph. Where fp8 pages are expanded (`launch.expand`), attention
reads what was made of them. Arguments are taken as already checked (flashcore.validate).
A `PagedLaunch` may be kept with its plan and called again; `flashcore.api` does so.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from threading import get_ident
from typing import Any, NamedTuple

import torch

from flashcore.contract.counts import Count
from flashcore.jit.beside import compile_beside
from flashcore.jit.cache import shared_cache
from flashcore.jit.kernel import Kernel
from flashcore.jit.load import CompiledFunction, prepared
from flashcore.planner.expansion import AnyExpansion
from flashcore.planner.types import Planned
from flashcore.problem import NO_EXTRAS, Extras, KVPool, Rules
from flashcore.sm90.available import sm_count
from flashcore.sm90.config.merge import MergeConfig, choose_device_merge, choose_merge
from flashcore.sm90.config.paged import PagedCall, PagedConfig, choose
from flashcore.sm90.families import MERGE, PAGED
from flashcore.sm90.launch import expand
from flashcore.sm90.launch.allocate import Allocate, Buffer, allocator, contiguous
from flashcore.sm90.launch.streams import (
    current_device,
    lasting_stream,
    scheduler_scratch,
    unit_scale,
)
from flashcore.sm90.launch.tensors import DTYPE_NAMES, FP8_NAMES, packed, sink_logits, tma_ready
from flashcore.tree import by_depth

_ANY_WIDTH = 2**31 - 1
# Kept for a stream and a thread, by each remembered launch of a plan. A plan made ahead has few,
# for its own number of queries; a device plan has one for each number of rows that q has had.
_MAX_KEPT_PARTIALS = 32 << 20  # bytes
_MAX_KEPT_LSE = 256 << 10  # bytes; beyond it the allocation is small beside the attention

# LSE (None: the caller's, made for each call), partial results, counter; as `prepared` has them
_Buffers = tuple[Any, Any, Any, Any]

# KVPool and Extras, or plain tuples, which cost the host less
_Pool = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]
_Extras = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]

_functions: dict[PagedConfig | MergeConfig, CompiledFunction] = {}
_choose = lru_cache(maxsize=1024)(choose)  # a choice costs the host as much as a launch


class TreeWindow(NamedTuple):
    """What `tree.by_depth` needs where a window meets a tree mask."""

    q_index: torch.Tensor
    total_q: torch.Tensor | int
    left: int


@dataclass(frozen=True, slots=True, eq=False)
class PagedLaunch:
    """The launches of one plan with all that shapes, dtype, device and options decide.

    Where `reusable` it takes other tensors too: for those that do not fit the compiled function
    raises ValueError or TypeError.
    """

    attend: CompiledFunction | None  # on pages as they lie; None: no work
    expanded: expand.Expanded | None  # what there is of work on pages that are expanded before
    merge: CompiledFunction | None  # None: every result is direct
    device: torch.device
    other_devices: bool  # in this process; without them the device is always the current one
    allocate: Allocate
    out: Buffer
    lse: Buffer
    return_lse: bool
    fp8_heads: int  # KV heads of fp8 pages; 0 where pages have q's dtype
    partials: tuple[Buffer, Buffer] | None  # None: they are given, or there are none
    workspace: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]  # as far as it is given
    plan: tuple[Any, ...]  # cols to q_index; this and what follows as `load.prepared` has it
    merge_lists: tuple[Any, ...]
    counts: Any
    tree_window: TreeWindow | None
    scalars: tuple[float | int, ...]  # the last arguments of the attention kernel
    reusable: bool
    kept: dict[tuple[int, int], _Buffers] = field(default_factory=dict)

    def __call__(
        self,
        q: torch.Tensor,
        kv: _Pool,
        extras: _Extras,
        out: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(out, LSE or None)."""
        if self.other_devices and self.device.index != current_device():
            with torch.cuda.device(self.device):
                return self(q, kv, extras, out)
        k_pages, v_pages, k_scale, v_scale = kv
        sinks, tree_mask, tree_positions = extras
        if not self.reusable:
            q, k_pages, v_pages = _ready(q, k_pages, v_pages)
            out = None if out is None else tma_ready("out", out)
        if out is None:
            out = self.allocate(*self.out)
        if self.attend is None and self.merge is None and self.expanded is None:
            return out, (self.allocate(*self.lse) if self.return_lse else None)
        stream = lasting_stream(self.device.index)
        found = None if stream is None else self.kept.get((stream, get_ident()))
        lse, partial_out, partial_lse, scratch = found or self._buffers(stream)
        if self.return_lse:
            lse = self.allocate(*self.lse)
        wide = None
        if self.fp8_heads:
            if self.expanded is not None:
                wide = self.expanded.pages(k_pages, v_pages)
            if k_pages.dtype is not v_pages.dtype:  # as bytes they would be taken
                raise TypeError(f"k_pages are {k_pages.dtype} and v_pages {v_pages.dtype}")
            k_pages, v_pages = k_pages.view(torch.uint8), v_pages.view(torch.uint8)
            k_scale, v_scale = self._scale_of_heads(k_scale), self._scale_of_heads(v_scale)
        sinks = sink_logits(sinks)
        mask, positions, width = None, None, _ANY_WIDTH
        if tree_mask is not None:
            if self.tree_window is not None:
                tree_mask, positions = by_depth(tree_mask, tree_positions, *self.tree_window)
                positions = packed(positions)
            if tree_mask.stride(1) != 1:
                tree_mask = tree_mask.clone(memory_format=torch.contiguous_format)
            mask, width = tree_mask.view(torch.uint8), tree_mask.shape[1]
        # As `contract.operands` has them; built by their names they would cost a microsecond.
        counts = self.counts
        if wide is not None:
            assert self.expanded is not None
            counts = self.expanded.converted_counts
            self.expanded.attend(
                q,
                *wide,
                out,
                lse,
                partial_out,
                partial_lse,
                self.expanded.cols,
                *self.plan[1:],
                mask,
                positions,
                sinks,
                k_scale,
                v_scale,
                scratch,
                self.expanded.counts,
                *self.scalars,
            )
        if self.attend is not None:
            self.attend(
                q,
                k_pages,
                v_pages,
                out,
                lse,
                partial_out,
                partial_lse,
                *self.plan,
                mask,
                positions,
                sinks,
                k_scale,
                v_scale,
                scratch,
                counts,
                *self.scalars,
            )
        if self.merge is not None:
            self.merge(
                out, lse, partial_out, partial_lse, *self.merge_lists, sinks, self.counts, width
            )
        return out, (lse if self.return_lse else None)

    def _scale_of_heads(self, scale: torch.Tensor | None) -> torch.Tensor:
        """One for each KV head, or the same for all."""
        if scale is None:
            scale = unit_scale(self.device.index)
        return scale if scale.ndim else scale.expand(self.fp8_heads)

    def _buffers(self, stream: int | None) -> _Buffers:
        """What is kept for a stream and a thread, unless it is large.

        What a thread launches on a stream runs one after the other; another thread's launches may
        fall between an attention kernel and its merge.
        """
        lse = None if self.return_lse else self.allocate(*self.lse)
        partial_out, partial_lse, scratch = self.workspace
        if self.partials is not None:
            partial_out, partial_lse = (self.allocate(*buffer) for buffer in self.partials)
        counter = scheduler_scratch(self.device.index) if scratch is None else prepared(scratch)
        buffers = prepared(lse), prepared(partial_out), prepared(partial_lse), counter
        large = self.partials is not None and partial_out.nbytes > _MAX_KEPT_PARTIALS
        large |= lse is not None and lse.nbytes > _MAX_KEPT_LSE
        if stream is not None and not large:
            self.kept[stream, get_ident()] = buffers
        return buffers


def paged_launch(
    q: torch.Tensor,
    kv: KVPool,
    planned: Planned,
    rules: Rules,
    extras: Extras,
    out: torch.Tensor | None = None,
    return_lse: bool = True,
) -> PagedLaunch:
    """The launches of `paged_attention` for such tensors; only the plan's are kept."""
    if q.dtype not in DTYPE_NAMES:
        raise NotImplementedError(f"q has dtype {q.dtype}; the Hopper kernel takes bf16 and fp16")
    tensors, numbers, counts, workspace, expansion = planned
    total_q, heads, _ = q.shape
    tree_window = None
    if extras.tree_mask is not None:
        rules = rules._replace(window_right=-1)  # has no say
        if rules.window_left >= 0:
            total = total_q if counts is None else counts[int(Count.TOTAL_Q)]
            tree_window = TreeWindow(tensors.q_index, total, rules.window_left)
    call = _call(q, kv, planned, rules, extras)
    config = _choose(call, numbers.tile_m)
    expanded = None
    if expansion is not None and _expands(call, planned, expansion, rules, total_q):
        wide = _choose(call._replace(kv_dtype="", expanded=True), numbers.tile_m)
        expanded = expand.expanded_launch(_function(wide), kv, expansion, allocator(q.device))
    converts = expanded is None or counts is not None  # on the device either is found to do nothing
    # After the choice: a head_dim without kernels mostly has strides that TMA cannot take, too.
    ready = _ready(q, kv.k, kv.v)
    partials, v_dim = None, kv.v.shape[3]
    given: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]
    if workspace is not None:
        given = workspace
    else:
        given = (*_no_partials(q.device, heads, v_dim), None)
        if numbers.num_partial_tokens:
            rows = (numbers.num_partial_tokens, heads)
            partials = contiguous((*rows, v_dim), torch.float32), contiguous(rows, torch.float32)
    num_items = tensors.work.shape[0] if total_q else 0
    merge = _merge_config(q, planned, v_dim, extras.sinks is not None)
    merge_partials = tensors.merge_partials
    if merge is not None and merge_partials.numel() == 0:
        # Query tokens without keys: the merge writes their zeros and reads no list.
        merge_partials = tensors.merge_offsets
    ctas = min(num_items, config.ctas_per_sm * sm_count(q.device))
    out_ready = out is None or tma_ready("out", out) is out
    if num_items and converts and merge is not None and config not in _functions:
        compile_beside(shared_cache(), Kernel(PAGED, config), [Kernel(MERGE, merge)])
    return PagedLaunch(
        attend=_function(config) if num_items and converts else None,
        expanded=expanded,
        merge=None if merge is None else _function(merge),
        device=q.device,
        other_devices=torch.cuda.device_count() > 1,
        allocate=allocator(q.device),
        out=contiguous((total_q, heads, v_dim), q.dtype),
        lse=contiguous((total_q, heads), torch.float32),
        return_lse=return_lse,
        fp8_heads=kv.k.shape[2] if config.kv_dtype else 0,
        partials=partials,
        workspace=given,
        plan=tuple(
            prepared(x)
            for x in (
                tensors.cols,
                tensors.work,
                tensors.q_tokens,
                tensors.q_positions,
                tensors.q_index if config.tree else None,
            )
        ),
        merge_lists=(prepared(tensors.merge_offsets), prepared(merge_partials)),
        counts=prepared(counts),
        tree_window=tree_window,
        scalars=(rules.scale, rules.softcap, rules.window_left, rules.window_right, ctas),
        # Not where strides need repair, nor where no compiled function looks at the arguments.
        reusable=num_items > 0
        and out_ready
        and all(x is y for x, y in zip(ready, (q, kv.k, kv.v), strict=True)),
    )


def paged_attention(
    q: torch.Tensor,
    kv: KVPool,
    planned: Planned,
    rules: Rules,
    extras: Extras = NO_EXTRAS,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Shapes as in `flashcore.paged_attention` and `Plan`: (out [total_q, num_q_heads, v_head_dim],
    lse [total_q, num_q_heads]).

    out: to write the result to, made where not given.

    Raises NotImplementedError for a dtype, ValueError for a head_dim, page size or stride that the
    kernels cannot take.
    """
    launch = paged_launch(q, kv, planned, rules, extras, out)
    out, lse = launch(q, kv, extras, out)
    assert lse is not None  # return_lse is the default
    return out, lse


def _expands(
    call: PagedCall, planned: Planned, expansion: AnyExpansion, rules: Rules, total_q: int
) -> bool:
    """Whether a call is on expanded pages, or may be found to be on the device."""
    if not (call.kv_dtype and total_q and planned.tensors.work.shape[0]):
        return False
    return expansion.serves(rules, total_q) and expand.can_expand(expansion.forced)


def _call(q: torch.Tensor, kv: KVPool, planned: Planned, rules: Rules, extras: Extras) -> PagedCall:
    return PagedCall(
        DTYPE_NAMES[q.dtype],
        q.shape[2],
        kv.k.shape[1],
        q.shape[1] // kv.k.shape[2],
        kv.v.shape[3],
        causal=rules.causal,
        window=rules.windowed,
        softcap=rules.softcap > 0,
        sinks=extras.sinks is not None,
        tree=extras.tree_mask is not None,
        device_counts=planned.counts is not None,
        chunked=planned.numbers.batch_invariant,
        kv_dtype=FP8_NAMES.get(kv.k.dtype, ""),
    )


def _merge_config(
    q: torch.Tensor, planned: Planned, v_dim: int, has_sinks: bool
) -> MergeConfig | None:
    """None where there is nothing to merge."""
    total_q, heads, _ = q.shape
    if not (planned.numbers.needs_merge and total_q):
        return None
    dtype, invariant = DTYPE_NAMES[q.dtype], planned.numbers.batch_invariant
    if planned.counts is not None:
        return choose_device_merge(dtype, v_dim, has_sinks, total_q * heads, invariant)
    entries = planned.tensors.merge_partials.numel()
    return choose_merge(dtype, v_dim, has_sinks, entries, total_q, heads if invariant else 0)


def _ready(
    q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return tma_ready("q", q), tma_ready("k_pages", k_pages), tma_ready("v_pages", v_pages)


@lru_cache(maxsize=64)
def _no_partials(device: torch.device, heads: int, v_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One partial token that nobody touches: an empty tensor has no address to hand over."""
    partial_out = torch.empty((1, heads, v_dim), dtype=torch.float32, device=device)
    return partial_out, torch.empty((1, heads), dtype=torch.float32, device=device)


def _function(config: PagedConfig | MergeConfig) -> CompiledFunction:
    """The compiled function of `config`, compiled now if no process has done so before."""
    found = _functions.get(config)
    if found is None:
        family = PAGED if isinstance(config, PagedConfig) else MERGE
        found = _functions[config] = shared_cache().function(Kernel(family, config))
    return found
