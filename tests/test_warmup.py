"""What an engine's start says of its kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flashcore.jit.kernel import Kernel
from flashcore.serving import kernels, warmup
from flashcore.sm90.config.paged import PagedCall, choose
from flashcore.sm90.families import PAGED


@pytest.mark.parametrize(
    ("told", "options"),
    [
        ([], {}),
        (["an fp8 cache"], {"kv_dtype": "e4m3"}),
        (["batch-invariant plans"], {"chunked": True}),
        (["batch-invariant plans", "an fp8 cache"], {"chunked": True, "kv_dtype": "e5m2"}),
    ],
)
def test_kernels_that_no_gpu_has_run_are_told(
    told: list[str],
    options: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(kernels, "prepare", lambda needed: None)
    call = PagedCall("bf16", 128, 64, 4, device_counts=True, **options)
    needed = [Kernel(PAGED, choose(call, 64))]
    with caplog.at_level("WARNING"), warmup.compiled(needed, torch.device("cpu")):
        pass
    messages = [record.getMessage() for record in caplog.records]
    assert [f"for {what} are new" in m for what, m in zip(told, messages, strict=True)] == [
        True for _ in told
    ]
    assert all("flashcore check" in message for message in messages)
