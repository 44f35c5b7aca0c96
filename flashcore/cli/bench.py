"""`flashcore bench SUITE`: time our kernels beside every installed peer."""

from __future__ import annotations

import argparse
from pathlib import Path

from flashcore.cli.files import prepare_output
from flashcore.cli.results import positive, refuse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the suites of `flashcore bench` and their options to its parser."""
    from flashcore.cli import bench_dense, bench_paged, bench_serve

    parser.description = "Time flashcore and each installed peer on this GPU."
    suites = parser.add_subparsers(dest="suite", required=True, metavar="SUITE")
    for name, module, summary in (
        ("dense", bench_dense, "dense attention, in TFLOP/s"),
        ("paged", bench_paged, "paged attention over shared prefixes, beside the time to read it"),
    ):
        sub = suites.add_parser(name, help=summary)
        add_common_arguments(sub)
        module.add_arguments(sub)
        sub.set_defaults(run_suite=module.run)
    bench_serve.add_arguments(suites.add_parser("serve", help="SGLang, backend by backend"))


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that every suite has."""
    parser.add_argument(
        "--rounds", type=positive, default=30, metavar="N", help="turns of each (default: 30)"
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
        from flashcore.cli import bench_serve

        return bench_serve.run(args)
    try:
        for name, path in (("--json", args.json), ("--plot", args.plot)):
            prepare_output(name, path, [args.from_json])
        return int(args.run_suite(args))
    except ValueError as error:
        return refuse(str(error))
