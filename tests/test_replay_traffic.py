"""Copies of a trace: what they keep of it, what is fresh, what a seed decides."""

from __future__ import annotations

import tracemalloc
from collections import Counter
from itertools import islice, pairwise

import numpy as np
import pytest

from flashcore.replay.fleet.traffic import Traffic, TrafficSettings
from flashcore.replay.trace import Request

BLOCK = 512


def conversations(count: int, turns: int) -> list[Request]:
    """All begin with block 0; each conversation then has blocks of its own, and grows."""
    return [
        Request(
            100.0 + 1000.0 * (count * turn + number),
            BLOCK * (2 + turn) + 7,
            5,
            (0, *range(1000 * (number + 1), 1000 * (number + 1) + 2 + turn)),
        )
        for turn in range(turns)
        for number in range(count)
    ]


TRACE = conversations(count=20, turns=3)


def made(requests: list[Request] = TRACE, **options: float) -> list[Request]:
    return list(Traffic(requests, TrafficSettings(**options), BLOCK))  # type: ignore[arg-type]


def test_one_copy_is_the_trace() -> None:
    assert made() == TRACE
    assert made(seed=5) == TRACE


def test_copies_lie_over_each_other_in_order_of_arrival() -> None:
    requests = made(copies=4)
    assert len(requests) == 4 * len(TRACE)
    assert all(a.arrival_ms <= b.arrival_ms for a, b in pairwise(requests))
    end = TRACE[-1].arrival_ms + 1000.0  # after a pause as long as the mean
    assert all(100.0 <= request.arrival_ms < end for request in requests)
    lengths = Counter((r.input_tokens, r.output_tokens) for r in requests)
    once = Counter((r.input_tokens, r.output_tokens) for r in TRACE)
    assert lengths == {length: 4 * count for length, count in once.items()}


def test_copies_have_no_prompt_in_common_and_the_same_within() -> None:
    requests = made(copies=3)
    first_ids = Counter(request.hash_ids[0] for request in requests)
    assert sorted(first_ids.values()) == [len(TRACE)] * 3
    owner = {one: r.hash_ids[0] for r in requests for one in r.hash_ids}
    assert all(owner[one] == r.hash_ids[0] for r in requests for one in r.hash_ids)
    for first in first_ids:
        copy = [r for r in requests if r.hash_ids[0] == first]
        shift = first - TRACE[0].hash_ids[0]
        back = sorted(tuple(one - shift for one in r.hash_ids) for r in copy)
        assert back == sorted(r.hash_ids for r in TRACE)


def test_each_copy_is_shifted_by_one_time_and_wrapped_round() -> None:
    requests = made(copies=2)
    length = TRACE[-1].arrival_ms - TRACE[0].arrival_ms + 1000.0
    (second,) = {r.hash_ids[0] for r in requests} - {0}
    copy = {
        tuple(one - second for one in r.hash_ids): r.arrival_ms
        for r in requests
        if r.hash_ids[0] == second
    }
    shifts = {round((copy[r.hash_ids] - r.arrival_ms) % length, 3) for r in TRACE}
    assert len(shifts) == 1
    assert 0 < shifts.pop() < length
    assert any(copy[r.hash_ids] < r.arrival_ms for r in TRACE)


def test_of_a_fraction_conversations_are_whole_or_missing() -> None:
    requests = made(copies=1.5)
    assert len(requests) == len(Traffic(TRACE, TrafficSettings(copies=1.5), BLOCK))
    kept = Counter(r.hash_ids[1] for r in requests if r.hash_ids[0] != 0)
    assert set(kept.values()) == {3}
    assert 3 <= len(kept) <= 17  # of 20
    assert Counter(r.hash_ids[0] for r in requests)[0] == len(TRACE)
    assert len(made(copies=0.1)) < len(TRACE) / 2


def test_a_conversation_keeps_its_system_prompt() -> None:
    requests = made(copies=3, system_prompts=4, system_tokens=2 * BLOCK, zipf=0.0)
    assert len(requests) == 3 * len(TRACE)
    before = Counter(r.input_tokens + 2 * BLOCK for r in TRACE)
    assert Counter(r.input_tokens for r in requests) == {n: 3 * c for n, c in before.items()}
    prompts = {r.hash_ids[:2] for r in requests}
    assert len(prompts) == 4
    assert len({one for prompt in prompts for one in prompt}) == 8
    by_conversation: dict[int, set[tuple[int, ...]]] = {}
    for request in requests:
        by_conversation.setdefault(request.hash_ids[3], set()).add(request.hash_ids[:2])
    assert len(by_conversation) == 3 * 20
    assert all(len(prompts) == 1 for prompts in by_conversation.values())
    # What follows another prompt is another prefix, also where it is the trace's common block.
    followed = {(r.hash_ids[2], r.hash_ids[0]) for r in requests}
    assert len({block for block, _ in followed}) == len(followed)


def test_system_prompts_are_drawn_by_zipf_s_law() -> None:
    trace = conversations(count=3000, turns=1)
    drawn = Counter(r.hash_ids[0] for r in made(trace, system_prompts=3, system_tokens=BLOCK))
    shares = [drawn[-1 - rank] / 3000 for rank in range(3)]
    assert shares == pytest.approx([6 / 11, 3 / 11, 2 / 11], abs=0.04)
    even = Counter(
        r.hash_ids[0] for r in made(trace, system_prompts=3, system_tokens=BLOCK, zipf=0.0)
    )
    assert [count / 3000 for count in even.values()] == pytest.approx([1 / 3] * 3, abs=0.04)


def test_a_seed_decides_all() -> None:
    options = {"copies": 2.5, "system_prompts": 5}
    assert made(**options, seed=1) == made(**options, seed=1)
    assert made(**options, seed=1) != made(**options, seed=2)


def test_every_pass_is_the_same() -> None:
    traffic = Traffic(TRACE, TrafficSettings(copies=2, system_prompts=2), BLOCK)
    assert list(traffic) == list(traffic)
    assert len(traffic) == len(list(traffic))


def test_requests_are_made_as_they_are_asked_for() -> None:
    traffic = Traffic(TRACE, TrafficSettings(copies=2000, system_prompts=3), BLOCK)
    assert len(traffic) == 2000 * len(TRACE)
    tracemalloc.start()
    assert len(list(islice(traffic, 100))) == 100
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2000 * 3000  # bytes; all requests would be 2000 * 60 * 300


def test_a_trace_of_one_request_and_of_one_moment() -> None:
    one = [Request(5.0, 10, 1, (7,))]
    assert [r.arrival_ms for r in made(one, copies=3)] == [5.0] * 3
    same = [Request(5.0, 10, 1, (7,)), Request(5.0, 10, 1, (8,))]
    assert [r.arrival_ms for r in made(same, copies=2)] == [5.0] * 4
    assert np.ptp([r.hash_ids[0] for r in made(same, copies=2)]) > 0


@pytest.mark.parametrize(
    ("option", "value", "allowed"),
    [
        ("copies", 0.0, "above 0 and at most 10000"),
        ("copies", float("nan"), "above 0 and at most 10000"),
        ("system_prompts", -1, "0 to 1000000"),
        ("system_tokens", 0, "1 to 536870912"),
        ("zipf", float("inf"), "0 or above"),
    ],
)
def test_settings_name_what_is_out_of_range(option: str, value: float, allowed: str) -> None:
    with pytest.raises(ValueError, match=f"{option} is .*{allowed}"):
        TrafficSettings(**{option: value})  # type: ignore[arg-type]


def test_system_prompts_are_whole_blocks() -> None:
    settings = TrafficSettings(system_prompts=1, system_tokens=100)
    with pytest.raises(ValueError, match="system_tokens is 100; it must be a multiple of 512"):
        Traffic(TRACE, settings, BLOCK)
