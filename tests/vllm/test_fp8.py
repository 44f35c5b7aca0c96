"""fp8 KV caches of vLLM: bytes, the layers' scale tensors, and attention over what is written."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from flashcore.append import stored
from flashcore.integrations.vllm.support import FP8_CACHES
from flashcore.serving.shapes import NotServed
from flashcore.sm90.families import PAGED
from tests import fake_kernels
from tests import serving_cases as cases
from tests.compare import assert_close
from tests.vllm.batches import Engine, Forward, Setup, attend, expected, make_engine, make_forward
from tests.vllm.batches import typed as of_type
from tests.vllm.test_attention import FORWARDS, SETUPS

SCALES = ("one", "layer", "head")
NARROW = ("16", "64", "one KV head", "HND", "padded blocks", "hybrid", "sinks", "softcap")


def engine_of(setup: str, kv_cache: str, scales: str = "layer") -> Engine:
    """With scales of its own in each layer, filled where vLLM keeps them."""
    wanted = replace(SETUPS[setup], dtype=torch.bfloat16, kv_cache=kv_cache)
    engine = make_engine(wanted)
    layers = [layer for group in engine.groups for layer in group.layers]
    for number, layer in enumerate(layers):
        assert layer._k_scale.shape == layer._v_scale.shape == ()
        if scales == "layer":
            layer._k_scale.fill_(0.37 + number)
            layer._v_scale.fill_(2.5 / (number + 1))
        elif scales == "head":  # as compressed-tensors gives them
            each = torch.arange(1, wanted.heads[1] + 1, dtype=torch.float32)
            layer._k_scale = torch.nn.Parameter(0.3 * each, requires_grad=False)
            layer._v_scale = torch.nn.Parameter(2.0 / each, requires_grad=False)
    return engine


def check(engine: Engine, forward: Forward) -> None:
    for actual, exact in zip(attend(engine, forward), expected(engine, forward), strict=True):
        assert_close(actual, exact, engine.setup.dtype)


def check_stored(engine: Engine, forward: Forward) -> None:
    """The new tokens' K and V, divided by the layer's scale and rounded once, in their slots."""
    s, place = engine.setup, 0
    for number, group in enumerate(engine.groups):
        slots = forward.common[number].slot_mapping
        for layer, pool in zip(group.layers, group.pools, strict=True):
            rows = of_type(s, pool).transpose(1, 2)[slots // s.page_tokens, slots % s.page_tokens]
            k, v = rows.split(s.head_dim, -1)
            for new, written, scale in (
                (forward.k[place], k, layer._k_scale),
                (forward.v[place], v, layer._v_scale),
            ):
                wanted = stored(new[: len(slots)], written.dtype, scale)
                assert torch.equal(written.float(), wanted.float())
            place += 1


@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("kv_cache", FP8_CACHES)
@pytest.mark.parametrize("forward", FORWARDS)
@pytest.mark.parametrize("setup", NARROW)
def test_matches_the_reference(setup: str, forward: str, kv_cache: str, scales: str) -> None:
    engine = engine_of(setup, kv_cache, scales)
    made = make_forward(engine, FORWARDS[forward]())
    check(engine, made)
    check_stored(engine, made)


def test_a_graph_s_padding_is_left_out() -> None:
    engine = engine_of("hybrid", "fp8")
    check(engine, make_forward(engine, cases.decode(), padded=11, padded_tokens=11))


def test_scales_are_read_where_they_lie() -> None:
    """vLLM fills them after a first forward too (`calculate_kv_scales`); graphs hold addresses."""
    engine = engine_of("64", "fp8_e4m3")
    for value in (0.5, 3.0):
        for layer in engine.groups[0].layers:
            layer._k_scale.fill_(value)
            layer._v_scale.fill_(1 / value)
            k_scale, v_scale = layer.impl.scales(layer)
            assert k_scale is layer._k_scale
            assert v_scale is layer._v_scale
        check(engine, make_forward(engine, cases.decode()))


def test_layers_that_are_left_out_of_fp8() -> None:
    """`kv_cache_dtype_skip_layers`: a group in 16 bits beside one in fp8."""
    config_of_fp8 = engine_of("16", "fp8").config
    plain = make_engine(replace(SETUPS["16"], dtype=torch.bfloat16))
    layer = plain.groups[0].layers[0]
    layer._k_scale.fill_(9.0)  # which no forward looks at
    assert layer.impl.scales(layer) == (None, None)
    check(plain, make_forward(plain, cases.decode()))
    assert config_of_fp8.cache_config.cache_dtype == "fp8"


def test_bytes_that_are_not_fp8_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of("16", "fp8")
    spec = engine.groups[0].builder.kv_cache_spec
    for mode in ("NVFP4", "FP8_PER_TOKEN_HEAD", "INT8_PER_TOKEN_HEAD"):
        other = replace(spec, kv_quant_mode=getattr(type(spec.kv_quant_mode), mode))
        with pytest.raises(NotServed, match=f"a KV cache in {mode}; use --kv-cache-dtype auto"):
            rebuild(engine, other, [])
    names = [layer.layer_name for layer in engine.groups[0].layers]
    engine.groups[0].layers[0].impl.kv_cache_dtype = "fp8_inc"
    with pytest.raises(NotServed, match="a KV cache in fp8, fp8_inc; use --kv-cache-dtype auto"):
        rebuild(engine, spec, names)


def rebuild(engine: Engine, spec: Any, names: list[str]) -> Any:
    builder = type(engine.groups[0].builder)
    return builder(spec, names, engine.config, torch.device("cpu"))


@pytest.mark.parametrize("kv_cache", ["fp8", "fp8_e5m2"])
def test_no_forward_asks_for_a_kernel_that_is_not_there(
    kv_cache: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fakes = fake_kernels.install(monkeypatch)
    engine = make_engine(
        Setup(16, heads=(8, 2), head_dim=64, dtype=torch.bfloat16, kv_cache=kv_cache)
    )
    engine.groups[0].builder.build(0, make_forward(engine, [], 4, 4).common[0])
    configs = [k.config for k in fakes.loaded if k.family is PAGED]
    narrow = "e5m2" if kv_cache == "fp8_e5m2" else "e4m3"
    assert {(config.kv_dtype, config.expanded) for config in configs} == {
        (narrow, False),
        ("", True),
    }
    assert set(fakes.compiled) == set(fakes.loaded) == set(fakes.calls)
    known = set(fakes.loaded)
    for requests in FORWARDS.values():
        attend(engine, make_forward(engine, requests()))
    assert set(fakes.loaded) == known
    group = engine.groups[0].builder.group
    assert "in bfloat16 on a KV cache in float8" in group.describe()
    assert group.view.plan.problem.itemsize == 1
