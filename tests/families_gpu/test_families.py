"""Model families in SGLang on Hopper GPUs: log-probabilities beside those of fa3 and triton.

`make test-families-gpu`; minutes, so `make test` and `make test-gpu` leave it out.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from flashcore.cli.main import main
from flashcore.sm90.available import available

pytestmark = [
    pytest.mark.skipif(not available("cuda")[0], reason=f"no Hopper GPU: {available('cuda')[1]}"),
    pytest.mark.skipif(importlib.util.find_spec("sglang") is None, reason="SGLang is missing"),
]
MODELS = Path(__file__).parents[1] / "data" / "models"


def test_every_family_is_as_near_to_fa3_as_triton_is(tmp_path: Path) -> None:
    """Prompts that share and that do not, from an empty cache and from a full one, in graphs."""
    result = tmp_path / "models.json"
    words = ["--families", str(MODELS), "--gpus", str(torch.cuda.device_count())]
    status = main(
        ["bench", "serve", *words, "--log-dir", str(tmp_path / "logs"), "--json", str(result)]
    )
    rows = [r for r in json.loads(result.read_text())["rows"] if r["backend"] == "flashcore"]
    assert {row["family"] for row in rows} == {path.name for path in MODELS.iterdir()}
    assert {row["family"]: row.get("error") for row in rows if not row["passed"]} == {}
    assert status == 0
