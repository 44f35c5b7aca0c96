"""The model families of tests/data/models in SGLang: arguments, its own model classes, and pools.

A model is made on the meta device, so that only its layers and configuration exist.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from sglang.srt import runtime_context
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.mem_cache.memory_pool import HybridLinearKVPool, MHATokenToKVPool
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.server_args import ServerArgs
from sglang.test.kits.attention_unittest.attention_methods.dense_attention import (
    DenseAttentionCase,
    MockModelRunner,
    TinyModelConfig,
)

from flashcore.integrations.sglang.register import NAME
from tests.sglang.batches import Engine, Setup

MODELS = Path(__file__).parents[1] / "data" / "models"
NAMES = sorted(path.parent.name for path in MODELS.glob("*/config.json"))
HAS_HOOKS = hasattr(ServerArgs, "resolve_once")  # SGLang 0.5.23


def arguments(model: str, **options: Any) -> ServerArgs:
    """Resolved, as a launcher has them."""
    options = {"attention_backend": NAME, "device": "cpu", **options}
    args = ServerArgs(
        model_path=str(MODELS / model), skip_tokenizer_init=True, load_format="dummy", **options
    )
    if HAS_HOOKS:
        args.resolve_once()
    return args


def resolved(args: ServerArgs, field: str) -> Any:
    """What SGLang made of a field."""
    if not HAS_HOOKS:
        return getattr(args, field)
    from sglang.srt.arg_groups.overrides import resolution_result

    return resolution_result(args, field)


def without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mamba models check for a GPU, and rotary embeddings on a CPU for another engine's kernel."""
    if HAS_HOOKS:
        from sglang.srt.arg_groups import mamba_hook

        monkeypatch.setattr(mamba_hook, "validate_mamba_extra_buffer", lambda *_, **__: None)
    else:
        monkeypatch.setattr(ServerArgs, "_validate_mamba_extra_buffer", lambda *_: None)
    vllm, ops = ModuleType("vllm"), ModuleType("vllm._custom_ops")
    ops.rotary_embedding = None
    vllm._custom_ops = ops
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setitem(sys.modules, "vllm._custom_ops", ops)


@dataclass
class Family:
    """A model of SGLang, without weights."""

    config: Any
    model: torch.nn.Module
    window: int | None  # that SGLang's runner announces
    page_tokens: int

    @property
    def layers(self) -> list[RadixAttention]:
        """All that attend, in order."""
        return [layer for layer in self.model.modules() if isinstance(layer, RadixAttention)]


@contextmanager
def one_rank(folder: Path) -> Iterator[None]:
    """SGLang's process groups of a single process, which its model classes ask for."""
    from sglang.srt.distributed import parallel_state

    state = saved_context()
    args = arguments("llama")
    publish(args)
    parallel_state.init_distributed_environment(
        world_size=1,
        rank=0,
        distributed_init_method=f"file://{folder / 'rendezvous'}",
        local_rank=0,
        backend="gloo",
    )
    try:
        parallel_state.initialize_model_parallel()
        _initialize_dp_attention(args)
        yield
    finally:
        parallel_state.destroy_model_parallel()
        parallel_state.destroy_distributed_environment()
        restore_context(state)


def _initialize_dp_attention(args: ServerArgs) -> None:
    from sglang.srt.layers.dp_attention import initialize_dp_attention

    if HAS_HOOKS:
        initialize_dp_attention(args)
    else:
        initialize_dp_attention(args, args.get_model_config())


def publish(args: ServerArgs) -> None:
    """Make these the arguments of the process."""
    if HAS_HOOKS:
        ranks = runtime_context.SpawnRanks(world_rank=0)
        runtime_context.publish(args, role="scheduler", ranks=ranks)
    else:
        runtime_context.get_context().set_server_args(args)


def saved_context() -> Any:
    """What publish() replaces."""
    if HAS_HOOKS:
        return runtime_context.snapshot_context()
    return getattr(runtime_context.get_context(), "_server_args", None)


def restore_context(state: Any) -> None:
    """Put it back."""
    if HAS_HOOKS:
        runtime_context.restore_context(state)
    else:
        runtime_context.get_context()._server_args = state


def load(name: str) -> Family:
    """The family's model; within one_rank."""
    from sglang.srt.model_executor.model_runner_components.load_model_utils import (
        resolve_sliding_window_size,
    )
    from sglang.srt.model_loader.utils import get_model_architecture

    args = arguments(name)
    publish(args)
    if HAS_HOOKS:
        from sglang.srt.arg_groups.overrides import model_config_of

        config = model_config_of(args)
    else:
        config = args.get_model_config()
    model_class, _ = get_model_architecture(config)
    default = torch.get_default_dtype()
    torch.set_default_dtype(config.dtype)
    try:
        with torch.device("meta"):
            model = model_class(config=config.hf_config, quant_config=None)
    finally:
        torch.set_default_dtype(default)
    window = resolve_sliding_window_size(model, config)
    return Family(config, model, window, resolved(args, "page_size"))


def materialise(model: torch.nn.Module, layer: RadixAttention, rng: torch.Generator) -> Any:
    """The module that holds the layer, with random parameters on the CPU."""
    module = next(m for m in model.modules() if any(child is layer for child in m.children()))
    module.to_empty(device="cpu").float()
    for values in (*module.parameters(), *module.buffers()):
        if values.is_floating_point():
            values.data.copy_(torch.randn(values.shape, generator=rng) * values.shape[-1] ** -0.5)
    return module


def make_runner(family: Family, max_context: int, max_batch: int) -> tuple[Any, bool]:
    """SGLang's mock of a runner with the family's layers and pools; whether there are two pools."""
    first = family.layers[0]
    case = DenseAttentionCase(
        name="family",
        backend=NAME,
        forward_mode=ForwardMode.DECODE,
        num_heads=first.tp_q_head_num,
        num_kv_heads=first.tp_k_head_num,
        page_size=family.page_tokens,
        prefix_lens=(1,) * max_batch,
        extend_lens=(),
    )
    runner = MockModelRunner(
        case=case,
        model_config=TinyModelConfig(
            num_heads=first.tp_q_head_num,
            num_kv_heads=first.tp_k_head_num,
            head_dim=8,
            hidden_size=64,
            context_len=max_context,
        ),
        dtype=torch.float32,
        device="cpu",
        max_context_len=max_context,
        head_dim=8,
    )
    runner.model, runner.model_config = family.model, family.config
    runner.sliding_window_size = family.window
    runner.attention_chunk_size = family.config.attention_chunk_size
    size = family.page_tokens * (2 * max_context // family.page_tokens + 2 * max_batch)
    runner.token_to_kv_pool = _pool(family, size)
    return runner, isinstance(runner.token_to_kv_pool, SWAKVPool)


def _pool(family: Family, size: int) -> Any:
    """The kind that SGLang makes for the model, full of NaN."""
    layers = family.layers
    windowed = [layer for layer in layers if layer.sliding_window_size >= 0]
    full = [layer for layer in layers if layer.sliding_window_size < 0]
    first = (full or windowed)[0]
    common = {
        "size": size,
        "page_size": family.page_tokens,
        "dtype": torch.float32,
        "head_num": first.tp_k_head_num,
        "head_dim": first.head_dim,
        "device": "cpu",
    }
    pool: Any
    if family.config.is_hybrid_swa:
        pool = SWAKVPool(
            size_swa=size,
            swa_attention_layer_ids=[layer.layer_id for layer in windowed],
            full_attention_layer_ids=[layer.layer_id for layer in full],
            enable_alt_stream=False,
            v_head_dim=first.v_head_dim,
            swa_head_num=windowed[0].tp_k_head_num,
            swa_head_dim=windowed[0].head_dim,
            swa_v_head_dim=windowed[0].v_head_dim,
            **common,
        )
        slots = torch.arange(size + family.page_tokens)
        pool.register_mapping(torch.cat([slots, torch.tensor([-1])]))
    elif _is_hybrid_linear(family.config):
        ids = [layer.layer_id for layer in layers]
        pool = HybridLinearKVPool(full_attention_layer_ids=ids, mamba_pool=None, **common)
    else:
        pool = MHATokenToKVPool(
            layer_num=len(layers), enable_memory_saver=False, enable_alt_stream=False, **common
        )
    for layer in layers:
        for buffer in pool.get_kv_buffer(layer.layer_id):
            buffer.fill_(float("nan"))
    return pool


def _is_hybrid_linear(config: Any) -> bool:
    from sglang.srt.layers.attention.attention_registry import mambaish_config

    return mambaish_config(config) is not None


def make_engine(family: Family, max_context: int = 512, max_batch: int = 8) -> Engine:
    """A backend for the family, and its first layer of each kind."""
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS

    runner, two_pools = make_runner(family, max_context, max_batch)
    kinds = {layer.sliding_window_size >= 0: layer for layer in reversed(family.layers)}
    setup = Setup(
        family.page_tokens, window=family.window or -1, two_pools=two_pools, max_context=max_context
    )
    return Engine(
        setup,
        runner,
        ATTENTION_BACKENDS[NAME](runner),
        [kinds[windowed] for windowed in sorted(kinds)],
        torch.Generator().manual_seed(0),
    )
