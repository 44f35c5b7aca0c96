"""`flashcore compile`: fill the kernel cache ahead of time."""

from __future__ import annotations

import argparse
import re
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from flashcore.cli.progress import ProgressBar
from flashcore.sm90.config.dense import DTYPES
from flashcore.sm90.config.paged import KV_DTYPES, PAGE_TOKENS

if TYPE_CHECKING:
    from flashcore.jit.cache import KernelCache
    from flashcore.jit.kernel import Kernel

KV_CACHE_DTYPES = {f"fp8_{name}": name for name in KV_DTYPES}  # as engines call them
FEATURES = ("windowed", "softcap", "sinks", "tree")


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
        "--serve",
        metavar="Q/KVxDIM[/VDIM]",
        type=_layers,
        help="instead of all: what SGLang's backend needs for layers of this shape as one GPU sees "
        "them, such as 32/8x128, or 16/4x192/128 where V has fewer columns",
    )
    parser.add_argument(
        "--page-size",
        type=int,
        choices=PAGE_TOKENS,
        default=64,
        help="with --serve (default: 64)",
    )
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="with --serve")
    parser.add_argument(
        "--kv-cache-dtype",
        choices=["auto", *KV_CACHE_DTYPES],
        default="auto",
        help="with --serve (default: auto, as --dtype)",
    )
    parser.add_argument(
        "--features",
        metavar="NAMES",
        type=_features,
        default=(),
        help=f"with --serve: of the layers, separated by commas, from {', '.join(FEATURES)}; tree "
        "is speculative decoding with trees",
    )
    parser.add_argument(
        "--batch-invariant",
        action="store_true",
        help="with --serve: for an engine in its deterministic mode",
    )
    parser.add_argument(
        "--prune",
        action="store_true",
        help="compile nothing: remove from the cache what this installation cannot use, such as "
        "kernels of other versions",
    )
    parser.add_argument(
        "--cache-dir", type=Path, metavar="DIR", help="another cache folder than the default"
    )


def run(args: argparse.Namespace) -> int:
    """Carry the command out: 0 done, 1 a kernel failed, 2 nothing could be done."""
    from flashcore.jit.cache import KernelCache
    from flashcore.jit.folder import UnsafeCacheError
    from flashcore.jit.target import MissingRuntimeError
    from flashcore.sm90.shipped import shipped_kernels

    try:
        kernels = shipped_kernels() if args.serve is None else _served_kernels(args)
        cache = KernelCache.open(args.cache_dir)
        if args.prune:
            return _prune(cache)
        if args.list:
            return _list(cache, kernels)
        if args.gate:
            return _gate(cache, kernels, args.jobs)
        return _compile(cache, kernels, args.jobs)
    except (MissingRuntimeError, UnsafeCacheError, ValueError) as error:
        print(f"flashcore compile: {error}", file=sys.stderr)
        return 2


def _served_kernels(args: argparse.Namespace) -> list[Kernel]:
    from flashcore.serving.kernels import Kind, Variant, kernels_of
    from flashcore.serving.shapes import Shape

    has = args.features
    variant = Variant(softcap="softcap" in has, sinks="sinks" in has)
    kind = Kind(Shape(*args.serve), "windowed" in has, (variant,))
    return kernels_of(
        *(kind, args.dtype, args.page_size),
        tree="tree" in has,
        batch_invariant=args.batch_invariant,
        kv_dtype=KV_CACHE_DTYPES.get(args.kv_cache_dtype, ""),
    )


def _prune(cache: KernelCache) -> int:
    from flashcore.jit.prune import prune
    from flashcore.sm90.families import FAMILIES

    done = prune(cache.folder, FAMILIES, cache.target)
    print(
        f"kernels removed: {done.kernels} ({done.bytes / 2**20:.1f} MiB), kept: {done.kept}, in "
        f"{cache.folder}"
    )
    return 0


def _list(cache: KernelCache, kernels: list[Kernel]) -> int:
    for kernel in kernels:
        state = "cached " if cache.entry(kernel) else "missing"
        print(f"{state} {kernel.describe()}")
    return 0


def _compile(cache: KernelCache, kernels: list[Kernel], jobs: int | None) -> int:
    from flashcore.jit.gates import default_jobs
    from flashcore.jit.prebuild import Built, prebuild

    started = time.monotonic()
    there = [kernel for kernel in kernels if cache.packaged and cache.packaged.entry(kernel)]
    kernels = [kernel for kernel in kernels if kernel not in there]
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
        f"{fresh} compiled, {len(there) + len(built) - fresh - failed} already there, {failed} "
        "failed in "
        f"{time.monotonic() - started:.1f} s: {cache.folder} "
        f"({target.arch}, CuTe DSL {target.dsl} {target.toolkit})"
    )
    return 1 if failed else 0


def _gate(cache: KernelCache, kernels: list[Kernel], jobs: int | None) -> int:
    from flashcore.jit.gates import GateRow, check_kernels, default_jobs, format_table

    done = 0
    with ProgressBar("gate", len(kernels)) as bar:

        def advance(_: GateRow) -> None:
            nonlocal done
            done += 1
            bar.update(done)

        rows = check_kernels(kernels, cache.folder, cache.target, jobs or default_jobs(), advance)
    print(format_table(rows))
    return 1 if any(row.violations for row in rows) else 0


def _layers(text: str) -> tuple[int, int, int, int]:
    """32/8x128 or 16/4x192/128: query heads, KV heads, head_dim, v_head_dim."""
    found = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)x([1-9]\d*)(?:/([1-9]\d*))?", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"must look like 32/8x128 or 16/4x192/128, got {text}")
    q_heads, kv_heads, head_dim = (int(number) for number in found.groups()[:3])
    if q_heads % kv_heads:
        raise argparse.ArgumentTypeError(f"{q_heads} is not a multiple of {kv_heads}")
    return q_heads, kv_heads, head_dim, int(found[4] or head_dim)


def _features(text: str) -> tuple[str, ...]:
    names = tuple(name for name in text.split(",") if name)
    for name in names:
        if name not in FEATURES:
            raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(FEATURES)}")
    return names


def _jobs(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number
