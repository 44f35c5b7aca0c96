"""`flashcore replay`: exit status, what goes to which stream, JSON keys, plot, sampled timings."""

from __future__ import annotations

import argparse
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flashcore.cli import replay
from flashcore.cli.progress import ProgressBar

SAMPLE = Path(__file__).parent / "data" / "sample_trace.jsonl"
BAILIAN = Path(__file__).parent / "data" / "sample_trace_16.jsonl"  # made up, in that form
FAST = ("--sample-every", "0")


def run(*options: str | Path) -> int:
    parser = argparse.ArgumentParser(prog="flashcore replay")
    replay.add_arguments(parser)
    return replay.run(parser.parse_args([str(option) for option in options]))


def run_json(capsys: pytest.CaptureFixture[str], *options: str | Path) -> dict[str, Any]:
    assert run(SAMPLE, "--json", *options) == 0
    out, err = capsys.readouterr()
    assert err == ""
    report = json.loads(out)  # one object and nothing else
    assert isinstance(report, dict)
    return report


def one_error_line(capsys: pytest.CaptureFixture[str]) -> str:
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    return err


def test_json_figures_of_the_sample(capsys: pytest.CaptureFixture[str]) -> None:
    report = run_json(capsys, "--requests", "2", "--prefill-chunk", "4096", *FAST)
    assert (report["requests"], report["completed"], report["refused"]) == (2, 2, 0)
    assert report["steps"] == 3
    assert report["tokens_per_sequence"] == 2560 + 2562 + 2564
    assert report["tokens_once"] == 1536 + 1538 + 1540
    assert report["reuse"] == pytest.approx(7686 / 4614)
    assert report["bytes_once"] == 4614 * 32 * 8 * 128 * 2 * 2
    assert report["share_of_pages_shared"] == pytest.approx(24 / 40)
    assert report["pages_staged"] == 14
    assert report["cache_hit_rate"] == pytest.approx(1024 / 2560)
    assert report["per_step"]["batch"]["mean"] == 2
    staged = report["per_step"]["pages_staged"]  # 12, 2 and 0
    assert [staged[name] for name in ("p10", "p50", "p90", "max")] == pytest.approx(
        [0.4, 2, 10, 12]
    )
    assert report["per_step"]["reuse"]["max"] == pytest.approx(2560 / 1536)
    assert report["samples"]["count"] == 0
    assert report["samples"]["layout_ms"] is None


@pytest.mark.parametrize(
    # Of the third request's 160 tokens, the first's 128 are cached, the second's 64 of the first's.
    ("page_tokens", "cached"),
    [("16", 64 + 128), ("8", 64 + 128), ("64", 64 + 128), ("128", 128)],
)
def test_a_trace_of_blocks_of_16(
    capsys: pytest.CaptureFixture[str], page_tokens: str, cached: int
) -> None:
    options = ("--block-tokens", "16", "--time-unit", "s", "--page-tokens", page_tokens)
    assert run(BAILIAN, "--json", *options, *FAST) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["completed"], report["out_of_order"]) == (4, 1)
    assert (report["prompt_tokens"], report["cached_tokens"]) == (430, cached)
    assert 1.5 < report["simulated_s"] < 3
    assert report["settings"]["block_tokens"] == 16


def test_blocks_are_512_unless_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(BAILIAN, "--block-tokens", "16", "--page-tokens", "24", *FAST) == 2
    assert "page_tokens is 24; it must divide 16 or be a mult" in one_error_line(capsys)
    assert run(SAMPLE, "--block-tokens", "16", *FAST) == 2
    assert "line 1: hash_ids has 3 ids for input_length 1280" in one_error_line(capsys)


FLEET = ("--processes", "1")


def test_one_engine_of_a_fleet_is_todays_replay(capsys: pytest.CaptureFixture[str]) -> None:
    routings = ("--routing", "round-robin,least-loaded,prefix-aware")
    for options in ((), ("--prefill-chunk", "600", "--cache-pages", "17", "--time-scale", "0.4")):
        today = run_json(capsys, *options, *FAST)
        rows = run_json(capsys, "--engines", "1", *routings, *options, *FLEET)["rows"]
        assert [row["routing"] for row in rows] == routings[1].split(",")
        for row in rows:
            common = {name for name in today if name in row} - {"wall_s"}
            assert len(common) == 16
            assert {name: today[name] for name in common} == {name: row[name] for name in common}
            batch = today["per_step"]["batch"]
            assert {name: row[f"batch_{name}"] for name in batch if name != "min"} == pytest.approx(
                {name: batch[name] for name in batch if name != "min"}
            )
            assert row["waiting_mean"] == pytest.approx(today["per_step"]["waiting"]["mean"])


def test_a_fleet_reads_blocks_of_16_and_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    form = ("--block-tokens", "16", "--time-unit", "s", "--page-tokens", "16", "--json")
    assert run(BAILIAN, *form, *FAST) == 0
    today = json.loads(capsys.readouterr().out)
    routings = ("--routing", "round-robin,prefix-aware", "--report-ms", "1000")
    assert run(BAILIAN, *form, "--engines", "1,2", *routings, "--per-engine", *FLEET) == 0
    report = json.loads(capsys.readouterr().out)
    one, same, turns, prefixes = report["rows"]
    assert (report["out_of_order"], report["settings"]["block_tokens"]) == (1, 16)
    for row in (one, same):
        assert all(today[name] == row[name] for name in today if name in row and name != "wall_s")
    # Arrivals are 130, 100, 40 and 160 tokens. In turn, the last has 64 in common with the second;
    # by prefixes, the first two meet (64 found) and the last finds 128 of the first.
    found = [[e["cached_tokens"] for e in row["per_engine"]] for row in (turns, prefixes)]
    assert found == [[0, 64], [64 + 128, 0]]
    asked = [[e["prompt_tokens"] for e in row["per_engine"]] for row in (turns, prefixes)]
    assert asked == [[130 + 40, 100 + 160], [130 + 100 + 160, 40]]
    assert all(1.5 < row["simulated_s"] < 3 for row in report["rows"])


def test_a_fleet_s_report(capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--engines", "1,3", "--copies-per-engine", "2", "--system-prompts", "2")
    report = run_json(capsys, *options, "--per-engine", "--commit", "abc", *FLEET)
    assert (report["commit"], report["trace_requests"]) == ("abc", 6)
    assert {"python", "numpy"} == set(report["versions"])
    assert report["cpu"].endswith(" cores")
    assert [(row["engines"], row["requests"]) for row in report["rows"]] == [(1, 12), (3, 36)]
    assert [len(row["per_engine"]) for row in report["rows"]] == [1, 3]
    assert sum(engine["requests"] for engine in report["rows"][1]["per_engine"]) == 36
    assert report["traffic"]["copies_per_engine"] == 2
    assert report["cost_model"]["token_bytes"] == 32 * 8 * 128 * 2 * 2
    assert run_json(capsys, *options, "--seed", "1", *FLEET)["rows"] != report["rows"]


def test_a_fleet_s_table(capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--engines", "2", "--routing", "prefix-aware", "--copies", "1.5", "--per-engine")
    assert run(SAMPLE, *options, *FLEET) == 0
    out, err = capsys.readouterr()
    assert err == ""
    for text in ("1.5 copies", "prefix-aware", "no. 1", "tokens/s", "16.06 GB of weights"):
        assert text in out


def test_a_fleet_s_plot(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot = tmp_path / "fleet.png"
    run_json(capsys, "--engines", "2,1", "--routing", "prefix-aware", "--plot", plot, *FLEET)
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (("--routing", "least-loaded"), "--routing needs --engines"),
        (("--copies", "2"), "--copies needs --engines"),
        (("--per-engine",), "--per-engine needs --engines"),
        (("--engines", "0"), "engines is 0; it must be 1 to 10000"),
        (("--engines", "2,x"), "--engines: 'x' is no integer"),
        (("--engines", "2", "--routing", "best"), "routing is 'best'; it must be round-robin, l"),
        (("--engines", "2", "--routing", ","), "--routing is empty"),
        (("--engines", "2", "--balance-abs", "-1"), "balance_abs is -1; it must be 0 or above"),
        (("--engines", "2", "--copies", "0"), "copies is 0.0; it must be above 0"),
        (("--engines", "2", "--copies-per-engine", "nan"), "copies is nan; it must be above 0"),
        (("--engines", "2", "--weight-gb", "-1"), "weight_gb is -1.0; it must be 0 or above"),
        (("--engines", "2", "--bandwidth-tb-s", "0"), "bandwidth_tb_s is 0.0; it must be above 0"),
        (("--engines", "2", "--processes", "0"), "--processes is 0; it must be 1 to 1024"),
        (
            ("--engines", "2", "--system-prompts", "1", "--system-tokens", "9"),
            "system_tokens is 9; it must be a multiple of 512",
        ),
        (("--engines", "2", "--attention"), "--attention is of one engine's replay"),
        (("--engines", "2", "--device", "cuda"), "--device cuda is of one engine's replay"),
        (("--engines", "2", "--sample-every", "0"), "--sample-every is of one engine's replay"),
        (("--engines", "2", "--heads", "4x1x64"), "--heads is of one engine's replay"),
        (("--engines", "2", "--steps-csv", "a.csv"), "--steps-csv is of one engine's replay"),
    ],
)
def test_options_of_a_fleet_that_cannot_be_carried_out(
    capsys: pytest.CaptureFixture[str], options: tuple[str, ...], problem: str
) -> None:
    assert run(SAMPLE, *options) == 2
    assert problem in one_error_line(capsys)


def test_ctrl_c_ends_a_fleet_within_two_seconds() -> None:
    options = ("--engines", "4", "--processes", "2", "--copies", "3000", "--time-scale", "50")
    command = subprocess.Popen(
        [sys.executable, "-m", "flashcore", "replay", str(SAMPLE), *options, "--progress"],
        stderr=subprocess.PIPE,
        start_new_session=True,
        # Where these tests run in a script's background, Ctrl-C is ignored, also by children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert command.stderr is not None
    while command.stderr.read(1) != b"[":  # the bar: all processes are at work
        assert command.poll() is None
    os.killpg(command.pid, signal.SIGINT)  # as a terminal does: to every process
    interrupted = time.monotonic()
    _, said = command.communicate(timeout=30)
    assert time.monotonic() - interrupted < 2
    assert command.returncode == 130
    assert said.split(b"\r")[-1] == b"flashcore replay: interrupted\n"
    while alive(command.pid):  # multiprocessing's own helper takes a moment
        assert time.monotonic() - interrupted < 10
        time.sleep(0.05)


def alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_table_names_the_figures(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(SAMPLE, "--cache-tokens", "2000", *FAST) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "6 completed, 0 refused" in out
    assert "15 pages of 128 tokens" in out
    for label in ("reuse", "pages shared", "pages staged", "batch (sequences)"):
        assert label in out


@pytest.mark.parametrize(
    ("options", "pages"),
    [
        ((), 4096),
        (("--cache-pages", "77"), 77),
        (("--cache-tokens", "1300"), 10),
        (("--cache-gib", "2", "--page-tokens", "64"), 256),
        (("--cache-gib", "1", "--model-shape", "16x4x64", "--element-bytes", "1"), 1024),
    ],
)
def test_cache_sizes(
    capsys: pytest.CaptureFixture[str], options: tuple[str, ...], pages: int
) -> None:
    assert run_json(capsys, *options, *FAST)["settings"]["cache_pages"] == pages


@pytest.mark.parametrize("page_tokens", ["16", "1024"])
def test_sampled_steps_are_timed_and_agree(
    capsys: pytest.CaptureFixture[str], page_tokens: str
) -> None:
    samples = run_json(capsys, "--sample-every", "7", "--page-tokens", page_tokens)["samples"]
    assert samples["count"] > 10
    assert samples["disagreements"] == 0
    assert samples["layout_ms"]["min"] > 0
    assert samples["plan_ms"]["min"] > 0
    assert samples["plan_reuse"]["min"] >= 1
    assert samples["attention_ms"] is None


def test_attention_is_timed_when_asked(capsys: pytest.CaptureFixture[str]) -> None:
    samples = run_json(
        capsys, "--sample-every", "50", "--attention", "--heads", "2x1x32", "--cache-pages", "64"
    )["samples"]
    assert samples["attention_ms"]["min"] > 0
    assert samples["heads"] == "2x1x32"
    steps = samples["steps"]
    assert [step["step"] for step in steps] == [50 * place for place in range(len(steps))]
    assert min(s["attention_ms"] for s in steps) == samples["attention_ms"]["min"]
    assert all(s["query_tokens"] >= s["sequences"] and "fa3_ms" not in s for s in steps)


def test_plot_and_csv(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot, table = tmp_path / "reuse.png", tmp_path / "steps.csv"
    report = run_json(capsys, "--plot", plot, "--steps-csv", table, *FAST)
    assert len(table.read_text().splitlines()) == report["steps"] + 1
    report = run_json(capsys, "--requests", "1", "--plot", plot, "--steps-csv", table, *FAST)
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert len(table.read_text().splitlines()) == report["steps"] + 1


def test_bad_line_gives_one_line_and_status_2(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    bad = tmp_path / "bad.jsonl"
    lines = SAMPLE.read_text().splitlines()
    bad.write_text("\n".join([*lines[:3], lines[3].replace("1536", "-1536")]))
    for fleet in ((), ("--engines", "2", *FLEET)):
        assert run(bad, *fleet) == 2
        error = one_error_line(capsys)
        assert error.startswith(f"flashcore replay: {bad}, line 4: input_length is -1536;")


def test_missing_file_gives_one_line_and_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("no/such/file.jsonl") == 2
    assert "no/such/file.jsonl: cannot read the trace" in one_error_line(capsys)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (("--page-tokens", "100"), "page_tokens is 100; it must divide 512"),
        (("--cache-tokens", "100"), "the cache holds 100 tokens; one page of 128 is the least"),
        (("--cache-gib", "1e9"), "it must be 1 to 268435456"),
        (("--heads", "3x2x64"), "3 query heads, no multiple of 2"),
        (("--plot", "/dev/null/a.png"), "--plot /dev/null/a.png: /dev/null is no folder"),
        (("--plot", "reuse.txt"), "must end in .png, .pdf or .svg"),
        (("--steps-csv", "."), "it is a folder"),
        (("--cache-pages", "1", "--steps-csv", "/dev/null"), "every request was refused"),
        (("--steps-csv", "n" * 300), "nnn: cannot be written: File name too long"),
        (("--steps-csv", "/dev/full"), "cannot write /dev/full: No space left on device"),
        (("--steps-csv", str(SAMPLE)), "it would replace the input"),
        (("--plot", "a.png", "--steps-csv", "a.png"), "--plot and --steps-csv both name a.png"),
    ],
)
def test_options_that_cannot_be_carried_out(
    capsys: pytest.CaptureFixture[str], options: tuple[str, ...], problem: str
) -> None:
    assert run(SAMPLE, *FAST, *options) == 2
    assert problem in one_error_line(capsys)


def test_an_input_is_not_replaced_through_a_link(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace, link = tmp_path / "trace.jsonl", tmp_path / "steps.csv"
    trace.write_text(SAMPLE.read_text())
    link.symlink_to(trace)
    assert run(trace, *FAST, "--steps-csv", link) == 2
    assert "it would replace the input" in one_error_line(capsys)
    assert trace.read_text() == SAMPLE.read_text()


def test_folders_of_outputs_are_made(tmp_path: Path) -> None:
    steps = tmp_path / "a" / "b" / "steps.csv"
    assert run(SAMPLE, *FAST, "--steps-csv", steps) == 0
    assert steps.read_text().startswith("time_ms,batch")


def test_a_dash_is_standard_input(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(SAMPLE.read_bytes())))
    assert run("-", *FAST, "--json") == 0
    piped = json.loads(capsys.readouterr().out)
    assert run(SAMPLE, *FAST, "--json") == 0
    named = json.loads(capsys.readouterr().out)
    assert piped["trace"] == "standard input"
    assert piped["requests"] == named["requests"]
    assert piped["completed"] == named["completed"]


@pytest.mark.parametrize(
    "options",
    [
        ("--prefill-rate", "inf"),
        ("--requests", "0"),
        ("--requests", "x"),
        ("--block-tokens", "0"),
        ("--time-unit", "us"),
        ("--cache-gib", "nan"),
        ("--step-ms", "0"),
        ("--time-scale", "-1"),
        ("--model-shape", "32x8"),
        ("--heads", "4x0x64"),
        ("--cache-pages", "5", "--cache-tokens", "700"),
    ],
)
def test_options_out_of_range_exit_with_2(
    capsys: pytest.CaptureFixture[str], options: tuple[str, ...]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        run(SAMPLE, *options)
    assert stopped.value.code == 2
    assert options[0] in capsys.readouterr().err


def test_all_requests_refused_is_a_result(capsys: pytest.CaptureFixture[str]) -> None:
    report = run_json(capsys, "--cache-pages", "1")
    assert (report["refused"], report["completed"], report["steps"]) == (6, 0, 0)
    assert report["reuse"] == 1
    assert run(SAMPLE, "--cache-pages", "1") == 0
    assert "6 refused" in capsys.readouterr().out


def test_help_and_parsing_load_neither_torch_nor_matplotlib() -> None:
    code = (
        "import sys, flashcore.cli.replay, flashcore.replay.trace as t;"
        f"t.read_trace({str(SAMPLE)!r});"
        "sys.exit(any(m in sys.modules for m in ('torch', 'matplotlib')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_only_on_a_terminal_or_when_asked() -> None:
    def drawn(stream: io.StringIO, shown: bool | None) -> str:
        with ProgressBar("replay", 3, shown=shown, stream=stream) as bar:
            bar.update(3)
        return stream.getvalue()

    assert drawn(io.StringIO(), None) == ""
    assert drawn(Terminal(), False) == ""
    for text in (drawn(Terminal(), None), drawn(io.StringIO(), True)):
        assert "replay [############################] 3/3" in text
        assert text.endswith("\r")
        assert text.split("\r")[-2].strip() == ""  # the line is cleared


def test_a_report_of_a_gpu_names_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(replay, "head", lambda commit: {"device": "a GPU", "commit": commit})
    report = run_json(capsys, "--device", "cuda", "--commit", "abc", *FAST)
    assert (report["device"], report["commit"]) == ("a GPU", "abc")
    assert "device" not in run_json(capsys, *FAST)
