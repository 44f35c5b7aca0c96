"""Small steps and first tokens by turns: arithmetic, the clock, sessions, the order of samples."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flashcore.bench.serve import turns
from flashcore.bench.serve.clock import DECODE, EXTEND, Clock, Step, Writer, step_figures
from flashcore.bench.serve.deadline import Deadline
from flashcore.bench.serve.engine import EngineOptions
from flashcore.bench.serve.measure import DoesNotFitError
from flashcore.bench.serve.session import Session
from flashcore.bench.serve.spread import median_interval, paired_ratio, quartiles
from flashcore.bench.serve.suite import WorkerError
from flashcore.bench.serve.turns import Plan, format_ratios, run_turns
from flashcore.bench.serve.workloads import parse_workload
from tests.serve_fakes import OPTIONS, AskedWorker, starting
from tests.test_bench_serve import VOCAB, FakeEngine

# Arithmetic


def test_quartiles() -> None:
    assert quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == [2.0, 4.0]
    assert quartiles([1.0]) is None


@pytest.mark.parametrize(
    ("count", "cut"), [(1, 0), (5, 0), (6, 0), (8, 0), (9, 1), (11, 1), (12, 2), (15, 3), (20, 5)]
)
def test_interval_of_the_median_by_order_statistics(count: int, cut: int) -> None:
    values = [float(number) for number in range(count)]
    assert median_interval(values[::-1]) == (cut, count - 1 - cut)


def test_ratio_of_pairs_sheds_what_both_share() -> None:
    drift = [1.0, 1.2, 0.9, 1.5, 1.1, 1.0, 1.3]
    ratio = paired_ratio([0.97 * d for d in drift], drift)
    assert ratio is not None
    assert (ratio["median"], ratio["pairs"]) == (pytest.approx(0.97), 7)
    assert ratio["high"] - ratio["low"] < 1e-9
    assert paired_ratio([], []) is None


def test_deadline() -> None:
    now = [100.0]
    deadline = Deadline(60, clock=lambda: now[0])
    assert deadline.allows(60)
    assert not deadline.allows(61)
    now[0] = 150.0
    assert deadline.within(30) == 10
    assert not deadline.passed
    now[0] = 170.0
    assert deadline.passed
    assert deadline.within(30) == 0
    assert Deadline().within(30) == 30
    assert not Deadline().passed


# The clock


def steps(count: int, gap_ms: float, sequences: int = 4) -> list[Step]:
    return [
        Step(int(n * gap_ms * 1e6), sequences, DECODE, n * 900_000, n * 600_000, n * 50_000)
        for n in range(count)
    ]


def test_a_step_by_the_clock() -> None:
    prefill = Step(-5_000_000, 4, EXTEND, 0, 0, 0)
    figures = step_figures([prefill, *steps(20, 1.5), *steps(3, 9.0, sequences=2)], 4)
    assert figures == {
        "step_ms": pytest.approx(1.5),
        "step_ms_p50": pytest.approx(1.5),
        "host_us": pytest.approx(300),
        "metadata_us": pytest.approx(50),
    }
    assert step_figures(steps(9, 1.5), 4) is None  # two of them settle


def test_a_pause_moves_the_mean_and_not_the_median() -> None:
    taken = steps(20, 1.5)
    late = [replace(step, at=step.at + 20_000_000) for step in taken[10:]]
    figures = step_figures([*taken[:10], *late], 4)
    assert figures is not None
    assert figures["step_ms_p50"] == pytest.approx(1.5)
    assert figures["step_ms"] == pytest.approx(1.5 + 20 / 17)


def test_clock_is_read_while_it_is_written_and_wraps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flashcore.bench.serve import clock as module

    monkeypatch.setattr(module, "_ROWS", 9)
    clock = Clock(tmp_path / "clock")
    assert clock.mark() == 0
    assert clock.since(0) == []
    writer = Writer(tmp_path / "clock")
    for number in range(5):
        writer.host += 10
        writer.step(number, DECODE)
    assert clock.mark() == 5
    assert [(s.sequences, s.host) for s in clock.since(3)] == [(3, 40), (4, 50)]
    for number in range(5, 12):
        writer.step(number, EXTEND)
    assert [step.sequences for step in clock.since(3)] == list(range(4, 12))  # the last eight


# A session


class TimedEngine(FakeEngine):
    """Steps of 2 ms by its clock; a client that does not stream sees a tenth more."""

    def __init__(self, file: Path | None, capacity: int = 10**9) -> None:
        super().__init__(capacity)
        self.clock = None if file is None else Clock(file)
        self._writer = None if file is None else Writer(file)
        self._now = 0
        self.settled = 0

    def settle(self) -> None:
        self.settled += 1

    def seconds(self, prompts: Any, output: int, *, temperature: float = 0.0) -> float:
        self.run(prompts, output, temperature=temperature)
        if self._writer is not None:
            for _ in range(output - 1):
                self._now += 2_000_000
                self._writer.step(len(prompts), DECODE)
                row = (self._writer._count - 1) % ((1 << 14) - 1) + 1
                self._writer._table[row, 0] = self._now
        return 0.0022 * (output - 1) + 0.05


def test_session_times_first_tokens_and_steps(tmp_path: Path) -> None:
    engine = TimedEngine(tmp_path / "clock")
    session = Session(engine, vocab=VOCAB, page=4)
    workload = parse_workload("4x16+8:40")
    first = session.prepare(workload, seed=1)
    assert (first["ttft_ms"], first["ttft_cached_tokens"]) == (pytest.approx(20), 16)
    assert session.first_token()["ttft_ms"] == pytest.approx(20)  # own parts new each time
    session.ready()
    sample = session.decode()
    assert (engine.flushed, engine.settled) == (1, 1)
    assert sample["step_ms"] == pytest.approx(2.0)
    assert sample["step_ms_by_difference"] == pytest.approx(2.2)
    assert sample["steps_seen"] == 39


def test_session_without_a_clock_goes_by_difference() -> None:
    session = Session(TimedEngine(None), vocab=VOCAB, page=4)
    session.prepare(parse_workload("4x16+0:40"), seed=1)
    session.ready()
    assert session.decode()["step_ms"] == pytest.approx(2.2)


def test_session_refuses_what_does_not_fit() -> None:
    session = Session(TimedEngine(None, capacity=10), vocab=VOCAB, page=4)
    with pytest.raises(DoesNotFitError, match="the engine has 10"):
        session.prepare(parse_workload("4x16+8:40"), seed=1)


# Turns

SPEED = {"flashcore": 1.0, "fa3": 2.0, "slow": 4.0}


class Table:
    """Engines of fixed speed; the calls in their order."""

    def __init__(self, dies: tuple[str, str] | None = None) -> None:
        self.calls: list[tuple[str, str]] = []
        self.caches: set[tuple[str, str | None]] = set()
        self._dies = dies

    def __call__(self, options: EngineOptions, command: dict[str, Any]) -> dict[str, Any]:
        backend, do = options.backend, command["do"]
        self.calls.append((backend, do))
        if (backend, do) == self._dies:
            raise WorkerError(f"{backend} ended\nlast words")
        if do == "start":
            self.caches.add((backend, options.triton_cache))
            return {"arguments": {"batches": options.decode_batches, "clock": options.clock}}
        if do == "prepare":
            self.workload = command["workload"]["name"]
            if self.workload.startswith("7x"):
                return {"skipped": "needs room"}
        if do == "ready":
            return {"sample": {}}
        name = "step_ms" if do == "decode" else "ttft_ms"
        return {"sample": {name: SPEED[backend] * (3 if do == "prepare" else 1)}}


def turn(
    texts: list[str], table: Table, *backends: str, **plan: Any
) -> tuple[dict[str, Any], list[int]]:
    kept: list[int] = []
    result = run_turns(
        [parse_workload(text) for text in texts],
        [replace(OPTIONS, backend=backend) for backend in backends],
        Plan(**{"repeats": 4, "starts": 2, **plan}),
        start=starting(table),
        keep=lambda result: kept.append(len(result["rows"])),
    )
    json.dumps(result)
    return result, kept


def test_turns_take_pairs_in_shuffled_order_on_fresh_engines() -> None:
    table = Table()
    result, kept = turn(["4x16+8:40", "5x16+8:1"], table, "flashcore", "fa3", repeats=12)
    samples = [backend for backend, do in table.calls if do == "decode"]
    assert len(samples) == 24
    pairs = [tuple(samples[n : n + 2]) for n in range(0, 24, 2)]
    assert all(set(pair) == {"flashcore", "fa3"} for pair in pairs)
    assert len(set(pairs)) == 2  # nobody is always first
    assert [call for call in table.calls if call[1] == "start"] == [
        ("flashcore", "start"),
        ("fa3", "start"),
    ] * 2
    assert len({cache for _, cache in table.caches}) == len(table.caches) == 2  # one compiles for
    assert None not in {cache for _, cache in table.caches}  # no other
    assert len(result["engines"]) == 4
    assert result["engines"][0]["arguments"] == {"batches": (4, 5), "clock": True}
    assert kept == [2, 4, 4, 4]


@pytest.mark.parametrize(("ranks", "beside"), [((1, 1, 1), True), ((2, 1, 1), False)])
def test_engines_of_several_gpus_start_one_after_the_other(
    ranks: tuple[int, int, int], beside: bool
) -> None:
    begun: list[str] = []

    class Reporting(AskedWorker):
        def begin(self) -> None:
            begun.append(self.backend)

    seen: dict[str, list[str]] = {}

    def answer(options: EngineOptions, command: dict[str, Any]) -> dict[str, Any]:
        if command["do"] == "start":
            seen[options.backend] = list(begun)
        return Table()(options, command)

    run_turns(
        [parse_workload("4x16+8:1")],
        [replace(OPTIONS, backend=backend, ranks=ranks) for backend in ("flashcore", "fa3")],
        Plan(repeats=1, starts=1),
        start=lambda options, log: Reporting(options, log, answer),  # type: ignore[arg-type,return-value]
    )
    assert ("fa3" in seen["flashcore"]) == beside


def test_rows_have_medians_spread_and_first_requests() -> None:
    result, _ = turn(["4x16+8:40", "5x16+8:1"], Table(), "flashcore", "fa3")
    ours, theirs, prefill, _ = result["rows"]
    assert (ours["step_ms"], ours["ttft_ms"], ours["first_request_ttft_ms"]) == (1, 1, 3)
    assert (theirs["step_ms"], theirs["tokens_per_s"]) == (2, 2000)
    assert ours["first_request_ttft_ms_all"] == [3, 3]  # one a start
    assert (len(ours["step_ms_all"]), ours["step_ms_quartiles"]) == (4, [1, 1])
    assert ours["over_fa3"]["step_ms"] == {"median": 0.5, "low": 0.5, "high": 0.5, "pairs": 4}
    assert (prefill["step_ms"], prefill["step_ms_quartiles"]) == (None, None)
    assert set(prefill["over_fa3"]) == {"ttft_ms", "first_request_ttft_ms"}


def test_ratios_are_a_line_each() -> None:
    result, _ = turn(["4x16+8:40"], Table(), "flashcore", "fa3")
    lines = format_ratios(result["rows"]).splitlines()
    assert [line.split()[1] for line in lines[:3]] == [
        "step_ms",
        "ttft_ms",
        "first_request_ttft_ms",
    ]
    assert lines[0].endswith("0.500 (0.500 to 0.500)")


def test_another_kind_of_request_is_the_first_in_another_start() -> None:
    asked: list[str] = []

    class Noting(Table):
        def __call__(self, options: EngineOptions, command: dict[str, Any]) -> dict[str, Any]:
            if command["do"] == "prepare" and options.backend == "fa3":
                asked.append(command["workload"]["name"])
            return super().__call__(options, command)

    turn(["4x16+8:40", "5x16+8:1"], Noting(), "flashcore", "fa3")
    assert asked == ["4x16+8:40", "5x16+8:1", "5x16+8:1", "4x16+8:40"]


def test_who_has_no_room_or_dies_leaves_a_note_and_the_others_run() -> None:
    result, _ = turn(["7x16+8:1", "4x16+8:40"], Table(), "fa3", starts=1)
    assert [row["workload"] for row in result["rows"]] == ["4x16+8:40"]
    assert result["skipped"] == ["fa3 on 7x16+8:1: needs room"]
    table = Table(dies=("slow", "decode"))
    result, _ = turn(["4x16+8:40", "5x16+8:40"], table, "flashcore", "slow", "fa3", starts=1)
    assert result["skipped"] == ["slow: slow ended"]  # one line: logs name paths
    assert len([1 for backend, _ in table.calls if backend == "slow"]) < 12
    done = {(row["workload"], row["backend"]): len(row["step_ms_all"]) for row in result["rows"]}
    # The round in which it died is left out, for the others too.
    assert done["4x16+8:40", "fa3"] == done["4x16+8:40", "flashcore"] == 3
    assert done["5x16+8:40", "fa3"] == 4


def test_a_deadline_leaves_what_there_is() -> None:
    now = [0.0]

    class Slow(Table):
        def __call__(self, options: EngineOptions, command: dict[str, Any]) -> dict[str, Any]:
            now[0] += 10
            return super().__call__(options, command)

    deadline = Deadline(130, clock=lambda: now[0])
    result, _ = turn(["4x16+8:40", "5x16+8:40"], Slow(), "flashcore", "fa3", deadline=deadline)
    assert [row["workload"] for row in result["rows"]] == ["4x16+8:40"] * 2
    assert result["rows"][0]["ttft_ms_all"]
    assert "5x16+8:40: no time left" in result["skipped"]
    assert "start 2 of tiny: no time left" in result["skipped"]
    assert now[0] < 160


def test_long_samples_are_fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(turns.time, "monotonic", lambda: now[0])

    class Slow(Table):
        def __call__(self, options: EngineOptions, command: dict[str, Any]) -> dict[str, Any]:
            now[0] += 20
            return super().__call__(options, command)

    result, _ = turn(["4x16+8:1"], Slow(), "flashcore", "fa3", repeats=20, starts=1)
    assert len(result["rows"][0]["ttft_ms_all"]) == turns.FEWEST
