"""What a model asks of attention, and whether flashcore serves it; decided at start-up."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import torch

from flashcore.integrations.sglang import deterministic
from flashcore.integrations.sglang.layers import attention_layers
from flashcore.kv_checks import QUERY_DTYPES
from flashcore.serving.shapes import Model, NotServed, Options, Shape
from flashcore.sm90.config.paged import NARROW_DIM_STEP, PAGE_TOKENS, unserved_dims

logger = logging.getLogger(__name__)

ELSEWHERE = "use --attention-backend fa3 or triton"

OPTIONS = Options(
    page_tokens="--page-size",
    batch="--max-running-requests",
    tokens="--context-length",
    queries="--chunked-prefill-size",
    elsewhere="--attention-backend fa3",
)


def refusal(what: str, instead: str = ELSEWHERE) -> NotServed:
    """To raise: `what` is not served, do that instead."""
    return NotServed(what, instead)


def model_of(runner: Any) -> Model:
    """Read and check a ModelRunner; raises NotServed."""
    check_server(runner)
    window = _window(runner)
    full, windowed = _shapes(runner, window)
    model = Model(
        full=full,
        windowed=windowed,
        window=window if windowed else -1,
        page_tokens=runner.page_size,
        draft_tokens=_draft_tokens(runner),
        dtype=runner.dtype,
        device=torch.device(runner.device),
        kv_dtype=runner.kv_cache_dtype,
    )
    check_kernels(model)
    deterministic.check(runner)
    return model


def check_server(runner: Any) -> None:
    """Raise NotServed for a kind of attention or a cache that the backend does not know."""
    pool = runner.token_to_kv_pool
    check_config(runner.model_config)
    if runner.use_mla_backend:
        raise refusal(*_MLA)
    if getattr(runner, "attention_chunk_size", None) is not None and not attention_layers(runner):
        raise refusal("chunked local attention", "use --attention-backend fa3")
    if getattr(runner, "prefill_aware_swa", False):
        raise refusal("prefill-aware sliding windows", "use --attention-backend fa3")
    ranks = parallel_ranks(runner)
    if ranks.attn_cp_size > 1 or ranks.dcp_size > 1:
        raise refusal("context parallelism", "use --attention-backend fa3")
    if getattr(runner.server_args, "enable_unified_memory", False):
        raise refusal("the unified memory pool", "leave out --enable-unified-memory")
    if getattr(runner.server_args, "kv_cache_dtype", None) == "mxfp8":  # e4m3 by its dtype
        raise refusal("a KV cache in mxfp8", "use --kv-cache-dtype auto or fp8_e4m3")
    if getattr(runner.server_args, "dllm_algorithm", None) is not None:
        raise refusal("diffusion language models")
    for part in (pool, *(getattr(pool, name, None) for name in ("full_kv_pool", "swa_kv_pool"))):
        if getattr(part, "use_hnd", False):
            raise refusal("a KV cache in HND layout", "unset SGLANG_USE_HND_KVCACHE")
        layout = getattr(part, "kv_cache_layout", "nhd")
        if layout not in ("nhd", "hnd"):
            raise refusal(f"a KV cache in {layout} layout")
        if getattr(part, "is_quantized_kv_cache", False):
            raise refusal("a quantised KV cache", "use --kv-cache-dtype auto")


def check_config(config: Any) -> None:
    """Raise NotServed for what SGLang's ModelConfig says of the model, before it is loaded."""
    if getattr(config.attention_arch, "name", "MHA") != "MHA":
        raise refusal(*_MLA)
    if config.is_encoder_decoder:
        raise refusal("encoder-decoder models", "use --attention-backend fa3")


_MLA = ("multi-head latent attention", "use --attention-backend flashmla or fa3")


def parallel_ranks(runner: Any) -> Any:
    """SGLang's numbers of ranks, which moved from the runner (0.5.16) to its context (0.5.23)."""
    if hasattr(runner, "ps"):
        return runner.ps
    from sglang.srt.runtime_context import get_parallel

    return get_parallel()


def _draft_tokens(runner: Any) -> int:
    try:
        from sglang.srt.runtime_context import get_spec
    except ImportError:  # 0.5.16
        return runner.server_args.speculative_num_draft_tokens or 0
    return get_spec().speculative_num_draft_tokens or 0


def check_kernels(model: Model) -> None:
    """Raise NotServed for what the kernels of this device cannot compute."""
    if model.cache_dtype != model.dtype:
        with_fp8 = model.fp8 and model.dtype in QUERY_DTYPES
        if not with_fp8:
            raise refusal(
                f"a KV cache of {model.cache_dtype} with a model in {model.dtype}",
                "use --kv-cache-dtype auto, fp8_e4m3 or fp8_e5m2 with a model in 16 bits, or "
                "--attention-backend fa3",
            )
    if model.device.type == "cpu":
        return  # torch operators take any shape; for tests, not for serving
    from flashcore.dispatch import device_path

    path = device_path(torch.device(model.device.type, torch.cuda.current_device()))
    if path.name != "hopper":
        raise refusal(f"this device ({path.reason})", "use --attention-backend flashinfer")
    if model.dtype not in (torch.bfloat16, torch.float16):
        raise refusal(f"models in {model.dtype}", "use --dtype bfloat16 or float16")
    if model.page_tokens not in PAGE_TOKENS:
        raise refusal(
            f"--page-size {model.page_tokens}",
            f"use one of {', '.join(str(n) for n in PAGE_TOKENS)}",
        )
    for shape in model.shapes:
        if unserved := unserved_dims(shape.head_dim, shape.v_head_dim):
            raise refusal(f"{shape} ({unserved})")
        if model.fp8 and (shape.head_dim % NARROW_DIM_STEP or shape.v_head_dim % NARROW_DIM_STEP):
            raise refusal(
                f"{shape} with an fp8 KV cache, whose dims must be multiples of {NARROW_DIM_STEP}",
                "use --kv-cache-dtype auto",
            )


def _window(runner: Any) -> int:
    """Of the model's layers; where there is no model to look at, what it announces; -1: none."""
    layers = attention_layers(runner)
    if not layers:
        return -1 if runner.sliding_window_size is None else int(runner.sliding_window_size)
    windows = {int(layer.sliding_window_size) for layer in layers} - {-1}
    if len(windows) > 1:
        raise refusal(f"layers with different sliding windows ({sorted(windows)})")
    return windows.pop() if windows else -1


def _shapes(runner: Any, window: int) -> tuple[Shape | None, Shape | None]:
    """Of the model's layers; of its configuration where there is no model to look at."""
    layers = attention_layers(runner)
    if not layers:
        shape = _configured_shape(runner)
        return shape, shape if window >= 0 else None
    for layer in layers:
        check_layer(layer)
    _check_bidirectional(runner, layers)
    kinds = []
    for windowed in (False, True):
        shapes = {
            Shape(layer.tp_q_head_num, layer.tp_k_head_num, layer.head_dim, layer.v_head_dim)
            for layer in layers
            if (layer.sliding_window_size >= 0) == windowed
        }
        if len(shapes) > 1:
            raise refusal(f"layers of one kind with different shapes ({_listed(shapes)})")
        kinds.append(shapes.pop() if shapes else None)
    return kinds[0], kinds[1]


def check_layer(layer: Any) -> None:
    """Raise NotServed for a RadixAttention layer with a feature that the backend lacks."""
    if layer.is_cross_attention:
        raise refusal("cross attention", "use --attention-backend fa3")
    if layer.v_head_dim > layer.head_dim:
        raise refusal(f"v_head_dim {layer.v_head_dim} beside head_dim {layer.head_dim}")
    if layer.attn_type.value == "encoder_only" and layer.sliding_window_size >= 0:
        raise refusal("encoder layers with a sliding window", _TRITON)
    if layer.logit_cap and layer.logit_capping_method != "tanh":
        raise refusal(f"the logit cap {layer.logit_capping_method!r}", _TRITON)
    if layer.xai_temperature_len > 0:
        raise refusal("temperatures by length (Grok)", _TRITON)
    if layer.use_irope:
        raise refusal("chunked local attention", "use --attention-backend fa3")


_TRITON = "use --attention-backend triton"


def _check_bidirectional(runner: Any, layers: list[Any]) -> None:
    """Layers that may attend in both directions run causally, as with fa3, in a causal model.

    SGLang 0.5.16 marks every layer of Gemma 3 so; the mask over image tokens that it then makes is
    for triton alone.
    """
    if all(layer.attn_type.value != "decoder_bidirectional" for layer in layers):
        return
    config = runner.model_config
    if getattr(getattr(config, "hf_text_config", None), "use_bidirectional_attention", False):
        raise refusal("bidirectional attention between prompt tokens", _TRITON)
    if getattr(config, "is_multimodal", False):
        logger.warning(
            "flashcore attention: image tokens attend causally, as with fa3; "
            "--attention-backend triton lets them see each other"
        )


def _configured_shape(runner: Any) -> Shape:
    config, ranks = runner.model_config, parallel_ranks(runner).attn_tp_size
    heads = config.num_attention_heads // ranks, config.get_num_kv_heads(ranks)
    return Shape(*heads, config.head_dim, config.v_head_dim)


def _listed(shapes: Iterable[Shape]) -> str:
    return ", ".join(sorted(str(shape) for shape in shapes))
