"""Made-up weights of unit gain for any model, by the names and shapes of its parameters.

The engines' dummy weights are all below 1e-3: every logit is next to zero, and every token weighs
the same in attention. These keep activations near unit scale, let attention scores deviate by a
given amount and logits by 3, so that an error in attention shows in the log-probabilities. They are
the same every time, on every rank that holds the same part of a parameter, and for every backend.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

LOGIT_DEVIATION = 3.0
_COMPUTED = ("inv_freq", "cos_sin", "rotary")  # made by the model itself
_AT_ONCE = 2**26  # elements


def install(score_deviation: float) -> None:
    """Make SGLang's load format `dummy` fill models of this process with such weights."""
    from sglang.srt.model_loader import loader, weight_utils

    def fill_instead(model: nn.Module, *args: Any, **kwargs: Any) -> None:
        fill(model, score_deviation)

    # SGLang's own name for it, wherever it has been imported to.
    for module in (weight_utils, loader):
        if hasattr(module, "initialize_dummy_weights"):
            module.initialize_dummy_weights = fill_instead


def install_in_vllm(score_deviation: float) -> None:
    """The same for vLLM's load format `dummy`."""
    from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader

    def load_instead(self: Any, model: nn.Module, model_config: Any) -> None:
        fill(model, score_deviation)

    DummyModelLoader.load_weights = load_instead


def fill(model: nn.Module, score_deviation: float) -> None:
    """Fill every parameter, and every buffer that a checkpoint would have."""
    import torch

    config = _text_config(model)
    gains = _attention_gains(model, score_deviation)
    names = set(model.state_dict(keep_vars=True))
    with torch.no_grad():
        for prefix, module in model.named_modules():
            own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
            for last, tensor in own:
                name = f"{prefix}.{last}" if prefix else last
                if name in names and torch.is_floating_point(tensor):
                    _fill_one(name, tensor.data, module, config, gains.get(prefix, 1.0))


def _fill_one(name: str, tensor: torch.Tensor, module: nn.Module, config: Any, gain: float) -> None:
    import torch

    last = name.rsplit(".", 1)[-1]
    if any(part in name for part in _COMPUTED):
        return
    if last.endswith("scale"):
        tensor.fill_(1.0)
    elif last == "bias" or last.endswith("_bias"):  # dt_bias and the routers' too
        tensor.zero_()
    elif "norm" in name and tensor.dim() <= 1:
        about_zero = "Gemma" in type(module).__name__  # these multiply by 1 + weight
        tensor.fill_(gain - 1.0 if about_zero else gain)
    elif last in ("A_log", "A"):  # decays of a state space: exp(A_log), or A itself, negative
        rates = torch.empty(tensor.shape, device=tensor.device)
        rates.uniform_(1, 8, generator=_generator(name, tensor, module))
        tensor.copy_(rates.log() if last == "A_log" else -rates)
    elif last == "D" or (tensor.dim() <= 1 and "sink" not in name):
        tensor.fill_(1.0)
    elif "sink" in name:
        _normal(tensor, 1.0, _generator(name, tensor, module))
    else:
        _normal(tensor, _deviation(name, tensor, config), _generator(name, tensor, module))
        rows = _rows_of_q_and_k(module)
        if rows and gain != 1.0:
            tensor[:rows] *= gain


def _deviation(name: str, tensor: torch.Tensor, config: Any) -> float:
    """Of a matrix: unit gain, but for what the model multiplies its activations by."""
    columns = tensor.shape[-1]
    unit = 1.0 / math.sqrt(columns)
    head = float(getattr(config, "lm_head_multiplier", None) or 1.0)
    head /= float(getattr(config, "logits_scaling", None) or 1.0)
    if "lm_head" in name:
        return LOGIT_DEVIATION * unit / head
    if "embed" in name and tensor.dim() == 2:
        if getattr(config, "tie_word_embeddings", False):  # it is the output layer as well
            return LOGIT_DEVIATION * unit / head
        return 1.0 / float(getattr(config, "embedding_multiplier", None) or 1.0)
    if "o_proj" in name or "out_proj" in name or "down_proj" in name:
        return unit / float(getattr(config, "residual_multiplier", None) or 1.0)
    return unit


def _attention_gains(model: nn.Module, score_deviation: float) -> dict[str, float]:
    """What q and k are multiplied by, each, for scores that deviate so: projection -> gain.

    Where a norm stands between projection and scores, it is the norm's.
    """
    gains = {}
    for prefix, parent in model.named_modules():
        children = dict(parent.named_children())
        units = [unit for child in children.values() if (unit := _score_unit(child))]
        if not units:
            continue
        gain = math.sqrt(score_deviation / units[0])
        norms = [name for name in children if name.startswith(("q_", "k_")) and "norm" in name]
        for name in norms or [n for n, c in children.items() if _rows_of_q_and_k(c)]:
            gains[f"{prefix}.{name}" if prefix else name] = gain
    return gains


def _score_unit(module: Any) -> float:
    """Deviation of the scores of an attention layer whose q and k are of unit scale; 0 for another
    module. SGLang's layers have the scale themselves, vLLM's implementations of them."""
    if hasattr(module, "scaling") and hasattr(module, "qk_head_dim"):
        return float(module.scaling) * math.sqrt(int(module.qk_head_dim))
    impl: Any = getattr(module, "impl", None)
    if hasattr(impl, "scale") and hasattr(impl, "head_size"):
        return float(impl.scale) * math.sqrt(int(impl.head_size))
    return 0.0


def _rows_of_q_and_k(module: Any) -> int:
    """Of a projection to q, then k, then v; 0 for another module."""
    if hasattr(module, "q_proj_shard_size"):  # SGLang
        return int(module.q_proj_shard_size + module.kv_proj_shard_size)
    if hasattr(module, "num_kv_head_replicas"):  # vLLM
        return int((module.num_heads + module.num_kv_heads) * module.head_size)
    return 0


def _normal(tensor: torch.Tensor, deviation: float, generator: torch.Generator) -> None:
    import torch

    if not tensor.is_contiguous():
        values = torch.randn(tensor.shape, generator=generator, device=tensor.device)
        tensor.copy_(values * deviation)
        return
    flat = tensor.view(-1)
    for start in range(0, flat.numel(), _AT_ONCE):
        part = flat[start : start + _AT_ONCE]
        values = torch.randn(part.shape, generator=generator, device=tensor.device)
        part.copy_(values * deviation)


def _generator(name: str, tensor: torch.Tensor, module: nn.Module) -> torch.Generator:
    """Seeded by the parameter's name and by which part of it this rank holds."""
    import torch

    part = [f"{key}={rank}" for key, rank in _ranks(module)]
    seed = zlib.crc32(" ".join([name, *part]).encode())
    return torch.Generator(tensor.device).manual_seed(seed)


def _ranks(module: nn.Module) -> Iterator[tuple[str, int]]:
    for key in ("tp_rank", "moe_tp_rank", "moe_ep_rank"):
        rank = getattr(module, key, None)
        if isinstance(rank, int):
            yield key, rank


def _text_config(model: nn.Module) -> Any:
    config = getattr(model, "config", None)
    return getattr(config, "text_config", None) or config
