"""Compile what tests/gpu launches, ahead and side by side; needs the CuTe DSL and no GPU:

    python tools/gpu_test_kernels.py [--list] [--jobs N] [--cache-dir FOLDER] [TEST ...]

The tests are collected, not run: tests/gpu/launched.py says which kernels each of them launches
with its parameters. A kernel that is missed there is compiled when its test asks for it.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import inspect
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)] if str(ROOT) not in sys.path else []

from flashcore.jit.cache import KernelCache  # noqa: E402
from flashcore.jit.gates import default_jobs  # noqa: E402
from flashcore.jit.kernel import Kernel  # noqa: E402
from flashcore.jit.prebuild import prebuild  # noqa: E402

PYTEST = ("--collect-only", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-W", "ignore")


class Collected:
    """A pytest plugin that keeps what is collected."""

    def __init__(self) -> None:
        self.items: list[pytest.Function] = []

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.items = [item for item in session.items if isinstance(item, pytest.Function)]


def collected(tests: list[str]) -> list[pytest.Function]:
    """These tests, with their parameters; SystemExit where they cannot be collected."""
    if importlib.util.find_spec("sglang") is not None:
        from tests.sglang import standins

        standins.install()  # of what SGLang wants to import and a machine without a GPU lacks
    found = Collected()
    with contextlib.redirect_stdout(sys.stderr):
        places = [str(ROOT / test) for test in tests]
        status = pytest.main([*PYTEST, "--rootdir", str(ROOT), *places], plugins=[found])
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        raise SystemExit(int(status))
    return found.items


def kernels(tests: list[str]) -> tuple[list[Kernel], list[str]]:
    """What these tests launch, and those of which nothing is said."""
    from tests.gpu.launched import kernels_of_test

    found: dict[Kernel, None] = {}
    unknown: dict[str, None] = {}
    for item in collected(tests):
        test, file = item.function.__name__, item.path.stem
        given: dict[str, Any] = item.callspec.params if hasattr(item, "callspec") else {}
        taken = inspect.signature(item.function).parameters.keys()  # not those of fixtures
        of_test = kernels_of_test(file, test, {n: given[n] for n in given if n in taken})
        if of_test is None:
            unknown[f"{file}.{test}"] = None
        found.update(dict.fromkeys(of_test or ()))
    return list(found), list(unknown)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--list", action="store_true", help="print the kernels, compile nothing")
    parser.add_argument("--jobs", type=int, help="processes (default: one per CPU)")
    parser.add_argument("--cache-dir", type=Path, help="another cache folder than the default")
    parser.add_argument("tests", nargs="*", default=["tests/gpu"])
    args = parser.parse_args()
    wanted, unknown = kernels(args.tests)
    for name in unknown:
        print(f"nothing is said of {name}", file=sys.stderr)
    if args.list:
        print("\n".join(kernel.describe() for kernel in wanted))
        return 0
    opened = KernelCache.open(args.cache_dir)
    built = prebuild(wanted, opened.folder, opened.target, args.jobs or default_jobs())
    for failed in (b for b in built if b.error):
        print(f"failed {failed.kernel.describe()}\n  {failed.error}", file=sys.stderr)
    print(f"{len(built)} kernels, {sum(b.compiled for b in built)} compiled now")
    return int(any(b.error for b in built))


if __name__ == "__main__":
    sys.exit(main())
