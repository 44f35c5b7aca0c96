"""The router of a fleet: whom each rule chooses, case by case."""

from __future__ import annotations

from typing import Any

import pytest

from flashcore.replay.fleet.routing import Loads, RoutingSettings, make_router
from flashcore.replay.trace import Request


def prompt(*ids: int, tokens: int | None = None) -> Request:
    return Request(0.0, tokens or 512 * len(ids), 1, ids)


def router(routing: str, cache_tokens: int = 512 * 100, **options: Any) -> Any:
    return make_router(RoutingSettings(routing=routing, **options), 512, cache_tokens)


def test_round_robin_takes_turns_whatever_ends() -> None:
    robin = router("round-robin", engines=3)
    assert [robin.send(prompt(1)) for _ in range(4)] == [0, 1, 2, 0]
    robin.ended(0, 2)
    assert robin.send(prompt(1)) == 1
    assert robin.loads.in_flight == [0, 2, 1]


def test_least_loaded_counts_what_is_in_flight() -> None:
    least = router("least-loaded", engines=3)
    assert [least.send(prompt(1)) for _ in range(6)] == [0, 1, 2, 0, 1, 2]
    least.ended(1, 2)
    assert [least.send(prompt(1)) for _ in range(3)] == [1, 1, 2]  # equals: the next in turn


def test_equals_take_turns_also_where_all_is_idle() -> None:
    least = router("least-loaded", engines=3)
    chosen = []
    for _ in range(5):
        chosen.append(least.send(prompt(1)))
        least.ended(chosen[-1], 1)
    assert chosen == [0, 1, 2, 0, 1]


def test_the_longest_prefix_wins() -> None:
    aware = router("prefix-aware", engines=3)
    assert aware.send(prompt(1, 2)) == 0
    assert aware.send(prompt(5)) == 1
    assert aware.send(prompt(1, 9)) == 0
    aware.ended(0, 2)
    assert aware.send(prompt(5, 6, 7)) == 1
    assert aware.send(prompt(5, 6, 8)) == 1
    assert aware.send(prompt(4)) == 2  # matches nothing; of the idle ones, the next in turn


def test_of_engines_that_match_equally_far_the_least_loaded() -> None:
    aware = router("prefix-aware", engines=3, balance_abs=1)
    assert [aware.send(prompt(1)) for _ in range(4)] == [0, 0, 1, 1]
    # Engines 0 and 1 have two each; the third would be crowded by nothing of its own.
    aware.ended(0, 1)
    assert aware.send(prompt(1)) == 0


def test_a_crowded_engine_draws_no_more() -> None:
    aware = router("prefix-aware", engines=2, balance_abs=2, balance_rel=1.0)
    assert [aware.send(prompt(1, 2)) for _ in range(4)] == [0, 0, 0, 1]
    # Now both have it; the first has two more, which is not more than two.
    assert aware.send(prompt(1, 2)) == 1
    aware.ended(1, 2)
    assert aware.send(prompt(1, 2)) == 1
    # Only the first has this one's beginning and its end, and is not crowded any more.
    aware.ended(0, 2)
    assert aware.send(prompt(3)) == 0


def test_twice_as_many_is_crowded_only_from_there_on() -> None:
    aware = router("prefix-aware", engines=2, balance_abs=0, balance_rel=2.0)
    other = prompt(7)
    assert aware.send(prompt(1)) == 0
    assert aware.send(other) == 1
    assert aware.send(prompt(1)) == 0  # 1 of at most 2
    assert aware.send(prompt(1)) == 0  # 2 of at most 2
    assert aware.send(prompt(1)) == 1  # 3 are more


def test_where_the_longest_match_is_crowded_the_next_longest() -> None:
    aware = router("prefix-aware", engines=3, balance_abs=0, balance_rel=1.0)
    assert aware.send(prompt(1, 2)) == 0
    assert aware.send(prompt(1)) == 1  # the first is crowded
    aware.ended(1, 1)
    assert aware.send(prompt(1, 2, 3)) == 1


def test_blocks_that_are_not_full_match_nothing() -> None:
    aware = router("prefix-aware", engines=2)
    assert aware.send(prompt(1, 2, tokens=700)) == 0
    assert set(aware._holders) == {1}
    assert aware.send(prompt(3, tokens=511)) == 1
    aware.ended(0, 1)
    assert aware.send(prompt(3, tokens=511)) == 0  # by its load
    assert set(aware._holders) == {1}


def test_an_engine_s_oldest_prompts_are_forgotten_from_their_ends() -> None:
    aware = router("prefix-aware", engines=2, cache_tokens=512 * 3)
    assert aware.send(prompt(1, 2)) == 0
    assert aware.send(prompt(8)) == 1
    assert aware.send(prompt(1, 3)) == 0
    assert list(aware._blocks[0]) == [2, 3, 1]
    assert aware.send(prompt(1, 4)) == 0
    assert list(aware._blocks[0]) == [3, 4, 1]
    assert set(aware._holders) == {1, 3, 4, 8}


def test_a_cache_of_less_than_a_block_remembers_one() -> None:
    assert router("prefix-aware", cache_tokens=100).send(prompt(1, 2)) == 0


def test_a_limit_that_all_exceed() -> None:
    loads = Loads(2)
    loads.change(0, 2)
    assert loads.choose(0b01, at_most=1) is None
    assert loads.choose(0b01, at_most=2) == 0
    assert loads.choose(0) is None
    assert loads.least() == 0


@pytest.mark.parametrize(
    ("option", "value", "allowed"),
    [
        ("engines", 0, "1 to 10000"),
        ("engines", 10_001, "1 to 10000"),
        ("routing", "random", "round-robin, least-loaded, prefix-aware"),
        ("balance_abs", -1, "0 or above"),
        ("balance_rel", 0.5, "1 or above"),
        ("balance_rel", float("nan"), "1 or above"),
        ("report_ms", 0.0, "above 0"),
    ],
)
def test_settings_name_what_is_out_of_range(option: str, value: Any, allowed: str) -> None:
    with pytest.raises(ValueError, match=f"{option} is .*{allowed}"):
        RoutingSettings(**{option: value})
