"""What the serving benchmark adds to SGLang's scheduler, where SGLang is (`make test-sglang`)."""

from __future__ import annotations

import importlib.util
import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from flashcore.bench.serve import clock, hicache, weights
from flashcore.bench.serve.engine import _server_fields
from flashcore.bench.serve.modes import MODES
from flashcore.bench.serve.soak import hicache_arguments
from tests.sglang import standins

if importlib.util.find_spec("sglang") is None:
    pytest.skip("SGLang is not installed", allow_module_level=True)
standins.install()


def test_its_classes_have_what_is_wrapped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("setproctitle")
    from sglang.srt.managers.scheduler import Scheduler
    from sglang.srt.model_executor.runner.decode_cuda_graph_runner import DecodeCudaGraphRunner

    heard: list[int] = []
    monkeypatch.setattr(
        Scheduler, "process_batch_result", lambda self, batch, result: heard.append(1)
    )
    monkeypatch.setattr(DecodeCudaGraphRunner, "execute", lambda self, batch: self.work(batch))
    clock.install(str(tmp_path / "clock"))
    clock.install(str(tmp_path / "clock"))  # a second rank has nothing to add

    class Runner:
        backend = SimpleNamespace(replay=lambda batch: "launched")
        attn_backend = SimpleNamespace(init_forward_metadata_out_graph=lambda batch: None)

        def work(self, batch: Any) -> str:
            self.attn_backend.init_forward_metadata_out_graph(batch)
            return str(self.backend.replay(batch))

    runner = Runner()
    for _ in range(2):
        assert DecodeCudaGraphRunner.execute(runner, None) == "launched"
    mode = SimpleNamespace(is_decode=lambda: True, is_extend=lambda: False)
    Scheduler.process_batch_result(None, SimpleNamespace(forward_mode=mode, reqs=[1, 2]), None)
    (step,) = clock.Clock(tmp_path / "clock").since(0)
    assert heard == [1]
    assert (step.sequences, step.kind) == (2, clock.DECODE)
    assert step.host >= step.launch + step.metadata > 0


def test_dummy_weights_are_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.model_loader import loader, weight_utils

    for module in (loader, weight_utils):
        if hasattr(module, "initialize_dummy_weights"):
            monkeypatch.setattr(module, "initialize_dummy_weights", None)
    weights.install(1.0)
    model = nn.Linear(64, 64)
    used = inspect.getsource(loader.DummyModelLoader)
    assert "initialize_dummy_weights(model)" in used
    with torch.no_grad():
        model.weight.fill_(torch.nan)
    loader.initialize_dummy_weights(model)
    assert bool(model.weight.isfinite().all())


def test_evictions_and_loads_are_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

    caches: list[Any] = [UnifiedRadixCache]
    if importlib.util.find_spec("sglang.srt.mem_cache.hiradix_cache"):
        from sglang.srt.mem_cache.hiradix_cache import HiRadixCache

        caches.append(HiRadixCache)
        monkeypatch.setattr(HiRadixCache, "_detach_backuped", lambda self, node: 64)
        monkeypatch.setattr(HiRadixCache, "_evict_regular", lambda self, node: 32)
    for cache in caches:
        for name in ("_demote", "_evict_to_host", "load_back"):
            if hasattr(cache, name):
                monkeypatch.setattr(cache, name, lambda self, *args: True)
    if len(caches) > 1:
        monkeypatch.setattr(HiRadixCache, "load_back", lambda self, node: [1, 2, 3])
    heard: list[tuple[str, int]] = []
    hicache.watch(lambda name, tokens: heard.append((name, tokens)))
    assert any(hasattr(UnifiedRadixCache, name) for name in ("_demote", "_evict_to_host"))
    UnifiedRadixCache.load_back(None, 1)
    assert heard == [("loads", 0)]
    if len(caches) > 1:
        HiRadixCache._detach_backuped(None, 1)
        HiRadixCache._evict_regular(None, 1)
        HiRadixCache.load_back(None, 1)
        assert heard[1:] == [("evictions", 64), ("dropped", 32), ("loads", 3)]


def test_its_engine_starts_schedulers_by_a_function_of_ours() -> None:
    for needed in ("uvloop", "setproctitle"):
        pytest.importorskip(needed)
    from sglang.srt.entrypoints.engine import Engine
    from sglang.srt.managers.scheduler import run_scheduler_process

    assert Engine.run_scheduler_process_func is run_scheduler_process
    for name in (
        *("release_memory_occupation", "resume_memory_occupation", "update_weights_from_disk"),
        *("update_weights_from_tensor", "freeze_gc", "flush_cache"),
    ):
        assert hasattr(Engine, name)


def test_modes_use_arguments_that_it_has() -> None:
    known = _server_fields()
    wanted = {name for mode in MODES.values() for name in mode.arguments}
    wanted |= {name for name, _ in hicache_arguments("kernel")}
    wanted |= {"tp_size", "pp_size", "dp_size", "enable_dp_attention", "base_gpu_id"}
    wanted |= {"max_mamba_cache_size", "mamba_ssm_dtype", "speculative_draft_model_path"}
    assert wanted <= known
