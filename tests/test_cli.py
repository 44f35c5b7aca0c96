"""The command line as a user meets it: exit statuses, one-line errors, the demo's figures."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from flashcore.cli.main import COMMANDS, main

SMALL = ["demo", "--sequences", "3", "--tokens", "96", "--page-tokens", "16", "--rounds", "1"]


def test_demo_json_has_the_keys_and_true_figures(capsys):
    assert main([*SMALL, "--device", "cpu", "--shared", "0.5", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert list(result) == [
        "dense_tokens",
        "unique_tokens",
        "reuse",
        "dense_ms",
        "sparse_ms",
        "speedup",
        "max_abs_error",
        "device",
    ]
    # 0.5 of 288 tokens repeated is a prefix of 0.75 * 96 = 72 tokens; whole pages make it 64 or 80.
    assert result["dense_tokens"] == 288
    assert result["unique_tokens"] in (288 - 2 * 64, 288 - 2 * 80)
    assert result["reuse"] == pytest.approx(288 / result["unique_tokens"], abs=1e-3)
    assert 0 < result["max_abs_error"] < 1e-5
    assert result["device"] == "cpu"


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_demo_table_names_both_ways(capsys, dtype):
    assert main([*SMALL, "--device", "cpu", "--shared", "0.5", "--dtype", dtype]) == 0
    out = capsys.readouterr().out
    for words in ("per sequence", "once per batch", "KV tokens read", "largest error against"):
        assert words in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shared", "0.9"], "--shared must be at least 0 and at most 1 - 1 / sequences = 0.667"),
        (["--q-heads", "3", "--kv-heads", "2"], "num_q_heads must be a multiple of num_kv_heads"),
        (["--tokens", "0"], "--tokens must be at least 1, got 0"),
        (["--device", "nonsense"], "argument --device: must be a device such as"),
        (["--device", "meta"], "--device meta cannot be used"),
        (["--tokens", str(10**12)], "GiB of K and V"),
    ],
)
def test_bad_input_is_one_line_and_status_2(capsys, options, message):
    assert main([*SMALL, *options]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("flashcore demo: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_info_says_which_path_and_why(capsys):
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert "torch" in out
    assert "cpu runs torch operators" in out
    assert main(["info", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["devices"][0]["path"] == "eager"
    assert report["versions"]["flashcore"]


def test_every_command_has_help_without_torch():
    for command in COMMANDS:
        code = (
            "import sys\nfrom flashcore.cli.main import main\n"
            f"try: main([{command!r}, '--help'])\n"
            "except SystemExit as end: assert end.code == 0\n"
            "assert 'torch' not in sys.modules"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert f"flashcore {command}" in done.stdout


def test_unknown_command_is_status_2(capsys):
    assert main(["dmeo"]) == 2
    assert "invalid choice: 'dmeo'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "flashcore: the following arguments are required: COMMAND"),
        (["--nope"], "flashcore: "),
        (["demo", "extra"], "flashcore demo: unrecognized arguments: extra"),
        (["info", "--nope"], "flashcore info: unrecognized arguments: --nope"),
        (["demo", "--tokens", "x"], "flashcore demo: argument --tokens: invalid int value: 'x'"),
        (["check", "--device", "toaster"], "flashcore check: argument --device: must be a device"),
        (["replay", "x", "--prefill-rate", "inf"], "flashcore replay: argument --prefill-rate"),
        (["compile", "--page-size", "0"], "flashcore compile: argument --page-size"),
        (["bench"], "flashcore bench: the following arguments are required: SUITE"),
        (["bench", "dense", "--rounds", "0"], "flashcore bench dense: argument --rounds"),
        (["bench", "dense", "--from-json", "/nope"], "--from-json /nope: No such file"),
    ],
)
def test_what_cannot_be_read_is_one_line_of_its_command(capsys, words, said):
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert said in captured.err
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize("words", ["--help", "info --help", "--version", "info"])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_disk_is_one_line(words, unbuffered, monkeypatch):
    """Found when it is written, or when it is flushed."""
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    done = _shell(f"{words} > /dev/full")
    assert done.returncode == 2
    assert done.stderr.endswith("No space left on device\n")
    assert done.stderr.count("\n") == 1


def test_without_standard_output_nothing_is_said():
    done = _shell("info >&-")
    assert (done.returncode, done.stderr) == (0, "")


def _shell(words: str) -> subprocess.CompletedProcess[str]:
    command = f"{sys.executable} -m flashcore {words}"
    return subprocess.run(command, shell=True, capture_output=True, text=True)


def test_a_closed_pipe_is_no_traceback():
    done = subprocess.run(
        f"{sys.executable} -m flashcore {' '.join(SMALL)} --shared 0 --device cpu | true",
        shell=True,
        capture_output=True,
        text=True,
    )
    assert "Traceback" not in done.stderr
    assert "flashcore demo:" not in done.stderr


def test_demo_of_one_sequence_shares_nothing(capsys):
    assert main(["demo", "--sequences", "1", *SMALL[3:], "--device", "cpu", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["reuse"] == 1


def test_an_interrupt_before_the_command_runs_is_one_line(capsys, monkeypatch):
    def interrupted(name):
        raise KeyboardInterrupt

    monkeypatch.setattr("flashcore.cli.main.import_module", interrupted)
    assert main(["info"]) == 130
    assert capsys.readouterr().err == "flashcore info: interrupted\n"
