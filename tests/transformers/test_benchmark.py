"""benchmarks/transformers_prefill.py on a small model, with times that are made up."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaModel

from benchmarks import transformers_prefill as bench
from benchmarks.report import transformers_table
from flashcore import attention
from flashcore.bench.problems import DenseProblem
from flashcore.bench.providers import Provider
from flashcore.bench.timing import Contestant

VOCABULARY = 61


@pytest.fixture
def model() -> LlamaModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        initializer_range=0.25,
    )
    return LlamaModel(config).eval().bfloat16()


@pytest.mark.parametrize("number", range(3))
def test_each_implementation_computes_the_workload(model: LlamaModel, number: int) -> None:
    workload = bench.workloads(4, 16, VOCABULARY, "cpu")[number]
    used: list[tuple[str, str]] = []

    def elapsed(contestant: Contestant, calls: int) -> float:
        with contestant.context():
            used.append((contestant.name, model.config._attn_implementation))
            contestant.call()
        return {"flashcore": 1.0, "sdpa": 2.0}.get(contestant.name, 4.0) * calls

    with torch.inference_mode():
        found = bench.measure(model, workload, bench.register_peers(), 2, elapsed)
    rows: dict[str, dict[str, Any]] = {row["implementation"]: row for row in found}
    ours, peer = rows["flashcore"], rows["sdpa"]
    assert 0 < ours["error"] <= 2 * peer["error"]
    assert peer["error"] < 0.05
    assert ours["of_sdpa"] == {"forward": 0.5, "attention": 0.5}
    assert rows[bench.NOTHING]["forward_ms"]["median"] == 4.0
    assert "error" not in rows[bench.NOTHING]
    # The forwards came first, each under its own implementation.
    assert {mine == set_to for mine, set_to in used[: len(used) // 2]} == {True}


def test_workloads_have_the_same_tokens_padded_and_packed() -> None:
    full, padded, packed = bench.workloads(4, 16, VOCABULARY, "cpu")
    assert full.lengths == [16] * 4
    assert padded.lengths == packed.lengths == [4, 8, 12, 16]
    real = padded.inputs["attention_mask"].bool()
    assert torch.equal(padded.inputs["input_ids"][real], packed.inputs["input_ids"][0])
    assert real.sum(1).tolist() == padded.lengths
    assert real[:, -1].all()


def test_flops_of_a_layer(model: LlamaModel) -> None:
    """Two products of 2 x length^2 x head_dim for each head, half of it masked."""
    packed = bench.workloads(4, 16, VOCABULARY, "cpu")[2]
    pairs = sum(length**2 for length in packed.lengths)
    assert bench._flops(model.config, packed) == 2 * 2 * 4 * pairs * 16 / 2


def test_a_dense_peer_is_timed_where_it_serves(
    model: LlamaModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FlashAttention-3's forward alone: no padding, no packing."""

    def prepare(problem: DenseProblem, q: Any, k: Any, v: Any) -> Any:
        assert (problem.batch, problem.heads, problem.kv_heads) == (4, 4, 2)
        assert (problem.seqlen, problem.head_dim, problem.causal) == (16, 16, True)
        assert q.shape[:2] == k.shape[:2] == (4, 16)
        return lambda: attention(q, k, v, causal=True)

    peer = Provider("fa3_fwd", "fa3", "0", prepare)
    monkeypatch.setattr(bench, "dense_providers", lambda: ([peer], {}))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    versions = bench.register_peers()
    monkeypatch.undo()
    full, padded, packed = bench.workloads(4, 16, VOCABULARY, "cpu")
    assert [bench.serves("fa3_fwd", x) for x in (full, padded, packed)] == [True, False, False]

    def elapsed(contestant: Contestant, calls: int) -> float:
        contestant.call()
        return 1.0 * calls

    with torch.inference_mode():
        rows = bench.measure(model, full, versions, 2, elapsed)
    found = {row["implementation"]: row for row in rows}
    assert found["fa3_fwd"]["error"] == found["flashcore"]["error"]
    assert {"of_sdpa", "of_fa3_fwd"} <= found["flashcore"].keys()


def test_its_table(model: LlamaModel) -> None:
    """Of what `measure` gives, for every workload."""

    def elapsed(contestant: Contestant, calls: int) -> float:
        return {"flashcore": 1.0, "sdpa": 2.0}.get(contestant.name, 0.5) * calls

    rows = []
    with torch.inference_mode():
        for workload in bench.workloads(4, 16, VOCABULARY, "cpu"):
            rows += bench.measure(model, workload, bench.register_peers(), 2, elapsed)
    about = dict.fromkeys(("model", "device", "driver", "date", "commit", "command"), "x")
    versions = {"transformers": "5", "torch": "2"}
    lines = transformers_table({**about, "versions": versions, "rows": rows}).splitlines()
    assert lines[2].startswith("| full, 4 x 16 | flashcore | 1.00 | 2.000 | 1.000 | 2.00 | ")
    assert lines[4] == "| full, 4 x 16 | no attention | 0.50 |  |  |  |  |  |"
    assert lines[5].startswith("| padded, 4 x 4 to 16 | flashcore | ")
    assert {line.count("|") for line in lines[:11]} == {9}
