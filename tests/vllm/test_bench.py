"""`flashcore bench serve --engine vllm`: the engine's arguments, made-up weights, and one run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from vllm.engine.arg_utils import AsyncEngineArgs

from flashcore.bench.serve import weights
from flashcore.bench.serve.engine import EngineOptions
from flashcore.bench.serve.shapes import SHAPES
from flashcore.bench.serve.vllm_engine import server_arguments
from flashcore.integrations.vllm.versions import backend_name
from tests.vllm.batches import make_engine
from tests.vllm.engines import HAS_ENGINE
from tests.vllm.test_attention import SETUPS

OPTIONS = EngineOptions("flashcore", SHAPES["tiny"], (1, 8, 64), engine="vllm")


def test_arguments_are_those_of_this_vllm() -> None:
    options = replace(OPTIONS, max_total_tokens=6400, ranks=(2, 1, 1))
    arguments = server_arguments(options, "a-folder")
    AsyncEngineArgs(**arguments)
    assert arguments["attention_backend"] == backend_name()
    assert arguments["max_num_seqs"] == 64
    assert arguments["compilation_config"] == {"max_cudagraph_capture_size": 64}
    assert arguments["num_gpu_blocks_override"] == 100
    cache = 6400 * SHAPES["tiny"].kv_bytes_per_token() // 2  # of a rank
    assert arguments["kv_cache_memory_bytes"] == cache
    assert arguments["gpu_memory_utilization"] <= 0.1  # others are there already
    assert "kv_cache_memory_bytes" not in server_arguments(OPTIONS, "a-folder")
    assert arguments["max_model_len"] == SHAPES["tiny"].context
    small = server_arguments(replace(options, max_total_tokens=1000), "a-folder")
    assert (small["num_gpu_blocks_override"], small["max_model_len"]) == (15, 960)
    assert arguments["tensor_parallel_size"] == 2
    assert "kv_cache_dtype" not in arguments
    for dtype in ("fp8_e4m3", "fp8_e5m2", "bfloat16"):
        of_dtype = server_arguments(replace(OPTIONS, kv_cache_dtype=dtype), "a-folder")
        assert AsyncEngineArgs(**of_dtype).kv_cache_dtype == dtype
    narrow = server_arguments(replace(options, kv_cache_dtype="fp8_e5m2"), "a-folder")
    assert narrow["kv_cache_memory_bytes"] == cache // 2
    named = server_arguments(replace(OPTIONS, backend="TRITON_ATTN"), "a-folder")
    assert named["attention_backend"] == "TRITON_ATTN"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"extra": (("no_such", 1),)}, "vLLM has no argument 'no_such'"),
        ({"ranks": (1, 1, 2)}, "--dp is not there with --engine vllm"),
        ({"prefill_graph": True}, "--prefill-graph is not there"),
        ({"base_gpu": 1}, "--base-gpu is not there"),
    ],
    ids=str,
)
def test_what_vllm_s_engine_lacks_is_refused(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        server_arguments(replace(OPTIONS, **change), "a-folder")


class Projection(nn.Module):
    """The attributes of vLLM's QKVParallelLinear that say which rows are whose."""

    num_heads, num_kv_heads, num_kv_head_replicas, head_size = 4, 2, 1, 16

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty((4 + 2 + 2) * 16, 512), requires_grad=False)


def test_weights_give_attention_scores_the_deviation_that_is_asked_for() -> None:
    """vLLM's layers keep their scale in the implementation; rows of v are not scaled."""
    model = nn.Module()
    model.self_attn = nn.Module()
    model.self_attn.qkv_proj = Projection()
    model.self_attn.attn = make_engine(SETUPS["16"]).groups[0].layers[0]
    weights.fill(model, 4.0)
    rows = model.self_attn.qkv_proj.weight * 512**0.5
    assert rows[:96].std().item() == pytest.approx(2.0, rel=0.05)
    assert rows[96:].std().item() == pytest.approx(1.0, rel=0.05)


@pytest.mark.skipif(not HAS_ENGINE, reason="this vLLM cannot run an engine here")
def test_a_run_on_a_cpu(tmp_path: Path) -> None:
    words = "bench serve --engine vllm --device cpu --model-shape tiny --backends CPU_ATTN"
    words += " --page-size 32 --repeats 1 --workloads 4x64+16:24"
    out = tmp_path / "rows.json"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "flashcore", *words.split(), "--json", str(out)),
            *("--engine-args", '{"max_model_len": 512}'),
        ],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (row,) = json.loads(out.read_text())["rows"]
    assert (row["engine"], row["backend"], row["cached_tokens"]) == ("vllm", "CPU_ATTN", 64)
    assert row["step_ms"] > 0
    assert row["ttft_ms"] > 0
