"""What the README says: its tables are those of the measured files, its example runs."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_tables_are_what_the_result_files_say():
    spec = importlib.util.spec_from_file_location("report", ROOT / "benchmarks" / "report.py")
    report = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(report)
    for name, (file, _) in report.TABLES.items():
        assert (ROOT / "benchmarks" / "results" / file).exists(), file
        assert f"<!-- table: {name} -->\n| " in README
    assert report.filled(README) == README


def test_the_example_runs():
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert blocks
    scope: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), scope)
    assert isinstance(scope["out"], torch.Tensor)
    assert bool(torch.isfinite(scope["out"]).all())


def test_every_linked_file_exists():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target
