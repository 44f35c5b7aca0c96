"""The backend's path of kernels on CPU tensors: compiled functions that do nothing, and say which
were asked for."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

import pytest
import torch

import flashcore
from flashcore.dispatch import Path
from flashcore.jit.kernel import Kernel

_SMS = 132
_STAND_INS: dict[str, dict[str, Any]] = {
    "flashcore.ops": {"device_path": lambda device: Path("hopper", "")},
    "flashcore.sm90.device_planner": {
        "device_path": lambda device: Path("hopper", ""),
        "_workers": lambda workers, *_: workers or 2 * _SMS,
        "sm_count": lambda device: _SMS,
    },
    "flashcore.sm90.launch.paged": {
        "sm_count": lambda device: _SMS,
        "scheduler_scratch": lambda index: torch.zeros(2, dtype=torch.int32),
        "lasting_stream": lambda index: 0,
    },
    "flashcore.sm90.launch.expand": {"_missing": lambda: None},
    "flashcore.serving.planners": {
        "multiprocessors": lambda device: _SMS,
        "on_kernels": lambda device: True,
    },
}


class FakeKernels:
    """Takes the place of the disk cache and of every function in it.

    compiled, loaded: kernels in the order in which they were first asked for. calls: how often each
    was launched.
    """

    def __init__(self) -> None:
        self.compiled: list[Kernel] = []
        self.loaded: list[Kernel] = []
        self.calls: dict[Kernel, int] = {}

    def entry(self, kernel: Kernel) -> None:
        return None

    def ensure(self, kernel: Kernel) -> None:
        self.compiled.append(kernel)

    def function(self, kernel: Kernel) -> Any:
        self.loaded.append(kernel)

        def call(*arguments: Any) -> None:
            self.calls[kernel] = self.calls.get(kernel, 0) + 1

        return call


def install(patch: pytest.MonkeyPatch) -> FakeKernels:
    """Until `patch` is undone, backends are made as on an H100."""
    fakes = FakeKernels()
    for name, values in _STAND_INS.items():
        module = importlib.import_module(name)
        for attribute, value in values.items():
            patch.setattr(module, attribute, value)
    for name in ("planner", "paged"):
        module = importlib.import_module(f"flashcore.sm90.launch.{name}")
        patch.setattr(module, "shared_cache", lambda: fakes)
        patch.setattr(module, "_functions", {})
    patch.setattr("flashcore.jit.cache.shared_cache", lambda: fakes)
    for name, function in (("expand_kernel", "expand"), ("expand_plan_kernel", "plan_expansion")):
        module = ModuleType(f"flashcore.{name}")  # which want Triton
        setattr(module, function, lambda *arguments: None)
        patch.setitem(sys.modules, module.__name__, module)
        patch.setattr(flashcore, name, module, raising=False)
    patch.setattr(torch.cuda, "memory_allocated", lambda device=None: 0)
    return fakes
