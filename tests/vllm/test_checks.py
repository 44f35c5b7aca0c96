"""`flashcore bench serve --engine vllm` with checks: arguments, answers, and whole runs."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.logprobs import Logprob
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import MAX_LOGPROB_TOKEN_IDS

from flashcore.bench.serve import families, logits, vllm_logits
from flashcore.bench.serve.engine import EngineOptions
from flashcore.bench.serve.shapes import SHAPES
from flashcore.bench.serve.suite import Worker
from flashcore.bench.serve.vllm_engine import _answer, sampling_of, server_arguments
from tests.test_bench_serve_vllm import MODELS, SERVED
from tests.vllm.engines import HAS_ENGINE

OPTIONS = EngineOptions("flashcore", SHAPES["tiny"], (1, 8, 64), engine="vllm")


def test_arguments_of_families_and_cycles_are_those_of_this_vllm() -> None:
    for one in families.find_families(MODELS, SERVED, "vllm"):
        arguments = server_arguments(families.family_options(OPTIONS, one, "flashcore"), "folder")
        AsyncEngineArgs(**arguments)
        assert arguments["num_gpu_blocks_override"] == 4 * families.POOL // 64
    asleep = replace(OPTIONS, checkpoint=True, extra=(("enable_sleep_mode", True),))
    arguments = server_arguments(asleep, "folder")
    AsyncEngineArgs(**arguments)
    assert arguments["load_format"] == "auto"
    with pytest.raises(ValueError, match="--hicache is not there with --engine vllm"):
        server_arguments(replace(OPTIONS, counts=True), "folder")


def test_as_many_columns_as_vllm_tells() -> None:
    assert vllm_logits.COLUMNS == MAX_LOGPROB_TOKEN_IDS
    wanted = vllm_logits.columns(32000)
    asked = sampling_of(4, streamed=False, logprob_token_ids=wanted)
    assert (asked.max_tokens, asked.num_logprobs) == (4, vllm_logits.COLUMNS)


def test_an_answer_of_vllm_s() -> None:
    def step(**values: float) -> dict[int, Logprob]:
        return {int(token[1:]): Logprob(logprob=value) for token, value in values.items()}

    told = CompletionOutput(
        index=0,
        text="",
        token_ids=[7, 8],
        cumulative_logprob=None,
        logprobs=[step(t7=-1.0, t3=-0.5), step(t8=math.nan)],
        finish_reason="length",
    )
    answer: Any = RequestOutput(
        request_id="0",
        prompt=None,
        prompt_token_ids=[4, 5, 6],
        prompt_logprobs=[None, step(t5=-2.0), step(t6=-3.0, t1=-0.1)],
        outputs=[told],
        finished=True,
        num_cached_tokens=2,
    )
    found = _answer(answer)
    assert (found["tokens"], found["prompt"]) == ([7, 8], [-2.0, -3.0])
    assert found["output"][0] == -1.0
    assert math.isnan(found["output"][1])
    assert (found["cached"], found["ended"]) == (2, "length")
    waiting = SimpleNamespace(
        outputs=[SimpleNamespace(token_ids=[], logprobs=None, finish_reason="abort")],
        prompt_token_ids=[1],
        prompt_logprobs=None,
        num_cached_tokens=None,
    )
    assert _answer(waiting)["ended"] == "abort"


def bench(folder: Path, *words: str) -> dict[str, Any]:
    """What a check of vLLM's own backend on a CPU leaves; its platform takes no other."""
    out = folder / "result.json"
    command = ["bench", "serve", "--engine", "vllm", "--device", "cpu", "--backends", "CPU_ATTN"]
    command += ["--log-dir", str(folder / "logs")]
    done = subprocess.run(
        [sys.executable, "-m", "flashcore", *command, *words, "--json", str(out)],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
        env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"},
    )
    assert out.exists(), done.stderr[-3000:]
    logs = "".join(path.read_text() for path in folder.glob("logs/*.log"))
    assert logs
    assert "Event loop is closed" not in logs
    result: dict[str, Any] = json.loads(out.read_text())
    return result


engine = pytest.mark.skipif(not HAS_ENGINE, reason="this vLLM cannot run an engine here")
TINY = ("--model-shape", "tiny", "--page-size", "32")


@engine
def test_logits_on_a_cpu(tmp_path: Path) -> None:
    result = bench(tmp_path, "--logits", *TINY)
    assert (result["finite"], result["passed"]) == ({"CPU_ATTN": True}, True)


@engine
def test_an_engine_is_made_to_follow_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As another backend would have taken them: what comes before the first change is the same."""
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    on_cpu = replace(OPTIONS, backend="CPU_ATTN", device="cpu", page_size=32)
    options = logits._fitted(on_cpu)
    files = [tmp_path / f"{name}.npy" for name in ("own", "given")]
    with (tmp_path / "log").open("ab") as log, Worker(options, log) as worker:
        worker.ready()
        ask = {"do": "logits", "file": str(files[0]), "forced": None}
        own = worker.ask(ask, 120)["tokens"]
        given = [list(tokens) for tokens in own]
        for row, step in ((0, 0), (3, 7), (3, 8), (5, logits.STEPS - 1)):
            given[row][step] = 500 + step
        ask = {"do": "logits", "file": str(files[1]), "forced": given}
        assert worker.ask(ask, 120)["tokens"] == given
    first, second = (np.load(file) for file in files)
    assert first.shape == (len(own), logits.STEPS, vllm_logits.COLUMNS)
    assert np.isfinite(second).all()
    before = [step < 7 for step in range(logits.STEPS)]
    np.testing.assert_allclose(first[3][before], second[3][before], atol=0.2)
    assert np.abs(first[3][8:] - second[3][8:]).max() > 1.0
    np.testing.assert_allclose(first[1], second[1], atol=0.2)  # nothing was changed


@engine
def test_a_soak_on_a_cpu(tmp_path: Path) -> None:
    result = bench(tmp_path, "--soak", "0.3", *TINY)
    assert result["failures"] == []
    assert result["requests"]["aborted"] > 0
    assert result["requests"]["canary"] > 1
    assert result["tokens"] > 0


@engine
def test_cycles_on_a_cpu(tmp_path: Path) -> None:
    """What sleeps is on a GPU; prompts that are held and paused are answered here."""
    result = bench(tmp_path, "--cycles", "2", *TINY)
    assert result["failures"] == []
    assert [one["same"] == one["tokens"] > 0 for one in result["cycles"]] == [True, True]


@engine
def test_a_family_on_a_cpu(tmp_path: Path) -> None:
    model = tmp_path / "models" / "small"
    model.mkdir(parents=True)
    (model / "config.json").write_text(json.dumps(SHAPES["tiny"].config()))
    result = bench(tmp_path, "--families", str(model.parent), "--page-size", "32", "--jobs", "1")
    (row,) = [] if not result["rows"] else result["rows"]
    assert row.get("error") is None
    assert (row["family"], row["peer"], row["not_finite"]) == ("small", None, 0)
    assert row["tokens"] > 0
