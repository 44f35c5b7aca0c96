"""`flashcore compile`: fill the kernel cache ahead of time."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from flashcore.cli.progress import ProgressBar

if TYPE_CHECKING:
    from flashcore.runtime.cache import KernelCache
    from flashcore.runtime.kernel import Kernel


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `flashcore compile` to its parser."""
    parser.description = (
        "Compile every kernel that flashcore ships into the cache, so that no call waits for a "
        "compiler. Needs the CuTe DSL and a linker, and no GPU. The cache is FLASHCORE_CACHE_DIR, "
        "else flashcore in the user's cache folder."
    )
    parser.add_argument(
        "--jobs", type=_jobs, metavar="N", help="processes, 1 GiB each (default: one per CPU)"
    )
    parser.add_argument(
        "--list", action="store_true", help="show each kernel and whether it is in the cache"
    )
    parser.add_argument(
        "--gate",
        action="store_true",
        help="also read the machine code of each kernel and fail where it spills or serialises",
    )
    parser.add_argument(
        "--cache-dir", type=Path, metavar="DIR", help="another cache folder than the default"
    )


def run(args: argparse.Namespace) -> int:
    """Carry the command out: 0 done, 1 a kernel failed, 2 nothing could be done."""
    from flashcore.runtime.cache import KernelCache
    from flashcore.runtime.folder import UnsafeCacheError
    from flashcore.runtime.shipped import shipped_kernels
    from flashcore.runtime.target import MissingRuntimeError

    kernels = shipped_kernels()
    try:
        cache = KernelCache.open(args.cache_dir)
        if args.list:
            return _list(cache, kernels)
        if args.gate:
            return _gate(cache, kernels, args.jobs)
        return _compile(cache, kernels, args.jobs)
    except (MissingRuntimeError, UnsafeCacheError) as error:
        print(f"flashcore compile: {error}", file=sys.stderr)
        return 2


def _list(cache: KernelCache, kernels: list[Kernel]) -> int:
    for kernel in kernels:
        state = "cached " if cache.entry(kernel) else "missing"
        print(f"{state} {kernel.describe()}")
    return 0


def _compile(cache: KernelCache, kernels: list[Kernel], jobs: int | None) -> int:
    from flashcore.runtime.gates import default_jobs
    from flashcore.runtime.prebuild import Built, prebuild

    started = time.monotonic()
    done = 0
    with ProgressBar("compile", len(kernels)) as bar:

        def advance(_: Built) -> None:
            nonlocal done
            done += 1
            bar.update(done)

        built = prebuild(kernels, cache.folder, cache.target, jobs or default_jobs(), advance)
    for result in built:
        if result.error:
            print(f"failed {result.kernel.describe()}\n  {result.error}", file=sys.stderr)
    failed = sum(result.error is not None for result in built)
    fresh = sum(result.compiled for result in built)
    target = cache.target
    print(
        f"{fresh} compiled, {len(built) - fresh - failed} already there, {failed} failed in "
        f"{time.monotonic() - started:.1f} s: {cache.folder} "
        f"({target.arch}, CuTe DSL {target.dsl} {target.toolkit})"
    )
    return 1 if failed else 0


def _gate(cache: KernelCache, kernels: list[Kernel], jobs: int | None) -> int:
    from flashcore.runtime.gates import GateRow, check_kernels, default_jobs, format_table

    done = 0
    with ProgressBar("gate", len(kernels)) as bar:

        def advance(_: GateRow) -> None:
            nonlocal done
            done += 1
            bar.update(done)

        rows = check_kernels(kernels, cache.folder, cache.target, jobs or default_jobs(), advance)
    print(format_table(rows))
    return 1 if any(row.violations for row in rows) else 0


def _jobs(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number
