"""Tasks side by side: results, settings of torch that stay as they were, and errors."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from functools import partial

import pytest
import torch

import flashcore
from flashcore.bench.shared_prefix import Instance, Problem, make
from flashcore.eager import paged, run, threads, workspace

THREADS = 3


@pytest.fixture
def three_threads():
    """Torch with three threads on this one, whatever the machine has."""
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)


def long_batch(**changes) -> Instance:
    """Reads enough for `run_tasks`: a shared run in two parts and runs of their own."""
    shape = {"sequences": 4, "tokens": 6144, "head_dim": 32, "page_tokens": 64, **changes}
    return make(Problem(**shape))


def attend(instance: Instance, **options) -> tuple[torch.Tensor, torch.Tensor]:
    i = instance
    return flashcore.paged_attention(
        i.q, i.k_pages, i.v_pages, i.plan(), return_lse=True, **options
    )


def in_thread(function):
    """Its result on a thread that is new to torch."""
    found = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join()
    return found[0]


@pytest.mark.parametrize("window", [None, (5000, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_as_one_thread(three_threads, monkeypatch, dtype, window):
    """The bits do not depend on who did what, nor on whether anything was done side by side."""
    instance = long_batch(dtype=dtype)
    used: set[int] = set()
    original, everyone = paged.attend_runs, threading.Barrier(THREADS)

    def watched(*arguments):
        if threading.get_ident() not in used:
            used.add(threading.get_ident())
            everyone.wait(10)  # nobody takes a second task before all have one
        return original(*arguments)

    monkeypatch.setattr(paged, "attend_runs", watched)
    side_by_side = attend(instance, window=window)
    assert len(used) == THREADS
    torch.set_num_threads(1)
    used.clear()
    everyone = threading.Barrier(1)
    for ours, alone in zip(side_by_side, attend(instance, window=window), strict=True):
        assert torch.equal(ours, alone)
    assert used == {threading.get_ident()}


def test_little_work_stays_on_this_thread(three_threads, monkeypatch):
    """Calling others costs more than there is to do."""
    monkeypatch.setattr(threads, "_openmp", lambda: pytest.fail("a team was called"))
    monkeypatch.setattr(paged, "usable_threads", lambda: THREADS)
    monkeypatch.setattr(paged, "one_thread_an_operator", nullcontext)
    attend(long_batch(tokens=512))
    assert threads.run_tasks([threading.get_ident], THREADS) == [threading.get_ident()]


def test_long_products_keep_torchs_threads(three_threads, monkeypatch):
    instance, seen = long_batch(), []
    original = run.merge

    def watched(*arguments):
        seen.append(torch.get_num_threads())
        return original(*arguments)

    monkeypatch.setattr(run, "merge", watched)
    expected, _ = attend(instance)
    assert seen == []  # each part is a task
    monkeypatch.setattr(paged, "LONG_PRODUCT", 0)
    out, _ = attend(instance)
    assert seen == [THREADS]  # the shared run's two chunks, one after the other
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)


def test_torch_keeps_its_number_of_threads(three_threads):
    """On this thread, on one that already runs, and on one that starts later."""
    seen, begun, done = [], threading.Event(), threading.Event()

    def bystander():
        torch.get_num_threads()
        begun.set()
        done.wait()
        seen.append(torch.get_num_threads())

    other = threading.Thread(target=bystander)
    other.start()
    begun.wait()
    libraries = torch.__config__.parallel_info()  # what OpenMP and MKL say, too
    attend(long_batch())
    done.set()
    other.join()
    assert seen == [THREADS]
    assert torch.__config__.parallel_info() == libraries
    assert torch.get_num_threads() == THREADS
    assert in_thread(torch.get_num_threads) == THREADS


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_under_the_modes_of_autograd(three_threads, mode):
    """Helpers take on inference mode, without which such tensors cannot be written, and no_grad."""
    instance = long_batch()
    expected = attend(instance)
    if mode is torch.no_grad:
        instance.k_pages.requires_grad_()
    with mode():
        inside = threads.run_tasks([torch.is_inference_mode_enabled] * 8, THREADS)
        assert inside == [mode is torch.inference_mode] * 8
        before = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        out, lse = attend(instance)
        assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == before
        assert out.is_inference() == (mode is torch.inference_mode)
    assert torch.equal(out, expected[0])
    assert torch.equal(lse, expected[1])


def test_results_keep_their_order(three_threads):
    def task(i: int) -> int:
        time.sleep(0.001 * (i % 3))
        return i

    assert threads.run_tasks([partial(task, i) for i in range(30)], THREADS) == list(range(30))
    assert threads.run_tasks([], THREADS) == []


@pytest.mark.parametrize("where", ["caller", "helper"])
def test_an_exception_reaches_the_caller(three_threads, where):
    """Not before every task that has begun has ended; torch's number of threads stays."""
    caller, running = threading.get_ident(), []
    both = threading.Barrier(THREADS)

    def task():
        both.wait(10)  # each thread has one
        if (threading.get_ident() == caller) == (where == "caller"):
            raise ValueError("of a task")
        running.append(1)
        time.sleep(0.05)
        running.pop()

    with pytest.raises(ValueError, match="of a task"):
        threads.run_tasks([task] * THREADS, THREADS)
    assert running == []
    assert torch.get_num_threads() == THREADS
    assert threads.run_tasks([caller.__int__] * 4, THREADS) == [caller] * 4


def test_many_callers_at_once(three_threads):
    instance = long_batch()
    expected, _ = attend(instance)

    def repeat():
        return [attend(instance)[0] for _ in range(5)]

    found: list[list[torch.Tensor]] = []
    callers = [threading.Thread(target=lambda: found.append(repeat())) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(found) == len(callers)
    assert all(torch.equal(out, expected) for outs in found for out in outs)


def test_helpers_use_memory_of_the_caller(three_threads):
    """A member of a team has no thread of Python's of its own, whose memory would last."""
    everyone = threading.Barrier(THREADS)

    def task():
        everyone.wait(10)
        return workspace.scratch("test", (8,), torch.empty(0)).data_ptr()

    def addresses():
        return set(threads.run_tasks([task] * THREADS, THREADS))

    first = addresses()
    assert len(first) == THREADS
    assert addresses() == first
    assert in_thread(addresses).isdisjoint(first)


def test_where_threads_cannot_be_set_one_does_it_all(three_threads, monkeypatch):
    instance = long_batch()
    expected, _ = attend(instance)
    monkeypatch.setattr(threads, "_openmp", lambda: None)
    assert threads.usable_threads() == 1
    torch.testing.assert_close(attend(instance)[0], expected, rtol=1e-5, atol=1e-6)


AT_EXIT = """
import atexit, torch
from tests.test_eager_threads import attend, long_batch
torch.set_num_threads(3)
instance = long_batch()
expected, _ = attend(instance)
atexit.register(lambda: print("same bits", torch.equal(attend(instance)[0], expected)))
"""


def test_while_the_interpreter_ends():
    done = subprocess.run(
        [sys.executable, "-c", AT_EXIT], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "same bits True"
