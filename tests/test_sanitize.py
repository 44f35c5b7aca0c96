"""The cases that `make sanitize-gpu` takes are tests that there are."""

from __future__ import annotations

import subprocess
import sys

from tools.sanitize import CASES, ROOT


def test_every_case_is_a_test() -> None:
    files = [f"tests/gpu/test_{name}_gpu.py" for name in CASES]
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "-o", "addopts=", *files], cwd=ROOT, capture_output=True, text=True, check=True
    )
    wanted = {
        f"{file}::{test}"
        for file, tests in zip(files, CASES.values(), strict=True)
        for test in tests
    }
    assert wanted - set(done.stdout.splitlines()) == set()
