"""A whole vLLM engine on the CPU gives the same tokens with flashcore as with its own backend."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.vllm.engines import HAS_ENGINE

pytestmark = pytest.mark.skipif(not HAS_ENGINE, reason="this vLLM cannot run an engine here")

WINDOWED = {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "sliding_window": 100,
}
CASES: dict[str, dict[str, Any]] = {
    "full attention": {},
    "sliding window": {"config": WINDOWED},
}


def prompts() -> list[list[int]]:
    """Five with a common prefix, one alone."""
    rng = random.Random(0)

    def tokens(count: int) -> list[int]:
        return [rng.randrange(10, 990) for _ in range(count)]

    shared = tokens(300)
    return [*(shared + tokens(20) for _ in range(5)), tokens(50)]


@pytest.mark.parametrize("case", CASES)
def test_same_tokens_as_vllm_s_own_backend(case: str, tmp_path: Path) -> None:
    tokens = []
    for ours in (False, True):
        out = tmp_path / f"{ours}.json"
        folder = tmp_path / f"model-{ours}"
        folder.mkdir()
        told = {
            "ours": ours,
            "out": str(out),
            "folder": str(folder),
            "prompts": prompts(),
            "options": CASES[case],
        }
        done = subprocess.run(
            [sys.executable, "-m", "tests.vllm.engines", json.dumps(told)],
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
            env={
                **os.environ,
                "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
                "VLLM_CPU_KVCACHE_SPACE": "1",
                "VLLM_NO_USAGE_STATS": "1",
                "HF_HUB_OFFLINE": "1",
            },
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        assert ("flashcore attention: torch operators" in done.stdout + done.stderr) == ours
        tokens.append(json.loads(out.read_text()))
    assert len(tokens[0]) == len(prompts())
    assert tokens[0] == tokens[1]
