"""Launches on CPU tensors that are told apart by what they ask for and pass, and do nothing."""

from __future__ import annotations

from typing import Any

import pytest

from flashcore import dispatch
from flashcore.jit.kernel import Kernel
from flashcore.remembered import Remembered
from flashcore.sm90 import device_pager, device_planner
from flashcore.sm90.launch import dense, paged, pager, planner

SMS = 131  # no number that any operand has


class Recorder:
    """Takes the place of the disk cache and of every function in it."""

    def __init__(self) -> None:
        self.calls: dict[str, tuple[Any, ...]] = {}  # the last of each family
        self.kernels: list[Kernel] = []

    def function(self, kernel: Kernel) -> Any:
        self.kernels.append(kernel)

        def call(*arguments: Any) -> None:
            self.calls[kernel.family.name] = arguments

        return call

    def asked(self) -> list[Kernel]:
        """The kernels asked for since it was last called; what launches keep is forgotten."""
        found, self.kernels = self.kernels, []
        for module in (paged, pager, planner):
            module._functions.clear()
        return found


def install(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """CPU tensors pass for tensors of the current Hopper GPU."""
    recorder = Recorder()
    for module in (dense, paged, pager, planner):
        monkeypatch.setattr(module, "shared_cache", lambda: recorder)
    for module in (paged, pager, planner):
        monkeypatch.setattr(module, "_functions", {})
    monkeypatch.setattr(dense, "_plans", Remembered(8))
    for module in (dense, paged, device_pager, device_planner):
        monkeypatch.setattr(module, "sm_count", lambda device: SMS)
    for module in (device_pager, device_planner):
        monkeypatch.setattr(module, "device_path", lambda device: dispatch.Path("hopper", ""))
    for module in (dense, paged):
        monkeypatch.setattr(module, "scheduler_scratch", lambda index: "counter")
    monkeypatch.setattr(dense, "current_device", lambda: None)
    monkeypatch.setattr(paged, "lasting_stream", lambda index: 0)
    return recorder
