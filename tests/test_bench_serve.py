"""The serving benchmark without a GPU and without SGLang: workloads, arithmetic, conversation."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

import pytest

from flashcore.bench.serve import engine as engine_module
from flashcore.bench.serve import worker as worker_module
from flashcore.bench.serve.engine import (
    EngineOptions,
    random_tensors,
    server_arguments,
    write_model,
)
from flashcore.bench.serve.measure import DoesNotFitError, measure
from flashcore.bench.serve.report import summarise
from flashcore.bench.serve.shapes import SHAPES, model_shape
from flashcore.bench.serve.suite import (
    Turns,
    Worker,
    WorkerError,
    counters_since,
    make_row,
    run_serve,
)
from flashcore.bench.serve.timeline import NotTogetherError, Timeline, step_seconds
from flashcore.bench.serve.workloads import parse_workload
from tests.serve_fakes import OPTIONS, FakeWorker, fake_run

VOCAB = 1000
TINY = SHAPES["tiny"]


# Model shapes


def test_llama_8b_is_as_large_as_it_is() -> None:
    shape = model_shape("llama-3.1-8b")
    embedding = 2 * shape.hidden * shape.vocab
    assert (shape.weight_bytes_per_step + embedding) / 2 == pytest.approx(8.03e9, rel=1e-3)
    assert shape.kv_bytes_per_token() == shape.kv_bytes_per_token("bfloat16") == 131072
    assert shape.kv_bytes_per_token("fp8_e4m3") == shape.kv_bytes_per_token("fp8_e5m2") == 65536
    half = model_shape("llama-3.1-8b", layers=16)
    assert (half.layers, half.kv_bytes_per_token()) == (16, 65536)


def test_llama_70b_is_as_large_as_it_is() -> None:
    shape = model_shape("llama-3.1-70b")
    embedding = 2 * shape.hidden * shape.vocab
    assert (shape.weight_bytes_per_step + embedding) / 2 == pytest.approx(70.55e9, rel=1e-3)
    assert shape.kv_bytes_per_token() == 327680


def test_a_shape_from_its_config_file(tmp_path: Path) -> None:
    for name in ("llama-3.2-1b", "qwen2.5-1.5b"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(SHAPES[name].config()))
        assert model_shape(str(folder / "config.json")) == SHAPES[name]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"model_type": "mamba"}', "it has no num_attention_heads"),
        ('{"model_type": "llama"}', "it has no num_attention_heads"),
        ("[1]", "list indices"),
        ("{", "Expecting"),
    ],
)
def test_a_config_that_does_not_serve_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as raised:
        model_shape(str(path))
    assert str(path) in str(raised.value)


def test_layers_out_of_range() -> None:
    with pytest.raises(ValueError, match=r"--layers must be 1 to 2 for tiny, got 3"):
        model_shape("tiny", layers=3)


# From arrivals to figures


def decode(first: list[float], step: float, tokens: int, begin: float) -> list[Timeline]:
    """Requests with those first tokens; from `begin` on, one token a step, told every eighth."""
    counts = [*range(9, tokens, 8), tokens]
    return [
        Timeline(((at, 1), *((begin + (n - 1) * step, n) for n in counts)), cached_tokens=5)
        for at in first
    ]


def test_a_step_is_exact_though_requests_waited_for_each_others_prefill() -> None:
    timelines = decode([0.1, 0.5, 0.9, 1.0], step=0.02, tokens=96, begin=1.0)
    assert step_seconds(timelines) == pytest.approx(0.02)


def test_a_chunk_read_late_does_not_move_the_step() -> None:
    timelines = decode([0.1, 0.2, 0.3], step=0.01, tokens=64, begin=0.3)
    late = timelines[1].chunks
    timelines[1] = Timeline((*late[:-1], (late[-1][0] + 5.0, late[-1][1])))
    assert step_seconds(timelines) == pytest.approx(0.01)


def test_tokens_before_the_last_request_joined_do_not_count() -> None:
    slow = tuple((0.1 * n, n) for n in range(1, 10))  # alone, at another speed
    timelines = [
        Timeline((*slow, *((1.0 + 0.5 * n, 9 + n) for n in range(1, 20)))),
        Timeline(tuple((1.0 + 0.5 * n, n + 1) for n in range(20))),
    ]
    assert step_seconds(timelines) == pytest.approx(0.5)


def test_requests_that_were_never_together_are_an_error() -> None:
    timelines = [
        Timeline(((0.1, 1), (0.2, 9), (0.3, 17))),
        Timeline(((0.4, 1), (0.5, 9), (0.6, 17))),
    ]
    with pytest.raises(NotTogetherError, match=r"all 2 sequences were decoding for 0\.000 s only"):
        step_seconds(timelines)


class FakeEngine:
    """Takes `prefill` seconds a token that is not cached, and `step` seconds a token put out."""

    def __init__(self, capacity: int = 10**9, page: int = 4) -> None:
        self.capacity, self.page = capacity, page
        self.prefill, self.step = 1e-3, 0.02
        self.pages: set[tuple[int, ...]] = set()
        self.flushed = 0
        self.temperatures: list[float] = []

    def flush(self) -> None:
        self.pages.clear()
        self.flushed += 1

    def run(self, prompts: Any, output: int, *, temperature: float = 0.0) -> list[Timeline]:
        self.temperatures.append(temperature)
        clock, first, cached = 0.0, [], []
        for prompt in prompts:
            hit = 0
            while hit + self.page < len(prompt) and tuple(prompt[: hit + self.page]) in self.pages:
                hit += self.page
            clock += self.prefill * (len(prompt) - hit)
            first.append(clock)
            cached.append(hit)
            for end in range(self.page, len(prompt) + 1, self.page):
                self.pages.add(tuple(prompt[:end]))
        if output == 1:
            return [Timeline(((at, 1),), hit) for at, hit in zip(first, cached, strict=True)]
        return [
            replace(timeline, cached_tokens=hit)
            for timeline, hit in zip(decode(first, self.step, output, clock), cached, strict=True)
        ]


def test_decode_is_timed_without_prefill() -> None:
    engine = FakeEngine()
    samples = measure(engine, parse_workload("4x16+8:40"), vocab=VOCAB, page=4, repeats=2, seed=0)
    assert engine.flushed == 1
    assert [sample["step_ms"] for sample in samples] == pytest.approx([20, 20])
    assert [sample["step_ms_by_difference"] for sample in samples] == pytest.approx([20, 20])
    assert samples[0]["cached_tokens"] == 20  # all but the last page
    assert samples[0]["ttft_cached_tokens"] == 16  # the prefix, its unique part being new
    assert samples[0]["ttft_ms"] == pytest.approx(8 * (1 + 2 + 3 + 4) / 4)
    assert samples[0]["ttft_max_ms"] == pytest.approx(32)
    assert samples[0]["first_request_ttft_ms"] == samples[0]["ttft_ms"]
    assert "ttft_ms" not in samples[1]
    assert set(engine.temperatures) == {0.0}


def test_the_first_batch_of_a_kind_is_timed_apart() -> None:
    class Compiling(FakeEngine):
        def run(self, prompts: Any, output: int, *, temperature: float = 0.0) -> list[Timeline]:
            first_batch = len(self.temperatures) == 1  # after the prefix
            self.prefill = 0.1 if first_batch else 1e-3
            return super().run(prompts, output, temperature=temperature)

    samples = measure(Compiling(), parse_workload("4x16+8:40"), vocab=VOCAB, page=4, repeats=1)
    assert samples[0]["ttft_ms"] == pytest.approx(8 * (1 + 2 + 3 + 4) / 4)
    assert samples[0]["first_request_ttft_ms"] == pytest.approx(100 * samples[0]["ttft_ms"])


def test_samples_of_a_prompt_are_drawn_at_random() -> None:
    engine = FakeEngine()
    measure(engine, parse_workload("4x16+0:40"), vocab=VOCAB, page=4, repeats=1)
    assert engine.temperatures == [0.0, 0.0, 0.0, 1.0, 1.0, 1.0]


def test_time_to_first_token_is_measured_on_new_text_each_time() -> None:
    engine = FakeEngine()
    samples = measure(engine, parse_workload("3x16+8:1"), vocab=VOCAB, page=4, repeats=2)
    assert [sample["ttft_ms"] for sample in samples] == pytest.approx([16, 16])
    assert [sample["ttft_cached_tokens"] for sample in samples] == [16, 16]
    assert samples[0]["first_request_ttft_ms"] == pytest.approx(16)
    assert "first_request_ttft_ms" not in samples[1]


def test_a_workload_that_does_not_fit_is_refused() -> None:
    workload = parse_workload("4x16+8:40")
    engine = FakeEngine(capacity=workload.capacity(4) - 1)
    with pytest.raises(DoesNotFitError, match="needs room for 208 KV tokens, the engine has 207"):
        measure(engine, workload, vocab=VOCAB, page=4, repeats=1)
    measure(FakeEngine(capacity=208), workload, vocab=VOCAB, page=4, repeats=1)


def test_row_is_the_median_and_keeps_its_samples() -> None:
    workload = parse_workload("4x16+8:40")
    samples = [{"step_ms": 20.0, "ttft_ms": 7.0}, {"step_ms": 10.0}, {"step_ms": 90.0}]
    row = make_row(workload, TINY, replace(OPTIONS, backend="fa3"), samples)
    assert row["engine"] == "sglang"
    assert {"workload", "backend", "tokens_per_s", "step_ms", "ttft_ms"} <= set(row)
    assert (row["step_ms"], row["ttft_ms"], row["step_ms_all"]) == (20.0, 7.0, [20.0, 10.0, 90.0])
    assert row["tokens_per_s"] == pytest.approx(4 / 0.020)
    assert row["reuse"] == pytest.approx((4 * 44) / (16 + 4 * 28))
    traffic = TINY.weight_bytes_per_step + (16 + 4 * 28) * TINY.kv_bytes_per_token()
    assert row["gb_per_step"] == pytest.approx(traffic / 1e9)
    assert row["kv_cache_dtype"] == "auto"
    of_fp8 = replace(OPTIONS, kv_cache_dtype="fp8_e4m3")
    row = make_row(workload, TINY, replace(of_fp8, backend="fa3"), samples)
    assert row["kv_cache_dtype"] == "fp8_e4m3"
    traffic -= (16 + 4 * 28) * TINY.kv_bytes_per_token() // 2
    assert row["gb_per_step"] == pytest.approx(traffic / 1e9)
    only_prefill = make_row(
        parse_workload("4x16+8:1"), TINY, replace(OPTIONS, backend="fa3"), [{"ttft_ms": 5.0}]
    )
    assert (only_prefill["tokens_per_s"], only_prefill["ttft_ms"]) == (None, 5.0)


# The suite


def test_one_engine_start_serves_all_workloads_of_a_model() -> None:
    texts = ["4x16+8:40", "8x16+8:40", "llama-3.2-1b/4x16+8:40", "4x16+8:1"]
    result, calls = fake_run(texts, ["flashcore", "fa3"])
    assert calls == [
        "load flashcore",
        "load fa3",  # beside the engine before it
        "start tiny flashcore (4, 8)",
        *(f"flashcore {text}" for text in (texts[0], texts[1], texts[3])),
        "stop flashcore",
        "start tiny fa3 (4, 8)",
        *(f"fa3 {text}" for text in (texts[0], texts[1], texts[3])),
        "stop fa3",
        "load flashcore",
        "load fa3",
        "start llama-3.2-1b flashcore (4,)",
        f"flashcore {texts[2]}",
        "stop flashcore",
        "start llama-3.2-1b fa3 (4,)",
        f"fa3 {texts[2]}",
        "stop fa3",
    ]
    assert len(result["rows"]) == 8
    told = {row["backend"]: row["counters"] for row in result["rows"]}
    assert told == {"flashcore": "reuse: 2.00", "fa3": None}
    assert {row["model"] for row in result["rows"]} == {"tiny", "llama-3.2-1b"}
    assert summarise(result["rows"])[0]["speed_over_fa3"] == {"flashcore": 2.5, "fa3": 1.0}
    assert summarise(result["rows"])[3]["flashcore_over"] == {"fa3": 2.5}
    json.dumps(result)


def test_rounds_go_round_all_backends() -> None:
    result, calls = fake_run(["4x16+8:40"], ["flashcore", "fa3"], rounds=2)
    assert [call for call in calls if call.startswith("start")] == [
        "start tiny flashcore (4,)",
        "start tiny fa3 (4,)",
    ] * 2
    assert len(result["rows"][0]["step_ms_all"]) == 4


def test_together_takes_turns_and_nobody_is_always_first() -> None:
    _, calls = fake_run(["4x16+8:40", "5x16+8:40"], ["flashcore", "fa3"], together=True)
    assert calls[:4] == ["load flashcore", "load fa3"] + [
        f"start tiny {backend} (4, 5)" for backend in ("flashcore", "fa3")
    ]
    assert calls[4:8] == [
        "flashcore 4x16+8:40",
        "fa3 4x16+8:40",
        "fa3 5x16+8:40",
        "flashcore 5x16+8:40",
    ]


@pytest.mark.parametrize(("ranks", "beside"), [((1, 1, 1), True), ((2, 1, 1), False)])
def test_engines_of_several_gpus_start_one_after_the_other(
    ranks: tuple[int, int, int], beside: bool
) -> None:
    calls: list[str] = []

    class Reporting(FakeWorker):
        def ready(self) -> dict[str, Any]:
            told = super().ready()
            calls.append(f"ready {self.backend}")
            return told

    options = [replace(OPTIONS, backend=backend, ranks=ranks) for backend in ("flashcore", "fa3")]
    run_serve(
        [parse_workload("4x16+8:40")],
        options,
        Turns(2, together=True),
        start=lambda options, log: Reporting(options, calls),  # type: ignore[arg-type,return-value]
    )
    begun = calls.index("start tiny fa3 (4,)")
    assert (begun < calls.index("ready flashcore")) == beside


@pytest.mark.parametrize("together", [False, True])
def test_no_engine_finds_triton_kernels_that_another_compiled(together: bool) -> None:
    caches = []

    def start(options: EngineOptions, log: IO[bytes]) -> Any:
        caches.append(options.triton_cache)
        return FakeWorker(options, [])

    options = [replace(OPTIONS, backend=backend) for backend in ("flashcore", "fa3")]
    run_serve([parse_workload("4x16+8:40")], options, Turns(2, together=together), start=start)
    assert len(set(caches)) == 2
    assert None not in caches


def test_a_backend_that_dies_leaves_a_note_and_the_others_run() -> None:
    result, calls = fake_run(["4x16+8:40", "7x16+8:40"], ["broken", "fa3"])
    assert [row["backend"] for row in result["rows"]] == ["fa3"]
    assert result["skipped"] == [
        "broken on tiny: the engine with backend broken ended",
        "fa3 on 7x16+8:40: needs room",
    ]
    assert calls.count("stop broken") == 1


def test_a_backend_that_dies_loses_its_turns() -> None:
    result, calls = fake_run(["4x16+8:40", "5x16+8:40"], ["broken", "fa3"], together=True)
    assert [(row["backend"], row["workload"]) for row in result["rows"]] == [
        ("fa3", "4x16+8:40"),
        ("fa3", "5x16+8:40"),
    ]
    assert result["skipped"] == ["broken on tiny: the engine with backend broken ended"]
    assert "broken 5x16+8:40" not in calls


def test_the_result_is_kept_after_each_workload() -> None:
    kept: list[dict[str, Any]] = []
    result, _ = fake_run(["4x16+8:40", "5x16+8:40"], ["flashcore", "fa3"], keep=kept.append)
    assert [len(one["rows"]) for one in kept] == [1, 2, 3, 4]
    assert kept[-1] == result


def test_counters_are_read_from_the_log_once(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("[date] flashcore decode: reuse: 1.00\nother\n")
    told, length = counters_since(log, 0)
    assert (told, length) == ("reuse: 1.00", log.stat().st_size)
    assert counters_since(log, length) == (None, length)
    with log.open("a") as file:
        file.write("flashcore decode: reuse: 2.00\nflashcore decode: reuse: 3.00\nflashcore pre")
    assert counters_since(log, length)[0] == "reuse: 3.00"


@pytest.mark.skipif(find_spec("sglang") is not None, reason="SGLang would start")
def test_a_worker_that_ends_says_why(tmp_path: Path) -> None:
    with (
        (tmp_path / "log").open("wb") as log,
        Worker(OPTIONS, log) as worker,
        pytest.raises(WorkerError) as raised,
    ):
        worker.ready()
    assert "the engine with backend fa3 ended with status 1; its last lines" in str(raised.value)
    assert "No module named 'sglang'" in str(raised.value)


def test_the_workers_conversation(monkeypatch: pytest.MonkeyPatch) -> None:
    class Fake(FakeEngine):
        def __init__(self, options: EngineOptions, folder: Path) -> None:
            super().__init__(capacity=300)
            self.options, self.arguments, self.start_seconds = options, {"page_size": 4}, 1.5
            assert folder.is_dir()

        def about(self) -> dict[str, Any]:
            return {**self.arguments, "model_path": self.options.shape.name}

        def stop(self) -> None:
            stopped.append(self.options)

    stopped: list[EngineOptions] = []
    monkeypatch.setattr(worker_module, "Engine", Fake)
    monkeypatch.setattr(worker_module, "load", lambda: None)
    from dataclasses import asdict

    asked = replace(OPTIONS, decode_batches=(4,), extra=(("a", 1),))
    commands = [asdict(asked)] + [
        {"do": "measure", "workload": asdict(parse_workload(text)), "repeats": 1}
        for text in ("4x16+8:40", "400x16+8:40")
    ]
    answers = io.StringIO()
    worker_module.serve(io.StringIO("".join(json.dumps(c) + "\n" for c in commands)), answers)
    ready, measured, refused = map(json.loads, answers.getvalue().splitlines())
    assert stopped == [asked]
    assert ready == {
        "start_s": 1.5,
        "capacity": 300,
        "arguments": {"page_size": 4, "model_path": "tiny"},
    }
    assert measured["samples"][0]["step_ms"] == pytest.approx(20)
    assert "needs room" in refused["skipped"]


# Arguments of the engine


FIELDS_0516 = {"cuda_graph_bs_decode", "cuda_graph_max_bs_decode", "disable_decode_cuda_graph"}


@pytest.mark.parametrize("old", [False, True])
def test_engine_arguments_by_the_names_of_the_version(
    monkeypatch: pytest.MonkeyPatch, old: bool
) -> None:
    names = {"cuda_graph_bs", "cuda_graph_max_bs", "disable_cuda_graph"} if old else FIELDS_0516
    known = names | {"disable_prefill_cuda_graph", "tp_size"}
    monkeypatch.setattr(engine_module, "_server_fields", lambda: known)
    options = replace(OPTIONS, decode_batches=(8, 4), extra=(("tp_size", 2),))
    arguments = server_arguments(options, "/m")
    assert arguments["cuda_graph_bs" if old else "cuda_graph_bs_decode"] == [1, 4, 8]
    assert arguments["max_running_requests"] == 8
    assert (arguments["tp_size"], arguments["load_format"]) == (2, "dummy")
    assert arguments["disable_prefill_cuda_graph"] is True
    with pytest.raises(ValueError, match="SGLang has no argument 'nonsense'"):
        server_arguments(replace(OPTIONS, extra=(("nonsense", 1),)), "/m")


def test_the_model_written_is_its_shape(tmp_path: Path) -> None:
    write_model(TINY, tmp_path, checkpoint=False, device="cpu")
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    assert json.loads((tmp_path / "config.json").read_text()) == TINY.config()


@pytest.mark.parametrize("qwen", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_random_weights_are_as_many_as_the_shape_says(tied: bool, qwen: bool) -> None:
    shape = replace(TINY, tied=tied, qwen=qwen)
    tensors = random_tensors(shape, "cpu")
    matrices = sum(tensor.numel() for tensor in tensors.values() if tensor.ndim == 2)
    embedding = 0 if tied else 2 * shape.hidden * shape.vocab
    assert 2 * matrices == shape.weight_bytes_per_step + embedding
    assert all(bool(tensor.isfinite().all()) for tensor in tensors.values())
    again = random_tensors(shape, "cpu")
    assert all(bool((tensor == again[name]).all()) for name, tensor in tensors.items())
