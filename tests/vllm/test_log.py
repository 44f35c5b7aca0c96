"""What the log says while vLLM serves: what was shared, at its interval, and faults at once."""

from __future__ import annotations

from typing import Any

import pytest

from flashcore.contract.counts import Fault, Seen
from flashcore.integrations.vllm import versions
from tests import serving_cases as cases
from tests.vllm.batches import Engine, Setup, attend, make_engine, make_forward
from tests.vllm.conftest import Log


def serving(**options: Any) -> Engine:
    engine = make_engine(Setup(16, layers=1, **options))
    attend(engine, make_forward(engine, cases.decode()))
    return engine


def lines(log: Log) -> list[str]:
    return [text for text in log.messages if text.startswith("flashcore ")]


def test_the_interval_is_vllm_s(monkeypatch: pytest.MonkeyPatch) -> None:
    assert versions.log_interval() == 10.0
    monkeypatch.setenv("VLLM_LOG_STATS_INTERVAL", "2.5")
    assert versions.log_interval() == 2.5


def test_counters_are_told_once_in_an_interval_and_one_late(
    log: Log,
) -> None:
    engine = serving(windows=(None, 40))
    log.messages.clear()
    held = engine.groups[0].builder.group.memory
    stats = engine.groups[0].builder.group.view.plan.stats()
    for _ in range(3):
        attend(engine, make_forward(engine, cases.decode()))
    assert lines(log) == []
    held._due = 0.0
    attend(engine, make_forward(engine, cases.extend()))
    assert lines(log) == []  # copied
    held._due = 0.0
    attend(engine, make_forward(engine, cases.decode()))
    attend(engine, make_forward(engine, cases.decode()))
    held._due = 0.0
    attend(engine, make_forward(engine, cases.decode()))
    (line,) = lines(log)
    assert line.startswith(
        f"flashcore decode: KV tokens read: {stats.tokens_once}, "
        f"per sequence: {stats.tokens_per_sequence}, "
    )


def test_captures_and_ranks_beyond_the_first_tell_nothing(log: Log) -> None:
    engine = serving()
    group, forward = engine.groups[0].builder.group, make_forward(engine, cases.decode())
    log.messages.clear()
    for _ in range(3):
        group.memory._due = 0.0
        engine.groups[0].builder.build_for_cudagraph_capture(forward.common[0])
    assert lines(log) == []
    config = engine.config
    config.compilation_config.static_forward_context.clear()
    engine.config.cache_config = type(config.cache_config)(block_size=16)
    config.parallel_config.rank = 1
    log.messages.clear()
    second = make_engine(engine.setup, config=config)
    for _ in range(3):
        attend(second, make_forward(second, cases.decode()))
        second.groups[0].builder.group.memory._due = 0.0
    assert lines(log) == []


def test_faults_are_told_before_the_next_forward(log: Log) -> None:
    engine = serving(windows=(None, 40))
    view = engine.groups[1].builder.group.view
    seen = [0] * Seen.SIZE
    seen[Seen.FAULTS], seen[Seen.UPDATES], seen[Seen.SEQUENCE] = Fault.PAGE.value, 2, 3
    view.seen = [("decode", seen)]
    log.messages.clear()
    forward = make_forward(engine, cases.decode())
    engine.groups[0].builder.build(0, forward.common[0])
    (line,) = [text for text in log.messages if "could not be planned" in text]
    assert line.startswith("flashcore decode, window 39: sequences that could not be planned")
    assert "page; in 2 forwards, last sequence 3 of its batch; see docs/vllm.md" in line
    engine.groups[0].builder.build(0, forward.common[0])
    assert len([text for text in log.messages if "could not be planned" in text]) == 1
