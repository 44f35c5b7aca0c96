"""Where the host's time of an attention call goes: python benchmarks/host_cost.py [--json FILE]

The problems are so small that the GPU is never behind. Parts are timed alone and need not add up to
the whole. Without a Hopper GPU, and with --stub, the compiled functions do nothing and the tensors
lie on the CPU.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import flashcore
from flashcore import api, dispatch, ops
from flashcore.bench.machine import describe_device, package_versions, source_commit
from flashcore.jit.cache import shared_cache
from flashcore.jit.kernel import Kernel
from flashcore.remembered import Remembered
from flashcore.sm90.available import available
from flashcore.sm90.launch import dense as launch
from flashcore.sm90.launch import paged as launch_paged
from flashcore.sm90.launch.allocate import allocator, contiguous
from flashcore.sm90.launch.streams import lasting_stream, scheduler_scratch
from flashcore.sm90.launch.tensors import tma_ready

CALLS, REPEATS = 400, 15  # a driver queues about a thousand launches before it makes the host wait

Call = Callable[[], Any]
_plans: list[flashcore.Plan] = []  # they keep launches


def microseconds(call: Call) -> float:
    """Host time of one call: the least of several loops."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    best = float("inf")
    for _ in range(REPEATS):
        wait()
        started = time.perf_counter()
        for _ in range(CALLS):
            call()
        best = min(best, time.perf_counter() - started)
    wait()
    return round(best / CALLS * 1e6, 2)


def dense_call(where: str) -> Call:
    q, k, v = (torch.randn(1, 128, 2, 128, device=where).bfloat16() for _ in range(3))
    return lambda: flashcore.attention(q, k, v, causal=True)


def paged_call(where: str, prefix_pages: int) -> Call:
    """Two sequences that decode; with a common prefix there are partial results and a merge."""
    own = [[8, 9], [10, 11]]
    table = torch.tensor([[*range(prefix_pages), *pages] for pages in own], dtype=torch.int32)
    lengths = torch.tensor([64 * (prefix_pages + 2) - 9, 64 * (prefix_pages + 2) - 20])
    plan = flashcore.plan(
        flashcore.layout_from_page_table(table, lengths, page_tokens=64),
        q_lens=[1, 1],
        num_q_heads=8,
        num_kv_heads=2,
        head_dim=128,
        page_tokens=64,
    ).to(where)
    _plans.append(plan)
    q = torch.randn(2, 8, 128, device=where).bfloat16()
    k, v = (torch.randn(12, 64, 2, 128, device=where).bfloat16() for _ in range(2))
    return lambda: flashcore.paged_attention(q, k, v, plan)


class Recorder:
    """Stands between the launches and the compiled functions: keeps arguments, passes calls on."""

    def __init__(self, real: bool) -> None:
        self.real = real
        self.pass_on = real
        self.functions: dict[str, Any] = {}
        self.arguments: dict[str, tuple[Any, ...]] = {}

    def function(self, kernel: Kernel) -> Callable[..., None]:
        name = kernel.family.name
        if self.real:
            self.functions[name] = shared_cache().function(kernel)

        def call(*arguments: Any) -> None:
            self.arguments[name] = arguments
            if self.pass_on:
                self.functions[name](*arguments)

        return call


@contextmanager
def _fresh_launches() -> Iterator[None]:
    for plan in _plans:
        plan.launches.clear()
    yield
    for plan in _plans:
        plan.launches.clear()


@contextmanager
def launches_through(cache: Any, stub: bool) -> Iterator[None]:
    """New launches get their functions from `cache`; with `stub` CPU tensors pass for a GPU's."""
    with (
        _fresh_launches(),
        mock.patch.multiple(api, _dense_launches=Remembered(4096)),
        mock.patch.multiple(launch, shared_cache=lambda: cache, _plans=Remembered(4096)),
        mock.patch.multiple(launch_paged, shared_cache=lambda: cache, _functions={}),
    ):
        if not stub:
            yield
            return
        scratch = torch.zeros(2, dtype=torch.int32)
        stand_ins: dict[Any, dict[str, Callable[..., Any]]] = {
            ops: {"device_path": lambda _: dispatch.Path("hopper", "")},
            launch: {
                "sm_count": lambda _: 132,
                "scheduler_scratch": lambda _: scratch,
                "current_device": lambda: None,
            },
            launch_paged: {
                "sm_count": lambda _: 132,
                "scheduler_scratch": lambda _: scratch,
                "lasting_stream": lambda _: 0,
            },
        }
        with ExitStack() as stack:
            for module, names in stand_ins.items():
                stack.enter_context(mock.patch.multiple(module, **names))
            yield


def nothing(*arguments: Any) -> None:
    pass


def split(call: Call, stub: bool) -> dict[str, float]:
    """The call; the same where compiled functions do nothing; each function; its arguments."""
    from tvm_ffi import get_global_func

    takes_arguments = get_global_func("testing.nop")
    costs: dict[str, float] = {}
    if not stub:
        call()
        costs["call"] = microseconds(call)
    recorder = Recorder(real=not stub)
    with launches_through(recorder, stub):
        call()

    class Nothing:
        def function(self, kernel: Kernel) -> Callable[..., None]:
            return nothing

    with launches_through(Nothing(), stub):
        costs["call, functions do nothing"] = microseconds(call)
    for name, arguments in recorder.arguments.items():
        costs[f"{name}: arguments only"] = microseconds(lambda a=arguments: takes_arguments(*a))
        if not stub:
            function = recorder.functions[name]
            costs[f"{name}: function"] = microseconds(lambda f=function, a=arguments: f(*a))
    return costs


def parts(where: str) -> dict[str, float]:
    """What a launch is made of, each alone."""
    q = torch.zeros(1, 128, 2, 128, device=where, dtype=torch.bfloat16)
    out = torch.empty_like(q)
    allocate, buffer = allocator(q.device), contiguous(q.shape, q.dtype)
    costs = {
        "torch.empty_like": microseconds(
            lambda: torch.empty_like(q, memory_format=torch.contiguous_format)
        ),
        "allocator": microseconds(lambda: allocate(*buffer)),
        "q.new_empty(0)": microseconds(lambda: q.new_empty(0, dtype=torch.float32)),
        "torch.empty(lse)": microseconds(
            lambda: torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device)
        ),
        "out.copy_(q)": microseconds(lambda: out.copy_(q)),
        "out.zero_()": microseconds(lambda: out.zero_()),
        "tma_ready": microseconds(lambda: tma_ready("q", q)),
    }
    if q.is_cuda:
        costs["current_device"] = microseconds(torch.cuda.current_device)
        costs["raw stream"] = microseconds(lambda: torch._C._cuda_getCurrentRawStream(0))
        costs["is capturing"] = microseconds(torch.cuda.is_current_stream_capturing)
        costs["lasting_stream"] = microseconds(lambda: lasting_stream(0))
        costs["scheduler_scratch"] = microseconds(lambda: scheduler_scratch(0))
    return costs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--stub", action="store_true", help="time the host code alone, on the CPU")
    parser.add_argument("--commit", help="to record where the package is no git checkout")
    options = parser.parse_args()
    stub = options.stub or not available("cuda")[0]
    where = "cpu" if stub else "cuda:0"
    calls = {
        "attention, causal": dense_call(where),
        "paged_attention, two launches": paged_call(where, 8),
        "paged_attention, one launch": paged_call(where, 0),
    }
    result: dict[str, Any] = {name: split(call, stub) for name, call in calls.items()}
    result["parts"] = parts(where)
    for name, costs in result.items():
        print(name)
        for part, cost in costs.items():
            print(f"  {part:<32}{cost:7.2f} us")
    if options.json:
        about = {} if stub else describe_device()
        about |= {"versions": package_versions(), "commit": options.commit or source_commit()}
        options.json.write_text(json.dumps({**about, "microseconds": result}, indent=1) + "\n")


if __name__ == "__main__":
    with torch.inference_mode():
        main()
