"""`flashcore check`: compile what is missing, run every test, tell what it found; a verdict."""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from itertools import chain
from typing import TYPE_CHECKING, Any

from flashcore.cli.check import bits, dense, paged, plants, steps
from flashcore.cli.check.judge import Finding, SelfTest, Setting
from flashcore.cli.parser import device_name
from flashcore.cli.progress import ProgressBar

if TYPE_CHECKING:
    from flashcore.jit.cache import KernelCache
    from flashcore.jit.kernel import Kernel

_MOST_JOBS = 8  # processes; a compiler takes about 1 GiB


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `flashcore check` to its parser."""
    parser.description = (
        "Compare the library with its float64 reference on this machine: our kernels on a Hopper "
        "GPU, or torch operators on the CPU where there is none. Exit status 0: all right; 1: a "
        "test failed; 2: the device that was asked for cannot be tested."
    )
    parser.add_argument(
        "--device",
        type=device_name,
        help="which device (default: cuda if it runs our kernels, else cpu)",
    )
    parser.add_argument("--only", default="", metavar="TEXT", help="tests whose name has TEXT")
    parser.add_argument("--seed", type=int, default=0, help="of the random inputs (default: 0)")
    parser.add_argument(
        "--plant",
        choices=plants.PLANTS,
        help="run with a kernel that is wrong in this way: the check must fail",
    )


def all_tests() -> list[SelfTest]:
    return [*dense.tests(), *paged.tests(), *steps.tests(), *bits.tests()]


def run(args: argparse.Namespace) -> int:
    """Carry the command out."""
    tests = {test.name: test for test in all_tests() if args.only in test.name}
    if not tests:
        print(f"flashcore check: no test has {args.only!r} in its name", file=sys.stderr)
        return 2
    chosen, reason = _device(args.device)
    if chosen is None:
        print(f"flashcore check: no Hopper GPU to test: {reason}", file=sys.stderr)
        return 2
    setting = Setting(chosen, args.seed, chosen != "cpu")
    if args.plant and not (setting.kernels or plants.PLANTS[args.plant].anywhere):
        print(f"flashcore check: --plant {args.plant} needs a Hopper GPU", file=sys.stderr)
        return 2
    print(reason)
    import torch

    on_device = torch.cuda.device(torch.device(chosen)) if setting.kernels else nullcontext()
    with on_device:
        return _run(tests, setting, args.plant)


def _device(wanted: str | None) -> tuple[str | None, str]:
    """The device to test and a line about it; None and the reason where it cannot be."""
    try:
        import torch

        from flashcore.sm90.available import available

        if wanted is not None and torch.device(wanted).type == "cpu":
            return "cpu", "cpu: torch operators, as asked for; no kernel is tested"
        usable, reason = available(wanted or "cuda")
    except Exception as error:  # torch has several for a device that it does not know or have
        usable, reason = False, _first_line(error)
    if usable:
        return wanted or "cuda", reason
    if wanted is None:
        return "cpu", f"cpu: torch operators; no kernel is tested, since {reason}"
    return None, reason


def _run(tests: dict[str, SelfTest], setting: Setting, plant: str | None) -> int:
    import torch

    started = time.monotonic()
    gpus = torch.cuda.device_count() if setting.kernels else 0
    runnable, skipped = {}, []
    for name, test in tests.items():
        if test.least_gpus > gpus:
            skipped.append((name, f"needs {test.least_gpus} GPUs, here are {gpus}"))
        elif test.needs_kernels and not setting.kernels:
            skipped.append((name, "needs a Hopper GPU"))
        else:
            runnable[name] = test
    if setting.kernels:
        for name in _prepare(list(runnable.values()), setting):
            skipped.append((name, "its kernels are not here, nor is a compiler"))
            del runnable[name]
    failed, ran = [], 0
    with ExitStack() as stack:
        if plant is not None:
            stack.enter_context(plants.planted(plant, setting))
        for name, test in runnable.items():
            ran += 1
            if not _report(name, lambda test=test: test.judge(test.launch(setting))):  # type: ignore[misc]
                failed.append(name)
    for name, proof in () if plant else plants.proofs(runnable, setting):
        ran += 1
        if not _report(name, proof):
            failed.append(name)
    for name, reason in skipped:
        print(f"{'skipped':<9}{name:<40}{reason}")
    return _verdict(ran, failed, len(skipped), setting, time.monotonic() - started)


def _verdict(ran: int, failed: list[str], skipped: int, setting: Setting, seconds: float) -> int:
    what = "kernels" if setting.kernels else "torch operators on the CPU, no kernels"
    less = f", {skipped} skipped" if skipped else ""
    if failed:
        print(f"FAILED: {len(failed)} of {ran} tests{less}, in {seconds:.0f} s ({what}):")
        for name in failed:
            print(f"  {name}")
        return 1
    print(f"PASSED: {ran} tests{less}, in {seconds:.0f} s ({what})")
    return 0


def _prepare(tests: list[SelfTest], setting: Setting) -> list[str]:
    """Compile together what the tests will ask for and is not there; say where kernels are from.

    Returns the tests that cannot run, where there is no compiler or no place for what it makes.
    """
    from flashcore.cli.check.swap import kernels_of
    from flashcore.jit.build import compiler_installed
    from flashcore.jit.cache import shared_cache

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of graphs with nothing in them
        wanted = kernels_of(tests, setting)
    cache = shared_cache()
    origins = {k: cache.origin(k) for k in dict.fromkeys(chain.from_iterable(wanted.values()))}
    places = Counter(origin or "not compiled yet" for origin in origins.values())
    print(f"{len(origins)} kernels: " + ", ".join(f"{n} {where}" for where, n in places.items()))
    missing = [kernel for kernel, origin in origins.items() if origin is None]
    if missing and compiler_installed() and cache.no_folder is None:
        _compile(cache, missing)
        missing = []
    sys.stdout.flush()
    return [name for name, kernels in wanted.items() if not set(missing).isdisjoint(kernels)]


def _compile(cache: KernelCache, kernels: list[Kernel]) -> None:
    from flashcore.jit.gates import default_jobs
    from flashcore.jit.prebuild import Built, prebuild

    started, done = time.monotonic(), 0
    jobs = min(_MOST_JOBS, default_jobs())
    with ProgressBar("compile", len(kernels)) as bar:

        def advance(_: Built) -> None:
            nonlocal done
            done += 1
            bar.update(done)

        built = prebuild(kernels, cache.folder, cache.target, jobs, advance)
    broken = [b for b in built if b.error]
    for b in broken:
        print(f"failed to compile {b.kernel.describe()}: {b.error}", file=sys.stderr)
    print(
        f"{len(built) - len(broken)} kernels compiled in {time.monotonic() - started:.0f} s by "
        f"{jobs} processes"
    )


def _report(name: str, test: Callable[[], Finding]) -> bool:
    try:
        problem, detail = test()
    except Exception as error:  # a case that cannot run is a failed case, and the rest still runs
        problem, detail = f"{type(error).__name__}: {_first_line(error)}", ""
    verdict = "FAILED" if problem else "ok"
    print(f"{verdict:<9}{name:<40}{detail}{'  ' + problem if problem else ''}", flush=True)
    return not problem


def _first_line(error: Any) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
