"""`tools/gpu_test_kernels.py`: what tests/gpu launches is known without a GPU."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from pathlib import Path

from flashcore.sm90.config.planner import PlannerConfig
from tests.gpu.launched import LAUNCHES, kernels_of_test

ROOT = Path(__file__).resolve().parents[1]


def noted(test: str) -> tuple[list[str], str]:
    """A line for each kernel, and what was said besides."""
    command = [sys.executable, "tools/gpu_test_kernels.py", "--list", f"tests/gpu/{test}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines(), done.stderr


def test_one_kernel_for_each_kind_of_bitmap() -> None:
    kinds = ("pager tokens", "pager tokens bitmap=bytes", "pager tokens bitmap=words")
    assert sorted(noted("test_device_pager_gpu.py::test_token_maps")[0]) == sorted(kinds)


def test_planner_attention_and_merge_of_both_plans() -> None:
    found, _ = noted("test_device_attention_gpu.py::test_rules[tree-8-1]")
    kinds = sorted((line.split()[0], "device_counts" in line.split()) for line in found)
    pairs = [(family, counts) for family in ("merge", "paged") for counts in (False, True)]
    assert kinds == [*pairs, ("planner", False), ("planner", False)]
    assert all("tree" in line.split() for line in found if line.startswith("paged"))


def test_something_is_said_of_every_test() -> None:
    """Their parameters are those that the tests have: each is asked with its own."""
    found, said = noted("")
    assert len(found) == len(set(found)) > 250
    assert "nothing is said of" not in said


def test_of_what_nothing_is_said_nothing_is_guessed() -> None:
    assert kernels_of_test("test_paged_gpu", "test_of_tomorrow", {}) is None
    assert kernels_of_test("test_of_tomorrow", "test_rules", {}) is None


def test_no_test_is_named_that_is_gone() -> None:
    for file, tests in LAUNCHES.items():
        text = (ROOT / "tests" / "gpu" / f"{file}.py").read_text()
        assert [test for test in tests if test and f"def {test}(" not in text] == []


def parameters_of(file: Path) -> dict[str, set[str]]:
    """Test -> names of its parameters and of its fixtures that have some, read from the text: what
    imports an engine cannot be collected without it."""
    functions = [n for n in ast.parse(file.read_text()).body if isinstance(n, ast.FunctionDef)]
    found: dict[str, set[str]] = {}
    several = set()  # fixtures
    for function in functions:
        names: set[str] = set()
        for decorator in function.decorator_list:
            called = ast.unparse(decorator).split("(")[0]
            if called == "pytest.mark.parametrize":
                assert isinstance(decorator, ast.Call)
                given = ast.literal_eval(decorator.args[0])
                names.update([given] if isinstance(given, str) else given)
            if called == "pytest.fixture" and "params=" in ast.unparse(decorator):
                several.add(function.name)
        found[function.name] = names
    for function in functions:
        found[function.name] |= several & {a.arg for a in function.args.args}
    return found


def test_what_is_said_takes_the_parameters_of_its_test() -> None:
    for file, tests in LAUNCHES.items():
        found = parameters_of(ROOT / "tests" / "gpu" / f"{file}.py")
        for test, parameters in found.items():
            if test.startswith("test_") and (launches := tests.get(test, tests.get(""))):
                inspect.signature(launches).bind(**dict.fromkeys(parameters))


def test_a_chain_of_its_own_for_very_many_sequences() -> None:
    found = kernels_of_test("test_device_plan_gpu", "test_very_many_sequences", {"rows": 57_344})
    assert PlannerConfig(57_344) in [kernel.config for kernel in found or ()]
