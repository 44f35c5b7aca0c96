"""Models of any family in the serving benchmark: fewer layers of each kind, made-up weights."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from flashcore.bench.serve import weights
from flashcore.bench.serve.configs import cut_layers
from flashcore.bench.serve.scheduler import VARIABLE, Additions, announced
from flashcore.bench.serve.shapes import SHAPES, ModelShape, model_shape
from flashcore.bench.serve.suite import make_row
from flashcore.bench.serve.workloads import SMALL, parse_workload
from tests.serve_fakes import OPTIONS

# Cutting layers


def config(**more: Any) -> dict[str, Any]:
    return {"model_type": "any", "num_hidden_layers": 6, **more}


def test_the_first_layers_are_kept_where_all_kinds_are_among_them() -> None:
    kinds = ["sliding_attention", "full_attention"] * 3
    cut = cut_layers(config(layer_types=kinds, rope_theta=1.0), 4)
    assert cut == {
        **config(layer_types=kinds[:4], rope_theta=1.0),
        "num_hidden_layers": 4,
    }


def test_a_missing_kind_takes_the_place_of_the_last_of_another() -> None:
    kinds = ["mamba", "mamba", "mamba", "attention", "mamba", "moe"]
    cut = cut_layers(config(layer_types=kinds), 3)
    assert cut["layer_types"] == ["mamba", "attention", "moe"]
    assert cut_layers(config(hybrid_override_pattern="M-M*-M"), 3)["hybrid_override_pattern"] == (
        "M-*"
    )
    with pytest.raises(ValueError, match="at least 3, for a layer of each kind, got 2"):
        cut_layers(config(layer_types=kinds), 2)


def test_what_a_layer_is_besides_goes_with_it() -> None:
    cut = cut_layers(
        config(
            attn_type_list=[1, 1, 1, 0, 1, 1],
            moe_layer_freq=[0, 1, 1, 1, 1, 1],
            mlp_only_layers=[0],
            first_k_dense_replace=1,
            mlp_multipliers=[1.0] * 6,  # not by layer
        ),
        3,
    )
    assert cut["attn_type_list"] == [1, 1, 0]
    assert cut["moe_layer_freq"] == [0, 1, 1]
    assert (cut["mlp_only_layers"], cut["first_k_dense_replace"]) == ([0], 1)
    assert cut["mlp_multipliers"] == [1.0] * 6
    with pytest.raises(ValueError, match="at least 2"):
        cut_layers(config(first_k_dense_replace=1), 1)


@pytest.mark.parametrize(
    "more", [{"full_attention_interval": 4}, {"sliding_window_pattern": "LLLG"}]
)
def test_a_period_of_layers_stays_whole(more: dict[str, Any]) -> None:
    assert cut_layers(config(**more), 4)["num_hidden_layers"] == 4
    with pytest.raises(ValueError, match="at least 4, one period of its kinds, got 3"):
        cut_layers(config(**more), 3)


def test_a_nested_language_model_is_cut_and_nothing_else() -> None:
    nested = {"num_hidden_layers": 2, "layer_types": ["a", "a"]}
    whole = {"text_config": nested, "vision_config": {"num_hidden_layers": 2}}
    cut = cut_layers(whole, 1)
    assert cut["text_config"] == {"num_hidden_layers": 1, "layer_types": ["a"]}
    assert cut["vision_config"] == {"num_hidden_layers": 2}
    assert nested["layer_types"] == ["a", "a"]  # the caller's own is left alone


SIZES = {
    "num_attention_heads": 4,
    "hidden_size": 64,
    "vocab_size": 500,
    "max_position_embeddings": 256,
}


def written(folder: Path, **more: Any) -> str:
    path = folder / "config.json"
    path.write_text(json.dumps(config(**{**SIZES, **more})))
    return str(path)


def test_any_config_makes_a_shape_that_writes_itself_again(tmp_path: Path) -> None:
    kinds = ["conv", "full_attention"] * 3
    shape = model_shape(written(tmp_path, layer_types=kinds, head_dim=80))
    assert (shape.layers, shape.head_dim, shape.kv_heads, shape.context) == (6, 80, 4, 256)
    assert shape.weight_bytes_per_step is None
    assert shape.config()["layer_types"] == kinds
    short = model_shape(written(tmp_path, layer_types=kinds), layers=2)
    assert (short.layers, short.config()["layer_types"]) == (2, kinds[:2])
    assert ModelShape(**json.loads(json.dumps(asdict(short)))) == short
    with pytest.raises(ValueError, match=r"--layers for .* must be at least 2"):
        model_shape(written(tmp_path, layer_types=kinds), layers=1)
    row = make_row(
        parse_workload("4x16+8:40"), shape, replace(OPTIONS, backend="fa3"), [{"step_ms": 20.0}]
    )
    assert (row["gb_per_step"], row["step_ms"]) == (None, 20.0)


def test_a_llama_with_more_to_it_keeps_that_and_its_traffic(tmp_path: Path) -> None:
    plain = {**SHAPES["llama-3.2-1b"].config(), "rope_scaling": {"rope_type": "llama3"}}
    (tmp_path / "config.json").write_text(json.dumps(plain))
    shape = model_shape(str(tmp_path / "config.json"))
    assert shape.config()["rope_scaling"] == {"rope_type": "llama3"}
    assert shape.weight_bytes_per_step == SHAPES["llama-3.2-1b"].weight_bytes_per_step


def test_a_named_shape_with_fewer_layers_has_a_name_of_its_own() -> None:
    short = model_shape("llama-3.1-8b-8l")
    assert short == model_shape("llama-3.1-8b", layers=8)
    with pytest.raises(ValueError, match=r"--layers must be 1 to 32 for llama-3.1-8b, got 33"):
        model_shape("llama-3.1-8b-33l")


@pytest.mark.parametrize("text", SMALL)
def test_small_workloads_fit_their_models(text: str) -> None:
    workload = parse_workload(text)
    assert workload.model is not None
    assert workload.prompt + workload.output <= model_shape(workload.model).longest


# Weights


class Norm(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))


class GemmaNorm(Norm):
    """Multiplies by 1 + weight, as its name says."""


class Qkv(nn.Module):
    """Rows of q, then of k, then of v."""

    def __init__(self, tp_rank: int = 0) -> None:
        super().__init__()
        self.q_proj_shard_size, self.kv_proj_shard_size = 256, 64
        self.tp_rank = tp_rank
        self.weight = nn.Parameter(torch.empty(384, 512))
        self.bias = nn.Parameter(torch.empty(384))


class Attention(nn.Module):
    """What SGLang's attention layer says of itself."""

    def __init__(self, scaling: float) -> None:
        super().__init__()
        self.scaling, self.qk_head_dim = scaling, 64


class Layer(nn.Module):
    def __init__(self, scaling: float, norms: bool, tp_rank: int) -> None:
        super().__init__()
        self.qkv_proj, self.attn = Qkv(tp_rank), Attention(scaling)
        if norms:
            self.q_norm, self.k_norm = Norm(64), GemmaNorm(64)
        self.sinks = nn.Parameter(torch.empty(8))
        self.A, self.A_log, self.D = (nn.Parameter(torch.empty(16)) for _ in range(3))
        self.dt_bias = nn.Parameter(torch.empty(16))
        self.experts = nn.Parameter(torch.empty(4, 32, 256))
        self.k_scale = nn.Parameter(torch.empty(()))
        self.register_buffer("inv_freq", torch.full((4,), 7.0))
        self.register_buffer("correction_bias", torch.full((4,), math.nan))
        self.register_buffer("scratch", torch.full((4,), math.nan), persistent=False)
        self.ids = nn.Parameter(torch.arange(3), requires_grad=False)


class Model(nn.Module):
    def __init__(
        self, scaling: float = 0.125, norms: bool = False, tp_rank: int = 0, **config: Any
    ) -> None:
        super().__init__()
        self.config = SimpleNamespace(**config)
        self.layers = nn.ModuleList([Layer(scaling, norms, tp_rank)])
        self.embed_tokens = nn.Embedding(1000, 512)
        self.lm_head = nn.Linear(512, 1000, bias=False)
        for parameter in self.parameters():
            if parameter.is_floating_point():
                parameter.data.fill_(math.nan)  # as torch.empty may be


def filled(deviation: float = 1.0, **how: Any) -> Model:
    model = Model(**how)
    weights.fill(model, deviation)
    return model


def layer_of(model: Model) -> Layer:
    layer = model.layers[0]
    assert isinstance(layer, Layer)
    return layer


def test_every_parameter_is_filled_and_nothing_else_is_touched() -> None:
    model = filled()
    layer = layer_of(model)
    assert all(bool(p.isfinite().all()) for p in model.parameters() if p.is_floating_point())
    assert layer.correction_bias.tolist() == [0.0] * 4  # a checkpoint would have it
    assert layer.inv_freq.tolist() == [7.0] * 4
    assert bool(layer.scratch.isnan().all())
    assert layer.ids.tolist() == [0, 1, 2]
    assert layer.dt_bias.tolist() == [0.0] * 16
    assert (layer.k_scale.item(), set(layer.D.tolist())) == (1.0, {1.0})


def test_states_decay() -> None:
    layer = layer_of(filled())
    assert bool(((layer.A >= -8) & (layer.A <= -1)).all())
    assert bool(((layer.A_log >= 0) & (layer.A_log <= math.log(8))).all())
    assert layer.sinks.std().item() > 0.1


def test_activations_and_logits_have_the_scale_they_should() -> None:
    model = filled()
    x = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    assert layer_of(model).experts.std().item() == pytest.approx(1 / 16, rel=0.05)
    assert (x @ model.lm_head.weight.T).std().item() == pytest.approx(3, rel=0.05)
    assert model.embed_tokens.weight.std().item() == pytest.approx(1, rel=0.05)
    tied = filled(tie_word_embeddings=True)
    assert (x @ tied.embed_tokens.weight.T).std().item() == pytest.approx(3, rel=0.05)


def test_a_models_own_multipliers_are_undone() -> None:
    x = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    for how, factor in (({"lm_head_multiplier": 0.02}, 0.02), ({"logits_scaling": 16}, 1 / 16)):
        logits = x @ filled(**how).lm_head.weight.T * factor
        assert logits.std().item() == pytest.approx(3, rel=0.05)
    embedding = filled(embedding_multiplier=12).embed_tokens.weight
    assert 12 * embedding.std().item() == pytest.approx(1, rel=0.05)


@pytest.mark.parametrize("deviation", [1.0, 2.5])
@pytest.mark.parametrize("scaling", [0.125, 1 / 128])
def test_scores_deviate_as_asked(deviation: float, scaling: float) -> None:
    layer = layer_of(filled(deviation, scaling=scaling))
    x = torch.randn(256, 512, generator=torch.Generator().manual_seed(0))
    q, k, v = (x @ layer.qkv_proj.weight.T).split((256, 64, 64), dim=1)
    scores = scaling * q[:, :64] @ k.T
    assert scores.std().item() == pytest.approx(deviation, rel=0.1)
    assert v.std().item() == pytest.approx(1, rel=0.1)


def test_behind_a_norm_it_is_the_norm_that_makes_scores_deviate() -> None:
    layer = layer_of(filled(4.0, norms=True))
    assert set(layer.q_norm.weight.tolist()) == {2.0}
    assert set(layer.k_norm.weight.tolist()) == {1.0}  # 1 + weight
    assert layer.qkv_proj.weight.std().item() == pytest.approx(1 / math.sqrt(512), rel=0.05)


def test_weights_repeat_and_ranks_hold_parts_of_their_own() -> None:
    first, again, other = filled(), filled(), filled(tp_rank=1)
    for (name, a), (_, b) in zip(first.named_parameters(), again.named_parameters(), strict=True):
        assert bool((a == b).all()), name
    a, b = (layer_of(model).qkv_proj.weight for model in (first, other))
    assert not bool((a == b).any())
    assert bool((first.lm_head.weight == other.lm_head.weight).all())  # held by every rank


def test_a_view_that_is_not_contiguous_is_filled_as_well() -> None:
    model = nn.Module()
    model.weight = nn.Parameter(torch.full((8, 64), math.nan).T)
    weights.fill(model, 1.0)
    assert bool(model.weight.isfinite().all())


def test_schedulers_learn_what_to_add_from_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(VARIABLE, "{}")
    assert announced() == Additions()
    wanted = Additions(score_deviation=2.5, clock="/c")
    wanted.announce()
    assert announced() == wanted
