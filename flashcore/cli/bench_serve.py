"""`flashcore bench serve`: SGLang's engine with one attention backend beside another."""

from __future__ import annotations

import argparse
import json
import shlex
import signal
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashcore.bench.serve.shapes import DEFAULT_SHAPE, SHAPES
from flashcore.cli.bench import positive, read_result, refuse

if TYPE_CHECKING:
    from flashcore.bench.serve.engine import EngineOptions
    from flashcore.bench.serve.shapes import ModelShape
    from flashcore.bench.serve.workloads import Workload

DEFAULT_WORKLOADS = "shared-16k,shared-4k,context-128k,rollout,nothing-shared,ttft-32k"
_HEAD = {"device", "driver", "commit", "date", "rows", "summary", "skipped"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `flashcore bench serve` to its parser."""
    parser.description = (
        "Time serving: start SGLang's engine with a model of made-up weights once for each "
        "attention backend, run workloads on it, print tokens/s, time of a decode step and time "
        "to the first token. Decode figures cover the time in which all sequences are decoding."
    )
    add = parser.add_argument
    add(
        "--backends",
        metavar="A,B",
        help="(default: flashcore,fa3; with --logits flashcore,fa3,triton; with --soak flashcore)",
    )
    add(
        "--workloads",
        default=DEFAULT_WORKLOADS,
        metavar="A,B",
        help="names, or [MODEL/][GROUPS*]SEQUENCESxPREFIX+UNIQUE:OUTPUT in tokens, such as "
        f"64x16384+512:128 (default: {DEFAULT_WORKLOADS}; further names: headline-1b, headline-3b)",
    )
    add(
        "--model-shape",
        default=DEFAULT_SHAPE,
        metavar="NAME",
        help=f"a config.json, or one of {', '.join(SHAPES)} (default: {DEFAULT_SHAPE})",
    )
    add("--layers", type=positive, metavar="N", help="keep only N layers of the model")
    add("--page-size", type=positive, default=64, metavar="N", help="(default: 64)")
    add(
        "--mem-fraction",
        type=_fraction,
        default=0.88,
        metavar="F",
        help="part of the GPU's memory for weights and KV cache (default: 0.88)",
    )
    add("--repeats", type=positive, default=3, metavar="N", help="samples each (default: 3)")
    add(
        "--rounds",
        type=positive,
        default=1,
        metavar="N",
        help="go round all backends N times, with new engines (default: 1)",
    )
    add(
        "--together",
        action="store_true",
        help="keep all engines in memory at once and let them take turns at each workload",
    )
    add("--prefill-graph", action="store_true", help="leave SGLang's prefill CUDA graph on")
    add(
        "--engine-args",
        type=_object,
        default={},
        metavar="JSON",
        help="further arguments of sglang.Engine, as a JSON object",
    )
    add("--device", default="cuda", choices=["cuda", "cpu"], help=argparse.SUPPRESS)
    other = parser.add_mutually_exclusive_group()
    other.add_argument(
        "--logits",
        action="store_true",
        help="time nothing: compare the logits of 32 greedy steps between the backends, with "
        "weights that make attention matter",
    )
    other.add_argument(
        "--soak",
        type=float,
        metavar="MINUTES",
        help="time nothing: mixed load for so long on the first backend; fails on an error, a "
        "value that is not finite, or growing memory",
    )
    add("--log-dir", type=Path, metavar="DIR", help="keep the engines' logs there")
    add("--json", type=Path, metavar="FILE", help="write the result as JSON, after every workload")
    add("--plot", type=Path, metavar="FILE.png", help="draw it; needs matplotlib")
    add(
        "--from-json",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="time nothing: print and plot results that --json wrote; several are joined",
    )
    add("--commit", help="commit to record where the package is no git checkout")


def run(args: argparse.Namespace) -> int:
    """Carry the command out: 0 done, 1 nothing was timed or a check failed, 2 it cannot run."""
    for name, path in (("--json", args.json), ("--plot", args.plot)):
        if path is not None and not path.absolute().parent.is_dir():
            return refuse(f"{name} {path}: there is no folder {path.absolute().parent}")
    if args.log_dir is not None and not args.log_dir.is_dir():
        return refuse(f"--log-dir {args.log_dir}: there is no such folder")
    if args.from_json is not None:
        return _redraw(args)
    return _run(args)


def _run(args: argparse.Namespace) -> int:
    from importlib.util import find_spec

    import torch

    from flashcore.bench.serve.shapes import model_shape
    from flashcore.bench.serve.suite import WorkerError

    shape = model_shape(args.model_shape, layers=args.layers)
    workloads = _workloads(args, shape) if args.soak is None and not args.logits else []
    backends = (args.backends or _default_backends(args)).split(",")
    if not all(backends):
        return refuse(f"--backends {args.backends!r}: an empty name")
    if find_spec("sglang") is None:
        return refuse("SGLang is not installed: pip install 'flashcore-attention[sglang]'")
    if args.device == "cuda" and not torch.cuda.is_available():
        return refuse("torch sees no CUDA device to serve on")
    options = [_options(args, backend, shape) for backend in backends]
    # By default SIGTERM would leave the engines running.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        if args.soak is not None:
            return _soak(args, options[0])
        if args.logits:
            return _logits(args, options)
        return _measure(args, options, workloads)
    except WorkerError as error:
        print(f"flashcore bench: {error}", file=sys.stderr)
        return 1


def _workloads(args: argparse.Namespace, shape: ModelShape) -> list[Workload]:
    from flashcore.bench.serve.shapes import model_shape
    from flashcore.bench.serve.workloads import parse_workload

    workloads = [parse_workload(text) for text in args.workloads.split(",")]
    if len({workload.name for workload in workloads}) < len(workloads):
        raise ValueError("--workloads names one of them twice")
    for workload in workloads:
        model = model_shape(workload.model) if workload.model else shape
        tokens = workload.prompt + workload.output
        if tokens > model.longest:
            raise ValueError(
                f"workload {workload.name}: {tokens} tokens a sequence, the limit of {model.name} "
                f"is {model.longest}"
            )
    return workloads


def _default_backends(args: argparse.Namespace) -> str:
    if args.soak is not None:
        return "flashcore"
    return "flashcore,fa3,triton" if args.logits else "flashcore,fa3"


def _options(args: argparse.Namespace, backend: str, shape: ModelShape) -> EngineOptions:
    from flashcore.bench.serve.engine import EngineOptions

    return EngineOptions(
        backend=backend,
        shape=shape,
        decode_batches=(),
        page_size=args.page_size,
        mem_fraction=args.mem_fraction,
        prefill_graph=args.prefill_graph,
        device=args.device,
        extra=tuple(args.engine_args.items()),
    )


def _measure(
    args: argparse.Namespace, options: list[EngineOptions], workloads: list[Workload]
) -> int:
    from flashcore.bench.machine import read_clocks
    from flashcore.bench.serve.report import summarise
    from flashcore.bench.serve.suite import run_serve

    on_gpu = args.device == "cuda"
    head = _head(args)
    clocks = []
    idle = read_clocks(0) if on_gpu else {}

    def after(text: str) -> None:
        print(text, file=sys.stderr, flush=True)
        if on_gpu:
            clocks.append({"after": text.split(":")[0], **read_clocks(0)})

    def whole(measured: dict[str, Any]) -> dict[str, Any]:
        clocks_of_run = {"before": idle, "during": clocks}
        summary = summarise(measured["rows"])
        return {**head, "clocks": clocks_of_run, **measured, "summary": summary}

    measured = run_serve(
        workloads,
        options,
        repeats=args.repeats,
        rounds=args.rounds,
        together=args.together,
        log_dir=args.log_dir,
        after=after,
        keep=lambda measured: _write(args, whole(measured)),
    )
    return _deliver(args, whole(measured))


def _logits(args: argparse.Namespace, options: list[EngineOptions]) -> int:
    from flashcore.bench.serve.logits import compare_backends, format_comparison

    result = compare_backends(options, log_dir=args.log_dir)
    print(format_comparison(result))
    _write(args, {**_head(args), **result})
    return 0 if result["passed"] else 1


def _soak(args: argparse.Namespace, options: EngineOptions) -> int:
    from flashcore.bench.serve.soak import format_soak, run_soak

    if not args.soak > 0:
        return refuse(f"--soak must be more than 0 minutes, got {args.soak}")
    result = run_soak(options, minutes=args.soak, log_dir=args.log_dir)
    print(format_soak(result))
    _write(args, {**_head(args), **result})
    return 0 if result["passed"] else 1


def _head(args: argparse.Namespace) -> dict[str, Any]:
    import platform

    from flashcore.bench.machine import describe_device, package_versions, source_commit

    if args.device == "cuda":
        device = describe_device()
    else:
        device = {"device": platform.processor() or platform.machine(), "driver": "none"}
    return {
        **device,
        "versions": package_versions(),
        "commit": args.commit or source_commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        # Folders are the machine's own business.
        "command": shlex.join(["flashcore", *(_without_folder(word) for word in sys.argv[1:])]),
    }


def _without_folder(word: str) -> str:
    return Path(word).name if Path(word).is_absolute() else word


def _redraw(args: argparse.Namespace) -> int:
    results = []
    for path in args.from_json:
        try:
            results.append(read_result(path, _HEAD))
        except ValueError as error:
            return refuse(str(error))
    return _deliver(args, _joined(results))


def _joined(results: list[dict[str, Any]]) -> dict[str, Any]:
    """One result of several runs: the head of the first, a workload's rows all of its last run.

    Raises ValueError if they are of different devices.
    """
    from flashcore.bench.serve.report import summarise

    if len(results) == 1:
        return results[0]
    devices = {result["device"] for result in results}
    if len(devices) > 1:
        raise ValueError(f"--from-json: results of different devices: {', '.join(sorted(devices))}")
    rows: list[dict[str, Any]] = []
    for result in results:
        anew = {row["workload"] for row in result["rows"]}
        rows = [row for row in rows if row["workload"] not in anew] + result["rows"]
    joined = {
        key: [value for result in results for value in result.get(key, [])]
        for key in ("skipped", "engines")
    }
    runs = [{key: r.get(key) for key in ("date", "commit", "command", "clocks")} for r in results]
    return {**results[0], **joined, "rows": rows, "summary": summarise(rows), "runs": runs}


def _deliver(args: argparse.Namespace, result: dict[str, Any]) -> int:
    from flashcore.bench.serve.report import format_table, plot

    print(f"{result['device']}, driver {result['driver']}, commit {result['commit']}")
    print(format_table(result))
    _write(args, result)
    if args.plot is not None and result["rows"]:
        try:
            plot(result, args.plot)
        except ImportError:
            return refuse("--plot needs matplotlib: pip install 'flashcore-attention[bench]'")
    return 0 if result["rows"] else 1


def _write(args: argparse.Namespace, result: dict[str, Any]) -> None:
    if args.json is not None:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


def _fraction(text: str) -> float:
    number = float(text)
    if not 0 < number < 1:
        raise argparse.ArgumentTypeError(f"must be between 0 and 1, got {number}")
    return number


def _object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("must be a JSON object")
    return value
