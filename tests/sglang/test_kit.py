"""SGLang's own attention test kit, as far as it runs without a GPU."""

from __future__ import annotations

import importlib.util
import unittest
from pathlib import Path
from types import ModuleType

import pytest
import torch
from sglang.test.kits.attention_unittest.attention_methods import gdn_attention

from flashcore.contract.counts import Stat
from flashcore.integrations.sglang.register import NAME, register

register()


def load() -> ModuleType:
    path = Path(__file__).parents[2] / "tests/gpu/sglang_kit.py"
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


@pytest.mark.parametrize("page_tokens", [1, 16])
def test_metadata_behind_the_hybrid_wrapper(
    page_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kit's gated delta networks as far as a CPU goes: pools, both backends, metadata."""
    monkeypatch.setattr(gdn_attention, "_populate_gdn_prefix_state", lambda _: None)
    cases = [c for c in gdn_attention.make_gdn_cases(NAME) if c.page_size == page_tokens]
    assert cases
    for case in cases:
        fixture = gdn_attention.build_gdn_attention_fixture(
            unittest.TestCase(), case, dtype=torch.float32, device="cpu"
        )
        fixture.backend.init_forward_metadata(fixture.forward_batch)
        backend = fixture.backend.full_attn_backend
        assert backend.full.planner.stats()[Stat.TOKENS_PER_SEQUENCE] == sum(case.seq_lens)
