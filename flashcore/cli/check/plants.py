"""Wrong kernels, put in the place of right ones to see that a check would find them.

Each is as wrong as a slip in a kernel makes it: results look like attention and are not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from flashcore.cli.check.judge import Finding, SelfTest, Setting
from flashcore.cli.check.swap import functions_from
from flashcore.contract.operands import Dense, Paged
from flashcore.jit.kernel import Kernel

ATTENTION: dict[str, Any] = {"dense": Dense, "paged": Paged}
_DECODE = "paged, decode on a shared prefix"


@dataclass(frozen=True)
class Plant:
    """wrong: of a family's name and the right function, the wrong one; None: that one is right.
    found_by: tests that must fail."""

    what: str
    wrong: Callable[[str, Any], Any]
    found_by: tuple[str, ...]
    anywhere: bool = False  # torch operators have it too


def _scale(family: str, right: Any) -> Any:
    """Scores 2 % too large."""
    operands = ATTENTION.get(family)
    if operands is None:
        return None

    def wrong(*arguments: Any) -> None:
        given = operands(*arguments)
        right(*given._replace(softmax_scale=given.softmax_scale * 1.02))

    return wrong


def _window(family: str, right: Any) -> Any:
    """The left bound one key too near."""
    operands = ATTENTION.get(family)
    if operands is None:
        return None

    def wrong(*arguments: Any) -> None:
        given = operands(*arguments)
        left = given.window_left
        right(*given._replace(window_left=left - (left > 0)))

    return wrong


def _merge(family: str, right: Any) -> Any:
    """Partial results that add up to 1.01."""
    if family != "merge":
        return None

    def wrong(out: Any, *arguments: Any) -> None:
        right(out, *arguments)
        out.mul_(1.01)

    return wrong


def _company(family: str, right: Any) -> Any:
    """Sums whose order, and so whose last bits, depend on how many rows there are."""
    if family != "merge":
        return None

    def wrong(out: Any, *arguments: Any) -> None:
        right(out, *arguments)
        if len(out) > 4:
            out.mul_(1.01)

    return wrong


def _planner(family: str, right: Any) -> Any:
    """Sequences planned without their last token."""
    if family != "planner":
        return None

    def wrong(table: Any, seq_lens: Any, *arguments: Any) -> None:
        shorter = None if seq_lens is None else seq_lens - (seq_lens > 64).int()
        right(table, shorter, *arguments)

    return wrong


def _race(family: str, right: Any) -> Any:
    """Every second call has another value somewhere."""
    if family != "dense":
        return None
    calls = [0]

    def wrong(*arguments: Any) -> None:
        right(*arguments)
        calls[0] += 1
        if calls[0] % 2:
            Dense(*arguments).out.view(-1)[:1].add_(0.01)

    return wrong


PLANTS = {
    "scale": Plant("scores scaled by 1.02", _scale, ("dense, bf16 128 causal", _DECODE), True),
    "window": Plant("a window one key short", _window, ("paged, sinks and window",)),
    "merge": Plant("weights that add up to 1.01", _merge, (_DECODE,)),
    "planner": Plant("plans without the last token", _planner, (_DECODE,)),
    "race": Plant("bits that change from run to run", _race, ("dense, bf16 128 causal",)),
    "company": Plant("bits that depend on the batch", _company, ("batch invariance",)),
}


@contextmanager
def planted(name: str, setting: Setting) -> Iterator[None]:
    """Calls run with that wrong kernel."""
    plant = PLANTS[name]
    if not setting.kernels:
        with _wrong_operators():
            yield
        return
    from flashcore.jit.cache import shared_cache

    def wrap(kernel: Kernel, right: Any) -> Any:
        return plant.wrong(kernel.family.name, right) or right

    with functions_from(wrap, shared_cache()):
        yield


@contextmanager
def _wrong_operators() -> Iterator[None]:
    """The torch path with scores that are 2 % too large."""
    from flashcore import api

    names = ("dense_attention", "eager_paged_attention")
    right = {name: getattr(api, name) for name in names}

    def wrong(function: Any) -> Any:
        def call(*arguments: Any) -> Any:
            changed = [
                a._replace(scale=1.02 * a.scale) if hasattr(a, "window_left") else a
                for a in arguments
            ]
            return function(*changed)

        return call

    try:
        for name, function in right.items():
            setattr(api, name, wrong(function))
        yield
    finally:
        for name, function in right.items():
            setattr(api, name, function)


def proofs(
    tests: dict[str, SelfTest], setting: Setting
) -> Iterator[tuple[str, Callable[[], Finding]]]:
    """For each plant that the setting can have: a line's name, and whether it is found."""
    for name, plant in PLANTS.items():
        if not setting.kernels and not plant.anywhere:
            continue
        for test in plant.found_by:
            if test in tests:
                yield (
                    f"finds {plant.what}",
                    lambda name=name, test=tests[test]: _proof(name, test, setting),  # type: ignore[misc]
                )


def _proof(name: str, test: SelfTest, setting: Setting) -> Finding:
    with planted(name, setting):
        problem, _ = test.judge(test.launch(setting))
    if not problem:
        return Finding(f"{test.name!r} did not find it")
    return Finding("", f"{test.name}: {problem}")
