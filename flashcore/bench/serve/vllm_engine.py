"""vLLM's engine: its arguments, and requests in the form that the benchmark knows."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import os
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from flashcore.bench.serve.answers import Answer
from flashcore.bench.serve.engine import STREAM_INTERVAL, EngineOptions, write_model
from flashcore.bench.serve.running import RunningEngine, check_lengths
from flashcore.bench.serve.scheduler import Additions
from flashcore.bench.serve.timeline import Timeline

OURS = "flashcore"
_SHARED_FRACTION = 0.1  # of a GPU that is free when an engine starts beside others
_WORKERS = {
    "cuda": "flashcore.bench.serve.vllm_worker.BenchWorker",
    "cpu": "flashcore.bench.serve.vllm_cpu_worker.BenchCpuWorker",
}


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
        ("--hicache", options.counts),
        ("a draft model", options.draft is not None),
    ):
        if asked:
            raise ValueError(f"{what} is not there with --engine vllm")
    batches = max(4, *options.decode_batches) if options.decode_batches else 4
    longest, blocks = options.shape.context, None
    if options.max_total_tokens is not None:
        blocks = options.max_total_tokens // options.page_size
        # vLLM does not start where its cache is too small for the longest sequence.
        longest = min(longest, blocks * options.page_size)
    arguments: dict[str, Any] = {
        "model": model_path,
        "load_format": "auto" if options.checkpoint else "dummy",
        "skip_tokenizer_init": True,
        "dtype": "bfloat16",
        "attention_backend": backend_name(options.backend),
        "block_size": options.page_size,
        "gpu_memory_utilization": options.mem_fraction,
        "max_num_batched_tokens": max(options.chunked_prefill, batches),
        "max_model_len": longest,
        "max_num_seqs": batches,
        "enable_prefix_caching": True,
        "stream_interval": STREAM_INTERVAL,
        "seed": 0,
        "enable_log_requests": False,
        "tensor_parallel_size": tensor,
        "pipeline_parallel_size": pipeline,
        "async_scheduling": options.overlap,
        "worker_cls": _WORKERS[options.device],
    }
    if options.device == "cuda":
        arguments["compilation_config"] = {"max_cudagraph_capture_size": batches}
    else:
        arguments["enforce_eager"] = True
    if options.kv_cache_dtype != "auto":
        arguments["kv_cache_dtype"] = options.kv_cache_dtype
    if blocks is not None:
        arguments["num_gpu_blocks_override"] = blocks
        if options.shape.source is None and options.device == "cuda":
            # Measuring the memory would take engines that start beside this one for a part of it.
            tokens = blocks * options.page_size
            token_bytes = options.shape.kv_bytes_per_token(options.kv_cache_dtype)
            cache = tokens * token_bytes // (tensor * pipeline)
            arguments["kv_cache_memory_bytes"] = cache
            arguments["gpu_memory_utilization"] = min(options.mem_fraction, _SHARED_FRACTION)
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


class VllmEngine(RunningEngine):
    """A running vLLM engine. Only one in a process."""

    model_argument = "model"

    def __init__(self, options: EngineOptions, folder: Path) -> None:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        write_model(options.shape, folder, checkpoint=options.checkpoint, device=options.device)
        self.options, self.folder = options, folder
        self.arguments = server_arguments(options, str(folder))
        Additions(score_deviation=options.score_deviation).announce()
        os.environ.setdefault("VLLM_LOG_STATS_INTERVAL", "1")  # counters within a measurement
        self._loop = asyncio.new_event_loop()
        self._numbers = itertools.count()
        self._aborts: set[asyncio.Future[None]] = set()
        started = time.perf_counter()
        self._engine = self.loop.run_until_complete(self._start(AsyncLLM, AsyncEngineArgs))
        self.start_seconds = time.perf_counter() - started
        cache = self._engine.vllm_config.cache_config
        self.capacity = int(cache.num_gpu_blocks or 0) * int(cache.block_size)
        self.arguments["block_size"] = int(cache.block_size)

    async def _start(self, engine: Any, arguments: Any) -> Any:
        return engine.from_engine_args(arguments(**self.arguments))

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        return self._loop

    def _emptied(self) -> bool:
        return bool(self.loop.run_until_complete(self._engine.reset_prefix_cache()))

    def seconds(
        self, prompts: Sequence[list[int]], output: int, *, temperature: float = 0.0
    ) -> float:
        work = self._run(prompts, output, temperature, streamed=False)
        timelines = self.loop.run_until_complete(work)
        check_lengths([timeline.tokens for timeline in timelines], output)
        return max(timeline.last for timeline in timelines)

    async def _run(
        self,
        prompts: Sequence[list[int]],
        output: int,
        temperature: float,
        *,
        streamed: bool = True,
    ) -> list[Timeline]:
        sampling = sampling_of(output, streamed=streamed, temperature=temperature)
        started = time.perf_counter()

        async def one(prompt: list[int]) -> Timeline:
            chunks, cached = [], 0
            async for answer in self._generate(prompt, sampling):
                chunks.append((time.perf_counter() - started, len(answer.outputs[0].token_ids)))
                cached = answer.num_cached_tokens or cached
            return Timeline(tuple(chunks), cached)

        return await asyncio.gather(*(one(prompt) for prompt in prompts))

    def _generate(
        self, prompt: list[int], sampling: Any, name: str | None = None
    ) -> AsyncIterator[Any]:
        request = {"prompt_token_ids": prompt}
        answers: AsyncIterator[Any] = self._engine.generate(
            request, sampling, name or str(next(self._numbers))
        )
        return answers

    def answers(
        self, prompts: Sequence[list[int]], output: int, *, prompt: bool = False, **options: Any
    ) -> list[Answer]:
        """options: of vLLM's `SamplingParams`. vLLM reads nothing from its cache for a request that
        asks for its prompt's log-probabilities."""
        asked: dict[str, Any] = {"logprobs": 0, **options}
        if prompt:
            asked["prompt_logprobs"] = 0
        found = self.last_of(prompts, [sampling_of(output, streamed=False, **asked)] * len(prompts))
        return [_answer(one) for one in found]

    def last_of(self, prompts: Sequence[list[int]], samplings: Sequence[Any]) -> list[Any]:
        """vLLM's last `RequestOutput` of each prompt, all sent at once."""

        async def one(prompt: list[int], sampling: Any) -> Any:
            last = None
            async for answer in self._generate(prompt, sampling):
                last = answer
            return last

        async def everything() -> list[Any]:
            pairs = zip(prompts, samplings, strict=True)
            return await asyncio.gather(*(one(*pair) for pair in pairs))

        return self.loop.run_until_complete(everything())

    async def follow(
        self, prompt: list[int], output: int, *, temperature: float = 0.0, name: str | None = None
    ) -> AsyncIterator[Answer]:
        sampling = sampling_of(output, streamed=True, temperature=temperature, logprobs=0)
        async for answer in self._generate(prompt, sampling, name):
            yield _answer(answer)

    def abort(self, name: str) -> None:
        task = asyncio.ensure_future(self._engine.abort(name), loop=self.loop)
        self._aborts.add(task)  # the loop itself would let it be collected
        task.add_done_callback(self._aborts.discard)

    async def pause(self) -> None:
        await self._engine.pause_generation(mode="keep", clear_cache=False)

    async def go_on(self) -> None:
        await self._engine.resume_generation()

    def release(self, number: int) -> None:
        """Sleep: by turns level 1, which keeps the weights on the host, and level 2."""
        self._level = 2 - number % 2
        self.loop.run_until_complete(self._engine.sleep(self._level))

    def resume(self) -> None:
        self.loop.run_until_complete(self._engine.wake_up())

    def renew_weights(self, number: int) -> str:
        """Read them from their file once more; after a sleep that kept them there is no need."""
        if self._level == 2:
            try:
                self.loop.run_until_complete(self._engine.collective_rpc("reload_weights"))
            except Exception as error:  # of whatever kind the engine's process had
                return f"{type(error).__name__}: {error}"
        return ""

    def processes(self) -> list[int]:
        import psutil  # vLLM needs it, too

        return [child.pid for child in psutil.Process().children(recursive=True)]

    def stop(self) -> None:
        self._engine.shutdown()
        tasks = asyncio.all_tasks(self.loop)  # which would tell of a closed loop
        for task in tasks:
            task.cancel()
        self.loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        self.loop.close()


def sampling_of(output: int, *, streamed: bool, temperature: float = 0.0, **options: Any) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    kinds = RequestOutputKind
    return SamplingParams(
        temperature=temperature,
        max_tokens=output,
        ignore_eos=True,
        detokenize=False,
        output_kind=kinds.CUMULATIVE if streamed else kinds.FINAL_ONLY,
        **options,
    )


def _answer(answer: Any) -> Answer:
    """Of vLLM's `RequestOutput`."""
    output = answer.outputs[0]
    tokens = list(output.token_ids)
    prompt = zip(answer.prompt_token_ids or (), answer.prompt_logprobs or (), strict=False)
    return {
        "tokens": tokens,
        "output": [
            step[token].logprob for token, step in zip(tokens, output.logprobs or (), strict=False)
        ],
        "prompt": [step[token].logprob for token, step in prompt if step],
        "cached": answer.num_cached_tokens or 0,
        "accepted": None,
        "retractions": None,
        "ended": output.finish_reason,
    }
