"""Time layout, plan and attention of some simulated steps on a real device."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from flashcore.replay.simulate import Engine

if TYPE_CHECKING:
    import torch

    from flashcore.pager.csr import Layout
    from flashcore.planner.types import Plan
    from flashcore.replay.gpu_attention import GpuStep, GpuTimer

Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class SampleSettings:
    """Which steps to time, and the heads that one rank would run."""

    every: int = 256  # steps; 0: none
    attention: bool = False  # off: no K and V pools are allocated
    num_q_heads: int = 4
    num_kv_heads: int = 1
    head_dim: int = 64
    device: str = "cpu"
    seed: int = 0  # of the random queries, keys and values


@dataclass
class StepSampler:
    """An `on_step` observer for `Engine.run`: times every `settings.every`-th step.

    The layout and the plan count the same pages as the simulation does incrementally;
    `disagreements` counts the samples where they do not, and is always 0 unless one is wrong.
    """

    settings: SampleSettings
    layout_ms: list[float] = field(default_factory=list)
    plan_ms: list[float] = field(default_factory=list)
    attention_ms: list[float] = field(default_factory=list)
    peer_ms: list[float] = field(default_factory=list)  # FlashAttention-3 on the same tensors
    peer_absent: str | None = None  # why it was not timed
    plan_reuse: list[float] = field(default_factory=list)  # after the plan gave small groups back
    disagreements: int = 0
    steps: list[dict[str, float]] = field(default_factory=list)  # each one, and its attention's ms
    _pools: tuple[torch.Tensor, torch.Tensor] | None = None
    _generator: torch.Generator | None = None
    _timer: GpuTimer | None = None

    def __call__(self, engine: Engine) -> None:
        """Time this step if it is one of the sampled ones (the first, then each `every`-th)."""
        if self.settings.every and (len(engine.log) - 1) % self.settings.every == 0:
            self._sample(engine)

    def _sample(self, engine: Engine) -> None:
        import torch

        import flashcore

        page_tokens = engine.settings.page_tokens
        table, kv_lens, q_lens = _page_table(engine)
        device = self.settings.device
        page_table = torch.from_numpy(table).to(device)
        lengths = torch.from_numpy(kv_lens).to(device)
        resident = torch.from_numpy(engine.counts.resident).to(device)
        queries = torch.from_numpy(q_lens).to(device)
        if not self.layout_ms:  # the first call of all also pays for what loads on first use
            self._plan(
                self._layout(page_table, lengths, resident, page_tokens), queries, page_tokens
            )

        layout, layout_ms = self._timed(
            lambda: self._layout(page_table, lengths, resident, page_tokens)
        )
        plan, plan_ms = self._timed(lambda: self._plan(layout, queries, page_tokens))
        self.layout_ms.append(layout_ms)
        self.plan_ms.append(plan_ms)
        self._compare(engine, layout, plan)
        self.steps.append(_facts(engine, q_lens))
        if self.settings.attention:
            k_pages, v_pages = self._kv_pools(engine)
            q = self._random(int(q_lens.sum()), self.settings.num_q_heads, self.settings.head_dim)
            if device == "cpu":
                _, attention_ms = self._timed(
                    lambda: flashcore.paged_attention(q, k_pages, v_pages, plan, causal=True)
                )
                self._add_times(attention_ms, None)
            else:
                from flashcore.replay.gpu_attention import GpuStep

                step = GpuStep(q, k_pages, v_pages, plan, page_table, lengths, queries)
                self._time_on_gpu(step)

    def _time_on_gpu(self, step: GpuStep) -> None:
        """Ours and FlashAttention-3, in CUDA graphs, in turns."""
        if self._timer is None:
            from flashcore.replay.gpu_attention import GpuTimer

            self._timer = GpuTimer()
        self._add_times(*self._timer.time(step))
        self.peer_absent = self._timer.peer_absent

    def _add_times(self, ours: float, peer: float | None) -> None:
        self.attention_ms.append(ours)
        self.steps[-1]["attention_ms"] = ours
        if peer is not None:
            self.peer_ms.append(peer)
            self.steps[-1]["fa3_ms"] = peer

    def _layout(
        self, table: torch.Tensor, lengths: torch.Tensor, resident: torch.Tensor, page_tokens: int
    ) -> Layout:
        import flashcore

        return flashcore.layout_from_page_table(
            table, lengths, page_tokens=page_tokens, page_resident_bitmap=resident
        )

    def _plan(self, layout: Layout, q_lens: torch.Tensor, page_tokens: int) -> Plan:
        import flashcore

        return flashcore.plan(
            layout,
            q_lens=q_lens,
            num_q_heads=self.settings.num_q_heads,
            num_kv_heads=self.settings.num_kv_heads,
            head_dim=self.settings.head_dim,
            page_tokens=page_tokens,
        )

    def _compare(self, engine: Engine, layout: Layout, plan: Plan) -> None:
        stats = plan.stats()
        step = engine.log[-1]
        counted = (
            step.tokens_per_sequence,
            step.tokens_once,
            step.pages_used,
            step.pages_staged,
        )
        found = (
            stats.tokens_per_sequence,
            stats.tokens_unique,
            stats.pages_unique,
            layout.staging_ids.numel(),
        )
        self.disagreements += counted != found
        self.plan_reuse.append(stats.reuse)

    def _timed(self, work: Callable[[], Result]) -> tuple[Result, float]:
        self._wait()
        started = time.perf_counter()
        result = work()
        self._wait()
        return result, (time.perf_counter() - started) * 1000.0

    def _wait(self) -> None:
        if self.settings.device != "cpu":
            import torch

            torch.cuda.synchronize()

    def _kv_pools(self, engine: Engine) -> tuple[torch.Tensor, torch.Tensor]:
        if self._pools is None:
            shape = (
                engine.settings.cache_pages,
                engine.settings.page_tokens,
                self.settings.num_kv_heads,
                self.settings.head_dim,
            )
            try:
                self._pools = self._random(*shape), self._random(*shape)
            except RuntimeError as error:
                raise MemoryError(
                    f"no memory for keys and values of {shape[0]} pages of {shape[1]} tokens, "
                    f"{shape[2]} heads x {shape[3]}; make the cache or the heads smaller"
                ) from error
        return self._pools

    def _random(self, *shape: int) -> torch.Tensor:
        import torch

        device = self.settings.device
        if self._generator is None:
            self._generator = torch.Generator(device).manual_seed(self.settings.seed)
        # CPUs have no fast bf16 product; GPUs serve in it.
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        return torch.randn(shape, generator=self._generator, dtype=dtype, device=device)


def _facts(engine: Engine, q_lens: Any) -> dict[str, float]:
    step = engine.log[-1]
    return {
        "step": len(engine.log) - 1,
        "sequences": len(q_lens),
        "query_tokens": int(q_lens.sum()),
        "tokens_per_sequence": int(step.tokens_per_sequence),
        "tokens_once": int(step.tokens_once),
    }


def _page_table(engine: Engine) -> tuple[Any, Any, Any]:
    """The step's page table [batch, max_pages], KV lengths and query lengths, all int32."""
    rows = list(engine.batch())
    table = np.full((len(rows), max(row.pages.size for row in rows)), -1, np.int32)
    for line, row in zip(table, rows, strict=True):
        line[: row.pages.size] = row.pages
    kv_lens = np.array([row.kv_tokens for row in rows], np.int32)
    q_lens = np.array([row.q_tokens for row in rows], np.int32)
    return table, kv_lens, q_lens
