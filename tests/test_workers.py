"""Work for several processes: results in order, crashes as results, an end at Ctrl-C."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

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


def test_ctrl_c_ends_all_processes_within_two_seconds(tmp_path: Path) -> None:
    places = [str(tmp_path / name) for name in "ab"]
    code = (
        "import sys\nfrom flashcore.cli import main\n"
        "from flashcore.jit.workers import run_all\nfrom tests.test_workers import sleep_on\n"
        "class Home:\n"
        "    add_arguments = staticmethod(lambda parser: None)\n"
        "    run = staticmethod(lambda args: run_all(sleep_on, sys.argv[1:], 2, print, print))\n"
        "if __name__ == '__main__':\n"
        "    main.import_module = lambda name: Home\n"
        "    sys.exit(main.main(['compile']))\n"
    )
    script = tmp_path / "compile.py"
    script.write_text(code)
    root = str(Path(__file__).parents[1])
    command = subprocess.Popen(
        [sys.executable, str(script), *places],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": root},
        start_new_session=True,
        preexec_fn=heed_interrupts,
    )
    started = time.monotonic()
    while not all(Path(place).exists() and Path(place).read_text() for place in places):
        assert time.monotonic() - started < 60
        time.sleep(0.05)
    os.killpg(command.pid, signal.SIGINT)  # as a terminal does: to every process
    interrupted = time.monotonic()
    _, said = command.communicate(timeout=30)
    assert time.monotonic() - interrupted < 2
    assert (command.returncode, said) == (130, "flashcore compile: interrupted\n")
    for place in places:
        assert not running(int(Path(place).read_text()))


def heed_interrupts() -> None:
    """Whatever these tests run under: a job in the background of a script is started with Ctrl-C
    ignored, and so are all processes that it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
