"""`flashcore bench serve`: an engine with one attention backend beside another."""

from __future__ import annotations

import argparse
import json
import shlex
import signal
import sys
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashcore.bench.serve.shapes import DEFAULT_SHAPE, KV_CACHE_DTYPES, SHAPES
from flashcore.cli import bench_serve_checks
from flashcore.cli.files import prepare_folder, prepare_output
from flashcore.cli.results import positive, read_result, refuse

if TYPE_CHECKING:
    from flashcore.bench.serve.engine import EngineOptions
    from flashcore.bench.serve.shapes import ModelShape
    from flashcore.bench.serve.workloads import Workload

DEFAULT_WORKLOADS = "shared-16k,shared-4k,context-128k,rollout,nothing-shared,ttft-32k"
_HEAD = {"device", "driver", "commit", "date", "rows", "summary", "skipped"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `flashcore bench serve` to its parser."""
    parser.description = (
        "Time serving: start SGLang's or vLLM's engine with a model of made-up weights for each "
        "attention backend, run workloads on it, print tokens/s, time of a decode step and time "
        "to the first token. Decode figures cover the time in which all sequences are decoding."
    )
    add = parser.add_argument
    add("--engine", choices=["sglang", "vllm"], default="sglang", help="(default: sglang)")
    add(
        "--backends",
        metavar="A,B",
        help="(default: flashcore,fa3; with --logits and --families triton too; with --engine vllm "
        "FLASH_ATTN and TRITON_ATTN in their places; with --soak and --cycles flashcore alone)",
    )
    add(
        "--workloads",
        metavar="A,B",
        help="names, or [MODEL/][GROUPS*]SEQUENCESxPREFIX+UNIQUE:OUTPUT in tokens, such as "
        f"64x16384+512:128 (default: {DEFAULT_WORKLOADS}; further names: headline-1b, headline-3b)",
    )
    add(
        "--model-shape",
        default=DEFAULT_SHAPE,
        metavar="NAME",
        help="the config.json of any model that the engine can load, or one of "
        f"{', '.join(SHAPES)} (default: {DEFAULT_SHAPE})",
    )
    add("--layers", type=positive, metavar="N", help="keep only N layers, some of each kind")
    add("--tp", type=positive, default=1, metavar="N", help="tensor parallelism (default: 1)")
    add("--pp", type=positive, default=1, metavar="N", help="pipeline parallelism (default: 1)")
    add("--dp", type=positive, default=1, metavar="N", help="data parallelism (default: 1)")
    add("--dp-attention", action="store_true", help="data parallelism of the attention only")
    add("--base-gpu", type=int, default=0, metavar="N", help="the first GPU to use (default: 0)")
    add("--page-size", type=positive, default=64, metavar="N", help="(default: 64)")
    add(
        "--kv-cache-dtype",
        type=_kv_cache_dtypes,
        default=("auto",),
        metavar="A,B",
        help="of every engine; each of several in an engine of its own. auto: the model's own, "
        f"bfloat16; {', '.join(KV_CACHE_DTYPES[1:])} (default: auto)",
    )
    add(
        "--mem-fraction",
        type=_fraction,
        default=0.88,
        metavar="F",
        help="part of the GPU's memory for weights and KV cache (default: 0.88)",
    )
    add(
        "--kv-pool",
        type=positive,
        metavar="TOKENS",
        help="size of the KV cache, where several engines share a GPU (default: what fits)",
    )
    add(
        "--repeats",
        type=positive,
        metavar="N",
        help="samples each (default: 3; with --small 15)",
    )
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
        help="further arguments of sglang.Engine, or of vLLM's AsyncEngineArgs, as a JSON object",
    )
    add("--device", default="cuda", choices=["cuda", "cpu"], help=argparse.SUPPRESS)
    add(
        "--deadline",
        type=_seconds,
        metavar="SECONDS",
        help="stop after so long with what there is; not with --soak, and not while engines are "
        "timed one after the other",
    )
    other = parser.add_mutually_exclusive_group()
    other.add_argument(
        "--small",
        action="store_true",
        help="small steps and first tokens: all engines side by side, sample by sample in turn, "
        "medians of ratios with an interval, the first request of each kind after a start apart",
    )
    bench_serve_checks.add_arguments(parser, other)
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
    add(
        "--starts",
        type=positive,
        default=2,
        metavar="N",
        help="with --small: sets of fresh engines (default: 2)",
    )
    add("--commit", help="commit to record where the package is no git checkout")


def run(args: argparse.Namespace) -> int:
    """Carry the command out: 0 done, 1 nothing was timed or a check failed, 2 it cannot run."""
    try:
        for name, path in (("--json", args.json), ("--plot", args.plot)):
            prepare_output(name, path, args.from_json or ())
        if args.log_dir is not None:
            prepare_folder("--log-dir", args.log_dir)
    except ValueError as error:
        return refuse(str(error))
    if args.from_json is not None:
        return _redraw(args)
    return _run(args)


def _run(args: argparse.Namespace) -> int:
    from importlib.util import find_spec

    import torch

    from flashcore.bench.serve.report import NAMES
    from flashcore.bench.serve.shapes import model_shape
    from flashcore.bench.serve.suite import WorkerError

    shape = model_shape(args.model_shape, layers=args.layers)
    timed = args.deterministic or not bench_serve_checks.asked(args)
    workloads = _workloads(args, shape) if timed else []
    backends = (args.backends or _default_backends(args)).split(",")
    if not all(backends):
        return refuse(f"--backends {args.backends!r}: an empty name")
    options = [_options(args, b, shape, dtype) for dtype in args.kv_cache_dtype for b in backends]
    needed = bench_serve_checks.gpus(args, options[0].gpus)
    if find_spec(args.engine) is None:
        name = NAMES[args.engine]
        return refuse(f"{name} is not installed: pip install 'flashcore-attention[{args.engine}]'")
    if args.device == "cuda":
        if not torch.cuda.is_available():
            return refuse("torch sees no CUDA device to serve on")
        if args.base_gpu + needed > torch.cuda.device_count():
            return refuse(
                f"it takes {needed} GPUs from number {args.base_gpu} on, there are "
                f"{torch.cuda.device_count()}"
            )
    # By default SIGTERM would leave the engines running.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        if bench_serve_checks.asked(args):
            return bench_serve_checks.run(args, options, workloads, _head, _write)
        return (_by_turns if args.small else _measure)(args, options, workloads)
    except WorkerError as error:
        print(f"flashcore bench: {error}", file=sys.stderr)
        return 1


def _workloads(args: argparse.Namespace, shape: ModelShape) -> list[Workload]:
    from flashcore.bench.serve.shapes import model_shape
    from flashcore.bench.serve.workloads import DETERMINISTIC, SMALL, parse_workload

    default = ",".join(SMALL) if args.small else DEFAULT_WORKLOADS
    if args.deterministic:
        default = DETERMINISTIC
    workloads = [parse_workload(text) for text in (args.workloads or default).split(",")]
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
    from flashcore.bench.serve.report import PEERS

    if args.soak is not None or args.cycles is not None:
        return "flashcore"
    first, third = PEERS[args.engine]
    three = args.logits or args.families is not None
    return f"flashcore,{first},{third}" if three else f"flashcore,{first}"


def _options(
    args: argparse.Namespace, backend: str, shape: ModelShape, kv_cache_dtype: str
) -> EngineOptions:
    from flashcore.bench.serve.engine import EngineOptions

    if args.base_gpu < 0:
        raise ValueError(f"--base-gpu must be at least 0, got {args.base_gpu}")
    if args.dp_attention and (args.dp == 1 or args.tp % args.dp):
        raise ValueError(
            f"--dp-attention: --tp {args.tp} must be a multiple of --dp {args.dp}, and that above 1"
        )
    if backend == "fa3" and kv_cache_dtype == "fp8_e5m2":
        raise ValueError(
            "--kv-cache-dtype fp8_e5m2: SGLang runs triton in the place of fa3; give --backends "
            "flashcore,triton"
        )
    return EngineOptions(
        backend=backend,
        shape=shape,
        decode_batches=(),
        page_size=args.page_size,
        kv_cache_dtype=kv_cache_dtype,
        label="" if kv_cache_dtype == args.kv_cache_dtype[0] else kv_cache_dtype,
        mem_fraction=args.mem_fraction,
        max_total_tokens=args.kv_pool,
        prefill_graph=args.prefill_graph,
        device=args.device,
        base_gpu=args.base_gpu,
        ranks=(args.tp, args.pp, args.dp),
        dp_attention=args.dp_attention,
        extra=tuple(args.engine_args.items()),
        engine=args.engine,
    )


def _measure(
    args: argparse.Namespace, options: list[EngineOptions], workloads: list[Workload]
) -> int:
    from flashcore.bench.serve.report import summarise
    from flashcore.bench.serve.suite import Turns, run_serve

    head = _head(args)
    clocks, after = _clocks(args)

    def whole(measured: dict[str, Any]) -> dict[str, Any]:
        summary = summarise(measured["rows"])
        return {**head, "clocks": clocks, **measured, "summary": summary}

    measured = run_serve(
        workloads,
        options,
        Turns(args.repeats or 3, args.rounds, args.together),
        log_dir=args.log_dir,
        after=after,
        keep=lambda measured: _write(args, whole(measured)),
    )
    return _deliver(args, whole(measured))


def _clocks(args: argparse.Namespace) -> tuple[dict[str, Any], Callable[[str], None]]:
    """The GPU's clocks before the run and during it, and what to call after each part of it."""
    from flashcore.bench.machine import read_clocks

    on_gpu = args.device == "cuda"
    during: list[dict[str, Any]] = []

    def after(text: str) -> None:
        print(text, file=sys.stderr, flush=True)
        if on_gpu:
            during.append({"after": text.split(":")[0], **read_clocks(args.base_gpu)})

    return {"before": read_clocks(args.base_gpu) if on_gpu else {}, "during": during}, after


def _by_turns(
    args: argparse.Namespace, options: list[EngineOptions], workloads: list[Workload]
) -> int:
    from flashcore.bench.serve.deadline import Deadline
    from flashcore.bench.serve.report import summarise
    from flashcore.bench.serve.turns import Plan, format_ratios, run_turns

    head = _head(args)
    clocks, after = _clocks(args)

    def whole(measured: dict[str, Any]) -> dict[str, Any]:
        summary = summarise(measured["rows"])
        return {**head, "clocks": clocks, **measured, "summary": summary}

    plan = Plan(repeats=args.repeats or 15, starts=args.starts, deadline=Deadline(args.deadline))
    measured = run_turns(
        workloads,
        options,
        plan,
        log_dir=args.log_dir,
        after=after,
        keep=lambda measured: _write(args, whole(measured)),
    )
    print(format_ratios(measured["rows"]))
    return _deliver(args, whole(measured))


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

    dtypes = dict.fromkeys(row.get("kv_cache_dtype", "auto") for row in result["rows"])
    caches = "" if list(dtypes) in ([], ["auto"]) else f", KV cache {', '.join(dtypes)}"
    print(f"{result['device']}, driver {result['driver']}, commit {result['commit']}{caches}")
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


def _kv_cache_dtypes(text: str) -> tuple[str, ...]:
    dtypes = tuple(text.split(","))
    for dtype in dtypes:
        if dtype not in KV_CACHE_DTYPES:
            known = ", ".join(KV_CACHE_DTYPES)
            raise argparse.ArgumentTypeError(f"{dtype!r} is not one of {known}")
    if len(set(dtypes)) < len(dtypes):
        raise argparse.ArgumentTypeError(f"{text!r} names one of them twice")
    return dtypes


def _seconds(text: str) -> float:
    number = float(text)
    if not number > 0:
        raise argparse.ArgumentTypeError(f"must be more than 0, got {number}")
    return number


def _object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("must be a JSON object")
    return value
