"""The page tables' Triton kernel in Triton's interpreter, where Triton is, beside torch."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

SCRIPT = """
import torch
from flashcore.serving import page_table_kernel, page_tables
from flashcore.serving.page_tables import PageTables, Slots

generator = torch.Generator().manual_seed(0)
def numbers(low, high, *shape):
    return torch.randint(low, high, shape, generator=generator)

for trial in range(60):
    page_tokens, window = (1, 16, 64)[trial % 3], (-1, 0, 40, 1500)[trial % 4]
    align = (1, 1024 // page_tokens)[trial % 2]
    table, translation = numbers(0, 1 << 12, 9, 4096).int(), None
    if trial % 5 == 0:
        table[:, :700] = -1  # given back
    elif trial % 7 == 0:
        translation = torch.randperm(1 << 12, generator=generator)
    lengths = numbers(1, 4000, 5)
    new = torch.minimum(numbers(1, 300, 5), lengths).int()
    rows = torch.randperm(9, generator=generator)[:5]
    slots = Slots(table, rows, lengths, new, 0, 4)
    found, wanted = (PageTables.empty(5, 4096 // page_tokens + 2, "cpu") for _ in range(2))
    for tables in (found, wanted):
        tables.pages.fill_(-7)
    page_tables.fill(wanted, slots, page_tokens, window, translation, align)
    page_table_kernel._compiled.clear()
    page_table_kernel.fill_tables(found, slots, page_tokens, window, translation, align)
    for name in ("pages", "seq_lens", "q_lens"):
        assert torch.equal(getattr(found, name), getattr(wanted, name)), (trial, name)
    assert int(wanted.pages[:4].max()) >= 0
print("done")
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton here")
def test_tables_are_those_of_the_torch_path() -> None:
    paths = [str(ROOT), *sys.path]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.strip() == "done"
