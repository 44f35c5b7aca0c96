"""The store's Triton kernel in Triton's interpreter, where Triton is: a CPU has none of torch's."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
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


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton here")
def test_every_case_in_the_interpreter() -> None:
    paths = [str(ROOT), *sys.path]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert int(done.stdout) > 50
