"""vLLM's engine with the interface of `engine.Engine`: the same requests, timed in the same way."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashcore.bench.serve.engine import STREAM_INTERVAL, EngineOptions, write_model
from flashcore.bench.serve.scheduler import Additions
from flashcore.bench.serve.timeline import Timeline

if TYPE_CHECKING:
    from flashcore.bench.serve.clock import Clock

OURS = "flashcore"
_WORKER = "flashcore.bench.serve.vllm_worker.BenchWorker"


def load() -> None:
    """Import what an engine is made of, so that it starts the sooner."""
    from vllm.v1.engine import async_llm, core

    _ = async_llm.AsyncLLM, core.EngineCore


def server_arguments(options: EngineOptions, model_path: str) -> dict[str, Any]:
    """Keyword arguments of vLLM's `AsyncEngineArgs`.

    Raises ValueError for what the options ask of SGLang alone, and for an argument of `extra` that
    vLLM does not know.
    """
    from vllm.engine.arg_utils import AsyncEngineArgs

    known = {field.name for field in dataclasses.fields(AsyncEngineArgs)}
    tensor, pipeline, data = options.ranks
    for what, asked in (
        ("--dp", data > 1),
        ("--prefill-graph", options.prefill_graph),
        ("--base-gpu", options.base_gpu > 0),
        ("a checkpoint", options.checkpoint),
        ("a draft model", options.draft is not None),
    ):
        if asked:
            raise ValueError(f"{what} is not there with --engine vllm")
    batches = max(4, *options.decode_batches) if options.decode_batches else 4
    arguments: dict[str, Any] = {
        "model": model_path,
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "dtype": "bfloat16",
        "attention_backend": backend_name(options.backend),
        "block_size": options.page_size,
        "gpu_memory_utilization": options.mem_fraction,
        "max_num_batched_tokens": max(options.chunked_prefill, batches),
        "max_model_len": options.shape.context,
        "max_num_seqs": batches,
        "enable_prefix_caching": True,
        "stream_interval": STREAM_INTERVAL,
        "seed": 0,
        "enable_log_requests": False,
        "tensor_parallel_size": tensor,
        "pipeline_parallel_size": pipeline,
        "async_scheduling": options.overlap,
    }
    if options.device == "cuda":
        arguments["worker_cls"] = _WORKER
        arguments["compilation_config"] = {"max_cudagraph_capture_size": batches}
    else:
        arguments["enforce_eager"] = True
    if options.max_total_tokens is not None:
        arguments["num_gpu_blocks_override"] = options.max_total_tokens // options.page_size
    unknown = sorted({key for key, _ in options.extra} - known)
    if unknown:
        raise ValueError(f"--engine-args: vLLM has no argument {unknown[0]!r}")
    return {**arguments, **dict(options.extra)}


def backend_name(backend: str) -> str:
    """What vLLM calls a backend of the command line."""
    if backend != OURS:
        return backend
    from flashcore.integrations.vllm.versions import backend_name as ours

    return ours()


class VllmEngine:
    """A running vLLM engine. Only one in a process."""

    def __init__(self, options: EngineOptions, folder: Path) -> None:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        write_model(options.shape, folder, checkpoint=False, device=options.device)
        self.options, self.folder = options, folder
        self.arguments = server_arguments(options, str(folder))
        self.clock: Clock | None = None  # steps are timed by difference
        Additions(score_deviation=options.score_deviation).announce()
        os.environ.setdefault("VLLM_LOG_STATS_INTERVAL", "1")  # counters within a measurement
        self.loop = asyncio.new_event_loop()
        self._numbers = itertools.count()
        started = time.perf_counter()
        self._engine = self.loop.run_until_complete(self._start(AsyncLLM, AsyncEngineArgs))
        self.start_seconds = time.perf_counter() - started
        cache = self._engine.vllm_config.cache_config
        self.capacity = int(cache.num_gpu_blocks or 0) * int(cache.block_size)
        self.arguments["block_size"] = int(cache.block_size)

    async def _start(self, engine: Any, arguments: Any) -> Any:
        return engine.from_engine_args(arguments(**self.arguments))

    def flush(self) -> None:
        """Empty the prefix cache. Raises RuntimeError while requests are running."""
        for _ in range(50):  # a finished request leaves the engine a moment after its last token
            if self.loop.run_until_complete(self._engine.reset_prefix_cache()):
                return
            time.sleep(0.1)
        raise RuntimeError("the engine did not flush its cache: requests are still running")

    def run(
        self, prompts: Sequence[list[int]], output: int, *, temperature: float = 0.0
    ) -> list[Timeline]:
        """Send all prompts at once; wait for `output` tokens of each."""
        return self._all(prompts, output, temperature, streamed=True)

    def seconds(
        self, prompts: Sequence[list[int]], output: int, *, temperature: float = 0.0
    ) -> float:
        """Send all prompts at once; wall time until all of each answer is there, not streamed."""
        timelines = self._all(prompts, output, temperature, streamed=False)
        return max(timeline.last for timeline in timelines)

    def _all(
        self, prompts: Sequence[list[int]], output: int, temperature: float, *, streamed: bool
    ) -> list[Timeline]:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        kinds = RequestOutputKind
        sampling = SamplingParams(
            temperature=temperature,
            max_tokens=output,
            ignore_eos=True,
            detokenize=False,
            output_kind=kinds.CUMULATIVE if streamed else kinds.FINAL_ONLY,
        )
        timelines = self.loop.run_until_complete(self._run(prompts, sampling))
        short = [timeline.tokens for timeline in timelines if timeline.tokens != output]
        if short:
            raise RuntimeError(f"a request answered {short[0]} tokens instead of {output}")
        return timelines

    async def _run(self, prompts: Sequence[list[int]], sampling: Any) -> list[Timeline]:
        started = time.perf_counter()

        async def one(prompt: list[int]) -> Timeline:
            chunks, cached = [], 0
            request = {"prompt_token_ids": prompt}
            async for answer in self._engine.generate(request, sampling, str(next(self._numbers))):
                chunks.append((time.perf_counter() - started, len(answer.outputs[0].token_ids)))
                cached = answer.num_cached_tokens or cached
            return Timeline(tuple(chunks), cached)

        return await asyncio.gather(*(one(prompt) for prompt in prompts))

    def settle(self) -> None:
        """Collect garbage now, and leave what is alive out of later collections."""
        import gc

        gc.collect()
        gc.freeze()

    def stop(self) -> None:
        self._engine.shutdown()
