"""`flashcore check` asks for kernels that are shipped: from a wheel it skips none of its tests."""

from __future__ import annotations

import contextlib

import pytest

from flashcore import dispatch, ops
from flashcore.cli.check import bits, dense
from flashcore.cli.check.judge import SelfTest, Setting
from flashcore.sm90.launch import planner
from flashcore.sm90.shipped import shipped_kernels
from tests.recorded_launches import install

SHIPPED = frozenset(shipped_kernels())
TESTS = [*dense.tests(), *(test for test in bits.tests() if "on the GPU" in test.name)]


@pytest.mark.parametrize("test", TESTS, ids=lambda test: test.name)
def test_its_kernels_are_shipped(test: SelfTest, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = install(monkeypatch)
    for module in (dispatch, ops):
        monkeypatch.setattr(module, "device_path", lambda device: dispatch.Path("hopper", ""))
    monkeypatch.setattr(planner, "compile_beside", lambda *_: None)
    with contextlib.suppress(RuntimeError, NotImplementedError):  # no results to go on with
        test.launch(Setting("cpu", kernels=False))
    asked = recorder.asked()
    assert asked
    assert [kernel.describe() for kernel in asked if kernel not in SHIPPED] == []
