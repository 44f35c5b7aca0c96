"""vLLM's batch specifications on the torch path, with small heads (the real ones: tests/gpu)."""

from __future__ import annotations

import pytest

from tests.compare import assert_close
from tests.vllm import specifications
from tests.vllm.batches import Setup, attend, expected, make_engine, make_forward


@pytest.mark.parametrize("window", [None, specifications.WINDOW])
@pytest.mark.parametrize("name", specifications.SPECIFICATIONS)
def test_matches_the_reference_and_shares(name: str, window: int | None) -> None:
    engine = make_engine(specifications.server(Setup(16, heads=(2, 1), windows=(window,))))
    forward = make_forward(engine, specifications.requests(name))
    for actual, exact in zip(attend(engine, forward), expected(engine, forward), strict=True):
        assert_close(actual, exact, engine.setup.dtype)
    held = [block for row in forward.blocks[0] for block in set(row)]
    assert len(set(held)) < len(held)
    if all(r.new == 1 for r in forward.requests):
        stats = engine.groups[0].builder.group.view.plan.stats()
        assert stats.tokens_once < stats.tokens_per_sequence
