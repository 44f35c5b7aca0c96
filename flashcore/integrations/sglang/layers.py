"""The attention layers of an SGLang model, and the kinds of them."""

from __future__ import annotations

from typing import Any

import torch

from flashcore.serving.kernels import Kind, Variant
from flashcore.serving.shapes import Model, NotServed


def attention_layers(runner: Any) -> list[Any]:
    """RadixAttention layers of the runner's model, if it has one already."""
    model = getattr(runner, "model", None)
    if model is None:
        return []
    from sglang.srt.layers.radix_attention import RadixAttention

    return [module for module in model.modules() if isinstance(module, RadixAttention)]


def kv_scales(layer: Any, device: torch.device) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """What K and V in an fp8 cache are multiplied by, fp32 () or [kv heads] on the device; None: 1.

    SGLang has parameters where a checkpoint has a quantisation method (1 where it has no scales),
    numbers from --quantization-param-path, and None otherwise. A parameter on the device is taken
    as it lies: what is loaded into it later counts in captured graphs too.
    """
    return _kv_scale(layer, "k_scale", device), _kv_scale(layer, "v_scale", device)


def _kv_scale(layer: Any, name: str, device: torch.device) -> torch.Tensor | None:
    given = getattr(layer, name, None)
    if given is None:
        return None
    scale = torch.as_tensor(given).detach().to(device, torch.float32)
    heads = layer.tp_k_head_num
    if scale.numel() == 1:
        scale = scale.view(())
    elif tuple(scale.shape) != (heads,):
        raise NotServed(
            f"{name} of shape {tuple(scale.shape)} in layer {layer.layer_id}",
            f"use a checkpoint with one for the layer or one for each of its {heads} KV heads",
        )
    if not bool(((scale > 0) & scale.isfinite()).all()):
        raise NotServed(
            f"{name} {scale.tolist()} of layer {layer.layer_id}",
            "use a checkpoint whose scales are finite and above 0, or --kv-cache-dtype auto",
        )
    return scale


def kinds_of(model: Model, runner: Any) -> list[Kind]:
    """The kinds of layers of a runner's model and their variants, each once."""
    layers = attention_layers(runner)
    with_sinks = _layers_with_sinks(getattr(runner, "model", None), layers)
    kinds = []
    for shape, windowed in ((model.full, False), (model.windowed, True)):
        if shape is None:
            continue
        found = {
            Variant(
                softcap=bool(layer.logit_cap),
                sinks=id(layer) in with_sinks,
                causal=layer.attn_type.value != "encoder_only",
            )
            for layer in layers
            if (layer.sliding_window_size >= 0) == windowed
        }
        order = sorted(found or {Variant()}, key=str)
        kinds.append(Kind(shape, windowed, tuple(order)))
    return kinds


def _layers_with_sinks(model: Any, layers: list[Any]) -> set[int]:
    """Attention layers, by id, whose parent has sinks to hand them: SGLang passes them with each
    call, and its models keep them beside the layer, under names with "sink"."""
    found: set[int] = set()
    known = {id(layer) for layer in layers}
    for module in model.modules() if known else ():
        values = {**vars(module), **module._parameters, **module._buffers}
        if any("sink" in name and isinstance(x, torch.Tensor) for name, x in values.items()):
            found |= {id(child) for child in module.children()} & known
    return found
