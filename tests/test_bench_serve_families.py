"""Model families and modes of the serving benchmark: prompts, distances, verdicts, many jobs."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import pytest

from flashcore.bench.serve import answers as answers_module
from flashcore.bench.serve import families, modes
from flashcore.bench.serve.answers import distance
from flashcore.bench.serve.deadline import Deadline
from flashcore.bench.serve.engine import Engine, EngineOptions
from flashcore.bench.serve.pool import Job, Places, Survey, read_answers, reason, run_jobs
from flashcore.bench.serve.shapes import SHAPES
from flashcore.bench.serve.suite import WorkerError
from tests.serve_fakes import OPTIONS, AskedWorker, starting

TINY = SHAPES["tiny"]

# Answers


def answer(
    tokens: list[int], output: list[float], prompt: list[float] | None = None
) -> dict[str, Any]:
    told = {"tokens": tokens, "output": output, "prompt": prompt or []}
    return {**told, "cached": 0, "accepted": None, "retractions": 0}


def test_distance_of_prompts_and_of_decoded_tokens() -> None:
    ours = [[answer([1, 2], [-1.0, -2.0], [-3.0, -3.0, -3.0, -3.0])]]
    theirs = [[answer([1, 2], [-1.5, -2.5], [-3.1, -3.1, -3.1, -3.1])]]
    told = distance(ours, theirs)
    assert told["prompt_difference"] == pytest.approx(0.1)
    assert told["decode_difference"] == pytest.approx(0.5)
    assert told["mean_difference"] == told["decode_difference"]  # not hidden by the prompts'
    assert (told["same_tokens"], told["tokens"], told["not_finite"]) == (2, 2, 0)


def test_distance_ends_with_the_first_token_that_differs() -> None:
    ours = [[answer([1, 2, 3], [-1.0, -2.0, -9.0])]]
    theirs = [[answer([1, 7, 4], [-1.0, -2.2, -1.0])]]
    told = distance(ours, theirs)
    assert (told["same_tokens"], told["tokens"]) == (1, 2)
    assert told["mean_difference"] == pytest.approx(0.1)


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
@pytest.mark.parametrize("where", ["output", "prompt"])
def test_what_is_not_finite_is_infinitely_far(bad: float, where: str) -> None:
    ours = [[answer([1], [-1.0], [-1.0])]]
    theirs = [[answer([1], [-1.0], [-1.0])]]
    theirs[0][0][where] = [bad]
    told = distance(ours, theirs)
    assert (told["mean_difference"], told["not_finite"]) == (math.inf, 1)


def test_answers_of_unequal_length_are_infinitely_far() -> None:
    told = distance([[answer([1, 2], [-1.0, -1.0])]], [[answer([1], [-1.0])]])
    assert (told["mean_difference"], told["not_finite"]) == (math.inf, 1)


class Generating(Engine):
    """SGLang's engine with made-up answers in its form."""

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def flush(self) -> None:
        self.asked.append("flush")

    def generate(self, **options: Any) -> list[dict[str, Any]]:
        self.asked.append(options)
        meta = {
            "output_token_logprobs": [(-1.0, 4, None), (-2.0, 5, None)],
            "input_token_logprobs": [(None, 1, None), (-0.5, 2, None)],
            "cached_tokens": 3,
            "finish_reason": {"type": "length"},
        }
        return [{"output_ids": [4, 5], "meta_info": meta} for _ in options["input_ids"]]


def test_an_engine_is_asked_for_what_is_compared() -> None:
    engine = Generating()
    rounds = [
        {"prompts": [[1, 2]], "output": 2, "flush": True, "prompt": True},
        {"prompts": [[1, 2], [3]], "output": 2, "options": {"return_hidden_states": True}},
    ]
    found = answers_module.ask(engine, rounds)["rounds"]
    asked = engine.asked
    assert asked[0] == "flush"
    assert [options["logprob_start_len"] for options in asked[1:]] == [0, -1]
    assert asked[2]["return_hidden_states"] is True
    assert asked[1]["sampling_params"]["max_new_tokens"] == 2
    first = {"tokens": [4, 5], "output": [-1.0, -2.0], "cached": 3}
    first |= {"accepted": None, "retractions": 0, "ended": "length"}
    assert found[0] == [{**first, "prompt": [-0.5]}]
    assert found[1] == [{**first, "prompt": []}] * 2


# Many jobs


def jobs(*names: str, **options: Any) -> list[Job]:
    return [Job(name, replace(OPTIONS, **options), {"do": "answers"}) for name in names]


def run_all(
    some: list[Job], places: Places, folder: Path, answer: Callable[..., Any], **how: Any
) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    run_jobs(
        some,
        places,
        lambda job, told: found.__setitem__(job.name, told),
        log_dir=folder,
        start=starting(answer),
        **{"deadline": Deadline(), **how},
    )
    return found


def test_so_many_engines_at_a_time_on_each_gpu(tmp_path: Path) -> None:
    lock = threading.Lock()
    running: dict[int, int] = {}
    most: dict[int, int] = {}

    def answer(options: EngineOptions, command: dict[str, Any]) -> dict[str, Any]:
        if command["do"] == "start":
            return {}
        gpu = options.base_gpu
        with lock:
            running[gpu] = running.get(gpu, 0) + 1
            most[gpu] = max(most.get(gpu, 0), running[gpu])
        time.sleep(0.05)
        with lock:
            running[gpu] -= 1
        return {"rounds": []}

    found = run_all(jobs(*"abcdefghijkl"), Places(gpus=2, jobs=3, first=1), tmp_path, answer)
    assert len(found) == 12
    assert most == {1: 3, 2: 3}
    assert found["a"]["start_s"] == 2.0


def test_an_engine_of_two_gpus_begins_at_the_first(tmp_path: Path) -> None:
    seen: list[int] = []

    def answer(options: EngineOptions, command: dict[str, Any]) -> dict[str, Any]:
        seen.append(options.base_gpu)
        return {}

    run_all(jobs("a", "b", "c", ranks=(2, 1, 1)), Places(2, 2), tmp_path, answer)
    assert set(seen) == {0}


def test_one_that_fails_says_why_and_the_others_run(tmp_path: Path) -> None:
    (tmp_path / "bad.log").write_text("Traceback\nValueError: head_dim 7\nkilled\n")

    def answer(options: EngineOptions, command: dict[str, Any]) -> dict[str, Any]:
        if options.backend == "bad":
            raise WorkerError("the engine ended\nits last lines")
        if options.backend == "worse":
            raise KeyError("logprobs")
        return {}

    some = [Job(n, replace(OPTIONS, backend=n), {"do": "answers"}) for n in ("bad", "worse", "ok")]
    found = run_all(some, Places(), tmp_path, answer)
    assert found["bad"] == {"error": "ValueError: head_dim 7"}
    assert found["worse"] == {"error": "KeyError: 'logprobs'"}
    assert "error" not in found["ok"]


@pytest.mark.parametrize(
    ("log", "told"),
    [
        ("x\nNotServed: flashcore does not serve MLA: use fa3\nRuntimeError: a\n", "use fa3"),
        ("x\nRuntimeError: a\nValueError: b\nkilled", "ValueError: b"),
        (
            "(Core) KeyError: 'op'\nRuntimeError: it failed. See root cause above. {}\n",
            "KeyError: 'op'",
        ),
        ("nothing to see", "it ended"),
    ],
)
def test_the_reason_is_one_line(log: str, told: str) -> None:
    found = reason(log, "it ended\nmore")
    assert found.endswith(told)
    assert "\n" not in found


def test_what_no_time_is_left_for_is_not_started(tmp_path: Path) -> None:
    now = [0.0]

    def answer(options: EngineOptions, command: dict[str, Any]) -> dict[str, Any]:
        now[0] += 30.0
        return {}

    deadline = Deadline(120, clock=lambda: now[0])
    found = run_all(jobs(*"abcd"), Places(jobs=1), tmp_path, answer, deadline=deadline)
    late = [name for name, told in found.items() if told.get("error") == "no time left"]
    assert late == ["c", "d"]


def test_an_end_from_outside_ends_the_engines(tmp_path: Path) -> None:
    released, begun = threading.Event(), threading.Event()

    class Endless(AskedWorker):
        def ask(self, command: dict[str, Any], timeout: float) -> dict[str, Any]:
            if self.backend == "quick":
                begun.wait(10)
                return {}
            begun.set()
            released.wait(10)
            raise WorkerError("killed")

        def stop(self, patience: float = 90.0) -> None:
            released.set()

    def done(job: Job, told: dict[str, Any]) -> None:
        if job.name == "quick":
            raise SystemExit(143)

    names = ("quick", "slow", "late")
    some = [Job(n, replace(OPTIONS, backend=n), {"do": "answers"}) for n in names]
    started: list[str] = []

    def start(options: EngineOptions, log: IO[bytes]) -> Any:
        started.append(options.backend)
        return Endless(options, log, lambda options, command: {})

    began = time.monotonic()
    with pytest.raises(SystemExit):
        run_jobs(some, Places(jobs=2), done, deadline=Deadline(), log_dir=tmp_path, start=start)
    assert time.monotonic() - began < 5
    assert released.is_set()


# Families


def write_families(folder: Path, **contexts: int) -> Path:
    for name, context in contexts.items():
        (folder / name).mkdir(parents=True)
        config = {**TINY.config(), "model_type": "other", "max_position_embeddings": context}
        (folder / name / "config.json").write_text(json.dumps(config))
    return folder


def test_families_are_found_and_chosen(tmp_path: Path) -> None:
    folder = write_families(tmp_path, zebra=4096, llama=4096, lfm2=4096)
    assert [one.name for one in families.find_families(folder)] == ["llama", "lfm2", "zebra"]
    assert [one.name for one in families.find_families(folder, ["zebra"])] == ["zebra"]
    with pytest.raises(ValueError, match="--only gpt: not one of lfm2, llama, zebra"):
        families.find_families(folder, ["gpt"])
    with pytest.raises(ValueError, match=r"no NAME/config\.json"):
        families.find_families(tmp_path / "llama")


def test_prompts_share_and_do_not_and_reach_beyond_windows() -> None:
    prompts = families.family_prompts(32000, 8190)
    assert len(prompts) == families.BATCH
    assert prompts == families.family_prompts(32000, 8190)
    lengths = [len(prompt) for prompt in prompts]
    assert max(lengths) + families.OUTPUT > 4096 + 64
    assert min(lengths) == 1
    assert len({tuple(prompt[:1024]) for prompt in prompts[:5]}) == 1
    assert prompts[7] == prompts[8] == prompts[9]
    assert len({tuple(prompt) for prompt in prompts}) == families.BATCH - 2
    short = families.family_prompts(32000, 2046)
    assert max(map(len, short)) + families.OUTPUT <= 2046
    assert sum(map(len, prompts)) + families.BATCH * families.OUTPUT < families.POOL


def test_the_engine_of_a_family_is_small(tmp_path: Path) -> None:
    (one,) = families.find_families(write_families(tmp_path, **{"qwen3-next": 32768}))
    options = families.family_options(OPTIONS, one, "fa3")
    assert (options.shape.context, options.decode_batches) == (families.CONTEXT, (16,))
    assert (options.score_deviation, options.max_total_tokens) == (1.0, families.POOL)
    assert dict(options.extra)["mamba_ssm_dtype"] == "float32"
    assert options.page_size == OPTIONS.page_size


NOISE = {"fa3": 0.0, "triton": 0.01, "flashcore": 0.02}


def family_answer(
    noise: dict[str, float], fails: tuple[str, ...] = ()
) -> Callable[[EngineOptions, dict[str, Any]], dict[str, Any]]:
    def told(options: EngineOptions, command: dict[str, Any]) -> dict[str, Any]:
        if options.backend in fails:
            raise WorkerError(f"{options.backend} ended")
        if command["do"] == "start":
            return {}
        shift = noise[options.backend]
        return {
            "rounds": [
                [answer([5] * one["output"], [-1.0 - shift] * one["output"], [-2.0])]
                for one in command["rounds"]
            ]
        }

    return told


def run_some(
    folder: Path, told: Callable[..., Any], backends: str = "flashcore,fa3,triton", **how: Any
) -> dict[str, Any]:
    logs = folder / "logs"
    logs.mkdir(exist_ok=True)
    models = folder / "models"
    if not models.exists():
        write_families(models, llama=4096)
    result = families.run_families(
        families.find_families(models),
        OPTIONS,
        backends.split(","),
        "0.5.16",
        Survey(Places(jobs=2), Deadline(), logs, start=starting(told), **how),
    )
    json.dumps(result)
    return result


def test_rows_of_a_family(tmp_path: Path) -> None:
    kept: list[int] = []
    result = run_some(
        tmp_path, family_answer(NOISE), keep=lambda result: kept.append(len(result["rows"]))
    )
    ours, triton = result["rows"]
    assert {"family", "sglang", "backend", "peer", "same_tokens", "tokens"} <= set(ours)
    assert (ours["family"], ours["backend"], ours["peer"]) == ("llama", "flashcore", "fa3")
    assert ours["mean_difference"] == pytest.approx(0.02)
    assert (ours["same_tokens"], ours["tokens"]) == (72, 72)
    assert (ours["passed"], ours["start_s"], triton["passed"]) == (True, 2.0, None)
    assert ours["peers_difference"] == pytest.approx(0.01)
    assert result["passed"]
    assert len(kept) == 3
    assert "passed" in families.format_families(result)


@pytest.mark.parametrize(
    ("ours", "triton", "passed"),
    [(0.031, 0.01, False), (0.05, 0.06, True), (0.07, 0.06, False), (math.nan, 0.01, False)],
)
def test_verdict_by_what_the_peers_show(
    tmp_path: Path, ours: float, triton: float, passed: bool
) -> None:
    noise = {"fa3": 0.0, "triton": triton, "flashcore": ours}
    result = run_some(tmp_path, family_answer(noise))
    assert result["passed"] is passed
    assert result["rows"][0]["passed"] is passed


def test_peers_that_do_not_run_are_reported_as_such(tmp_path: Path) -> None:
    result = run_some(tmp_path, family_answer(NOISE, fails=("fa3",)))
    ours, fa3, triton = result["rows"]
    assert (fa3["backend"], fa3["error"], fa3["passed"]) == ("fa3", "fa3 ended", None)
    assert (ours["peer"], ours["passed"]) == ("triton", True)
    assert triton["peer"] == "flashcore" or triton["peer"] is None
    assert "did not run: fa3 ended" in families.format_families(result)


def test_ours_that_does_not_run_or_runs_alone_does_not_pass(tmp_path: Path) -> None:
    result = run_some(tmp_path, family_answer(NOISE, fails=("flashcore",)))
    row = next(row for row in result["rows"] if row["backend"] == "flashcore")
    assert (row["passed"], row["error"], row["mean_difference"]) == (
        False,
        "flashcore ended",
        None,
    )
    alone = run_some(tmp_path, family_answer(NOISE, fails=("fa3", "triton")))
    row = next(row for row in alone["rows"] if row["backend"] == "flashcore")
    assert (row["peer"], row["passed"], row["tokens"]) == (None, False, 72)
    families.format_families(alone)


def test_answers_of_an_earlier_run_are_not_asked_again(tmp_path: Path) -> None:
    run_some(tmp_path, family_answer(NOISE, fails=("triton",)))
    known = read_answers(tmp_path / "logs")
    assert set(known) == {"llama.flashcore", "llama.fa3"}
    asked: list[str] = []

    def told(options: EngineOptions, command: dict[str, Any]) -> dict[str, Any]:
        asked.append(options.backend)
        return family_answer(NOISE)(options, command)

    result = run_some(tmp_path, told, answers=known)
    assert set(asked) == {"triton"}
    assert result["passed"]
    assert len(result["rows"]) == 2


# Modes


def test_modes_are_chosen_by_name_and_gpus() -> None:
    assert "tp2" not in modes.find_modes(None, 1)
    assert {"tp2", "pp2", "dp-attention"} <= set(modes.find_modes(None, 2))
    assert list(modes.find_modes(["plain"], 1)) == ["plain"]
    with pytest.raises(ValueError, match="--only tp2: it needs 2 GPUs, --gpus is 1"):
        modes.find_modes(["tp2"], 1)
    with pytest.raises(ValueError, match="--only fast: not one of plain"):
        modes.find_modes(["fast"], 1)


@pytest.mark.parametrize("name", modes.MODES)
def test_a_mode_fits_its_pool_and_asks_every_document_again(name: str) -> None:
    mode = modes.MODES[name]
    rounds = modes.mode_rounds(1000, mode)
    longest = max(len(prompt) + one["output"] for one in rounds for prompt in one["prompts"])
    assert mode.pool > longest  # one alone must fit, or it would never run
    whole = max(sum(len(p) + one["output"] for p in one["prompts"]) for one in rounds)
    if mode.growing:
        prompts = max(sum(map(len, one["prompts"])) for one in rounds)
        assert prompts < mode.pool < whole  # all begin, not all can end
    else:
        assert len(rounds) == modes.DOCUMENTS * modes.ROUNDS
        first = [one["prompts"][0][: modes.DOCUMENT] for one in rounds]
        assert first[: modes.DOCUMENTS] * modes.ROUNDS == first
    assert mode.pool % mode.page_size == 0
    options = modes.mode_options(OPTIONS, mode, "fa3")
    assert options.gpus in (1, 2)
    assert (options.draft is not None) is mode.draft
    assert set(mode.arguments) <= set(dict(options.extra))
    beside = modes.mode_options(OPTIONS, mode, "fa3", 1)
    assert (dict(options.extra).get("port") != dict(beside.extra).get("port")) is mode.dp_attention


def run_modes(folder: Path, told: Callable[..., Any], *names: str) -> dict[str, Any]:
    return modes.run_modes(
        modes.find_modes(names, 1),
        OPTIONS,
        ["flashcore", "fa3"],
        "0.5.16",
        Survey(Places(jobs=2), Deadline(), folder, start=starting(told)),
    )


@pytest.mark.parametrize(
    ("fails", "passed"), [(("flashcore", "fa3"), None), (("flashcore",), False)]
)
def test_a_mode_that_nobody_runs_says_nothing(
    tmp_path: Path, fails: tuple[str, ...], passed: bool | None
) -> None:
    def told(options: EngineOptions, command: dict[str, Any]) -> dict[str, Any]:
        mixed = dict(options.extra).get("enable_mixed_chunk")
        return family_answer(NOISE, fails if mixed else ())(options, command)

    result = run_modes(tmp_path, told, "plain", "mixed")
    rows = {(row["mode"], row["backend"]): row for row in result["rows"]}
    assert rows["mixed", "flashcore"]["passed"] is passed
    assert result["passed"] is (passed is None)


def test_rows_of_modes(tmp_path: Path) -> None:
    def told(options: EngineOptions, command: dict[str, Any]) -> dict[str, Any]:
        mixed = dict(options.extra).get("enable_mixed_chunk")
        if mixed and options.backend == "fa3":
            raise WorkerError("fa3 ended")
        return family_answer({"fa3": 0.0, "flashcore": 0.05 if mixed else 0.01})(options, command)

    result = run_modes(tmp_path, told, "plain", "mixed", "retract")
    rows = {(row["mode"], row["backend"]): row for row in result["rows"]}
    assert set(rows) == {
        ("plain", "flashcore"),
        ("retract", "flashcore"),
        ("mixed", "flashcore"),
        ("mixed", "fa3"),
    }
    assert rows["retract", "flashcore"]["peer"] == "fa3"
    assert rows["mixed", "flashcore"]["peer"] == "fa3, plain"
    assert [rows[m, "flashcore"]["passed"] for m in ("plain", "retract", "mixed")] == [
        True,
        True,
        False,
    ]
    assert rows["mixed", "fa3"]["error"] == "fa3 ended"
    assert not result["passed"]
    assert "FAILED" in modes.format_modes(result)
