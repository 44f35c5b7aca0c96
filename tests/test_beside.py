"""Kernels compiled by another process while a call waits for its first one."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import flashcore
from flashcore.jit import beside
from flashcore.jit.cache import KernelCache
from flashcore.jit.kernel import Kernel
from flashcore.sm90.families import MERGE, PAGED, PLANNER
from flashcore.sm90.launch import paged, planner
from tests.recorded_launches import Recorder, install
from tests.runtime_fixtures import (
    COMPILE_LOG,
    CONSTANT,
    TARGET,
    ConstantConfig,
    needs_dsl,
    needs_loader,
)

pytestmark = pytest.mark.skipif(
    len(os.sched_getaffinity(0)) < 2, reason="one CPU does one thing after the other"
)
FIRST, SECOND = (Kernel(CONSTANT, ConstantConfig(value)) for value in (1, 2))


@pytest.fixture
def cache(tmp_path: Path) -> KernelCache:
    return KernelCache.open(tmp_path / "kernels", TARGET)


def finished() -> None:
    for process in beside._running:
        assert process.wait(60) == 0


@needs_dsl
@needs_loader
def test_another_process_compiles(
    cache: KernelCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "log"
    monkeypatch.setenv(COMPILE_LOG, str(log))
    beside.compile_beside(cache, FIRST, [FIRST, SECOND])
    finished()
    assert cache.entry(FIRST) is None  # for the call itself
    assert cache.entry(SECOND) is not None
    pid, value = log.read_text().split()
    assert (int(pid) != os.getpid(), value) == (True, "2")
    cache.ensure(SECOND)
    assert cache.compiled == 0


@needs_dsl
@needs_loader
def test_what_fails_there_is_told_here(cache: KernelCache) -> None:
    broken = Kernel(CONSTANT, ConstantConfig(3, broken=True))
    beside.compile_beside(cache, FIRST, [broken, SECOND])
    finished()
    assert cache.entry(SECOND) is not None
    with pytest.raises(ValueError, match="this configuration cannot be compiled"):
        cache.ensure(broken)


@needs_dsl
def test_nothing_is_begun_where_nothing_waits(
    cache: KernelCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[Any] = []
    monkeypatch.setattr(beside.subprocess, "Popen", lambda *words, **_: begun.append(words))
    cache.loaded[FIRST] = print
    beside.compile_beside(cache, FIRST, [SECOND])
    beside.compile_beside(object(), SECOND, [FIRST])
    beside.compile_beside(cache, SECOND, [SECOND])
    monkeypatch.setattr(beside, "compiler_installed", lambda: False)
    beside.compile_beside(cache, SECOND, [FIRST])
    assert begun == []


@needs_dsl
def test_no_process_to_be_had(cache: KernelCache, monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(*_: Any, **__: Any) -> None:
        raise BlockingIOError("Resource temporarily unavailable")

    monkeypatch.setattr(beside.subprocess, "Popen", none_left)
    started = time.monotonic()
    beside.compile_beside(cache, FIRST, [SECOND])
    assert time.monotonic() - started < 5


# ---------------------------------------------------------------- who asks


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    return install(monkeypatch)


def test_a_call_s_own_kernels(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    """The merge while the attention kernel is compiled; both while the planner is."""
    begun: list[tuple[Kernel, list[Kernel]]] = []

    def begin(_: Any, first: Kernel, others: list[Kernel]) -> None:
        begun.append((first, others))

    for module in (paged, planner):
        monkeypatch.setattr(module, "compile_beside", begin)
    made = flashcore.DevicePlanner(
        flashcore.Capacities(max_batch=4, max_entries=64, max_q=4),
        num_pages=33,
        num_q_heads=8,
        num_kv_heads=2,
        head_dim=64,
        page_tokens=16,
        num_workers=7,
        device="cpu",
    )
    q, pool = torch.zeros(4, 8, 64).bfloat16(), torch.zeros(33, 16, 2, 64).bfloat16()
    kv = paged.KVPool(pool, pool.clone())
    for _ in range(2):
        made.update(*(torch.ones(s, dtype=torch.int32) for s in ((4, 1), 4, 4)))
        paged.paged_attention(q, kv, made.plan.planned, paged.Rules(1.0, True), paged.Extras())
    asked = {kernel.family: kernel for kernel in recorder.kernels}
    assert begun == [
        (asked[PLANNER], [asked[PAGED], asked[MERGE]]),
        (asked[PAGED], [asked[MERGE]]),
    ]
