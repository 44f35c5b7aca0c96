"""SGLang's AttentionBackend: every forward is planned once, every layer is one call."""

from __future__ import annotations

import logging
from typing import Any

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.radix_attention import AttentionType
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool

from flashcore.sglang import kernels, page_tables, planners
from flashcore.sglang.counters import Counters
from flashcore.sglang.page_tables import Slots
from flashcore.sglang.support import Model, NotServed, attention_layers, parallel_ranks
from flashcore.sglang.views import Need, View

logger = logging.getLogger(__name__)


class FlashcoreBackend(AttentionBackend):
    """Attention of one ModelRunner over its paged KV cache.

    Page tables are read from SGLang's slots before a forward, and outside of CUDA graphs, which may
    not look at them later; the plan is made from that copy, as the first thing in a captured graph.
    """

    needs_cpu_seq_lens = False

    def __init__(self, model_runner: Any):
        super().__init__()
        self.model = Model.of(model_runner)
        self.max_context_len = model_runner.model_config.context_len  # read by EAGLE's worker
        self.token_to_kv_pool = model_runner.token_to_kv_pool
        self.req_to_token = model_runner.req_to_token_pool.req_to_token
        self._is_draft = model_runner.is_draft_worker
        args = model_runner.server_args
        self._make_views(model_runner.req_to_token_pool.size)
        if self._workspace is not None:
            capped = any(layer.logit_cap for layer in attention_layers(model_runner))
            topk = getattr(args, "speculative_eagle_topk", None) or 0
            ngram = str(getattr(args, "speculative_algorithm", None)).upper() == "NGRAM"
            kernels.prepare(
                self.model, model_runner.req_to_token_pool.size, capped, topk > 1 or ngram
            )
        rank = parallel_ranks(model_runner).attn_tp_rank
        interval = getattr(args, "decode_log_interval", None) or 40
        self._counters = {
            mode: Counters(mode, interval, quiet=rank != 0 or self._is_draft)
            for mode in ("decode", "verify", "prefill")
        }
        self._mode = "decode"
        self._tree: torch.Tensor | None = None  # mask of this forward
        self._tree_buffer: torch.Tensor | None = None  # of captured graphs
        self._tree_positions: torch.Tensor | None = None  # of this forward, for windowed layers
        self._tree_positions_buffer: torch.Tensor | None = None  # of captured graphs
        self._draft_mask: torch.Tensor | None = None  # that EAGLE's worker fills
        self._swa_loc: torch.Tensor | None = None  # of this forward
        self._swa_loc_buffer: torch.Tensor | None = None  # of captured graphs
        if not self._is_draft and rank == 0:
            logger.info("%s", self.describe())

    def _make_views(self, max_batch: int) -> None:
        model, pool = self.model, self.token_to_kv_pool
        translation, full_pool, windowed_pool = None, pool, pool
        self._two_pools = isinstance(pool, SWAKVPool) and pool.swa_layer_nums > 0
        if self._two_pools:
            full_pool, windowed_pool = pool.full_kv_pool, pool.swa_kv_pool
            translation = pool.full_to_swa_index_mapping
            if translation is None:
                raise NotServed("this sliding-window pool, which has no map from slot to slot")
        self._workspace = None
        if model.device.type == "cuda":
            queries = max_batch * max(1, model.draft_tokens)
            self._workspace = planners.workspace_for(model, min(queries, 1024))

        def view(shape: Any, window: int, one: Any, translation: Any) -> View:
            return View(
                model,
                shape,
                window=window,
                num_pages=_pool_slots(one) // model.page_tokens,
                max_batch=max_batch,
                max_tokens=self.req_to_token.shape[1],
                workspace=self._workspace,
                translation=translation,
            )

        self.full = view(model.full, -1, full_pool, None) if model.full else None
        self.windowed = None
        if model.windowed:
            self.windowed = view(model.windowed, model.window, windowed_pool, translation)
        self._views = [v for v in (self.full, self.windowed) if v is not None]

    def describe(self) -> str:
        """What serves, in one line."""
        model = self.model
        path = "Hopper kernels" if self._workspace is not None else "torch operators"
        kinds = [f"full attention {model.full}"] if model.full else []
        if model.windowed:
            kinds.append(f"window {model.window} {model.windowed}")
        room = max(view.decode_entries for view in self._views)
        return (
            f"flashcore attention: {path}, {', '.join(kinds)}, "
            f"{str(model.dtype).removeprefix('torch.')}, page size {model.page_tokens}, "
            f"plans of up to {room} pages, buffers {self._bytes() / 2**20:.0f} MiB"
        )

    def _bytes(self) -> int:
        workspace = 0 if self._workspace is None else 4 * self._workspace.numel()
        return workspace + sum(view.bytes for view in self._views)

    # Metadata of a forward

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Eager forwards, and those at the breaks of a prefill graph."""
        self._take(forward_batch, graph=False)
        self.init_forward_metadata_in_graph(forward_batch)

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Allocate what captured graphs read."""
        for view in self._views:
            view.allocate_graph_tables(max_bs)
        n, device = self.model.draft_tokens, self.model.device
        if self._two_pools:
            self._swa_loc_buffer = torch.zeros(max_num_tokens, dtype=torch.int64, device=device)
        if n:
            self._tree_buffer = torch.ones(max_num_tokens, n, dtype=torch.bool, device=device)
            if self.windowed is not None:
                self._tree_positions_buffer = torch.ones(
                    max_num_tokens, dtype=torch.int32, device=device
                )
            if not self._is_draft:
                self._allocate_draft_mask(max_bs, max_num_tokens)
        size = self._bytes() / 2**20
        logger.info("flashcore attention: graphs of up to %d, buffers now %.0f MiB", max_bs, size)

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        """Before a capture and before each replay: slots, masks and lengths into our buffers."""
        mode = forward_batch.forward_mode
        if in_capture and mode.is_extend() and not _is_decode_like(mode):
            raise NotServed(
                "prefill inside a full CUDA graph", "use --cuda-graph-backend-prefill breakable"
            )
        self._take(forward_batch, graph=True, in_capture=in_capture)

    def init_forward_metadata_in_graph(self, forward_batch: Any) -> None:
        """The plan, from the tables alone: kernels, recorded first in a captured graph."""
        for view in self._views:
            view.make_plan()

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        """Length of the sequences that pad a graph's batch. They are left out of the plan."""
        return 1

    def _take(self, fb: Any, *, graph: bool, in_capture: bool = False) -> None:
        mode = fb.forward_mode
        decode = _is_decode_like(mode)
        batch = fb.batch_size
        real = batch - (getattr(fb, "num_padding", 0) or 0)
        new: torch.Tensor | int = 1
        added, queries = 0, batch
        if mode.is_target_verify():
            if getattr(fb.spec_info, "ragged_verify_layout", None) is not None:
                raise NotServed("verify with a number of draft tokens for each sequence")
            new = added = int(fb.spec_info.draft_token_num)
            queries = batch * new
        elif not mode.is_decode_or_idle():
            new, queries = self._new_tokens(fb)
        slots = Slots(self.req_to_token, fb.req_pool_indices, fb.seq_lens, new, added, real)
        lengths = getattr(fb, "seq_lens_cpu", None)
        tokens = None if lengths is None else int(lengths.sum()) + batch * added
        need = Need(batch, queries, tokens)
        self._count(mode, decode, in_capture)
        for view in self._views:
            view.take(slots, need, decode=decode, graph=graph)
        self._take_swa_loc(fb, queries, graph)
        self._take_tree(fb, real, queries, graph, in_capture)

    def _new_tokens(self, fb: Any) -> tuple[torch.Tensor | int, int]:
        """New tokens of each sequence, and of all of them."""
        lengths = getattr(fb, "extend_seq_lens", None)
        if lengths is None:  # draft extend in a graph: as many for each
            return self.model.draft_tokens, fb.batch_size * self.model.draft_tokens
        on_host = getattr(fb, "extend_seq_lens_cpu", None)
        if on_host is not None:
            return lengths, int(sum(on_host))
        return lengths, fb.positions.numel()

    def _take_swa_loc(self, fb: Any, queries: int, graph: bool) -> None:
        """Where windowed layers write: SGLang has the slots of the other pool alone."""
        self._swa_loc = None
        loc = getattr(fb, "out_cache_loc", None)
        if not self._two_pools or loc is None:
            return
        translated = self.token_to_kv_pool.translate_loc_from_full_to_swa(loc)
        if not graph:
            self._swa_loc = translated
            return
        assert self._swa_loc_buffer is not None
        self._swa_loc_buffer[: loc.numel()].copy_(translated)
        self._swa_loc_buffer[loc.numel() :].zero_()  # padding writes to the dump of slot 0
        self._swa_loc = self._swa_loc_buffer[: max(queries, loc.numel())]

    def _take_tree(self, fb: Any, real: int, queries: int, graph: bool, in_capture: bool) -> None:
        self._tree = self._tree_positions = None
        spec = fb.spec_info
        if not fb.forward_mode.is_target_verify() or not _is_tree(spec):
            return
        n = int(spec.draft_token_num)
        if graph:
            assert self._tree_buffer is not None
            self._tree = self._tree_buffer[:queries]
            if self._tree_positions_buffer is not None:
                self._tree_positions = self._tree_positions_buffer[:queries]
            if in_capture:
                return  # there is no tree yet
        else:
            self._tree = torch.empty(queries, n, dtype=torch.bool, device=self.model.device)
            if self.windowed is not None:
                self._tree_positions = torch.empty(
                    queries, dtype=torch.int32, device=self.model.device
                )
        mask = spec.custom_mask
        own = self._draft_mask is not None and mask.data_ptr() == self._draft_mask.data_ptr()
        full = not (own and self._mask_of_drafts) and mask.numel() != real * n * n
        page_tables.tree_mask(self._tree, mask, fb.seq_lens[:real], n, full)
        if self._tree_positions is not None:  # rows hold all ancestors and the token itself
            torch.sum(self._tree, 1, dtype=torch.int32, out=self._tree_positions)

    def _count(self, mode: Any, decode: bool, in_capture: bool) -> None:
        """Tell the counters of the plan before this one, of the mode it was made in."""
        if not in_capture:
            view = self._views[0]
            self._counters[self._mode].step(view.planner.stats())
        self._mode = "verify" if mode.is_target_verify() else "decode" if decode else "prefill"

    # Speculative decoding: the mask that the worker fills after drafting

    _mask_of_drafts = False  # over the draft tokens alone, not over all keys

    def _allocate_draft_mask(self, max_bs: int, max_num_tokens: int) -> None:
        """The mask that EAGLE's worker fills in place, so that it need not know the lengths."""
        n, device = self.model.draft_tokens, self.model.device
        verify_mask = _verify_mask_type()
        if verify_mask is None:  # 0.5.16: over all keys
            elements = max_num_tokens * (self.max_context_len + n)
            self._draft_mask = torch.zeros(elements, dtype=torch.bool, device=device)
            return
        mask_type, mode = verify_mask
        self._mask_of_drafts = True
        self._draft_mask = torch.zeros(max_bs * n * n, dtype=torch.bool, device=device)
        self._verify_mask = mask_type(
            buffer=self._draft_mask, mode=mode, max_bs=max_bs, is_read=True
        )

    _verify_mask: Any = None

    @property
    def verify_mask(self) -> Any:
        """The mask as SGLang 0.5.23 asks for it."""
        return self._verify_mask

    def get_verify_buffers_to_fill_after_draft(self) -> list[torch.Tensor | None]:
        """The mask as SGLang 0.5.16 asks for it."""
        return [self._draft_mask, None]

    def update_verify_buffers_to_fill_after_draft(
        self, spec_info: Any, cuda_graph_bs: int | None
    ) -> None:
        """Nothing: the mask is read when the verify forward begins."""

    def shared_read_ends(self, forward_mode: Any) -> Any:
        """SGLang 0.5.23: where reads of req_to_token end. No kernel of a forward looks at it."""
        from sglang.srt.layers.attention.base_attn_backend import SharedReadEnds

        if _is_decode_like(forward_mode):
            return SharedReadEnds.PRE_REPLAY
        return super().shared_read_ends(forward_mode)

    # Layers

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
        """Any number of new tokens: q [tokens, heads * head_dim] to the same shape."""
        if k is not None and save_kv_cache:
            self.token_to_kv_pool.set_kv_buffer(
                layer,
                KVWriteLoc(forward_batch.out_cache_loc, self._swa_loc),
                k,
                v,
                layer.k_scale,
                layer.v_scale,
            )
        rows = (q.shape[0], layer.tp_q_head_num, layer.head_dim)
        out = getattr(forward_batch, "_attn_output", None)
        if out is None or out.shape[0] != rows[0]:
            out = torch.empty(rows[0], rows[1] * rows[2], dtype=q.dtype, device=q.device)
        k_pool, v_pool = self.token_to_kv_pool.get_kv_buffer(layer.layer_id)
        tree, tree_positions = self._tree, self._tree_positions
        windowed = layer.sliding_window_size is not None and layer.sliding_window_size >= 0
        self._view_of(layer, windowed).attend(
            q.view(rows),
            k_pool,
            v_pool,
            out=out.view(rows),
            scale=layer.scaling,
            causal=layer.attn_type != AttentionType.ENCODER_ONLY,
            window=(layer.sliding_window_size, 0) if windowed else None,
            softcap=layer.logit_cap or 0.0,
            sinks=sinks,
            tree_mask=tree,
            tree_positions=tree_positions,
        )
        return out.view(rows[0], -1)

    forward_decode = forward_extend  # one new token each

    def _view_of(self, layer: Any, windowed: bool) -> View:
        view = self.windowed if windowed else self.full
        if view is None or (windowed and layer.sliding_window_size > view.window):
            raise NotServed(
                f"layer {layer.layer_id} with sliding window {layer.sliding_window_size} in a "
                f"model that announces {self.model.window}"
            )
        return view


def _pool_slots(pool: Any) -> int:
    """Slots of a pool's tensors: its size may be settled only after graphs are captured."""
    buffers = getattr(getattr(pool, "full_kv_pool", pool), "k_buffer", None)
    return int(buffers[0].shape[0]) if buffers else int(pool.size + pool.page_size)


def _is_decode_like(mode: Any) -> bool:
    """Decode, verify, draft extend: few new tokens each, and captured in graphs."""
    return bool(mode.is_decode_or_idle() or mode.is_target_verify() or mode.is_draft_extend_v2())


def _is_tree(spec_info: Any) -> bool:
    """Drafts that are no chain. EAGLE says how wide its tree is; n-gram drafts are always trees."""
    if getattr(spec_info, "custom_mask", None) is None:
        return False
    return getattr(spec_info, "topk", 0) != 1


def _verify_mask_type() -> tuple[Any, Any] | None:
    try:
        from sglang.srt.layers.attention.verify_mask import VerifyMask
    except ImportError:
        return None
    from sglang.srt.speculative.eagle_utils import TreeMaskMode

    return VerifyMask, TreeMaskMode.QLEN_ONLY
