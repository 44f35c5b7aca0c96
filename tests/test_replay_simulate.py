"""The simulator: small traces with known answers, and every count against a full recount."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashcore.replay.simulate import Engine, EngineSettings
from flashcore.replay.step_log import Step, StepLog
from flashcore.replay.trace import HASH_BLOCK_TOKENS, Request

TWO_SHARING_1024 = [Request(0.0, 1280, 3, (10, 11, 12)), Request(0.0, 1280, 3, (10, 11, 13))]


def simulate(requests: list[Request], **options: float) -> Engine:
    engine = Engine(requests, EngineSettings(**options))  # type: ignore[arg-type]
    engine.run(on_step=Recount())
    return engine


def steps(engine: Engine) -> list[Step]:
    return [engine.log[index] for index in range(len(engine.log))]


class Recount:
    """Counts each step from scratch out of the page ids, and follows what every page holds."""

    def __init__(self) -> None:
        self.holds: dict[int, object] = {}
        self.before: dict[int, object] = {}

    def __call__(self, engine: Engine) -> None:
        page_tokens = engine.settings.page_tokens
        tokens: dict[int, int] = {}
        users: dict[int, int] = {}
        rows = list(engine.batch())
        for row in rows:
            assert len(row.pages) == -(-row.kv_tokens // page_tokens)
            computed_from = (row.kv_tokens - row.q_tokens) // page_tokens
            for place, page in enumerate(row.pages.tolist()):
                contents = page_contents(row.request, place, page_tokens)
                if place >= computed_from:
                    self.holds[page] = contents
                assert self.holds.get(page) == contents, "a page in use holds something else"
                held = min(page_tokens, row.kv_tokens - place * page_tokens)
                tokens[page] = max(tokens.get(page, 0), held)
                users[page] = users.get(page, 0) + 1
        used = {page: self.holds[page] for page in users}
        step = engine.log[-1]
        assert step.batch == len(rows)
        assert step.tokens_per_sequence == sum(row.kv_tokens for row in rows)
        assert step.tokens_once == sum(tokens.values())
        assert step.pages_used == len(users)
        assert step.pages_shared == sum(count > 1 for count in users.values())
        assert step.pages_staged == sum(used[p] != self.before.get(p) for p in used)
        resident = {p for p in used if engine.counts.resident[p]}
        assert resident == {p for p in used if used[p] == self.before.get(p)}
        self.before = used


def page_contents(request: Request, place: int, page_tokens: int) -> object:
    """What a page must hold: the prompt up to its end, or something of this request alone."""
    end = (place + 1) * page_tokens
    if end > request.input_tokens:
        return id(request), place
    return request.hash_ids[: -(-end // HASH_BLOCK_TOKENS)], place


def test_two_requests_share_1024_tokens() -> None:
    engine = simulate(TWO_SHARING_1024, prefill_chunk=4096)
    assert steps(engine) == [
        # time, batch, waiting, prefill, per sequence, once, used, shared, staged
        (0.0, 2, 0, 1536, 2560, 1536, 12, 8, 12),
        (25 + 1536 / 20, 2, 0, 0, 2562, 1538, 14, 8, 2),
        (50 + 1536 / 20, 2, 0, 0, 2564, 1540, 14, 8, 0),
    ]
    assert engine.now_ms == 75 + 1536 / 20
    assert engine.totals.completed == 2
    assert (engine.totals.prompt_tokens, engine.totals.cached_tokens) == (2560, 1024)


def test_prompts_are_computed_in_chunks_in_order() -> None:
    requests = [Request(0.0, 1000, 1, (1, 2)), Request(0.0, 300, 1, (3,))]
    log = steps(simulate(requests, prefill_chunk=400))
    assert [(s.prefill_tokens, s.batch, s.waiting) for s in log] == [
        (400, 1, 1),
        (400, 1, 1),
        (400, 2, 0),  # the last 200 of the first, 200 of the second
        (100, 1, 0),
    ]
    assert [s.tokens_per_sequence for s in log] == [400, 800, 1200, 300]


def test_an_idle_engine_jumps_to_the_next_arrival_and_time_scales() -> None:
    requests = [Request(100.0, 10, 2, (1,)), Request(9000.0, 10, 1, (2,))]
    times = {
        scale: [s.time_ms for s in steps(simulate(requests, time_scale=scale))]
        for scale in (1.0, 0.5, 0.0)
    }
    assert times == {1.0: [100.0, 125.5, 9000.0], 0.5: [50.0, 75.5, 4500.0], 0.0: [0.0, 26.0]}


def test_what_never_fits_is_refused_and_the_rest_runs() -> None:
    # 4 pages of 128: 512 tokens. The last output token's keys are never written.
    fits = Request(0.0, 500, 13, (1,))
    beyond = Request(0.0, 500, 14, (2,))
    engine = simulate([beyond, fits, beyond], cache_pages=4)
    assert (engine.totals.refused, engine.totals.completed) == (2, 1)
    assert len(engine.log) == 13
    assert len(simulate([beyond], cache_pages=4).log) == 0


def test_admission_waits_for_pages_promised_to_running_outputs() -> None:
    # The first takes 4 pages and is promised a fifth; 4 of 8 are free, one too few for both.
    requests = [Request(0.0, 512, 10, (1,)), Request(0.0, 512, 1, (2,))]
    assert [s.batch for s in steps(simulate(requests, cache_pages=8))] == [1] * 10 + [1]
    assert [s.batch for s in steps(simulate(requests, cache_pages=9))] == [2] + [1] * 9


def test_the_batch_is_never_larger_than_allowed() -> None:
    requests = [Request(0.0, 100, 5, (place,)) for place in range(4)]
    assert [s.batch for s in steps(simulate(requests, max_batch=3))] == [3] * 5 + [1] * 5


def test_finished_prompts_stay_cached_until_they_are_evicted() -> None:
    again = [Request(float(t), 1025, 1, (1, 2, 3)) for t in (0, 1000)]
    engine = simulate(again, cache_pages=9)
    assert engine.totals.cached_tokens == 1024
    # The full pages are resident still: the step before, though long ago, used them too.
    assert [s.pages_staged for s in steps(engine)] == [9, 1]
    assert engine.cache.evictions == 0

    other = Request(500.0, 600, 1, (7, 8))  # takes the free page and the four deepest of the prompt
    engine = simulate([again[0], other, again[1]], cache_pages=9)
    assert engine.totals.cached_tokens == 512
    assert engine.cache.evictions == 4 + 4


def test_a_prompt_that_is_cached_whole_computes_one_token() -> None:
    requests = [Request(float(t), 1024, 1, (1, 2)) for t in (0, 1000)]
    engine = simulate(requests)
    assert [s.prefill_tokens for s in steps(engine)] == [1024, 1]
    assert engine.totals.cached_tokens == 1023


def test_a_partial_block_is_shared_up_to_its_last_full_page() -> None:
    requests = [Request(0.0, 700, 2, (1, 2)), Request(0.0, 700, 2, (1, 2))]
    first = steps(simulate(requests, page_tokens=128))[0]
    assert (first.pages_shared, first.tokens_once) == (5, 2 * 700 - 640)
    first = steps(simulate(requests, page_tokens=1024))[0]
    assert (first.pages_shared, first.tokens_once) == (0, 1400)


def test_equal_ids_after_different_prefixes_are_different_pages() -> None:
    requests = [Request(0.0, 1024, 1, (1, 5)), Request(0.0, 1024, 1, (2, 5))]
    assert steps(simulate(requests))[0].pages_shared == 0


def test_an_empty_output_ends_with_the_prompt() -> None:
    assert len(simulate([Request(0.0, 10, 0, (1,))]).log) == 1


@st.composite
def small_traces(draw: st.DrawFn) -> list[Request]:
    """Prefix trees of few blocks, so that most prompts share, and close arrivals."""
    requests = []
    for _ in range(draw(st.integers(1, 10))):
        ids = tuple(draw(st.lists(st.integers(0, 1), min_size=1, max_size=4)))
        last_block = draw(st.sampled_from([1, 100, 256, 300, 512]))
        input_tokens = (len(ids) - 1) * HASH_BLOCK_TOKENS + last_block
        arrival, output = draw(st.integers(0, 300)), draw(st.integers(0, 12))
        requests.append(Request(float(arrival), input_tokens, output, ids))
    return sorted(requests, key=lambda request: request.arrival_ms)


@settings(max_examples=100, deadline=None)
@given(
    small_traces(),
    st.sampled_from([32, 128, 512, 1024]),
    st.integers(500, 6000),
    st.integers(1, 6),
    st.sampled_from([100, 700, 4096]),
)
def test_incremental_counts_equal_a_recount(
    requests: list[Request], page_tokens: int, cache_tokens: int, max_batch: int, chunk: int
) -> None:
    engine = simulate(
        requests,
        page_tokens=page_tokens,
        cache_pages=-(-cache_tokens // page_tokens),
        max_batch=max_batch,
        prefill_chunk=chunk,
    )
    assert engine.totals.completed + engine.totals.refused == len(requests)
    # Everything that was taken has been given back.
    assert not engine.cache.references.any()
    assert not engine.counts.readers.any()
    assert (engine.counts.used, engine.counts.shared, engine.counts.repeated_reads) == (0, 0, 0)
    assert engine.cache.free_pages + engine.cache.evictable_pages == engine.cache.num_pages
    assert all(step.batch <= max_batch for step in steps(engine))
    computed = sum(step.prefill_tokens for step in steps(engine))
    assert computed == engine.totals.prompt_tokens - engine.totals.cached_tokens


@settings(max_examples=100, deadline=None)
@given(
    small_traces(),
    st.sampled_from([32, 128, 1024]),
    st.integers(1500, 6000),
    st.integers(1, 6),
    st.floats(1.0, 400.0),
)
def test_steps_in_one_go_and_runs_in_pieces_are_the_same_steps(
    requests: list[Request], page_tokens: int, cache_tokens: int, max_batch: int, piece_ms: float
) -> None:
    options = EngineSettings(
        page_tokens=page_tokens,
        cache_pages=-(-cache_tokens // page_tokens),
        max_batch=max_batch,
        prefill_chunk=700,
    )
    observed, in_one_go, in_pieces = (Engine(r, options) for r in (requests, requests, []))
    observed.run(on_step=lambda engine: None)
    in_one_go.run()
    end, rest = 0.0, list(requests)
    while rest or not in_pieces.idle:
        end += piece_ms
        while rest and rest[0].arrival_ms < end:
            in_pieces.submit(rest.pop(0))
        in_pieces.run(until_ms=end)
    assert steps(in_one_go) == steps(observed) == steps(in_pieces)
    assert in_one_go.now_ms == observed.now_ms == in_pieces.now_ms
    assert in_one_go.totals == observed.totals == in_pieces.totals
    assert in_one_go.cache.evictions == observed.cache.evictions == in_pieces.cache.evictions


def test_steps_in_one_go_are_logged_one_by_one() -> None:
    requests = [Request(0.0, 100, 100, (1,)), Request(1000.0, 100, 1, (2,))]
    engine = Engine(requests, EngineSettings())
    calls: list[int] = []
    engine.run(on_progress=calls.append)
    assert len(engine.log) == 100
    assert len(calls) < 10
    assert [step.batch for step in steps(engine)].count(2) == 1
    assert [step.tokens_once for step in steps(engine)][:3] == [100, 101, 102]


def test_more_steps_in_one_go_than_are_taken_at_once() -> None:
    requests = [Request(0.0, 1, 5000, (1,))]
    options = EngineSettings(page_tokens=8192, cache_pages=1, block_tokens=8192)
    in_one_go, observed = Engine(requests, options), Engine(requests, options)
    in_one_go.run()
    observed.run(on_step=lambda engine: None)
    assert len(in_one_go.log) == 5000
    assert steps(in_one_go) == steps(observed)


def test_requests_long_done_are_forgotten() -> None:
    options = EngineSettings(step_ms=1.0, prefill_tokens_per_s=1e9)
    requests = [Request(10.0 * place, 5, 3, (place,)) for place in range(10_000)]
    whole, pieces = Engine(requests, options), Engine((), options)
    whole.run()
    for request in requests:
        pieces.submit(request)
        pieces.run(until_ms=request.arrival_ms + 5)
    pieces.run()
    assert len(pieces._requests) < 5000
    assert pieces.done == 10_000
    assert steps(pieces) == steps(whole)


def test_progress_reports_every_request() -> None:
    done: list[int] = []
    Engine(TWO_SHARING_1024, EngineSettings()).run(on_progress=done.append)
    assert done == [0, 0, 2]


def test_a_log_grows_and_is_forgotten() -> None:
    log = StepLog()
    for time in range(100):
        log.append(Step(float(time), *range(8)))
    log.extend(np.array([100.0, 101.0]), (7, np.array([3, 4]), 0, 0, 0, 0, 0, 9))
    assert len(log) == 102
    assert (log[99], log[-1]) == (Step(99.0, *range(8)), Step(101.0, 7, 4, 0, 0, 0, 0, 0, 9))
    assert log.column("time_ms").tolist() == list(range(102))
    assert log.column("waiting").tolist() == [1] * 100 + [3, 4]
    with pytest.raises(IndexError):
        log[102]
    log.clear()
    assert len(log) == 0
    assert log.column("batch").size == 0


def test_csv_has_a_line_for_each_step(tmp_path: Path) -> None:
    path = tmp_path / "steps.csv"
    simulate(TWO_SHARING_1024, prefill_chunk=4096).log.write_csv(path)
    lines = path.read_text().splitlines()
    assert lines[0] == ",".join(Step._fields)
    assert lines[1] == "0.0,2,0,1536,2560,1536,12,8,12"
    assert len(lines) == 4


@pytest.mark.parametrize(
    ("option", "value", "allowed"),
    [
        ("page_tokens", 100, "must divide 512"),
        ("cache_pages", 0, "at least 1"),
        ("cache_pages", 2**28 + 1, "1 to 268435456"),
        ("max_batch", 0, "at least 1"),
        ("prefill_chunk", -1, "at least 1"),
        ("step_ms", 0.0, "above 0"),
        ("prefill_tokens_per_s", float("inf"), "above 0"),
        ("time_scale", float("nan"), "0 or above"),
    ],
)
def test_settings_name_what_is_out_of_range(option: str, value: float, allowed: str) -> None:
    with pytest.raises(ValueError, match=f"{option} is .*{allowed}"):
        EngineSettings(**{option: value})  # type: ignore[arg-type]
