"""Model shapes: what an engine needs to run a model whose weights are made up."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a Llama-like decoder (gated MLP, grouped-query attention), 16-bit weights and KV."""

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

    @property
    def longest(self) -> int:
        """Tokens of a sequence, prompt and answer, that SGLang takes: two short of the context."""
        return self.context - 2

    @property
    def weight_bytes_per_step(self) -> int:
        """Bytes of the weights that a decode step reads: every layer and the output layer."""
        projections = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        layer = projections + 3 * self.hidden * self.intermediate
        return 2 * (self.layers * layer + self.hidden * self.vocab)

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of K and V of one token in all layers."""
        return 4 * self.layers * self.kv_heads * self.head_dim

    def config(self) -> dict[str, Any]:
        """The model's config.json."""
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
        ModelShape("llama-3.1-8b", 32, 4096, 14336, 32, 8, 128, 128256),
        ModelShape("llama-3.2-3b", 28, 3072, 8192, 24, 8, 128, 128256, tied=True),
        ModelShape("llama-3.2-1b", 16, 2048, 8192, 32, 8, 64, 128256, tied=True),
        ModelShape("qwen2.5-1.5b", 28, 1536, 8960, 12, 2, 128, 151936, tied=True, qwen=True),
        ModelShape("tiny", 2, 128, 256, 4, 2, 32, 1000, context=4096),  # for a CPU
    )
}
DEFAULT_SHAPE = "llama-3.1-8b"
_FAMILIES = {"llama": False, "qwen2": True}


def model_shape(name: str, *, layers: int | None = None) -> ModelShape:
    """A named shape, or that of a model's config.json; `layers` keeps only that many of them.

    Raises ValueError for an unknown name or a model of another family.
    """
    shape = SHAPES.get(name)
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
    return replace(shape, layers=layers, name=f"{shape.name}-{layers}l")


def _from_config(path: Path) -> ModelShape:
    try:
        config = json.loads(path.read_text())
        family = config["model_type"]
        if family not in _FAMILIES:
            raise ValueError(f"model_type {family!r} is not one of {', '.join(_FAMILIES)}")
        heads = config["num_attention_heads"]
        return ModelShape(
            name=path.resolve().parent.name if path.name == "config.json" else path.stem,
            layers=config["num_hidden_layers"],
            hidden=config["hidden_size"],
            intermediate=config["intermediate_size"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads", heads),
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            vocab=config["vocab_size"],
            context=config["max_position_embeddings"],
            tied=config.get("tie_word_embeddings", False),
            qwen=_FAMILIES[family],
        )
    except KeyError as error:
        raise ValueError(f"--model-shape {path}: it has no {error.args[0]}") from error
    except (TypeError, ValueError) as error:
        raise ValueError(f"--model-shape {path}: {error}") from error
