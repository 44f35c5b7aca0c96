"""Work for several processes that ends at once when it is interrupted or killed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def run_all(
    work: Callable[[Item], Result],
    items: Sequence[Item],
    jobs: int,
    on_crash: Callable[[Item], Result],
    on_done: Callable[[Result], None],
) -> list[Result]:
    """`work` of each item, in at most `jobs` processes; results in the order of `items`.

    `work` and the items are pickled. `on_crash` gives the result of an item whose process died, or
    one beside it; `on_done` hears of each result as it comes. Ctrl-C kills the processes: one may
    be minutes deep in a compiler that does not look for signals.
    """
    results: dict[int, Result] = {}
    context = multiprocessing.get_context("spawn")  # the DSL keeps state that must not be forked
    pool = ProcessPoolExecutor(max(1, jobs), context, _follow_the_parent)
    try:
        waiting = {pool.submit(work, item): number for number, item in enumerate(items)}
        for future in as_completed(waiting):
            number = waiting[future]
            try:
                result = future.result()
            except BrokenProcessPool:
                result = on_crash(items[number])
            results[number] = result
            on_done(result)
    except BaseException:
        for process in multiprocessing.active_children():
            process.kill()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
    return [results[number] for number in range(len(items))]


def _follow_the_parent() -> None:
    # A terminal sends Ctrl-C to all of a command's processes; each would print a traceback.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_the_parent, daemon=True).start()


def _end_with_the_parent() -> None:
    """A parent that is killed says nothing: its processes would work on, and then wait for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
