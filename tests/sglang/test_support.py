"""Registration, and what fails when the server starts: one line that says what, and what to use."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from flashcore.contract.counts import Fault, Stat
from flashcore.dispatch import Path as DevicePath
from flashcore.integrations.sglang.register import NAME, register
from flashcore.integrations.sglang.support import check_kernels, model_of
from flashcore.serving import counters
from flashcore.serving.counters import Counters
from flashcore.serving.shapes import Model, NotServed, Shape
from tests import serving_cases as cases
from tests.sglang.batches import Setup, attend, make_engine, make_forward

register()


def test_start_up_line(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        make_engine(Setup(64, window=40))
    line = next(r.getMessage() for r in caplog.records if r.getMessage().startswith("flashcore"))
    for part in ("torch operators", "4/2 heads of 16", "window 40", "page size 64", "MiB"):
        assert part in line


UNSERVED: dict[str, tuple[Any, str]] = {
    "mla": (lambda r: setattr(r, "use_mla_backend", True), "latent attention"),
    "encoder_decoder": (
        lambda r: setattr(r.model_config, "is_encoder_decoder", True),
        "encoder-decoder",
    ),
    "chunked": (lambda r: setattr(r.model[0], "use_irope", True), "chunked local attention"),
    "chunked_before_layers": (
        lambda r: (setattr(r, "model", None), setattr(r, "attention_chunk_size", 8192)),
        "chunked local attention",
    ),
    "fp8_of_fp32": (
        lambda r: setattr(r, "kv_cache_dtype", torch.float8_e4m3fn),
        "a KV cache of torch.float8_e4m3fn with a model in torch.float32",
    ),
    "mxfp8": (
        lambda r: (
            setattr(r, "kv_cache_dtype", torch.float8_e4m3fn),
            setattr(r, "server_args", SimpleNamespace(kv_cache_dtype="mxfp8")),
        ),
        "mxfp8; use --kv-cache-dtype auto or fp8_e4m3",
    ),
    "hnd": (lambda r: setattr(r.token_to_kv_pool, "use_hnd", True), "HND"),
    "cross": (lambda r: setattr(r.model[0], "is_cross_attention", True), "cross attention"),
    "v_dim": (lambda r: setattr(r.model[0], "v_head_dim", 24), "v_head_dim 24 beside head_dim 16"),
    "cap": (
        lambda r: (
            setattr(r.model[0], "logit_cap", 1.0),
            setattr(r.model[0], "logit_capping_method", "other"),
        ),
        "logit cap 'other'",
    ),
    "grok": (lambda r: setattr(r.model[0], "xai_temperature_len", 9), "temperatures"),
    "windows": (lambda r: setattr(r.model[0], "sliding_window_size", 7), "[7, 40]"),
    "unified": (
        lambda r: setattr(
            r, "server_args", SimpleNamespace(enable_unified_memory=True)
        ),
        "unified memory",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", UNSERVED)
def test_unserved_fails_at_start_in_one_line(name: str) -> None:
    runner = make_engine(Setup(16, window=40)).runner
    spoil, words = UNSERVED[name]
    spoil(runner)
    with pytest.raises(NotServed) as raised:
        ATTENTION_BACKENDS[NAME](runner)
    text = str(raised.value)
    assert words in text
    assert "\n" not in text
    assert re.search(r"; (use|leave out|unset) ", text)


@pytest.mark.parametrize(
    ("dims", "reason"),
    [
        ((80, 0), ""),
        ((192, 128), ""),
        ((100, 0), "4/2 heads of 100 (head_dim must be a multiple of 8 from 8 to 256, got 100)"),
        ((512, 0), "head_dim must be a multiple of 8 from 8 to 256, got 512"),
        ((192, 100), "192/100 (v_head_dim must be a multiple of 8 from 8 to 256, got 100)"),
    ],
)
def test_head_dims_of_the_kernels(
    monkeypatch: pytest.MonkeyPatch, dims: tuple[int, int], reason: str
) -> None:
    """Named when the server starts on a GPU; the torch operators of a CPU take any."""
    monkeypatch.setattr("flashcore.dispatch.device_path", lambda device: DevicePath("hopper", ""))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    shape = Shape(4, 2, *dims)
    cpu = Model(None, shape, 40, 16, 0, torch.bfloat16, torch.device("cpu"))
    check_kernels(cpu)
    gpu = replace(cpu, device=torch.device("cuda"))
    if not reason:
        check_kernels(gpu)
        return
    with pytest.raises(NotServed, match=re.escape(reason)):
        check_kernels(gpu)


def test_layers_of_two_shapes_of_one_kind() -> None:
    engine = make_engine(Setup(16, window=40))
    engine.layers[0].sliding_window_size = 40
    engine.layers[0].tp_q_head_num = 8
    with pytest.raises(NotServed, match="different shapes"):
        model_of(engine.runner)


def test_counters_tell_what_is_shared(caplog: pytest.LogCaptureFixture) -> None:
    """At the interval and not before; a forward without sharing says why."""
    engine = make_engine(Setup(64))
    engine.backend._counters["decode"] = Counters("decode", interval=2)
    with caplog.at_level(logging.INFO):
        for _ in range(5):
            forward = make_forward(engine, ForwardMode.DECODE, cases.decode())
            engine.backend.init_forward_metadata(forward.batch)
            attend(engine, forward)
    lines = [r.getMessage() for r in caplog.records if "KV tokens" in r.getMessage()]
    assert len(lines) == 1
    tokens = sum(request.prefix + 1 for request in cases.decode())
    assert f"per sequence: {tokens}" in lines[0]
    assert "nothing shared" not in lines[0]


def test_counter_lines() -> None:
    stats = [0] * Stat.SIZE
    stats[Stat.TOKENS_ONCE] = stats[Stat.TOKENS_PER_SEQUENCE] = stats[Stat.TOKENS_UNIQUE] = 70
    assert "no two sequences" in counters.line("decode", stats)
    stats[Stat.TOKENS_UNIQUE] = 60
    assert "too few" in counters.line("decode", stats)
    stats[Stat.UNSHARED] = 1
    assert "no room for the partial results" in counters.line("decode", stats)
    stats[Stat.TOKENS_ONCE], stats[Stat.UNSHARED] = 35, 0
    assert "reuse: 2.00" in counters.line("decode", stats)
    line = counters.faults_line("decode, window 40", Fault.PAGE | Fault.PLAN, 3, 7)
    for part in ("flashcore decode, window 40", "page, plan", "in 3 forwards", "sequence 7"):
        assert part in line


def test_entry_point_registers_without_a_device() -> None:
    """As SGLang does it, in a process of its own: by the entry point of pyproject.toml."""
    root = Path(__file__).parents[2]
    declared = (root / "pyproject.toml").read_text()
    assert '[project.entry-points."sglang.srt.plugins"]' in declared
    target = re.search(r'^flashcore = "(flashcore\.integrations\.sglang\..*)"$', declared, re.M)
    assert target
    module, function = target.group(1).split(":")
    code = (
        "from tests.sglang import standins; standins.install()\n"
        f"import flashcore, sys; assert not any(m.startswith('sglang') for m in sys.modules)\n"
        f"from {module} import {function} as f; f(); f()\n"
        "from sglang.srt import server_args as s\n"
        "from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS as b\n"
        "assert s.ATTENTION_BACKEND_CHOICES.count('flashcore') == 1 and 'flashcore' in b\n"
        "assert 'flashcore.integrations.sglang.backend' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, cwd=root)
