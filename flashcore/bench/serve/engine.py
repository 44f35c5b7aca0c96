"""SGLang's engine: its arguments, its environment, and requests timed token by token."""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
import json
import math
import os
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashcore.bench.serve.answers import Answer
from flashcore.bench.serve.clock import Clock
from flashcore.bench.serve.running import RunningEngine, check_lengths
from flashcore.bench.serve.scheduler import Additions, run
from flashcore.bench.serve.shapes import ModelShape
from flashcore.bench.serve.timeline import Timeline

if TYPE_CHECKING:
    import torch

STREAM_INTERVAL = 8  # tokens from one arrival to the next
ENVIRONMENT = {  # what a run without a network needs; the user's own values win
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "SGLANG_USE_SGL_FA3_KERNEL": "1",  # FA3 of sglang-kernel, not one fetched from a hub
    "SGLANG_SANITIZE_NAN_LOGITS": "0",  # a NaN shall be seen
    "SGLANG_CUDA_COREDUMP_BEFORE_CRASH": "0",  # which would take a minute
    "SGLANG_PYSPY_DUMP_BEFORE_CRASH": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",  # which would be compiled
    "VLLM_USE_DEEP_GEMM": "0",
}


_FIRST_PORT, _PORTS = 20000, 10000
"""Where an engine's processes meet, below the ports that a machine gives out by itself: SGLang
takes a free one of those, and of many engines that start side by side one may have lost it before
it listens."""


@dataclass(frozen=True)
class EngineOptions:
    """How one engine is started. `decode_batches` are the batch sizes that get a CUDA graph.
    `engine` is sglang or vllm (`vllm_engine`)."""

    backend: str
    shape: ModelShape
    decode_batches: tuple[int, ...]
    page_size: int = 64
    kv_cache_dtype: str = "auto"  # one of `shapes.KV_CACHE_DTYPES`
    mem_fraction: float = 0.88
    max_total_tokens: int | None = None  # None: what fits
    chunked_prefill: int = 8192
    prefill_graph: bool = False
    overlap: bool = True
    score_deviation: float | None = None  # weights of unit gain, attention scores that deviate so
    checkpoint: bool = False  # such weights in a file, of a Llama-like shape
    clock: bool = False  # the steps' times, from the scheduler itself
    counts: bool = False  # evictions and loads of the hierarchical cache
    draft: str | None = None  # config.json of a draft model
    logit_processor: bool = False
    device: str = "cuda"
    base_gpu: int = 0
    ranks: tuple[int, int, int] = (1, 1, 1)  # tensor, pipeline, data parallelism
    dp_attention: bool = False
    extra: tuple[tuple[str, Any], ...] = ()  # further ServerArgs
    engine: str = "sglang"
    triton_cache: str | None = None  # a folder; None: the user's
    deterministic: bool = False  # the engine's own mode for that
    label: str = ""  # what tells it from others of the same backend

    @property
    def name(self) -> str:
        """Of this engine in a run; no two have the same."""
        return f"{self.backend} {self.label}" if self.label else self.backend

    @property
    def environment(self) -> dict[str, str]:
        """Of the process that loads the engine."""
        found = {} if self.triton_cache is None else {"TRITON_CACHE_DIR": self.triton_cache}
        if self.deterministic and self.engine == "vllm":
            found["VLLM_BATCH_INVARIANT"] = "1"
        return found

    @property
    def gpus(self) -> int:
        """How many GPUs it takes. Data-parallel attention divides those of tensor parallelism."""
        tensor, pipeline, data = self.ranks
        return tensor * pipeline * (1 if self.dp_attention else data)


def server_arguments(options: EngineOptions, model_path: str) -> dict[str, Any]:
    """Keyword arguments of `sglang.Engine`, by the names of the installed version.

    Raises ValueError for an argument of `extra` that it does not know.
    """
    known = _server_fields()
    batches = sorted({1, *options.decode_batches})
    arguments: dict[str, Any] = {
        "model_path": model_path,
        "load_format": "auto" if options.checkpoint else "dummy",
        "skip_tokenizer_init": True,
        "dtype": "bfloat16",
        "device": options.device,
        "attention_backend": options.backend,
        "page_size": options.page_size,
        "mem_fraction_static": options.mem_fraction,
        "chunked_prefill_size": options.chunked_prefill,
        "context_length": options.shape.context,
        "max_running_requests": max(4, *batches),
        "stream_interval": STREAM_INTERVAL,
        "random_seed": 0,
        "log_level": "info",
        "watchdog_timeout": 600,
        "disable_overlap_schedule": not options.overlap,
        "enable_custom_logit_processor": options.logit_processor,
    }
    if options.kv_cache_dtype != "auto":
        arguments["kv_cache_dtype"] = options.kv_cache_dtype
    if options.base_gpu:
        arguments["base_gpu_id"] = options.base_gpu
    for name, ranks in zip(("tp_size", "pp_size", "dp_size"), options.ranks, strict=True):
        if ranks > 1:
            arguments[name] = ranks
    if options.dp_attention:
        arguments["enable_dp_attention"] = True
    if options.ranks[2] == 1 and "nccl_port" in known:
        arguments["nccl_port"] = _FIRST_PORT + os.getpid() % _PORTS
    if options.max_total_tokens is not None:
        arguments["max_total_tokens"] = options.max_total_tokens
    if options.device == "cuda":
        arguments[_first_known(known, "cuda_graph_bs_decode", "cuda_graph_bs")] = batches
        name = _first_known(known, "cuda_graph_max_bs_decode", "cuda_graph_max_bs")
        arguments[name] = max(batches)
    else:
        name = _first_known(known, "disable_decode_cuda_graph", "disable_cuda_graph")
        arguments[name] = True
    if not options.prefill_graph:
        name = _first_known(known, "disable_prefill_cuda_graph", "disable_piecewise_cuda_graph")
        arguments[name] = True
    if options.deterministic:
        arguments["enable_deterministic_inference"] = True
    unknown = sorted({key for key, _ in options.extra} - known)
    if unknown:
        raise ValueError(f"--engine-args: SGLang has no argument {unknown[0]!r}")
    return {**arguments, **dict(options.extra)}


def _server_fields() -> set[str]:
    from sglang.srt.server_args import ServerArgs

    if dataclasses.is_dataclass(ServerArgs):
        return {field.name for field in dataclasses.fields(ServerArgs)}
    names = set(inspect.signature(ServerArgs).parameters)  # later versions: another kind of class
    for base in ServerArgs.__mro__:
        names |= set(getattr(base, "__annotations__", ()))
    return names


def _first_known(known: set[str], *names: str) -> str:
    for name in names:
        if name in known:
            return name
    raise ValueError(f"this version of SGLang has none of the arguments {', '.join(names)}")


def write_model(shape: ModelShape, folder: Path, *, checkpoint: bool, device: str) -> None:
    """The model's config.json in `folder`, and with `checkpoint` its weights."""
    folder.joinpath("config.json").write_text(json.dumps(shape.config(), indent=1))
    if checkpoint:
        import torch
        from safetensors.torch import save_file

        file = folder / "model.safetensors"
        save_file(random_tensors(shape, device), file, metadata={"format": "pt"})
        if device == "cuda":
            torch.cuda.empty_cache()  # the engine's memory is another process's


def random_tensors(shape: ModelShape, device: str) -> dict[str, torch.Tensor]:
    """Weights in bfloat16 by their names in a checkpoint, the same every time; made on `device`.

    Like those of `weights`, for a Llama-like shape: what an engine reads that has to load them
    again.
    """
    import torch

    generator = torch.Generator(device).manual_seed(1)

    def normal(rows: int, columns: int, gain: float = 1.0) -> torch.Tensor:
        values = torch.randn(rows, columns, generator=generator, device=device)
        return (values * (gain / math.sqrt(columns))).bfloat16().cpu()

    def ones() -> torch.Tensor:
        return torch.ones(shape.hidden, dtype=torch.bfloat16)

    logits = 3.0  # deviation of a logit, the last activations being of unit scale
    embedding = logits if shape.tied else math.sqrt(shape.hidden)
    tensors = {"model.embed_tokens.weight": normal(shape.vocab, shape.hidden, embedding)}
    if not shape.tied:
        tensors["lm_head.weight"] = normal(shape.vocab, shape.hidden, logits)
    tensors["model.norm.weight"] = ones()
    q_rows, kv_rows = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    for number in range(shape.layers):
        layer = f"model.layers.{number}."
        tensors[layer + "input_layernorm.weight"] = ones()
        tensors[layer + "post_attention_layernorm.weight"] = ones()
        for name, rows in (("q", q_rows), ("k", kv_rows), ("v", kv_rows)):
            gain = 1.0 if name == "v" else 1.6  # scores with a deviation of 2.5
            tensors[f"{layer}self_attn.{name}_proj.weight"] = normal(rows, shape.hidden, gain)
            if shape.qwen:
                bias = torch.zeros(rows, dtype=torch.bfloat16)
                tensors[f"{layer}self_attn.{name}_proj.bias"] = bias
        tensors[layer + "self_attn.o_proj.weight"] = normal(shape.hidden, q_rows)
        tensors[layer + "mlp.gate_proj.weight"] = normal(shape.intermediate, shape.hidden)
        tensors[layer + "mlp.up_proj.weight"] = normal(shape.intermediate, shape.hidden)
        tensors[layer + "mlp.down_proj.weight"] = normal(shape.hidden, shape.intermediate)
    return tensors


def load() -> None:
    """Import what an engine is made of, so that it starts the sooner."""
    from sglang.srt.entrypoints import engine
    from sglang.srt.managers import scheduler  # noqa: F401

    _ = engine.Engine


class Engine(RunningEngine):
    """A running SGLang engine. Only one in a process."""

    model_argument = "model_path"

    def __init__(self, options: EngineOptions, folder: Path) -> None:
        from sglang.srt.entrypoints.engine import Engine as Sglang

        write_model(options.shape, folder, checkpoint=options.checkpoint, device=options.device)
        self.options, self.folder = options, folder
        self.arguments = server_arguments(options, str(folder))
        if options.draft is not None:
            (folder / "draft").mkdir()
            (folder / "draft" / "config.json").write_text(options.draft)
            self.arguments["speculative_draft_model_path"] = str(folder / "draft")
        self.clock = Clock(folder / "clock") if options.clock else None
        self.counts = folder / "counts" if options.counts else None
        Additions(
            score_deviation=options.score_deviation,
            clock=str(folder / "clock") if options.clock else None,
            counts=str(self.counts) if self.counts else None,
        ).announce()

        if not hasattr(Sglang, "run_scheduler_process_func"):
            raise RuntimeError("this version of SGLang starts its schedulers in another way")

        class WithAdditions(Sglang):  # type: ignore[misc]
            run_scheduler_process_func = staticmethod(run)

        if self.arguments.get("enable_memory_saver"):  # SGLang leaves graphs out otherwise
            os.environ.setdefault("SGLANG_MEMORY_SAVER_CUDA_GRAPH", "1")
        started = time.perf_counter()
        self._engine = WithAdditions(**self.arguments)
        self.start_seconds = time.perf_counter() - started
        info = self._engine.get_server_info()
        self.capacity = int(info["max_total_num_tokens"])

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        loop: asyncio.AbstractEventLoop = self._engine.loop
        return loop

    def _emptied(self) -> bool:
        return bool(self._engine.flush_cache().success)

    async def _run(
        self, prompts: Sequence[list[int]], output: int, temperature: float
    ) -> list[Timeline]:
        sampling = _sampling(output, temperature)
        started = time.perf_counter()

        async def one(prompt: list[int]) -> Timeline:
            chunks = []
            meta: dict[str, Any] = {}
            async for answer in await self._stream(prompt, sampling):
                meta = answer["meta_info"]
                chunks.append((time.perf_counter() - started, meta["completion_tokens"]))
            return Timeline(
                tuple(chunks), meta.get("cached_tokens") or 0, meta.get("num_retractions") or 0
            )

        return await asyncio.gather(*(one(prompt) for prompt in prompts))

    async def _stream(
        self, prompt: list[int], sampling: dict[str, Any], **options: Any
    ) -> AsyncIterator[dict[str, Any]]:
        answers: AsyncIterator[dict[str, Any]] = await self._engine.async_generate(
            input_ids=prompt, sampling_params=sampling, stream=True, **options
        )
        return answers

    def generate(self, **options: Any) -> list[dict[str, Any]]:
        """`sglang.Engine.generate` on a list of prompts."""
        answers: list[dict[str, Any]] = self._engine.generate(**options)
        return answers

    def answers(
        self, prompts: Sequence[list[int]], output: int, *, prompt: bool = False, **options: Any
    ) -> list[Answer]:
        """options: of `sglang.Engine.generate`."""
        found = self.generate(
            input_ids=list(prompts),
            sampling_params=_sampling(output, 0.0),
            return_logprob=True,
            logprob_start_len=0 if prompt else -1,
            **options,
        )
        return [_answer(one, prompt) for one in found]

    async def follow(
        self, prompt: list[int], output: int, *, temperature: float = 0.0, name: str | None = None
    ) -> AsyncIterator[Answer]:
        options = {} if name is None else {"rid": name}
        sampling = _sampling(output, temperature)
        async for part in await self._stream(prompt, sampling, return_logprob=True, **options):
            yield _answer(part, False)

    def seconds(
        self, prompts: Sequence[list[int]], output: int, *, temperature: float = 0.0
    ) -> float:
        sampling = _sampling(output, temperature)
        started = time.perf_counter()
        answers = self._engine.generate(input_ids=list(prompts), sampling_params=sampling)
        taken = time.perf_counter() - started
        check_lengths([answer["meta_info"]["completion_tokens"] for answer in answers], output)
        return taken

    def settle(self) -> None:
        super().settle()
        self._engine.freeze_gc()

    def release(self, number: int) -> None:
        """Give back the memory of KV cache, weights and CUDA graphs."""
        self._engine.release_memory_occupation()

    def resume(self) -> None:
        self._engine.resume_memory_occupation()

    def renew_weights(self, number: int) -> str:
        """By turns the two ways in which a trainer hands weights over: a file, and tensors."""
        if number % 2:
            return _problem(self._engine.update_weights_from_disk(str(self.folder)))
        from safetensors.torch import load_file

        device = self.options.device
        device = f"{device}:{self.options.base_gpu}" if device == "cuda" else device
        tensors = load_file(self.folder / "model.safetensors", device=device)
        return _problem(self._engine.update_weights_from_tensor(list(tensors.items())))

    async def pause(self) -> None:
        from sglang.srt.managers.io_struct import PauseGenerationReqInput

        request = PauseGenerationReqInput(mode="in_place")
        await self._engine.tokenizer_manager.pause_generation(request)

    async def go_on(self) -> None:
        from sglang.srt.managers.io_struct import ContinueGenerationReqInput

        await self._engine.tokenizer_manager.continue_generation(ContinueGenerationReqInput())

    def abort(self, name: str) -> None:
        self._engine.tokenizer_manager.abort_request(rid=name)

    def state(self) -> dict[str, Any]:
        """What the scheduler says of itself."""
        states = self._engine.get_server_info().get("internal_states") or [{}]
        return dict(states[0])

    def processes(self) -> list[int]:
        return [int(pid) for pid in self._engine.get_all_child_pids()]

    def stop(self) -> None:
        self._engine.shutdown()


def _problem(done: Any) -> str:
    """What an update of weights says of itself if it failed: a tuple, or an object, by version."""
    success, message = done[:2] if isinstance(done, tuple) else (done.success, done.message)
    return "" if success else str(message)


def _sampling(output: int, temperature: float) -> dict[str, Any]:
    return {"max_new_tokens": output, "ignore_eos": True, "temperature": temperature}


def _answer(answer: dict[str, Any], prompt: bool) -> Answer:
    meta = answer["meta_info"]
    prompts = meta.get("input_token_logprobs") or [] if prompt else []
    return {
        "tokens": answer["output_ids"],
        "output": [entry[0] for entry in meta["output_token_logprobs"]],
        "prompt": [entry[0] for entry in prompts][1:],  # the first token has none
        "cached": meta.get("cached_tokens") or 0,
        "accepted": meta.get("spec_accept_length"),
        "retractions": meta.get("num_retractions") or 0,
        "ended": (meta.get("finish_reason") or {}).get("type"),
    }
