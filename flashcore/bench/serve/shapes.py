"""Model shapes: what an engine needs to run a model whose weights are made up."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flashcore.bench.serve.configs import cut_layers, text_config

KV_CACHE_DTYPES = ("auto", "bfloat16", "fp8_e4m3", "fp8_e5m2")
"""As both engines call them. auto: the model's own, which is bfloat16."""


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a Llama-like decoder (gated MLP, grouped-query attention), 16-bit weights.

    With `source`, a config.json as text, it is whatever model that describes; its sizes are then
    those that the config names, and what a step reads is not known.
    """

    name: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    context: int = 131072  # tokens
    tied: bool = False  # the output layer is the embedding
    qwen: bool = False  # Qwen2: biases on q, k and v
    source: str | None = None

    @property
    def longest(self) -> int:
        """Tokens of a sequence, prompt and answer, that SGLang takes: two short of the context."""
        return self.context - 2

    @property
    def weight_bytes_per_step(self) -> int | None:
        """Bytes of the weights that a decode step reads: every layer and the output layer.

        None for a model of another family, of which the sizes say too little.
        """
        if self.source is not None and json.loads(self.source)["model_type"] not in _FAMILIES:
            return None
        projections = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        layer = projections + 3 * self.hidden * self.intermediate
        return 2 * (self.layers * layer + self.hidden * self.vocab)

    def kv_bytes_per_token(self, kv_cache_dtype: str = "auto") -> int:
        """Bytes of K and V of one token in all layers."""
        itemsize = 1 if kv_cache_dtype.startswith("fp8") else 2
        return 2 * itemsize * self.layers * self.kv_heads * self.head_dim

    def config(self) -> dict[str, Any]:
        """The model's config.json."""
        if self.source is not None:
            source: dict[str, Any] = json.loads(self.source)
            return source
        family = ("Qwen2ForCausalLM", "qwen2") if self.qwen else ("LlamaForCausalLM", "llama")
        return {
            "architectures": [family[0]],
            "model_type": family[1],
            "num_hidden_layers": self.layers,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab,
            "max_position_embeddings": self.context,
            "tie_word_embeddings": self.tied,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0,
            "hidden_act": "silu",
            "bos_token_id": 0,
            "eos_token_id": 1,
            "torch_dtype": "bfloat16",
        }


SHAPES = {
    shape.name: shape
    for shape in (
        ModelShape("llama-3.1-70b", 80, 8192, 28672, 64, 8, 128, 128256),
        ModelShape("llama-3.1-8b", 32, 4096, 14336, 32, 8, 128, 128256),
        ModelShape("llama-3.2-3b", 28, 3072, 8192, 24, 8, 128, 128256, tied=True),
        ModelShape("llama-3.2-1b", 16, 2048, 8192, 32, 8, 64, 128256, tied=True),
        ModelShape("qwen2.5-1.5b", 28, 1536, 8960, 12, 2, 128, 151936, tied=True, qwen=True),
        ModelShape("tiny", 2, 128, 256, 4, 2, 32, 1000, context=4096),  # for a CPU
    )
}
DEFAULT_SHAPE = "llama-3.1-8b"
_FAMILIES = {"llama": False, "qwen2": True}
_PLAIN = ("LlamaForCausalLM", "Qwen2ForCausalLM")


def model_shape(name: str, *, layers: int | None = None) -> ModelShape:
    """A named shape, or that of a model's config.json; `layers` keeps only that many of them.

    A name that ends in -8l is that shape with 8 layers.

    Raises ValueError for an unknown name, a config without the sizes that are needed, or so few
    layers that one of its kinds would be missing.
    """
    shape = SHAPES.get(name)
    short = re.fullmatch(r"(.+)-(\d+)l", name)
    if shape is None and short is not None and short[1] in SHAPES and layers is None:
        return model_shape(short[1], layers=int(short[2]))
    if shape is None:
        path = Path(name)
        if not path.is_file():
            raise ValueError(
                f"--model-shape {name}: neither a config.json nor one of {', '.join(SHAPES)}"
            )
        shape = _from_config(path)
    if layers is None:
        return shape
    if not 1 <= layers <= shape.layers:
        raise ValueError(f"--layers must be 1 to {shape.layers} for {shape.name}, got {layers}")
    if shape.source is not None:
        try:
            source = json.dumps(cut_layers(json.loads(shape.source), layers))
        except ValueError as error:
            raise ValueError(f"--layers for {shape.name} {error}") from None
        shape = replace(shape, source=source)
    return replace(shape, layers=layers, name=f"{shape.name}-{layers}l")


def _from_config(path: Path) -> ModelShape:
    try:
        config = json.loads(path.read_text())
        family = config["model_type"]
        text = text_config(config)
        architectures = config.get("architectures") or [None]
        plain = family in _FAMILIES and architectures[0] in (None, *_PLAIN)
        heads = text["num_attention_heads"]
        return ModelShape(
            name=path.resolve().parent.name if path.name == "config.json" else path.stem,
            layers=text["num_hidden_layers"],
            hidden=text["hidden_size"],
            intermediate=text["intermediate_size"] if plain else text.get("intermediate_size", 0),
            heads=heads,
            kv_heads=text.get("num_key_value_heads", heads),
            head_dim=text.get("head_dim") or text["hidden_size"] // heads,
            vocab=text["vocab_size"],
            context=text["max_position_embeddings"],
            tied=text.get("tie_word_embeddings", False),
            qwen=_FAMILIES.get(family, False),
            source=None if plain and not _departs(text) else json.dumps(config),
        )
    except KeyError as error:
        raise ValueError(f"--model-shape {path}: it has no {error.args[0]}") from error
    except (TypeError, ValueError) as error:
        raise ValueError(f"--model-shape {path}: {error}") from error


def _departs(text: dict[str, Any]) -> bool:
    """Whether a Llama or Qwen2 has more to it than the sizes."""
    return bool(text.get("rope_scaling") or text.get("use_sliding_window"))
