"""`flashcore bench`: time our kernels beside every installed peer."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashcore.cli import bench_serve

if TYPE_CHECKING:
    from flashcore.bench.problems import DenseProblem
    from flashcore.bench.providers import Provider


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `flashcore bench` to its parser."""
    suites = parser.add_subparsers(dest="suite", required=True, metavar="SUITE")
    _add_dense_arguments(suites.add_parser("dense", help="dense attention, kernel by kernel"))
    bench_serve.add_arguments(suites.add_parser("serve", help="SGLang, backend by backend"))


def _add_dense_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Time dense attention on this GPU: flashcore and each installed peer (FlashAttention-3 "
        "through fa3-fwd or sglang-kernel, FlashAttention-4, cuDNN and FlashAttention-2 through "
        "torch), in turns on the same tensors. Prints a table of TFLOP/s."
    )
    parser.add_argument(
        "--dtype", choices=["bf16", "fp16", "both"], default="bf16", help="(default: bf16)"
    )
    parser.add_argument("--only", default="", metavar="TEXT", help="problems whose name has TEXT")
    parser.add_argument(
        "--providers",
        metavar="A,B",
        help="only these of flashcore, fa3_fwd, sgl_kernel, fa4, cudnn, fa2",
    )
    parser.add_argument(
        "--rounds", type=_positive, default=30, metavar="N", help="turns of each (default: 30)"
    )
    parser.add_argument(
        "--sample-ms",
        type=_positive,
        default=5,
        metavar="T",
        help="length of one turn in milliseconds (default: 5)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result as JSON")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw it; needs matplotlib")
    parser.add_argument(
        "--from-json",
        type=Path,
        metavar="FILE",
        help="time nothing: print and plot a result that --json wrote, on any machine",
    )
    parser.add_argument("--commit", help="commit to record where the package is no git checkout")


def run(args: argparse.Namespace) -> int:
    """Carry the command out: 0 done, 1 nothing was timed, 2 it cannot run here."""
    if args.suite == "serve":
        return bench_serve.run(args)
    for name, path in (("--json", args.json), ("--plot", args.plot)):
        if path is not None and not path.absolute().parent.is_dir():
            return _refuse(f"{name} {path}: there is no folder {path.absolute().parent}")
    if args.from_json is not None:
        return _redraw(args)
    return _time(args)


def _redraw(args: argparse.Namespace) -> int:
    try:
        result = json.loads(args.from_json.read_text())
    except (OSError, ValueError) as error:
        return _refuse(f"--from-json {args.from_json}: {error}")
    needed = {"device", "driver", "commit", "date", "rows", "summary", "skipped"}
    absent = needed - set(result if isinstance(result, dict) else ())
    if absent:
        return _refuse(f"--from-json {args.from_json}: it has no {', '.join(sorted(absent))}")
    return _deliver(args, result)


def _time(args: argparse.Namespace) -> int:
    import torch

    from flashcore.bench.problems import dense_problems
    from flashcore.bench.providers import dense_providers

    dtypes = ("bf16", "fp16") if args.dtype == "both" else (args.dtype,)
    problems = [p for dtype in dtypes for p in dense_problems(dtype) if args.only in p.name]
    if not problems:
        return _refuse(f"no problem has {args.only!r} in its name")
    if not torch.cuda.is_available():
        return _refuse("torch sees no CUDA device to time on")
    providers, missing = dense_providers()
    if args.providers:
        wanted = args.providers.split(",")
        unknown = [n for n in wanted if n not in missing and n not in {p.name for p in providers}]
        if unknown:
            return _refuse(f"unknown provider {unknown[0]!r}")
        providers = [provider for provider in providers if provider.name in wanted]
        missing = {name: why for name, why in missing.items() if name in wanted}
    if not providers:
        return _refuse(f"no provider can be used: {missing}")
    result = _measure(args, problems, providers, missing)
    return _deliver(args, result)


def _measure(
    args: argparse.Namespace,
    problems: list[DenseProblem],
    providers: list[Provider],
    missing: dict[str, str],
) -> dict[str, Any]:
    import torch

    from flashcore.bench.dense import host_overhead_us, run_dense
    from flashcore.bench.machine import (
        describe_device,
        package_versions,
        read_clocks,
        source_commit,
    )

    idle = read_clocks()
    with torch.inference_mode():
        measured = run_dense(
            problems,
            providers,
            rounds=args.rounds,
            sample_ms=args.sample_ms,
            on_problem=lambda name: print(f"timing {name}", file=sys.stderr, flush=True),
        )
        host_us = {p.name: host_overhead_us(p) for p in providers if p.kernel == "flashcore"}
    skipped = [f"{name}: {why}" for name, why in missing.items()] + measured["skipped"]
    return {
        **describe_device(),
        "clocks": {"before": idle, "during": measured["clocks"]},
        "versions": package_versions(),
        "commit": args.commit or source_commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        # Folders are the machine's own business.
        "command": shlex.join(["flashcore", *(Path(word).name for word in sys.argv[1:])]),
        "host_us_per_launch": host_us,
        "skipped": skipped,
        "rows": measured["rows"],
        "summary": measured["summary"],
    }


def _deliver(args: argparse.Namespace, result: dict[str, Any]) -> int:
    from flashcore.bench.report import format_table, plot

    print(f"{result['device']}, driver {result['driver']}, commit {result['commit']}")
    print(format_table(result))
    if args.json is not None:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    if args.plot is not None:
        try:
            plot(result, args.plot)
        except ImportError:
            return _refuse("--plot needs matplotlib: pip install 'flashcore-attention[bench]'")
    return 0 if result["rows"] else 1


def _refuse(message: str) -> int:
    print(f"flashcore bench: {message}", file=sys.stderr)
    return 2


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number
