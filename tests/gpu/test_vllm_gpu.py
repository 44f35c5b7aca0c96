"""The vLLM backend's builder and layers on kernels, where vLLM is installed: the batches of
tests/vllm, eager and replayed from a CUDA graph."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from tests import serving_cases as cases
from tests.compare import assert_close
from tests.serving_cases import Request

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed", allow_module_level=True)

from flashcore.integrations.vllm import register, versions
from tests.vllm import specifications
from tests.vllm.batches import Setup, attend, expected, make_engine, make_forward, run_layers

FORWARDS: dict[str, Callable[[], list[Request]]] = {
    "decode": cases.decode,
    "extend": cases.extend,
    "mixed": cases.mixed,
}
COMMON = {"heads": (8, 2), "head_dim": 64, "dtype": torch.bfloat16, "device": "cuda"}
SETUPS = {
    "64": Setup(64, **COMMON),
    "16": Setup(16, **COMMON),
    "one KV head": Setup(64, **{**COMMON, "heads": (8, 1)}),
    "HND": Setup(64, layout="HND", **COMMON),
    "hybrid": Setup(16, windows=(None, 40, 40), **COMMON),
    "windows in a group of full attention": Setup(16, second=40, **COMMON),
    "sinks": Setup(64, windows=(None, 128), sinks=True, **COMMON),
    "softcap": Setup(64, windows=(None, 100), softcap=2.0, **COMMON),
}


@pytest.fixture(autouse=True, scope="module")
def registered() -> None:
    register()


@pytest.fixture(params=[False, True], ids=["", "invariant"])
def invariant(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "batch_invariant", lambda: request.param)


@torch.inference_mode()
@pytest.mark.parametrize("forward", FORWARDS)
@pytest.mark.parametrize("setup", SETUPS)
def test_matches_the_reference(setup: str, forward: str, invariant: None) -> None:
    engine = make_engine(SETUPS[setup])
    made = make_forward(engine, FORWARDS[forward]())
    for actual, exact in zip(attend(engine, made), expected(engine, made), strict=True):
        assert_close(actual, exact, torch.bfloat16)


@torch.inference_mode()
@pytest.mark.parametrize("kv_cache", ["fp8", "fp8_e5m2"])
@pytest.mark.parametrize("forward", FORWARDS)
@pytest.mark.parametrize("setup", ["64", "16", "one KV head", "HND", "hybrid"])
def test_fp8(setup: str, forward: str, kv_cache: str, invariant: None) -> None:
    """vLLM's kernel writes, with the layer's scales; ours reads with the same tensors."""
    engine = make_engine(replace(SETUPS[setup], kv_cache=kv_cache))
    for number, layer in enumerate(x for group in engine.groups for x in group.layers):
        layer._k_scale.fill_(0.37 + number)
        layer._v_scale.fill_(2.5 / (number + 1))
    made = make_forward(engine, FORWARDS[forward]())
    for actual, exact in zip(attend(engine, made), expected(engine, made), strict=True):
        assert_close(actual, exact, torch.bfloat16)


@torch.inference_mode()
@pytest.mark.parametrize("setup", ["64", "hybrid", "sinks"])
def test_a_captured_graph_follows_tables_and_lengths(setup: str, invariant: None) -> None:
    """Captured with padding rows alone, as vLLM does it, replayed with other batches."""
    engine, batch = make_engine(SETUPS[setup]), 8
    static = make_forward(engine, [], padded=batch, padded_tokens=batch)
    outs = attend(engine, static)
    torch.cuda.synchronize()
    metadata = [
        group.builder.build_for_cudagraph_capture(common.replace(max_query_len=1))
        for group, common in zip(engine.groups, static.common, strict=True)
    ]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run_layers(engine, static, metadata, outs)
    for requests in (cases.decode(), cases.decode()[:3], cases.decode()[4:]):
        forward = make_forward(engine, requests, padded=batch, padded_tokens=batch)
        for old, new in zip(static.common, forward.common, strict=True):
            for name in ("query_start_loc", "seq_lens", "block_table_tensor", "slot_mapping"):
                getattr(old, name).copy_(getattr(new, name))
        for kind in "qkv":
            for old, new in zip(getattr(static, kind), getattr(forward, kind), strict=True):
                old.copy_(new)
        graph.replay()
        for actual, exact in zip(outs, expected(engine, forward), strict=True):
            assert_close(actual, exact, torch.bfloat16)


# Each kind of batch with its heads, block size and window: the batches, models and tensor-parallel
# ranks of vLLM's own tests.
SPECIFIED = [
    *((name, specifications.LLAMA, 16, None) for name in specifications.SPECIFICATIONS),
    *((name, specifications.LLAMA, 64, None) for name in specifications.WINDOWED),
    *(
        (name, heads, 16, None)
        for name in specifications.SMALL
        for ranks, heads in specifications.HEADS.items()
        if ranks > 1
    ),
    *(
        (name, heads, 16, specifications.WINDOW)
        for name in specifications.WINDOWED
        for heads in specifications.PHI_HEADS.values()
    ),
]


@torch.inference_mode()
@pytest.mark.parametrize(("name", "heads", "block", "window"), SPECIFIED)
def test_vllm_s_batch_specifications(
    name: str, heads: tuple[int, int], block: int, window: int | None
) -> None:
    shape = {**COMMON, "heads": heads, "head_dim": 128}
    setup = Setup(block, windows=(window,), **shape)
    engine = make_engine(specifications.server(setup))
    made = make_forward(engine, specifications.requests(name))
    for actual, exact in zip(attend(engine, made), expected(engine, made), strict=True):
        assert_close(actual, exact, torch.bfloat16)
