"""Compile what tests/gpu launches, ahead and side by side; needs the CuTe DSL and no GPU:

    python tools/gpu_test_kernels.py [--list] [--jobs N] [--cache-dir FOLDER] [TEST ...]

The tests run once with CPU tensors in place of a GPU's, launches that only note their kernel, and
no assertion in force. A kernel that is missed here is compiled when its test asks for it.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import os
import pickle
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch.overrides import TorchFunctionMode

from flashcore.dispatch import Path as DevicePath
from flashcore.jit import cache
from flashcore.jit.gates import default_jobs
from flashcore.jit.kernel import Kernel
from flashcore.jit.prebuild import prebuild

ROOT = Path(__file__).resolve().parents[1]
KIT = "tests/gpu/sglang_kit.py"
SMS = 132
GPU = torch.device("cuda")
PYTEST = ("-q", "--assert=plain", "--tb=line", "-p", "no:cacheprovider", "-p", "no:xdist")


class Noted:
    """Takes the place of the kernel cache: its functions do nothing."""

    def __init__(self) -> None:
        self.kernels: dict[Kernel, None] = {}

    def function(self, kernel: Kernel) -> Any:
        self.kernels[kernel] = None
        return lambda *arguments: None

    def entry(self, kernel: Kernel) -> str:
        """As if it were there."""
        self.kernels[kernel] = None
        return kernel.family.name


class OnCpu(TorchFunctionMode):
    """Every tensor that is meant for a GPU is made on the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.Tensor.cuda, torch.Tensor.pin_memory):
            return args[0]
        moved = {name: _cpu(value) for name, value in (kwargs or {}).items()}
        return func(*map(_cpu, args), **moved)


def _cpu(value: Any) -> Any:
    if isinstance(value, (str, torch.device)) and str(value).startswith("cuda"):
        return "cpu"
    return value


def note(file: str, tests: list[str]) -> None:
    """Write the kernels that the tests ask for; in a process of its own under `python -O`."""
    import flashcore.reference
    from flashcore import dispatch, ops
    from flashcore.sm90 import available
    from flashcore.sm90 import device_pager as pager
    from flashcore.sm90 import device_planner as planner
    from flashcore.sm90.launch import dense as launch
    from flashcore.sm90.launch import paged as launch_paged
    from flashcore.sm90.launch import streams
    from tests import compare

    if importlib.util.find_spec("sglang") is not None:
        _load_sglang()

    def no_result(q: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.zeros_like(q).double(), torch.zeros(q.shape[:-1]).double()

    def pass_over(*_: Any, **__: Any) -> None:
        pass

    noted: Any = Noted()
    cuda = mock.MagicMock()
    cuda.current_device.return_value = cuda.memory_allocated.return_value = 0
    cuda.is_current_stream_capturing.return_value = False
    cuda.device_count.return_value = 1
    cuda.get_device_properties.return_value = SimpleNamespace(multi_processor_count=SMS)
    instead: list[tuple[Any, dict[str, Any]]] = [
        (torch, {"cuda": cuda, "Generator": lambda device=None, make=torch.Generator: make()}),
        (torch.testing, {"assert_close": pass_over}),
        (compare, {"assert_close": pass_over}),
        (cache, {"_shared": noted}),
        (available, {"available": lambda device: (True, "")}),
        *((m, {"current_device": lambda: None}) for m in (launch, launch_paged)),
        *((m, {"lasting_stream": lambda index: 0}) for m in (streams, launch_paged)),
        *((m, {"device_path": lambda _: DevicePath("hopper", "")}) for m in (dispatch, ops)),
        *((m, {"device_path": lambda _: DevicePath("hopper", "")}) for m in (pager, planner)),
        (flashcore.reference, {"attention_reference": no_result}),
        (flashcore.reference, {"paged_attention_reference": no_result}),
    ]
    for where, values in instead:
        for name, value in values.items():
            setattr(where, name, value)
    with OnCpu():
        if KIT in tests:
            sys.argv = [KIT]
            with contextlib.suppress(SystemExit):
                runpy.run_path(KIT, run_name="__main__")
        rest = [test for test in tests if test != KIT]
        # A failed test may have launched all that it does; tests that cannot be collected have not.
        if rest and (status := pytest.main([*PYTEST, *rest])) > pytest.ExitCode.TESTS_FAILED:
            sys.exit(status)
    Path(file).write_bytes(pickle.dumps(list(noted.kernels)))


def _load_sglang() -> None:
    """Before torch.cuda is replaced: SGLang looks at it and finds no GPU."""
    from tests.sglang import standins

    standins.install()
    from flashcore.integrations.sglang import backend
    from flashcore.integrations.sglang.register import register
    from flashcore.serving import page_table_kernel

    register()
    import sglang.test.kits.attention_unittest.attention_methods.dense_attention
    import sglang.test.kits.attention_unittest.attention_methods.gdn_attention  # noqa: F401

    def on_gpu(runner: Any, of: Any = backend.model_of) -> Any:
        return dataclasses.replace(of(runner), device=GPU)

    backend.model_of = on_gpu
    page_table_kernel.fill_tables = lambda *arguments: None


def kernels(tests: list[str]) -> list[Kernel]:
    """What these tests launch."""
    with tempfile.NamedTemporaryFile() as file:
        command = [sys.executable, "-O", "-W", "ignore", __file__, "--note", file.name, *tests]
        # Its tensors are small: on a busy machine threads would wait for each other, for minutes.
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *sys.path])
        subprocess.run(command, cwd=ROOT, env=environment, stdout=sys.stderr, check=True)
        found: list[Kernel] = pickle.loads(Path(file.name).read_bytes())
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--list", action="store_true", help="print the kernels, compile nothing")
    parser.add_argument("--jobs", type=int, help="processes (default: one per CPU)")
    parser.add_argument("--cache-dir", type=Path, help="another cache folder than the default")
    parser.add_argument("--note", help=argparse.SUPPRESS)
    parser.add_argument("tests", nargs="*", default=["tests/gpu"])
    args = parser.parse_args()
    if args.note:
        note(args.note, args.tests)
        return 0
    wanted = kernels(args.tests)
    if args.list:
        print("\n".join(kernel.describe() for kernel in wanted))
        return 0
    opened = cache.KernelCache.open(args.cache_dir)
    built = prebuild(wanted, opened.folder, opened.target, args.jobs or default_jobs())
    for failed in (b for b in built if b.error):
        print(f"failed {failed.kernel.describe()}\n  {failed.error}", file=sys.stderr)
    print(f"{len(built)} kernels, {sum(b.compiled for b in built)} compiled now")
    return int(any(b.error for b in built))


if __name__ == "__main__":
    sys.exit(main())
