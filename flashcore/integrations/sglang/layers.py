"""The attention layers of an SGLang model, and the kinds of them."""

from __future__ import annotations

from typing import Any

import torch

from flashcore.serving.kernels import Kind, Variant
from flashcore.serving.shapes import Model


def attention_layers(runner: Any) -> list[Any]:
    """RadixAttention layers of the runner's model, if it has one already."""
    model = getattr(runner, "model", None)
    if model is None:
        return []
    from sglang.srt.layers.radix_attention import RadixAttention

    return [module for module in model.modules() if isinstance(module, RadixAttention)]


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
