"""What `flashcore bench serve` does with engines besides timing them."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashcore.cli.results import positive

if TYPE_CHECKING:
    from flashcore.bench.serve.engine import EngineOptions
    from flashcore.bench.serve.pool import Survey
    from flashcore.bench.serve.workloads import Workload

Head = Callable[[argparse.Namespace], dict[str, Any]]
Write = Callable[[argparse.Namespace, dict[str, Any]], None]


def add_arguments(parser: argparse.ArgumentParser, other: Any) -> None:
    """Add the checks, of which one at most is asked for, and their options."""
    other.add_argument(
        "--logits",
        action="store_true",
        help="time nothing: compare the logits of 32 greedy steps between the backends, with "
        "weights that make attention matter",
    )
    other.add_argument(
        "--families",
        type=Path,
        metavar="DIR",
        help="time nothing: start every model DIR/NAME/config.json with each backend, many side by "
        "side, and compare log-probabilities",
    )
    other.add_argument(
        "--modes",
        action="store_true",
        help="time nothing: compare log-probabilities in SGLang's modes (HiCache, speculation, "
        "parallelism, torch.compile, ...); not with --engine vllm",
    )
    other.add_argument(
        "--soak",
        type=float,
        metavar="MINUTES",
        help="time nothing: mixed load for so long on the first backend; fails on an error, a "
        "value that is not finite, or growing memory",
    )
    other.add_argument(
        "--cycles",
        type=positive,
        metavar="N",
        help="time nothing: release memory (sleep), update weights, resume, pause and go on, N "
        "times; the tokens must stay the same",
    )
    other.add_argument(
        "--deterministic",
        action="store_true",
        help="the engine's deterministic mode: count the bits that differ between a prompt alone, "
        "in company, cached, and prefilled in other chunks and pages; then time each backend in it "
        "and without it",
    )
    add = parser.add_argument
    add(
        "--hicache",
        metavar="IO[:LAYOUT]",
        help="with --soak: a hierarchical cache with I/O by kernel or direct, evictions and loads "
        "counted; not with --engine vllm",
    )
    add("--only", metavar="A,B", help="with --families, --modes: only these")
    add(
        "--jobs",
        type=positive,
        default=6,
        metavar="N",
        help="with --families, --modes: engines at a time on a GPU (default: 6)",
    )
    add(
        "--gpus",
        type=positive,
        default=1,
        metavar="N",
        help="with --families, --modes: GPUs to use (default: 1)",
    )
    add(
        "--resume",
        action="store_true",
        help="with --families, --modes: keep the answers that an earlier run left in --log-dir",
    )


def asked(args: argparse.Namespace) -> bool:
    """Whether a check is to run instead of a measurement."""
    return (
        args.logits
        or args.modes
        or args.families is not None
        or args.soak is not None
        or args.cycles is not None
        or args.deterministic
    )


def gpus(args: argparse.Namespace, needed: int) -> int:
    """How many GPUs the command takes, one engine taking `needed`.

    Raises ValueError for options that do not belong together.
    """
    many = args.modes or args.families is not None
    if args.engine == "vllm":
        for name, given in (("--modes", args.modes), ("--hicache", args.hicache)):
            if given:
                raise ValueError(f"{name} goes with --engine sglang")
        if args.gpus > 1:
            raise ValueError(f"--gpus must be 1 with --engine vllm, got {args.gpus}")
    for name, given, fits in (
        ("--only", args.only, many),
        ("--resume", args.resume, many and args.log_dir is not None),
        ("--hicache", args.hicache, args.soak is not None),
    ):
        if given and not fits:
            raise ValueError(f"{name} goes with {_PARTNERS[name]}")
    if args.deadline is not None and not (args.small or asked(args)):
        raise ValueError("--deadline goes with --small, --families, --modes or --cycles")
    for name, given in (("--logits", args.logits), ("--deterministic", args.deterministic)):
        if args.deadline is not None and given:
            raise ValueError(f"--deadline does not go with {name}")
    if len(args.kv_cache_dtype) > 1 and asked(args):
        several = ",".join(args.kv_cache_dtype)
        raise ValueError(f"--kv-cache-dtype takes one dtype where engines are checked: {several}")
    if args.soak is not None:
        if not args.soak > 0:
            raise ValueError(f"--soak must be more than 0 minutes, got {args.soak}")
        if args.deadline is not None:
            raise ValueError("--deadline does not go with --soak, which takes as long as it says")
        if args.hicache is not None:
            from flashcore.bench.serve.soak import hicache_arguments

            hicache_arguments(args.hicache)
    return max(args.gpus, needed) if many else needed


_PARTNERS = {
    "--only": "--families or --modes",
    "--resume": "--families or --modes, and --log-dir",
    "--hicache": "--soak",
}


def run(
    args: argparse.Namespace,
    options: list[EngineOptions],
    workloads: list[Workload],
    head: Head,
    write: Write,
) -> int:
    """Carry out the check that is asked for: 0 passed, 1 failed, 2 it cannot run."""
    if args.soak is not None:
        result, text = _soak(args, options[0])
    elif args.logits:
        result, text = _logits(args, options)
    elif args.cycles is not None:
        result, text = _cycles(args, options[0], head, write)
    else:
        with tempfile.TemporaryDirectory(prefix="flashcore-serve-") as folder:
            logs = args.log_dir or Path(folder)
            if args.deterministic:
                result, text = _deterministic(args, options, workloads, logs, head, write)
            else:
                check = _modes if args.modes else _families
                result, text = check(args, options, logs, head, write)
    print(text)
    write(args, {**head(args), **result})
    return 0 if result["passed"] else 1


def _logits(args: argparse.Namespace, options: list[EngineOptions]) -> tuple[dict[str, Any], str]:
    from flashcore.bench.serve.logits import compare_backends, format_comparison

    result = compare_backends(options, log_dir=args.log_dir)
    return result, format_comparison(result)


def _soak(args: argparse.Namespace, options: EngineOptions) -> tuple[dict[str, Any], str]:
    from flashcore.bench.serve.soak import format_soak, run_soak

    result = run_soak(options, minutes=args.soak, log_dir=args.log_dir, hicache=args.hicache)
    return result, format_soak(result)


def _cycles(
    args: argparse.Namespace, options: EngineOptions, head: Head, write: Write
) -> tuple[dict[str, Any], str]:
    from flashcore.bench.serve.cycles import format_cycles, run_cycles
    from flashcore.bench.serve.deadline import Deadline

    about = head(args)
    result = run_cycles(
        options,
        args.cycles,
        deadline=Deadline(args.deadline),
        log_dir=args.log_dir,
        after=_tell,
        keep=lambda so_far: write(args, {**about, **so_far}),
    )
    return result, format_cycles(result)


def _families(
    args: argparse.Namespace, options: list[EngineOptions], logs: Path, head: Head, write: Write
) -> tuple[dict[str, Any], str]:
    from flashcore.bench.serve.families import find_families, format_families, run_families

    about = head(args)
    result = run_families(
        find_families(args.families, args.only.split(",") if args.only else None, args.engine),
        options[0],
        [one.backend for one in options],
        about["versions"].get(args.engine, "unknown"),
        _survey(args, logs, about, write),
    )
    return result, format_families(result)


def _modes(
    args: argparse.Namespace, options: list[EngineOptions], logs: Path, head: Head, write: Write
) -> tuple[dict[str, Any], str]:
    from flashcore.bench.serve.modes import find_modes, format_modes, run_modes

    about = head(args)
    result = run_modes(
        find_modes(args.only.split(",") if args.only else None, args.gpus),
        replace(options[0], max_total_tokens=None),
        [one.backend for one in options],
        about["versions"].get("sglang", "unknown"),
        _survey(args, logs, about, write),
    )
    return result, format_modes(result)


def _deterministic(
    args: argparse.Namespace,
    options: list[EngineOptions],
    workloads: list[Workload],
    logs: Path,
    head: Head,
    write: Write,
) -> tuple[dict[str, Any], str]:
    from flashcore.bench.serve.deterministic import format_deterministic, run_bits, summarise_cost
    from flashcore.bench.serve.suite import Turns, run_serve

    about = head(args)
    result = run_bits(
        options[0], [one.backend for one in options], _survey(args, logs, about, write)
    )

    def whole(measured: dict[str, Any]) -> dict[str, Any]:
        return {**result, **measured, "summary": summarise_cost(measured["rows"])}

    measured = run_serve(
        workloads,
        [*(replace(o, deterministic=True, label="deterministic") for o in options), *options],
        Turns(args.repeats or 3, args.rounds, args.together),
        log_dir=args.log_dir,
        after=_tell,
        keep=lambda measured: write(args, {**about, **whole(measured)}),
    )
    return whole(measured), format_deterministic(whole(measured))


def _survey(args: argparse.Namespace, logs: Path, about: dict[str, Any], write: Write) -> Survey:
    from flashcore.bench.serve.deadline import Deadline
    from flashcore.bench.serve.pool import Places, Survey, read_answers

    return Survey(
        Places(args.gpus, args.jobs, args.base_gpu),
        Deadline(args.deadline),
        logs,
        read_answers(logs) if args.resume else {},
        after=_tell,
        keep=lambda so_far: write(args, {**about, **so_far}),
    )


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
