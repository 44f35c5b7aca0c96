"""Work for several processes: results in order, crashes as results, an end at Ctrl-C."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from flashcore.jit.workers import run_all


def double(number: int) -> int:
    if number < 0:
        os._exit(1)
    return 2 * number


def test_results_come_in_the_order_of_the_items() -> None:
    heard: list[int] = []
    assert run_all(double, [3, 1, 2], 2, lambda item: -1, heard.append) == [6, 2, 4]
    assert sorted(heard) == [2, 4, 6]


def test_a_process_that_dies_is_a_result() -> None:
    assert run_all(double, [-1], 1, lambda item: 100 * item, lambda result: None) == [-100]


def sleep_on(path: str) -> None:
    """As a compiler does: for long, without looking at signals."""
    Path(path).write_text(str(os.getpid()))
    time.sleep(60)


@pytest.fixture
def command(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """`flashcore compile` with two processes that are at work, and their ids."""
    places = [str(tmp_path / name) for name in "ab"]
    code = (
        "import sys\nfrom flashcore.cli import main\n"
        "from flashcore.jit.workers import run_all\nfrom tests.test_workers import sleep_on\n"
        "class Home:\n"
        "    add_arguments = staticmethod(lambda parser: None)\n"
        f"    run = staticmethod(lambda args: run_all(sleep_on, {places!r}, 2, print, print))\n"
        "if __name__ == '__main__':\n"
        "    main.import_module = lambda name: Home\n"
        "    sys.exit(main.main(['compile']))\n"
    )
    script = tmp_path / "compile.py"
    script.write_text(code)
    root = str(Path(__file__).parents[1])
    started = subprocess.Popen(
        [sys.executable, str(script)],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": root},
        start_new_session=True,
        preexec_fn=heed_interrupts,
    )
    until(lambda: all(Path(place).exists() and Path(place).read_text() for place in places), 60)
    yield started, [int(Path(place).read_text()) for place in places]
    with contextlib.suppress(ProcessLookupError):
        os.killpg(started.pid, signal.SIGKILL)
    started.communicate()


def until(true: Callable[[], bool], seconds: float) -> None:
    started = time.monotonic()
    while not true():
        assert time.monotonic() - started < seconds
        time.sleep(0.05)


def test_ctrl_c_ends_all_processes_within_two_seconds(
    command: tuple[subprocess.Popen[str], list[int]],
) -> None:
    started, workers = command
    os.killpg(started.pid, signal.SIGINT)  # as a terminal does: to every process
    interrupted = time.monotonic()
    _, said = started.communicate(timeout=30)
    assert time.monotonic() - interrupted < 2
    assert (started.returncode, said) == (130, "flashcore compile: interrupted\n")
    assert not any(map(running, workers))


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_no_process_is_left_where_the_command_is_killed(
    command: tuple[subprocess.Popen[str], list[int]], how: int
) -> None:
    """By a time limit, say: what it started must not work on unseen."""
    started, workers = command
    started.send_signal(how)
    until(lambda: not any(map(running, workers)), 5)


def heed_interrupts() -> None:
    """Whatever these tests run under: a job in the background of a script is started with Ctrl-C
    ignored, and so are all processes that it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
