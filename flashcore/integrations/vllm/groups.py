"""The layers that vLLM plans together: one cache group, one specification, one number of heads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from flashcore.integrations.vllm import versions
from flashcore.integrations.vllm.memory import memory_of
from flashcore.integrations.vllm.support import OPTIONS, kinds_of, layers_of, limits_of, model_of
from flashcore.jit.kernel import Kernel
from flashcore.serving import capacity, kernels, planners, warmup
from flashcore.serving.expanding import Layers
from flashcore.serving.page_tables import PageTables, Slots
from flashcore.serving.planners import Memory
from flashcore.serving.views import Need, View

if TYPE_CHECKING:
    from flashcore.integrations.vllm.metadata import FlashcoreMetadata


class Group:
    """Layers that share block tables, and the view that plans for them."""

    def __init__(self, config: Any, spec: Any, names: list[str], device: torch.device):
        """Allocates nothing; raises NotServed."""
        self.names = sorted(names)
        self.layers = layers_of(config, self.names)
        self.model = model_of(config, spec, self.layers, torch.device(device))
        self.limits = limits_of(config)
        (self.shape,) = self.model.shapes
        self.num_pages = 0  # of the cache, once it is there
        self.view: View | None = None
        blocks = config.cache_config.num_gpu_blocks or 0
        pages = -(-blocks * config.cache_config.block_size // self.model.page_tokens)
        capacity.check(
            self.model, self.limits, [self._kind(pages)], self.workspace_elements(), OPTIONS
        )
        self.memory = memory_of(config)
        self.memory.groups.add(self)

    # What the engine's memory asks of a group

    def find_pages(self, pool: torch.Tensor | None = None) -> None:
        """Learn the size of the cache: from `pool`, or from where vLLM keeps it, if it is there."""
        if pool is None:
            pools = [layer.kv_cache for layer in self.layers]
            pool = next((p for p in pools if isinstance(p, torch.Tensor) and p.ndim == 4), None)
        if pool is not None:
            self.num_pages = int(pool.shape[0])

    def _kind(self, pages: int) -> capacity.Kind:
        in_place = self.model.windowed is None
        return capacity.Kind(
            self.shape, self.model.window, pages * self.model.page_tokens, in_place
        )

    def workspace_elements(self) -> int:
        """fp32 elements that its partial results need."""
        if not planners.on_kernels(self.model.device):
            return 0
        queries = self.limits.batch * max(1, self.model.draft_tokens)
        return planners.workspace_for(self.model, min(queries, 1024))

    def scratch_sizes(self) -> tuple[int, ...]:
        """Arguments of a `PlannerScratch` that would do for it."""
        kinds = [self._kind(self.num_pages)]
        return capacity.scratch_sizes(self.limits, self.model.page_tokens, kinds)

    def bytes(self, workspace: int) -> int:
        """What it takes by itself, beside a workspace of so many fp32 elements."""
        model, kind = self.model, self._kind(self.num_pages)
        return capacity.kind_bytes(
            self.limits, model.page_tokens, model.draft_tokens, kind, workspace
        )

    def layers_to_expand(self) -> Layers:
        """What room to expand fp8 pages is asked for."""
        return Layers(self.model, self.limits, self._kind(self.num_pages))

    def make_view(self, memory: Memory) -> View:
        """The view of its plans, in memory that groups share."""
        batch, device = self.limits.batch, self.model.device
        self._q_lens = torch.zeros(batch, dtype=torch.int32, device=device)
        self._rows = torch.arange(batch, dtype=torch.int32, device=device)
        self.view = View(
            self.model,
            self.shape,
            window=self.model.window,
            num_pages=self.num_pages,
            limits=self.limits,
            memory=memory,
            in_place=self.model.windowed is None,
        )
        return self.view

    def wanted_kernels(self) -> list[Kernel]:
        """Every kernel that its forwards can ask for."""
        kinds = kinds_of(self.model, self.layers)
        limits = self.limits
        return kernels.wanted(self.model, kinds, limits.batch, False, limits.batch_invariant)

    def warmup_caches(self, workspace: torch.Tensor) -> Iterator[tuple[kernels.Kind, warmup.Cache]]:
        """What to launch its kernels on once, kind by kind."""
        device = self.model.device
        table = torch.zeros(1, 1, dtype=torch.int32, device=device)
        shape = (1, self.model.page_tokens, self.shape.num_kv_heads, 2 * self.shape.head_dim)
        pool = torch.zeros(shape, dtype=self.model.cache_dtype, device=device)
        k, v = pool[..., : self.shape.head_dim], pool[..., self.shape.head_dim :]
        scales = next((layer.impl.scales(layer) for layer in self.layers), (None, None))
        for kind in kinds_of(self.model, self.layers):
            window = -1
            if kind.windowed:
                window = max(layer.impl.left for layer in self.layers)
            yield (
                kind,
                warmup.Cache(
                    versions.canonical_strides(k),
                    versions.canonical_strides(v),
                    table,
                    None,
                    window,
                    workspace,
                    pages=True,
                    batch_invariant=self.limits.batch_invariant,
                    scales=scales,
                ),
            )

    def describe(self) -> str:
        """Its layers in words."""
        model = self.model
        rule = "full attention" if model.windowed is None else f"window {model.window + 1}"
        dtype = str(model.dtype).removeprefix("torch.")
        if model.fp8:
            dtype += f" on a KV cache in {str(model.cache_dtype).removeprefix('torch.')}"
        return f"{rule} {self.shape} in {dtype}, blocks of {model.page_tokens}"

    # Forwards

    def begin(self, metadata: FlashcoreMetadata, in_capture: bool) -> None:
        """A forward with this metadata is to come."""
        if self.view is None:
            self.find_pages()
            if self.num_pages:
                self.prepare()
        if not in_capture:
            drafts = self.model.draft_tokens
            few = metadata.max_query_len <= max(1, drafts)
            mode = "prefill" if not few else "verify" if drafts else "decode"
            self.memory.step(self, mode)

    def prepare(self) -> None:
        """Take what the groups of the engine need; each of them looks for its cache first."""
        for group in self.memory.groups:
            if group.view is None and not group.num_pages:
                group.find_pages()
        self.memory.prepare()

    def view_for(self, metadata: FlashcoreMetadata, pool: torch.Tensor) -> View:
        """The view, with the plan of this forward: made in its first layer, in a CUDA graph too."""
        view = self.view
        if view is None:
            self.find_pages(pool)
            self.prepare()
            view = self.view
            assert view is not None
        capturing = pool.is_cuda and torch.cuda.is_current_stream_capturing()
        if metadata.planned_in is not capturing:
            self._plan(view, metadata)
            metadata.planned_in = capturing
        return view

    def _plan(self, view: View, m: FlashcoreMetadata) -> None:
        """Plan from what is on the device alone: a captured graph does this again with the tables,
        lengths and starts of its time, which are where they were."""
        batch, drafts = m.num_reqs, max(1, self.model.draft_tokens)
        if batch > self.limits.batch:
            raise RuntimeError(
                f"{batch} sequences in a batch are more than --max-num-seqs {self.limits.batch}"
            )
        q_lens, starts = self._q_lens[:batch], m.query_start_loc
        torch.sub(starts[1 : batch + 1], starts[:batch], out=q_lens)
        decode = m.max_query_len <= drafts
        most = batch * drafts if decode else self.limits.queries
        need = Need(batch, min(m.num_actual_tokens, most), None)  # graphs pad the tokens further
        table, seq_lens = m.block_table[:batch], m.seq_lens[:batch]
        if self.model.windowed is None:
            view.take_tables(PageTables(table, seq_lens, q_lens), need, decode=decode)
        else:  # blocks before the window have been given back: rows name block 0 there
            slots = Slots(table, self._rows[:batch], seq_lens, q_lens, 0, batch, pages=True)
            view.take(slots, need, decode=decode, graph=False)
        view.make_plan()
