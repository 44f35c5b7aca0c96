"""What a model and a server ask of attention, as vLLM says it, and whether it is served."""

from __future__ import annotations

from typing import Any

import torch

from flashcore.integrations.vllm import versions
from flashcore.kv_checks import QUERY_DTYPES
from flashcore.serving.kernels import Kind, Variant
from flashcore.serving.shapes import Limits, Model, NotServed, Options, Shape
from flashcore.sm90.config.paged import NARROW_DIM_STEP, PAGE_TOKENS, unserved_dims

ELSEWHERE = "--attention-backend FLASH_ATTN"

FP8_CACHES = {
    "fp8": torch.float8_e4m3fn,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}
"""What vLLM calls caches whose elements have a scale for the layer, or for each head."""

OPTIONS = Options(
    page_tokens="--block-size",
    batch="--max-num-seqs",
    tokens="--max-model-len",
    queries="--max-num-batched-tokens",
    elsewhere=ELSEWHERE,
)


def refusal(what: str, instead: str = f"use {ELSEWHERE}") -> NotServed:
    """To raise: `what` is not served, do that instead."""
    return NotServed(what, instead)


def check_server(config: Any) -> None:
    """Raise NotServed for what vLLM does not ask its backends about."""
    parallel, cache = config.parallel_config, config.cache_config
    if parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1:
        raise refusal("context parallelism")
    if versions.ubatches(parallel) > 1:
        raise refusal("dual batch overlap", "leave out --enable-dbo")
    if cache.kv_sharing_fast_prefill:
        raise refusal("fast prefill of layers that share a cache", "leave it out")
    if getattr(config.model_config, "rswa_window", None) is not None:
        raise refusal("reference sliding windows")


def check_spec(spec: Any) -> None:
    """Raise NotServed for layers whose cache is not one of plain decoder attention."""
    kind = type(spec).__name__
    if kind not in ("FullAttentionSpec", "SlidingWindowSpec"):
        raise refusal(f"layers with a {kind}")
    if getattr(spec, "attention_chunk_size", None) is not None:
        raise refusal("chunked local attention (Llama 4)")
    if getattr(spec, "non_causal", False):
        raise refusal("attention in both directions")
    if (mode := getattr(spec.kv_quant_mode, "name", "NONE")) not in ("NONE", "FP8_PER_TENSOR"):
        raise refusal(f"a KV cache in {mode}", "use --kv-cache-dtype auto or fp8")
    if (getattr(spec, "head_size_v", None) or spec.head_size) != spec.head_size:
        raise refusal(f"v head_dim {spec.head_size_v} beside head_dim {spec.head_size}")


def draft_tokens(config: Any) -> int:
    """Query tokens of each sequence in a verify forward; 0 without speculation."""
    drafts = getattr(config.speculative_config, "num_speculative_tokens", None)
    return 1 + int(drafts) if drafts else 0


def limits_of(config: Any) -> Limits:
    """The most that a forward can have: vLLM's scheduler keeps to these."""
    scheduler = config.scheduler_config
    batch, drafts = int(scheduler.max_num_seqs), draft_tokens(config)
    return Limits(
        batch=batch,
        tokens=int(config.model_config.max_model_len) + drafts,
        queries=int(scheduler.max_num_batched_tokens) + batch * max(1, drafts),
        graph_batch=0,  # graphs read vLLM's own tables, or those of eager forwards
        step=1,
        batch_invariant=versions.batch_invariant(),
    )


def layers_of(config: Any, names: list[str]) -> list[Any]:
    """vLLM's Attention modules of these names, where it has them."""
    known = config.compilation_config.static_forward_context
    found = [known.get(name) for name in names]
    return [layer for layer in found if hasattr(layer, "impl")]


def window_of(spec: Any, layers: list[Any]) -> int:
    """Keys to the left that every layer sees at most; -1 where one of them sees all.

    Without layers to ask, the cache's. Layers with windows may share a group with others where the
    hybrid cache manager is off.
    """
    windows = {layer.impl.left for layer in layers}
    if not windows:
        told = getattr(spec, "sliding_window", None)
        windows = {-1 if told is None else int(told) - 1}
    return -1 if -1 in windows else max(windows)


def cache_dtype_of(config: Any, spec: Any, layers: list[Any]) -> torch.dtype:
    """Of K and V: vLLM has bytes where they are fp8."""
    if getattr(spec.kv_quant_mode, "name", "NONE") == "NONE":
        dtype: torch.dtype = spec.dtype
        return dtype
    names = {layer.impl.kv_cache_dtype for layer in layers} or {config.cache_config.cache_dtype}
    found = {FP8_CACHES.get(name) for name in names}
    (only,) = found if len(found) == 1 else (None,)
    if only is None:
        raise refusal(f"a KV cache in {', '.join(sorted(names))}", "use --kv-cache-dtype auto")
    return only


def model_of(config: Any, spec: Any, layers: list[Any], device: torch.device) -> Model:
    """One group of layers as a model of one kind of layer; raises NotServed."""
    check_server(config)
    check_spec(spec)
    heads = {int(layer.impl.num_heads) for layer in layers}
    if not heads:
        heads = {int(config.model_config.get_num_attention_heads(config.parallel_config))}
    if len(heads) > 1:
        raise refusal(f"layers of one group with different numbers of heads ({sorted(heads)})")
    window = window_of(spec, layers)
    shape = Shape(heads.pop(), int(spec.num_kv_heads), int(spec.head_size))
    model = Model(
        full=shape if window < 0 else None,
        windowed=shape if window >= 0 else None,
        window=window,
        page_tokens=int(spec.block_size),
        draft_tokens=draft_tokens(config),
        dtype=config.model_config.dtype,
        device=device,
        kv_dtype=cache_dtype_of(config, spec, layers),
    )
    check_kernels(model)
    return model


def check_kernels(model: Model) -> None:
    """Raise NotServed for what the kernels of this device cannot compute."""
    fp8 = model.fp8 and model.dtype in QUERY_DTYPES
    if model.cache_dtype != model.dtype and not fp8:
        raise refusal(
            f"a KV cache of {model.cache_dtype} with a model in {model.dtype}",
            "use --kv-cache-dtype auto",
        )
    if model.device.type != "cuda":
        return  # torch operators take any shape; for tests, not for serving
    from flashcore.dispatch import device_path

    path = device_path(torch.device("cuda", torch.cuda.current_device()))
    if path.name != "hopper":
        raise refusal(f"this device ({path.reason})")
    if model.dtype not in (torch.bfloat16, torch.float16):
        raise refusal(f"models in {model.dtype}", "use --dtype bfloat16 or float16")
    if model.page_tokens not in PAGE_TOKENS:
        raise refusal(
            f"blocks of {model.page_tokens} tokens", f"use --block-size {max(PAGE_TOKENS)} or less"
        )
    for shape in model.shapes:
        if unserved := unserved_dims(shape.head_dim, shape.v_head_dim):
            raise refusal(f"{shape} ({unserved})")
        if model.fp8 and shape.head_dim % NARROW_DIM_STEP:
            raise refusal(
                f"{shape} with an fp8 KV cache, whose head_dim must be a multiple of "
                f"{NARROW_DIM_STEP}",
                "use --kv-cache-dtype auto",
            )


def kinds_of(model: Model, layers: list[Any]) -> list[Kind]:
    """The kinds of layers of a group and their variants, each once."""
    (shape,) = model.shapes
    kinds = []
    for windowed in (False, True):
        found = {
            Variant(softcap=bool(layer.impl.softcap), sinks=layer.impl.sinks is not None)
            for layer in layers
            if (layer.impl.left >= 0) == windowed
        }
        if not layers and windowed == (model.windowed is not None):
            found = {Variant()}
        if found:
            kinds.append(Kind(shape, windowed, tuple(sorted(found, key=str))))
    return kinds
