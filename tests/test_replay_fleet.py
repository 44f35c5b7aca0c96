"""Fleets: one engine is today's replay, cases counted by hand, processes that change nothing."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashcore.replay.fleet.cost import CostModel
from flashcore.replay.fleet.engines import Ended, LocalEngines, Sent, SpreadEngines
from flashcore.replay.fleet.report import engine_figures, fleet_figures
from flashcore.replay.fleet.routing import ROUTINGS, RoutingSettings
from flashcore.replay.fleet.run import run_fleet
from flashcore.replay.fleet.tally import Tally
from flashcore.replay.simulate import Engine, EngineSettings
from flashcore.replay.step_log import Step, StepLog
from flashcore.replay.trace import Request

A, B, C = (1, 2), (11, 12), (21, 22)
# 1024 tokens of prompt each. The first one runs to the end of all; of the others, each is done
# before the next but one arrives.
FIVE = [
    Request(0.0, 1024, 200, A),
    Request(10.0, 1024, 1, B),
    Request(1000.0, 1024, 1, A),
    Request(1010.0, 1024, 1, C),
    Request(2000.0, 1024, 1, B),
]
LONG = 200 * (1024 + 1223) // 2  # tokens of the first request over its 200 steps


def fleet(
    requests: list[Request], routing: RoutingSettings, options: EngineSettings | None = None
) -> list[Tally]:
    options = options or EngineSettings()
    return run_fleet(requests, LocalEngines(range(routing.engines), options), options, routing)


@pytest.mark.parametrize(
    ("routing", "engines"),
    [
        # A, A again (found) and B, which the other engine has; B and C.
        (
            "round-robin",
            [(3, 200, LONG + 2048, LONG + 1024, 1023), (2, 2, 2048, 2048, 0)],
        ),
        # A and C, for which both have one in flight and it is the first one's turn; B, A, which
        # the busy one has, and B again.
        (
            "least-loaded",
            [(2, 200, LONG + 1024, LONG + 1024, 0), (3, 3, 3072, 3072, 1023)],
        ),
        # Both A, though busy; B, C and B again.
        (
            "prefix-aware",
            [(2, 200, LONG + 1024, LONG, 1023), (3, 3, 3072, 3072, 1023)],
        ),
    ],
)
def test_five_requests_over_two_engines(routing: str, engines: list[tuple[int, ...]]) -> None:
    tallies = fleet(FIVE, RoutingSettings(engines=2, routing=routing))
    cost = CostModel(weight_gb=2.0, bandwidth_tb_s=1.0, token_bytes=1000, prefill_tokens_per_s=1e4)
    row = fleet_figures(tallies, RoutingSettings(engines=2, routing=routing), cost, per_engine=True)
    counted = [
        (e["requests"], e["steps"], e["tokens_per_sequence"], e["tokens_once"], e["cached_tokens"])
        for e in row["per_engine"]
    ]
    assert counted == engines
    busy = []
    for engine, (requests, steps, per_sequence, once, cached) in zip(
        row["per_engine"], engines, strict=True
    ):
        prefill_s = (1024 * requests - cached) / 1e4
        assert engine["reuse"] == per_sequence / once
        assert engine["cache_hit_rate"] == cached / (1024 * requests)
        assert engine["batch_max"] == 1 + (steps == 200)
        busy.append(steps * 2e9 / 1e12 + once * 1000 / 1e12 + prefill_s)
        assert engine["busy_s"] == pytest.approx(busy[-1])
        per_sequence_s = steps * 2e9 / 1e12 + per_sequence * 1000 / 1e12 + prefill_s
        assert engine["step_per_sequence_ms"] == pytest.approx(1000 * per_sequence_s / steps)
    assert row["requests"] == row["completed"] == 5
    assert row["output_tokens"] == 204
    assert row["tokens_once"] == sum(e[3] for e in engines)
    assert row["cache_hit_rate"] == sum(e[4] for e in engines) / 5120
    assert row["fleet_tokens_per_s"] == pytest.approx(2 * 204 / sum(busy))
    assert row["balance"] == pytest.approx(sum(busy) / 2 / max(busy))
    assert row["over_engines"]["requests"]["max"] == 3


@st.composite
def traces(draw: st.DrawFn) -> list[Request]:
    requests = []
    for _ in range(draw(st.integers(1, 12))):
        ids = tuple(draw(st.lists(st.integers(0, 1), min_size=1, max_size=4)))
        tokens = (len(ids) - 1) * 512 + draw(st.sampled_from([1, 256, 300, 512]))
        arrival, output = draw(st.integers(0, 600)), draw(st.integers(0, 40))
        requests.append(Request(float(arrival), tokens, output, ids))
    return sorted(requests, key=lambda request: request.arrival_ms)


@settings(max_examples=60, deadline=None)
@given(
    traces(),
    st.sampled_from(ROUTINGS),
    st.sampled_from([1.0, 90.0, 1e6]),
    st.sampled_from([0.0, 0.3, 2.0]),
    st.integers(1500, 6000),
)
def test_one_engine_is_todays_replay(
    requests: list[Request], routing: str, report_ms: float, time_scale: float, cache_tokens: int
) -> None:
    options = EngineSettings(
        cache_pages=-(-cache_tokens // 128), max_batch=3, prefill_chunk=700, time_scale=time_scale
    )
    engine = Engine(requests, options)
    engine.run(on_step=lambda engine: None)
    expected = Tally()
    expected.add_steps(engine.log)
    expected.close(engine)
    (tally,) = fleet(requests, RoutingSettings(routing=routing, report_ms=report_ms), options)
    assert engine_figures(tally, CostModel()) == engine_figures(expected, CostModel())
    assert tally.steps_by_batch.tolist() == expected.steps_by_batch.tolist()
    assert tally.end_ms == engine.now_ms


class Eager(LocalEngines):
    """All engines run in every window."""

    def run(self, sent: Sent, until_ms: float) -> Ended:
        self._at_work = dict.fromkeys(self._at_work, 0.0)
        for number, _ in sent:
            self._engines[number].nothing_ends_before = lambda: 0.0  # type: ignore[method-assign]
        return super().run(sent, until_ms)


def kept(run: Callable[[Sent, float], Ended], to: list[Ended]) -> Callable[[Sent, float], Ended]:
    """`run`, what it returns being put into a list as well."""

    def keeping(sent: Sent, until_ms: float) -> Ended:
        to.append(run(sent, until_ms))
        return to[-1]

    return keeping


@settings(max_examples=100, deadline=None)
@given(
    traces(),
    st.sampled_from(ROUTINGS),
    st.sampled_from([20.0, 100.0]),
    st.integers(1, 3),
    st.integers(1000, 3000),
)
def test_engines_that_wait_until_something_can_end_change_nothing(
    requests: list[Request], routing: str, report_ms: float, max_batch: int, cache_tokens: int
) -> None:
    options = EngineSettings(
        cache_pages=cache_tokens // 128, max_batch=max_batch, prefill_chunk=700
    )
    how = RoutingSettings(engines=2, routing=routing, report_ms=report_ms)
    results, heard = [], []
    for kind in (Eager, LocalEngines):
        engines = kind(range(2), options)
        endings: list[Ended] = []
        engines.run = kept(engines.run, endings)  # type: ignore[method-assign]
        results.append(
            [engine_figures(t, CostModel()) for t in run_fleet(requests, engines, options, how)]
        )
        heard.append([sorted(one) for one in endings])
    assert results[0] == results[1]
    assert heard[0] == heard[1]


@pytest.mark.parametrize("routing", ROUTINGS)
def test_processes_change_nothing(routing: str) -> None:
    requests = [
        Request(37.0 * place, 700 + 300 * (place % 3), 30, (place % 4, place % 4 + 10, 99))
        for place in range(40)
    ]
    options, how = EngineSettings(cache_pages=40), RoutingSettings(engines=3, routing=routing)
    here = fleet(requests, how, options)
    done: list[int] = []
    with SpreadEngines(3, options, processes=2) as engines:
        spread = run_fleet(requests, engines, options, how, done.append)
    assert done == sorted(done)
    assert done[-1] == 40
    cost = CostModel()
    assert [engine_figures(t, cost) for t in spread] == [engine_figures(t, cost) for t in here]
    assert sum(t.totals.completed for t in spread) == 40


def test_a_process_that_ends_is_told() -> None:
    with SpreadEngines(2, EngineSettings(), processes=2) as engines:
        engines._processes[1].kill()
        engines._processes[1].join()
        with pytest.raises(MemoryError, match=r"a process of engines has ended \(SIGKILL\)"):
            engines.run([], 1.0)


def test_what_goes_wrong_in_a_process_is_raised_here() -> None:
    with (
        SpreadEngines(1, EngineSettings(), processes=1) as engines,
        pytest.raises(IndexError),
    ):
        engines.run([(0, Request(0.0, 1024, 1, ()))], 100.0)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=30))
def test_quantiles_of_the_batch_are_numpys(batches: list[int]) -> None:
    tally = Tally()
    for part in (batches[::2], batches[1::2]):
        log = StepLog()
        for batch in part:
            log.append(Step(0.0, batch, 0, 0, 0, 0, 0, 0, 0))
        tally.add_steps(log)
    shares = [0.1, 0.5, 0.9, 0.99, 1.0]
    expected = np.percentile(batches, [100 * share for share in shares])
    assert [tally.batch_quantile(share) for share in shares] == pytest.approx(expected.tolist())
    assert tally.sums["batch"] == sum(batches)


def test_a_fleet_that_refuses_all_has_figures() -> None:
    how, options = RoutingSettings(engines=2), EngineSettings(cache_pages=1)
    row = fleet_figures(fleet(FIVE, how, options), how, CostModel(), per_engine=False)
    assert (row["refused"], row["steps"], row["reuse"], row["tokens_per_s"]) == (5, 0, 1.0, 0.0)
    assert (row["balance"], row["batch_p50"], row["cache_hit_rate"]) == (1.0, 0.0, 0.0)
