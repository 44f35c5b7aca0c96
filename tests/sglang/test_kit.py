"""SGLang's own attention test kit, as far as it runs without a GPU."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

from flashcore.sglang.register import NAME, register

register()


def load() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "sglang_kit.py"
    spec = importlib.util.spec_from_file_location("sglang_kit", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


KIT = load()
CASES = [*KIT.eager_cases(NAME), *KIT.verify_cases(NAME, graphs=False)]
BASE = {"head_dim": 16, "hidden_size": 64, "dtype": torch.float32, "device": "cpu"}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))
def test_case(case: KIT.Case) -> None:
    assert KIT.outcome_of(case, BASE)[0] == "pass"


def test_a_case_that_cannot_run_fails() -> None:
    """Where the kit would skip it: a backend that fails to start must not look like a pass."""
    mode = CASES[0].case.forward_mode
    spoilt = KIT.case_of("none", "n", mode, (4, 4), 1, prefix_lens=(1,), extend_lens=(1,))
    case = CASES[0]._replace(case=spoilt)
    assert KIT.outcome_of(case, BASE)[0].startswith("FAIL")
