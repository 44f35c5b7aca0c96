"""`tools/gpu_test_kernels.py`: what tests/gpu launches is known without a GPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def noted(test: str) -> list[str]:
    command = [sys.executable, "tools/gpu_test_kernels.py", "--list", f"tests/gpu/{test}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_one_kernel_for_each_kind_of_bitmap() -> None:
    kinds = ("pager tokens", "pager tokens bitmap=bytes", "pager tokens bitmap=words")
    assert sorted(noted("test_device_pager_gpu.py::test_token_maps")) == sorted(kinds)


def test_planner_attention_and_merge_of_both_plans() -> None:
    found = noted("test_device_attention_gpu.py::test_rules[tree-8-1]")
    kinds = sorted((line.split()[0], "device_counts" in line.split()) for line in found)
    pairs = [(family, counts) for family in ("merge", "paged") for counts in (False, True)]
    assert kinds == [*pairs, ("planner", False)]
    assert all("tree" in line.split() for line in found if line.startswith("paged"))
