"""`flashcore bench dense`."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from flashcore.cli.results import choose, deliver, head, positive, read_result, refuse

if TYPE_CHECKING:
    from flashcore.bench.problems import DenseProblem
    from flashcore.bench.providers import Provider


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `flashcore bench dense` that are its own."""
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
        "--sample-ms",
        type=positive,
        default=5,
        metavar="T",
        help="length of one turn in milliseconds (default: 5)",
    )


def run(args: argparse.Namespace) -> int:
    """Carry the command out: 0 done, 1 nothing was timed, 2 it cannot run here."""
    from flashcore.bench.report import format_table, plot

    if args.from_json is not None:
        needed = {"device", "driver", "commit", "date", "rows", "summary", "skipped"}
        try:
            result = read_result(args.from_json, needed)
        except ValueError as error:
            return refuse(str(error))
        return deliver(args, result, format_table, plot)
    return _time(args)


def _time(args: argparse.Namespace) -> int:
    import torch

    from flashcore.bench.problems import dense_problems
    from flashcore.bench.providers import dense_providers
    from flashcore.bench.report import format_table, plot

    dtypes = ("bf16", "fp16") if args.dtype == "both" else (args.dtype,)
    problems = [p for dtype in dtypes for p in dense_problems(dtype) if args.only in p.name]
    if not problems:
        return refuse(f"no problem has {args.only!r} in its name")
    if not torch.cuda.is_available():
        return refuse("torch sees no CUDA device to time on")
    providers, missing = dense_providers()
    if args.providers:
        try:
            providers, missing = choose(args.providers, providers, missing)
        except KeyError as unknown:
            return refuse(f"unknown provider {unknown}")
    if not providers:
        return refuse(f"no provider can be used: {missing}")
    return deliver(args, _measure(args, problems, providers, missing), format_table, plot)


def _measure(
    args: argparse.Namespace,
    problems: list[DenseProblem],
    providers: list[Provider],
    missing: dict[str, str],
) -> dict[str, Any]:
    import torch

    from flashcore.bench.dense import host_overhead_us, run_dense
    from flashcore.bench.machine import read_clocks

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
        **head(args.commit),
        "clocks": {"before": idle, "during": measured["clocks"]},
        "host_us_per_launch": host_us,
        "skipped": skipped,
        "rows": measured["rows"],
        "summary": measured["summary"],
    }
