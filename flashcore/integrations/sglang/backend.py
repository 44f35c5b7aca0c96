"""SGLang's AttentionBackend: every forward is planned once, every layer is one call."""

from __future__ import annotations

import logging
from typing import Any

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.radix_attention import AttentionType
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool

import flashcore
from flashcore.integrations.sglang import compiled
from flashcore.integrations.sglang.layers import attention_layers, kinds_of, kv_scales
from flashcore.integrations.sglang.limits import limits_of
from flashcore.integrations.sglang.padding import real_sequences
from flashcore.integrations.sglang.speculation import TreeMasks, drafts_are_trees
from flashcore.integrations.sglang.support import OPTIONS, model_of, parallel_ranks, refusal
from flashcore.serving import capacity, expanding, kernels, planners, warmup
from flashcore.serving.capacity import Kind
from flashcore.serving.counters import Counters, FaultLog
from flashcore.serving.page_tables import Slots
from flashcore.serving.planners import Memory
from flashcore.serving.shapes import Limits
from flashcore.serving.views import Need, View
from flashcore.sm90.planner_scratch import PlannerScratch

logger = logging.getLogger(__name__)

_Scales = tuple[torch.Tensor | None, torch.Tensor | None]


class FlashcoreBackend(AttentionBackend):
    """Attention of one ModelRunner over its paged KV cache.

    Page tables are read from SGLang's slots before a forward, and outside of CUDA graphs, which may
    not look at them later; the plan is made from that copy, as the first thing in a captured graph.
    """

    needs_cpu_seq_lens = False

    def __init__(self, model_runner: Any):
        super().__init__()
        self.model = model_of(model_runner)
        self.max_context_len = model_runner.model_config.context_len  # read by EAGLE's worker
        self.token_to_kv_pool = model_runner.token_to_kv_pool
        # Read by SGLang's wrappers: hybrid models', two-batch overlap's, its forward context's.
        self.req_to_token_pool = model_runner.req_to_token_pool
        self.data_type = model_runner.kv_cache_dtype
        self.req_to_token = model_runner.req_to_token_pool.req_to_token
        self._is_draft = model_runner.is_draft_worker
        args = model_runner.server_args
        limits = limits_of(model_runner, self.model)
        self._invariant = limits.batch_invariant
        self._make_views(limits)
        self.layers = attention_layers(model_runner)
        # By layer, made before anything is captured: k_scale and v_scale of an fp8 cache.
        self._scales: dict[int, _Scales] = {}
        for layer in self.layers:
            self._scales_of(layer)
        compiled.number_layers(self.layers)
        self.number = compiled.enter(self)  # of `compiled`
        self._masks = TreeMasks(self.model, self.max_context_len, limits.batch, self._is_draft)
        if self._workspace is not None:
            self._prepare(model_runner, limits.batch)
        rank = parallel_ranks(model_runner).attn_tp_rank
        interval = getattr(args, "decode_log_interval", None) or 40
        self._counters = {
            mode: Counters(mode, interval, quiet=rank != 0 or self._is_draft)
            for mode in ("decode", "verify", "prefill")
        }
        self._faults = FaultLog(self._views, interval, quiet=rank != 0)
        self._mode = "decode"
        self._tree: torch.Tensor | None = None  # mask of this forward
        self._nothing = False  # no query token in this forward
        self._tree_positions: torch.Tensor | None = None  # of this forward, for windowed layers
        self._swa_loc: torch.Tensor | None = None  # of this forward
        self._swa_loc_buffer: torch.Tensor | None = None  # of captured graphs
        self._swa_filled = 0  # of it, by the last batch
        if not self._is_draft and rank == 0:
            logger.info("%s", self.describe())

    def _make_views(self, limits: Limits) -> None:
        model, pool = self.model, self.token_to_kv_pool
        translation, full_pool, windowed_pool = None, pool, pool
        self._two_pools = isinstance(pool, SWAKVPool) and pool.swa_layer_nums > 0
        if self._two_pools:
            full_pool, windowed_pool = pool.full_kv_pool, pool.swa_kv_pool
            translation = pool.full_to_swa_index_mapping
            if translation is None:
                raise refusal("this sliding-window pool, which has no map from slot to slot")
        full = windowed = None
        if model.full:
            full = Kind(model.full, -1, _pool_slots(full_pool))
        if model.windowed:
            windowed = Kind(model.windowed, model.window, _pool_slots(windowed_pool))
        memory = self._take_memory(limits, [kind for kind in (full, windowed) if kind])

        def view(kind: Kind, translation: Any) -> View:
            return View(
                model,
                kind.shape,
                window=kind.window,
                num_pages=kind.slots // model.page_tokens,
                limits=limits,
                memory=memory,
                translation=translation,
            )

        self.full = view(full, None) if full else None
        self.windowed = view(windowed, translation) if windowed else None
        self._views = [v for v in (self.full, self.windowed) if v is not None]

    def _take_memory(self, limits: Limits, kinds: list[Kind]) -> Memory:
        """What the views share; NotServed where all that plans take is too much."""
        model, self._workspace, scratch, expansion = self.model, None, None, None
        queries = limits.batch * max(1, model.draft_tokens)
        on_kernels = planners.on_kernels(model.device)
        elements = planners.workspace_for(model, min(queries, 1024)) if on_kernels else 0
        self._plan_bytes = capacity.check(model, limits, kinds, elements, OPTIONS)
        if on_kernels:
            self._workspace = torch.empty(elements, dtype=torch.float32, device=model.device)
            sizes = capacity.scratch_sizes(limits, model.page_tokens, kinds)
            scratch = PlannerScratch(*sizes, chunks=limits.batch_invariant, device=model.device)
            if not self._is_draft:  # one layer, whose target has taken its room
                layers = [expanding.Layers(model, limits, kind) for kind in kinds]
                expansion, more = expanding.room_to_expand(layers, self._plan_bytes)
                self._plan_bytes += more
        self._expansion = expansion
        return Memory(self._workspace, scratch, expansion)

    def _prepare(self, model_runner: Any, max_batch: int) -> None:
        """Compile, load and launch every kernel that a forward can ask for."""
        tree = drafts_are_trees(model_runner)
        kinds = kinds_of(self.model, model_runner)
        needed = kernels.wanted(self.model, kinds, max_batch, tree, self._invariant)
        with warmup.compiled(needed, self.model.device):
            for kind in kinds:
                view = self.windowed if kind.windowed else self.full
                layer = next((x for x in self.layers if _is_windowed(x) == kind.windowed), None)
                if view is None or layer is None or self._workspace is None:
                    continue
                k, v = self.token_to_kv_pool.get_kv_buffer(layer.layer_id)
                cache = warmup.Cache(
                    *(k, v, self.req_to_token, view.translation, view.window, self._workspace),
                    batch_invariant=self._invariant,
                    scales=self._scales_of(layer),
                    appended=True,
                    expansion=self._expansion,
                )
                warmup.run_all(self.model, kind, cache, needed, tree)

    def describe(self) -> str:
        """What serves, in one line."""
        model = self.model
        path = "Hopper kernels" if self._workspace is not None else "torch operators"
        kinds = [f"full attention {model.full}"] if model.full else []
        if model.windowed:
            kinds.append(f"window {model.window} {model.windowed}")
        room = max(view.room.entries for view in self._views)
        rule = ", deterministic" if self._invariant else ""
        dtypes = str(model.dtype).removeprefix("torch.")
        if model.fp8:
            dtypes += f" on a KV cache in {str(model.cache_dtype).removeprefix('torch.')}"
        return (
            f"flashcore attention: {path}, {', '.join(kinds)}, {dtypes}, "
            f"page size {model.page_tokens}, "
            f"plans of up to {room} pages{rule}{expanding.describe(model, self._expansion)}, "
            f"buffers {self._bytes() / 2**20:.0f} MiB"
        )

    def _bytes(self) -> int:
        """Memory that is kept; with graphs' tables, before they are there."""
        return self._plan_bytes + self._masks.bytes

    # Metadata of a forward

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Eager forwards, and those at the breaks of a prefill graph."""
        self._take(forward_batch, graph=False)
        self.init_forward_metadata_in_graph(forward_batch)

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Allocate what captured graphs read."""
        for view in self._views:
            view.allocate_graph_tables(max_bs)
        if self._two_pools:
            self._swa_loc_buffer = torch.zeros(
                max_num_tokens, dtype=torch.int64, device=self.model.device
            )
        self._masks.allocate(max_bs, max_num_tokens)
        size = self._bytes() / 2**20
        logger.info("flashcore attention: graphs of up to %d, buffers now %.0f MiB", max_bs, size)

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        """Before a capture and before each replay: slots, masks and lengths into our buffers."""
        mode = forward_batch.forward_mode
        if in_capture and mode.is_extend() and not _is_decode_like(mode):
            raise refusal(
                "prefill inside a full CUDA graph", "use --cuda-graph-backend-prefill breakable"
            )
        self._take(forward_batch, graph=True, in_capture=in_capture)

    def init_forward_metadata_in_graph(self, forward_batch: Any) -> None:
        """The plan, from the tables alone: kernels, recorded first in a captured graph."""
        if self._nothing:
            return
        for view in self._views:
            view.make_plan()

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        """Length of the sequences that pad a graph's batch. They are left out of the plan."""
        return 1

    def _take(self, fb: Any, *, graph: bool, in_capture: bool = False) -> None:
        mode = fb.forward_mode
        decode = _is_decode_like(mode)
        real = real_sequences(fb)
        # A graph has its batch's size; an eager batch may be padded beyond what can run.
        batch = fb.batch_size if graph else real
        new: torch.Tensor | int = 1
        added, queries = 0, batch
        if mode.is_target_verify():
            if getattr(fb.spec_info, "ragged_verify_layout", None) is not None:
                raise refusal("verify with a number of draft tokens for each sequence")
            new = added = int(fb.spec_info.draft_token_num)
            queries = batch * new
        elif not mode.is_decode_or_idle():
            new, queries = self._new_tokens(fb, batch)
        self._nothing = not graph and (queries == 0 or mode.is_idle())
        if self._nothing:
            self._tree = self._tree_positions = None
            return
        requests, seq_lens, tokens = fb.req_pool_indices, fb.seq_lens, None
        if not graph:
            requests, seq_lens = requests[:batch], seq_lens[:batch]
            lengths = getattr(fb, "seq_lens_cpu", None)
            tokens = None if lengths is None else int(lengths[:batch].sum()) + batch * added
        slots = Slots(self.req_to_token, requests, seq_lens, new, added, real)
        need = Need(batch, queries, tokens)
        self._count(mode, decode, in_capture)
        for view in self._views:
            view.take(slots, need, decode=decode, graph=graph)
        self._take_swa_loc(fb, queries, graph)
        self._tree, self._tree_positions = self._masks.take(fb, real, queries, graph, in_capture)

    def _new_tokens(self, fb: Any, batch: int) -> tuple[torch.Tensor | int, int]:
        """New tokens of each of `batch` sequences, and of all of them."""
        lengths = getattr(fb, "extend_seq_lens", None)
        if lengths is None:  # draft extend in a graph: as many for each
            return self.model.draft_tokens, batch * self.model.draft_tokens
        # int64 where data parallelism makes an extend of a decode: kernels are compiled for int32.
        lengths = lengths[:batch].int()
        on_host = getattr(fb, "extend_seq_lens_cpu", None)
        if on_host is not None:
            return lengths, int(sum(on_host[:batch]))
        return lengths, fb.positions.numel() if batch else 0

    def _take_swa_loc(self, fb: Any, queries: int, graph: bool) -> None:
        """Where windowed layers write: SGLang has the slots of the other pool alone."""
        self._swa_loc = None
        loc = getattr(fb, "out_cache_loc", None)
        if not self._two_pools or loc is None:
            return
        if not graph:
            self._swa_loc = self.token_to_kv_pool.translate_loc_from_full_to_swa(loc)
            return
        assert self._swa_loc_buffer is not None
        count = loc.numel()
        # The same in one launch; a slot of -1 finds the map's last element, which is -1, too.
        mapping = self.token_to_kv_pool.full_to_swa_index_mapping
        torch.take(mapping, loc.long(), out=self._swa_loc_buffer[:count])
        if count < self._swa_filled:  # padding writes to the dump of slot 0
            self._swa_loc_buffer[count : self._swa_filled].zero_()
        self._swa_filled = count
        self._swa_loc = self._swa_loc_buffer[: max(queries, count)]

    def _count(self, mode: Any, decode: bool, in_capture: bool) -> None:
        """Tell the counters of the plan before this one, of the mode it was made in."""
        if not in_capture:
            self._faults.look()
            view = self._views[0]
            self._counters[self._mode].step(view.planner.stats(), view.planner.outcome())
        self._mode = "verify" if mode.is_target_verify() else "decode" if decode else "prefill"

    # Speculative decoding: the mask that the worker fills after drafting

    @property
    def verify_mask(self) -> Any:
        """The mask as SGLang 0.5.23 asks for it."""
        return self._masks.verify_mask

    def get_verify_buffers_to_fill_after_draft(self) -> list[torch.Tensor | None]:
        """The mask as SGLang 0.5.16 asks for it."""
        return [self._masks.draft_mask, None]

    def update_verify_buffers_to_fill_after_draft(
        self, spec_info: Any, cuda_graph_bs: int | None
    ) -> None:
        """The mask is final. A graph's batch may have been taken before; an eager one comes after.

        SGLang calls this with the overlap plan stream, once the forward's stream has waited for it.
        """
        if cuda_graph_bs is not None:
            self._masks.refresh(spec_info)

    def shared_read_ends(self, forward_mode: Any) -> Any:
        """SGLang 0.5.23: where reads of what the scheduler shares end, in every mode: request rows
        and the map between pools are copied before a forward, and no kernel of it looks at them."""
        from sglang.srt.layers.attention.base_attn_backend import SharedReadEnds

        return SharedReadEnds.PRE_REPLAY

    # Layers

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
        **options: Any,
    ) -> torch.Tensor:
        """SGLang's call of a layer. A rank that idles gives zeros, where the base has leftovers."""
        if forward_batch.forward_mode.is_idle():
            return q.new_zeros(q.shape[0], layer.tp_q_head_num * layer.v_head_dim)
        out: torch.Tensor = super().forward(q, k, v, layer, forward_batch, save_kv_cache, **options)
        return out

    def forward_extend(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
        *,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Any number of new tokens: q [tokens, heads * head_dim] to [tokens, heads * v_head_dim].

        Gemma 3 gives q as [tokens, heads, head_dim] or [1, tokens, heads, head_dim], the latter
        transposed; the result is [tokens, heads * v_head_dim] for these too.
        """
        if torch.is_grad_enabled():  # a model whose forward SGLang does not run without gradients
            k, v, sinks = (x if x is None else x.detach() for x in (k, v, sinks))
            with torch.no_grad():
                return self.forward_extend(
                    q.detach(), k, v, layer, forward_batch, save_kv_cache, sinks=sinks
                )
        q = q.reshape(-1, layer.tp_q_head_num * layer.head_dim)
        width = layer.tp_q_head_num * layer.v_head_dim
        out = getattr(forward_batch, "_attn_output", None)
        if out is None or out.numel() != q.shape[0] * width:
            out = q.new_empty(q.shape[0], width)
        if k is None or not save_kv_cache:
            k = v = loc = None
        else:
            loc = forward_batch.out_cache_loc
        if torch.compiler.is_compiling():
            compiled.attend(self, q, k, v, out, layer, loc, sinks)
        else:
            self.run_layer(q, k, v, out, layer, loc, sinks)
        return out.view(q.shape[0], width)

    def run_layer(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        out: torch.Tensor,
        layer: Any,
        loc: torch.Tensor | None,
        sinks: torch.Tensor | None,
    ) -> None:
        """Write k and v [tokens, heads, head_dim] to the slots `loc`, if given, and attend: q
        [tokens, heads * head_dim] to out [tokens, heads * v_head_dim]."""
        if self._nothing:
            out.zero_()
            return
        windowed = _is_windowed(layer)
        view, (k_scale, v_scale) = self._view_of(layer, windowed), self._scales_of(layer)
        if k is not None:
            assert v is not None
            self._store(layer, view, k, v, loc)
        tokens, heads = q.shape[0], layer.tp_q_head_num
        k_pool, v_pool = self.token_to_kv_pool.get_kv_buffer(layer.layer_id)
        view.attend(
            q.view(tokens, heads, layer.head_dim),
            k_pool,
            v_pool,
            out=out.view(tokens, heads, layer.v_head_dim),
            scale=layer.scaling,
            causal=layer.attn_type != AttentionType.ENCODER_ONLY,
            window=(layer.sliding_window_size, 0) if windowed else None,
            softcap=layer.logit_cap or 0.0,
            sinks=sinks,
            k_scale=k_scale,
            v_scale=v_scale,
            tree_mask=self._tree,
            tree_positions=self._tree_positions,
        )

    def _store(
        self, layer: Any, view: View, k: torch.Tensor, v: torch.Tensor, loc: torch.Tensor | None
    ) -> None:
        """Into the slots `loc`, or those of the other pool.

        SGLang's own store of fp8 divides by the scale in the model's dtype, in place, and casts
        without saturating, which makes NaN of large values; ours rounds once.
        """
        swa_loc = self._swa_loc
        if swa_loc is not None and len(swa_loc) > len(k):  # of the padded batch of a graph
            swa_loc = swa_loc[: len(k)]
        if not self.model.fp8:
            write = KVWriteLoc(loc, swa_loc)
            pool = self.token_to_kv_pool
            pool.set_kv_buffer(layer, write, k, v, layer.k_scale, layer.v_scale)
            return
        k_scale, v_scale = self._scales_of(layer)
        flashcore.append_kv(
            *(k, v, *view.pages(*self.token_to_kv_pool.get_kv_buffer(layer.layer_id))),
            slot_mapping=swa_loc if self._two_pools and view is self.windowed else loc,
            k_scale=k_scale,
            v_scale=v_scale,
        )

    def _scales_of(self, layer: Any) -> _Scales:
        if not self.model.fp8:
            return None, None
        found = self._scales.get(layer.layer_id)
        if found is None:
            found = self._scales[layer.layer_id] = kv_scales(layer, self.model.device)
        return found

    forward_decode = forward_extend  # one new token each

    def _view_of(self, layer: Any, windowed: bool) -> View:
        view = self.windowed if windowed else self.full
        if view is None or (windowed and layer.sliding_window_size > view.window):
            raise refusal(
                f"layer {layer.layer_id} with sliding window {layer.sliding_window_size} in a "
                f"model that announces {self.model.window}"
            )
        return view


def _is_windowed(layer: Any) -> bool:
    return layer.sliding_window_size is not None and layer.sliding_window_size >= 0


def _pool_slots(pool: Any) -> int:
    """Slots of a pool's tensors: its size may be settled only after graphs are captured."""
    buffers = getattr(getattr(pool, "full_kv_pool", pool), "k_buffer", None)
    return int(buffers[0].shape[0]) if buffers else int(pool.size + pool.page_size)


def _is_decode_like(mode: Any) -> bool:
    """Decode, verify, draft extend: few new tokens each, and captured in graphs."""
    return bool(mode.is_decode_or_idle() or mode.is_target_verify() or mode.is_draft_extend_v2())
