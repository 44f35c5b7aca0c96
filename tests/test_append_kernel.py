"""The store's Triton kernel without a GPU, where Triton is: in its interpreter, and compiled for a
GPU by a driver that launches nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# What the interpreter has of its own for fp8 rounds up where it must carry; torch does the casts.
SCRIPT = """
import numpy as np, torch, triton.runtime.interpreter as interpreter
from flashcore import append_kernel
from flashcore.problem import KVPool
from tests.append_cases import cases, differences, expected, pool, scales_of, slots_of, values

DTYPES = {
    "fp8e4nv": torch.float8_e4m3fn, "fp8e5": torch.float8_e5m2, "fp32": torch.float32,
    "bf16": torch.bfloat16, "fp16": torch.float16,
}

def cast(data, source, target, rounding):
    bits = np.frombuffer(data.tobytes(), dtype=f"int{source.primitive_bitwidth}").copy()
    x = torch.from_numpy(bits.reshape(data.shape)).view(DTYPES[source.name])
    return x.to(DTYPES[target.name]).view(getattr(torch, f"int{target.primitive_bitwidth}")).numpy()

interpreter._convert_float = cast
for case in cases():
    k, v = values(case, "cpu")
    pages, scales = pool(case, "cpu"), scales_of(case, "cpu")
    slots = slots_of(case, pages[0].shape[0] * case.page_tokens, "cpu")
    wanted = expected(k, v, pages, slots, scales)
    append_kernel.scatter(k, v, KVPool(*pages, **scales), slots)
    append_kernel._compiled.clear()
    for actual, right in zip(pages, wanted):
        assert differences(actual, right) == [], case
print(len(cases()))
"""


# Every call of a few cases: the compiled kernel that is remembered for it must be the one that
# Triton itself would take for its arguments, addresses and strides.
REMEMBERED = """
from dataclasses import replace
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import compute_cache_key

class Driver:
    class utils:
        load_binary = staticmethod(lambda *_: (1, 2, 32, 0, 1024))
        get_device_properties = staticmethod(lambda _: {"max_shared_mem": 232448})

    launcher_cls = staticmethod(lambda source, metadata: lambda *arguments: launched.append(source))
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda _: 0)
    map_python_to_cpp_type = staticmethod(lambda kind: kind)

launched = []
driver.set_active(Driver())
from flashcore import append_kernel
from flashcore.problem import KVPool
from tests.append_cases import cases, pool, scales_of, slots_of, values

class Remembered(dict):
    def get(self, key):
        found = super().get(key)
        return None if found is None else Watched(found)

class Watched:
    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        def run(*arguments):
            known, keys, _, _, binder = append_kernel._scatter.device_caches[0]
            _, specialization, options = binder(*arguments, debug=True, instrumentation_mode="")
            assert known.get(compute_cache_key(keys, specialization, options)) is self.kernel
            again.append(arguments)
            self.kernel[grid](*arguments)
        return run

again, calls = [], 0
append_kernel._compiled = Remembered()
for case in cases()[::6]:
    for tokens in (1, 2, 5, 33):
        case = replace(case, tokens=tokens)
        k, v = values(case, "cpu")
        pages, scales = pool(case, "cpu"), scales_of(case, "cpu")
        slots = slots_of(case, pages[0].shape[0] * case.page_tokens, "cpu").contiguous()
        wide = torch.zeros(tokens, case.heads, case.dim + 1, dtype=k.dtype)  # rows in odd places
        for keys in (k, wide[..., :-1], wide[..., 1:]):
            for here in (slots, torch.cat([slots, slots])[1 : 1 + tokens], slots.int()):
                append_kernel.scatter(keys, v, KVPool(*pages, **scales), here)
                calls += 1
assert len(launched) == calls, "one launch for each call"
print(len(again))
"""

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="no Triton here")


def run(script: str, **environment: str) -> int:
    """What the script prints, a number, in a process of its own."""
    paths = os.pathsep.join([str(ROOT), *sys.path])
    command = [sys.executable, "-c", script]
    variables = os.environ | {"PYTHONPATH": paths, **environment}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return int(done.stdout)


@needs_triton
def test_every_case_in_the_interpreter() -> None:
    assert run(SCRIPT, TRITON_INTERPRET="1") > 50


@needs_triton
def test_what_is_remembered_is_what_triton_would_take(tmp_path: Path) -> None:
    assert run(REMEMBERED, TRITON_CACHE_DIR=str(tmp_path)) > 50
