"""The wrong inputs of `tests/device_error_cases.py` on a machine without a GPU: CPU tensors pass
for its, and functions that do nothing for compiled ones. On a GPU: tests/gpu/test_errors_gpu.py."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest

from benchmarks.host_cost import launches_through
from tests.device_error_cases import ALSO, CASES, TABLE, Places, Wrong, case_id, refused, valid
from tests.pretend_gpu import no_gpu

PLACES = Places("cpu", "meta")


class NoKernels:
    def function(self, kernel: Any) -> Any:
        return lambda *arguments: None


@contextmanager
def kernels() -> Iterator[None]:
    with launches_through(NoKernels(), stub=True):
        yield


@no_gpu
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_the_argument_is_named(case: tuple[str, str, Wrong]) -> None:
    with kernels() if case[2].by_kernels else nullcontext():
        said = refused(case, PLACES)
    argument = case[1]
    assert re.search(rf"\b({ALSO.get(argument, argument)})\b", said), said
    assert "\n" not in said


@no_gpu
@pytest.mark.parametrize("name", TABLE)
def test_the_right_arguments_are_taken(name: str) -> None:
    """By all but the planner's and pager's launches, which say that there is no GPU."""
    function, arguments = valid(name, "cpu")
    expected = nullcontext()
    if ".update" in name:
        expected = pytest.raises(NotImplementedError, match="cpu runs torch operators")
    with kernels(), expected:
        function(**arguments)


def test_there_are_many() -> None:
    assert len(CASES) >= 60
    assert len({case_id(case) for case in CASES}) == len(CASES)
